//! HTTP routes of one listener, compiled; and which rule a request falls under (`semantics.md` D7, D9, D19). Pure.

use std::{cmp::Reverse, collections::BTreeMap, fmt, sync::Arc};

use regex_automata::{
    Anchored, Input,
    meta::{Config, Regex},
    util::syntax,
};

use crate::model::{Listener, PathMatch, RequestMatch, Route, RouteKind, ValueMatch};

/// Longest pattern that is compiled, bytes: a route's author is not trusted with the waypoint's memory.
const MAX_PATTERN_BYTES: usize = 1024;
/// Most memory of one compiled pattern, bytes.
const MAX_COMPILED_BYTES: usize = 1 << 20;

/// A route that cannot be compiled: the object, the field, and the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{route}: {path}: {reason}")]
pub struct CompileError {
    /// `namespace/name`.
    pub route: String,
    /// Field.
    pub path: String,
    /// What is wrong.
    pub reason: String,
}

/// What routing reads of a request.
#[derive(Clone, Copy)]
pub struct RequestHead<'a> {
    /// Host of the authority, without port.
    pub host: &'a str,
    /// Path without query, as the upstream will see it.
    pub path: &'a str,
    /// Query without question mark.
    pub query: Option<&'a str>,
    /// Method.
    pub method: &'a str,
    /// Namespace of the client, from its proven identity.
    pub client: &'a str,
    /// First value of a header, by lower-case name.
    pub headers: &'a dyn Fn(&str) -> Option<&'a str>,
}

impl fmt::Debug for RequestHead<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}{}", self.method, self.host, self.path)
    }
}

/// The rule that a request falls under, by index into the listener's routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matched {
    /// Index of the route.
    pub route: usize,
    /// Index of its rule.
    pub rule: usize,
    /// Index of the match of that rule.
    pub item: usize,
}

/// What the routes say of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No route is for this client: the service is as if it had none.
    Unrouted,
    /// Routes exist and none matches: 404.
    NoMatch,
    /// The rule that wins.
    Matched(Matched),
}

/// The routes of one listener, in order of precedence.
///
/// A route of the service's own namespace (producer) is for every client; one of another namespace (consumer) is for
/// clients of that namespace alone, which then do not see the producer's.
#[derive(Debug)]
pub struct Table {
    producer: Vec<Entry>,
    consumers: BTreeMap<Arc<str>, Vec<Entry>>,
}

#[derive(Debug)]
struct Entry {
    host: Host,
    path: Path,
    method: Option<Box<str>>,
    headers: Vec<(Box<str>, Value)>,
    query: Vec<(Box<str>, Value)>,
    target: Matched,
}

#[derive(Debug)]
enum Host {
    Any,
    Exact(Box<str>),
    /// With the leading dot.
    Suffix(Box<str>),
}

#[derive(Debug)]
enum Path {
    Exact(Box<str>),
    /// Without trailing slash; the root is empty.
    Prefix(Box<str>),
    Regex(Box<Regex>),
}

#[derive(Debug)]
enum Value {
    Exact(Box<str>),
    Regex(Box<Regex>),
}

/// Compiles the routes of a listener.
///
/// # Errors
/// [`CompileError`] for the first pattern that is too large or malformed.
pub fn compile(listener: &Listener) -> Result<Table, CompileError> {
    let mut table = Table { producer: Vec::new(), consumers: BTreeMap::new() };
    for (index, route) in listener.routes.iter().enumerate() {
        let own = route.namespace == listener.service.namespace;
        let entries = if own {
            &mut table.producer
        } else {
            table.consumers.entry(route.namespace.clone()).or_default()
        };
        let hosts = if route.hostnames.is_empty() { vec![Host::Any] } else { hosts(route) };
        for host in hosts {
            for (number, rule) in route.rules.iter().enumerate() {
                for (nth, item) in rule.matches.iter().enumerate() {
                    let field = format!("spec.rules[{number}].matches[{nth}]");
                    let entry = entry(&host, item, Matched { route: index, rule: number, item: nth })
                        .map_err(|(path, reason)| CompileError {
                            route: format!("{}/{}", route.namespace, route.name),
                            path: format!("{field}.{path}"),
                            reason,
                        })?;
                    entries.push(entry);
                }
            }
        }
    }
    for entries in table.consumers.values_mut().chain([&mut table.producer]) {
        entries.sort_by_cached_key(|entry| precedence(entry, &listener.routes[entry.target.route]));
    }
    Ok(table)
}

