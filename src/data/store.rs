//! Examples at rest: in memory while they are few, in a file of the cache when they are many. Either way one is read at a
//! time, so that memory does not grow with the data.
//!
//! The bytes, in little endian: the words of all examples, an entry for each, and as JSON what is known of them all
//! ([`Known`]), followed by its length as u64 and [`MAGIC`]. A word is a token id, with the top bit set if it is learned.
//! Where labels are not the ids themselves, the words of the labels follow those of the ids.

use super::error::{DataError, Result};
use super::examples::{Example, Notes};
use super::{IGNORE, cache::Cache, choices::Question};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    fs::File,
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};
use tempfile::{NamedTempFile, SpooledTempFile};

/// Ends a file of examples; another layout has another number.
const MAGIC: &[u8; 8] = b"nibble-1";
/// Bytes of an entry: offset (u64), tokens (u32, top bit: labels follow).
const ENTRY: usize = 12;
const TOP: u32 = 1 << 31;
/// Bytes of words and of entries that are held in memory.
const HELD: usize = 16 << 20;

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

#[derive(Debug)]
enum Source {
    Memory(Vec<u8>),
    File(PathBuf, Mutex<File>),
}

impl Examples {
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

/// Writes examples down as they come.
pub(super) struct Builder<'a> {
    /// Where they go when they are many.
    cache: Option<&'a Cache>,
    words: Sink,
    entries: SpooledTempFile,
    offset: u64,
    sum: Sha256,
    count: usize,
    pub known: Known,
}

enum Sink {
    Memory(Vec<u8>),
    File(BufWriter<NamedTempFile>),
}

