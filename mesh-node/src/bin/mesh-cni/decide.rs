//! Whether a sandbox starts, from what the agent said or did not say. Pure, but for reading the namespaces that were
//! in the mesh.

use std::{collections::BTreeSet, fs};

use mesh_core::flag::Flag;
use mesh_node::cni::wire::Refused;

use crate::{
    ask::Asked,
    coded,
    spec::{Code, NetConf, WhenAgentIsDown},
};

/// Whether a sandbox starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It does.
    Start,
    /// It does not, and why.
    Refuse(Code, String),
}

/// Decides about a sandbox of `namespace`.
pub fn decide(asked: &Asked, conf: &NetConf, namespace: &str) -> Verdict {
    let why = match asked {
        Asked::Answer { status: 200, .. } => return Verdict::Start,
        Asked::Answer { status, body } => return refused(*status, body),
        Asked::Silence(why) => why,
    };
    let start = conf.exempt.iter().any(|exempt| exempt == namespace)
        || (conf.when_down == WhenAgentIsDown::RefuseKnown
            && known(conf).is_some_and(|known| !known.contains(namespace)));
    if start {
        return Verdict::Start;
    }
    let text = format!(
        "the mesh's agent of this node does not answer on {}: {why}; without it the pod's traffic would be \
         unprotected",
        conf.agent_socket.display()
    );
    Verdict::Refuse(Code::TryAgain, coded(&text, Flag::AgentUnavailable))
}

fn refused(status: u16, body: &[u8]) -> Verdict {
    match serde_json::from_slice::<Refused>(body) {
        Ok(refused) => {
            let code = if status == 503 { Code::TryAgain } else { Code::Refused };
            Verdict::Refuse(code, format!("the mesh's agent: {} [{}]", refused.error, refused.reason))
        }
        Err(_) => {
            let text = format!("the mesh's agent answered with status {status}");
            Verdict::Refuse(Code::Refused, coded(&text, Flag::Internal))
        }
    }
}

/// The namespaces that had pods in the mesh; none when that cannot be told, and then all count.
fn known(conf: &NetConf) -> Option<BTreeSet<String>> {
    serde_json::from_slice(&fs::read(conf.known.as_ref()?).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(more: &str) -> NetConf {
        let text = format!(r#"{{"agentSocket":"/run/s","exemptNamespaces":["kube-system"]{more}}}"#);
        NetConf::read(text.as_bytes()).unwrap()
    }

    fn said(asked: &Asked, conf: &NetConf, namespace: &str) -> String {
        match decide(asked, conf, namespace) {
            Verdict::Start => "start".to_owned(),
            Verdict::Refuse(code, why) => format!("{}: {why}", code as u32),
        }
    }

    #[test]
    fn without_the_agent_only_exempt_namespaces_start() {
        let silence = Asked::Silence("connection refused".to_owned());
        assert_eq!(said(&silence, &conf(""), "kube-system"), "start");
        let refused = said(&silence, &conf(""), "shop");
        assert!(
            refused.starts_with(
                "11: the mesh's agent of this node does not answer on /run/s: connection refused"
            )
        );
        assert!(refused.ends_with("[AGENT_UNAVAILABLE]"), "{refused}");
    }

    #[test]
    fn the_setting_that_narrows_believes_only_what_it_can_read() {
        let silence = Asked::Silence(String::new());
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("namespaces.json");
        let conf = conf(&format!(
            r#","whenAgentIsDown":"refuse-known","knownNamespaces":{:?}"#,
            file.display().to_string()
        ));
        assert!(said(&silence, &conf, "plain").starts_with("11: "), "no file");
        fs::write(&file, "[").unwrap();
        assert!(said(&silence, &conf, "plain").starts_with("11: "), "a damaged file");
        fs::write(&file, r#"["shop"]"#).unwrap();
        assert_eq!(said(&silence, &conf, "plain"), "start");
        assert!(said(&silence, &conf, "shop").starts_with("11: "));
    }

    #[test]
    fn what_the_agent_says_is_passed_on() {
        let answer = |status, body: &str| Asked::Answer { status, body: body.as_bytes().to_vec() };
        let conf = conf("");
        assert_eq!(said(&answer(200, "{}"), &conf, "shop"), "start");
        let refused = r#"{"error":"no room","reason":"MAP_FULL"}"#;
        assert_eq!(said(&answer(500, refused), &conf, "shop"), "100: the mesh's agent: no room [MAP_FULL]");
        assert_eq!(said(&answer(503, refused), &conf, "shop"), "11: the mesh's agent: no room [MAP_FULL]");
        // Also in a namespace that starts without an agent: this one is there, and means it.
        assert!(said(&answer(500, refused), &conf, "kube-system").starts_with("100: "));
        let odd = said(&answer(404, "not found"), &conf, "shop");
        assert_eq!(odd, "100: the mesh's agent answered with status 404 [INTERNAL]");
    }
}