fn hosts(route: &Route) -> Vec<Host> {
    let host = |name: &std::sync::Arc<str>| {
        let name = name.to_ascii_lowercase();
        match name.strip_prefix('*') {
            Some("") => Host::Any,
            Some(suffix) => Host::Suffix(suffix.into()),
            None => Host::Exact(name.into()),
        }
    };
    route.hostnames.iter().map(host).collect()
}

/// Gateway API order, smaller first: host (exact before wildcard, then more characters), exact path, longest prefix,
/// regex last (implementation-specific), method, number of headers, number of query parameters, oldest route, name of
/// the route, order of rules and matches.
///
/// Of calls: characters of the service, then of the method, then headers. A service is matched whole, so one with its
/// method (exact) comes before the service alone (prefix), a method alone (pattern) next, and last what says neither.
fn precedence(entry: &Entry, route: &Route) -> impl Ord + use<> {
    let host = match &entry.host {
        Host::Exact(name) => (0, Reverse(name.len())),
        Host::Suffix(suffix) => (1, Reverse(suffix.len())),
        Host::Any => (2, Reverse(0)),
    };
    let path = match &entry.path {
        Path::Exact(path) => (0, Reverse(path.len())),
        Path::Prefix(prefix) if prefix.is_empty() && route.kind == RouteKind::Grpc => (3, Reverse(0)),
        Path::Prefix(prefix) => (1, Reverse(prefix.len())),
        Path::Regex(_) => (2, Reverse(0)),
    };
    let specific = (entry.method.is_none(), Reverse(entry.headers.len()), Reverse(entry.query.len()));
    let object = (route.created, route.namespace.clone(), route.name.clone());
    (host, path, specific, object, entry.target.rule, entry.target.item)
}

type Complaint = (String, String);

fn entry(host: &Host, item: &RequestMatch, target: Matched) -> Result<Entry, Complaint> {
    let RequestMatch { path, method, headers, query } = item;
    let values = |field: &str, list: &[crate::model::HeaderMatch]| {
        list.iter()
            .enumerate()
            .map(|(index, item)| {
                let value = match &item.value {
                    ValueMatch::Exact(text) => Value::Exact((&**text).into()),
                    ValueMatch::Regex(pattern) => Value::Regex(Box::new(
                        regex(pattern).map_err(|reason| (format!("{field}[{index}].value"), reason))?,
                    )),
                };
                Ok((Box::from(&*item.name), value))
            })
            .collect::<Result<Vec<_>, Complaint>>()
    };
    Ok(Entry {
        host: match host {
            Host::Any => Host::Any,
            Host::Exact(name) => Host::Exact(name.clone()),
            Host::Suffix(suffix) => Host::Suffix(suffix.clone()),
        },
        path: match path {
            PathMatch::Exact(path) => Path::Exact((&**path).into()),
            PathMatch::Prefix(prefix) => Path::Prefix(prefix.trim_end_matches('/').into()),
            PathMatch::Regex(pattern) => {
                Path::Regex(Box::new(regex(pattern).map_err(|reason| ("path.value".to_owned(), reason))?))
            }
        },
        method: method.as_ref().map(|method| (&**method).into()),
        headers: values("headers", headers)?,
        query: values("queryParams", query)?,
        target,
    })
}

