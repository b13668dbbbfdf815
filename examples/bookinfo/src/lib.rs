//! Bookinfo, the sample application of service meshes, as small programs for machines that pull no images.
//!
//! Ports, JSON, page markers, environment variables and timers are those of the original, because the tasks that
//! people run on it depend on them: productpage tries reviews twice with 3 s each, reviews waits 10 s (black stars)
//! or 2.5 s (red) for ratings, and every call is a connection of its own.

#![forbid(unsafe_code)]

pub mod client;
pub mod details;
pub mod headers;
pub mod page;
pub mod productpage;
pub mod ratings;
pub mod reviews;
pub mod settings;
pub mod web;
