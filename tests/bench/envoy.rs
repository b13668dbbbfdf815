//! Two Envoys that do the tunnel's job: TCP proxy, HTTP/2 CONNECT over TLS 1.3 with client certificates.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::Context as _;
use mesh_core::id::Identity;
use mesh_net::testing::{Leaf, MiniCa};
use mesh_tests::{Pod, netns, peer::dial, wait, world::Family};
use tempfile::TempDir;

use crate::{load, usage::Processes};

/// Where the client's Envoy listens, in the client's pod.
const ENTRY_PORT: u16 = 10001;
/// Where the server's Envoy listens, in the server's pod.
const TUNNEL_PORT: u16 = 15443;

/// A running pair; ended when dropped.
pub struct EnvoyPair {
    children: Vec<Child>,
    _files: TempDir,
}

impl EnvoyPair {
    /// Starts one Envoy in each pod and waits until the pair carries bytes.
    pub fn start(program: &Path, client: &Pod, server: &Pod) -> anyhow::Result<Self> {
        let files = tempfile::Builder::new().prefix("undermesh-bench-").tempdir()?;
        certificates(files.path())?;
        let tunnel = server.at(Family::V4, TUNNEL_PORT)?;
        let mut pair = Self { children: Vec::new(), _files: files };
        let directory = pair._files.path().to_owned();
        for (pod, name, config) in [
            (server, "server", server_config(&directory)),
            (client, "client", client_config(&directory, tunnel)),
        ] {
            let path = directory.join(format!("{name}.yaml"));
            fs::write(&path, config)?;
            let log = fs::File::create(directory.join(format!("{name}.log")))?;
            // The child inherits the namespace of the thread that starts it.
            let child = netns::within(&pod.netns, || {
                Command::new(program)
                    .args(["-c", &path.to_string_lossy(), "--disable-hot-restart", "-l", "warning"])
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(log)
                    .spawn()
                    .with_context(|| format!("start {}", program.display()))
            })?;
            pair.children.push(child);
        }
        wait::until("the Envoy pair to carry bytes", || {
            use std::io::{Read as _, Write as _};
            let mut stream = dial(client, pair.entry()).map_err(|error| format!("{error:#}"))?;
            let mut ping = [7; 65];
            stream
                .write_all(&ping)
                .and_then(|()| stream.read_exact(&mut ping[1..]))
                .map_err(|error| format!("{error}: see {}", directory.display()))
        })?;
        Ok(pair)
    }

    /// Where the client dials.
    pub fn entry(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, ENTRY_PORT).into()
    }

    /// Both processes.
    pub fn processes(&self) -> Processes {
        Processes::new(self.children.iter().map(Child::id).collect())
    }
}

impl Drop for EnvoyPair {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A root and one certificate for each end.
fn certificates(directory: &Path) -> anyhow::Result<()> {
    let ca = MiniCa::new();
    for name in ["client", "server"] {
        let issued = ca.issue(Leaf::of(&Identity::new("bench", "bench", name)));
        fs::write(directory.join(format!("{name}.crt")), pem("CERTIFICATE", &issued.chain[0]))?;
        fs::write(directory.join(format!("{name}.key")), pem("PRIVATE KEY", issued.key.secret_der()))?;
    }
    Ok(fs::write(directory.join("ca.crt"), ca.root_pem())?)
}

fn pem(label: &str, bytes: &[u8]) -> String {
    pem::encode(&pem::Pem::new(label, bytes))
}

fn tls(directory: &Path, name: &str) -> String {
    let file = |file: String| format!("{{filename: {}}}", directory.join(file).display());
    format!(
        "common_tls_context:
              alpn_protocols: [h2]
              tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}
              tls_certificates: [{{certificate_chain: {}, private_key: {}}}]
              validation_context: {{trusted_ca: {}}}",
        file(format!("{name}.crt")),
        file(format!("{name}.key")),
        file("ca.crt".into())
    )
}

fn server_config(directory: &Path) -> String {
    format!(
        "
static_resources:
  listeners:
  - address: {{socket_address: {{address: 0.0.0.0, port_value: {TUNNEL_PORT}}}}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          {tls}
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: tunnel
          codec_type: HTTP2
          stream_idle_timeout: 0s
          http2_protocol_options: {{allow_connect: true}}
          upgrade_configs: [{{upgrade_type: CONNECT}}]
          route_config:
            virtual_hosts:
            - name: all
              domains: ['*']
              routes:
              - match: {{connect_matcher: {{}}}}
                route:
                  cluster: application
                  timeout: 0s
                  upgrade_configs: [{{upgrade_type: CONNECT, connect_config: {{}}}}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: application
    type: STATIC
    load_assignment:
      cluster_name: application
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]
",
        tls = tls(directory, "server"),
        port = load::PORT,
    )
}

fn client_config(directory: &Path, tunnel: SocketAddr) -> String {
    format!(
        "
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {ENTRY_PORT}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: tunnel
          cluster: tunnel
          idle_timeout: 0s
          tunneling_config: {{hostname: 'application:80'}}
  clusters:
  - name: tunnel
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
          '@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
          {tls}
    load_assignment:
      cluster_name: tunnel
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {ip}, port_value: {port}}}}}}}}}]}}]
",
        tls = tls(directory, "client"),
        ip = tunnel.ip(),
        port = tunnel.port(),
    )
}
