//! Writing examples down: the other side of [`super::store`], which has the layout.

use super::IGNORE;
use super::cache::Cache;
use super::error::{DataError, Result};
use super::examples::Example;
use super::store::{Examples, Known, MAGIC, Source, TOP};
use sha2::{Digest, Sha256};
use std::{
    io::{self, BufWriter, Read, Seek, Write},
    sync::Mutex,
};
use tempfile::{NamedTempFile, SpooledTempFile};

/// Bytes of words and of entries that are held in memory.
const HELD: usize = 16 << 20;

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
    /// For examples that go to `cache` when they are many, or stay in memory.
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

    /// Examples so far.
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
        Ok(Examples::new(source, entries, known, count))
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
            prop_assert_eq!(&memory.known().digest, &opened.known().digest);
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
