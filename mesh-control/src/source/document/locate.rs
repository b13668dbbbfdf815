//! (pure) The line on which a field of a YAML document stands: the parser is run again along the path and stopped
//! there, so that block and flow style, anchors and JSON are all found by the one grammar.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The line, counted from 1, of `path` (`spec.rules[0].to`) in `text`; of the deepest part that exists otherwise.
pub fn line_of(text: &str, path: &str) -> usize {
    let mut steps = steps(path);
    loop {
        let found = Walk { steps: &steps }.deserialize(serde_yaml_ng::Deserializer::from_str(text));
        match found {
            Err(error) if error.to_string().contains(HERE) => {
                return error.location().map_or(1, |at| at.line());
            }
            _ if steps.is_empty() => return 1,
            _ => {
                steps.pop();
            }
        }
    }
}

/// The text of the error that marks the place.
const HERE: &str = "undermesh: this is the place";

enum Step {
    Key(String),
    Index(usize),
}

fn steps(path: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    for part in path.split('.').filter(|part| !part.is_empty()) {
        let (key, indices) = part.split_once('[').map_or((part, ""), |(key, rest)| (key, rest));
        if !key.is_empty() {
            steps.push(Step::Key(key.to_owned()));
        }
        for index in indices.split('[').filter_map(|index| index.trim_end_matches(']').parse().ok()) {
            steps.push(Step::Index(index));
        }
    }
    steps
}

struct Walk<'a> {
    steps: &'a [Step],
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HERE)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Some((step, rest)) = self.steps.split_first() else { return Err(A::Error::custom(HERE)) };
        while let Some(key) = map.next_key::<String>()? {
            match step {
                Step::Key(wanted) if *wanted == key => map.next_value_seed(Walk { steps: rest })?,
                Step::Key(_) | Step::Index(_) => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let Some((step, rest)) = self.steps.split_first() else { return Err(A::Error::custom(HERE)) };
        let wanted = match step {
            Step::Index(index) => *index,
            Step::Key(_) => usize::MAX,
        };
        for index in 0.. {
            let more = if index == wanted {
                items.next_element_seed(Walk { steps: rest })?.is_some()
            } else {
                items.next_element::<IgnoredAny>()?.is_some()
            };
            if !more {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_in_both_styles() {
        let text = "a: 1\nspec:\n  rules:\n  - x: 1\n  - y:\n      z: [1,\n        2]\n  flow: {p: {q: 1}}\n";
        for (path, line) in [
            ("", 1),
            ("a", 1),
            ("spec.rules[1]", 5),
            ("spec.rules[1].y.z[1]", 7),
            ("spec.flow.p.q", 8),
            ("spec.rules[1].y.missing", 6),
            ("nothing", 1),
        ] {
            assert_eq!(line_of(text, path), line, "{path}");
        }
    }
}
