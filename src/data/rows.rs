//! Rows of a data file: one JSON object a line, all of the form of the first.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use nibble_models::chat::Message;
use serde_json::{Map, Value};

use super::error::{DataError, Result};

/// Form of the rows of a file. The first row decides; where it fits several, the earliest here is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `{"messages": [{"role", "content"}, …]}`: a conversation; assistant turns are learned.
    Messages,
    /// `{"prompt", "completion"}`: the completion is learned.
    Completion,
    /// `{"instruction", "output"}` and maybe `"input"`: the output is learned.
    Instruction,
    /// `{"input_ids"}` and maybe `"labels"`: what the labels say, or everything.
    Tokens,
    /// `{"text"}`: everything is learned.
    Text,
}

const FORMATS: [Format; 5] = [Format::Messages, Format::Completion, Format::Instruction, Format::Tokens, Format::Text];

impl Format {
    /// Keys that a row of this form must have.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Format::Messages => &["messages"],
            Format::Completion => &["prompt", "completion"],
            Format::Instruction => &["instruction", "output"],
            Format::Tokens => &["input_ids"],
            Format::Text => &["text"],
        }
    }

    fn detect(row: &Map<String, Value>) -> Option<Format> {
        FORMATS.into_iter().find(|format| format.keys().iter().all(|key| row.contains_key(*key)))
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Messages => r#"{"messages":[{"role","content"},…]}"#,
            Format::Completion => r#"{"prompt","completion"}"#,
            Format::Instruction => r#"{"instruction","input","output"}"#,
            Format::Tokens => r#"{"input_ids","labels"}"#,
            Format::Text => r#"{"text"}"#,
        })
    }
}

/// One row of a data file. Keys that its form does not name are left out.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    Messages(Vec<Message>),
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

/// Reads the rows of a JSONL file one by one: an iterator of (line number from 1, row). Blank lines are passed over.
pub struct Rows {
    path: PathBuf,
    reader: BufReader<File>,
    line: usize,
    format: Option<Format>,
}

impl Rows {
    /// Opens `path`; a file that cannot be read is a [`DataError::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(DataError::io(path))?;
        Ok(Rows { path: path.to_path_buf(), reader: BufReader::new(file), line: 0, format: None })
    }

    /// The form of the rows, known once the first is read.
    pub fn format(&self) -> Option<Format> {
        self.format
    }

    fn parse(&mut self, line: &[u8]) -> std::result::Result<Row, String> {
        let value: Value = serde_json::from_slice(line).map_err(|error| {
            // The crate counts lines too, but it only ever sees this one.
            let error = error.to_string().replace("at line 1 column", "at column");
            format!("not valid JSON ({error}); expected one JSON object a line")
        })?;
        let Value::Object(row) = value else {
            return Err(format!("found {}; expected a JSON object", kind(&value)));
        };
        let found = Format::detect(&row);
        let format = match (self.format, found) {
            (Some(format), _) => format,
            (None, Some(format)) => format,
            (None, None) => {
                let keys: Vec<&str> = row.keys().map(String::as_str).collect();
                let forms: Vec<String> = FORMATS.iter().map(Format::to_string).collect();
                return Err(format!("a row with the keys {keys:?}; expected one of {}", forms.join(", ")));
            }
        };
        self.format = Some(format);
        row_of(format, &row)
    }
}

impl Iterator for Rows {
    type Item = Result<(usize, Row)>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Vec::new();
        loop {
            line.clear();
            match self.reader.read_until(b'\n', &mut line) {
                Ok(0) => return None,
                Ok(_) => self.line += 1,
                Err(error) => return Some(Err(DataError::io(&self.path)(error))),
            }
            // Some editors mark UTF-8 with a byte order mark, which is no JSON.
            let text = if self.line == 1 { line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&line) } else { &line };
            let text = text.trim_ascii();
            if text.is_empty() {
                continue;
            }
            let text = text.to_vec();
            let row = self.parse(&text).map_err(|what| DataError::row(&self.path, self.line, what));
            return Some(row.map(|row| (self.line, row)));
        }
    }
}

fn row_of(format: Format, row: &Map<String, Value>) -> std::result::Result<Row, String> {
    let expected = |key: &str, what: &str| match row.get(key) {
        None => format!("has no {key:?}; expected {format} as in the first row"),
        Some(value) => format!("{key:?} is {}; expected {what}", kind(value)),
    };
    let text = |key: &str| match row.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        _ => Err(expected(key, "a string")),
    };
    Ok(match format {
        Format::Text => Row::Text(text("text")?),
        Format::Completion => Row::Completion { prompt: text("prompt")?, completion: text("completion")? },
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
