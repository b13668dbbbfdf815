//! (pure) The status that an object has and the one that it should have → the one to write, if any.
//!
//! What others wrote stays: conditions of other types, parents of other controllers. What only we write and do not want
//! any more goes. A condition keeps the time of its last transition while its status is the same.

use serde_json::{Map, Value as Json, json};

use crate::status::{
    object::{CONTROLLER, ObjectStatus},
    objects::OURS_ALONE,
};

/// The new status, or `None` when there is nothing to write. `now` is RFC 3339.
pub fn merged(have: Option<&Json>, want: &ObjectStatus, now: &str) -> Option<Json> {
    let empty = Json::Object(Map::new());
    let have = have.unwrap_or(&empty);
    let wanted = serde_json::to_value(want).ok()?;
    let mut next = have.clone();
    let fields = next.as_object_mut()?;
    match want {
        ObjectStatus::Route(_) => {
            let parents = parents(array(have, "parents"), array(&wanted, "parents"), now);
            if parents.is_empty() && !fields.contains_key("parents") {
                return None;
            }
            fields.insert("parents".to_owned(), parents.into());
        }
        ObjectStatus::Class(_) | ObjectStatus::Gateway(_) | ObjectStatus::Conditions(_) => {
            for (name, value) in wanted.as_object()? {
                let value = match name.as_str() {
                    "conditions" => {
                        let others = array(have, "conditions").iter().filter(|condition| {
                            find(array(&wanted, "conditions"), condition, &["type"]).is_none()
                                && !is_ours_alone(condition)
                        });
                        let mut all: Vec<Json> = others.cloned().collect();
                        all.extend(timed(array(have, "conditions"), array(&wanted, "conditions"), now));
                        if all.is_empty() && !fields.contains_key("conditions") {
                            continue;
                        }
                        all.into()
                    }
                    "listeners" => listeners(array(have, "listeners"), array(&wanted, "listeners"), now),
                    _ => value.clone(),
                };
                fields.insert(name.clone(), value);
            }
        }
    }
    (!same(&next, have)).then_some(next)
}

/// A condition that only we write.
fn is_ours_alone(condition: &Json) -> bool {
    let kind = condition.get("type").and_then(Json::as_str);
    kind.is_some_and(|kind| OURS_ALONE.contains(&kind))
}

fn array<'a>(of: &'a Json, field: &str) -> &'a [Json] {
    of.get(field).and_then(Json::as_array).map_or(&[], Vec::as_slice)
}

fn find<'a>(among: &'a [Json], like: &Json, by: &[&str]) -> Option<&'a Json> {
    among.iter().find(|one| by.iter().all(|field| one.get(field) == like.get(field)))
}

/// The wanted conditions, each with the time of its last transition.
fn timed(have: &[Json], want: &[Json], now: &str) -> Vec<Json> {
    let with_time = |condition: &Json| {
        let before = find(have, condition, &["type", "status"]);
        let time = before.and_then(|before| before.get("lastTransitionTime")).cloned();
        let mut condition = condition.clone();
        condition["lastTransitionTime"] = time.unwrap_or_else(|| now.into());
        condition
    };
    want.iter().map(with_time).collect()
}

fn listeners(have: &[Json], want: &[Json], now: &str) -> Json {
    let with_times = |listener: &Json| {
        let before = find(have, listener, &["name"]).map_or(&[][..], |before| array(before, "conditions"));
        let mut listener = listener.clone();
        listener["conditions"] = timed(before, array(&listener, "conditions"), now).into();
        listener
    };
    want.iter().map(with_times).collect::<Vec<_>>().into()
}

fn parents(have: &[Json], want: &[Json], now: &str) -> Vec<Json> {
    let ours = |parent: &&Json| parent.get("controllerName") == Some(&json!(CONTROLLER));
    let mut all: Vec<Json> = have.iter().filter(|parent| !ours(parent)).cloned().collect();
    for parent in want {
        let before = find(have, parent, &["parentRef", "controllerName"]);
        let mut parent = parent.clone();
        let conditions = before.map_or(&[][..], |before| array(before, "conditions"));
        parent["conditions"] = timed(conditions, array(&parent, "conditions"), now).into();
        all.push(parent);
    }
    all
}

