//! Examples: token ids with the label of each, made from rows.

use nibble_models::chat::ChatTemplate;
use nibble_models::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

use super::rows::Row;
use super::{IGNORE, choices::Question, messages};

/// A sequence to train on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    pub ids: Vec<u32>,
    /// As many as `ids`, not shifted: `labels[i]` is `ids[i]`, or [`IGNORE`] if that token is not learned.
    pub labels: Vec<i64>,
}

impl Example {
    /// An example of which every token is learned.
    pub(super) fn all(ids: Vec<u32>) -> Self {
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

/// How many examples have what mostly is a mistake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Notes {
    /// Cut to the longest length, with a part of what was to be learned.
    pub truncated: u64,
    /// No token is learned that ends a text.
    pub endless: u64,
    /// Two bos at the start.
    pub double_bos: u64,
    /// The name of the assistant is learned as if it said it: the template has no generation prompt.
    pub header_learned: u64,
}

impl std::ops::AddAssign for Notes {
    fn add_assign(&mut self, other: Notes) {
        self.truncated += other.truncated;
        self.endless += other.endless;
        self.double_bos += other.double_bos;
        self.header_learned += other.header_learned;
    }
}

/// Turns rows into examples:
///
/// - `text`: bos where the tokenizer adds it, the text, eos.
/// - `prompt`/`completion` and `instruction`: bos where the tokenizer adds it, the prompt's tokens, the completion's
///   tokens, eos. The two are encoded apart, so that the prompt's tokens are those that generation will start from.
///   Completion and eos are learned.
/// - `choices`: as the completion that is right.
/// - `messages`: by the model's chat template; the assistant's turns with their end token are learned.
/// - `input_ids`: as they are.
///
/// Without a tokenizer only `input_ids` can be read. eos is left out if the tokenizer has none. Examples longer than
/// `seq_len` keep their front.
pub struct Encoder<'a> {
    tokenizer: Option<&'a Tokenizer>,
    /// Only conversations need the template: one that does not compile must not stop the other forms.
    template: std::result::Result<Option<ChatTemplate>, String>,
    seq_len: usize,
    vocab_size: usize,
}

impl<'a> Encoder<'a> {
    /// For examples of at most `seq_len` tokens, which are below `vocab_size`.
    pub fn new(tokenizer: Option<&'a Tokenizer>, seq_len: usize, vocab_size: usize) -> Self {
        let template = tokenizer.map_or(Ok(None), |tokenizer| tokenizer.chat()).map_err(|error| error.to_string());
        Encoder { tokenizer, template, seq_len, vocab_size }
    }

    /// The example of a row, and what there is to say about it.
    ///
    /// # Errors
    /// It cannot be learned from; the message says why.
    pub fn encode(&self, row: Row) -> std::result::Result<(Example, Notes), String> {
        let mut notes = Notes::default();
        let example = match row {
            Row::Text(text) => {
                if text.is_empty() {
                    return Err("\"text\" is empty; remove the row".to_owned());
                }
                whole(&text, self.tokenizer()?).map(Example::all)?
            }
            Row::Choices { prompt, choices, answer } => {
                completed(&prompt, &choices[answer], "choices", self.tokenizer()?)?
            }
            Row::Completion { prompt, completion } => completed(&prompt, &completion, "completion", self.tokenizer()?)?,
            Row::Instruction { instruction, input, output } => {
                completed(&instruction_prompt(&instruction, &input), &output, "output", self.tokenizer()?)?
            }
            Row::Messages(turns) => {
                let tokenizer = self.tokenizer()?;
                let template = self.template.as_ref().map_err(String::clone)?.as_ref().ok_or(
                    "the model has no chat template, so conversations cannot be written as its text; \
                     use {\"prompt\",\"completion\"} rows",
                )?;
                let conversation = messages::encode(&turns, template, tokenizer)?;
                notes.header_learned = conversation.header_learned.into();
                Example { ids: conversation.ids, labels: conversation.labels }
            }
            Row::Tokens { ids, labels: Some(labels) } => Example { ids, labels },
            Row::Tokens { ids, labels: None } => Example::all(ids),
        };
        if let Some(tokenizer) = self.tokenizer {
            let ends = |label: &i64| u32::try_from(*label).is_ok_and(|id| tokenizer.eos_ids().contains(&id));
            notes.endless = (!example.labels.iter().any(ends)).into();
            notes.double_bos = matches!(example.ids[..], [a, b, ..] if a == b && tokenizer.bos() == Some(a)).into();
        }
        self.finish(example, notes)
    }

