//! `RequestHeaderModifier` and `ResponseHeaderModifier`. Pure.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use mesh_core::{model::HeaderEdit, rewrite::editable};

/// Changes of header fields, ready to be applied.
#[derive(Debug, Default)]
pub struct Edits {
    remove: Vec<HeaderName>,
    set: Vec<(HeaderName, HeaderValue)>,
    add: Vec<(HeaderName, HeaderValue)>,
}

impl Edits {
    /// Checks names and values once.
    ///
    /// # Errors
    /// The field that cannot be changed.
    pub fn new(edit: &HeaderEdit) -> Result<Self, String> {
        let HeaderEdit { remove, set, add } = edit;
        let name = |text: &str| match HeaderName::try_from(text) {
            Ok(name) if editable(name.as_str()) => Ok(name),
            _ => Err(format!("header {text:.80?} cannot be changed by a route")),
        };
        let fields = |list: &[(Arc<str>, Arc<str>)]| {
            let field = |(key, value): &(Arc<str>, Arc<str>)| match HeaderValue::try_from(&**value) {
                Ok(value) => Ok((name(key)?, value)),
                Err(_) => Err(format!("the value of header {key:.80?} is not one")),
            };
            list.iter().map(field).collect::<Result<Vec<_>, String>>()
        };
        Ok(Self {
            remove: remove.iter().map(|text| name(text)).collect::<Result<_, _>>()?,
            set: fields(set)?,
            add: fields(add)?,
        })
    }

    /// Removes, sets, adds.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name, value.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edit(remove: &[&str], set: &[(&str, &str)], add: &[(&str, &str)]) -> HeaderEdit {
        let fields = |list: &[(&str, &str)]| {
            list.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
        };
        HeaderEdit {
            remove: remove.iter().map(|name| (*name).into()).collect(),
            set: fields(set),
            add: fields(add),
        }
    }

    #[test]
    fn set_replaces_all_add_keeps_and_remove_takes_all() {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("x-set", "1"), ("x-set", "2"), ("x-add", "1"), ("x-gone", "1"), ("x-gone", "2")]
        {
            headers.append(name, HeaderValue::from_static(value));
        }
        let edit = edit(&["X-Gone"], &[("X-Set", "3"), ("x-new", "4")], &[("x-add", "2"), ("x-other", "5")]);
        Edits::new(&edit).unwrap().apply(&mut headers);
        let values = |name: &str| {
            headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(values("x-set"), ["3"]);
        assert_eq!(values("x-new"), ["4"]);
        assert_eq!(values("x-add"), ["1", "2"]);
        assert_eq!(values("x-other"), ["5"]);
        assert!(values("x-gone").is_empty());
    }

    #[test]
    fn what_frames_the_message_or_says_who_the_client_is_cannot_be_changed() {
        for name in
            ["Host", "content-length", "transfer-encoding", "connection", "te", "x-undermesh-client", ""]
        {
            assert!(Edits::new(&edit(&[], &[(name, "1")], &[])).is_err(), "{name}");
            assert!(Edits::new(&edit(&[name], &[], &[])).is_err(), "{name}");
        }
        assert!(Edits::new(&edit(&[], &[], &[("x-a", "a\r\nb: c")])).is_err());
    }
}
