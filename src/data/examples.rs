//! Examples: token ids with the label of each.

use std::path::Path;

use nibble_models::chat::ChatTemplate;
use nibble_models::tokenizer::Tokenizer;

use super::error::{DataError, Result};
use super::rows::{Row, Rows};
use super::{IGNORE, messages};

/// A sequence to train on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    pub ids: Vec<u32>,
    /// As many as `ids`, not shifted: `labels[i]` is `ids[i]`, or [`IGNORE`] if that token is not learned.
    pub labels: Vec<i64>,
}

impl Example {
    /// An example of which every token is learned.
    fn all(ids: Vec<u32>) -> Self {
        let labels = ids.iter().map(|&id| i64::from(id)).collect();
        Example { ids, labels }
    }

    /// Tokens that a loss is taken of. The first token is not among them: nothing comes before it to predict it from.
    pub fn unmasked(&self) -> usize {
        self.labels.iter().skip(1).filter(|&&label| label != IGNORE).count()
    }

    /// Tokens before the first learned one; all of them if none is learned.
    pub fn prompt_len(&self) -> usize {
        self.labels.iter().position(|&label| label != IGNORE).unwrap_or(self.ids.len())
    }
}

/// What turns rows into examples.
#[derive(Clone, Copy, Debug)]
pub struct DataOptions {
    /// Longest example in tokens; longer ones keep their front. At least 2.
    pub seq_len: usize,
    /// Rows of the model's embedding: ids must be below.
    pub vocab_size: usize,
}

/// Reads `path` into examples. `.txt` files are plain text, everything else is JSONL (see [`super::Format`]).
///
/// - Plain text: the tokens of the whole file (bos first where the tokenizer adds it, eos last), cut into blocks of
///   `seq_len`; the last may be shorter.
/// - `text`: bos where the tokenizer adds it, the text, eos.
/// - `prompt`/`completion` and `instruction`: bos where the tokenizer adds it, the prompt's tokens, the completion's
///   tokens, eos. The two are encoded apart, so that the prompt's tokens are those that generation will start from.
///   Completion and eos are learned.
/// - `messages`: by the model's chat template; the assistant's turns with their end token are learned.
/// - `input_ids`: as they are.
///
/// Without a tokenizer only `input_ids` can be read. eos is left out if the tokenizer has none. Every error names the
/// file and, where there is one, the line.
pub fn load_examples(path: &Path, tokenizer: Option<&Tokenizer>, options: &DataOptions) -> Result<Vec<Example>> {
    if options.seq_len < 2 {
        return Err(DataError::Options(format!("--seq-len is {}; expected at least 2", options.seq_len)));
    }
    let examples = match path.extension().is_some_and(|extension| extension == "txt") {
        true => blocks(path, tokenizer, options)?,
        false => rows(path, tokenizer, options)?,
    };
    if examples.is_empty() {
        return Err(DataError::file(path, "holds no examples; expected at least one row"));
    }
    Ok(examples)
}

fn blocks(path: &Path, tokenizer: Option<&Tokenizer>, options: &DataOptions) -> Result<Vec<Example>> {
    let bytes = std::fs::read(path).map_err(DataError::io(path))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        DataError::file(path, format!("not UTF-8 at byte {}; expected plain text", error.utf8_error().valid_up_to()))
    })?;
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let file = |what: String| DataError::file(path, what);
    let ids = tokenizer.ok_or_else(no_tokenizer).and_then(|tokenizer| whole(&text, tokenizer)).map_err(file)?;
    check_ids(&ids, options.vocab_size).map_err(file)?;
    // A block of one token has nothing to predict.
    Ok(ids.chunks(options.seq_len).filter(|block| block.len() > 1).map(|block| Example::all(block.to_vec())).collect())
}

fn rows(path: &Path, tokenizer: Option<&Tokenizer>, options: &DataOptions) -> Result<Vec<Example>> {
    // Only conversations need the template: one that does not compile must not stop the other forms.
    let template = tokenizer.map_or(Ok(None), |tokenizer| tokenizer.chat()).map_err(|error| error.to_string());
    let mut examples = Vec::new();
    for row in Rows::open(path)? {
        let (line, row) = row?;
        let at = |what: String| DataError::row(path, line, what);
        let example = example(row, tokenizer, template.as_ref()).map_err(at)?;
        examples.push(finish(example, options).map_err(at)?);
    }
    Ok(examples)
}

fn no_tokenizer() -> String {
    "holds text, but the model comes without a tokenizer; add its tokenizer.json, or give {\"input_ids\"} rows"
        .to_owned()
}