    /// As [`Encoder::encode`], with every choice of a question as an example; the question's `first` is still 0.
    ///
    /// # Errors
    /// As [`Encoder::encode`], for any of the choices.
    pub fn encode_all(&self, row: Row) -> std::result::Result<(Vec<Example>, Notes, Option<Question>), String> {
        let Row::Choices { prompt, choices, answer } = row else {
            return self.encode(row).map(|(example, notes)| (vec![example], notes, None));
        };
        let bytes = choices.iter().map(String::len).collect();
        let question = Question { first: 0, right: answer, bytes, end: self.tokenizer()?.eos() };
        let (mut examples, mut all) = (Vec::new(), Notes::default());
        for completion in choices {
            let (example, notes) = self.encode(Row::Completion { prompt: prompt.clone(), completion })?;
            examples.push(example);
            all += notes;
        }
        Ok((examples, all, Some(question)))
    }

    /// The tokens of a text as [`Row::Text`] would have them, to be cut into blocks; `first` and `last` say whether it is
    /// the start and the end of its file.
    pub(super) fn stretch(&self, text: &str, first: bool, last: bool) -> std::result::Result<Vec<u32>, String> {
        let tokenizer = self.tokenizer()?;
        let mut ids = match first {
            true => start(text, tokenizer)?,
            false => tokenizer.encode_continuation(text).map_err(|error| error.to_string())?,
        };
        ids.extend(tokenizer.eos().filter(|_| last));
        check_ids(&ids, self.vocab_size)?;
        Ok(ids)
    }

    fn tokenizer(&self) -> std::result::Result<&'a Tokenizer, String> {
        self.tokenizer.ok_or_else(|| {
            "holds text, but the model comes without a tokenizer; add its tokenizer.json, or give {\"input_ids\"} rows"
                .to_owned()
        })
    }

    /// Cuts to `seq_len` and checks that ids fit the model and that something is left to learn.
    fn finish(&self, mut example: Example, mut notes: Notes) -> std::result::Result<(Example, Notes), String> {
        check_ids(&example.ids, self.vocab_size)?;
        if let Some(label) = example.labels.iter().find(|&&label| label >= self.vocab_size as i64) {
            return Err(format!("the label {label} is outside of the model's vocabulary of {}", self.vocab_size));
        }
        let (tokens, learnable) = (example.ids.len(), example.unmasked());
        if learnable == 0 {
            return Err(match example.labels.iter().any(|&label| label != IGNORE) {
                true => format!("{tokens} token(s), of which none is left to predict; expected at least 2 tokens"),
                false => "no label is left to learn (all are -100)".to_owned(),
            });
        }
        example.ids.truncate(self.seq_len);
        example.labels.truncate(self.seq_len);
        let left = example.unmasked();
        if left == 0 {
            return Err(format!(
                "the completion is empty after truncation: {tokens} tokens are cut to {}, all of them prompt; \
                 raise --seq-len or shorten the prompt",
                self.seq_len
            ));
        }
        notes.truncated = (left < learnable).into();
        Ok((example, notes))
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
    let new = match (prompt, ids.last()) {
        ("", _) | (_, None) => tokenizer.encode(completion, false),
        (_, Some(&last)) => tokenizer.encode_after(last, completion),
    };
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
