//! Medians of per-round ratios with bootstrap intervals, as Markdown and JSON.

use std::{collections::BTreeMap, fmt::Write as _, fs};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde::Serialize;

use crate::load::Sample;

/// Resamples of a bootstrap interval.
const RESAMPLES: usize = 2000;

/// A figure with its 95 % interval.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Estimate {
    median: f64,
    low: f64,
    high: f64,
}

/// Everything that one run tells.
#[derive(Debug, Serialize)]
pub struct Report {
    machine: String,
    rounds: usize,
    targets: BTreeMap<String, BTreeMap<&'static str, Estimate>>,
    ratios: BTreeMap<&'static str, Estimate>,
}

type Figure = fn(&Sample) -> f64;

const FIGURES: &[(&str, Figure)] = &[
    ("gbit_per_second", |s| s.bytes_per_second * 8e-9),
    ("gbit_per_second_8", |s| s.bytes_per_second_8 * 8e-9),
    ("cpu_seconds_per_gb", |s| s.cpu_per_gb),
    ("cpu_seconds_per_gb_8", |s| s.cpu_per_gb_8),
    ("p50_microseconds", |s| s.p50 * 1e6),
    ("p99_microseconds", |s| s.p99 * 1e6),
    ("connections_per_second", |s| s.connects_per_second),
    ("cpu_milliseconds_per_connection", |s| s.cpu_per_connect * 1e3),
];

impl Report {
    /// Reduces rounds of samples, one per target in the order of `names`.
    pub fn new(names: &[&str], rounds: &[Vec<Sample>], idle: &[f64]) -> Self {
        let column = |name: &str, figure: Figure| -> Option<Vec<f64>> {
            let at = names.iter().position(|other| *other == name)?;
            Some(rounds.iter().map(|round| figure(&round[at])).collect())
        };
        let mut targets = BTreeMap::new();
        for (at, name) in names.iter().enumerate() {
            let mut figures: BTreeMap<_, _> = FIGURES
                .iter()
                .filter_map(|(label, figure)| Some((*label, estimate(&column(name, *figure)?))))
                .collect();
            let bytes = idle[at];
            figures.insert("bytes_per_idle_connection", Estimate { median: bytes, low: bytes, high: bytes });
            targets.insert((*name).to_owned(), figures);
        }
        let (near, far, envoy) = ("undermesh same node", "undermesh cross node", "envoy cross node");
        let (plain, plain_far) = ("plain same node", "plain cross node");
        let ratio = |ours: Option<Vec<f64>>, theirs: Option<Vec<f64>>| {
            Some(estimate(&ours?.iter().zip(theirs?).map(|(a, b)| a / b).collect::<Vec<_>>()))
        };
        let added = |name: &str, figure: Figure| {
            let (with, without) = (column(name, figure)?, column(plain_far, figure)?);
            Some(with.iter().zip(without).map(|(a, b)| (a - b).max(1e-9)).collect())
        };
        let inverse = |name, figure: Figure| Some(column(name, figure)?.iter().map(|x| 1.0 / x).collect());
        let memory = |name: &str| names.iter().position(|other| *other == name).map(|at| vec![idle[at]]);
        let wanted: Vec<(&'static str, Option<Estimate>)> = vec![
            (
                "same_node_throughput_vs_plain",
                ratio(column(near, |s| s.bytes_per_second), column(plain, |s| s.bytes_per_second)),
            ),
            (
                "same_node_throughput_vs_plain_8",
                ratio(column(near, |s| s.bytes_per_second_8), column(plain, |s| s.bytes_per_second_8)),
            ),
            ("same_node_p50_vs_plain", ratio(column(near, |s| s.p50), column(plain, |s| s.p50))),
            (
                "cross_node_throughput_vs_envoy",
                ratio(column(far, |s| s.bytes_per_second), column(envoy, |s| s.bytes_per_second)),
            ),
            (
                "cross_node_throughput_vs_envoy_8",
                ratio(column(far, |s| s.bytes_per_second_8), column(envoy, |s| s.bytes_per_second_8)),
            ),
            (
                "cross_node_bytes_per_cpu_vs_envoy",
                ratio(inverse(far, |s| s.cpu_per_gb), inverse(envoy, |s| s.cpu_per_gb)),
            ),
            (
                "cross_node_bytes_per_cpu_vs_envoy_8",
                ratio(inverse(far, |s| s.cpu_per_gb_8), inverse(envoy, |s| s.cpu_per_gb_8)),
            ),
            ("cross_node_added_p50_vs_envoy", ratio(added(far, |s| s.p50), added(envoy, |s| s.p50))),
            ("cross_node_added_p99_vs_envoy", ratio(added(far, |s| s.p99), added(envoy, |s| s.p99))),
            (
                "connections_per_cpu_vs_envoy",
                ratio(inverse(far, |s| s.cpu_per_connect), inverse(envoy, |s| s.cpu_per_connect)),
            ),
            ("idle_connection_memory_vs_envoy", ratio(memory(far), memory(envoy))),
        ];
        let ratios = wanted.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        Self { machine: machine(), rounds: rounds.len(), targets, ratios }
    }

    /// The report as a table for people.
    pub fn markdown(&self) -> String {
        let mut text = format!("{} rounds on {}\n\n| figure |", self.rounds, self.machine);
        let names: Vec<_> = self.targets.keys().collect();
        let _ =
            writeln!(text, " {} |", names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(" | "));
        let _ = writeln!(text, "| --- |{}", " --- |".repeat(names.len()));
        let labels = FIGURES.iter().map(|(label, _)| *label).chain(["bytes_per_idle_connection"]);
        for label in labels {
            let _ = write!(text, "| {label} |");
            for name in &names {
                let _ = write!(text, " {:.2} |", self.targets[*name][label].median);
            }
            text.push('\n');
        }
        text.push_str("\n| ratio | median | 95 % interval |\n| --- | --- | --- |\n");
        for (name, value) in &self.ratios {
            let _ =
                writeln!(text, "| {name} | {:.3} | {:.3} to {:.3} |", value.median, value.low, value.high);
        }
        text
    }

    /// The report for programs.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("numbers and strings always serialise")
    }
}

fn estimate(values: &[f64]) -> Estimate {
    let mut rng = StdRng::seed_from_u64(1);
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| median((0..values.len()).map(|_| values[rng.random_range(0..values.len())]).collect()))
        .collect();
    medians.sort_by(f64::total_cmp);
    Estimate {
        median: median(values.to_vec()),
        low: medians[RESAMPLES * 25 / 1000],
        high: medians[RESAMPLES * 975 / 1000],
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

fn machine() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let field = |name: &str| {
        cpuinfo.lines().find(|line| line.starts_with(name)).and_then(|line| line.split(": ").nth(1))
    };
    let cores = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{cores} x {}, Linux {}", field("model name").unwrap_or("unknown processor"), kernel.trim())
}
