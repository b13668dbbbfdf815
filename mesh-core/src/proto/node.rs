//! A pod of one node, for the agent of that node (ours).
#![expect(missing_docs, reason = "fields are those of model::LocalPod")]

use super::{Malformed, each, ip, ip_bytes, port};
use crate::model::{self, Enrolment};

/// `undermesh.node.v1.LocalPod`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LocalPod {
    #[prost(string, tag = "1")]
    pub uid: String,
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(string, tag = "3")]
    pub name: String,
    #[prost(string, tag = "4")]
    pub service_account: String,
    #[prost(bytes = "vec", repeated, tag = "5")]
    pub ips: Vec<Vec<u8>>,
    #[prost(bool, tag = "6")]
    pub enrol: bool,
    /// Why not; set exactly when `enrol` is not.
    #[prost(message, optional, tag = "7")]
    pub reason: Option<Reason>,
    #[prost(uint32, repeated, tag = "8")]
    pub probe_ports: Vec<u32>,
    #[prost(bool, tag = "9")]
    pub terminating: bool,
    /// Empty: the same as `uid`.
    #[prost(string, tag = "10")]
    pub kubelet_uid: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Reason {
    #[prost(string, tag = "1")]
    pub word: String,
    #[prost(string, tag = "2")]
    pub text: String,
}

impl From<&model::LocalPod> for LocalPod {
    fn from(pod: &model::LocalPod) -> Self {
        let model::LocalPod {
            uid,
            namespace,
            name,
            service_account,
            ips,
            enrolment,
            probe_ports,
            terminating,
            kubelet_uid,
        } = pod;
        Self {
            uid: uid.to_string(),
            namespace: namespace.to_string(),
            name: name.to_string(),
            service_account: service_account.to_string(),
            ips: ips.iter().map(|ip| ip_bytes(*ip)).collect(),
            enrol: *enrolment == Enrolment::Wanted,
            reason: match enrolment {
                Enrolment::Wanted => None,
                Enrolment::Not { reason, text } => {
                    Some(Reason { word: reason.to_string(), text: text.to_string() })
                }
            },
            probe_ports: probe_ports.iter().map(|port| u32::from(*port)).collect(),
            terminating: *terminating,
            kubelet_uid: kubelet_uid.as_deref().unwrap_or_default().to_owned(),
        }
    }
}

impl TryFrom<LocalPod> for model::LocalPod {
    type Error = Malformed;

    fn try_from(message: LocalPod) -> Result<Self, Malformed> {
        let LocalPod {
            uid,
            namespace,
            name,
            service_account,
            ips,
            enrol,
            reason,
            probe_ports,
            terminating,
            kubelet_uid,
        } = message;
        for (field, value) in
            [("uid", &uid), ("namespace", &namespace), ("name", &name), ("service_account", &service_account)]
        {
            if value.is_empty() {
                return Err(Malformed::new(field, "missing"));
            }
        }
        let enrolment = match (enrol, reason) {
            (true, None) => Enrolment::Wanted,
            (false, Some(Reason { word, text })) if !word.is_empty() => {
                Enrolment::Not { reason: word.into(), text: text.into() }
            }
            _ => return Err(Malformed::new("reason", "must be given exactly when the pod is left alone")),
        };
        Ok(Self {
            uid: uid.into(),
            namespace: namespace.into(),
            name: name.into(),
            service_account: service_account.into(),
            ips: each("ips", ips, |bytes| ip(&bytes))?,
            enrolment,
            probe_ports: each("probe_ports", probe_ports, port)?.into_iter().collect(),
            terminating,
            kubelet_uid: Some(kubelet_uid).filter(|uid| !uid.is_empty()).map(Into::into),
        })
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::{delta::Change, proto};

    fn message() -> LocalPod {
        LocalPod {
            uid: "u".into(),
            namespace: "shop".into(),
            name: "web".into(),
            service_account: "web".into(),
            ips: vec![vec![10, 0, 0, 1], vec![0xfd; 16]],
            enrol: false,
            reason: Some(Reason { word: "HostNetwork".into(), text: "it shares the node's".into() }),
            probe_ports: vec![8080, 9090],
            terminating: true,
            kubelet_uid: "digest".into(),
        }
    }

    #[test]
    fn what_is_said_is_what_is_understood() {
        let wanted = LocalPod {
            enrol: true,
            reason: None,
            terminating: false,
            kubelet_uid: String::new(),
            ..message()
        };
        for message in [message(), wanted] {
            let decoded = proto::decode(proto::TYPE_LOCAL_POD, &message.encode_to_vec());
            let Ok(Change::LocalPod(pod)) = decoded else { panic!("{decoded:?}") };
            assert_eq!(LocalPod::from(&*pod), message);
        }
    }

    #[test]
    fn what_is_incomplete_or_contradicts_itself_is_refused_with_its_field() {
        let reason = || Some(Reason { word: "X".into(), text: String::new() });
        for (path, bad) in [
            ("uid", LocalPod { uid: String::new(), ..message() }),
            ("namespace", LocalPod { namespace: String::new(), ..message() }),
            ("name", LocalPod { name: String::new(), ..message() }),
            ("service_account", LocalPod { service_account: String::new(), ..message() }),
            ("ips[1]", LocalPod { ips: vec![vec![10, 0, 0, 1], vec![1]], ..message() }),
            ("reason", LocalPod { reason: None, ..message() }),
            ("reason", LocalPod { enrol: true, reason: reason(), ..message() }),
            ("reason", LocalPod { reason: Some(Reason::default()), ..message() }),
            ("probe_ports[0]", LocalPod { probe_ports: vec![0], ..message() }),
            ("probe_ports[1]", LocalPod { probe_ports: vec![1, 65536], ..message() }),
        ] {
            let error = model::LocalPod::try_from(bad).unwrap_err();
            assert_eq!(error.path, path);
        }
    }
}
