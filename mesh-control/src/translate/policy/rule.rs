//! Rules of an AuthorizationPolicy → rules that L4 evaluates.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use mesh_core::model::policy::{Clause, Match, Rule, StringMatch};

use super::{Report, UNSUPPORTED};
use crate::source::{
    Object, Severity,
    kinds::{PolicyCondition, PolicyFrom, PolicyOperation, PolicyRule, PolicySource, PolicyTo},
};

/// Most entries of one list.
const MAX_ENTRIES: usize = 512;

/// Rules of an ALLOW policy: one with a part that cannot be evaluated grants nothing.
pub fn allow(object: &Object, rules: &[PolicyRule], report: &mut Report<'_>) -> Vec<Rule> {
    let mut kept = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let mut cx = Reader { object, unsupported: Vec::new() };
        let rule = cx.rule(rule, &format!("spec.rules[{index}]"));
        if cx.unsupported.is_empty() {
            kept.push(rule);
        }
        cx.tell("the rule grants nothing", report);
    }
    kept
}

/// Rules of a DENY policy: a part that cannot be evaluated is taken as matched.
pub fn deny(object: &Object, rules: &[PolicyRule], report: &mut Report<'_>) -> Vec<Rule> {
    let mut kept = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let mut cx = Reader { object, unsupported: Vec::new() };
        let mut rule = cx.rule(rule, &format!("spec.rules[{index}]"));
        // A clause one of whose alternatives is always true is always true. An empty match would never hold.
        rule.clauses
            .retain(|clause| clause.matches.iter().all(|alternative| *alternative != Match::default()));
        let rest = if rule.clauses.is_empty() {
            "the rule denies everything in the policy's scope"
        } else {
            "the rule denies by what is left of it"
        };
        cx.tell(rest, report);
        kept.push(rule);
    }
    kept
}

/// Reads one rule and remembers what cannot be evaluated: field and reason.
struct Reader<'a> {
    object: &'a Object,
    unsupported: Vec<(String, String)>,
}

