//! The real object in the real kernel: each rule of the capture has a test that fails without it. Needs root.
#![expect(clippy::unwrap_used, reason = "helpers of tests panic like the tests themselves")]

#[path = "kernel/arrivals.rs"]
mod arrivals;
#[path = "kernel/bed.rs"]
mod bed;
#[path = "kernel/capture.rs"]
mod capture;
#[path = "kernel/direct.rs"]
mod direct;
#[path = "kernel/earlier.rs"]
mod earlier;
#[path = "kernel/forgery.rs"]
mod forgery;
#[path = "kernel/kubelet.rs"]
mod kubelet;
#[path = "kernel/life.rs"]
mod life;
#[path = "kernel/quota.rs"]
mod quota;

const BOTH: [bool; 2] = [false, true];
