//! Helm's template language, as much of it as our chart uses. A subset, so that there is one source of the manifests
//! and meshctl needs no Helm; whatever is outside of it is an error with its line.
//!
//! ```text
//! {{ PIPELINE }}   {{ if PIPELINE }} … {{ else }} … {{ end }}      a dash inside the braces trims white space
//! PIPELINE = CALL { "|" CALL }        the value goes in as the last argument
//! CALL     = function ARGUMENT… | ARGUMENT
//! ARGUMENT = .Values.x.y | .Release.Namespace | .Chart.AppVersion | "text" | 12
//! ```

use serde_json::Value;
use thiserror::Error;

/// Why a template cannot be rendered.
#[derive(Debug, Error, PartialEq)]
#[error("line {line}: {reason}")]
pub struct TemplateError {
    /// Where the action begins.
    pub line: usize,
    /// What is wrong.
    pub reason: String,
}

/// Renders a template with `context`, an object.
///
/// # Errors
/// What is not in the subset, a path that does not exist, a value that cannot stand there.
pub fn render(template: &str, context: &Value) -> Result<String, TemplateError> {
    let tokens = tokens(template)?;
    let mut rest = tokens.as_slice();
    let mut out = String::new();
    let end = block(&mut rest, context, true, &mut out)?;
    match end {
        None => Ok(out),
        Some((line, word)) => Err(TemplateError { line, reason: format!("{word} without if") }),
    }
}

#[derive(Debug, PartialEq)]
enum Token<'t> {
    Text(&'t str),
    Action { line: usize, words: Vec<Word> },
}

#[derive(Clone, Debug, PartialEq)]
enum Word {
    /// A name or keyword.
    Name(String),
    /// `.a.b`, split.
    Path(Vec<String>),
    Literal(Value),
    Pipe,
}

/// Text and actions; white space that a dash trims is gone.
fn tokens(template: &str) -> Result<Vec<Token<'_>>, TemplateError> {
    let mut tokens = Vec::new();
    let mut rest = template;
    let mut trim = false;
    let mut line = 1;
    loop {
        let (mut text, action) = match rest.split_once("{{") {
            None => (rest, None),
            Some((text, after)) => (text, Some(after)),
        };
        line += text.matches('\n').count();
        if trim {
            text = text.trim_start();
        }
        let Some(after) = action else {
            tokens.push(Token::Text(text));
            return Ok(tokens);
        };
        let Some((inside, after)) = after.split_once("}}") else {
            return Err(TemplateError { line, reason: "{{ without }}".to_owned() });
        };
        let (inside, before) = inside.strip_prefix('-').map_or((inside, false), |inside| (inside, true));
        let (inside, behind) = inside.strip_suffix('-').map_or((inside, false), |inside| (inside, true));
        tokens.push(Token::Text(if before { text.trim_end() } else { text }));
        let words = words(inside).map_err(|reason| TemplateError { line, reason })?;
        tokens.push(Token::Action { line, words });
        line += inside.matches('\n').count();
        (rest, trim) = (after, behind);
    }
}

fn words(mut text: &str) -> Result<Vec<Word>, String> {
    let mut words = Vec::new();
    loop {
        text = text.trim_start();
        let Some(first) = text.chars().next() else { return Ok(words) };
        if let Some(after) = text.strip_prefix('"') {
            let (literal, after) = after.split_once('"').ok_or("a text without its end")?;
            words.push(Word::Literal(literal.into()));
            text = after;
            continue;
        }
        let end = text.find(|c: char| c.is_whitespace() || c == '|').unwrap_or(text.len());
        let (word, after) = text.split_at(end.max(1));
        text = after;
        words.push(match word {
            "|" => Word::Pipe,
            _ if first == '.' && word.len() > 1 => {
                Word::Path(word.split('.').skip(1).map(str::to_owned).collect())
            }
            _ if first.is_ascii_digit() => {
                Word::Literal(word.parse::<i64>().map_err(|_| format!("{word} is no number"))?.into())
            }
            _ if word.bytes().all(|b| b.is_ascii_alphanumeric()) => Word::Name(word.to_owned()),
            _ => return Err(format!("{word} is outside of the subset")),
        });
    }
}

