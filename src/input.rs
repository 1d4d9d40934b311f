//! Data for a command: read, described, and looked over for the usual mistakes.

use crate::{
    data::{self, DataError, DataOptions, DataSpec, Examples, Format, Known},
    settings::as_optional_text,
};
use anyhow::{Result, ensure};
use clap::Args;
use nibble_models::tokenizer::Tokenizer;
use serde::Serialize;
use std::{fmt::Write, path::PathBuf};

/// How data is read.
#[derive(Clone, Debug, Default, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReadArgs {
    /// Form of the rows: messages, sharegpt, completion, instruction, tokens or text [default: as the first row has it]
    #[arg(long, value_name = "NAME")]
    #[serde(with = "as_optional_text", skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Leave out rows that cannot be used, and count them
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skip_bad_rows: bool,
    /// Folder in which tokenized data is kept when it is large [default: ~/.cache/nibble]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

impl ReadArgs {
    /// For examples of at most `seq_len` tokens of a vocabulary.
    pub fn options(&self, seq_len: usize, vocab_size: usize) -> DataOptions {
        let ReadArgs { format, skip_bad_rows, cache } = self.clone();
        DataOptions { seq_len, vocab_size, format, all_choices: false, skip_bad_rows, cache }
    }
}

/// Reads data to train on, and says on standard error what it is; `None` if the user interrupted.
pub fn read(
    name: &str,
    spec: &DataSpec,
    tokenizer: Option<&Tokenizer>,
    options: &DataOptions,
) -> Result<Option<Examples>> {
    let examples = match data::load_examples(spec, tokenizer, options) {
        Err(DataError::Stopped) => return Ok(None),
        examples => examples?,
    };
    let known = examples.known();
    let Known { tokens, learned, forms, .. } = known;
    crate::note!("{name:<8} {} examples, {tokens} tokens, {learned} learned; {}", examples.len(), forms.join(", "));
    eprint!("{}", warnings(known, examples.len(), options));
    Ok(Some(examples))
}

/// As [`read`], for data to evaluate on, all of which counts once.
pub fn read_held_out(
    spec: &DataSpec,
    tokenizer: Option<&Tokenizer>,
    options: &DataOptions,
) -> Result<Option<Examples>> {
    ensure!(spec.0.iter().all(|place| place.weight == 1.0), "weights are for data to train on: give {spec} without");
    read("held out", spec, tokenizer, &DataOptions { all_choices: true, ..options.clone() })
}

/// What is mostly a mistake, a line each.
fn warnings(known: &Known, examples: usize, options: &DataOptions) -> String {
    let Known { skipped, first_skipped, notes, .. } = known;
    let mut out = String::new();
    let mut warn = |count: u64, what: &str| {
        if count > 0 {
            // Writing to a string cannot fail.
            let _ = writeln!(out, "warning: {count} {what}");
        }
    };
    let first = first_skipped.as_deref().unwrap_or_default();
    warn(*skipped, &format!("rows cannot be used and were left out; the first: {first}"));
    let of = format!("of {examples} examples");
    let seq_len = options.seq_len;
    warn(
        notes.truncated,
        &format!("{of} are cut to {seq_len} tokens and lose a part of what is learned; see --seq-len"),
    );
    let endless = "learn no token that ends a text: the model will not learn to stop";
    warn(notes.endless, &format!("{of} {endless}"));
    warn(notes.double_bos, &format!("{of} begin with two bos tokens: leave the one in the text out"));
    let header = "learn the assistant's header too: the chat template has no generation prompt";
    warn(notes.header_learned, &format!("{of} {header}"));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Notes;

    #[test]
    fn warnings_count_what_is_wrong() {
        let options = DataOptions { seq_len: 7, ..DataOptions::default() };
        assert_eq!(warnings(&Known::default(), 9, &options), "");
        let notes = Notes { truncated: 1, endless: 2, double_bos: 3, header_learned: 4 };
        let known = Known { skipped: 5, first_skipped: Some("a.jsonl:3: bad".into()), notes, ..Known::default() };
        let text = warnings(&known, 9, &options);
        let starts: Vec<&str> = text.lines().map(|line| &line[..22]).collect();
        assert_eq!(
            starts,
            [
                "warning: 5 rows cannot",
                "warning: 1 of 9 exampl",
                "warning: 2 of 9 exampl",
                "warning: 3 of 9 exampl",
                "warning: 4 of 9 exampl"
            ]
        );
        assert!(text.contains("the first: a.jsonl:3: bad") && text.contains("cut to 7 tokens"), "{text}");
    }
}