fn example(
    row: Row,
    tokenizer: Option<&Tokenizer>,
    template: std::result::Result<&Option<ChatTemplate>, &String>,
) -> std::result::Result<Example, String> {
    let needed = || tokenizer.ok_or_else(no_tokenizer);
    match row {
        Row::Text(text) => {
            if text.is_empty() {
                return Err("\"text\" is empty; remove the row".to_owned());
            }
            whole(&text, needed()?).map(Example::all)
        }
        Row::Completion { prompt, completion } => completed(&prompt, &completion, "completion", needed()?),
        Row::Instruction { instruction, input, output } => {
            completed(&instruction_prompt(&instruction, &input), &output, "output", needed()?)
        }
        Row::Messages(turns) => {
            let tokenizer = needed()?;
            let template = template.map_err(String::clone)?.as_ref().ok_or(
                "the model has no chat template, so {\"messages\"} cannot be written as its text; \
                 use {\"prompt\",\"completion\"} rows",
            )?;
            let (ids, labels) = messages::encode(&turns, template, tokenizer)?;
            Ok(Example { ids, labels })
        }
        Row::Tokens { ids, labels: Some(labels) } => Ok(Example { ids, labels }),
        Row::Tokens { ids, labels: None } => Ok(Example::all(ids)),
    }
}

/// bos where the tokenizer adds it, the text, eos.
fn whole(text: &str, tokenizer: &Tokenizer) -> std::result::Result<Vec<u32>, String> {
    let mut ids = start(text, tokenizer)?;
    ids.extend(tokenizer.eos());
    Ok(ids)
}

fn start(text: &str, tokenizer: &Tokenizer) -> std::result::Result<Vec<u32>, String> {
    // Not `encode(…, true)`: that might add eos in the middle of an example.
    let mut ids: Vec<u32> = tokenizer.bos().filter(|_| tokenizer.add_bos()).into_iter().collect();
    ids.extend(tokenizer.encode(text, false).map_err(|error| error.to_string())?);
    Ok(ids)
}

fn completed(
    prompt: &str,
    completion: &str,
    name: &str,
    tokenizer: &Tokenizer,
) -> std::result::Result<Example, String> {
    if completion.is_empty() {
        return Err(format!("{name:?} is empty, so there is nothing to learn; remove the row or fill it"));
    }
    let mut ids = start(prompt, tokenizer)?;
    let learned = ids.len();
    // A completion after an empty prompt is the start of the text.
    let new =
        if prompt.is_empty() { tokenizer.encode(completion, false) } else { tokenizer.encode_continuation(completion) };
    ids.extend(new.map_err(|error| error.to_string())?);
    ids.extend(tokenizer.eos());
    let mut example = Example::all(ids);
    example.labels[..learned].fill(IGNORE);
    Ok(example)
}

/// The prompt that an instruction row is trained with, and that a question to the trained model should use.
/// The sections are Alpaca's (Taori et al., 2023); `input` may be empty and then has none.
pub fn instruction_prompt(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        return format!(
            "Here is a task. Write a response that completes it.\n\n\
             ### Instruction:\n{instruction}\n\n### Response:\n"
        );
    }
    format!(
        "Here is a task and the input it is about. Write a response that completes it.\n\n\
         ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    )
}

/// Cuts to `seq_len` and checks that ids fit the model and that something is left to learn.
fn finish(mut example: Example, options: &DataOptions) -> std::result::Result<Example, String> {
    check_ids(&example.ids, options.vocab_size)?;
    if let Some(label) = example.labels.iter().find(|&&label| label >= options.vocab_size as i64) {
        return Err(format!("the label {label} is outside of the model's vocabulary of {}", options.vocab_size));
    }
    let (tokens, learnable) = (example.ids.len(), example.unmasked());
    if learnable == 0 {
        return Err(match example.labels.iter().any(|&label| label != IGNORE) {
            true => format!("{tokens} token(s), of which none is left to predict; expected at least 2 tokens"),
            false => "no label is left to learn (all are -100)".to_owned(),
        });
    }
    example.ids.truncate(options.seq_len);
    example.labels.truncate(options.seq_len);
    if example.unmasked() == 0 {
        return Err(format!(
            "the completion is empty after truncation: {tokens} tokens are cut to {}, all of them prompt; \
             raise --seq-len or shorten the prompt",
            options.seq_len
        ));
    }
    Ok(example)
}

fn check_ids(ids: &[u32], vocab_size: usize) -> std::result::Result<(), String> {
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => Err(format!(
            "the token id {id} is outside of the model's vocabulary of {vocab_size}; \
             does the tokenizer belong to this model?"
        )),
        None => Ok(()),
    }
}

/// A stretch of an example's text that is learned throughout, or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    pub learned: bool,
    pub text: String,
}

/// The text of an example in stretches, special tokens included: what a person checks a mask by.
pub fn preview(example: &Example, tokenizer: &Tokenizer) -> nibble_models::Result<Vec<Span>> {
    let learned: Vec<bool> = example.labels.iter().map(|&label| label != IGNORE).collect();
    let mut spans = Vec::new();
    let mut start = 0;
    for run in learned.chunk_by(|a, b| a == b) {
        let end = start + run.len();
        spans.push(Span { learned: run[0], text: tokenizer.decode(&example.ids[start..end], false)? });
        start = end;
    }
    Ok(spans)
}
