//! Log lines in the two forms of `wire-protocol.md` 8.2.

use std::{
    fmt::{self, Write as _},
    io,
    time::SystemTime,
};

use serde_json::{Map, Value};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter, Registry,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    layer::SubscriberExt,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
};

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// `time TAB level TAB target TAB message TAB key=value …`
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

impl std::str::FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("unknown log format {other:?}: text or json")),
        }
    }
}

/// Changes the level of a running process.
#[derive(Clone)]
pub struct LogControl(Option<reload::Handle<EnvFilter, Registry>>);

impl LogControl {
    /// One that changes nothing, for tests and for processes whose subscriber is somebody else's.
    pub fn none() -> Self {
        Self(None)
    }

    /// Sets the filter: `info`, or per target such as `info,mesh_net::tunnel=debug`.
    ///
    /// # Errors
    /// The filter cannot be read, or the process has no subscriber of ours.
    pub fn set(&self, filter: &str) -> Result<(), String> {
        let filter = EnvFilter::try_new(filter).map_err(|error| error.to_string())?;
        let handle = self.0.as_ref().ok_or("logging is not ours to set")?;
        handle.reload(filter).map_err(|error| error.to_string())
    }
}

/// Installs the process's subscriber, writing to standard error. Call once, from `main`.
///
/// # Errors
/// The filter cannot be read, or there is a subscriber already.
pub fn init_tracing(format: LogFormat, filter: &str) -> Result<LogControl, String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| error.to_string())?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer().event_format(Lines(format)).with_writer(io::stderr);
    tracing_subscriber::registry().with(filter).with(lines).try_init().map_err(|error| error.to_string())?;
    Ok(LogControl(Some(handle)))
}

struct Lines(LogFormat);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        out.write_str(&render(self.0, &timestamp(SystemTime::now()), event))?;
        out.write_char('\n')
    }
}

fn render(format: LogFormat, time: &str, event: &Event<'_>) -> String {
    let level = event.metadata().level().as_str().to_ascii_lowercase();
    let target = event.metadata().target();
    match format {
        LogFormat::Text => {
            let mut fields = TextFields::default();
            event.record(&mut fields);
            let separator = if fields.rest.is_empty() { "" } else { "\t" };
            format!("{time}\t{level}\t{target}\t{}{separator}{}", fields.message, fields.rest)
        }
        LogFormat::Json => {
            let mut fields = JsonFields::default();
            event.record(&mut fields);
            let mut line = Map::new();
            line.insert("level".into(), level.into());
            line.insert("time".into(), time.into());
            line.insert("scope".into(), target.into());
            line.insert("message".into(), fields.message.into());
            line.extend(fields.rest);
            Value::Object(line).to_string()
        }
    }
}

/// RFC 3339 in UTC with microseconds.
fn timestamp(now: SystemTime) -> String {
    let now = time::OffsetDateTime::from(now);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        now.year(),
        u8::from(now.month()),
        now.day(),
        now.hour(),
        now.minute(),
        now.second(),
        now.microsecond()
    )
}

#[derive(Default)]
struct TextFields {
    message: String,
    rest: String,
}

impl TextFields {
    fn push(&mut self, field: &Field, value: impl fmt::Display) {
        let space = if self.rest.is_empty() { "" } else { " " };
        let _ = write!(self.rest, "{space}{}={value}", field.name());
    }
}

impl Visit for TextFields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = crate::access::clean(&text).into_owned();
        } else if text.chars().any(char::is_control) {
            // Whatever the type, one event is one line.
            self.push(field, format_args!("{text:?}"));
        } else {
            self.push(field, text);
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.to_owned();
        } else {
            self.push(field, format_args!("{value:?}"));
        }
    }
}

#[derive(Default)]
struct JsonFields {
    message: String,
    rest: Map<String, Value>,
}

impl Visit for JsonFields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.to_owned();
        } else {
            self.rest.insert(field.name().to_owned(), value.into());
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.rest.insert(field.name().to_owned(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.rest.insert(field.name().to_owned(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.rest.insert(field.name().to_owned(), value.into());
    }
}

/// Collects rendered lines, for tests of what is logged.
#[cfg(test)]
pub(crate) mod capture {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tracing_subscriber::{Layer, layer::Context};

    use super::*;

    pub(crate) struct Capture(pub Arc<Mutex<Vec<String>>>, pub LogFormat);

    impl<S: Subscriber> Layer<S> for Capture {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            self.0.lock().push(render(self.1, "T", event));
        }
    }

    /// Runs `work` and returns what it logged.
    pub(crate) fn lines(format: LogFormat, work: impl FnOnce()) -> Vec<String> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let subscriber = tracing_subscriber::registry().with(Capture(lines.clone(), format));
        tracing::subscriber::with_default(subscriber, work);
        std::mem::take(&mut *lines.lock())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_lines_quote_strings_and_stay_lines() {
        let got = capture::lines(LogFormat::Text, || {
            tracing::info!(target: "access", a = "x y", n = 7, addr = %"1.2.3.4:5", none = None::<&str>, evil = "a\nb", "done");
        });
        assert_eq!(got, ["T\tinfo\taccess\tdone\ta=\"x y\" n=7 addr=1.2.3.4:5 evil=\"a\\nb\""]);
    }

    #[test]
    fn json_lines_are_objects() {
        let got = capture::lines(LogFormat::Json, || {
            tracing::error!(target: "access", n = 7u64, who = "me", "done");
        });
        assert_eq!(
            got,
            [r#"{"level":"error","message":"done","n":7,"scope":"access","time":"T","who":"me"}"#]
        );
    }

    #[test]
    fn time_is_rfc3339() {
        let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_micros(1_700_000_000_000_042);
        assert_eq!(timestamp(at), "2023-11-14T22:13:20.000042Z");
    }
}
