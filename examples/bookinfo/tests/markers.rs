//! The whole application on loopback: the endpoints, markers and timers that the tasks check.

use std::{
    future::Future,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bookinfo::{
    details::Details,
    productpage::{Productpage, session_cookie},
    ratings::Ratings,
    reviews::Reviews,
    settings::Target,
    web::{self, App},
};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use serde_json::Value;
use tokio::{net::TcpListener, task::JoinSet};

/// Running services; they end with it.
#[derive(Default)]
struct Running(JoinSet<()>);

impl Running {
    async fn start(&mut self, app: impl App) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        self.0.spawn(web::serve(listener, Arc::new(app)));
        address
    }

    /// A peer that accepts and never answers.
    async fn start_silent(&mut self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        self.0.spawn(async move {
            let mut held = Vec::new();
            while let Ok(accepted) = listener.accept().await {
                held.push(accepted);
            }
        });
        address
    }

    async fn bookinfo(&mut self, reviews: &[(&str, &str)], ratings: SocketAddr) -> SocketAddr {
        let details = self.start(Details::from_env(&|_| None).expect("details")).await;
        let env = environment(reviews, &[("RATINGS", ratings)]);
        let reviews = self.start(Reviews::from_env(&|name| look(&env, name)).expect("reviews")).await;
        let env = environment(&[], &[("DETAILS", details), ("REVIEWS", reviews), ("RATINGS", ratings)]);
        self.start(Productpage::from_env(&|name| look(&env, name)).expect("productpage")).await
    }
}

fn environment(plain: &[(&str, &str)], targets: &[(&str, SocketAddr)]) -> Vec<(String, String)> {
    let mut all: Vec<_> = plain.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    for (name, address) in targets {
        all.push((format!("{name}_HOSTNAME"), address.ip().to_string()));
        all.push((format!("{name}_SERVICE_PORT"), address.port().to_string()));
    }
    all
}

fn look(env: &[(String, String)], name: &str) -> Option<String> {
    env.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
}

async fn send(to: SocketAddr, request: http::request::Builder, body: &'static str) -> Response<Bytes> {
    let target = Target { host: to.ip().to_string(), port: to.port() };
    let request = request.body(Full::new(Bytes::from_static(body.as_bytes()))).expect("a request");
    web::call(&target, request, Duration::from_secs(30)).await.expect("an answer")
}

async fn get(to: SocketAddr, path: &str) -> (StatusCode, String) {
    let answer = send(to, Request::get(path), "").await;
    (answer.status(), String::from_utf8(answer.body().to_vec()).expect("text"))
}

async fn get_json(to: SocketAddr, path: &str) -> (StatusCode, Value) {
    let (status, body) = get(to, path).await;
    (status, serde_json::from_str(&body).expect("JSON"))
}

fn stars(page: &str) -> usize {
    page.matches("glyphicon glyphicon-star").count()
}

/// Each version of reviews against its markers.
async fn page_of(env: &[(&str, &str)]) -> String {
    let mut running = Running::default();
    let ratings = running.start(Ratings::from_env(&|_| None)).await;
    let page = running.bookinfo(env, ratings).await;
    let (status, body) = get(page, "/productpage").await;
    assert_eq!(status, StatusCode::OK);
    assert!(body.contains("<title>Simple Bookstore App</title>") && body.contains("The Comedy of Errors"));
    assert!(!body.contains("Error fetching"), "{body}");
    body
}

#[tokio::test]
async fn version_1_has_no_stars() {
    let page = page_of(&[("HOSTNAME", "reviews-v1-abc")]).await;
    assert_eq!(stars(&page), 0);
    assert!(page.contains("Reviews served by: reviews-v1-abc"));
}

#[tokio::test]
async fn version_2_has_black_stars() {
    let page = page_of(&[("ENABLE_RATINGS", "true")]).await;
    assert_eq!(stars(&page), 9);
    assert_eq!(page.matches("gap-x-1 text-black-500").count(), 2);
}

