//! Rows: what a record says, once its form is known.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use nibble_models::chat::Message;
use serde_json::{Map, Value};

use super::error::{DataError, Result};
use super::records::{Record, Records};

/// Form of the rows of a file. The first row decides; where it fits several, the earliest here is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `{"messages": [{"role", "content"}, …]}`: a conversation; assistant turns are learned.
    Messages,
    /// `{"conversations": [{"from", "value"}, …]}`, as ShareGPT has them: what `gpt` says is learned.
    ShareGpt,
    /// `{"prompt", "choices", "answer"}`: the right choice is learned; an evaluation asks which is the most likely.
    Choices,
    /// `{"prompt", "completion"}`: the completion is learned.
    Completion,
    /// `{"instruction", "output"}` and maybe `"input"`: the output is learned.
    Instruction,
    /// `{"input_ids"}` and maybe `"labels"`: what the labels say, or everything.
    Tokens,
    /// `{"text"}`: everything is learned.
    Text,
}

const FORMATS: [(Format, &str); 7] = [
    (Format::Messages, "messages"),
    (Format::ShareGpt, "sharegpt"),
    (Format::Choices, "choices"),
    (Format::Completion, "completion"),
    (Format::Instruction, "instruction"),
    (Format::Tokens, "tokens"),
    (Format::Text, "text"),
];

impl Format {
    /// Keys that a row of this form must have.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Format::Messages => &["messages"],
            Format::ShareGpt => &["conversations"],
            Format::Choices => &["prompt", "choices", "answer"],
            Format::Completion => &["prompt", "completion"],
            Format::Instruction => &["instruction", "output"],
            Format::Tokens => &["input_ids"],
            Format::Text => &["text"],
        }
    }

    /// The form of a record.
    ///
    /// # Errors
    /// It is of none; the message lists them.
    pub fn detect(record: &Record) -> std::result::Result<Format, String> {
        let row = record.fields()?;
        let fits = |format: Format| format.keys().iter().all(|key| row.contains_key(*key));
        FORMATS.iter().map(|(format, _)| *format).find(|&format| fits(format)).ok_or_else(|| {
            let keys: Vec<&str> = row.keys().map(String::as_str).collect();
            let forms: Vec<String> = FORMATS.iter().map(|(format, _)| format.to_string()).collect();
            format!("a row with the keys {keys:?}; expected one of {}", forms.join(", "))
        })
    }

    /// What a record of this form says. Keys that the form does not name are left out.
    ///
    /// # Errors
    /// It is not of this form; the message says how.
    pub fn parse(self, record: &Record) -> std::result::Result<Row, String> {
        row_of(self, &*record.fields()?)
    }

    /// The form's name on the command line.
    pub fn name(self) -> &'static str {
        FORMATS.iter().find(|(format, _)| *format == self).map_or("", |(_, name)| name)
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        FORMATS.iter().find(|(_, name)| *name == text).map(|(format, _)| *format).ok_or_else(|| {
            let names: Vec<&str> = FORMATS.iter().map(|(_, name)| *name).collect();
            format!("expected {}, not {text}", names.join(", "))
        })
    }
}

impl Record {
    /// The record's keys and values, parsed if they were not.
    fn fields(&self) -> std::result::Result<std::borrow::Cow<'_, Map<String, Value>>, String> {
        let text = match self {
            Record::Fields(fields) => return Ok(std::borrow::Cow::Borrowed(fields)),
            Record::Json(text) => text.trim_ascii(),
        };
        let value: Value = serde_json::from_slice(text).map_err(|error| {
            // The crate counts lines too, but it only ever sees this one record.
            let error = error.to_string().replace("at line 1 column", "at column");
            format!("not valid JSON ({error}); expected one JSON object a line")
        })?;
        match value {
            Value::Object(row) => Ok(std::borrow::Cow::Owned(row)),
            other => Err(format!("found {}; expected a JSON object", kind(&other))),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Messages => r#"{"messages":[{"role","content"},…]}"#,
            Format::ShareGpt => r#"{"conversations":[{"from","value"},…]}"#,
            Format::Choices => r#"{"prompt","choices","answer"}"#,
            Format::Completion => r#"{"prompt","completion"}"#,
            Format::Instruction => r#"{"instruction","input","output"}"#,
            Format::Tokens => r#"{"input_ids","labels"}"#,
            Format::Text => r#"{"text"}"#,
        })
    }
}

/// One row of a data file.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    Messages(Vec<Message>),
    Choices {
        prompt: String,
        /// At least one; none is empty.
        choices: Vec<String>,
        /// The right one, from 0.
        answer: usize,
    },
    Completion {
        prompt: String,
        completion: String,
    },
    Instruction {
        instruction: String,
        /// Empty if the row has none.
        input: String,
        output: String,
    },
    Tokens {
        ids: Vec<u32>,
        /// As many as `ids`, -100 for a token that is not learned; `None` learns all.
        labels: Option<Vec<i64>>,
    },
    Text(String),
}

/// Reads the rows of a file one by one: an iterator of (line from 1, row). The first row decides the form.
pub struct Rows {
    path: std::path::PathBuf,
    records: Records,
    format: Option<Format>,
}

impl Rows {
    /// Opens `path`, which must not be plain text; see [`Records::open`].
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Rows { path: path.to_path_buf(), records: Records::open(path)?, format: None })
    }

    /// The form of the rows, known once the first is read.
    pub fn format(&self) -> Option<Format> {
        self.format
    }
}