/// What ended a block early: where, and `else` or `end`.
type End = Option<(usize, &'static str)>;

/// Renders until the end of the template or of the block.
fn block(
    rest: &mut &[Token<'_>],
    context: &Value,
    live: bool,
    out: &mut String,
) -> Result<End, TemplateError> {
    while let Some((token, after)) = rest.split_first() {
        *rest = after;
        let (line, words) = match token {
            Token::Text(text) => {
                out.push_str(if live { text } else { "" });
                continue;
            }
            Token::Action { line, words } => (*line, words.as_slice()),
        };
        let fail = |reason: String| TemplateError { line, reason };
        match words {
            [Word::Name(name)] if name == "end" => return Ok(Some((line, "end"))),
            [Word::Name(name)] if name == "else" => return Ok(Some((line, "else"))),
            [Word::Name(name), condition @ ..] if name == "if" => {
                // Evaluated in any case: a wrong path is an error, also where it would not matter today.
                let holds = truth(&pipeline(condition, context).map_err(fail)?);
                let mut end = block(rest, context, live && holds, out)?;
                if matches!(end, Some((_, "else"))) {
                    end = block(rest, context, live && !holds, out)?;
                }
                if !matches!(end, Some((_, "end"))) {
                    return Err(fail("if without end".to_owned()));
                }
            }
            words => {
                let text = show(&pipeline(words, context).map_err(fail)?).map_err(fail)?;
                out.push_str(if live { &text } else { "" });
            }
        }
    }
    Ok(None)
}

fn pipeline(words: &[Word], context: &Value) -> Result<Value, String> {
    let mut value = None;
    for call in words.split(|word| *word == Word::Pipe) {
        value = Some(evaluate(call, value, context)?);
    }
    value.ok_or_else(|| "an empty action".to_owned())
}

fn evaluate(call: &[Word], piped: Option<Value>, context: &Value) -> Result<Value, String> {
    let (function, arguments) = match call {
        [Word::Name(name), arguments @ ..] => (Some(name.as_str()), arguments),
        arguments => (None, arguments),
    };
    let mut values = arguments.iter().map(|word| argument(word, context)).collect::<Result<Vec<_>, _>>()?;
    values.extend(piped);
    match (function, values.as_slice()) {
        (None, [value]) => Ok(value.clone()),
        (Some("toYaml"), [value]) => {
            let yaml = serde_yaml_ng::to_string(value).map_err(|error| error.to_string())?;
            Ok(yaml.trim_end().into())
        }
        (Some("toJson"), [value]) => {
            serde_json::to_string(value).map(Value::from).map_err(|error| error.to_string())
        }
        (Some("quote"), [value]) => {
            serde_json::to_string(&show(value)?).map(Value::from).map_err(|error| error.to_string())
        }
        (Some("default"), [instead, value]) => Ok(if truth(value) { value } else { instead }.clone()),
        (Some("not"), [value]) => Ok((!truth(value)).into()),
        (Some("eq"), [one, other]) => Ok((one == other).into()),
        (Some("nindent"), [Value::Number(width), Value::String(text)]) => {
            let indent =
                " ".repeat(width.as_u64().and_then(|width| usize::try_from(width).ok()).unwrap_or(0));
            Ok(text.lines().fold(String::new(), |out, line| format!("{out}\n{indent}{line}")).into())
        }
        (None, _) => Err("one value is expected".to_owned()),
        (Some(name), values) => {
            Err(format!("{name} with {} arguments is outside of the subset", values.len()))
        }
    }
}

fn argument(word: &Word, context: &Value) -> Result<Value, String> {
    match word {
        Word::Literal(value) => Ok(value.clone()),
        Word::Path(path) => {
            let found = path.iter().try_fold(context, |value, step| value.get(step));
            found.cloned().ok_or_else(|| format!(".{} does not exist", path.join(".")))
        }
        Word::Name(name) => Err(format!("{name} is no value")),
        Word::Pipe => Err("| without a value".to_owned()),
    }
}

/// What Go's templates take for true.
fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

fn show(value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Bool(value) => Ok(value.to_string()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => {
            Err("a list or an object needs toYaml".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(template: &str, expected: Result<&str, &str>) {
        let context = json!({
            "Values": {"on": true, "off": false, "name": "x", "none": "", "zero": 0, "list": [{"a": 1}, "b"], "map": {}},
            "Release": {"Namespace": "ns"},
        });
        let rendered = render(template, &context);
        let rendered = rendered.as_deref().map_err(ToString::to_string);
        assert_eq!(rendered, expected.map_err(str::to_owned), "{template}");
    }

    #[test]
    fn values_and_pipelines() {
        check("a {{ .Values.name }}-{{.Release.Namespace}} b", Ok("a x-ns b"));
        check("{{ .Values.none | default .Values.name }}", Ok("x"));
        check("{{ .Values.name | default \"y\" | quote }}", Ok("\"x\""));
        check("{{ default \"y z\" .Values.none }}", Ok("y z"));
        check("{{ .Values.zero }} {{ .Values.on }}", Ok("0 true"));
        check("k: {{- toYaml .Values.list | nindent 2 }}\n", Ok("k:\n  - a: 1\n  - b\n"));
    }

    #[test]
    fn conditions_and_white_space() {
        check("{{- if .Values.on }}\na\n{{- else }}\nb\n{{- end }}\nc", Ok("\na\nc"));
        check("{{- if .Values.off }}\na\n{{- else }}\nb\n{{- end }}\nc", Ok("\nb\nc"));
        check("{{ if not .Values.off -}}  a{{ end }}", Ok("a"));
        check("{{ if .Values.map }}a{{ end }}{{ if .Values.list }}b{{ end }}", Ok("b"));
        check("{{ if eq .Values.name \"x\" }}a{{ end }}", Ok("a"));
        check("{{ if .Values.off }}{{ if .Values.on }}a{{ else }}b{{ end }}{{ else }}c{{ end }}", Ok("c"));
    }

    #[test]
    fn what_is_outside_is_an_error_with_its_line() {
        check("\n{{ .Values.nothing }}", Err("line 2: .Values.nothing does not exist"));
        check(
            "{{ if .Values.off }}{{ .Values.nothing }}{{ end }}",
            Err("line 1: .Values.nothing does not exist"),
        );
        check("{{ range .Values.list }}", Err("line 1: range with 1 arguments is outside of the subset"));
        check("{{ $x := 1 }}", Err("line 1: $x is outside of the subset"));
        check("{{ .Values.list }}", Err("line 1: a list or an object needs toYaml"));
        check("{{ if .Values.on }}", Err("line 1: if without end"));
        check("a\n\n{{ end }}", Err("line 3: end without if"));
        check("{{ if .Values.on }}{{ else }}{{ else }}{{ end }}", Err("line 1: if without end"));
        check("{{ .Values.name", Err("line 1: {{ without }}"));
        check("{{ }}", Err("line 1: one value is expected"));
        check("{{ \"a }}", Err("line 1: a text without its end"));
    }
}