#[tokio::test]
async fn version_3_has_red_stars() {
    let page = page_of(&[("ENABLE_RATINGS", "true"), ("STAR_COLOR", "red")]).await;
    assert_eq!(stars(&page), 9);
    assert_eq!(page.matches("gap-x-1 text-red-500").count(), 2);
}

#[tokio::test]
async fn endpoints_and_their_json() {
    let mut running = Running::default();
    let ratings = running.start(Ratings::from_env(&|_| None)).await;
    let env = [("ENABLE_RATINGS", "true"), ("HOSTNAME", "reviews-v2-x"), ("CLUSTER_NAME", "east")];
    let page = running.bookinfo(&env, ratings).await;

    let (_, index) = get(page, "/").await;
    assert!(index.contains("href=\"/productpage\""));
    let (_, products) = get_json(page, "/api/v1/products").await;
    assert_eq!(products[0]["title"], "The Comedy of Errors");
    let (status, details) = get_json(page, "/api/v1/products/0").await;
    assert_eq!((status, &details["author"]), (StatusCode::OK, &"William Shakespeare".into()));
    for field in ["id", "author", "year", "type", "pages", "publisher", "language", "ISBN-10", "ISBN-13"] {
        assert!(details.get(field).is_some(), "{field}");
    }
    let (_, reviews) = get_json(page, "/api/v1/products/0/reviews").await;
    assert_eq!(reviews["podname"], "reviews-v2-x");
    assert_eq!(reviews["clustername"], "east");
    assert_eq!(reviews["reviews"][0]["rating"], serde_json::json!({"stars": 5, "color": "black"}));
    assert_eq!(reviews["reviews"].as_array().map(Vec::len), Some(2));
    let (_, got) = get_json(page, "/api/v1/products/0/ratings").await;
    assert_eq!(got["ratings"], serde_json::json!({"Reviewer1": 5, "Reviewer2": 4}));
    // A status of the service behind comes through.
    assert_eq!(get(page, "/api/v1/products/none").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(get(page, "/nothing").await.0, StatusCode::NOT_FOUND);
    assert_eq!(get(page, "/health").await.0, StatusCode::OK);
    assert_eq!(get(ratings, "/health").await.0, StatusCode::OK);
    let (_, metrics) = get(page, "/metrics").await;
    let line = "request_result_total{destination_app=\"reviews\",response_code=\"200\"} 1\n";
    assert!(metrics.contains(line), "{metrics}");
}

#[tokio::test]
async fn posted_ratings_show_and_version_2_refuses_them() {
    let mut running = Running::default();
    let plain = running.start(Ratings::from_env(&|_| None)).await;
    let body = "{\"Reviewer1\":1,\"Reviewer2\":2}";
    let posted = send(plain, Request::post("/ratings/7"), body).await;
    assert_eq!(posted.status(), StatusCode::OK);
    assert_eq!(get_json(plain, "/ratings/7").await.1["ratings"]["Reviewer1"], 1);
    assert_eq!(send(plain, Request::post("/ratings/7"), "{").await.status(), StatusCode::BAD_REQUEST);
    let database = |name: &str| (name == "SERVICE_VERSION").then(|| "v2".to_owned());
    let database = running.start(Ratings::from_env(&database)).await;
    assert_eq!(send(database, Request::post("/ratings/7"), body).await.status(), StatusCode::NOT_IMPLEMENTED);
}

#[tokio::test]
async fn signing_in_sets_the_session_and_goes_back() {
    let mut running = Running::default();
    let ratings = running.start(Ratings::from_env(&|_| None)).await;
    let page = running.bookinfo(&[], ratings).await;
    let login = || Request::builder().method(Method::POST).uri("/login");
    let form = "username=jason&passwd=anything";
    let answer = send(page, login().header("referer", "http://shop/productpage"), form).await;
    assert_eq!(answer.status(), StatusCode::FOUND);
    assert_eq!(answer.headers()["location"], "http://shop/productpage");
    let cookie = answer.headers()["set-cookie"].to_str().expect("text");
    assert!(cookie.starts_with(&session_cookie("jason")), "{cookie}");
    assert_eq!(send(page, login(), form).await.status(), StatusCode::BAD_REQUEST, "no Referer");
    let request = Request::get("/productpage").header("cookie", session_cookie("jason"));
    let body = send(page, request, "").await;
    assert!(String::from_utf8_lossy(body.body()).contains("jason"));
}

/// A service that answers with what it was sent.
struct Echo;

impl App for Echo {
    async fn answer(&self, request: Request<Bytes>) -> web::Answer {
        let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
        let seen = serde_json::json!({
            "end-user": header("end-user"), "trace": header("traceparent"), "connection": header("connection"),
        });
        web::json(StatusCode::OK, &seen)
    }
}

#[tokio::test]
async fn productpage_tells_the_user_hands_on_tracing_and_keeps_no_connection() {
    let mut running = Running::default();
    let echo = running.start(Echo).await;
    let env = environment(&[], &[("DETAILS", echo), ("REVIEWS", echo), ("RATINGS", echo)]);
    let page = running.start(Productpage::from_env(&|name| look(&env, name)).expect("productpage")).await;
    let request = Request::get("/api/v1/products/0/reviews")
        .header("cookie", session_cookie("jason"))
        .header("traceparent", "00-1-2-01");
    let seen: Value = serde_json::from_slice(send(page, request, "").await.body()).expect("JSON");
    let expected = serde_json::json!({"end-user": "jason", "trace": "00-1-2-01", "connection": "close"});
    assert_eq!(seen, expected);
}

/// How long something takes, to a second. Real time: hyper's connections are real sockets.
async fn seconds(future: impl Future<Output = ()>) -> u64 {
    let started = Instant::now();
    future.await;
    started.elapsed().as_secs_f64().round() as u64
}

#[tokio::test]
async fn silent_services_cost_their_timers() {
    let mut running = Running::default();
    let silent = running.start_silent().await;
    let env = environment(&[], &[("DETAILS", silent), ("REVIEWS", silent), ("RATINGS", silent)]);
    let page = running.start(Productpage::from_env(&|name| look(&env, name)).expect("productpage")).await;
    let red = [("ENABLE_RATINGS", "true"), ("STAR_COLOR", "red")];
    let red = running.bookinfo(&red, silent).await;
    let black = environment(&[("ENABLE_RATINGS", "true")], &[("RATINGS", silent)]);
    let black = running.start(Reviews::from_env(&|name| look(&black, name)).expect("reviews")).await;

    let details = seconds(async {
        let (status, answer) = get_json(page, "/api/v1/products/0").await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
        let sorry = "Sorry, product details are currently unavailable for this book.";
        assert_eq!(answer["error"], sorry);
    });
    let whole = seconds(async {
        let (status, body) = get(page, "/productpage").await;
        assert_eq!(status, StatusCode::OK, "the page itself never fails");
        assert!(body.contains("Error fetching product details"));
        assert!(body.contains("Error fetching product reviews"));
    });
    let red = seconds(async {
        let (_, body) = get(red, "/productpage").await;
        assert!(body.contains("Ratings service is currently unavailable"));
        assert_eq!(stars(&body), 0);
    });
    let black = seconds(async {
        let (_, answer) = get_json(black, "/reviews/0").await;
        assert_eq!(answer["reviews"][0]["rating"]["error"], "Ratings service is currently unavailable");
    });
    let (details, whole, red, black) = tokio::join!(details, whole, red, black);
    assert!((3..=4).contains(&details), "details: {details} s");
    assert!((9..=10).contains(&whole), "details and two tries of reviews: {whole} s");
    assert!((2..=4).contains(&red), "ratings for red stars: {red} s");
    assert!((10..=11).contains(&black), "ratings for black stars: {black} s");
}