impl<'a> Builder<'a> {
    pub fn new(cache: Option<&'a Cache>) -> Self {
        Builder {
            cache,
            words: Sink::Memory(Vec::new()),
            entries: SpooledTempFile::new(HELD),
            offset: 0,
            sum: Sha256::new(),
            count: 0,
            known: Known::default(),
        }
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// Adds an example. Its ids and labels are below 2³¹.
    pub fn push(&mut self, example: &Example) -> Result<()> {
        let Example { ids, labels } = example;
        let word = |label: &i64| if *label == IGNORE { 0 } else { TOP | *label as u32 };
        let own = ids.iter().zip(labels).all(|(&id, &label)| label == IGNORE || label == i64::from(id));
        let mut bytes = Vec::with_capacity(4 * ids.len());
        for (id, label) in ids.iter().zip(labels) {
            let learned = if own && *label != IGNORE { TOP } else { 0 };
            bytes.extend((id | learned).to_le_bytes());
        }
        if !own {
            labels.iter().for_each(|label| bytes.extend(word(label).to_le_bytes()));
        }
        let tokens = ids.len() as u32 | if own { 0 } else { TOP };
        self.sum.update(tokens.to_le_bytes());
        self.sum.update(&bytes);
        self.entries
            .write_all(&self.offset.to_le_bytes())
            .and_then(|()| self.entries.write_all(&tokens.to_le_bytes()))
            .map_err(DataError::io(&std::env::temp_dir()))?;
        self.offset += bytes.len() as u64;
        self.known.tokens += ids.len() as u64;
        self.known.learned += example.unmasked() as u64;
        self.count += 1;
        self.write(&bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if let (Sink::Memory(held), Some(cache)) = (&mut self.words, self.cache)
            && held.len() + bytes.len() > HELD
        {
            let mut file = BufWriter::with_capacity(1 << 20, cache.create()?);
            file.write_all(held).map_err(|error| cache.full(error))?;
            self.words = Sink::File(file);
        }
        match (&mut self.words, self.cache) {
            (Sink::Memory(held), _) => held.extend(bytes),
            (Sink::File(file), Some(cache)) => file.write_all(bytes).map_err(|error| cache.full(error))?,
            (Sink::File(_), None) => unreachable!("only a cache has files"),
        }
        Ok(())
    }

    /// The examples, ready to be read. Where they are in a file, it gets its name.
    pub fn finish(mut self, key: String) -> Result<Examples> {
        self.known.key = key;
        self.known.digest = format!("{:x}", self.sum.clone().finalize());
        let (count, entries, known) = (self.count, self.offset, self.known.clone());
        let temporary = std::env::temp_dir();
        self.entries.rewind().map_err(DataError::io(&temporary))?;
        let source = match (self.words, self.cache) {
            (Sink::File(mut file), Some(cache)) => {
                let path = cache.path(&known.key);
                let text = serde_json::to_vec(&known).map_err(|error| cache.full(error.into()))?;
                let finished = io::copy(&mut self.entries, &mut file)
                    .and_then(|_| file.write_all(&text))
                    .and_then(|()| file.write_all(&(text.len() as u64).to_le_bytes()))
                    .and_then(|()| file.write_all(MAGIC))
                    .and_then(|()| file.into_inner().map_err(|error| error.into_error()))
                    .and_then(|file| file.as_file().sync_all().map(|()| file))
                    .and_then(|file| file.persist(&path).map_err(|error| error.error));
                Source::File(path.clone(), Mutex::new(finished.map_err(|error| cache.full(error))?))
            }
            (Sink::Memory(mut held), _) => {
                self.entries.read_to_end(&mut held).map_err(DataError::io(&temporary))?;
                Source::Memory(held)
            }
            (Sink::File(_), None) => unreachable!("only a cache has files"),
        };
        Ok(Examples { source, entries, known, count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn examples() -> impl Strategy<Value = Vec<Example>> {
        let id = 0u32..TOP;
        let label = prop_oneof![Just(IGNORE), (0..i64::from(TOP))];
        let labelled = proptest::collection::vec((id.clone(), label), 0..20);
        let own = proptest::collection::vec((id, any::<bool>()), 0..20);
        let own = own.prop_map(|tokens| {
            tokens.into_iter().map(|(id, learned)| (id, if learned { i64::from(id) } else { IGNORE })).collect()
        });
        let example = prop_oneof![labelled, own].prop_map(|tokens: Vec<(u32, i64)>| {
            let (ids, labels) = tokens.into_iter().unzip();
            Example { ids, labels }
        });
        proptest::collection::vec(example, 0..20)
    }

    proptest! {
        #[test]
        fn what_is_stored_is_read(examples in examples(), cut in 0usize..4000) {
            let dir = tempfile::tempdir().unwrap();
            let cache = Cache::new(Some(dir.path().into()));
            let mut builder = Builder::new(Some(&cache));
            // As if there were more than memory should hold.
            builder.words = Sink::File(BufWriter::new(cache.create().unwrap()));
            examples.iter().for_each(|example| builder.push(example).unwrap());
            builder.known.counts = vec![examples.len()];
            let written = builder.finish("key".into()).unwrap();
            let path = cache.path("key");
            let opened = Examples::open(&path).unwrap();
            let memory = Examples::of(&examples).unwrap();
            prop_assert_eq!(&memory.known.digest, &opened.known.digest);
            for stored in [&written, &opened, &memory] {
                prop_assert_eq!(&stored.iter().collect::<Result<Vec<_>>>().unwrap(), &examples);
                let lengths: Vec<u32> = examples.iter().map(|example| example.ids.len() as u32).collect();
                prop_assert_eq!(stored.lengths().unwrap(), lengths);
            }
            // A file that was cut short, or changed, is none or gives an error; it never panics.
            let mut bytes = std::fs::read(&path).unwrap();
            let at = cut % bytes.len();
            bytes[at] ^= 0x55;
            std::fs::write(&path, &bytes).unwrap();
            if let Some(damaged) = Examples::open(&path) {
                damaged.iter().for_each(drop);
            }
            std::fs::write(&path, &bytes[..at]).unwrap();
            prop_assert!(Examples::open(&path).is_none());
        }
    }
}
