//! The other end is OpenSSL's own program, in both roles, with key updates.

use std::{
    io::{BufRead as _, BufReader, Read, Write as _},
    net::SocketAddr,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use mesh_core::id::Identity;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::TlsStream;
use crate::testing::{Leaf, MiniCa};

const DEADLINE: Duration = Duration::from_secs(30);

fn id(sa: &str) -> Identity {
    Identity::new("cluster.local", "shop", sa)
}

/// A running program: what it is told, and what it says, line by line.
struct OpenSsl {
    child: Child,
    stdin: ChildStdin,
    lines: mpsc::Receiver<String>,
}

impl OpenSsl {
    /// `s_client` or `s_server` as `sa`, with that suite.
    fn start(verb: &[&str], folder: &Path, ca: &MiniCa, sa: &str, suite: &str) -> Self {
        let issued = ca.issue(Leaf::of(&id(sa)));
        let pem = |label: &str, bytes: &[u8]| pem::encode(&pem::Pem::new(label, bytes));
        let file = |name: &str, text: String| {
            let path = folder.join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        // What it says of a new key must not wait in a buffer.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "openssl"]).args(verb).args([
            "-tls1_3",
            "-alpn",
            "h2",
            "-verify_return_error",
            "-ciphersuites",
            suite,
        ]);
        command.arg("-CAfile").arg(file("root.pem", ca.root_pem()));
        command.arg("-cert").arg(file("cert.pem", pem("CERTIFICATE", &issued.chain[0])));
        command.arg("-key").arg(file("key.pem", pem("PRIVATE KEY", issued.key.secret_der())));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("openssl: `cargo xtask setup` installs it");
        let (sender, lines) = mpsc::sync_channel(1024);
        let outputs: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for output in outputs {
            let sender = sender.clone();
            std::thread::spawn(move || {
                BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
            });
        }
        Self { stdin: child.stdin.take().unwrap(), child, lines }
    }

    /// A line: text for the peer, or `k` and `K`, a new key, the latter with the wish for the peer's.
    fn say(&mut self, line: &str) {
        self.stdin.write_all(format!("{line}\n").as_bytes()).unwrap();
        self.stdin.flush().unwrap();
    }

    /// Waits for a line that holds one of `words`.
    fn hear(&self, words: &[&str]) -> String {
        let mut heard = Vec::new();
        loop {
            match self.lines.recv_timeout(DEADLINE) {
                Ok(line) if words.iter().any(|word| line.contains(word)) => return line,
                Ok(line) => heard.push(line),
                Err(error) => panic!("{error}: no {words:?} in {heard:#?}"),
            }
        }
    }
}

impl Drop for OpenSsl {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn talk(mut ours: TlsStream<TcpStream>, mut theirs: OpenSsl) {
    let send = async |ours: &mut TlsStream<TcpStream>, text: &str| {
        ours.write_all(format!("{text}\n").as_bytes()).await.unwrap();
        ours.flush().await.unwrap();
    };
    let expect = async |ours: &mut TlsStream<TcpStream>, text: &str| {
        let mut got = vec![0; text.len() + 1];
        tokio::time::timeout(DEADLINE, ours.read_exact(&mut got)).await.unwrap().unwrap();
        assert_eq!(got, format!("{text}\n").as_bytes());
    };
    send(&mut ours, "word one").await;
    theirs.hear(&["word one"]);
    for round in 0..3 {
        // Their new key and their wish for ours, then their new key alone; each carries text at once.
        for (key, text) in [("K", "asked"), ("k", "told")] {
            theirs.say(key);
            // Said in one breath, the text would be a part of the command.
            theirs.hear(&["KEYUPDATE", "SSL_do_handshake"]);
            theirs.say(&format!("{text} {round}"));
            expect(&mut ours, &format!("{text} {round}")).await;
            send(&mut ours, &format!("answer to {text} {round}")).await;
            theirs.hear(&[&format!("answer to {text} {round}")]);
        }
    }
    ours.shutdown().await.unwrap();
}

const SUITES: [&str; 2] = ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"];

#[tokio::test]
async fn openssl_s_server_understands_us_and_we_it() {
    for suite in SUITES {
        let (ca, folder) = (MiniCa::new(), tempfile::tempdir().unwrap());
        let verb = ["s_server", "-accept", "127.0.0.1:0", "-Verify", "2"];
        let theirs = OpenSsl::start(&verb, folder.path(), &ca, "cart", suite);
        let address: SocketAddr = theirs.hear(&["ACCEPT "]).trim_start_matches("ACCEPT ").parse().unwrap();
        let tcp = TcpStream::connect(address).await.unwrap();
        let web = ca.certificate(&id("web"));
        let (ours, peer) = web.client_tls().connect(tcp, vec![id("cart")]).await.unwrap();
        assert_eq!(peer, id("cart"));
        talk(ours, theirs).await;
    }
}

#[tokio::test]
async fn openssl_s_client_understands_us_and_we_it() {
    for suite in SUITES {
        let (ca, folder) = (MiniCa::new(), tempfile::tempdir().unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let verb = ["s_client", "-connect", &address, "-no_ign_eof"];
        let theirs = OpenSsl::start(&verb, folder.path(), &ca, "web", suite);
        let (tcp, _) = listener.accept().await.unwrap();
        let (ours, peer) = ca.certificate(&id("cart")).server_tls().accept(tcp).await.unwrap();
        assert_eq!(peer, id("web"));
        talk(ours, theirs).await;
    }
}
