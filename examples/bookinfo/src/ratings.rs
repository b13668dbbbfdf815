//! ratings: the stars of a book, and the variants of it that misbehave on purpose.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use serde_json::{Value, json};

use crate::{
    settings::Lookup,
    web::{self, Answer, App},
};

/// Posted ratings are kept for so many books.
const KEPT: usize = 1000;
/// What `v-delayed` adds to every second answer.
const DELAY: Duration = Duration::from_secs(7);

/// `SERVICE_VERSION`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Plain,
    /// v2: behind a database, which this build does not bring.
    Database,
    /// Every second answer, by chance, is 503.
    Faulty,
    /// Every second answer, by chance, is late.
    Delayed,
    /// Answers 503 in every second period of this length.
    Alternating(Duration),
}

/// The service.
#[derive(Debug)]
pub struct Ratings {
    variant: Variant,
    started: Instant,
    posted: Mutex<HashMap<u64, Value>>,
}

impl Ratings {
    /// Reads the environment.
    pub fn from_env(env: Lookup<'_>) -> Self {
        let variant = match env("SERVICE_VERSION").unwrap_or_default().as_str() {
            "v2" => Variant::Database,
            "v-faulty" => Variant::Faulty,
            "v-delayed" => Variant::Delayed,
            "v-unavailable" => Variant::Alternating(Duration::from_secs(60)),
            "v-unhealthy" => Variant::Alternating(Duration::from_secs(15 * 60)),
            _ => Variant::Plain,
        };
        Self { variant, started: Instant::now(), posted: Mutex::default() }
    }

    fn unavailable(&self, uptime: Duration) -> bool {
        match self.variant {
            Variant::Alternating(period) => (uptime.as_secs() / period.as_secs()) % 2 == 1,
            _ => false,
        }
    }

    async fn get(&self, id: u64) -> Answer {
        match self.variant {
            Variant::Faulty if rand::random() => return unavailable(),
            Variant::Delayed if rand::random() => tokio::time::sleep(DELAY).await,
            Variant::Alternating(_) if self.unavailable(self.started.elapsed()) => return unavailable(),
            Variant::Database => {
                let error = json!({"error": "could not connect to ratings database"});
                return web::json(StatusCode::INTERNAL_SERVER_ERROR, &error);
            }
            _ => {}
        }
        let posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        let ratings = posted.get(&id).cloned().unwrap_or_else(|| json!({"Reviewer1": 5, "Reviewer2": 4}));
        web::json(StatusCode::OK, &json!({"id": id, "ratings": ratings}))
    }

    fn post(&self, id: u64, body: &[u8]) -> Answer {
        let Ok(ratings) = serde_json::from_slice::<Value>(body) else {
            let error = json!({"error": "please provide valid ratings JSON"});
            return web::json(StatusCode::BAD_REQUEST, &error);
        };
        if self.variant == Variant::Database {
            let error = json!({"error": "Post not implemented for database backed ratings"});
            return web::json(StatusCode::NOT_IMPLEMENTED, &error);
        }
        let mut posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        if posted.len() >= KEPT && !posted.contains_key(&id) {
            return web::json(StatusCode::INSUFFICIENT_STORAGE, &json!({"error": "too many books"}));
        }
        posted.insert(id, ratings.clone());
        web::json(StatusCode::OK, &json!({"id": id, "ratings": ratings}))
    }
}

impl App for Ratings {
    async fn answer(&self, request: Request<Bytes>) -> Answer {
        let path = request.uri().path();
        if let Some(id) = path.strip_prefix("/ratings/") {
            let Ok(id) = id.parse::<u64>() else {
                let error = json!({"error": "please provide numeric product ID"});
                return web::json(StatusCode::BAD_REQUEST, &error);
            };
            return match *request.method() {
                Method::GET => self.get(id).await,
                Method::POST => self.post(id, request.body()),
                _ => web::not_found(),
            };
        }
        match (request.method(), path) {
            (&Method::GET, "/health") if self.unavailable(self.started.elapsed()) => {
                let status = json!({"status": "Ratings is not healthy"});
                web::json(StatusCode::INTERNAL_SERVER_ERROR, &status)
            }
            (&Method::GET, "/health") => web::json(StatusCode::OK, &json!({"status": "Ratings is healthy"})),
            _ => web::not_found(),
        }
    }
}

fn unavailable() -> Answer {
    web::json(StatusCode::SERVICE_UNAVAILABLE, &json!({"error": "Service unavailable"}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alternating_variants_fail_in_every_second_period() {
        let env = |name: &str| (name == "SERVICE_VERSION").then(|| "v-unavailable".to_owned());
        let ratings = Ratings::from_env(&env);
        for (seconds, expected) in [(0, false), (59, false), (60, true), (119, true), (120, false)] {
            assert_eq!(ratings.unavailable(Duration::from_secs(seconds)), expected, "after {seconds} s");
        }
    }
}
