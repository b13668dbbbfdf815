//! details: what is known about a book.

use anyhow::ensure;
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use serde_json::json;

use crate::{
    settings::{self, Lookup},
    web::{self, Answer, App},
};

/// The service.
#[derive(Debug)]
pub struct Details(());

impl Details {
    /// Reads the environment.
    ///
    /// # Errors
    /// When the external book service is asked for: this build has no client for it.
    pub fn from_env(env: Lookup<'_>) -> anyhow::Result<Self> {
        ensure!(
            !settings::flag("ENABLE_EXTERNAL_BOOK_SERVICE", env),
            "ENABLE_EXTERNAL_BOOK_SERVICE: this build of details has no client for the external book service"
        );
        Ok(Self(()))
    }
}

impl App for Details {
    async fn answer(&self, request: Request<Bytes>) -> Answer {
        let path = request.uri().path();
        match (request.method(), path.strip_prefix("/details/")) {
            (&Method::GET, Some(id)) => book(id),
            (&Method::GET, None) if path == "/health" => {
                web::json(StatusCode::OK, &json!({"status": "Details is healthy"}))
            }
            _ => web::not_found(),
        }
    }
}

fn book(id: &str) -> Answer {
    let Ok(id) = id.parse::<u64>() else {
        return web::json(StatusCode::BAD_REQUEST, &json!({"error": "please provide numeric product id"}));
    };
    let book = json!({
        "id": id,
        "author": "William Shakespeare",
        "year": 1595,
        "type": "paperback",
        "pages": 200,
        "publisher": "PublisherA",
        "language": "English",
        "ISBN-10": "1234567890",
        "ISBN-13": "123-1234567890",
    });
    web::json(StatusCode::OK, &book)
}
