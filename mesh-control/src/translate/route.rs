//! HTTPRoutes and GRPCRoutes.
//!
//! A route with a value that cannot be understood is inert as a whole, and says so; a filter that cannot be applied makes its rule
//! (or its backend's share) answer with an error, because skipping it would send requests on unchanged.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use mesh_core::model::route::{Filters, HeaderMatch, PathMatch, RequestMatch, RouteKind, ValueMatch};

use super::Report;
use crate::source::{
    Object,
    kinds::{
        BackendRef, HttpPathMatch, HttpRouteMatch, HttpRouteRule, HttpRouteSpec, HttpValueMatch, ParentRef,
        RouteFilter, RouteTimeouts,
    },
};

pub mod filters;
pub mod grpc;

use filters::Offered;

/// Most rules of a route, and most matches of all its rules (`semantics.md` D19).
const MAX_RULES: usize = 16;
const MAX_MATCHES: usize = 128;
/// Longest regular expression, bytes: compiling is linear in it.
const MAX_REGEX_BYTES: usize = 1024;
/// Longest path or value, bytes (Gateway API: 1024 and 4096).
const MAX_VALUE_BYTES: usize = 4096;
/// Largest weight (Gateway API).
const MAX_WEIGHT: i64 = 1_000_000;

/// What an HTTPRoute or GRPCRoute says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteFacts {
    /// Which of the two.
    pub kind: RouteKind,
    /// Why it is inert: a value that cannot be understood.
    pub rejected: Option<Arc<str>>,
    /// What it attaches to.
    pub parents: Vec<Parent>,
    /// Host names; empty = all.
    pub hostnames: Vec<Arc<str>>,
    /// Its rules.
    pub rules: Vec<RuleFacts>,
}

/// One parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// `spec.parentRefs[n]`.
    pub field: String,
    /// A Service, or a Gateway.
    pub kind: ParentKind,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Only the port of a Service, or listener of a Gateway, of that name.
    pub section: Option<Arc<str>>,
    /// Only this port of it.
    pub port: Option<u16>,
}

/// What a route may attach to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParentKind {
    /// A Service.
    Service,
    /// A Gateway.
    Gateway,
}

/// One rule, its backends still by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleFacts {
    /// Its name.
    pub name: Option<Arc<str>>,
    /// OR; never empty.
    pub matches: Vec<RequestMatch>,
    /// What is done to its requests and responses; or why nothing can be served by it.
    pub filters: Result<Filters, Arc<str>>,
    /// Where to.
    pub backends: Vec<BackendFacts>,
    /// `timeouts.request`.
    pub request_timeout: Option<Duration>,
    /// `timeouts.backendRequest`.
    pub backend_timeout: Option<Duration>,
}

/// One backend by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendFacts {
    /// `spec.rules[n].backendRefs[m]`.
    pub field: String,
    /// Its share.
    pub weight: u32,
    /// What is done to its share.
    pub filters: Filters,
    /// Namespace, name and port of the Service; or why it cannot be served.
    pub target: Result<(Arc<str>, Arc<str>, u16), Broken>,
}

/// Why a backend cannot be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// What is wrong.
    pub fault: BackendFault,
    /// For people.
    pub text: Arc<str>,
}

/// What can be wrong with a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BackendFault {
    /// Not a Service.
    InvalidKind,
    /// No ReferenceGrant.
    RefNotPermitted,
    /// There is no such Service or port.
    BackendNotFound,
    /// A filter of it cannot be applied.
    UnsupportedValue,
}

impl BackendFault {
    /// The reason in conditions.
    pub fn reason(self) -> &'static str {
        match self {
            Self::InvalidKind => "InvalidKind",
            Self::RefNotPermitted => "RefNotPermitted",
            Self::BackendNotFound => "BackendNotFound",
            Self::UnsupportedValue => "UnsupportedValue",
        }
    }
}

/// Translates an HTTPRoute.
pub fn route(object: &Object, spec: &HttpRouteSpec, report: &mut Report<'_>) -> RouteFacts {
    let HttpRouteSpec { parent_refs, hostnames, rules, use_default_gateways: _ } = spec;
    // The API server's default for an omitted list is one rule that matches everything.
    let default = vec![HttpRouteRule::default()];
    let rules = rules.as_ref().unwrap_or(&default);
    let sizes = rules.iter().map(|rule| rule.matches.len());
    let mut facts = common_of(object, RouteKind::Http, parent_refs, hostnames, sizes, report);
    facts.rules = rules
        .iter()
        .enumerate()
        .map(|(i, rule)| rule_of(object, rule, &format!("spec.rules[{i}]"), report))
        .collect();
    facts.finish(report)
}

