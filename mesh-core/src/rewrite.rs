//! Where a request goes after a `URLRewrite`, and where a client is sent by a `RequestRedirect` (`semantics.md` D8).
//! Pure.

use crate::model::{PathEdit, PathMatch, Redirect};

/// Whether a route may change the header field `name` (lower case).
///
/// The authority is changed by `URLRewrite`; fields of one connection and of framing are the proxy's, and the fields
/// that tell the application who its client is are not a route's to write.
pub fn editable(name: &str) -> bool {
    let shape = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    !name.is_empty()
        && name.bytes().all(shape)
        && !matches!(
            name,
            "host"
                | "connection"
                | "content-length"
                | "http2-settings"
                | "keep-alive"
                | "proxy-connection"
                | "te"
                | "trailer"
                | "transfer-encoding"
                | "upgrade"
                | "x-forwarded-client-cert"
                | "x-undermesh-client"
        )
}

/// A request as a redirect sees it.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// Its scheme.
    pub scheme: &'a str,
    /// Its host, without port.
    pub host: &'a str,
    /// Path without query.
    pub path: &'a str,
    /// Query without question mark.
    pub query: Option<&'a str>,
    /// Port of the listener that took it.
    pub port: u16,
}

/// The path after `edit`; `matched` is the match that the request fell under.
///
/// Only what a prefix match matched can be replaced as a prefix: after any other match the path stays.
pub fn path(edit: &PathEdit, matched: &PathMatch, path: &str) -> String {
    let (prefix, replacement) = match (edit, matched) {
        (PathEdit::Full(full), _) => return rooted(full),
        (PathEdit::Prefix(replacement), PathMatch::Prefix(prefix)) => (prefix, replacement),
        (PathEdit::Prefix(_), PathMatch::Exact(_) | PathMatch::Regex(_)) => return path.to_owned(),
    };
    let Some(rest) = path.strip_prefix(prefix.trim_end_matches('/')) else { return path.to_owned() };
    // By element: neither a doubled nor a missing slash where the two meet.
    let replacement = replacement.trim_end_matches('/');
    rooted(&format!("{replacement}{rest}"))
}

fn rooted(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// Path and query after `edit`.
pub fn target(edit: &PathEdit, matched: &PathMatch, from: &str, query: Option<&str>) -> String {
    let mut target = path(edit, matched, from);
    if let Some(query) = query {
        target.push('?');
        target.push_str(query);
    }
    target
}

fn well_known(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

/// The `Location` of a redirect.
///
/// The port is the written one, else that of the written scheme, else the listener's; it is left out where the scheme
/// means it anyway.
pub fn location(redirect: &Redirect, matched: &PathMatch, from: &Origin<'_>) -> String {
    let Redirect { scheme, hostname, path: edit, port, status: _ } = redirect;
    let implied = scheme.as_deref().and_then(well_known);
    let scheme = scheme.as_deref().unwrap_or(from.scheme);
    let port = port.or(implied).unwrap_or(from.port);
    let host = hostname.as_deref().unwrap_or(from.host);
    let target = match edit {
        Some(edit) => target(edit, matched, from.path, from.query),
        None => target(&PathEdit::Full(from.path.into()), matched, from.path, from.query),
    };
    if well_known(scheme) == Some(port) {
        format!("{scheme}://{host}{target}")
    } else {
        format!("{scheme}://{host}:{port}{target}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_replaced_by_element() {
        for (prefix, replacement, from, want) in [
            ("/foo", "/xyz", "/foo/bar", "/xyz/bar"),
            ("/foo", "/xyz/", "/foo/bar", "/xyz/bar"),
            ("/foo/", "/xyz", "/foo/bar", "/xyz/bar"),
            ("/foo/", "/xyz/", "/foo/bar", "/xyz/bar"),
            ("/foo", "/xyz", "/foo", "/xyz"),
            ("/foo/", "/xyz", "/foo/", "/xyz/"),
            ("/foo", "/xyz/", "/foo", "/xyz"),
            ("/foo", "", "/foo/bar", "/bar"),
            ("/foo", "", "/foo/", "/"),
            ("/foo", "", "/foo", "/"),
            ("/foo", "/", "/foo/bar", "/bar"),
            ("/foo", "/", "/foo", "/"),
            ("/", "/xyz", "/foo", "/xyz/foo"),
            ("/", "/xyz", "/", "/xyz/"),
            ("/foo", "/xyz", "/foo//bar", "/xyz//bar"),
            ("/foo", "/xyz", "/foo/%2e%2e", "/xyz/%2e%2e"),
        ] {
            let got = path(&PathEdit::Prefix(replacement.into()), &PathMatch::Prefix(prefix.into()), from);
            assert_eq!(got, want, "{prefix} -> {replacement} of {from}");
        }
        // Nothing was matched as a prefix.
        let edit = PathEdit::Prefix("/xyz".into());
        assert_eq!(path(&edit, &PathMatch::Exact("/foo".into()), "/foo"), "/foo");
    }

    #[test]
    fn a_full_path_keeps_the_query() {
        let (edit, matched) = (PathEdit::Full("/one".into()), PathMatch::Prefix("/a".into()));
        assert_eq!(target(&edit, &matched, "/a/b", Some("x=1?&y")), "/one?x=1?&y");
        assert_eq!(target(&edit, &matched, "/a/b", None), "/one");
        assert_eq!(path(&PathEdit::Full("one".into()), &matched, "/a"), "/one");
    }

    /// `scheme host path port` of the redirect, `-` = not written; the request is `http://h:LISTENER/a/b?q=1`.
    fn check(written: &str, listener: u16, want: &str) {
        let words: Vec<Option<&str>> =
            written.split(' ').map(|word| Some(word).filter(|word| *word != "-")).collect();
        let redirect = Redirect {
            scheme: words[0].map(Into::into),
            hostname: words[1].map(Into::into),
            path: words[2].map(|path| PathEdit::Prefix(path.into())),
            port: words[3].map(|port| port.parse().unwrap()),
            status: 302,
        };
        let from = Origin { scheme: "http", host: "h", path: "/a/b", query: Some("q=1"), port: listener };
        let got = location(&redirect, &PathMatch::Prefix("/a".into()), &from);
        assert_eq!(got, want, "{written} on port {listener}");
    }

    #[test]
    fn the_port_is_written_or_the_schemes_or_the_listeners_and_left_out_where_it_is_meant() {
        check("- x - -", 80, "http://x/a/b?q=1");
        check("- x - -", 8080, "http://x:8080/a/b?q=1");
        check("- x - 80", 8080, "http://x/a/b?q=1");
        check("- x - 443", 80, "http://x:443/a/b?q=1");
        check("https x - -", 8080, "https://x/a/b?q=1");
        check("https x - 443", 80, "https://x/a/b?q=1");
        check("https x - 8443", 80, "https://x:8443/a/b?q=1");
        check("http x - -", 8080, "http://x/a/b?q=1");
        check("- - - 8083", 80, "http://h:8083/a/b?q=1");
        check("- - /c -", 80, "http://h/c/b?q=1");
        check("https - /c 444", 80, "https://h:444/c/b?q=1");
    }
}