fn regex(pattern: &str) -> Result<Regex, String> {
    if pattern.len() > MAX_PATTERN_BYTES {
        return Err(format!("the pattern is longer than {MAX_PATTERN_BYTES} bytes"));
    }
    // By itself first: `a)|(?:b` would leave the group below, and the whole string would not have to match.
    syntax::parse(pattern).map_err(|error| format!("malformed pattern: {error}"))?;
    // The whole string must match.
    let config =
        Config::new().nfa_size_limit(Some(MAX_COMPILED_BYTES)).onepass_size_limit(Some(MAX_COMPILED_BYTES));
    Regex::builder().configure(config).build(&format!("^(?:{pattern})$")).map_err(|error| {
        match error.syntax_error() {
            Some(syntax) => format!("malformed pattern: {syntax}"),
            None => format!("the pattern is too complex: {error}"),
        }
    })
}

fn whole(regex: &Regex, text: &str) -> bool {
    regex.is_match(Input::new(text).anchored(Anchored::Yes))
}

impl Table {
    /// What becomes of a request.
    pub fn judge(&self, head: &RequestHead<'_>) -> Verdict {
        let entries = self.consumers.get(head.client).unwrap_or(&self.producer);
        if entries.is_empty() {
            return Verdict::Unrouted;
        }
        let host = head.host.trim_end_matches('.').to_ascii_lowercase();
        // Host names are looked up first: a route of a less specific host does not serve a more specific one's misses
        // unless it matches itself, which the order already says.
        let found = entries.iter().find(|entry| matches(entry, &host, head));
        found.map_or(Verdict::NoMatch, |entry| Verdict::Matched(entry.target))
    }
}

fn matches(entry: &Entry, host: &str, head: &RequestHead<'_>) -> bool {
    let host_fits = match &entry.host {
        Host::Any => true,
        Host::Exact(name) => host == &**name,
        Host::Suffix(suffix) => host.len() > suffix.len() && host.ends_with(&**suffix),
    };
    let path_fits = || match &entry.path {
        Path::Exact(path) => head.path == &**path,
        Path::Prefix(prefix) => {
            head.path.strip_prefix(&**prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }
        Path::Regex(regex) => whole(regex, head.path),
    };
    let value_fits = |expected: &Value, value: &str| match expected {
        Value::Exact(text) => value == &**text,
        Value::Regex(regex) => whole(regex, value),
    };
    host_fits
        && path_fits()
        && entry.method.as_ref().is_none_or(|method| head.method == &**method)
        && entry
            .headers
            .iter()
            .all(|(name, expected)| (head.headers)(name).is_some_and(|value| value_fits(expected, value)))
        && entry.query.iter().all(|(name, expected)| {
            parameter(head.query, name).is_some_and(|value| value_fits(expected, &value))
        })
}

/// The first occurrence of a query parameter, decoded.
fn parameter(query: Option<&str>, name: &str) -> Option<String> {
    query?.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(key)? == name).then(|| decoded(value)).flatten()
    })
}

