//! Filters of rules and backends. One that cannot be applied is never skipped: what it stands on answers with 500.

use std::{collections::BTreeSet, sync::Arc};

use mesh_core::{
    model::{Filters, HeaderEdit, PathEdit, PathMatch, Redirect, Rewrite},
    rewrite::editable,
};

use super::{MAX_VALUE_BYTES, is_hostname};
use crate::source::kinds::{
    HeaderModifier, NamedValue, PathModifier, RequestRedirect, RouteFilter, UrlRewrite,
};

/// Most fields that one list of a header filter may name (Gateway API).
const MAX_FIELDS: usize = 16;
/// Statuses of a redirect (Gateway API).
const REDIRECTS: [u16; 5] = [301, 302, 303, 307, 308];

/// Which filters the object may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// Those of an HTTPRoute.
    Http,
    /// Those of a GRPCRoute: a call is not sent elsewhere.
    Grpc,
}

/// Why filters cannot be applied: path below `filters`, and reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// For example `[0].requestRedirect.port`.
    pub field: String,
    /// For people.
    pub reason: String,
}

fn refused<T>(field: impl Into<String>, reason: impl Into<String>) -> Result<T, Refused> {
    Err(Refused { field: field.into(), reason: reason.into() })
}

/// Reads the filters of one rule or backend; `matches` are those of the rule.
///
/// # Errors
/// [`Refused`] for the first that cannot be applied.
pub fn read(given: &[RouteFilter], matches: &[PathMatch], offered: Offered) -> Result<Filters, Refused> {
    let mut filters = Filters::default();
    let mut seen = BTreeSet::new();
    for (index, filter) in given.iter().enumerate() {
        let RouteFilter {
            kind,
            request_header_modifier,
            response_header_modifier,
            request_redirect,
            url_rewrite,
            request_mirror: _,
            extension_ref: _,
            cors: _,
            external_auth: _,
        } = filter;
        let at = |field: &str| format!("[{index}].{field}");
        if !seen.insert(kind.as_str()) {
            return refused(at("type"), format!("{kind:.60} is there twice"));
        }
        match (kind.as_str(), offered) {
            ("RequestHeaderModifier", _) => {
                filters.request = headers(request_header_modifier.as_ref(), &at("requestHeaderModifier"))?;
            }
            ("ResponseHeaderModifier", _) => {
                filters.response = headers(response_header_modifier.as_ref(), &at("responseHeaderModifier"))?;
            }
            ("RequestRedirect", Offered::Http) => {
                let at = at("requestRedirect");
                filters.redirect = Some(redirect(request_redirect.as_ref(), matches, &at)?);
            }
            ("URLRewrite", Offered::Http) => {
                filters.rewrite = Some(rewrite(url_rewrite.as_ref(), matches, &at("urlRewrite"))?);
            }
            _ => return refused(at("type"), format!("filter {kind:.60} is not supported")),
        }
    }
    if filters.redirect.is_some() && filters.rewrite.is_some() {
        return refused("", "RequestRedirect and URLRewrite exclude each other");
    }
    Ok(filters)
}

