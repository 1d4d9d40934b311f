//! Writing GGUF files, version 3: the header, then one tensor after another.

use super::types::GgmlType;
use crate::{Error, Result, files::atomic::atomic_write};
use std::path::Path;

/// Tensors begin at multiples of this, as readers expect where a file does not say otherwise.
const ALIGNMENT: usize = 32;

/// A value of a key.
#[derive(Clone, Debug)]
pub enum MetaValue {
    U32(u32),
    F32(f32),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

impl MetaValue {
    fn write(&self, out: &mut Vec<u8>) {
        let mut array = |kind: u32, count: usize, elements: Vec<u8>| {
            out.extend(9u32.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((count as u64).to_le_bytes());
            out.extend(elements);
        };
        match self {
            MetaValue::Strings(items) => array(8, items.len(), items.iter().flat_map(|item| string(item)).collect()),
            MetaValue::I32s(items) => array(5, items.len(), items.iter().flat_map(|item| item.to_le_bytes()).collect()),
            MetaValue::F32s(items) => array(6, items.len(), items.iter().flat_map(|item| item.to_le_bytes()).collect()),
            MetaValue::U32(value) => out.extend([4u32.to_le_bytes(), value.to_le_bytes()].concat()),
            MetaValue::F32(value) => out.extend([6u32.to_le_bytes(), value.to_le_bytes()].concat()),
            MetaValue::Bool(value) => out.extend([&7u32.to_le_bytes()[..], &[u8::from(*value)]].concat()),
            MetaValue::String(text) => out.extend([&8u32.to_le_bytes()[..], &string(text)].concat()),
        }
    }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A tensor to write.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The file's name of it.
    pub name: String,
    pub kind: GgmlType,
    /// Outermost first.
    pub shape: Vec<usize>,
}

impl Entry {
    fn size(&self) -> usize {
        self.shape.iter().product::<usize>() / self.kind.block * self.kind.bytes
    }
}

/// Writes a file, as [`atomic_write`] does. `data` is asked for the bytes of one entry after another, so that one is held.
///
/// # Errors
/// [`Error::Io`]: the file cannot be written. [`Error::Invalid`]: bytes that are not as many as the entry has. Errors of
/// `data`.
pub fn write_gguf(
    path: &Path,
    keys: &[(String, MetaValue)],
    entries: &[Entry],
    mut data: impl FnMut(&Entry) -> Result<Vec<u8>>,
) -> Result<()> {
    let counts = [entries.len() as u64, keys.len() as u64].map(u64::to_le_bytes).concat();
    let mut header = [&b"GGUF"[..], &3u32.to_le_bytes(), &counts].concat();
    for (key, value) in keys {
        header.extend(string(key));
        value.write(&mut header);
    }
    let mut offset = 0;
    for entry in entries {
        header.extend(string(&entry.name));
        header.extend((entry.shape.len() as u32).to_le_bytes());
        entry.shape.iter().rev().for_each(|&dim| header.extend((dim as u64).to_le_bytes()));
        header.extend(entry.kind.id.to_le_bytes());
        header.extend((offset as u64).to_le_bytes());
        offset += entry.size().next_multiple_of(ALIGNMENT);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
    // What failed while a tensor was made is no failure of the file.
    let mut failure = None;
    let written = atomic_write(path, |file| {
        file.write_all(&header)?;
        entries.iter().try_for_each(|entry| {
            let bytes = data(entry).and_then(|bytes| match bytes.len() == entry.size() {
                true => Ok(bytes),
                false => {
                    Err(Error::Invalid(format!("{}: {} bytes instead of {}", entry.name, bytes.len(), entry.size())))
                }
            });
            let mut bytes = bytes.map_err(|error| {
                failure = Some(error);
                std::io::Error::other("a tensor could not be made")
            })?;
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
            file.write_all(&bytes)
        })
    });
    failure.map_or(written, Err)
}
