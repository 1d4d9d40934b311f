//! Chat templates: a conversation as the one string a model was trained on.
//!
//! A checkpoint carries its template as Jinja source, written for Python's jinja2 in the environment that
//! transformers sets up (`trim_blocks`, `lstrip_blocks`, one trailing newline of the source dropped, `break` and
//! `continue`, Python's string methods, `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML).
//! [`ChatTemplate`] builds the same environment on minijinja. Templates come from strangers, so a render has a
//! budget of instructions and memory.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Instructions a render may take; a long conversation takes thousands.
const FUEL: u64 = 50_000_000;
const NAME: &str = "chat";

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: mostly `system`, `user` or `assistant`.
    pub role: String,
    pub content: String,
}

impl Message {
    /// The turn of `role` saying `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }
}

/// A compiled chat template with the special tokens it may print.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl ChatTemplate {
    /// Compiles `source`; a template that is not valid Jinja is an [`Error::Invalid`] naming the line.
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(invalid)?;
        env.set_syntax(syntax);
        env.set_fuel(Some(FUEL));
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_filter("tojson", tojson);
        env.add_function("raise_exception", raise_exception);
        env.add_function("strftime_now", strftime_now);
        env.add_template_owned(NAME, generation_as_if(source)).map_err(invalid)?;
        Ok(ChatTemplate { env, bos_token: bos_token.map(str::to_owned), eos_token: eos_token.map(str::to_owned) })
    }

    /// The conversation as text. `add_generation_prompt` ends it where the assistant's next turn starts.
    /// A template that refuses the conversation (roles that do not alternate, say) is an [`Error::Invalid`] with its
    /// reason.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let turns: Vec<Value> = messages
            .iter()
            .map(|m| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]))
            .collect();
        // An absent token stays undefined (and prints as nothing) instead of printing "None".
        let token = |token: &Option<String>| token.as_deref().map_or(Value::UNDEFINED, Value::from);
        let template = self.env.get_template(NAME).map_err(invalid)?;
        template
            .render(context! {
                messages => turns,
                tools => Value::from(()),
                documents => Value::from(()),
                add_generation_prompt => add_generation_prompt,
                bos_token => token(&self.bos_token),
                eos_token => token(&self.eos_token),
            })
            .map_err(invalid)
    }
}

fn invalid(error: minijinja::Error) -> Error {
    if error.kind() == ErrorKind::OutOfFuel {
        return Error::Invalid(format!(
            "chat template: stopped after {FUEL} instructions; it seems to loop without end"
        ));
    }
    Error::Invalid(format!("chat template: {error}"))
}

/// `{% generation %}` marks the assistant's words for transformers' masks and prints its body as it is. minijinja has
/// no custom tags; an `if` that always holds prints the same, with the same white space around it.
fn generation_as_if(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag[2..].find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        let (inside, after) = (&tag[2..end], &tag[end..]);
        match inside.trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&format!("{{%{}", inside.replace("generation", "if true"))),
            "endgeneration" => out.push_str(&format!("{{%{}", inside.replace("endgeneration", "endif"))),
            _ => out.push_str(&tag[..end]),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

fn raise_exception(message: String) -> std::result::Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// The local time in the template's strftime format.
fn strftime_now(format: String) -> std::result::Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(&format, &jiff::ZonedDateTime::now()).map_err(|error| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}"))
    })
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` spells it.
fn tojson(value: &Value, args: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = args.get("indent")?;
    let separators: Option<Vec<String>> = args.get("separators")?;
    let sort_keys: Option<bool> = args.get("sort_keys")?;
    let ensure_ascii: Option<bool> = args.get("ensure_ascii")?;
    args.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "tojson: separators must be a pair")),
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    // More than this is not indentation, and the width is repeated on every line.
    if indent.is_some_and(|width| width > 64) {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "tojson: indent above 64"));
    }
    let sort_keys = sort_keys.unwrap_or(false);
    let mut writer =
        Json { out: String::new(), indent, item, key, sort_keys, ascii: ensure_ascii.unwrap_or(false), depth: 0 };
    writer.value(value)?;
    Ok(writer.out)
}

/// Deeper than this is an attack, not data: each level takes a stack frame.
const JSON_DEPTH: usize = 100;

struct Json {
    out: String,
    indent: Option<usize>,
    item: String,
    key: String,
    sort_keys: bool,
    ascii: bool,
    depth: usize,
}

impl Json {
    fn value(&mut self, value: &Value) -> std::result::Result<(), minijinja::Error> {
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list('[', ']', &items, |json, item| json.value(item))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.list('{', '}', &keys, |json, key| {
                    json.string(key.as_str().unwrap_or(&key.to_string()));
                    let separator = json.key.clone();
                    json.out.push_str(&separator);
                    json.value(&value.get_item(key)?)
                })?;
            }
            kind => {
                let what = format!("tojson: a value of kind {kind} has no JSON form");
                return Err(minijinja::Error::new(ErrorKind::BadSerialization, what));
            }
        }
        Ok(())
    }

    fn list(
        &mut self,
        open: char,
        close: char,
        items: &[Value],
        mut write: impl FnMut(&mut Self, &Value) -> std::result::Result<(), minijinja::Error>,
    ) -> std::result::Result<(), minijinja::Error> {
        if self.depth >= JSON_DEPTH {
            return Err(minijinja::Error::new(ErrorKind::BadSerialization, "tojson: nested too deeply"));
        }
        self.depth += 1;
        self.out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                let separator = self.item.clone();
                self.out.push_str(&separator);
            }
            self.line();
            write(self, item)?;
        }
        self.depth -= 1;
        if !items.is_empty() {
            self.line();
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self) {
        if let Some(width) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', width * self.depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || self.ascii && c >= '\u{7f}' => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}