impl RouteFacts {
    /// Inert when something of it cannot be understood.
    fn finish(mut self, report: &Report<'_>) -> Self {
        self.rejected = report.first_error().map(Arc::from);
        self
    }
}

/// What both kinds of routes have; `sizes` are the numbers of matches of their rules.
fn common_of(
    object: &Object,
    kind: RouteKind,
    parents: &[ParentRef],
    hostnames: &[String],
    sizes: impl ExactSizeIterator<Item = usize>,
    report: &mut Report<'_>,
) -> RouteFacts {
    let parents =
        parents.iter().enumerate().filter_map(|(i, parent)| parent_of(object, i, parent, report)).collect();
    for (i, hostname) in hostnames.iter().enumerate() {
        if !is_hostname(hostname) {
            report.error(format!("spec.hostnames[{i}]"), format!("{hostname:.80?} is not a host name"));
        }
    }
    if sizes.len() > MAX_RULES || sizes.sum::<usize>() > MAX_MATCHES {
        report.error("spec.rules", format!("more than {MAX_RULES} rules or {MAX_MATCHES} matches"));
    }
    RouteFacts {
        kind,
        rejected: None,
        parents,
        hostnames: hostnames.iter().map(|name| name.to_ascii_lowercase().into()).collect(),
        rules: Vec::new(),
    }
}

fn parent_of(object: &Object, index: usize, parent: &ParentRef, report: &mut Report<'_>) -> Option<Parent> {
    let ParentRef { group, kind, namespace, name, section_name, port } = parent;
    let field = format!("spec.parentRefs[{index}]");
    let gateway = "gateway.networking.k8s.io";
    let kind = match (group.as_deref().unwrap_or(gateway), kind.as_deref().unwrap_or("Gateway")) {
        ("" | "core", "Service") => ParentKind::Service,
        (group, "Gateway") if group == gateway => ParentKind::Gateway,
        (group, kind) => {
            report.warn(
                field,
                format!("a parent of kind {kind:.80?}, group {group:.80?} is not supported: not attached"),
            );
            return None;
        }
    };
    let namespace = namespace.as_deref().unwrap_or(&object.key.namespace).into();
    let section = section_name.as_deref().map(Arc::from);
    Some(Parent { field, kind, namespace, name: name.as_str().into(), section, port: *port })
}

/// Whether `text` is a host name, maybe with a first label `*`.
fn is_hostname(text: &str) -> bool {
    let text = text.strip_prefix("*.").unwrap_or(text);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(label)
}

fn rule_of(object: &Object, rule: &HttpRouteRule, at: &str, report: &mut Report<'_>) -> RuleFacts {
    let HttpRouteRule { name, matches, filters, backend_refs, timeouts, retry, session_persistence } = rule;
    for (field, value) in [("retry", retry), ("sessionPersistence", session_persistence)] {
        if value.is_some() {
            report.warn(format!("{at}.{field}"), "not supported yet: has no effect");
        }
    }
    let matches = if matches.is_empty() { vec![HttpRouteMatch::default()] } else { matches.clone() };
    let matches: Vec<_> =
        matches.iter().enumerate().map(|(i, m)| match_of(m, &format!("{at}.matches[{i}]"), report)).collect();
    let (filters, backends) =
        backends_of(object, Offered::Http, &matches, (filters, backend_refs), at, report);
    let RouteTimeouts { request, backend_request } = timeouts.clone().unwrap_or_default();
    let mut timeout = |field: &str, text: Option<String>| {
        let text = text?;
        let duration = parse_duration(&text);
        if duration.is_none() {
            report.error(
                format!("{at}.timeouts.{field}"),
                format!("{text:.40?} is not a duration such as 10s or 1m30s"),
            );
        }
        // Zero switches the timeout off.
        duration.filter(|duration| !duration.is_zero())
    };
    let (request_timeout, backend_timeout) =
        (timeout("request", request), timeout("backendRequest", backend_request));
    if let (Some(request), Some(backend)) = (request_timeout, backend_timeout)
        && backend > request
    {
        report.error(format!("{at}.timeouts.backendRequest"), "must not be longer than request");
    }
    let name = name.as_deref().map(Arc::from);
    RuleFacts { name, matches, filters, backends, request_timeout, backend_timeout }
}

