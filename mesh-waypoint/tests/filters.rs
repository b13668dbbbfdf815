//! What routes do to requests and responses, end to end in memory.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "the scenery of tests may panic and spawn"
)]
#![expect(dead_code, reason = "this file uses a part of the harness")]

mod harness;

use harness::*;
use http::Method;
use mesh_core::model::{
    Backend, Filters, HeaderEdit, PathEdit, PathMatch, Redirect, RequestMatch, Rewrite, RouteRule,
};

fn prefix(text: &str) -> RequestMatch {
    RequestMatch { path: PathMatch::Prefix(text.into()), ..any() }
}

fn edit(remove: &[&str], set: &[(&str, &str)], add: &[(&str, &str)]) -> HeaderEdit {
    let fields =
        |list: &[(&str, &str)]| list.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    HeaderEdit {
        remove: remove.iter().map(|name| (*name).into()).collect(),
        set: fields(set),
        add: fields(add),
    }
}

fn redirect(status: u16) -> Redirect {
    Redirect { scheme: None, hostname: None, path: None, port: None, status }
}

fn filtered(item: RequestMatch, filters: Filters, backends: Vec<Backend>) -> RouteRule {
    RouteRule { filters, ..rule(vec![item], backends) }
}

/// Lines of an echo that are about one header field.
fn values<'a>(got: &'a Got, name: &str) -> Vec<&'a str> {
    got.body.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).collect()
}

#[tokio::test]
async fn header_fields_are_changed_both_ways_by_rule_and_backend() {
    let of_rule = Filters {
        request: edit(&["x-gone"], &[("x-set", "rule")], &[("x-add", "rule")]),
        response: edit(&[], &[("x-answer", "rule")], &[("x-more", "rule")]),
        ..Filters::default()
    };
    let mut v1 = backend("v1", 1);
    v1.filters = Filters {
        request: edit(&[], &[("x-set", "backend"), ("x-own", "backend")], &[("x-add", "backend")]),
        response: edit(&[], &[], &[("x-more", "backend")]),
        ..Filters::default()
    };
    let world = World::new()
        .service("v1")
        .pod("v1-a", &["v1"], echo("v1"))
        .service("reviews")
        .route("r", vec![filtered(any(), of_rule, vec![v1])])
        .apply();
    let sent = [("X-Gone", "1"), ("x-set", "client"), ("X-Add", "client")];
    let got = world.client("reviews").await.get("/", &sent).await;
    assert_eq!(got.status, 200, "{got:?}");
    assert_eq!(values(&got, "x-gone"), Vec::<&str>::new());
    assert_eq!(values(&got, "x-set"), ["rule"]);
    assert_eq!(values(&got, "x-own"), ["backend"]);
    assert_eq!(values(&got, "x-add"), ["client", "backend", "rule"]);
    assert_eq!(got.headers["x-answer"], "rule");
    assert_eq!(got.headers.get_all("x-more").iter().collect::<Vec<_>>(), ["backend", "rule"]);
}

#[tokio::test]
async fn a_redirect_says_where_and_asks_no_application() {
    let to = |redirect: Redirect| Filters { redirect: Some(redirect), ..Filters::default() };
    let moved = Redirect {
        hostname: Some("example.org".into()),
        path: Some(PathEdit::Prefix("/new".into())),
        ..redirect(301)
    };
    let secure = Redirect { scheme: Some("https".into()), ..redirect(308) };
    let ported = Redirect { port: Some(8083), ..redirect(302) };
    let mut of_backend = backend("v1", 1);
    of_backend.filters = to(Redirect { path: Some(PathEdit::Full("/full".into())), ..redirect(307) });
    let answered = Filters { response: edit(&[], &[("x-why", "moved")], &[]), ..to(redirect(303)) };
    let world = World::new()
        .service("v1")
        .service("reviews")
        .route(
            "r",
            vec![
                filtered(prefix("/old"), to(moved), vec![]),
                filtered(prefix("/secure"), to(secure), vec![]),
                filtered(prefix("/port"), to(ported), vec![]),
                filtered(prefix("/see"), answered, vec![]),
                rule(vec![prefix("/backend")], vec![of_backend]),
            ],
        )
        .apply();
    let mut client = world.client("reviews").await;
    for (path, status, location) in [
        ("/old/a?q=1", 301, "http://example.org/new/a?q=1"),
        ("/secure/a", 308, "https://shop.test/secure/a"),
        ("/port", 302, "http://shop.test:8083/port"),
        ("/see", 303, "http://shop.test/see"),
        ("/backend/x?y", 307, "http://shop.test/full?y"),
    ] {
        let got = client.get(path, &[]).await;
        let told = got.headers["location"].to_str().unwrap();
        assert_eq!((got.status, told), (status, location), "{path}");
        assert_eq!(got.headers.contains_key("x-why"), path == "/see", "{path}");
    }
    assert_eq!(world.dials(), 0);
    world.counted(&["istio_requests_total", "response_code=\"301\"", "response_flags=\"-\""]).await;
}

