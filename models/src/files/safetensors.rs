//! One safetensors file: reading through a memory map, and writing.
//!
//! Format: a u64 length, a JSON header of that length, then the tensors' bytes without gaps.

use super::{
    atomic::{atomic_write, write_json},
    mapped::MappedFile,
};
use crate::{Error, Result};
use nibble_runtime::{DType, Device, Tag, Tensor};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use std::{
    collections::{BTreeMap, HashMap},
    io::{self, Write},
    ops::Range,
    path::Path,
};

/// The format's own limit on the header.
const MAX_HEADER: usize = 100_000_000;

/// An open safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    file: MappedFile,
    header: Metadata,
    /// Where the tensors' bytes begin.
    data: usize,
}

/// A tensor in a file: its type, its shape and its bytes.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Type by the format's name; [`TensorView::dtype`] for those that nibble holds.
    pub format: Dtype,
    /// Sizes of the dimensions, outermost first.
    pub shape: &'a [usize],
    /// The elements, little-endian, not necessarily aligned.
    pub bytes: &'a [u8],
}

impl TensorView<'_> {
    /// The element type, if nibble has it.
    pub fn dtype(&self) -> Option<DType> {
        from_format(self.format)
    }
}

fn from_format(format: Dtype) -> Option<DType> {
    Some(match format {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::U8 => DType::U8,
        Dtype::I8 => DType::I8,
        Dtype::I32 => DType::I32,
        Dtype::I64 => DType::I64,
        _ => return None,
    })
}

fn to_format(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::U8 => Dtype::U8,
        DType::I8 => Dtype::I8,
        DType::I32 => Dtype::I32,
        DType::I64 => Dtype::I64,
    }
}

/// Checks a file's bytes: the header, and where the data begins. The header's own parser sees to it that tensors follow
/// each other without gap or overlap and that every shape fits its bytes; here, that the whole fits the file.
fn parse(bytes: &[u8]) -> std::result::Result<(Metadata, usize), String> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(format!("{} bytes, not even a header's length", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().and_then(|length| rest.get(..length)).ok_or_else(|| {
        let left = rest.len();
        format!("the header claims {length} bytes, but {left} follow; truncated, or not a safetensors file")
    })?;
    if header.len() > MAX_HEADER {
        return Err(format!("a header of {length} bytes; at most {MAX_HEADER} are allowed"));
    }
    let metadata: Metadata = serde_json::from_slice(header).map_err(|e| format!("damaged header: {e}"))?;
    let (found, expected) = (rest.len() - header.len(), metadata.data_len());
    if found != expected {
        let what = if found < expected { "truncated" } else { "damaged" };
        return Err(format!("{what}: the header describes {expected} bytes of tensors, the file has {found}"));
    }
    Ok((metadata, 8 + header.len()))
}

impl SafetensorsFile {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// [`Error::Io`]: missing or unreadable. [`Error::File`]: truncated, or a header that is malformed, contradicts
    /// itself (offsets that overlap or leave gaps, shapes that do not fit) or the file's size.
    pub fn open(path: &Path) -> Result<SafetensorsFile> {
        let file = MappedFile::open(path)?;
        let parsed = parse(file.bytes());
        let (header, data) =
            parsed.map_err(|what| Error::file(path, format!("not a valid safetensors file: {what}")))?;
        Ok(SafetensorsFile { file, header, data })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Names of the tensors, in the order of their bytes.
    pub fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    /// The header's free-form text entries.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    fn range(&self, info: &TensorInfo) -> Range<usize> {
        self.data + info.data_offsets.0..self.data + info.data_offsets.1
    }

    /// A tensor, in place.
    ///
    /// # Errors
    /// [`Error::Mismatch`]: no tensor of this name.
    pub fn view(&self, name: &str) -> Result<TensorView<'_>> {
        let info = self
            .header
            .info(name)
            .ok_or_else(|| Error::mismatch(self.path(), format!("the file has no tensor \"{name}\"")))?;
        Ok(TensorView { format: info.dtype, shape: &info.shape, bytes: &self.file.bytes()[self.range(info)] })
    }

    /// A copy of a tensor in host memory; see [`SafetensorsFile::tensor_on`].
    pub fn tensor(&self, name: &str, tag: Tag) -> Result<Tensor> {
        self.tensor_on(name, Device::Cpu, tag)
    }

    /// A copy of a tensor on `device`, counted under `tag`. The file's pages are given back afterwards.
    ///
    /// # Errors
    /// [`Error::Mismatch`]: no tensor of this name. [`Error::Unsupported`]: an element type that nibble does not hold.
    pub fn tensor_on(&self, name: &str, device: Device, tag: Tag) -> Result<Tensor> {
        let view = self.view(name)?;
        let Some(dtype) = view.dtype() else {
            let what =
                format!("tensor \"{name}\" holds {}; nibble reads F32, F16, BF16, U8, I8, I32, I64", view.format);
            return Err(Error::unsupported(self.path(), what));
        };
        let tensor = Tensor::from_bytes_on(view.bytes, dtype, view.shape, device, tag)?;
        self.release_tensor(name);
        Ok(tensor)
    }

    /// Gives the pages of one tensor back to the system.
    pub fn release_tensor(&self, name: &str) {
        if let Some(info) = self.header.info(name) {
            self.file.release(self.range(info));
        }
    }

    /// Gives the whole file's pages back to the system; they return from disk when touched.
    pub fn release(&self) {
        self.file.release(0..self.file.bytes().len());
    }
}

