//! GRPCRoutes: a call is an HTTP/2 request whose path is `/service/method`.

use std::sync::Arc;

use mesh_core::model::{PathMatch, RequestMatch, RouteKind};

use super::{
    BackendFacts, RouteFacts, RuleFacts, backends_of, common_of, filters::Offered, regex_of, values_of,
};
use crate::{
    source::{
        Object,
        kinds::{GrpcMethodMatch, GrpcRouteMatch, GrpcRouteRule, GrpcRouteSpec},
    },
    translate::Report,
};

/// Translates a GRPCRoute.
pub fn route(object: &Object, spec: &GrpcRouteSpec, report: &mut Report<'_>) -> RouteFacts {
    let GrpcRouteSpec { parent_refs, hostnames, rules, use_default_gateways: _ } = spec;
    let default = vec![GrpcRouteRule::default()];
    let rules = rules.as_ref().unwrap_or(&default);
    let sizes = rules.iter().map(|rule| rule.matches.len());
    let mut facts = common_of(object, RouteKind::Grpc, parent_refs, hostnames, sizes, report);
    facts.rules = rules
        .iter()
        .enumerate()
        .map(|(i, rule)| rule_of(object, rule, &format!("spec.rules[{i}]"), report))
        .collect();
    facts.finish(report)
}

fn rule_of(object: &Object, rule: &GrpcRouteRule, at: &str, report: &mut Report<'_>) -> RuleFacts {
    let GrpcRouteRule { name, matches, filters, backend_refs, session_persistence } = rule;
    if session_persistence.is_some() {
        report.warn(format!("{at}.sessionPersistence"), "not supported yet: has no effect");
    }
    let matches = if matches.is_empty() { vec![GrpcRouteMatch::default()] } else { matches.clone() };
    let matches: Vec<_> =
        matches.iter().enumerate().map(|(i, m)| match_of(m, &format!("{at}.matches[{i}]"), report)).collect();
    let (filters, backends): (_, Vec<BackendFacts>) =
        backends_of(object, Offered::Grpc, &matches, (filters, backend_refs), at, report);
    RuleFacts {
        name: name.as_deref().map(Arc::from),
        matches,
        filters,
        backends,
        request_timeout: None,
        backend_timeout: None,
    }
}

fn match_of(given: &GrpcRouteMatch, at: &str, report: &mut Report<'_>) -> RequestMatch {
    let GrpcRouteMatch { method, headers } = given;
    RequestMatch {
        path: method
            .as_ref()
            .map_or(PathMatch::Prefix("/".into()), |method| path_of(method, &format!("{at}.method"), report)),
        method: None,
        headers: values_of(headers, true, &format!("{at}.headers"), report),
        query: Vec::new(),
    }
}

/// Service and method as a path. Of an exact match without a method the path is a prefix, which is by element; so the
/// order of precedence of HTTP paths is the one of services and methods.
fn path_of(given: &GrpcMethodMatch, at: &str, report: &mut Report<'_>) -> PathMatch {
    let GrpcMethodMatch { kind, service, method } = given;
    let part = |part: &Option<String>| part.clone().filter(|text| !text.is_empty());
    let (service, method) = (part(service), part(method));
    match kind.as_deref().unwrap_or("Exact") {
        "Exact" => {
            let name = |text: &str, dots: bool| {
                text.len() <= 1024
                    && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || (dots && b == b'.'))
            };
            for (field, text, dots) in [("service", &service, true), ("method", &method, false)] {
                if text.as_ref().is_some_and(|text| !name(text, dots)) {
                    report
                        .error(format!("{at}.{field}"), format!("{text:.80?} is not the name of a {field}"));
                }
            }
            match (service, method) {
                (Some(service), Some(method)) => PathMatch::Exact(format!("/{service}/{method}").into()),
                (Some(service), None) => PathMatch::Prefix(format!("/{service}").into()),
                (None, Some(method)) => PathMatch::Regex(format!("/[^/]+/{method}").into()),
                (None, None) => {
                    report.error(at, "needs a service or a method");
                    PathMatch::Exact("/".into())
                }
            }
        }
        "RegularExpression" => {
            let mut part = |field: &str, text: Option<String>| match text {
                // By itself first: unbalanced brackets of one part could end in the other.
                Some(text) => format!("(?:{})", regex_of(&text, &format!("{at}.{field}"), report)),
                None => "[^/]+".to_owned(),
            };
            let (service, method) = (part("service", service), part("method", method));
            PathMatch::Regex(format!("/{service}/{method}").into())
        }
        other => {
            report
                .error(format!("{at}.type"), format!("{other:.40?} is neither Exact nor RegularExpression"));
            PathMatch::Exact("/".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate::{Fragment, tests::translated};

    fn route_of(spec: &str) -> (RouteFacts, Vec<String>) {
        let yaml = format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: GRPCRoute\nmetadata: {{name: r, namespace: shop}}\nspec: {spec}\n"
        );
        let got = translated(&yaml);
        let fields = got.problems.iter().map(|problem| problem.field.clone()).collect();
        let Fragment::Route(facts) = got.fragment else { panic!("{:?}", got.fragment) };
        (facts, fields)
    }

    #[test]
    fn a_method_is_a_path() {
        for (method, want) in [
            ("{service: a.B, method: C}", PathMatch::Exact("/a.B/C".into())),
            ("{service: a.B}", PathMatch::Prefix("/a.B".into())),
            ("{method: C}", PathMatch::Regex("/[^/]+/C".into())),
            ("{type: RegularExpression, service: 'a|b'}", PathMatch::Regex("/(?:a|b)/[^/]+".into())),
            (
                "{type: RegularExpression, service: a, method: 'x.*'}",
                PathMatch::Regex("/(?:a)/(?:x.*)".into()),
            ),
        ] {
            let (facts, fields) = route_of(&format!("{{rules: [{{matches: [{{method: {method}}}]}}]}}"));
            assert_eq!((&facts.rules[0].matches[0].path, fields), (&want, vec![]), "{method}");
        }
        let (facts, _) = route_of("{rules: [{backendRefs: [{name: a, port: 1}]}]}");
        assert_eq!(facts.rules[0].matches[0].path, PathMatch::Prefix("/".into()));
        assert_eq!((facts.kind, facts.rejected), (RouteKind::Grpc, None));
    }

    #[test]
    fn what_is_no_method_rejects_the_route() {
        for (method, field) in [
            ("{}", ""),
            ("{service: a/b}", ".service"),
            ("{method: 'a.b'}", ".method"),
            ("{type: RegularExpression, service: 'a)(b'}", ".service"),
            ("{type: Like, service: a}", ".type"),
        ] {
            let (facts, fields) = route_of(&format!("{{rules: [{{matches: [{{method: {method}}}]}}]}}"));
            assert_eq!(fields, [format!("spec.rules[0].matches[0].method{field}")], "{method}");
            assert!(facts.rejected.is_some(), "{method}");
        }
    }

    #[test]
    fn a_call_cannot_be_redirected() {
        let (facts, fields) = route_of(
            "{rules: [{filters: [{type: RequestRedirect, requestRedirect: {}}], backendRefs: [{name: a, port: 1}]}]}",
        );
        assert_eq!(fields, ["spec.rules[0].filters[0].type"]);
        assert!(facts.rules[0].backends[0].target.is_err());
    }
}
