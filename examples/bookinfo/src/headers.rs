//! Headers that the application hands on, so that tracing and routing by user work at the second and third hop.

use http::{HeaderMap, HeaderName};

/// Handed on by every service.
const FORWARDED: &[&str] = &[
    "x-request-id",
    "b3",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
    "x-ot-span-context",
    "x-datadog-trace-id",
    "x-datadog-parent-id",
    "x-datadog-sampling-priority",
    "traceparent",
    "tracestate",
    "x-cloud-trace-context",
    "grpc-trace-bin",
    "sw8",
    "user-agent",
    "cookie",
    "authorization",
    "jwt",
];

/// Who is signed in; productpage derives it from the session and never takes it from its own caller.
pub const END_USER: HeaderName = HeaderName::from_static("end-user");

/// What productpage hands on.
pub fn forwarded(incoming: &HeaderMap) -> HeaderMap {
    let mut outgoing = HeaderMap::new();
    for name in FORWARDED {
        for value in incoming.get_all(*name) {
            outgoing.append(HeaderName::from_static(name), value.clone());
        }
    }
    outgoing
}

/// What the services behind productpage hand on: the same, and the user.
pub fn forwarded_with_user(incoming: &HeaderMap) -> HeaderMap {
    let mut outgoing = forwarded(incoming);
    if let Some(user) = incoming.get(&END_USER) {
        outgoing.insert(END_USER, user.clone());
    }
    outgoing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_family_is_handed_on() {
        let mut incoming = HeaderMap::new();
        for (name, value) in [
            ("x-request-id", "1"),
            ("traceparent", "00-a-b-01"),
            ("cookie", "session=6a"),
            ("end-user", "mallory"),
            ("host", "productpage"),
            ("x-secret", "no"),
        ] {
            incoming.insert(HeaderName::from_static(name), value.parse().expect("a header value"));
        }
        let mut names: Vec<_> = forwarded(&incoming).keys().map(ToString::to_string).collect();
        names.sort();
        assert_eq!(names, ["cookie", "traceparent", "x-request-id"]);
        assert_eq!(forwarded_with_user(&incoming).get("end-user").expect("handed on"), "mallory");
    }
}
