//! From what a user names to examples: files are read in pieces, rows tokenized in parallel, and the outcome is kept.

use nibble_models::tokenizer::Tokenizer;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::{
    io::Read,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicU64, atomic::Ordering},
    time::UNIX_EPOCH,
};

use super::builder::Builder;
use super::cache::Cache;
use super::choices::Question;
use super::error::{DataError, Result};
use super::examples::{Encoder, Example, Notes};
use super::records::{Kind, Record, Records, open_text};
use super::rows::Format;
use super::spec::DataSpec;
use super::store::Examples;
use crate::{interrupt, report};

/// What turns data into examples.
#[derive(Clone, Debug, Default)]
pub struct DataOptions {
    /// Longest example in tokens; longer ones keep their front. At least 2.
    pub seq_len: usize,
    /// Rows of the model's embedding: ids must be below.
    pub vocab_size: usize,
    /// The form of all rows; `None` if the first row of each file says it.
    pub format: Option<Format>,
    /// Make every choice of a question an example, rather than the right one alone.
    pub all_choices: bool,
    /// Leave out rows that cannot be used, and count them.
    pub skip_bad_rows: bool,
    /// Folder of tokenized data; `None` for the usual one.
    pub cache: Option<PathBuf>,
}

/// Rows that are tokenized at a time: at most so many, and not many more bytes than that.
const ROWS: usize = 8192;
const BYTES: usize = 4 << 20;

/// Reads data into examples. Plain text (`.txt`) becomes the tokens of the whole file (bos first where the tokenizer adds
/// it, eos last), cut into blocks of `seq_len`; the last may be shorter. Other files have rows, see [`Format`] and
/// [`Encoder`]. Every error names the file and, where there is one, the line.
///
/// Many examples are kept in the cache and found there the next time.
///
/// # Errors
/// A file cannot be read or has a row that cannot be used (unless such rows are to be left out); or the user interrupted.
pub fn load_examples(spec: &DataSpec, tokenizer: Option<&Tokenizer>, options: &DataOptions) -> Result<Examples> {
    if options.seq_len < 2 {
        return Err(DataError::Options(format!("--seq-len is {}; expected at least 2", options.seq_len)));
    }
    let places: Vec<Vec<PathBuf>> = spec.0.iter().map(|place| place.files()).collect::<Result<_>>()?;
    let (key, bytes) = key(&places, tokenizer, options)?;
    let cache = Cache::new(options.cache.clone());
    if let Some(examples) = cache.find(&key) {
        return Ok(examples);
    }
    let bar = report::bytes_bar("tokenize", bytes);
    let mut loader = Loader {
        encoder: Encoder::new(tokenizer, options.seq_len, options.vocab_size),
        builder: Builder::new(Some(&cache)),
        options,
        bar: &bar,
    };
    let mut before = 0;
    for (place, files) in spec.0.iter().zip(&places) {
        let first = loader.builder.count();
        for path in files {
            match Kind::of(path) {
                Kind::Text => loader.blocks(path, before)?,
                _ => loader.rows(path, before)?,
            }
            before += std::fs::metadata(path).map_or(0, |file| file.len());
        }
        let count = loader.builder.count() - first;
        if count == 0 {
            let known = &loader.builder.known;
            let skipped = known
                .first_skipped
                .as_ref()
                .map(|first| format!("; {} rows were left out, the first: {first}", known.skipped));
            let what = format!("holds no examples; expected at least one row{}", skipped.unwrap_or_default());
            return Err(DataError::file(&place.path, what));
        }
        loader.builder.known.counts.push(count);
    }
    let examples = loader.builder.finish(key);
    bar.finish_and_clear();
    examples
}

/// A digest of all that the examples depend on, and the bytes of the files.
fn key(places: &[Vec<PathBuf>], tokenizer: Option<&Tokenizer>, options: &DataOptions) -> Result<(String, u64)> {
    let mut sum = Sha256::new();
    let mut bytes = 0;
    for files in places {
        sum.update(b"place\n");
        for path in files {
            let io = DataError::io;
            let file = std::fs::metadata(path).map_err(io(path))?;
            let changed = file.modified().map_err(io(path))?.duration_since(UNIX_EPOCH).unwrap_or_default();
            let path = std::fs::canonicalize(path).map_err(io(path))?;
            sum.update(format!("{path:?} {} {changed:?}\n", file.len()));
            bytes += file.len();
        }
    }
    let DataOptions { seq_len, vocab_size, format, all_choices, skip_bad_rows, cache: _ } = options;
    sum.update(format!(
        "{} {seq_len} {vocab_size} {format:?} {all_choices} {skip_bad_rows}\n",
        env!("CARGO_PKG_VERSION")
    ));
    if let Some(tokenizer) = tokenizer {
        sum.update(tokenizer.description().map_err(|error| DataError::Options(error.to_string()))?);
    }
    Ok((format!("{:x}", sum.finalize()), bytes))
}

/// What a row is encoded to.
type Encoded = (Vec<Example>, Notes, Option<Question>);

struct Loader<'a> {
    encoder: Encoder<'a>,
    builder: Builder<'a>,
    options: &'a DataOptions,
    bar: &'a indicatif::ProgressBar,
}

