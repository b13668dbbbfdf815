//! What happens to header fields on their way through the proxy. Pure.
//!
//! Fields that belong to one connection are rebuilt, not copied; fields by which an application could be lied to
//! about its client are removed and written by us.

use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Uri, header,
    uri::{Authority, PathAndQuery, Scheme},
};
use mesh_core::id::Identity;

/// Carried in the head of a tunnel, never inside it; from a client it is a forgery.
const CLIENT: HeaderName = HeaderName::from_static("x-undermesh-client");
/// Tells the application who its client is (`semantics.md` D15).
const XFCC: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// Correlates log lines.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Fields of one connection (RFC 9110, 7.6.1); `trailer` stays, because it announces what does travel on.
const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("http2-settings"),
];

/// Fields that `Connection` may not name: a client must not be able to remove what routing or framing relies on.
const PROTECTED: [HeaderName; 5] = [header::HOST, header::CONTENT_LENGTH, REQUEST_ID, XFCC, header::COOKIE];

/// Why a request head is refused with 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHead {
    /// No authority, or not a valid one.
    #[error("missing or malformed host")]
    Host,
    /// The authority of the request line is another than that of `Host`.
    #[error("request target and host disagree")]
    TwoHosts,
    /// The path holds an encoded NUL.
    #[error("encoded NUL in path")]
    Nul,
    /// `CONNECT`, or a target without a path.
    #[error("unsupported request target")]
    Target,
}

/// The authority that a request is for.
///
/// # Errors
/// [`BadHead`] when there is none, it is malformed, or there are two.
pub fn authority<B>(request: &Request<B>) -> Result<Authority, BadHead> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let from_header = match (hosts.next(), hosts.next()) {
        (_, Some(_)) => return Err(BadHead::TwoHosts),
        (Some(host), None) => Some(Authority::try_from(host.as_bytes()).map_err(|_| BadHead::Host)?),
        (None, None) => None,
    };
    let authority = match (request.uri().authority(), from_header) {
        (Some(target), Some(host)) if !target.as_str().eq_ignore_ascii_case(host.as_str()) => {
            return Err(BadHead::TwoHosts);
        }
        (Some(authority), _) => authority.clone(),
        (None, Some(host)) => host,
        (None, None) => return Err(BadHead::Host),
    };
    let userinfo = authority.as_str().contains('@');
    if authority.host().is_empty() || userinfo { Err(BadHead::Host) } else { Ok(authority) }
}

/// The path and query: the same bytes are matched, logged and sent upstream.
///
/// # Errors
/// [`BadHead`] when there is no path or it holds what no two parsers agree on.
pub fn target<B>(request: &Request<B>) -> Result<PathAndQuery, BadHead> {
    let target = request.uri().path_and_query().ok_or(BadHead::Target)?;
    let asterisk = request.method() == http::Method::OPTIONS && target.as_str() == "*";
    if request.method() == http::Method::CONNECT || !(target.as_str().starts_with('/') || asterisk) {
        return Err(BadHead::Target);
    }
    if target.path().contains("%00") {
        return Err(BadHead::Nul);
    }
    Ok(target.clone())
}

/// The protocol that an HTTP/1.1 client wants to switch to; HTTP/2 is spoken with prior knowledge or not at all.
pub fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let asked = tokens(headers, &header::CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    let protocol = headers.get(header::UPGRADE)?;
    let http = protocol.as_bytes().to_ascii_lowercase().starts_with(b"h2c");
    (asked && !http).then(|| protocol.clone())
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

/// Removes the fields that belong to the connection which the message came by; true when the peer reads trailers.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) -> bool {
    let named: Vec<HeaderName> =
        tokens(headers, &header::CONNECTION).filter_map(|token| token.parse().ok()).collect();
    let trailers = tokens(headers, &header::TE).any(|token| token.eq_ignore_ascii_case("trailers"));
    for name in named.iter().filter(|name| !PROTECTED.contains(name)) {
        headers.remove(name);
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
    headers.remove(header::TE);
    trailers
}

/// Who is at the two ends, for the headers that tell it.
pub struct Ends<'a> {
    /// The client, proven by its certificate.
    pub client: &'a Identity,
    /// This waypoint.
    pub own: &'a Identity,
}

/// Makes a client's header fields fit to be sent upstream.
pub fn towards_upstream(
    headers: &mut HeaderMap,
    upgrade: Option<&HeaderValue>,
    http2: bool,
    ends: &Ends<'_>,
    fresh_id: impl FnOnce() -> HeaderValue,
) {
    let trailers = strip_hop_by_hop(headers);
    // hyper has answered `100-continue` by the time that body bytes flow.
    headers.remove(header::EXPECT);
    headers.remove(CLIENT);
    headers.remove(XFCC);
    let told = format!("By={};URI={}", ends.own, ends.client);
    if let Ok(told) = HeaderValue::try_from(told) {
        headers.insert(XFCC, told);
    }
    if !headers.contains_key(REQUEST_ID) {
        headers.insert(REQUEST_ID, fresh_id());
    }
    if !headers.contains_key(FORWARDED_PROTO) {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
    let mut connection = Vec::new();
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        connection.push("te");
    }
    if let Some(protocol) = upgrade {
        headers.insert(header::UPGRADE, protocol.clone());
        connection.push("upgrade");
    }
    if !http2
        && !connection.is_empty()
        && let Ok(value) = HeaderValue::try_from(connection.join(", "))
    {
        headers.insert(header::CONNECTION, value);
    }
}

