//! reviews: two opinions on every book, with stars from ratings in v2 (black) and v3 (red).

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::{
    headers,
    settings::{self, Lookup, Target},
    web::{self, Answer, App},
};

const TEXTS: [(&str, &str); 2] = [
    ("Reviewer1", "An extremely entertaining play by Shakespeare. The slapstick humour is refreshing!"),
    (
        "Reviewer2",
        "Absolutely fun and entertaining. The play lacks thematic depth when compared to other plays by \
         Shakespeare.",
    ),
];

/// The service.
#[derive(Debug)]
pub struct Reviews {
    ratings: Option<Target>,
    star_color: String,
    pod_name: String,
    cluster_name: String,
}

impl Reviews {
    /// Reads the environment.
    ///
    /// # Errors
    /// When a port is not a number.
    pub fn from_env(env: Lookup<'_>) -> anyhow::Result<Self> {
        let ratings = match settings::flag("ENABLE_RATINGS", env) {
            true => Some(Target::from_env("ratings", env)?),
            false => None,
        };
        Ok(Self {
            ratings,
            star_color: env("STAR_COLOR").unwrap_or_else(|| "black".to_owned()),
            pod_name: settings::pod_name(env),
            // The original prints Java's null.
            cluster_name: env("CLUSTER_NAME").unwrap_or_else(|| "null".to_owned()),
        })
    }

    /// How long ratings may take: the fault-injection tasks live on this difference.
    fn patience(&self) -> Duration {
        match self.star_color.as_str() {
            "black" => Duration::from_secs(10),
            _ => Duration::from_millis(2500),
        }
    }

    async fn stars(&self, ratings: &Target, id: u64, incoming: &HeaderMap) -> Option<Value> {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = format!("/ratings/{id}").parse().ok()?;
        *request.headers_mut() = headers::forwarded_with_user(incoming);
        match web::call(ratings, request, self.patience()).await {
            Ok(answer) if answer.status() == StatusCode::OK => {
                serde_json::from_slice::<Value>(answer.body()).ok()?.get("ratings").cloned()
            }
            Ok(answer) => {
                eprintln!("unable to contact ratings: status {}", answer.status().as_u16());
                None
            }
            Err(error) => {
                eprintln!("unable to contact ratings: {error}");
                None
            }
        }
    }

    async fn reviews(&self, id: u64, incoming: &HeaderMap) -> Value {
        let stars = match &self.ratings {
            Some(ratings) => Some(self.stars(ratings, id, incoming).await),
            None => None,
        };
        let reviews = TEXTS.map(|(reviewer, text)| {
            let mut review = json!({"reviewer": reviewer, "text": text});
            if let Some(stars) = &stars {
                let given = stars.as_ref().and_then(|stars| stars.get(reviewer)).and_then(Value::as_i64);
                review["rating"] = match given {
                    Some(stars) => json!({"stars": stars, "color": self.star_color}),
                    None => json!({"error": "Ratings service is currently unavailable"}),
                };
            }
            review
        });
        json!({
            "id": id.to_string(),
            "podname": self.pod_name,
            "clustername": self.cluster_name,
            "reviews": reviews,
        })
    }
}

impl App for Reviews {
    async fn answer(&self, request: Request<Bytes>) -> Answer {
        let path = request.uri().path();
        match (request.method(), path.strip_prefix("/reviews/")) {
            (&Method::GET, Some(id)) => match id.parse() {
                Ok(id) => web::json(StatusCode::OK, &self.reviews(id, request.headers()).await),
                Err(_) => web::not_found(),
            },
            (&Method::GET, None) if path == "/health" => {
                web::json(StatusCode::OK, &json!({"status": "Reviews is healthy"}))
            }
            _ => web::not_found(),
        }
    }
}