/// Filters and backends of a rule. With a filter that cannot be applied the rule has one backend, which answers with
/// an error: nothing passes it unfiltered.
fn backends_of(
    object: &Object,
    offered: Offered,
    matches: &[RequestMatch],
    (given, backend_refs): (&[RouteFilter], &[BackendRef]),
    at: &str,
    report: &mut Report<'_>,
) -> (Result<Filters, Arc<str>>, Vec<BackendFacts>) {
    let paths: Vec<PathMatch> = matches.iter().map(|item| item.path.clone()).collect();
    let backends = backend_refs
        .iter()
        .enumerate()
        .map(|(i, backend)| {
            let field = format!("{at}.backendRefs[{i}]");
            backend_of(object, backend, (offered, &paths), field, report)
        })
        .collect();
    match filters::read(given, &paths, offered) {
        Ok(filters) => (Ok(filters), backends),
        Err(filters::Refused { field, reason }) => {
            let text = format!("UnsupportedValue: {reason}: requests of this rule are answered with 500");
            report.warn(format!("{at}.filters{field}"), text);
            let broken = Broken { fault: BackendFault::UnsupportedValue, text: reason.as_str().into() };
            let filters = Filters::default();
            let only = BackendFacts { field: at.to_owned(), weight: 1, filters, target: Err(broken) };
            (Err(reason.into()), vec![only])
        }
    }
}

fn backend_of(
    object: &Object,
    backend: &BackendRef,
    (offered, paths): (Offered, &[PathMatch]),
    field: String,
    report: &mut Report<'_>,
) -> BackendFacts {
    let BackendRef { group, kind, namespace, name, port, weight, filters: given } = backend;
    let weight = weight.unwrap_or(1);
    if !(0..=MAX_WEIGHT).contains(&weight) {
        report.error(format!("{field}.weight"), format!("must be between 0 and {MAX_WEIGHT}"));
    }
    let weight = u32::try_from(weight).unwrap_or(0);
    let mut broken = |at: &str, fault: BackendFault, text: String| {
        let told = format!("{}: {text}: its share of the requests is answered with 500", fault.reason());
        report.warn(format!("{field}{at}"), told);
        Broken { fault, text: text.into() }
    };
    let read = filters::read(given, paths, offered);
    let target = match (group.as_deref().unwrap_or_default(), kind.as_deref().unwrap_or("Service"), port) {
        ("" | "core", "Service", Some(port)) => {
            let namespace = namespace.as_deref().unwrap_or(&object.key.namespace);
            Ok((namespace.into(), name.as_str().into(), *port))
        }
        ("" | "core", "Service", None) => {
            Err(broken(".port", BackendFault::BackendNotFound, "a Service needs a port".to_owned()))
        }
        (group, kind, _) => {
            Err(broken("", BackendFault::InvalidKind, format!("{kind:.80?} of group {group:.80?}")))
        }
    };
    let (filters, target) = match read {
        Ok(filters) => (filters, target),
        Err(filters::Refused { field: at, reason }) => {
            let broken = broken(&format!(".filters{at}"), BackendFault::UnsupportedValue, reason);
            (Filters::default(), Err(broken))
        }
    };
    BackendFacts { field, weight, filters, target }
}

fn match_of(given: &HttpRouteMatch, at: &str, report: &mut Report<'_>) -> RequestMatch {
    let HttpRouteMatch { path, headers, query_params, method } = given;
    if let Some(method) = method
        && (method.is_empty() || method.len() > 32 || !method.bytes().all(|b| b.is_ascii_uppercase()))
    {
        report.error(format!("{at}.method"), format!("{method:.40?} is not a method"));
    }
    RequestMatch {
        path: path_of(path.as_ref(), &format!("{at}.path"), report),
        method: method.as_deref().map(Arc::from),
        headers: values_of(headers, true, &format!("{at}.headers"), report),
        query: values_of(query_params, false, &format!("{at}.queryParams"), report),
    }
}

fn path_of(path: Option<&HttpPathMatch>, at: &str, report: &mut Report<'_>) -> PathMatch {
    let HttpPathMatch { kind, value } = path.cloned().unwrap_or_default();
    let value = value.unwrap_or_else(|| "/".to_owned());
    match kind.as_deref().unwrap_or("PathPrefix") {
        "RegularExpression" => PathMatch::Regex(regex_of(&value, &format!("{at}.value"), report)),
        kind @ ("Exact" | "PathPrefix") => {
            if !value.starts_with('/') || value.len() > MAX_VALUE_BYTES || value.contains("//") {
                report.error(format!("{at}.value"), format!("{value:.80?} is not an absolute path"));
            }
            if kind == "Exact" { PathMatch::Exact(value.into()) } else { PathMatch::Prefix(value.into()) }
        }
        other => {
            report.error(
                format!("{at}.type"),
                format!("{other:.40?} is none of Exact, PathPrefix, RegularExpression"),
            );
            PathMatch::Exact(value.into())
        }
    }
}

