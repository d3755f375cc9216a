//! Chat templates as Hugging Face runs them: Jinja with trimmed blocks and a few functions of Python.

use std::{
    fmt::Write as _,
    io,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use chrono::{DateTime, Local};
use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, Rest, ValueKind},
};
use minijinja_contrib::pycompat;

/// Steps that a template may take, besides one for each byte of the messages. Every 64 bytes that it makes are a step too.
const STEPS: u64 = 3_000_000;
/// Bytes of output that a template may make, besides eight for each byte of the messages.
const OUTPUT: usize = 16 << 20;
/// Templates and macros within each other.
const DEPTH: usize = 60;

/// Renders a template with some variables, whose texts have `bytes` bytes together; `now` is what `strftime_now` formats.
///
/// Errors: the line and what the template's author or the engine says of it.
pub(crate) fn render(source: &str, variables: Value, bytes: usize, now: Option<SystemTime>) -> Result<String, String> {
    let source = without_generation(source);
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| error.to_string())?);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(method);
    environment.set_recursion_limit(DEPTH);
    environment.set_fuel(Some(STEPS.saturating_add(bytes as u64)));
    environment.add_filter("tojson", to_json);
    environment.add_test("iterable", |value: &Value| value.as_str().is_some() || value.try_iter().is_ok());
    environment.add_test("sequence", is_sequence);
    environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.to_string()))
    });
    let now = now.map_or_else(Local::now, local);
    environment.add_function("strftime_now", move |format: &str| strftime(&now, format));
    let mut output = Bounded { bytes: Vec::new(), most: OUTPUT.saturating_add(bytes.saturating_mul(8)) };
    let rendered = environment
        .template_from_str(&source)
        .and_then(|template| template.render_captured_to(variables, &mut output).map(drop));
    if output.most == 0 {
        return Err("produces too much text for a chat".to_string());
    }
    rendered.map_err(|error| described(&error))?;
    String::from_utf8(output.bytes).map_err(|_| "produces invalid UTF-8".to_string())
}

/// Where the template fails and why: its own message, or that of the engine.
fn described(error: &Error) -> String {
    let line = error.line().map_or_else(String::new, |line| format!("line {line}: "));
    match error.kind() {
        ErrorKind::OutOfFuel => format!("{line}takes too many steps or produces too much text for a chat"),
        ErrorKind::InvalidOperation => format!("{line}{}", error.detail().unwrap_or("an invalid operation")),
        kind => match error.detail() {
            Some(detail) => format!("{line}{kind}: {detail}"),
            None => format!("{line}{kind}"),
        },
    }
}

/// Text of bounded size; `most` is 0 once it was too much.
struct Bounded {
    bytes: Vec<u8>,
    most: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.most {
            self.most = 0;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Replaces the tags around what the assistant says, `{% generation %}`, by those of a scope, which is what they are when
/// nobody asks for the places.
fn without_generation(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        text.push_str(before);
        let inner = &tag[2..];
        let length = inner.find("%}").unwrap_or(inner.len());
        let inner = &inner[..length];
        let name = inner.trim_matches(['-', '+']).trim();
        let replaced = match name {
            "generation" => inner.replace("generation", "with"),
            "endgeneration" => inner.replace("endgeneration", "endwith"),
            _ => inner.to_string(),
        };
        text.push_str("{%");
        text.push_str(&replaced);
        rest = &tag[2 + length..];
    }
    text.push_str(rest);
    text
}

/// Strings are sequences of characters in Python.
fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined)
}

/// Methods of Python's strings, lists and dictionaries: those of minijinja's own collection, and a few more.
fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    let text = |at: usize| arguments.get(at).and_then(Value::as_str);
    match (value.as_str(), name, arguments.len()) {
        (Some(own), "removeprefix", 1) => {
            if let Some(prefix) = text(0) {
                return Ok(Value::from(own.strip_prefix(prefix).unwrap_or(own)));
            }
        }
        (Some(own), "removesuffix", 1) => {
            if let Some(suffix) = text(0) {
                return Ok(Value::from(own.strip_suffix(suffix).unwrap_or(own)));
            }
        }
        (Some(own), "partition" | "rpartition", 1) => {
            if let Some(separator) = text(0).filter(|separator| !separator.is_empty()) {
                let parts = match (name, own.split_once(separator), own.rsplit_once(separator)) {
                    ("partition", Some((first, last)), _) | ("rpartition", _, Some((first, last))) => {
                        [first, separator, last]
                    }
                    ("partition", ..) => [own, "", ""],
                    _ => ["", "", own],
                };
                return Ok(Value::from(parts.map(Value::from).to_vec()));
            }
        }
        (Some(own), "rsplit", 1 | 2) => {
            let most = arguments.get(1).map(|most| i64::try_from(most.clone())).transpose()?.unwrap_or(-1);
            if let Some(separator) = text(0).filter(|separator| !separator.is_empty()) {
                let most = usize::try_from(most).map_or(usize::MAX, |most| most.saturating_add(1));
                let mut parts: Vec<Value> = own.rsplitn(most, separator).map(Value::from).collect();
                parts.reverse();
                return Ok(Value::from(parts));
            }
        }
        (Some(own), "title", 0) => {
            let mut inside = false;
            let mut title = String::with_capacity(own.len());
            for character in own.chars() {
                if inside {
                    title.extend(character.to_lowercase());
                } else {
                    title.extend(character.to_uppercase());
                }
                inside = character.is_lowercase() || character.is_uppercase();
            }
            return Ok(Value::from(title));
        }
        (Some(own), "index", 1) => {
            if let Some(at) = text(0).and_then(|part| own.find(part)) {
                return Ok(Value::from(own[..at].chars().count()));
            }
            return Err(Error::new(ErrorKind::InvalidOperation, "substring not found"));
        }
        (None, "copy", 0) if matches!(value.kind(), ValueKind::Map | ValueKind::Seq) => return Ok(value.clone()),
        (None, "index", 1) if value.kind() == ValueKind::Seq => {
            for (at, item) in value.try_iter()?.enumerate() {
                if item == arguments[0] {
                    return Ok(Value::from(at));
                }
            }
            return Err(Error::new(ErrorKind::InvalidOperation, format!("{} is not in list", arguments[0])));
        }
        _ => {}
    }
    pycompat::unknown_method_callback(state, value, name, arguments)
}

