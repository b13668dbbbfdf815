//! productpage: the page, its sessions, and the API on top of the other services.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{
    headers, page,
    settings::{Lookup, Target},
    web::{self, Answer, App},
};

/// Each try of each call.
const PATIENCE: Duration = Duration::from_secs(3);
/// Reviews are asked so often: the original's bug, kept because the fault-injection task shows it.
const REVIEWS_TRIES: usize = 2;

/// The service.
#[derive(Debug)]
pub struct Productpage {
    details: Target,
    reviews: Target,
    ratings: Target,
    flood_factor: usize,
    results: Arc<Results>,
}

/// Answers by service and status, for `/metrics`.
#[derive(Debug, Default)]
struct Results(Mutex<BTreeMap<(&'static str, u16), u64>>);

impl Productpage {
    /// Reads the environment.
    ///
    /// # Errors
    /// When a port or the flood factor is not a number.
    pub fn from_env(env: Lookup<'_>) -> anyhow::Result<Self> {
        let flood_factor = match env("FLOOD_FACTOR") {
            None => 0,
            Some(text) => {
                text.parse().map_err(|_| anyhow::anyhow!("FLOOD_FACTOR: {text:?} is not a number"))?
            }
        };
        Ok(Self {
            details: Target::from_env("details", env)?,
            reviews: Target::from_env("reviews", env)?,
            ratings: Target::from_env("ratings", env)?,
            flood_factor,
            results: Arc::default(),
        })
    }

    async fn details(&self, id: &str, headers: &HeaderMap) -> (StatusCode, Value) {
        let sorry = "Sorry, product details are currently unavailable for this book.";
        or_error(fetch(&self.details, "details", id, headers, &self.results).await, sorry)
    }

    async fn reviews(&self, id: &str, headers: &HeaderMap) -> (StatusCode, Value) {
        let mut last = Err(StatusCode::INTERNAL_SERVER_ERROR);
        for _ in 0..REVIEWS_TRIES {
            last = fetch(&self.reviews, "reviews", id, headers, &self.results).await;
            if last.is_ok() {
                break;
            }
        }
        or_error(last, "Sorry, product reviews are currently unavailable for this book.")
    }

    async fn ratings(&self, id: &str, headers: &HeaderMap) -> (StatusCode, Value) {
        let sorry = "Sorry, product ratings are currently unavailable for this book.";
        or_error(fetch(&self.ratings, "ratings", id, headers, &self.results).await, sorry)
    }

    /// FLOOD_FACTOR further calls of reviews, whose answers nobody reads.
    async fn flood(&self, headers: &HeaderMap) {
        let mut calls = JoinSet::new();
        for _ in 0..self.flood_factor {
            let (to, headers, results) = (self.reviews.clone(), headers.clone(), self.results.clone());
            calls.spawn(async move { fetch(&to, "reviews", "0", &headers, &results).await.is_ok() });
        }
        calls.join_all().await;
    }

    async fn page(&self, incoming: &HeaderMap) -> Answer {
        let user = session_user(incoming);
        let headers = outgoing(incoming);
        self.flood(&headers).await;
        let details = self.details("0", &headers).await;
        let reviews = self.reviews("0", &headers).await;
        web::html(page::product(user.as_deref(), &details, &reviews))
    }

    async fn api(&self, path: &str, incoming: &HeaderMap) -> Answer {
        let headers = outgoing(incoming);
        let (status, value) = match path.split('/').collect::<Vec<_>>().as_slice() {
            [id] => self.details(id, &headers).await,
            [id, "reviews"] => self.reviews(id, &headers).await,
            [id, "ratings"] => self.ratings(id, &headers).await,
            _ => return web::not_found(),
        };
        web::json(status, &value)
    }
}

impl App for Productpage {
    async fn answer(&self, request: Request<Bytes>) -> Answer {
        let path = request.uri().path();
        match (request.method(), path) {
            (&Method::GET, "/" | "/index.html") => web::html(page::index()),
            (&Method::GET, "/productpage") => self.page(request.headers()).await,
            (&Method::GET, "/health") => web::text(StatusCode::OK, "Product page is healthy"),
            (&Method::GET, "/metrics") => web::text(StatusCode::OK, self.results.render()),
            (&Method::POST, "/login") => login(&request),
            (&Method::GET, "/logout") => back(request.headers(), "session=; Path=/; Max-Age=0"),
            (&Method::GET, "/api/v1/products") => web::json(StatusCode::OK, &json!([page::book()])),
            (&Method::GET, _) => match path.strip_prefix("/api/v1/products/") {
                Some(rest) => self.api(rest, request.headers()).await,
                None => web::not_found(),
            },
            _ => web::not_found(),
        }
    }
}

/// One call: the JSON of a 200, else the status (500 when there was no answer).
async fn fetch(
    to: &Target,
    endpoint: &'static str,
    id: &str,
    headers: &HeaderMap,
    results: &Results,
) -> Result<Value, StatusCode> {
    let mut request = Request::new(Full::default());
    *request.uri_mut() = format!("/{endpoint}/{id}").parse().map_err(|_| StatusCode::BAD_REQUEST)?;
    *request.headers_mut() = headers.clone();
    let answer = web::call(to, request, PATIENCE).await.map_err(|error| {
        eprintln!("{endpoint}: {error}");
        results.count(endpoint, StatusCode::INTERNAL_SERVER_ERROR);
        StatusCode::INTERNAL_SERVER_ERROR
    })?;
    results.count(endpoint, answer.status());
    if answer.status() != StatusCode::OK {
        return Err(answer.status());
    }
    serde_json::from_slice(answer.body()).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

fn or_error(got: Result<Value, StatusCode>, sorry: &str) -> (StatusCode, Value) {
    match got {
        Ok(value) => (StatusCode::OK, value),
        Err(status) => (status, json!({"error": sorry})),
    }
}

fn outgoing(incoming: &HeaderMap) -> HeaderMap {
    let mut headers = headers::forwarded(incoming);
    if let Some(user) = session_user(incoming).and_then(|user| HeaderValue::from_str(&user).ok()) {
        headers.insert(headers::END_USER, user);
    }
    headers
}

/// The user of the session cookie. Nothing is protected by it, so the name itself, in hex, is the session.
fn session_user(incoming: &HeaderMap) -> Option<String> {
    let cookies = incoming.get_all(header::COOKIE).into_iter().filter_map(|value| value.to_str().ok());
    let session = cookies.flat_map(|line| line.split(';')).find_map(|c| c.trim().strip_prefix("session="))?;
    let bytes: Option<Vec<u8>> = session
        .as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect();
    String::from_utf8(bytes?).ok().filter(|user| !user.is_empty())
}

/// The session cookie of a user.
pub fn session_cookie(user: &str) -> String {
    user.bytes().fold("session=".to_owned(), |mut cookie, byte| {
        // Writing to a string cannot fail.
        let _ = write!(cookie, "{byte:02x}");
        cookie
    })
}

fn login(request: &Request<Bytes>) -> Answer {
    let form = String::from_utf8_lossy(request.body());
    let user = form.split('&').find_map(|field| field.strip_prefix("username=")).map(form_decode);
    match user {
        Some(user) if !user.is_empty() => {
            back(request.headers(), &format!("{}; Path=/; HttpOnly", session_cookie(&user)))
        }
        _ => web::text(StatusCode::BAD_REQUEST, "username is missing"),
    }
}

/// Redirects to where the client came from and sets a cookie.
fn back(incoming: &HeaderMap, cookie: &str) -> Answer {
    let Some(referer) = incoming.get(header::REFERER) else {
        return web::text(
            StatusCode::BAD_REQUEST,
            "the Referer header is missing: it says where to go back to",
        );
    };
    let mut answer = web::text(StatusCode::FOUND, "");
    answer.headers_mut().insert(header::LOCATION, referer.clone());
    if let Ok(cookie) = HeaderValue::from_str(cookie) {
        answer.headers_mut().insert(header::SET_COOKIE, cookie);
    }
    answer
}

/// `application/x-www-form-urlencoded`; what is not valid there stands for itself.
fn form_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match (first, tail) {
            (b'%', [high, low, ..]) => hex(*high).zip(hex(*low)).map(|(high, low)| high * 16 + low),
            _ => None,
        };
        bytes.push(match (first, escaped) {
            (_, Some(byte)) => byte,
            (b'+', None) => b' ',
            (byte, None) => *byte,
        });
        rest = if escaped.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

impl Results {
    fn count(&self, app: &'static str, status: StatusCode) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((app, status.as_u16())).or_default() += 1;
    }

    fn render(&self) -> String {
        let mut text = "# HELP request_result_total Results of requests\n\
                        # TYPE request_result_total counter\n"
            .to_owned();
        for ((app, status), count) in &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "request_result_total{{destination_app=\"{app}\",response_code=\"{status}\"}} {count}"
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_decoded() {
        for (encoded, expected) in
            [("jason", "jason"), ("a+b", "a b"), ("%C3%A9", "é"), ("%zz", "%zz"), ("%4", "%4"), ("", "")]
        {
            assert_eq!(form_decode(encoded), expected, "{encoded}");
        }
    }

    #[test]
    fn the_user_comes_from_the_session_only() {
        let user_of = |cookie: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::COOKIE, cookie.parse().expect("a header value"));
            headers.insert(headers::END_USER, HeaderValue::from_static("mallory"));
            outgoing(&headers).get(headers::END_USER).map(|user| user.to_str().expect("text").to_owned())
        };
        assert_eq!(user_of(&session_cookie("jason")), Some("jason".into()));
        assert_eq!(user_of(&format!("theme=dark; {}", session_cookie("jason"))), Some("jason".into()));
        assert_eq!(user_of("theme=dark"), None);
        assert_eq!(user_of("session="), None);
        assert_eq!(user_of("session=zz"), None);
        assert_eq!(user_of("session=6a0d0a"), None, "a line break is no header value");
    }
}
