//! What a data file holds, for people to read.

use std::fmt::Write;
use std::path::Path;

use super::error::{DataError, Result};
use super::rows::{Row, Rows};

/// Characters of a text that are shown.
const SHOWN: usize = 200;

/// Describes a JSONL or (`.txt`) plain text file in lines of `name  value`: the form of its rows, their number and the
/// first one. Every row is read, so a file that is described here has no row of the wrong form.
///
/// # Errors
/// The file cannot be read, is empty, or has a row of the wrong form, which is named by its line.
pub fn describe(path: &Path) -> Result<String> {
    let mut out = String::new();
    let mut add = |name: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{name:<14} {value}");
    };
    if path.extension().is_some_and(|extension| extension == "txt") {
        let text = std::fs::read(path).map_err(DataError::io(path))?;
        let text = String::from_utf8(text).map_err(|error| {
            DataError::file(path, format!("not UTF-8 at byte {}", error.utf8_error().valid_up_to()))
        })?;
        if text.is_empty() {
            return Err(DataError::file(path, "holds no text"));
        }
        add("format", "plain text");
        add("lines", &text.lines().count().to_string());
        add("bytes", &text.len().to_string());
        add("starts with", &shown(&text));
        return Ok(out);
    }
    let mut rows = Rows::open(path)?;
    let (line, first) = rows
        .next()
        .transpose()?
        .ok_or_else(|| DataError::file(path, "holds no examples; expected at least one row"))?;
    let mut count = 1;
    for row in rows.by_ref() {
        row?;
        count += 1;
    }
    add("format", &rows.format().map_or(String::new(), |format| format.to_string()));
    add("rows", &count.to_string());
    add("first row", &format!("line {line}"));
    match first {
        Row::Text(text) => add("  text", &shown(&text)),
        Row::Choices { prompt, choices, answer } => {
            add("  prompt", &shown(&prompt));
            choices.iter().for_each(|choice| add("  choice", &shown(choice)));
            add("  answer", &answer.to_string());
        }
        Row::Completion { prompt, completion } => {
            add("  prompt", &shown(&prompt));
            add("  completion", &shown(&completion));
        }
        Row::Instruction { instruction, input, output } => {
            add("  instruction", &shown(&instruction));
            add("  input", &shown(&input));
            add("  output", &shown(&output));
        }
        Row::Messages(turns) => turns.iter().for_each(|turn| add(&format!("  {}", turn.role), &shown(&turn.content))),
        Row::Tokens { ids, labels } => {
            add("  input_ids", &list(&ids));
            add("  labels", &labels.map_or("none: every token is learned".to_owned(), |labels| list(&labels)));
        }
    }
    Ok(out)
}

/// The start of a text, in quotes and with its line ends escaped.
fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}… ({} characters)", &text[..end], text.chars().count()),
        None => format!("{text:?}"),
    }
}

/// The start of a list.
fn list<T: std::fmt::Display>(values: &[T]) -> String {
    let start: Vec<String> = values.iter().take(16).map(T::to_string).collect();
    let rest = if values.len() > start.len() { ", …" } else { "" };
    format!("[{}{rest}] ({} tokens)", start.join(", "), values.len())
}