impl Loader<'_> {
    /// The rows of a file; `before` bytes of other files have been read.
    fn rows(&mut self, path: &Path, before: u64) -> Result<()> {
        let mut records = Records::open(path)?;
        let mut format = self.options.format;
        loop {
            if interrupt::requested() {
                return Err(DataError::Stopped);
            }
            let chunk = next_chunk(&mut records)?;
            if chunk.is_empty() {
                break;
            }
            // The first record that has a form decides for the file.
            let detect = |found: &Result<(usize, Record)>| Format::detect(&found.as_ref().ok()?.1).ok();
            format = format.or_else(|| match self.options.skip_bad_rows {
                true => chunk.iter().find_map(detect),
                false => chunk.first().and_then(detect),
            });
            if let Some(format) = format {
                self.found(format.to_string());
            }
            let (encoder, all_choices) = (&self.encoder, self.options.all_choices);
            let encode = |(line, record): (usize, Record)| -> Result<Encoded> {
                let format = format.map_or_else(|| Format::detect(&record), Ok);
                let row = format.and_then(|format| format.parse(&record));
                let encoded = row.and_then(|row| match all_choices {
                    true => encoder.encode_all(row),
                    false => encoder.encode(row).map(|(example, notes)| (vec![example], notes, None)),
                });
                encoded.map_err(|what| DataError::row(path, line, what))
            };
            let encoded: Vec<_> = chunk.into_par_iter().map(|found| found.and_then(encode)).collect();
            for found in encoded {
                self.take(found)?;
            }
            self.bar.set_position(before + records.bytes_read());
        }
        Ok(())
    }

    fn found(&mut self, form: String) {
        let forms = &mut self.builder.known.forms;
        if !forms.contains(&form) {
            forms.push(form);
        }
    }

    fn take(&mut self, found: Result<Encoded>) -> Result<()> {
        match found {
            Ok((examples, notes, question)) => {
                self.builder.known.notes += notes;
                let first = self.builder.count();
                self.builder.known.questions.extend(question.map(|question| Question { first, ..question }));
                examples.iter().try_for_each(|example| self.builder.push(example))
            }
            Err(error @ DataError::Row { .. }) if self.options.skip_bad_rows => {
                let known = &mut self.builder.known;
                known.skipped += 1;
                known.first_skipped.get_or_insert_with(|| error.to_string());
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The tokens of a text in blocks. A long text is encoded in pieces that end with a line.
    fn blocks(&mut self, path: &Path, before: u64) -> Result<()> {
        let read = Arc::new(AtomicU64::new(0));
        let mut text = open_text(path, &read)?;
        let (mut ids, mut left, mut done, mut first) = (Vec::new(), Vec::new(), 0, true);
        self.found("plain text".to_owned());
        loop {
            if interrupt::requested() {
                return Err(DataError::Stopped);
            }
            let more = text.by_ref().take(BYTES as u64).read_to_end(&mut left).map_err(DataError::io(path))?;
            let last = more < BYTES;
            let end =
                if last { left.len() } else { left.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1) };
            let piece: Vec<u8> = left.drain(..end).collect();
            let piece = String::from_utf8(piece).map_err(|error| {
                let at = done + error.utf8_error().valid_up_to();
                DataError::file(path, format!("not UTF-8 at byte {at}; expected plain text"))
            })?;
            done += piece.len();
            if done > 0 && (last || !piece.is_empty()) {
                let new = self.encoder.stretch(&piece, first, last);
                ids.extend(new.map_err(|what| DataError::file(path, what))?);
                first = false;
            }
            let whole = if last { ids.len() } else { ids.len() / self.options.seq_len * self.options.seq_len };
            let blocks: Vec<u32> = ids.drain(..whole).collect();
            // A block of one token has nothing to predict.
            for block in blocks.chunks(self.options.seq_len).filter(|block| block.len() > 1) {
                self.builder.push(&Example::all(block.to_vec()))?;
            }
            self.bar.set_position(before + read.load(Ordering::Relaxed));
            if last {
                return Ok(());
            }
        }
    }
}

/// Some records, and rows that are wrong already; none at the end of the file.
fn next_chunk(records: &mut Records) -> Result<Vec<Result<(usize, Record)>>> {
    let (mut chunk, mut bytes) = (Vec::new(), 0);
    while bytes < BYTES && chunk.len() < ROWS {
        match records.next() {
            None => break,
            Some(Ok((line, record))) => {
                bytes += match &record {
                    Record::Json(text) => text.len(),
                    Record::Fields(fields) => fields.values().map(size).sum(),
                };
                chunk.push(Ok((line, record)));
            }
            Some(Err(error)) => chunk.push(Err(error)),
        }
    }
    Ok(chunk)
}

/// Bytes of the texts in a value, more or less.
fn size(value: &serde_json::Value) -> usize {
    match value {
        serde_json::Value::String(text) => text.len(),
        serde_json::Value::Array(items) => items.iter().map(size).sum(),
        serde_json::Value::Object(fields) => fields.values().map(size).sum(),
        _ => 8,
    }
}