/// Python's `json.dumps` with its options, where text that is not ASCII stays.
fn to_json(state: &State, value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    let option = |at: usize, name: &str| match positional.get(at) {
        Some(value) => Ok(Some(value.clone())),
        None => options.get::<Option<Value>>(name),
    };
    let (ascii, indent) = (option(0, "ensure_ascii")?, option(1, "indent")?);
    let (separators, sorted) = (option(2, "separators")?, option(3, "sort_keys")?);
    options.assert_all_used()?;
    let given = |value: Option<Value>| value.filter(|value| !value.is_none() && !value.is_undefined());
    let indent = match given(indent) {
        None => None,
        Some(text) if text.as_str().is_some() => Some(text.to_string()),
        Some(count) => {
            let count = usize::try_from(i64::try_from(count)?.max(0)).unwrap_or(0);
            if count > 64 {
                return Err(Error::new(ErrorKind::InvalidOperation, "tojson: `indent` must be at most 64"));
            }
            Some(" ".repeat(count))
        }
    };
    let (mut comma, mut colon) = (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string());
    if let Some(separators) = given(separators) {
        (comma, colon) = (separators.get_item_by_index(0)?.to_string(), separators.get_item_by_index(1)?.to_string());
    }
    let truth = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let mut json =
        Json { state, ascii: truth(ascii), indent, comma, colon, sorted: truth(sorted), text: String::new() };
    json.write(value, 0)?;
    Ok(Value::from(json.text))
}

struct Json<'a, 'e> {
    state: &'a State<'a, 'e>,
    ascii: bool,
    indent: Option<String>,
    comma: String,
    colon: String,
    sorted: bool,
    text: String,
}

impl Json<'_, '_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: lists are nested too deeply"));
        }
        let before = self.text.len();
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.text.push_str(&value.to_string()),
            ValueKind::String => self.quote(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.text.push('[');
                let mut any = false;
                for item in value.try_iter()? {
                    self.next_item(&mut any, depth);
                    self.write(&item, depth + 1)?;
                }
                self.close(any, depth, ']');
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.text.push('{');
                let mut any = false;
                for key in keys {
                    self.next_item(&mut any, depth);
                    match key.kind() {
                        ValueKind::String => self.quote(key.as_str().unwrap_or_default()),
                        ValueKind::Bool => self.quote(if key.is_true() { "true" } else { "false" }),
                        ValueKind::None => self.quote("null"),
                        _ => self.quote(&key.to_string()),
                    }
                    self.text.push_str(&self.colon.clone());
                    self.write(&value.get_item(&key)?, depth + 1)?;
                }
                self.close(any, depth, '}');
            }
            kind => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("tojson: {kind} cannot be converted to JSON"),
                ));
            }
        }
        self.state.consume_fuel(1 + (self.text.len() - before) as u64 / 64)
    }

    fn next_item(&mut self, any: &mut bool, depth: usize) {
        if *any {
            self.text.push_str(&self.comma.clone());
        }
        *any = true;
        self.line(depth + 1);
    }

    fn close(&mut self, any: bool, depth: usize, bracket: char) {
        if any {
            self.line(depth);
        }
        self.text.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.text.push('\n');
            self.text.push_str(&indent.repeat(depth));
        }
    }

    fn quote(&mut self, text: &str) {
        self.text.push('"');
        for character in text.chars() {
            match character {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                _ if character < ' ' || self.ascii && !character.is_ascii() => {
                    for unit in character.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.text, "\\u{unit:04x}");
                    }
                }
                _ => self.text.push(character),
            }
        }
        self.text.push('"');
    }
}

fn local(time: SystemTime) -> DateTime<Local> {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    DateTime::from_timestamp(since.as_secs().min(1 << 37) as i64, since.subsec_nanos()).unwrap_or_default().into()
}

/// A date in the form of Python's `strftime`, of a time that names no zone.
fn strftime(now: &DateTime<Local>, format: &str) -> Result<String, Error> {
    let format = format.replace("%f", "%6f").replace("%Z", "").replace("%z", "");
    let mut text = String::new();
    match write!(text, "{}", now.naive_local().format(&format)) {
        Ok(()) => Ok(text),
        Err(_) => {
            Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now: `{format}` is not a valid format")))
        }
    }
}