fn headers(given: Option<&HeaderModifier>, at: &str) -> Result<HeaderEdit, Refused> {
    let Some(HeaderModifier { set, add, remove }) = given else {
        return refused(at, "is missing");
    };
    let mut names = BTreeSet::new();
    let mut name = |field: String, name: &str| {
        let name = name.to_ascii_lowercase();
        if !editable(&name) || name.len() > 256 {
            return refused(field, format!("{name:.80?} cannot be changed by a route"));
        }
        if !names.insert(name.clone()) {
            return refused(field, format!("{name:.80?} is changed twice"));
        }
        Ok(Arc::<str>::from(name))
    };
    let mut fields = |list: &[NamedValue], which: &str| {
        list.iter()
            .enumerate()
            .map(|(i, NamedValue { name: key, value })| {
                let visible = value.bytes().all(|b| b == b'\t' || (b >= b' ' && b != 0x7f));
                if value.len() > MAX_VALUE_BYTES || !visible {
                    return refused(
                        format!("{at}.{which}[{i}].value"),
                        "is too long or holds a control character",
                    );
                }
                Ok((name(format!("{at}.{which}[{i}].name"), key)?, Arc::from(value.as_str())))
            })
            .collect::<Result<Vec<_>, _>>()
    };
    let edit = HeaderEdit {
        set: fields(set, "set")?,
        add: fields(add, "add")?,
        remove: remove
            .iter()
            .enumerate()
            .map(|(i, key)| name(format!("{at}.remove[{i}]"), key))
            .collect::<Result<_, _>>()?,
    };
    if [edit.set.len(), edit.add.len(), edit.remove.len()].into_iter().any(|count| count > MAX_FIELDS) {
        return refused(at, format!("more than {MAX_FIELDS} fields"));
    }
    Ok(edit)
}

fn redirect(given: Option<&RequestRedirect>, matches: &[PathMatch], at: &str) -> Result<Redirect, Refused> {
    let Some(RequestRedirect { scheme, hostname, path, port, status_code }) = given else {
        return refused(at, "is missing");
    };
    if let Some(scheme) = scheme
        && scheme != "http"
        && scheme != "https"
    {
        return refused(format!("{at}.scheme"), format!("{scheme:.40?} is neither http nor https"));
    }
    let status = status_code.unwrap_or(302);
    if !REDIRECTS.contains(&status) {
        return refused(format!("{at}.statusCode"), format!("{status} is not one of {REDIRECTS:?}"));
    }
    if *port == Some(0) {
        return refused(format!("{at}.port"), "0 is not a port");
    }
    Ok(Redirect {
        scheme: scheme.as_deref().map(Arc::from),
        hostname: host(hostname.as_deref(), at)?,
        path: path_edit(path.as_ref(), matches, at)?,
        port: *port,
        status,
    })
}

fn rewrite(given: Option<&UrlRewrite>, matches: &[PathMatch], at: &str) -> Result<Rewrite, Refused> {
    let Some(UrlRewrite { hostname, path }) = given else { return refused(at, "is missing") };
    Ok(Rewrite { hostname: host(hostname.as_deref(), at)?, path: path_edit(path.as_ref(), matches, at)? })
}

fn host(given: Option<&str>, at: &str) -> Result<Option<Arc<str>>, Refused> {
    match given {
        Some(host) if host.starts_with('*') || !is_hostname(host) => {
            refused(format!("{at}.hostname"), format!("{host:.80?} is not a host name"))
        }
        Some(host) => Ok(Some(host.into())),
        None => Ok(None),
    }
}