/// Percent-decoding of `application/x-www-form-urlencoded`; `None` when it is malformed.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
                u8::try_from(high * 16 + low).ok()?
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        id::ServiceKey,
        model::{Filters, HeaderMatch, RouteKind, RouteRule},
    };

    fn header(text: &str) -> HeaderMatch {
        let (name, value) = text.split_once('=').unwrap();
        let value = match value.strip_prefix('~') {
            Some(pattern) => ValueMatch::Regex(pattern.into()),
            None => ValueMatch::Exact(value.into()),
        };
        HeaderMatch { name: name.into(), value }
    }

    /// `[METHOD] path [h:name=value] [q:name=value]`; `=path` exact, `~path` regex, else prefix.
    fn request_match(text: &str) -> RequestMatch {
        let mut item = RequestMatch {
            path: PathMatch::Prefix("/".into()),
            method: None,
            headers: vec![],
            query: vec![],
        };
        for word in text.split_whitespace() {
            if let Some(rest) = word.strip_prefix("h:") {
                item.headers.push(header(rest));
            } else if let Some(rest) = word.strip_prefix("q:") {
                item.query.push(header(rest));
            } else if let Some(rest) = word.strip_prefix('=') {
                item.path = PathMatch::Exact(rest.into());
            } else if let Some(rest) = word.strip_prefix('~') {
                item.path = PathMatch::Regex(rest.into());
            } else if word.starts_with('/') {
                item.path = PathMatch::Prefix(word.into());
            } else {
                item.method = Some(word.into());
            }
        }
        item
    }

    /// `name created hosts | match | match …`: each match is a rule of its own.
    fn table(routes: &[&str]) -> Result<(Table, Vec<String>), CompileError> {
        table_of(RouteKind::Http, routes)
    }

    fn table_of(kind: RouteKind, routes: &[&str]) -> Result<(Table, Vec<String>), CompileError> {
        let (mut list, mut names) = (Vec::new(), Vec::new());
        for text in routes {
            let mut parts = text.split('|');
            let mut head = parts.next().unwrap().split_whitespace();
            let (name, created) = (head.next().unwrap(), head.next().unwrap().parse().unwrap());
            let namespace = name.split_once('/').map_or("shop", |(namespace, _)| namespace);
            names.push(name.to_owned());
            list.push(Route {
                kind,
                namespace: namespace.into(),
                name: name.into(),
                created,
                hostnames: head.map(Arc::from).collect(),
                rules: parts
                    .map(|rule| RouteRule {
                        name: None,
                        filters: Filters::default(),
                        matches: vec![request_match(rule)],
                        backends: vec![],
                        request_timeout: None,
                        backend_timeout: None,
                    })
                    .collect(),
            });
        }
        let service = ServiceKey::new("shop", "web");
        let listener = Listener { service, vips: vec![], port: 80, http: true, routes: list };
        Ok((compile(&listener)?, names))
    }

    /// Which `route.rule` serves a request `METHOD host path[?query] [name=value]…`.
    fn check(routes: &[&str], request: &str, expected: &str) {
        check_of(RouteKind::Http, routes, request, expected);
    }

    fn check_of(kind: RouteKind, routes: &[&str], request: &str, expected: &str) {
        let (table, names) = table_of(kind, routes).unwrap();
        let mut words = request.split_whitespace();
        let (method, host, target) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
        let headers: Vec<_> = words.map(|word| word.split_once('=').unwrap()).collect();
        let (path, query) =
            target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        let lookup = |name: &str| headers.iter().find(|(key, _)| *key == name).map(|(_, value)| *value);
        let client = lookup("client").unwrap_or("shop");
        let head = RequestHead { host, path, query, method, client, headers: &lookup };
        let found = match table.judge(&head) {
            Verdict::Unrouted => "unrouted".to_owned(),
            Verdict::NoMatch => "404".to_owned(),
            Verdict::Matched(matched) => format!("{}.{}", names[matched.route], matched.rule),
        };
        assert_eq!(found, expected, "{request} over {routes:?}");
    }

    /// What says neither service nor method comes last, wherever it stands.
    #[test]
    fn calls_match_by_service_then_method_then_headers() {
        let routes = ["r 0 | / | / h:x=1 | ~/[^/]+/C | ~/[^/]+/C h:x=1 | /a.B | =/a.B/C"];
        for (request, expected) in [
            ("POST h /a.B/C", "r.5"),
            ("POST h /a.B/C x=1", "r.5"),
            ("POST h /a.B/D x=1", "r.4"),
            ("POST h /e.F/C", "r.2"),
            ("POST h /e.F/C x=1", "r.3"),
            ("POST h /e.F/D x=1", "r.1"),
            ("POST h /e.F/D", "r.0"),
        ] {
            check_of(RouteKind::Grpc, &routes, request, expected);
        }
        // Of HTTP a pattern is last.
        check(&["r 0 | / | ~/[^/]+/C"], "POST h /e.F/C", "r.0");
    }

    #[test]
    fn paths_match_by_element() {
        let routes = ["r 0 | /foo | =/exact | ~/v[0-9]+/.*"];
        check(&routes, "GET h /foo", "r.0");
        check(&routes, "GET h /foo/", "r.0");
        check(&routes, "GET h /foo/bar", "r.0");
        check(&routes, "GET h /foobar", "404");
        check(&routes, "GET h /exact", "r.1");
        check(&routes, "GET h /exact/", "404");
        check(&routes, "GET h /v12/x", "r.2");
        check(&routes, "GET h /x/v12/x", "404");
        check(&["r 0 | /foo/"], "GET h /foo", "r.0");
        check(&["r 0 | /"], "GET h /anything", "r.0");
    }

    #[test]
    fn the_more_specific_match_wins_whatever_the_order() {
        check(&["r 0 | / | /a | /a/b | =/a/b"], "GET h /a/b", "r.3");
        check(&["r 0 | / | /a | /a/b | =/a/b"], "GET h /a/b/c", "r.2");
        check(&["r 0 | /a | POST /a"], "POST h /a", "r.1");
        check(&["r 0 | /a h:x=1 | /a h:x=1 h:y=2"], "GET h /a x=1 y=2", "r.1");
        check(&["r 0 | POST /a | /a h:x=1 h:y=2"], "POST h /a x=1 y=2", "r.0");
        check(&["r 0 | /a q:x=1 | /a h:x=1"], "GET h /a?x=1 x=1", "r.1");
        check(&["r 0 | ~/a.* | /a"], "GET h /a", "r.1");
        check(&["r 0 | /a | /a"], "GET h /a", "r.0");
    }

    #[test]
    fn between_routes_age_then_name_decides() {
        check(&["b 5 | /", "a 9 | /"], "GET h /", "b.0");
        check(&["b 5 | /", "a 5 | /"], "GET h /", "a.0");
    }

    #[test]
    fn a_route_of_another_namespace_is_for_its_own_clients_and_hides_the_producers() {
        let routes = ["own 0 | /", "bank/r 0 | /only"];
        check(&routes, "GET h /only", "own.0");
        check(&routes, "GET h /only client=bank", "bank/r.0");
        check(&routes, "GET h / client=bank", "404");
        check(&routes, "GET h /only client=other", "own.0");
        check(&["bank/r 0 | /"], "GET h /", "unrouted");
        check(&["bank/r 0 | /"], "GET h / client=bank", "bank/r.0");
    }

    #[test]
    fn hosts_are_exact_before_wildcard_and_blind_to_case() {
        let routes = [
            "any 0 | /",
            "wild 0 *.example.com | /",
            "deep 0 *.a.example.com | /",
            "one 0 x.a.example.com | /only",
        ];
        check(&routes, "GET x.a.example.com /only", "one.0");
        check(&routes, "GET X.A.Example.COM. /only", "one.0");
        check(&routes, "GET x.a.example.com /", "deep.0");
        check(&routes, "GET x.y.example.com /", "wild.0");
        check(&routes, "GET example.com /", "any.0");
    }

    #[test]
    fn values_are_compared_whole_and_decoded() {
        check(&["r 0 | /a h:v=~1[0-9]"], "GET h /a v=12", "r.0");
        check(&["r 0 | /a h:v=~1[0-9]"], "GET h /a v=123", "404");
        check(&["r 0 | /a q:v=a+b"], "GET h /a?v=a%2Bb", "r.0");
        check(&["r 0 | /a q:v=1"], "GET h /a?v=2&v=1", "404");
        check(&["r 0 | /a q:v=1"], "GET h /a?v=%zz", "404");
    }

    #[test]
    fn a_bad_pattern_names_its_field() {
        let error = table(&["r 0 | / | /a h:v=~("]).unwrap_err();
        assert_eq!(
            (error.route.as_str(), error.path.as_str()),
            ("shop/r", "spec.rules[1].matches[0].headers[0].value")
        );
        assert!(table(&["r 0 | ~(a{1000}){1000}"]).unwrap_err().reason.contains("complex"));
    }

    #[test]
    fn a_pattern_cannot_leave_the_whole_string() {
        for pattern in ["/a)(?:.*", "/a)(", "(/a", "/a)"] {
            let error = table(&[&format!("r 0 | ~{pattern}")]).map(drop).unwrap_err();
            assert_eq!(error.path, "spec.rules[0].matches[0].path.value", "{pattern}");
        }
        check(&["r 0 | /a h:v=~1[0-9]"], "GET h /a v=x12", "404");
    }
}