impl Iterator for Rows {
    type Item = Result<(usize, Row)>;

    fn next(&mut self) -> Option<Self::Item> {
        let (line, record) = match self.records.next()? {
            Ok(found) => found,
            Err(error) => return Some(Err(error)),
        };
        let format = self.format.map_or_else(|| Format::detect(&record), Ok);
        let row = format.and_then(|format| {
            self.format = Some(format);
            format.parse(&record)
        });
        Some(row.map(|row| (line, row)).map_err(|what| DataError::row(&self.path, line, what)))
    }
}

fn row_of(format: Format, row: &Map<String, Value>) -> std::result::Result<Row, String> {
    let expected = |key: &str, what: &str| match row.get(key) {
        None => format!("has no {key:?}; expected {format}, the form of the first row or of --format"),
        Some(value) => format!("{key:?} is {}; expected {what}", kind(value)),
    };
    let text = |key: &str| match row.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        _ => Err(expected(key, "a string")),
    };
    Ok(match format {
        Format::Text => Row::Text(text("text")?),
        Format::Completion => Row::Completion { prompt: text("prompt")?, completion: text("completion")? },
        Format::Choices => {
            let choices: Option<Vec<String>> = match row.get("choices") {
                Some(Value::Array(choices)) => choices.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
                _ => None,
            };
            let choices = choices.ok_or_else(|| expected("choices", "a list of strings"))?;
            if choices.iter().any(String::is_empty) {
                return Err("one of the \"choices\" is empty".to_owned());
            }
            let answer = row.get("answer").and_then(|answer| answer_of(answer, &choices)).ok_or_else(|| {
                expected(
                    "answer",
                    &format!("a number from 0 to {}, a letter or the right choice", choices.len().max(1) - 1),
                )
            })?;
            Row::Choices { prompt: text("prompt")?, choices, answer }
        }
        Format::Instruction => {
            let input = match row.get("input") {
                None | Some(Value::Null) => String::new(),
                Some(_) => text("input")?,
            };
            Row::Instruction { instruction: text("instruction")?, input, output: text("output")? }
        }
        Format::Messages => {
            let Some(Value::Array(turns)) = row.get("messages") else {
                return Err(expected("messages", "a list of {\"role\",\"content\"}"));
            };
            let turn = |(i, turn): (usize, &Value)| match (&turn["role"], &turn["content"]) {
                (Value::String(role), Value::String(content)) => Ok(Message::new(role.as_str(), content.as_str())),
                _ => Err(format!("message {} is not of the form {{\"role\",\"content\"}} with two strings", i + 1)),
            };
            Row::Messages(turns.iter().enumerate().map(turn).collect::<std::result::Result<_, _>>()?)
        }
        Format::ShareGpt => {
            let Some(Value::Array(turns)) = row.get("conversations") else {
                return Err(expected("conversations", "a list of {\"from\",\"value\"}"));
            };
            let turn = |(i, turn): (usize, &Value)| match (&turn["from"], &turn["value"]) {
                (Value::String(from), Value::String(value)) => Ok(Message::new(share_gpt_role(from), value.as_str())),
                _ => Err(format!("turn {} is not of the form {{\"from\",\"value\"}} with two strings", i + 1)),
            };
            Row::Messages(turns.iter().enumerate().map(turn).collect::<std::result::Result<_, _>>()?)
        }
        Format::Tokens => {
            let Some(Value::Array(ids)) = row.get("input_ids") else {
                return Err(expected("input_ids", "a list of token ids"));
            };
            let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
            let ids: Vec<u32> = ids
                .iter()
                .map(|value| id(value).ok_or_else(|| format!("\"input_ids\" holds {value}, which is no token id")))
                .collect::<std::result::Result<_, _>>()?;
            let labels = match row.get("labels") {
                None | Some(Value::Null) => None,
                Some(Value::Array(labels)) => Some(labels_of(labels, ids.len())?),
                Some(_) => return Err(expected("labels", "a list of token ids or -100")),
            };
            Row::Tokens { ids, labels }
        }
    })
}

/// The right one of `choices`: by its number from 0, as it is written there, or by its letter.
fn answer_of(answer: &Value, choices: &[String]) -> Option<usize> {
    let found = match answer {
        Value::String(text) => choices.iter().position(|choice| choice == text).or_else(|| match text.as_bytes() {
            [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
            _ => text.trim().parse().ok(),
        }),
        number => number.as_u64().and_then(|number| usize::try_from(number).ok()),
    };
    found.filter(|&found| found < choices.len())
}

/// The role that chat templates know by the speaker of a ShareGPT turn. Others are roles already (`tool`).
fn share_gpt_role(from: &str) -> &str {
    match from {
        "human" => "user",
        "gpt" | "chatgpt" | "model" => "assistant",
        other => other,
    }
}

fn labels_of(labels: &[Value], ids: usize) -> std::result::Result<Vec<i64>, String> {
    if labels.len() != ids {
        return Err(format!("{} labels for {ids} input_ids; expected one each", labels.len()));
    }
    let label = |value: &Value| match value.as_i64() {
        Some(label) if label == super::IGNORE || u32::try_from(label).is_ok() => Ok(label),
        _ => Err(format!("\"labels\" holds {value}; expected a token id or -100")),
    };
    labels.iter().map(label).collect()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