#[tokio::test]
async fn host_and_path_are_rewritten_and_the_backends_rewrite_is_nearer() {
    let to = |hostname: Option<&str>, path: Option<PathEdit>| Filters {
        rewrite: Some(Rewrite { hostname: hostname.map(Into::into), path }),
        ..Filters::default()
    };
    let mut nearer = backend("v1", 1);
    nearer.filters = to(None, Some(PathEdit::Full("/nearer".into())));
    let own = |item: &str, filters| filtered(prefix(item), filters, vec![backend("v1", 1)]);
    let world = World::new()
        .service("v1")
        .pod("v1-a", &["v1"], echo("v1"))
        .service("reviews")
        .route(
            "r",
            vec![
                own("/prefix/one", to(None, Some(PathEdit::Prefix("/one".into())))),
                own("/strip", to(None, Some(PathEdit::Prefix("/".into())))),
                own("/full", to(Some("other.test"), Some(PathEdit::Full("/two".into())))),
                own("/host", to(Some("other.test"), None)),
                own("/bad", to(None, Some(PathEdit::Full("/a b".into())))),
                filtered(prefix("/both"), to(Some("lost.test"), None), vec![nearer]),
            ],
        )
        .apply();
    let mut client = world.client("reviews").await;
    for (path, line, host) in [
        ("/prefix/one/two?q=1", "GET /one/two?q=1", "shop.test"),
        ("/strip/a", "GET /a", "shop.test"),
        ("/strip", "GET /", "shop.test"),
        ("/full/x?q=1", "GET /two?q=1", "other.test"),
        ("/host/x", "GET /host/x", "other.test"),
        ("/both/x", "GET /nearer", "shop.test"),
    ] {
        let got = client.get(path, &[]).await;
        assert_eq!(got.status, 200, "{path}: {got:?}");
        assert_eq!(got.body.lines().nth(1), Some(line), "{path}");
        assert_eq!(values(&got, "host"), [host], "{path}");
    }
    let got = client.get("/bad", &[]).await;
    assert_eq!(got.status, 500, "a rewrite that makes no path is never skipped: {got:?}");
}

#[tokio::test]
async fn a_backend_that_speaks_http2_is_spoken_to_in_it_whatever_the_client_speaks() {
    let mut h2c = backend("v1", 1);
    h2c.target.as_mut().unwrap().http2 = true;
    let world = World::new()
        .service("v1")
        .pod("v1-a", &["v1"], echo("v1"))
        .service("reviews")
        .route("r", vec![rule(vec![any()], vec![h2c])])
        .apply();
    let mut client = world.client("reviews").await;
    let got = client.get("/a", &[]).await;
    // HTTP/2 has the authority in the request target; HTTP/1.1 has it in `Host`.
    assert_eq!(got.body.lines().nth(1), Some("GET http://shop.test/a"), "{got:?}");
    assert_eq!(values(&got, "host"), Vec::<&str>::new());
    assert!(world.dials() == 1 && client.get("/b", &[]).await.status == 200 && world.dials() == 1);
}

#[tokio::test]
async fn each_call_of_one_grpc_connection_is_split_by_itself() {
    let method = RequestMatch {
        path: PathMatch::Exact("/pkg.Echo/Say".into()),
        method: Some(Method::POST.as_str().into()),
        ..any()
    };
    let world = World::new()
        .service("v1")
        .pod("v1-a", &["v1"], echo("v1"))
        .service("v2")
        .pod("v2-a", &["v2"], echo("v2"))
        .service("reviews")
        .route("g", vec![rule(vec![method], vec![backend("v1", 70), backend("v2", 30), missing()])])
        .apply();
    let mut client = Client::http2(world.connect("reviews")).await;
    let mut second = 0;
    for _ in 0..500 {
        let got = client.post("/pkg.Echo/Say", &[("content-type", "application/grpc")]).await;
        assert_eq!(got.status, 200, "{got:?}");
        second += u32::from(got.body.starts_with("v2"));
    }
    // Five standard deviations around 150.
    assert!((99..=201).contains(&second), "{second} of 500");
    let got = client.post("/pkg.Echo/Other", &[("content-type", "application/grpc")]).await;
    assert_eq!((got.status, &got.headers["grpc-status"]), (200, &"12".parse().unwrap()));
}

#[tokio::test]
async fn a_call_to_a_backend_that_is_none_is_unavailable() {
    let gone = Backend { weight: 1, ..missing() };
    let world = World::new().service("reviews").route("g", vec![rule(vec![any()], vec![gone])]).apply();
    let mut client = Client::http2(world.connect("reviews")).await;
    let got = client.post("/pkg.Echo/Say", &[("content-type", "application/grpc")]).await;
    assert_eq!((got.status, &got.headers["grpc-status"]), (200, &"14".parse().unwrap()));
    assert_eq!(client.post("/a", &[]).await.status, 500);
}

/// A backend that does not exist and has no share.
fn missing() -> Backend {
    Backend { weight: 0, filters: Filters::default(), target: Err("no such service".into()) }
}