fn path_edit(
    given: Option<&PathModifier>,
    matches: &[PathMatch],
    at: &str,
) -> Result<Option<PathEdit>, Refused> {
    let Some(PathModifier { kind, replace_full_path, replace_prefix_match }) = given else { return Ok(None) };
    let (field, value, edit): (_, _, fn(Arc<str>) -> PathEdit) = match kind.as_str() {
        "ReplaceFullPath" => ("replaceFullPath", replace_full_path, PathEdit::Full),
        "ReplacePrefixMatch" => ("replacePrefixMatch", replace_prefix_match, PathEdit::Prefix),
        other => return refused(format!("{at}.path.type"), format!("{other:.60?} is not supported")),
    };
    let Some(value) = value else { return refused(format!("{at}.path.{field}"), "is missing") };
    // What a path may hold (RFC 3986); a query would be one more than the request's.
    let sound = |b: u8| b.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@%".contains(&b);
    if value.len() > MAX_VALUE_BYTES || !value.bytes().all(sound) {
        return refused(format!("{at}.path.{field}"), format!("{value:.80?} is not a path"));
    }
    if kind == "ReplacePrefixMatch" && !matches.iter().all(|path| matches!(path, PathMatch::Prefix(_))) {
        let reason = "ReplacePrefixMatch needs matches of type PathPrefix only";
        return refused(format!("{at}.path.type"), reason);
    }
    Ok(Some(edit(value.as_str().into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(yaml: &str) -> Result<Filters, Refused> {
        let given: Vec<RouteFilter> = serde_yaml_ng::from_str(yaml).unwrap();
        read(&given, &[PathMatch::Prefix("/a".into())], Offered::Http)
    }

    #[test]
    fn filters_are_read_in_full() {
        let got = of(
            "[{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-A, value: '1'}], add: [{name: x-b, value: '2'}], remove: [X-C]}}, {type: ResponseHeaderModifier, responseHeaderModifier: {remove: [server]}}, {type: URLRewrite, urlRewrite: {hostname: b.test, path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]",
        )
        .unwrap();
        assert_eq!(got.request.set, [("x-a".into(), "1".into())]);
        assert_eq!(got.request.remove, ["x-c".into()]);
        assert_eq!(got.response.remove, ["server".into()]);
        let rewrite = Rewrite { hostname: Some("b.test".into()), path: Some(PathEdit::Prefix("/b".into())) };
        assert_eq!(got.rewrite, Some(rewrite));
        let got = of("[{type: RequestRedirect, requestRedirect: {scheme: https, port: 8443, statusCode: 308, path: {type: ReplaceFullPath, replaceFullPath: /x}}}]").unwrap();
        let redirect = got.redirect.unwrap();
        assert_eq!(
            (redirect.status, redirect.port, redirect.scheme.as_deref()),
            (308, Some(8443), Some("https"))
        );
        assert_eq!(
            of("[{type: RequestRedirect, requestRedirect: {}}]").unwrap().redirect.unwrap().status,
            302
        );
    }

    #[test]
    fn what_cannot_be_applied_is_named() {
        for (yaml, field) in [
            ("[{type: RequestMirror, requestMirror: {}}]", "[0].type"),
            ("[{type: ExtensionRef, extensionRef: {name: x}}]", "[0].type"),
            ("[{type: RequestHeaderModifier}]", "[0].requestHeaderModifier"),
            (
                "[{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: Host, value: a}]}}]",
                "[0].requestHeaderModifier.set[0].name",
            ),
            (
                "[{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: \"x\\ny\"}]}}]",
                "[0].requestHeaderModifier.set[0].value",
            ),
            (
                "[{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: x}], remove: [A]}}]",
                "[0].requestHeaderModifier.remove[0]",
            ),
            (
                "[{type: RequestRedirect, requestRedirect: {statusCode: 200}}]",
                "[0].requestRedirect.statusCode",
            ),
            ("[{type: RequestRedirect, requestRedirect: {scheme: ftp}}]", "[0].requestRedirect.scheme"),
            ("[{type: RequestRedirect, requestRedirect: {hostname: '*.a'}}]", "[0].requestRedirect.hostname"),
            (
                "[{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath}}}]",
                "[0].urlRewrite.path.replaceFullPath",
            ),
            (
                "[{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: '/a?b'}}}]",
                "[0].urlRewrite.path.replaceFullPath",
            ),
            ("[{type: URLRewrite, urlRewrite: {path: {type: Like}}}]", "[0].urlRewrite.path.type"),
            ("[{type: URLRewrite, urlRewrite: {}}, {type: URLRewrite, urlRewrite: {}}]", "[1].type"),
            ("[{type: URLRewrite, urlRewrite: {}}, {type: RequestRedirect, requestRedirect: {}}]", ""),
        ] {
            assert_eq!(of(yaml).unwrap_err().field, field, "{yaml}");
        }
        let given: Vec<RouteFilter> = serde_yaml_ng::from_str(
            "[{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]",
        )
        .unwrap();
        assert!(read(&given, &[PathMatch::Exact("/a".into())], Offered::Http).is_err());
        assert!(read(&given, &[], Offered::Grpc).is_err());
    }
}
