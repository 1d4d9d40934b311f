//! GGUF files, versions 2 and 3: metadata, and tensors converted to f32; and writing them.
//!
//! The file is memory-mapped and nothing in it is believed: every count, length, offset and size is checked against
//! the file before it is used, and none decides an allocation. Source: `docs/gguf.md` of ggml.

mod encode;
mod encode_k;
mod llama;
mod metadata;
pub mod quants;
mod types;
mod write;

pub use encode::quantize;
pub use llama::{gguf_name, hf_name};
pub use types::GgmlType;
pub use write::{Entry, MetaValue, write_gguf};

use super::mapped::MappedFile;
use crate::{Error, Result};
use metadata::{Cursor, Kind, Metadata, Parsed, Value, shown};
use nibble_runtime::{DType, Device, Tag, Tensor};
use rayon::prelude::*;
use std::{collections::BTreeMap, ops::Range, path::Path};

/// Where a tensor lies and what it is.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    /// Element type.
    pub kind: GgmlType,
    /// Sizes of the dimensions, outermost first (the file has them innermost first).
    pub shape: Vec<usize>,
    /// Bytes in the file.
    range: Range<usize>,
}

impl GgufTensor {
    /// Bytes in the file.
    pub fn size_bytes(&self) -> usize {
        self.range.len()
    }
}

/// An open GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    file: MappedFile,
    version: u32,
    metadata: Metadata,
    tensors: BTreeMap<String, GgufTensor>,
}

/// Elements that a thread converts at a time, at least.
const GRAIN: usize = 1 << 14;

impl GgufFile {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// [`Error::File`]: not a GGUF file, truncated, or a header that contradicts itself or the file's size.
    /// [`Error::Unsupported`]: version 1, a big-endian file, or a tensor of a type that ggml does not have.
    pub fn open(path: &Path) -> Result<GgufFile> {
        let file = MappedFile::open(path)?;
        let bad = |what: String| Error::file(path, format!("not a valid GGUF file: {what}"));
        let mut cursor = Cursor::new(file.bytes());
        if cursor.take(4).map_err(bad)? != b"GGUF" {
            return Err(bad("it does not start with \"GGUF\"".into()));
        }
        let version = cursor.u32().map_err(bad)?;
        if !matches!(version, 2 | 3) {
            let order = if matches!(version.swap_bytes(), 1..=3) { " (a big-endian file)" } else { "" };
            let what = format!("GGUF version {version}{order}; nibble reads little-endian versions 2 and 3");
            return Err(Error::unsupported(path, what));
        }
        let tensor_count = cursor.u64().map_err(bad)?;
        let key_count = cursor.u64().map_err(bad)?;
        let metadata = Metadata::read(&mut cursor, key_count).map_err(bad)?;
        let (tensors, unknown) = read_tensors(&mut cursor, tensor_count, &metadata, file.bytes().len()).map_err(bad)?;
        if let Some((name, id)) = unknown {
            let what = format!("tensor \"{}\" has the unknown type number {id}", shown(&name));
            return Err(Error::unsupported(path, what));
        }
        Ok(GgufFile { file, version, metadata, tensors })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All metadata keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.0.keys().map(String::as_str)
    }

    /// Whether the metadata has this key, of whatever type.
    pub fn has_key(&self, key: &str) -> bool {
        self.metadata.0.contains_key(key)
    }

    /// A string.
    pub fn get_str(&self, key: &str) -> Option<&str> {
        match self.metadata.0.get(key)? {
            Value::String(range) => std::str::from_utf8(self.file.bytes().get(range.clone())?).ok(),
            _ => None,
        }
    }

    /// A whole number of any width that fits u32.
    pub fn get_u32(&self, key: &str) -> Option<u32> {
        self.metadata.integer(key)
    }

    /// A whole number of any width that fits u64.
    pub fn get_u64(&self, key: &str) -> Option<u64> {
        self.metadata.integer(key)
    }