impl Reader<'_> {
    fn tell(self, consequence: &str, report: &mut Report<'_>) {
        for (field, reason) in self.unsupported {
            debug_assert_eq!(UNSUPPORTED, Severity::Error);
            report.error(field, format!("{reason}; {consequence}"));
        }
    }

    fn refuse(&mut self, field: String, reason: impl Into<String>) {
        self.unsupported.push((field, reason.into()));
    }

    fn rule(&mut self, rule: &PolicyRule, at: &str) -> Rule {
        let PolicyRule { from, to, when } = rule;
        let mut clauses = Vec::new();
        let mut entries = |reader: &mut Self, field: &str, matches: Vec<Match>| {
            if matches.len() > MAX_ENTRIES {
                reader.refuse(format!("{at}.{field}"), format!("more than {MAX_ENTRIES} entries"));
                clauses.push(Clause { matches: vec![Match::default()] });
            } else if !matches.is_empty() {
                clauses.push(Clause { matches });
            }
        };
        let from = from.iter().flatten().enumerate();
        let from = from
            .map(|(i, PolicyFrom { source })| self.source(source, &format!("{at}.from[{i}].source")))
            .collect();
        entries(self, "from", from);
        let to = to.iter().flatten().enumerate();
        let to = to
            .map(|(i, PolicyTo { operation })| self.operation(operation, &format!("{at}.to[{i}].operation")))
            .collect();
        entries(self, "to", to);
        for (i, condition) in when.iter().flatten().enumerate() {
            let condition = self.condition(condition, &format!("{at}.when[{i}]"));
            entries(self, "when", vec![condition]);
        }
        Rule { clauses }
    }

    fn source(&mut self, source: &PolicySource, at: &str) -> Match {
        let PolicySource {
            principals,
            not_principals,
            request_principals,
            not_request_principals,
            namespaces,
            not_namespaces,
            service_accounts,
            not_service_accounts,
            trust_domains,
            not_trust_domains,
            ip_blocks,
            not_ip_blocks,
            remote_ip_blocks,
            not_remote_ip_blocks,
        } = source;
        if source == &PolicySource::default() {
            self.refuse(at.to_owned(), "an empty source");
        }
        self.only_l7(
            at,
            &[
                ("requestPrincipals", request_principals),
                ("notRequestPrincipals", not_request_principals),
                ("remoteIpBlocks", remote_ip_blocks),
                ("notRemoteIpBlocks", not_remote_ip_blocks),
            ],
        );
        let accounts = !service_accounts.is_empty() || !not_service_accounts.is_empty();
        if accounts
            && [principals, not_principals, namespaces, not_namespaces].iter().any(|list| !list.is_empty())
        {
            self.refuse(format!("{at}.serviceAccounts"), "cannot stand beside principals or namespaces");
        }
        Match {
            principals: self.strings(&format!("{at}.principals"), principals),
            not_principals: self.strings(&format!("{at}.notPrincipals"), not_principals),
            namespaces: self.strings(&format!("{at}.namespaces"), namespaces),
            not_namespaces: self.strings(&format!("{at}.notNamespaces"), not_namespaces),
            service_accounts: self.accounts(&format!("{at}.serviceAccounts"), service_accounts),
            not_service_accounts: self.accounts(&format!("{at}.notServiceAccounts"), not_service_accounts),
            trust_domains: self.strings(&format!("{at}.trustDomains"), trust_domains),
            not_trust_domains: self.strings(&format!("{at}.notTrustDomains"), not_trust_domains),
            source_ips: self.blocks(&format!("{at}.ipBlocks"), ip_blocks),
            not_source_ips: self.blocks(&format!("{at}.notIpBlocks"), not_ip_blocks),
            ..Match::default()
        }
    }

    fn operation(&mut self, operation: &PolicyOperation, at: &str) -> Match {
        let PolicyOperation { hosts, not_hosts, ports, not_ports, methods, not_methods, paths, not_paths } =
            operation;
        if operation == &PolicyOperation::default() {
            self.refuse(at.to_owned(), "an empty operation");
        }
        self.only_l7(
            at,
            &[
                ("hosts", hosts),
                ("notHosts", not_hosts),
                ("methods", methods),
                ("notMethods", not_methods),
                ("paths", paths),
                ("notPaths", not_paths),
            ],
        );
        Match {
            destination_ports: self.ports(&format!("{at}.ports"), ports),
            not_destination_ports: self.ports(&format!("{at}.notPorts"), not_ports),
            ..Match::default()
        }
    }

    fn condition(&mut self, condition: &PolicyCondition, at: &str) -> Match {
        let PolicyCondition { key, values, not_values } = condition;
        if values.is_empty() && not_values.is_empty() {
            self.refuse(at.to_owned(), "a condition without values");
            return Match::default();
        }
        let (is, is_not) = (format!("{at}.values"), format!("{at}.notValues"));
        let mut found = Match::default();
        match key.as_str() {
            "source.ip" => {
                found.source_ips = self.blocks(&is, values);
                found.not_source_ips = self.blocks(&is_not, not_values);
            }
            "source.namespace" => {
                found.namespaces = self.strings(&is, values);
                found.not_namespaces = self.strings(&is_not, not_values);
            }
            "source.principal" => {
                found.principals = self.strings(&is, values);
                found.not_principals = self.strings(&is_not, not_values);
            }
            "source.serviceAccount" => {
                found.service_accounts = self.accounts(&is, values);
                found.not_service_accounts = self.accounts(&is_not, not_values);
            }
            "source.trustDomain" => {
                found.trust_domains = self.strings(&is, values);
                found.not_trust_domains = self.strings(&is_not, not_values);
            }
            "destination.ip" => {
                found.destination_ips = self.blocks(&is, values);
                found.not_destination_ips = self.blocks(&is_not, not_values);
            }
            "destination.port" => {
                found.destination_ports = self.ports(&is, values);
                found.not_destination_ports = self.ports(&is_not, not_values);
            }
            other => {
                self.refuse(format!("{at}.key"), format!("UnsupportedValue: {other:.80?} needs a waypoint"))
            }
        }
        found
    }

    fn only_l7(&mut self, at: &str, lists: &[(&str, &[String])]) {
        for (field, _) in lists.iter().filter(|(_, list)| !list.is_empty()) {
            self.refuse(format!("{at}.{field}"), "UnsupportedValue: only a waypoint can evaluate this");
        }
    }

    /// Reads a list; with one bad value the whole list is unknown, because dropping one could widen or narrow.
    fn list<T>(&mut self, at: &str, values: &[String], read: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        if values.len() > MAX_ENTRIES {
            self.refuse(at.to_owned(), format!("more than {MAX_ENTRIES} values"));
            return Vec::new();
        }
        let read = values.iter().enumerate().map(|(i, value)| read(value).map_err(|reason| (i, reason)));
        match read.collect() {
            Ok(list) => list,
            Err((i, reason)) => {
                self.refuse(format!("{at}[{i}]"), reason);
                Vec::new()
            }
        }
    }

    fn strings(&mut self, at: &str, values: &[String]) -> Vec<StringMatch> {
        self.list(at, values, |text| match text {
            "" => Err("an empty value".to_owned()),
            _ if text.len() > mesh_core::id::MAX_IDENTITY_BYTES => Err("the value is too long".to_owned()),
            _ if text.starts_with("spiffe://") => Err("written without spiffe://".to_owned()),
            "*" => Ok(StringMatch::Presence),
            _ => Ok(match (text.strip_prefix('*'), text.strip_suffix('*')) {
                (Some(suffix), _) => StringMatch::Suffix(suffix.into()),
                (None, Some(prefix)) => StringMatch::Prefix(prefix.into()),
                (None, None) => StringMatch::Exact(text.into()),
            }),
        })
    }

    fn accounts(&mut self, at: &str, values: &[String]) -> Vec<(Arc<str>, Arc<str>)> {
        let own = self.object.key.namespace.clone();
        self.list(at, values, |text| {
            let (namespace, account) = text.split_once('/').map_or((&*own, text), |(ns, sa)| (ns, sa));
            if namespace.is_empty() || account.is_empty() || account.contains('/') || text.contains('*') {
                return Err("not of the form namespace/account or account".to_owned());
            }
            Ok((namespace.into(), account.into()))
        })
    }

    fn blocks(&mut self, at: &str, values: &[String]) -> Vec<IpNet> {
        self.list(at, values, |text| {
            let parsed = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            parsed.map_err(|_| format!("{text:.64?} is neither an address nor a CIDR"))
        })
    }

    fn ports(&mut self, at: &str, values: &[String]) -> Vec<u16> {
        self.list(at, values, |text| {
            text.parse::<u16>()
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| format!("{text:.20?} is not a port"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::{Fragment, tests::translated};
    use super::*;

    /// Rules of a policy and the fields that are complained about.
    fn rules(action: &str, rule: &str) -> (Vec<Rule>, Vec<String>) {
        let yaml = format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec: {{action: {action}, rules: [{rule}]}}\n"
        );
        let got = translated(&yaml);
        let fields = got.problems.iter().map(|problem| problem.field.clone()).collect();
        let Fragment::Authorization(facts) = got.fragment else { panic!() };
        (facts.policy.unwrap().rules, fields)
    }

    fn one(rule: &str) -> Match {
        let (rules, fields) = rules("ALLOW", rule);
        assert_eq!(fields, Vec::<String>::new(), "{rule}");
        assert_eq!(
            (rules.len(), rules[0].clauses.len(), rules[0].clauses[0].matches.len()),
            (1, 1, 1),
            "{rule}"
        );
        rules[0].clauses[0].matches[0].clone()
    }

    #[test]
    fn every_criterion_of_l4_is_read() {
        let exact = |text: &str| vec![StringMatch::Exact(text.into())];
        for (rule, want) in [
            (
                "{from: [{source: {principals: [td/ns/a/sa/b]}}]}",
                Match { principals: exact("td/ns/a/sa/b"), ..Match::default() },
            ),
            (
                "{from: [{source: {notPrincipals: ['*']}}]}",
                Match { not_principals: vec![StringMatch::Presence], ..Match::default() },
            ),
            (
                "{from: [{source: {namespaces: ['a*'], notNamespaces: ['*b']}}]}",
                Match {
                    namespaces: vec![StringMatch::Prefix("a".into())],
                    not_namespaces: vec![StringMatch::Suffix("b".into())],
                    ..Match::default()
                },
            ),
            (
                "{from: [{source: {serviceAccounts: [b, x/y]}}]}",
                Match {
                    service_accounts: vec![("shop".into(), "b".into()), ("x".into(), "y".into())],
                    ..Match::default()
                },
            ),
            (
                "{from: [{source: {trustDomains: [td]}}]}",
                Match { trust_domains: exact("td"), ..Match::default() },
            ),
            (
                "{from: [{source: {ipBlocks: [10.0.0.0/8], notIpBlocks: ['fd00::1']}}]}",
                Match {
                    source_ips: vec!["10.0.0.0/8".parse().unwrap()],
                    not_source_ips: vec!["fd00::1/128".parse().unwrap()],
                    ..Match::default()
                },
            ),
            (
                "{to: [{operation: {ports: ['80', '443']}}]}",
                Match { destination_ports: vec![80, 443], ..Match::default() },
            ),
            (
                "{when: [{key: destination.port, notValues: ['80']}]}",
                Match { not_destination_ports: vec![80], ..Match::default() },
            ),
            (
                "{when: [{key: source.namespace, values: [a]}]}",
                Match { namespaces: exact("a"), ..Match::default() },
            ),
            (
                "{when: [{key: destination.ip, values: [10.0.0.1]}]}",
                Match { destination_ips: vec!["10.0.0.1/32".parse().unwrap()], ..Match::default() },
            ),
        ] {
            assert_eq!(one(rule), want, "{rule}");
        }
    }

    #[test]
    fn from_to_and_when_are_anded_and_their_entries_are_not() {
        let (rules, _) = rules(
            "ALLOW",
            "{from: [{source: {namespaces: [a]}}, {source: {namespaces: [b]}}], to: [{operation: {ports: ['80']}}], when: [{key: source.ip, values: [10.0.0.1]}, {key: destination.port, values: ['1']}]}",
        );
        let shape: Vec<usize> = rules[0].clauses.iter().map(|clause| clause.matches.len()).collect();
        assert_eq!(shape, [2, 1, 1, 1]);
    }

    #[test]
    fn a_rule_that_l4_cannot_evaluate_grants_nothing_and_denies_more() {
        // (rule, field that is named, clauses that a DENY keeps)
        for (rule, field, kept) in [
            ("{to: [{operation: {methods: [GET]}}]}", "spec.rules[0].to[0].operation.methods", 0),
            (
                "{to: [{operation: {methods: [GET], ports: ['80']}}]}",
                "spec.rules[0].to[0].operation.methods",
                1,
            ),
            (
                "{to: [{operation: {paths: [/a]}}], from: [{source: {namespaces: [a]}}]}",
                "spec.rules[0].to[0].operation.paths",
                1,
            ),
            (
                "{to: [{operation: {ports: ['80']}}, {operation: {hosts: [a]}}]}",
                "spec.rules[0].to[1].operation.hosts",
                0,
            ),
            (
                "{from: [{source: {requestPrincipals: ['*']}}]}",
                "spec.rules[0].from[0].source.requestPrincipals",
                0,
            ),
            (
                "{from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}]}",
                "spec.rules[0].from[0].source.remoteIpBlocks",
                0,
            ),
            ("{when: [{key: 'request.headers[x]', values: [a]}]}", "spec.rules[0].when[0].key", 0),
            ("{when: [{key: source.ip}]}", "spec.rules[0].when[0]", 0),
            ("{from: [{source: {}}]}", "spec.rules[0].from[0].source", 0),
            (
                "{from: [{source: {ipBlocks: [10.0.0.0/8, x]}}]}",
                "spec.rules[0].from[0].source.ipBlocks[1]",
                0,
            ),
            ("{to: [{operation: {ports: ['0']}}]}", "spec.rules[0].to[0].operation.ports[0]", 0),
            ("{from: [{source: {namespaces: ['']}}]}", "spec.rules[0].from[0].source.namespaces[0]", 0),
            (
                "{from: [{source: {principals: ['spiffe://a/ns/b/sa/c']}}]}",
                "spec.rules[0].from[0].source.principals[0]",
                0,
            ),
            (
                "{from: [{source: {serviceAccounts: ['a/*']}}]}",
                "spec.rules[0].from[0].source.serviceAccounts[0]",
                0,
            ),
            (
                "{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}",
                "spec.rules[0].from[0].source.serviceAccounts",
                1,
            ),
        ] {
            let (allowed, fields) = rules("ALLOW", rule);
            assert_eq!((allowed, fields), (vec![], vec![field.to_owned()]), "{rule}");
            let (denied, fields) = rules("DENY", rule);
            assert_eq!((denied.len(), denied[0].clauses.len(), fields.len()), (1, kept, 1), "{rule}");
        }
    }
}
