//! `cargo xtask test kernels`: what is claimed to run on a kernel is run on it. Boots Debian's kernels in software
//! emulation, with an initramfs that holds our programs and suites, and counts what they print on the console.

mod image;
mod package;

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    sync::mpsc::{RecvTimeoutError, sync_channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use crate::{
    shell,
    test::{Counter, Totals},
};

/// Kernels that are claimed besides the one that this machine runs.
const RELEASES: &[&str] = &["6.1", "6.12"];
/// A boot takes nine seconds on two cores, the suites run about ten times slower than on the machine itself.
const DEADLINE: Duration = Duration::from_secs(900);
/// For the programs' text and the suites' connections.
const MEMORY_MIB: u32 = 3072;
/// What the init script prints around each suite, and at its end.
const SUITE_MARK: &str = "@suite ";
const END_MARK: &str = "@end";

/// Boots each kernel and runs the suites in it. One more test per kernel: that it came to its end.
///
/// # Errors
/// When a kernel cannot be had or the image cannot be made.
pub fn test() -> anyhow::Result<Totals> {
    println!("test: kernels {}", RELEASES.join(", "));
    let folder = shell::target_dir().join("kernels");
    std::fs::create_dir_all(&folder)?;
    let contents = image::Contents::collect()?;
    let mut totals = Totals::default();
    for release in RELEASES {
        let kernel = package::fetch(release, &folder)?;
        let initramfs = image::pack(&contents, &kernel, &folder)?;
        println!("kernels: booting {}", kernel.version);
        let began = Instant::now();
        totals += boot(&kernel.image, &initramfs).with_context(|| kernel.version.clone())?;
        println!("kernels: {} took {} s", kernel.version, began.elapsed().as_secs());
    }
    Ok(totals)
}

fn boot(kernel: &Path, initramfs: &Path) -> anyhow::Result<Totals> {
    let mut qemu = Command::new("qemu-system-x86_64");
    // /dev/kvm may be there and not work; emulation is slow and the same everywhere.
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", &MEMORY_MIB.to_string()]);
    qemu.args(["-nographic", "-no-reboot", "-kernel"]).arg(kernel).arg("-initrd").arg(initramfs);
    qemu.args(["-append", "console=ttyS0 panic=-1 quiet"]);
    let mut machine = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start qemu")?;
    let console = machine.stdout.take().context("the console")?;
    let (sender, lines) = sync_channel(1024);
    let reader = thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + DEADLINE;
    let mut report = Report::default();
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                let line = String::from_utf8_lossy(&line);
                println!("  | {}", line.trim_end());
                report.line(line.trim_end());
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                eprintln!("kernels: not done after {DEADLINE:?}");
                machine.kill()?;
                break;
            }
        }
    }
    machine.wait()?;
    drop(lines);
    if reader.join().is_err() {
        eprintln!("kernels: the console's reader failed");
    }
    Ok(report.totals())
}

/// (pure) The console's lines, counted per suite.
#[derive(Debug, Default)]
struct Report {
    totals: Totals,
    suite: Counter,
    ended: bool,
}

impl Report {
    fn line(&mut self, line: &str) {
        // `@suite NAME STATUS`, after each suite.
        if let Some(ended) = line.strip_prefix(SUITE_MARK) {
            let suite = std::mem::take(&mut self.suite);
            self.totals += suite.finish(ended.split_whitespace().nth(1) == Some("0"));
        } else if line == END_MARK {
            self.ended = true;
        } else {
            self.suite.line(line);
        }
    }

    fn totals(self) -> Totals {
        let mut totals = self.totals;
        match self.ended {
            true => totals.passed += 1,
            false => totals.failed += 1,
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(console: &str) -> (usize, usize) {
        let mut report = Report::default();
        console.lines().for_each(|line| report.line(line));
        let totals = report.totals();
        (totals.passed, totals.failed)
    }

    #[test]
    fn the_console_is_counted() {
        assert_eq!(totals("test result: ok. 3 passed; 0 failed;\n@suite kernel 0\n@end"), (4, 0));
        assert_eq!(totals("@suite probe 0\n@suite kernel 101\n@end"), (1, 1), "a suite that did not run");
        assert_eq!(totals("@suite probe 0\nKernel panic"), (0, 1), "a kernel that did not come to its end");
        assert_eq!(totals(""), (0, 1));
    }
}
