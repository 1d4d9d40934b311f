//! The header of a GGUF file: a bounds-checked cursor and key-value pairs.

use std::{collections::BTreeMap, ops::Range};

/// What is wrong with a header; the caller adds the file's path.
pub(super) type Parsed<T> = Result<T, String>;

/// Reads little-endian values from the front of a file. No read goes past the end.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Cursor { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn take(&mut self, count: u64) -> Parsed<&'a [u8]> {
        let left = self.bytes.len() - self.at;
        let count = usize::try_from(count).ok().filter(|&count| count <= left).ok_or_else(|| {
            format!("the header asks for {count} bytes at byte {}, but the file has {left} more", self.at)
        })?;
        self.at += count;
        Ok(&self.bytes[self.at - count..self.at])
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A length and as many bytes of UTF-8.
    pub(super) fn string(&mut self) -> Parsed<&'a str> {
        let length = self.u64()?;
        let at = self.at;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map_err(|e| format!("the string at byte {at} is not UTF-8: {e}"))
    }
}

/// A value of a metadata key. Arrays and strings stay in the file; ranges of it have been checked.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(Range<usize>),
    Array { kind: Kind, count: usize, range: Range<usize> },
}

/// Type of a value in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn read(cursor: &mut Cursor) -> Parsed<Kind> {
        use Kind::*;
        let kinds = [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64];
        let id = cursor.u32()?;
        kinds.get(id as usize).copied().ok_or_else(|| format!("unknown metadata type {id}"))
    }

    /// Bytes of a value whose size is fixed.
    fn size(self) -> Option<u64> {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => Some(1),
            Kind::U16 | Kind::I16 => Some(2),
            Kind::U32 | Kind::I32 | Kind::F32 => Some(4),
            Kind::U64 | Kind::I64 | Kind::F64 => Some(8),
            Kind::String | Kind::Array => None,
        }
    }
}

impl Value {
    fn read(cursor: &mut Cursor, kind: Kind) -> Parsed<Value> {
        Ok(match kind {
            Kind::U8 => Value::Unsigned(cursor.array::<1>()?[0].into()),
            Kind::I8 => Value::Signed(i8::from_le_bytes(cursor.array()?).into()),
            Kind::U16 => Value::Unsigned(u16::from_le_bytes(cursor.array()?).into()),
            Kind::I16 => Value::Signed(i16::from_le_bytes(cursor.array()?).into()),
            Kind::U32 => Value::Unsigned(cursor.u32()?.into()),
            Kind::I32 => Value::Signed(i32::from_le_bytes(cursor.array()?).into()),
            Kind::F32 => Value::Float(f32::from_le_bytes(cursor.array()?).into()),
            Kind::Bool => Value::Bool(match cursor.array::<1>()?[0] {
                0 => false,
                1 => true,
                other => return Err(format!("a bool is {other}; expected 0 or 1")),
            }),
            Kind::U64 => Value::Unsigned(cursor.u64()?),
            Kind::I64 => Value::Signed(i64::from_le_bytes(cursor.array()?)),
            Kind::F64 => Value::Float(f64::from_le_bytes(cursor.array()?)),
            Kind::String => {
                let length = cursor.string()?.len();
                Value::String(cursor.at - length..cursor.at)
            }
            Kind::Array => {
                let kind = Kind::read(cursor)?;
                let count = cursor.u64()?;
                let start = cursor.at;
                match kind.size() {
                    Some(size) => {
                        let bytes = count.checked_mul(size).ok_or_else(|| format!("an array has {count} elements"))?;
                        cursor.take(bytes)?;
                    }
                    None if kind == Kind::Array => return Err("an array of arrays, which no Llama file needs".into()),
                    // Every string takes at least its length's eight bytes, so a lying count ends with the file.
                    None => {
                        for _ in 0..count {
                            cursor.string()?;
                        }
                    }
                }
                // Every element took at least a byte, so the count fits.
                Value::Array { kind, count: count as usize, range: start..cursor.at }
            }
        })
    }
}

/// The key-value pairs of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Metadata(pub(super) BTreeMap<String, Value>);

impl Metadata {
    pub(super) fn read(cursor: &mut Cursor, count: u64) -> Parsed<Metadata> {
        let mut values = BTreeMap::new();
        for index in 0..count {
            let key = cursor.string().map_err(|e| format!("key {index} of {count}: {e}"))?;
            let value = Kind::read(cursor).and_then(|kind| Value::read(cursor, kind));
            let value = value.map_err(|e| format!("value of key \"{}\": {e}", shown(key)))?;
            if values.insert(key.to_string(), value).is_some() {
                return Err(format!("key \"{}\" appears twice", shown(key)));
            }
        }
        Ok(Metadata(values))
    }

    /// A whole number that fits `T`.
    pub(super) fn integer<T: TryFrom<i128>>(&self, key: &str) -> Option<T> {
        match *self.0.get(key)? {
            Value::Unsigned(x) => T::try_from(x.into()).ok(),
            Value::Signed(x) => T::try_from(x.into()).ok(),
            _ => None,
        }
    }

    /// The elements of an array of `kind`s of `N` bytes.
    pub(super) fn elements<'a, const N: usize>(
        &self,
        key: &str,
        kinds: &[Kind],
        file: &'a [u8],
    ) -> Option<&'a [[u8; N]]> {
        match self.0.get(key)? {
            Value::Array { kind, range, .. } if kinds.contains(kind) => Some(file.get(range.clone())?.as_chunks().0),
            _ => None,
        }
    }
}

/// A name from a file, shortened for a message.
pub(super) fn shown(name: &str) -> String {
    if name.chars().count() <= 80 {
        return name.escape_debug().to_string();
    }
    let start: String = name.chars().take(77).collect();
    format!("{}...", start.escape_debug())
}