/// Writes tensors to a safetensors file, as [`stream_safetensors`] does.
///
/// # Errors
/// As [`stream_safetensors`].
pub fn write_safetensors(path: &Path, tensors: &[(String, Tensor)], metadata: &[(&str, &str)]) -> Result<()> {
    let outline = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.dtype(), tensor.shape().to_vec());
    let outlines: Vec<_> = tensors.iter().map(outline).collect();
    stream_safetensors(path, &outlines, metadata, |i| Ok(tensors[i].1.clone()))
}

/// Writes a safetensors file, as [`atomic_write`] does, of tensors with these names, types and shapes. `tensor` is asked
/// for one after another by its number, so that one is held. They are laid out as the reference implementation does it:
/// larger alignments first, then by name.
///
/// # Errors
/// [`Error::Io`]: the file cannot be written. [`Error::Invalid`]: a name appears twice or is reserved, or a tensor is not
/// as announced. Errors of `tensor`.
pub fn stream_safetensors(
    path: &Path,
    outlines: &[(String, DType, Vec<usize>)],
    metadata: &[(&str, &str)],
    mut tensor: impl FnMut(usize) -> Result<Tensor>,
) -> Result<()> {
    let mut order: Vec<usize> = (0..outlines.len()).collect();
    order.sort_by(|&a, &b| {
        let ((a_name, a, _), (b_name, b, _)) = (&outlines[a], &outlines[b]);
        to_format(*b).cmp(&to_format(*a)).then_with(|| a_name.cmp(b_name))
    });
    let layout: Vec<_> = order.iter().map(|&i| outlines[i].clone()).collect();
    let header = header(&layout, metadata).map_err(|what| Error::Invalid(format!("{}: {what}", path.display())))?;
    // What failed while a tensor was made is no failure of the file.
    let mut failure = None;
    let mut made = |i| {
        tensor(i).map_err(|error| {
            failure = Some(error);
            io::Error::other("a tensor could not be made")
        })
    };
    let written = atomic_write(path, |file| {
        file.write_all(&header)?;
        write_tensors(file, &layout, order.iter().map(|&i| made(i)))
    });
    failure.map_or(written, Err)
}

