//! `istio.security` (`wire-protocol.md` 5.7). A value that cannot be understood rejects the policy: dropping it would
//! make a match wider.
#![expect(missing_docs, reason = "fields are Istio's, described in wire-protocol.md 5.7")]

use std::sync::Arc;

use ipnet::IpNet;

use super::{Malformed, each, ip, ip_bytes, port};
use crate::{
    id::PolicyKey,
    model::{self, Action, Scope, StringMatch as Pattern},
};

#[derive(Clone, PartialEq, prost::Message)]
pub struct Authorization {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(int32, tag = "3")]
    pub scope: i32,
    #[prost(int32, tag = "4")]
    pub action: i32,
    #[prost(message, repeated, tag = "5")]
    pub rules: Vec<Rule>,
    #[prost(bool, tag = "6")]
    pub dry_run: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Rule {
    #[prost(message, repeated, tag = "1")]
    pub clauses: Vec<Clause>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Clause {
    #[prost(message, repeated, tag = "2")]
    pub matches: Vec<Match>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Match {
    #[prost(message, repeated, tag = "1")]
    pub namespaces: Vec<StringMatch>,
    #[prost(message, repeated, tag = "2")]
    pub not_namespaces: Vec<StringMatch>,
    #[prost(message, repeated, tag = "3")]
    pub principals: Vec<StringMatch>,
    #[prost(message, repeated, tag = "4")]
    pub not_principals: Vec<StringMatch>,
    #[prost(message, repeated, tag = "5")]
    pub source_ips: Vec<Address>,
    #[prost(message, repeated, tag = "6")]
    pub not_source_ips: Vec<Address>,
    #[prost(message, repeated, tag = "7")]
    pub destination_ips: Vec<Address>,
    #[prost(message, repeated, tag = "8")]
    pub not_destination_ips: Vec<Address>,
    #[prost(uint32, repeated, tag = "9")]
    pub destination_ports: Vec<u32>,
    #[prost(uint32, repeated, tag = "10")]
    pub not_destination_ports: Vec<u32>,
    #[prost(message, repeated, tag = "11")]
    pub service_accounts: Vec<ServiceAccountMatch>,
    #[prost(message, repeated, tag = "12")]
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// Ours, far outside the range that Istio uses: evaluated by our agents, unknown to others.
    #[prost(message, repeated, tag = "1001")]
    pub trust_domains: Vec<StringMatch>,
    #[prost(message, repeated, tag = "1002")]
    pub not_trust_domains: Vec<StringMatch>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Address {
    #[prost(bytes = "vec", tag = "1")]
    pub address: Vec<u8>,
    #[prost(uint32, tag = "2")]
    pub length: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ServiceAccountMatch {
    #[prost(string, tag = "1")]
    pub namespace: String,
    #[prost(string, tag = "2")]
    pub service_account: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct StringMatch {
    #[prost(oneof = "string_match::MatchType", tags = "1, 2, 3, 4")]
    pub match_type: Option<string_match::MatchType>,
}

pub mod string_match {
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum MatchType {
        #[prost(string, tag = "1")]
        Exact(String),
        #[prost(string, tag = "2")]
        Prefix(String),
        #[prost(string, tag = "3")]
        Suffix(String),
        /// `google.protobuf.Empty`.
        #[prost(message, tag = "4")]
        Presence(()),
    }
}

impl TryFrom<Authorization> for model::Policy {
    type Error = Malformed;

    fn try_from(message: Authorization) -> Result<Self, Malformed> {
        let Authorization { name, namespace, scope, action, rules, dry_run } = message;
        let unknown = |field: &str, value: i32| Malformed::new(field, format!("unknown value {value}"));
        if name.is_empty() || namespace.is_empty() {
            return Err(Malformed::new("name", "name and namespace must not be empty"));
        }
        Ok(Self {
            key: PolicyKey::new(&namespace, &name),
            scope: match scope {
                0 => Scope::Global,
                1 => Scope::Namespace,
                2 => Scope::WorkloadSelector,
                other => return Err(unknown("scope", other)),
            },
            action: match action {
                0 => Action::Allow,
                1 => Action::Deny,
                other => return Err(unknown("action", other)),
            },
            rules: each("rules", rules, |rule| {
                Ok(model::Rule {
                    clauses: each("clauses", rule.clauses, |clause| {
                        Ok(model::Clause {
                            matches: each("matches", clause.matches, model::Match::try_from)?,
                        })
                    })?,
                })
            })?,
            dry_run,
        })
    }
}

fn pattern(message: StringMatch) -> Result<Pattern, Malformed> {
    use string_match::MatchType;
    let (text, build): (String, fn(Arc<str>) -> Pattern) = match message.match_type {
        Some(MatchType::Exact(text)) => (text, Pattern::Exact),
        Some(MatchType::Prefix(text)) => (text, Pattern::Prefix),
        Some(MatchType::Suffix(text)) => (text, Pattern::Suffix),
        Some(MatchType::Presence(())) => return Ok(Pattern::Presence),
        None => return Err(Malformed::new("", "no kind of match that is known")),
    };
    if text.is_empty() {
        return Err(Malformed::new("", "an empty string matches nothing that was meant"));
    }
    Ok(build(text.into()))
}

fn range(message: Address) -> Result<IpNet, Malformed> {
    let Address { address, length } = message;
    // A v4-mapped range would change its meaning when folded.
    let ip = ip(&address)?;
    if address.len() == 16 && ip.is_ipv4() {
        return Err(Malformed::new("", "a v4-mapped address is no range"));
    }
    let length = u8::try_from(length).ok();
    let net = length.and_then(|length| IpNet::new(ip, length).ok());
    net.ok_or_else(|| Malformed::new("", "the prefix is longer than the address"))
}

fn account(message: ServiceAccountMatch) -> Result<(Arc<str>, Arc<str>), Malformed> {
    let ServiceAccountMatch { namespace, service_account } = message;
    if namespace.is_empty() || service_account.is_empty() {
        return Err(Malformed::new("", "namespace and service account must not be empty"));
    }
    Ok((namespace.into(), service_account.into()))
}

impl TryFrom<Match> for model::Match {
    type Error = Malformed;

    fn try_from(message: Match) -> Result<Self, Malformed> {
        let Match {
            namespaces,
            not_namespaces,
            principals,
            not_principals,
            source_ips,
            not_source_ips,
            destination_ips,
            not_destination_ips,
            destination_ports,
            not_destination_ports,
            service_accounts,
            not_service_accounts,
            trust_domains,
            not_trust_domains,
        } = message;
        Ok(Self {
            namespaces: each("namespaces", namespaces, pattern)?,
            not_namespaces: each("not_namespaces", not_namespaces, pattern)?,
            principals: each("principals", principals, pattern)?,
            not_principals: each("not_principals", not_principals, pattern)?,
            service_accounts: each("service_accounts", service_accounts, account)?,
            not_service_accounts: each("not_service_accounts", not_service_accounts, account)?,
            trust_domains: each("trust_domains", trust_domains, pattern)?,
            not_trust_domains: each("not_trust_domains", not_trust_domains, pattern)?,
            source_ips: each("source_ips", source_ips, range)?,
            not_source_ips: each("not_source_ips", not_source_ips, range)?,
            destination_ips: each("destination_ips", destination_ips, range)?,
            not_destination_ips: each("not_destination_ips", not_destination_ips, range)?,
            destination_ports: each("destination_ports", destination_ports, port)?,
            not_destination_ports: each("not_destination_ports", not_destination_ports, port)?,
        })
    }
}

impl From<&model::Policy> for Authorization {
    fn from(policy: &model::Policy) -> Self {
        let model::Policy { key, scope, action, rules, dry_run } = policy;
        let clause =
            |clause: &model::Clause| Clause { matches: clause.matches.iter().map(Match::from).collect() };
        Self {
            name: key.name.to_string(),
            namespace: key.namespace.to_string(),
            scope: match scope {
                Scope::Global => 0,
                Scope::Namespace => 1,
                Scope::WorkloadSelector => 2,
            },
            action: i32::from(*action == Action::Deny),
            rules: rules
                .iter()
                .map(|rule| Rule { clauses: rule.clauses.iter().map(clause).collect() })
                .collect(),
            dry_run: *dry_run,
        }
    }
}

impl From<&model::Match> for Match {
    fn from(item: &model::Match) -> Self {
        let model::Match {
            namespaces,
            not_namespaces,
            principals,
            not_principals,
            service_accounts,
            not_service_accounts,
            trust_domains,
            not_trust_domains,
            source_ips,
            not_source_ips,
            destination_ips,
            not_destination_ips,
            destination_ports,
            not_destination_ports,
        } = item;
        Self {
            namespaces: patterns(namespaces),
            not_namespaces: patterns(not_namespaces),
            principals: patterns(principals),
            not_principals: patterns(not_principals),
            source_ips: ranges(source_ips),
            not_source_ips: ranges(not_source_ips),
            destination_ips: ranges(destination_ips),
            not_destination_ips: ranges(not_destination_ips),
            destination_ports: destination_ports.iter().copied().map(u32::from).collect(),
            not_destination_ports: not_destination_ports.iter().copied().map(u32::from).collect(),
            service_accounts: accounts(service_accounts),
            not_service_accounts: accounts(not_service_accounts),
            trust_domains: patterns(trust_domains),
            not_trust_domains: patterns(not_trust_domains),
        }
    }
}

fn patterns(items: &[Pattern]) -> Vec<StringMatch> {
    use string_match::MatchType;
    let message = |item: &Pattern| match item {
        Pattern::Exact(text) => MatchType::Exact(text.to_string()),
        Pattern::Prefix(text) => MatchType::Prefix(text.to_string()),
        Pattern::Suffix(text) => MatchType::Suffix(text.to_string()),
        Pattern::Presence => MatchType::Presence(()),
    };
    items.iter().map(|item| StringMatch { match_type: Some(message(item)) }).collect()
}

fn ranges(items: &[IpNet]) -> Vec<Address> {
    items
        .iter()
        .map(|net| Address { address: ip_bytes(net.addr()), length: net.prefix_len().into() })
        .collect()
}

fn accounts(items: &[(Arc<str>, Arc<str>)]) -> Vec<ServiceAccountMatch> {
    items
        .iter()
        .map(|(namespace, account)| ServiceAccountMatch {
            namespace: namespace.to_string(),
            service_account: account.to_string(),
        })
        .collect()
}