    /// A floating-point number.
    pub fn get_f32(&self, key: &str) -> Option<f32> {
        match *self.metadata.0.get(key)? {
            Value::Float(x) => Some(x as f32),
            _ => None,
        }
    }

    /// A bool.
    pub fn get_bool(&self, key: &str) -> Option<bool> {
        match *self.metadata.0.get(key)? {
            Value::Bool(x) => Some(x),
            _ => None,
        }
    }

    /// Number of elements of an array.
    pub fn array_len(&self, key: &str) -> Option<usize> {
        match self.metadata.0.get(key)? {
            Value::Array { count, .. } => Some(*count),
            _ => None,
        }
    }

    /// An array of strings.
    pub fn get_str_array(&self, key: &str) -> Option<Vec<String>> {
        let Value::Array { kind: Kind::String, count, range } = self.metadata.0.get(key)? else { return None };
        let mut cursor = Cursor::new(self.file.bytes().get(range.clone())?);
        (0..*count).map(|_| cursor.string().ok().map(str::to_string)).collect()
    }

    /// An array of i32 (or of u32 whose values fit).
    pub fn get_i32_array(&self, key: &str) -> Option<Vec<i32>> {
        let bytes = self.file.bytes();
        if let Some(signed) = self.metadata.elements::<4>(key, &[Kind::I32], bytes) {
            return Some(signed.iter().map(|&x| i32::from_le_bytes(x)).collect());
        }
        let unsigned = self.metadata.elements::<4>(key, &[Kind::U32], bytes)?;
        unsigned.iter().map(|&x| i32::try_from(u32::from_le_bytes(x)).ok()).collect()
    }

    /// An array of f32.
    pub fn get_f32_array(&self, key: &str) -> Option<Vec<f32>> {
        let values = self.metadata.elements::<4>(key, &[Kind::F32], self.file.bytes())?;
        Some(values.iter().map(|&x| f32::from_le_bytes(x)).collect())
    }

    /// Names of all tensors, as the file spells them, with what they are; sorted.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &GgufTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// A tensor by the file's name.
    pub fn tensor_info(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.get(name)
    }

    /// A tensor converted to f32, with its rows as the file has them. Pages of the file are given back afterwards.
    ///
    /// # Errors
    /// [`Error::Mismatch`]: no such tensor. [`Error::Unsupported`]: an element type that nibble does not convert.
    pub fn tensor(&self, name: &str, tag: Tag) -> Result<Tensor> {
        self.tensor_by_rows(name, tag, |row| row)
    }

    /// As [`GgufFile::tensor`]; row `r` of the result is row `source(r)` of the file.
    fn tensor_by_rows(&self, name: &str, tag: Tag, source: impl Fn(usize) -> usize + Sync) -> Result<Tensor> {
        let info = self
            .tensors
            .get(name)
            .ok_or_else(|| Error::mismatch(self.path(), format!("the file has no tensor \"{name}\"")))?;
        let kind = info.kind;
        let unsupported = || {
            let what = format!(
                "tensor \"{name}\" has type {kind}; nibble reads F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, \
                 Q5_K and Q6_K"
            );
            Error::unsupported(self.path(), what)
        };
        if !kind.is_readable() {
            return Err(unsupported());
        }
        let mut out = Tensor::empty(&info.shape, DType::F32, Device::Cpu, tag)?;
        let columns = info.shape.last().copied().unwrap_or(1);
        let row_bytes = columns / kind.block * kind.bytes;
        let bytes = &self.file.bytes()[info.range.clone()];
        if columns > 0 {
            let rows = out.as_mut_slice::<f32>()?.par_chunks_exact_mut(columns).enumerate();
            let fit = rows.with_min_len(GRAIN.div_ceil(columns)).all(|(row, out)| {
                let start = source(row) * row_bytes;
                bytes.get(start..start + row_bytes).is_some_and(|bytes| quants::dequantize(kind, bytes, out))
            });
            if !fit {
                return Err(unsupported());
            }
        }
        self.file.release(info.range.clone());
        Ok(out)
    }