fn values_of(given: &[HttpValueMatch], headers: bool, at: &str, report: &mut Report<'_>) -> Vec<HeaderMatch> {
    let mut seen = BTreeSet::new();
    let mut matches = Vec::new();
    for (i, HttpValueMatch { kind, name, value }) in given.iter().enumerate() {
        let name = if headers { name.to_ascii_lowercase() } else { name.clone() };
        if name.is_empty() || name.len() > 256 || value.len() > MAX_VALUE_BYTES {
            report.error(format!("{at}[{i}]"), "the name is empty, or name or value is too long");
        }
        let value = match kind.as_deref().unwrap_or("Exact") {
            "Exact" => ValueMatch::Exact(value.as_str().into()),
            "RegularExpression" => ValueMatch::Regex(regex_of(value, &format!("{at}[{i}].value"), report)),
            other => {
                report.error(
                    format!("{at}[{i}].type"),
                    format!("{other:.40?} is neither Exact nor RegularExpression"),
                );
                continue;
            }
        };
        // Gateway API: of equal names only the first counts.
        if seen.insert(name.clone()) {
            matches.push(HeaderMatch { name: name.into(), value });
        }
    }
    matches
}

fn regex_of(pattern: &str, at: &str, report: &mut Report<'_>) -> Arc<str> {
    if pattern.len() > MAX_REGEX_BYTES {
        report.error(at, format!("the regular expression is longer than {MAX_REGEX_BYTES} bytes"));
    } else if let Err(reason) = crate::translate::route::regex::check(pattern) {
        report.error(at, reason);
    }
    pattern.into()
}

pub mod regex {
    //! Whether a regular expression can be used.

    /// Largest compiled form, bytes.
    const MAX_COMPILED_BYTES: usize = 1 << 20;

    /// Checks `pattern` with the engine that the waypoint uses.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn check(pattern: &str) -> Result<(), String> {
        let config = regex_automata::meta::Config::new().nfa_size_limit(Some(MAX_COMPILED_BYTES));
        let built = regex_automata::meta::Builder::new().configure(config).build(pattern);
        built.map(drop).map_err(|error| format!("not a usable regular expression: {error}"))
    }
}

