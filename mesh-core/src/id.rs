//! Names of things: identities, keys, generations. Strings only at the edges.

use std::{fmt, sync::Arc};

use serde::{Serialize, Serializer};

/// A SPIFFE identity `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>` (`wire-protocol.md` H8).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// The trust domain, never empty.
    pub trust_domain: Arc<str>,
    /// The Kubernetes namespace.
    pub namespace: Arc<str>,
    /// The Kubernetes service account.
    pub service_account: Arc<str>,
}

/// Why a string is no SPIFFE identity of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a SPIFFE workload identity of the form spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>"
)]
pub struct MalformedIdentity;

/// The longest SPIFFE ID that is accepted, in bytes (SPIFFE-ID specification, section 2.3).
pub const MAX_IDENTITY_BYTES: usize = 2048;

impl Identity {
    /// Builds an identity from parts that are already known to be well formed.
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Self {
        Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        }
    }

    /// Parses a SPIFFE URI strictly: exactly the four segments of H8, ASCII, no percent escapes, no empty or dot
    /// segment, at most [`MAX_IDENTITY_BYTES`].
    ///
    /// # Errors
    /// [`MalformedIdentity`] for anything else.
    pub fn parse(uri: &str) -> Result<Self, MalformedIdentity> {
        if uri.len() > MAX_IDENTITY_BYTES {
            return Err(MalformedIdentity);
        }
        let rest = uri.strip_prefix("spiffe://").ok_or(MalformedIdentity)?;
        let mut parts = rest.split('/');
        let (Some(td), Some("ns"), Some(ns), Some("sa"), Some(sa), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(MalformedIdentity);
        };
        let lower = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        let mixed = |b: &u8| lower(b) || b.is_ascii_uppercase();
        let segment = |s: &str| !s.is_empty() && s != "." && s != ".." && s.as_bytes().iter().all(mixed);
        if td.is_empty() || !td.as_bytes().iter().all(lower) || !segment(ns) || !segment(sa) {
            return Err(MalformedIdentity);
        }
        Ok(Self::new(td, ns, sa))
    }

    /// The form used in policies: the URI without its scheme.
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl Serialize for Identity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Unique key of a workload: its xDS `uid`, for a pod `<cluster>//Pod/<namespace>/<name>` (`wire-protocol.md` X21).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct WorkloadKey(pub Arc<str>);

impl fmt::Display for WorkloadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A namespaced name as a key, written `namespace/name`.
macro_rules! namespaced {
    ($(#[$doc:meta])* $name:ident, $field:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name {
            /// The Kubernetes namespace.
            pub namespace: Arc<str>,
            /// The name inside the namespace.
            pub $field: Arc<str>,
        }

        impl $name {
            /// Builds a key from its two parts.
            pub fn new(namespace: &str, $field: &str) -> Self {
                Self { namespace: namespace.into(), $field: $field.into() }
            }

            /// Reads `namespace/name`; `None` when there is no slash, a part is empty, or the name has a slash.
            pub fn parse(text: &str) -> Option<Self> {
                let (namespace, name) = text.split_once('/')?;
                (!namespace.is_empty() && !name.is_empty() && !name.contains('/')).then(|| Self::new(namespace, name))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}/{}", self.namespace, self.$field)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    };
}

namespaced!(
    /// Key of a service: `namespace/hostname`.
    ServiceKey,
    hostname
);
namespaced!(
    /// Key of an authorization policy: `namespace/name`.
    PolicyKey,
    name
);

/// Counts changes of what is allowed; kernel records of an older generation are not honoured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Generation(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_round_trip() {
        let id = Identity::parse("spiffe://cluster.local/ns/shop/sa/cart").unwrap();
        assert_eq!(id, Identity::new("cluster.local", "shop", "cart"));
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/shop/sa/cart");
        assert_eq!(id.principal(), "cluster.local/ns/shop/sa/cart");
    }

    #[test]
    fn anything_but_the_exact_grammar_is_refused() {
        for bad in [
            "",
            "spiffe://",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa/b/../c",
            "spiffe://td/ns/a/sa/b%2f",
            "spiffe://td/ns//sa/b",
            "spiffe://TD/ns/a/sa/b",
            "SPIFFE://td/ns/a/sa/b",
            "spiffe://td/ns/a/sa/..",
            "spiffe://td/ns/a/sa/b\0",
            "spiffe://td/sa/a/ns/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://td:80/ns/a/sa/b",
            "spiffe://u@td/ns/a/sa/b",
        ] {
            assert_eq!(Identity::parse(bad), Err(MalformedIdentity), "{bad}");
        }
        assert!(Identity::parse(&format!("spiffe://td/ns/a/sa/{}", "b".repeat(2048))).is_err());
    }
}