/// The same, whatever the order of conditions and parents.
fn same(a: &Json, b: &Json) -> bool {
    match (a, b) {
        (Json::Array(a), Json::Array(b)) => {
            a.len() == b.len() && a.iter().all(|one| b.iter().any(|other| same(one, other)))
        }
        (Json::Object(a), Json::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, one)| b.get(key).is_some_and(|other| same(one, other)))
        }
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::object::{Condition, Conditions, ParentRef, ParentStatus, RouteStatus, Truth};

    fn condition(kind: &'static str, status: Truth, message: &str) -> Condition {
        Condition {
            kind,
            status,
            reason: "R".to_owned(),
            message: message.to_owned(),
            observed_generation: 3,
        }
    }

    fn conditions(all: Vec<Condition>) -> ObjectStatus {
        ObjectStatus::Conditions(Conditions { conditions: all })
    }

    #[test]
    fn what_only_we_write_goes_when_it_is_not_wanted() {
        let accepted = condition("Accepted", Truth::True, "m");
        let bound = condition(OURS_ALONE[1], Truth::True, "m");
        let foreign = json!({"type": "TheirOwn", "status": "True"});
        let both =
            merged(Some(&json!({"conditions": [foreign]})), &conditions(vec![accepted.clone(), bound]), "t1");
        let both = both.unwrap();
        assert_eq!(both["conditions"].as_array().unwrap().len(), 3);
        let left = merged(Some(&both), &conditions(vec![accepted]), "t2").unwrap();
        let kinds: Vec<_> = left["conditions"].as_array().unwrap().iter().map(|one| &one["type"]).collect();
        assert_eq!(kinds, ["TheirOwn", "Accepted"]);
        assert_eq!(merged(Some(&left), &conditions(vec![]), "t3"), None, "Accepted may be another's");
        assert_eq!(merged(None, &conditions(vec![]), "t3"), None);
    }

    #[test]
    fn conditions_are_merged_by_type_and_keep_their_time() {
        let want = conditions(vec![condition("Accepted", Truth::True, "m")]);
        let first = merged(None, &want, "t1").unwrap();
        let expected = json!({"type": "Accepted", "status": "True", "reason": "R", "message": "m",
            "observedGeneration": 3, "lastTransitionTime": "t1"});
        assert_eq!(first, json!({"conditions": [expected]}));
        assert_eq!(merged(Some(&first), &want, "t2"), None);
        // Another message is no transition; another status is.
        let told =
            merged(Some(&first), &conditions(vec![condition("Accepted", Truth::True, "n")]), "t2").unwrap();
        assert_eq!(told["conditions"][0]["lastTransitionTime"], "t1");
        let fell =
            merged(Some(&told), &conditions(vec![condition("Accepted", Truth::False, "n")]), "t3").unwrap();
        assert_eq!(fell["conditions"][0]["lastTransitionTime"], "t3");
        // What others wrote stays.
        let foreign = json!({"observedGeneration": 9, "conditions": [{"type": "Theirs", "status": "True"}]});
        let both = merged(Some(&foreign), &want, "t4").unwrap();
        assert_eq!(
            (both["observedGeneration"].clone(), both["conditions"].as_array().unwrap().len()),
            (json!(9), 2)
        );
        assert_eq!(merged(Some(&both), &want, "t5"), None);
    }

    #[test]
    fn parents_of_other_controllers_are_left_alone() {
        let parent = ParentStatus {
            parent_ref: ParentRef {
                group: "".into(),
                kind: "Service".into(),
                namespace: "shop".into(),
                name: "cart".into(),
                section_name: None,
                port: None,
            },
            controller_name: CONTROLLER,
            conditions: vec![condition("Accepted", Truth::True, "m")],
        };
        let route = |parents| ObjectStatus::Route(RouteStatus { parents });
        let foreign = json!({"controllerName": "other", "parentRef": {"name": "cart"}, "conditions": []});
        let have = json!({"parents": [foreign]});
        let both = merged(Some(&have), &route(vec![parent.clone()]), "t1").unwrap();
        assert_eq!(both["parents"].as_array().unwrap().len(), 2);
        assert_eq!(both["parents"][0], foreign);
        assert_eq!(merged(Some(&both), &route(vec![parent]), "t2"), None);
        // No parent of ours any more: our entry goes, theirs stays.
        assert_eq!(merged(Some(&both), &route(vec![]), "t3").unwrap(), have);
        assert_eq!(merged(None, &route(vec![]), "t3"), None);
        assert_eq!(merged(Some(&have), &route(vec![]), "t3"), None);
    }
}