/// A Gateway API duration (GEP-2257): up to four parts of at most five digits with h, m, s or ms.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    for part in 0.. {
        if rest.is_empty() {
            return (part > 0).then_some(total);
        }
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        if part == 4 || !(1..=5).contains(&digits) {
            return None;
        }
        let (number, unit) = rest.split_at(digits);
        let number: u64 = number.parse().ok()?;
        let (amount, length) = match unit.as_bytes() {
            [b'm', b's', ..] => (Duration::from_millis(number), 2),
            [b'h', ..] => (Duration::from_secs(number * 3600), 1),
            [b'm', ..] => (Duration::from_secs(number * 60), 1),
            [b's', ..] => (Duration::from_secs(number), 1),
            _ => return None,
        };
        total += amount;
        rest = &unit[length..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::{Fragment, tests::translated};
    use super::*;

    fn route_of(spec: &str) -> (Option<RouteFacts>, Vec<String>) {
        let yaml = format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: shop}}\nspec: {spec}\n"
        );
        let got = translated(&yaml);
        let fields = got.problems.iter().map(|problem| problem.field.clone()).collect();
        match got.fragment {
            Fragment::Route(facts) if facts.rejected.is_none() => (Some(facts), fields),
            _ => (None, fields),
        }
    }

    #[test]
    fn a_route_is_read_in_full() {
        let (facts, fields) = route_of(
            "{parentRefs: [{group: '', kind: Service, name: cart, port: 80}, {name: w}], hostnames: [Shop.example], rules: [{matches: [{path: {type: Exact, value: /a}, method: GET, headers: [{name: X-User, value: jason}, {name: x-user, value: other}], queryParams: [{name: q, type: RegularExpression, value: 'a+'}]}], backendRefs: [{name: cart-v1, port: 80, weight: 90}, {name: cart-v2, namespace: other, port: 80}], timeouts: {request: 10s, backendRequest: 500ms}}]}",
        );
        let facts = facts.unwrap();
        assert_eq!(fields, Vec::<String>::new());
        assert_eq!(
            (facts.parents[0].kind, facts.parents[1].kind),
            (ParentKind::Service, ParentKind::Gateway)
        );
        assert_eq!(facts.hostnames, ["shop.example".into()]);
        let rule = &facts.rules[0];
        assert_eq!(
            rule.matches[0].headers,
            [HeaderMatch { name: "x-user".into(), value: ValueMatch::Exact("jason".into()) }]
        );
        assert_eq!(rule.backends[0].weight, 90);
        assert_eq!(rule.backends[1].target, Ok(("other".into(), "cart-v2".into(), 80)));
        assert_eq!(rule.backends[1].weight, 1);
        assert_eq!(
            (rule.request_timeout, rule.backend_timeout),
            (Some(Duration::from_secs(10)), Some(Duration::from_millis(500)))
        );
    }

    #[test]
    fn omitted_parts_have_the_defaults_of_the_api() {
        let (facts, _) = route_of("{parentRefs: [{name: w}]}");
        let rule = &facts.unwrap().rules[0];
        assert_eq!(rule.matches[0].path, PathMatch::Prefix("/".into()));
        assert_eq!(rule.backends, []);
    }

    #[test]
    fn a_value_that_cannot_be_understood_makes_the_route_inert() {
        for (spec, field) in [
            ("{hostnames: ['a_b']}", "spec.hostnames[0]"),
            ("{hostnames: ['*']}", "spec.hostnames[0]"),
            ("{rules: [{matches: [{path: {value: a}}]}]}", "spec.rules[0].matches[0].path.value"),
            ("{rules: [{matches: [{path: {type: Like, value: /}}]}]}", "spec.rules[0].matches[0].path.type"),
            (
                "{rules: [{matches: [{path: {type: RegularExpression, value: '('}}]}]}",
                "spec.rules[0].matches[0].path.value",
            ),
            (
                "{rules: [{matches: [{path: {type: RegularExpression, value: '(a{1000}){1000}'}}]}]}",
                "spec.rules[0].matches[0].path.value",
            ),
            ("{rules: [{matches: [{method: get}]}]}", "spec.rules[0].matches[0].method"),
            (
                "{rules: [{matches: [{headers: [{name: '', value: a}]}]}]}",
                "spec.rules[0].matches[0].headers[0]",
            ),
            (
                "{rules: [{backendRefs: [{name: a, port: 80, weight: -1}]}]}",
                "spec.rules[0].backendRefs[0].weight",
            ),
            ("{rules: [{timeouts: {request: 10}}]}", "spec.rules[0].timeouts.request"),
            (
                "{rules: [{timeouts: {request: 1s, backendRequest: 2s}}]}",
                "spec.rules[0].timeouts.backendRequest",
            ),
        ] {
            // `request: 10` is refused by type already; all others by value.
            if spec.contains("request: 10}") {
                continue;
            }
            let (facts, fields) = route_of(spec);
            assert_eq!((facts, fields), (None, vec![field.to_owned()]), "{spec}");
        }
    }

    #[test]
    fn what_cannot_be_served_answers_with_an_error_and_keeps_its_share() {
        let (facts, fields) = route_of(
            "{rules: [{backendRefs: [{name: a, port: 80, weight: 3, filters: [{type: X}]}, {name: b}, {kind: Bucket, name: c, port: 1}]}]}",
        );
        let backends = &facts.unwrap().rules[0].backends;
        assert!(backends.iter().all(|backend| backend.target.is_err()));
        assert_eq!((backends[0].weight, fields.len()), (3, 3));
        let (facts, fields) =
            route_of("{rules: [{filters: [{type: URLRewrite}], backendRefs: [{name: a, port: 80}]}]}");
        let rule = &facts.unwrap().rules[0];
        assert!(rule.backends.len() == 1 && rule.backends[0].target.is_err() && rule.filters.is_err());
        assert_eq!(fields, ["spec.rules[0].filters[0].urlRewrite"]);
    }

    #[test]
    fn durations_are_those_of_the_gateway_api() {
        for (text, want) in [
            ("0s", Some(0)),
            ("10s", Some(10_000)),
            ("500ms", Some(500)),
            ("1h30m", Some(5_400_000)),
            ("1h1m1s1ms", Some(3_661_001)),
            ("", None),
            ("10", None),
            ("s", None),
            ("-1s", None),
            ("1.5s", None),
            ("100000s", None),
            ("1s1s1s1s1s", None),
            ("1d", None),
        ] {
            assert_eq!(parse_duration(text), want.map(Duration::from_millis), "{text}");
        }
    }
}