    /// Gives the whole file's pages back to the system; they return from disk when touched.
    pub fn release(&self) {
        self.file.release(0..self.file.bytes().len());
    }
}

type Tensors = BTreeMap<String, GgufTensor>;

/// The tensor directory, and the first tensor whose type is unknown.
fn read_tensors(
    cursor: &mut Cursor,
    count: u64,
    metadata: &Metadata,
    file_size: usize,
) -> Parsed<(Tensors, Option<(String, u32)>)> {
    let alignment = match metadata.0.get("general.alignment") {
        None => 32,
        Some(_) => metadata
            .integer::<u32>("general.alignment")
            .filter(|x| x.is_power_of_two())
            .ok_or("general.alignment is not a power of two")? as usize,
    };
    let mut tensors = Tensors::new();
    let mut unknown = None;
    for index in 0..count {
        let name = cursor.string().map_err(|e| format!("tensor {index} of {count}: {e}"))?.to_string();
        let of = |what: String| format!("tensor \"{}\": {what}", shown(&name));
        let dimensions = cursor.u32().map_err(of)?;
        if dimensions > 4 {
            return Err(of(format!("{dimensions} dimensions; at most 4 are allowed")));
        }
        let mut shape = Vec::new();
        let mut elements = 1usize;
        for _ in 0..dimensions {
            let size = cursor.u64().map_err(of)?;
            let size = usize::try_from(size).map_err(|_| of(format!("a dimension of {size}")))?;
            elements = elements.checked_mul(size).ok_or_else(|| of("its dimensions overflow".into()))?;
            shape.insert(0, size);
        }
        let id = cursor.u32().map_err(of)?;
        let offset = cursor.u64().map_err(of)?;
        let Some(kind) = GgmlType::from_id(id) else {
            unknown.get_or_insert((name, id));
            continue;
        };
        let columns = shape.last().copied().unwrap_or(1);
        if !columns.is_multiple_of(kind.block) {
            return Err(of(format!("rows of {columns} elements are not whole {kind} blocks of {}", kind.block)));
        }
        let size = (elements / kind.block).checked_mul(kind.bytes).ok_or_else(|| of("its size overflows".into()))?;
        let offset = usize::try_from(offset)
            .ok()
            .filter(|offset| offset.is_multiple_of(alignment))
            .ok_or_else(|| of(format!("offset {offset} is not a multiple of the alignment, {alignment}")))?;
        let end = offset.checked_add(size).ok_or_else(|| of("its offset and size overflow".into()))?;
        if tensors.contains_key(&name) {
            return Err(of("appears twice".into()));
        }
        tensors.insert(name, GgufTensor { kind, shape, range: offset..end });
    }
    let start = cursor.position().checked_next_multiple_of(alignment).ok_or("the alignment is beyond the file")?;
    place(&mut tensors, start, file_size)?;
    Ok((tensors, unknown))
}

/// Turns offsets from `start`, the beginning of the data, into offsets in the file, and checks them.
fn place(tensors: &mut Tensors, start: usize, file_size: usize) -> Parsed<()> {
    for (name, tensor) in tensors.iter_mut() {
        let end = tensor.range.end.checked_add(start).filter(|&end| end <= file_size).ok_or_else(|| {
            format!(
                "tensor \"{}\" ends at byte {} of the data, which starts at byte {start}, but the file has {file_size} \
                 bytes; it is truncated or damaged, download it again",
                shown(name),
                tensor.range.end
            )
        })?;
        tensor.range = tensor.range.start + start..end;
    }
    let mut ranges: Vec<_> = tensors.iter().filter(|(_, t)| !t.range.is_empty()).collect();
    ranges.sort_by_key(|(_, tensor)| tensor.range.start);
    for pair in ranges.windows(2) {
        if pair[0].1.range.end > pair[1].1.range.start {
            return Err(format!("tensors \"{}\" and \"{}\" overlap", shown(pair[0].0), shown(pair[1].0)));
        }
    }
    Ok(())
}
