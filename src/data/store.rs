//! Examples at rest: in memory while they are few, in a file of the cache when they are many. Either way one is read at a
//! time, so that memory does not grow with the data.
//!
//! The bytes, in little endian: the words of all examples, an entry for each, and as JSON what is known of them all
//! ([`Known`]), followed by its length as u64 and [`MAGIC`]. A word is a token id, with the top bit set if it is learned.
//! Where labels are not the ids themselves, the words of the labels follow those of the ids.

use super::error::{DataError, Result};
use super::examples::{Example, Notes};
use super::{IGNORE, builder::Builder, choices::Question};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Ends a file of examples; another layout has another number.
pub(super) const MAGIC: &[u8; 8] = b"nibble-1";
/// Bytes of an entry: offset (u64), tokens (u32, top bit: labels follow).
const ENTRY: usize = 12;
/// Of a word: it is learned; of an entry's tokens: labels follow.
pub(super) const TOP: u32 = 1 << 31;

/// What is known of all examples.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Known {
    /// What they were made from, see [`Cache`].
    pub key: String,
    /// Of tokens and labels.
    pub digest: String,
    /// How many each place of the data has.
    pub counts: Vec<usize>,
    pub tokens: u64,
    pub learned: u64,
    /// Rows that were left out, and what is wrong with the first of them.
    pub skipped: u64,
    pub first_skipped: Option<String>,
    /// The forms of rows that were found.
    pub forms: Vec<String>,
    pub notes: Notes,
    /// Where all choices of a question are examples.
    pub questions: Vec<Question>,
}

/// Examples, to be read one by one in any order.
#[derive(Debug)]
pub struct Examples {
    source: Source,
    /// Where the entries start, in bytes.
    entries: u64,
    known: Known,
    count: usize,
}

/// Where examples are.
#[derive(Debug)]
pub(super) enum Source {
    Memory(Vec<u8>),
    File(PathBuf, Mutex<File>),
}

impl Examples {
    /// Examples that a builder has written: `entries` is where their entries start.
    pub(super) fn new(source: Source, entries: u64, known: Known, count: usize) -> Self {
        Examples { source, entries, known, count }
    }

    /// None.
    pub fn none() -> Self {
        Examples { source: Source::Memory(Vec::new()), entries: 0, known: Known::default(), count: 0 }
    }

    /// These.
    ///
    /// # Errors
    /// There are too many for memory and no place to write them.
    pub fn of(examples: &[Example]) -> Result<Self> {
        let mut builder = Builder::new(None);
        examples.iter().try_for_each(|example| builder.push(example))?;
        builder.known.counts = vec![examples.len()];
        builder.finish(String::new())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn known(&self) -> &Known {
        &self.known
    }

    /// Example number `index`.
    ///
    /// # Errors
    /// The file cannot be read or is damaged.
    ///
    /// # Panics
    /// There is none of this number.
    pub fn get(&self, index: usize) -> Result<Example> {
        assert!(index < self.count, "example {index} of {}", self.count);
        let mut entry = [0; ENTRY];
        self.read(self.entries + (index * ENTRY) as u64, &mut entry)?;
        let (offset, tokens, labelled) = decode_entry(&entry);
        let words = tokens as u64 * if labelled { 2 } else { 1 };
        if offset.checked_add(4 * words).is_none_or(|end| end > self.entries) {
            return Err(self.damaged());
        }
        let mut bytes = vec![0; 4 * words as usize];
        self.read(offset, &mut bytes)?;
        let words: Vec<u32> = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let (ids, labels) = words.split_at(tokens as usize);
        let label = |word: &u32| if word & TOP == 0 { IGNORE } else { i64::from(word & !TOP) };
        let labels = (if labelled { labels } else { ids }).iter().map(label).collect();
        Ok(Example { ids: ids.iter().map(|word| word & !TOP).collect(), labels })
    }

    /// All of them, one by one.
    pub fn iter(&self) -> impl Iterator<Item = Result<Example>> {
        (0..self.count).map(|index| self.get(index))
    }

    /// Tokens of each.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn lengths(&self) -> Result<Vec<u32>> {
        const AT_ONCE: usize = 1 << 14;
        let mut lengths = Vec::with_capacity(self.count);
        let mut bytes = vec![0; ENTRY * AT_ONCE.min(self.count)];
        while lengths.len() < self.count {
            let bytes = &mut bytes[..ENTRY * AT_ONCE.min(self.count - lengths.len())];
            self.read(self.entries + (lengths.len() * ENTRY) as u64, bytes)?;
            lengths.extend(bytes.as_chunks().0.iter().map(|entry| decode_entry(entry).1));
        }
        Ok(lengths)
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        match &self.source {
            Source::Memory(held) => {
                let held = held.get(offset as usize..).and_then(|rest| rest.get(..bytes.len()));
                bytes.copy_from_slice(held.ok_or_else(|| self.damaged())?);
                Ok(())
            }
            Source::File(path, file) => {
                // A reader that panicked left nothing half done: every read says where.
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(bytes)).map_err(DataError::io(path))
            }
        }
    }

    fn damaged(&self) -> DataError {
        match &self.source {
            Source::Memory(_) => DataError::Options("damaged examples".to_owned()),
            Source::File(path, _) => DataError::file(path, "is damaged; remove it, and it will be made again"),
        }
    }

    /// Opens a file of examples; `None` if it is not one, or not whole.
    pub(super) fn open(path: &Path) -> Option<Self> {
        let mut file = File::open(path).ok()?;
        let size = file.metadata().ok()?.len();
        let mut end = [0; 16];
        file.seek(SeekFrom::Start(size.checked_sub(16)?)).ok()?;
        file.read_exact(&mut end).ok()?;
        let (length, magic) = end.split_at(8);
        let length = u64::from_le_bytes(length.try_into().ok()?);
        let start = (size - 16).checked_sub(length).filter(|_| magic == MAGIC && length < 1 << 24)?;
        file.seek(SeekFrom::Start(start)).ok()?;
        let mut text = vec![0; length as usize];
        file.read_exact(&mut text).ok()?;
        let known: Known = serde_json::from_slice(&text).ok()?;
        let count = known.counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count))?;
        let entries = start.checked_sub((count as u64).checked_mul(ENTRY as u64)?)?;
        Some(Examples { source: Source::File(path.to_path_buf(), Mutex::new(file)), entries, known, count })
    }
}

fn decode_entry(entry: &[u8; ENTRY]) -> (u64, u32, bool) {
    let (mut offset, mut tokens) = ([0; 8], [0; 4]);
    offset.copy_from_slice(&entry[..8]);
    tokens.copy_from_slice(&entry[8..]);
    let tokens = u32::from_le_bytes(tokens);
    (u64::from_le_bytes(offset), tokens & !TOP, tokens & TOP != 0)
}