/// As [`stream_safetensors`], into the files of a model's `folder`: `model.safetensors`, or, where the tensors have more
/// than `most` bytes together, `model-00001-of-0000N.safetensors` and so on, each with no more (unless one tensor has),
/// and then `model.safetensors.index.json`, which says where each is.
///
/// # Errors
/// As [`stream_safetensors`].
pub fn stream_shards(
    folder: &Path,
    outlines: &[(String, DType, Vec<usize>)],
    metadata: &[(&str, &str)],
    most: usize,
    mut tensor: impl FnMut(usize) -> Result<Tensor>,
) -> Result<()> {
    let size = |(_, dtype, shape): &(String, DType, Vec<usize>)| dtype.size() * shape.iter().product::<usize>();
    let (mut shards, mut filled): (Vec<Range<usize>>, usize) = (Vec::new(), 0);
    for (i, outline) in outlines.iter().enumerate() {
        let bytes = size(outline);
        if shards.is_empty() || (filled > 0 && filled.saturating_add(bytes) > most) {
            shards.push(i..i);
            filled = 0;
        }
        filled += bytes;
        shards.last_mut().into_iter().for_each(|shard| shard.end = i + 1);
    }
    let mut weight_map = serde_json::Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        stream_safetensors(&folder.join(&name), &outlines[shard.clone()], metadata, |i| tensor(shard.start + i))?;
        weight_map.extend(outlines[shard.clone()].iter().map(|(tensor, ..)| (tensor.clone(), name.clone().into())));
    }
    if shards.len() == 1 {
        return Ok(());
    }
    let total: usize = outlines.iter().map(size).sum();
    let mut index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    index.sort_all_objects();
    write_json(&folder.join("model.safetensors.index.json"), &index)
}

/// Writes a safetensors file's bytes to `out`: tensors of the names, types and shapes of `layout`, in that order, each
/// asked for when the one before has been written, so that they need not be in memory together.
///
/// # Errors
/// `out` or an item of `tensors` fails, a tensor is not as `layout` says, or a name appears twice or is reserved.
pub fn write_streamed(
    out: &mut dyn Write,
    layout: &[(String, DType, Vec<usize>)],
    tensors: impl IntoIterator<Item = io::Result<Tensor>>,
) -> io::Result<()> {
    out.write_all(&header(layout, &[]).map_err(io::Error::other)?)?;
    write_tensors(out, layout, tensors)
}

/// What comes before the tensors' bytes; its length is a multiple of 8, which aligns them.
fn header(layout: &[(String, DType, Vec<usize>)], metadata: &[(&str, &str)]) -> std::result::Result<Vec<u8>, String> {
    let mut names = std::collections::HashSet::new();
    let (mut offset, mut infos) = (0, Vec::with_capacity(layout.len()));
    for (name, dtype, shape) in layout {
        if name == "__metadata__" || !names.insert(name) {
            return Err(format!("cannot write two tensors named \"{name}\""));
        }
        let end = offset + shape.iter().product::<usize>() * dtype.size();
        infos.push((
            name.clone(),
            TensorInfo { dtype: to_format(*dtype), shape: shape.clone(), data_offsets: (offset, end) },
        ));
        offset = end;
    }
    let text: HashMap<String, String> = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let header = Metadata::new((!text.is_empty()).then_some(text), infos).map_err(|e| e.to_string())?;
    let mut header = serde_json::to_vec(&header).map_err(|e| e.to_string())?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok([&(header.len() as u64).to_le_bytes()[..], &header].concat())
}

fn write_tensors(
    out: &mut dyn Write,
    layout: &[(String, DType, Vec<usize>)],
    tensors: impl IntoIterator<Item = io::Result<Tensor>>,
) -> io::Result<()> {
    let mut tensors = tensors.into_iter();
    for (name, dtype, shape) in layout {
        let tensor =
            tensors.next().unwrap_or_else(|| Err(io::Error::other(format!("tensor \"{name}\" is missing"))))?;
        if (tensor.dtype(), tensor.shape()) != (*dtype, &shape[..]) {
            return Err(io::Error::other(format!("tensor \"{name}\" is {tensor:?}; announced as {shape:?} {dtype}")));
        }
        let tensor = tensor.into_device(Device::Cpu, Tag::Workspace).map_err(io::Error::other)?;
        out.write_all(tensor.bytes().map_err(io::Error::other)?)?;
    }
    Ok(())
}