/// The request target in the form of the upstream's protocol; `Host` is written where the protocol wants it.
///
/// # Errors
/// [`BadHead::Target`] when the parts do not make a URI.
pub fn address_request<B>(
    request: &mut Request<B>,
    authority: &Authority,
    target: PathAndQuery,
    http2: bool,
) -> Result<(), BadHead> {
    let mut parts = http::uri::Parts::default();
    parts.path_and_query = Some(target);
    if http2 {
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(authority.clone());
        request.headers_mut().remove(header::HOST);
    } else {
        let host = HeaderValue::try_from(authority.as_str()).map_err(|_| BadHead::Host)?;
        request.headers_mut().insert(header::HOST, host);
    }
    *request.uri_mut() = Uri::from_parts(parts).map_err(|_| BadHead::Target)?;
    *request.version_mut() = if http2 { http::Version::HTTP_2 } else { http::Version::HTTP_11 };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: &str, uri: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut builder = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap()
    }

    fn sent(headers: &[(&str, &str)], http2: bool) -> HeaderMap {
        let mut headers = request("GET", "/", headers).headers().clone();
        let (client, own) =
            (Identity::new("cluster.local", "shop", "web"), Identity::new("cluster.local", "shop", "gw"));
        let upgrade = upgrade_of(&headers);
        let fresh = || HeaderValue::from_static("fresh");
        towards_upstream(&mut headers, upgrade.as_ref(), http2, &Ends { client: &client, own: &own }, fresh);
        headers
    }

    #[test]
    fn the_authority_is_one_or_the_request_is_refused() {
        for (uri, hosts, want) in [
            ("/", &["a:80"][..], Ok("a:80")),
            ("http://a:80/", &[][..], Ok("a:80")),
            ("http://a:80/", &["A:80"][..], Ok("a:80")),
            ("http://a/", &["b"][..], Err(BadHead::TwoHosts)),
            ("/", &["a", "a"][..], Err(BadHead::TwoHosts)),
            ("/", &[][..], Err(BadHead::Host)),
            ("/", &[""][..], Err(BadHead::Host)),
            ("/", &["user@a"][..], Err(BadHead::Host)),
            ("/", &["a b"][..], Err(BadHead::Host)),
            ("/", &["a/b"][..], Err(BadHead::Host)),
        ] {
            let hosts: Vec<_> = hosts.iter().map(|host| ("host", *host)).collect();
            let got = authority(&request("GET", uri, &hosts));
            assert_eq!(got.as_ref().map(Authority::as_str).map_err(|e| *e), want, "{uri} {hosts:?}");
        }
    }

    #[test]
    fn the_target_keeps_its_bytes() {
        for path in ["/", "/a//b", "/a/%2e%2e/b", "/%2f", "/a;x=1?q=%00&r#", "/a/../b", "/%5c"] {
            let kept = path.split('#').next().unwrap();
            assert_eq!(target(&request("GET", path, &[])).unwrap().as_str(), kept);
        }
        assert_eq!(target(&request("GET", "/a%00", &[])), Err(BadHead::Nul));
        assert_eq!(target(&request("CONNECT", "a:80", &[])), Err(BadHead::Target));
        assert_eq!(target(&request("GET", "*", &[])), Err(BadHead::Target));
        assert_eq!(target(&request("OPTIONS", "*", &[])).unwrap().as_str(), "*");
    }

    #[test]
    fn a_client_cannot_forge_who_it_is() {
        let headers = sent(
            &[
                ("x-undermesh-client", "spiffe://cluster.local/ns/admin/sa/root"),
                ("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/admin/sa/root"),
                ("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/admin/sa/root2"),
            ],
            false,
        );
        assert!(headers.get("x-undermesh-client").is_none());
        let told: Vec<_> = headers.get_all("x-forwarded-client-cert").iter().collect();
        assert_eq!(
            told,
            ["By=spiffe://cluster.local/ns/shop/sa/gw;URI=spiffe://cluster.local/ns/shop/sa/web"]
        );
    }

    #[test]
    fn hop_by_hop_fields_end_here() {
        let headers = sent(
            &[
                ("connection", "keep-alive, x-private, host, x-request-id"),
                ("keep-alive", "timeout=5"),
                ("x-private", "1"),
                ("proxy-connection", "close"),
                ("transfer-encoding", "chunked"),
                ("te", "trailers, deflate"),
                ("upgrade", "websocket"),
                ("expect", "100-continue"),
                ("x-request-id", "mine"),
                ("host", "a"),
                ("x-kept", "1"),
            ],
            false,
        );
        for gone in ["keep-alive", "x-private", "proxy-connection", "transfer-encoding", "upgrade", "expect"]
        {
            assert!(headers.get(gone).is_none(), "{gone}");
        }
        assert_eq!(headers["connection"], "te");
        assert_eq!(headers["te"], "trailers");
        assert_eq!(headers["x-request-id"], "mine");
        assert_eq!(headers["host"], "a");
        assert_eq!(headers["x-kept"], "1");
    }

    #[test]
    fn an_upgrade_is_rebuilt_and_h2c_is_not_one() {
        let headers = sent(&[("connection", "Upgrade"), ("upgrade", "websocket")], false);
        assert_eq!(
            (&headers["connection"], &headers["upgrade"]),
            (&HeaderValue::from_static("upgrade"), &HeaderValue::from_static("websocket"))
        );
        let headers = sent(
            &[("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "x")],
            false,
        );
        assert!(headers.get("upgrade").is_none() && headers.get("http2-settings").is_none());
        assert!(headers.get("connection").is_none());
    }

    #[test]
    fn http2_gets_no_connection_header() {
        let headers = sent(&[("te", "trailers")], true);
        assert!(headers.get("connection").is_none());
        assert_eq!(headers["te"], "trailers");
        assert_eq!(headers["x-request-id"], "fresh");
    }
}
