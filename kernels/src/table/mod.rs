//! The tables of a model, one row a token: its embedding, and its head, with whose rows hidden states are multiplied.
//!
//! A table `[V, D]` is held as it is or in 8 bits: codes of −127 to 127, and for each row a scale in f32,
//!
//! `scale = max |x| / 127`, `code = x / scale` rounded to the nearest (of two, the even one), and `x ≈ code · scale`.
//!
//! A row whose scale would be subnormal is stored as zeros; one that holds a NaN or an infinity reads as NaN throughout.
//! Both devices give the same bytes. (The scheme is the usual one of symmetric 8-bit weights by row: Dettmers et al.,
//! "LLM.int8()", arXiv 2208.07339, section 2.1.)
//!
//! Products with an 8-bit table dequantize it slice by slice, in the type of the other operand, so that all of it is never
//! held. On a GPU at most 16 rows of 16 bits are multiplied by the codes themselves, which are read once (`table.cu`).

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;

use crate::{
    cast::into_dtype,
    embedding,
    linear::{self, Weight},
};
use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};

/// A table `[V, D]` in 8 bits.
#[derive(Clone, Debug)]
pub struct Rows8 {
    /// i8 `[V, D]`.
    pub codes: Tensor,
    /// f32 `[V]`.
    pub scales: Tensor,
}

/// A table `[V, D]`.
#[derive(Clone, Debug)]
pub enum Table {
    /// As it is: f32, f16 or bf16.
    Dense(Tensor),
    /// In 8 bits.
    Rows8(Rows8),
}

/// Bytes of a slice of dequantized rows on a GPU: many enough that its products fill one.
const GPU_SLICE: usize = 64 << 20;
/// And on the CPU: what caches hold.
const CPU_SLICE: usize = 1 << 20;

impl Rows8 {
    /// A float table `x` `[V, D]` in 8 bits, on its device; counted under `tag`.
    ///
    /// # Errors
    /// `x` is not a matrix of floats.
    pub fn quantize(x: &Tensor, tag: Tag) -> Result<Rows8> {
        let op = "8-bit table";
        let (vocab, _) = x.dims2(op)?;
        if !x.dtype().is_float() {
            return Err(Error::DType { op, expected: "float".into(), found: x.dtype() });
        }
        let mut codes = Tensor::empty(x.shape(), DType::I8, x.device(), tag)?;
        let mut scales = Tensor::empty(&[vocab], DType::F32, x.device(), tag)?;
        match x.device() {
            Device::Cpu => cpu::quantize(x, codes.as_mut_slice()?, scales.as_mut_slice()?)?,
            Device::Cuda(_) => cuda::quantize(x, &mut codes, &mut scales)?,
        }
        Ok(Rows8 { codes, scales })
    }

    /// Rows `first..first + count` in `dtype`: `code · scale` in f32, rounded once.
    ///
    /// # Errors
    /// There are no such rows; `dtype` is not a float type.
    pub fn rows(&self, first: usize, count: usize, dtype: DType, tag: Tag) -> Result<Tensor> {
        let op = "8-bit table";
        let (vocab, width) = self.dims()?;
        if first.checked_add(count).is_none_or(|end| end > vocab) {
            return Err(Error::shape(op, format!("rows {first}..+{count} of a table of {vocab}")));
        }
        match self.codes.device() {
            Device::Cpu => {
                let mut out = Tensor::empty(&[count, width], DType::F32, Device::Cpu, tag)?;
                let numbers: Vec<usize> = (first..first + count).collect();
                cpu::rows(self.codes.as_slice()?, self.scales.as_slice()?, &numbers, out.as_mut_slice()?);
                out.into_dtype(dtype, tag)
            }
            Device::Cuda(_) => cuda::rows(self, cuda::Which::Range(first), count, dtype, tag),
        }
    }

    /// `(V, D)`, after a check that there is a scale for each row.
    fn dims(&self) -> Result<(usize, usize)> {
        let (vocab, width) = self.codes.dims2("8-bit table")?;
        if self.scales.shape() != [vocab] || self.scales.dtype() != DType::F32 || self.codes.dtype() != DType::I8 {
            let what = format!("codes {:?} with scales {:?}", self.codes, self.scales);
            return Err(Error::shape("8-bit table", what));
        }
        Ok((vocab, width))
    }
}

impl Table {
    /// `(V, D)`: tokens, and elements of each.
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Table::Dense(tensor) => tensor.dims2("table"),
            Table::Rows8(rows) => rows.dims(),
        }
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        match self {
            Table::Dense(tensor) => tensor.device(),
            Table::Rows8(rows) => rows.codes.device(),
        }
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        match self {
            Table::Dense(tensor) => tensor.size_bytes(),
            Table::Rows8(rows) => rows.codes.size_bytes() + rows.scales.size_bytes(),
        }
    }

    /// The same table in pinned host memory that GPU `device` reads across the bus (scales, which are few, on the GPU).
    ///
    /// # Errors
    /// As [`Tensor::to_pinned`].
    pub fn to_pinned(&self, device: Device) -> Result<Table> {
        Ok(match self {
            Table::Dense(tensor) => Table::Dense(tensor.to_pinned(device)?),
            Table::Rows8(rows) => {
                let scales = rows.scales.clone().into_device(device, Tag::Weights)?;
                Table::Rows8(Rows8 { codes: rows.codes.to_pinned(device)?, scales })
            }
        })
    }
}

/// Rows of `table` `[V, D]` for `ids` `[T]`: `[T, D]` in `dtype`.
///
/// # Errors
/// An id is negative or not below V.
pub fn gather(ids: &[i32], table: &Table, dtype: DType) -> Result<Tensor> {
    let rows = match table {
        Table::Dense(tensor) => return embedding::forward(ids, tensor, dtype),
        Table::Rows8(rows) => rows,
    };
    let (vocab, width) = rows.dims()?;
    let numbers = embedding::indices(ids, vocab)?;
    match table.device() {
        Device::Cpu => {
            let mut out = Tensor::empty(&[numbers.len(), width], DType::F32, Device::Cpu, Tag::Activations)?;
            cpu::rows(rows.codes.as_slice()?, rows.scales.as_slice()?, &numbers, out.as_mut_slice()?);
            out.into_dtype(dtype, Tag::Activations)
        }
        device => {
            let ids = embedding::cuda::upload(ids, device)?;
            cuda::rows(rows, cuda::Which::Ids(&ids), ids.numel(), dtype, Tag::Activations)
        }
    }
}

/// Rows of a slice in which a table of this width is dequantized for products in `dtype`.
pub fn slice_rows(width: usize, dtype: DType, on_cpu: bool) -> usize {
    let rows = if on_cpu { CPU_SLICE } else { GPU_SLICE } / (width * dtype.size()).max(1);
    // Whole tiles of a product, where there are that many.
    if rows < 128 { rows.max(1) } else { rows / 128 * 128 }
}

/// First rows and numbers of rows of the slices in which a table `[vocab, width]` is dequantized for products in `dtype`.
fn slices(vocab: usize, width: usize, dtype: DType, device: Device) -> impl Iterator<Item = (usize, usize)> {
    let rows = slice_rows(width, dtype, device == Device::Cpu);
    (0..vocab).step_by(rows).map(move |first| (first, rows.min(vocab - first)))
}

/// `x · tableᵀ` for `x` `[T, D]`: f32 `[T, V]`, counted as workspace.
///
/// # Errors
/// Shapes do not fit.
pub fn project(x: &Tensor, table: &Table) -> Result<Tensor> {
    let op = "product with a table";
    let tag = Tag::Workspace;
    let rows = match table {
        Table::Dense(tensor) => return linear::forward_as(x, &Weight::Dense(tensor.clone()), DType::F32, tag),
        Table::Rows8(rows) => rows,
    };
    let ((tokens, width), (vocab, inner)) = (x.dims2(op)?, rows.dims()?);
    if width != inner {
        return Err(Error::shape(op, format!("{:?} with a table [{vocab}, {inner}]", x.shape())));
    }
    let mut out = Tensor::empty(&[tokens, vocab], DType::F32, x.device(), tag)?;
    if x.device() != Device::Cpu && cuda::decode(x, rows, &mut out)? {
        return Ok(out);
    }
    for (first, count) in slices(vocab, width, x.dtype(), x.device()) {
        let slice = Weight::Dense(rows.rows(first, count, x.dtype(), tag)?);
        let part = linear::forward_as(x, &slice, DType::F32, tag)?;
        columns(&part, 0, &mut out, first, count)?;
    }
    Ok(out)
}

/// `grad · table` for `grad` `[T, V]`: `[T, D]` in its type. Slices of an 8-bit table add up in f32.
///
/// # Errors
/// Shapes do not fit.
pub fn input_grad(grad: &Tensor, table: &Table) -> Result<Tensor> {
    let op = "gradient through a table";
    let tag = Tag::Workspace;
    let rows = match table {
        Table::Dense(tensor) => return linear::input_grad(grad, &Weight::Dense(tensor.clone()), 1.0),
        Table::Rows8(rows) => rows,
    };
    let ((tokens, columns_found), (vocab, width)) = (grad.dims2(op)?, rows.dims()?);
    if columns_found != vocab {
        return Err(Error::shape(op, format!("{:?} with a table [{vocab}, {width}]", grad.shape())));
    }
    let mut sum = Tensor::zeros(&[tokens, width], DType::F32, grad.device(), tag)?;
    for (first, count) in slices(vocab, width, grad.dtype(), grad.device()) {
        let slice = Weight::Dense(rows.rows(first, count, grad.dtype(), tag)?);
        let mut part = Tensor::empty(&[tokens, count], grad.dtype(), grad.device(), tag)?;
        columns(grad, first, &mut part, 0, count)?;
        linear::input_grad_add(&part, &slice, 1.0, &mut sum)?;
    }
    into_dtype(sum, grad.dtype(), tag)
}

/// Copies `count` columns of `from`, from column `from_first` on, to those of `to` from `to_first` on.
///
/// # Errors
/// The matrices differ in type, rows or device, or have no such columns.
pub fn columns(from: &Tensor, from_first: usize, to: &mut Tensor, to_first: usize, count: usize) -> Result<()> {
    let ((rows, width), (to_rows, to_width)) = (from.dims2("copy of columns")?, to.dims2("copy of columns")?);
    let there = |first: usize, width: usize| first.checked_add(count).is_some_and(|end| end <= width);
    let alike = (rows, from.dtype(), from.device()) == (to_rows, to.dtype(), to.device());
    if !(alike && there(from_first, width) && there(to_first, to_width)) {
        let what = format!("columns {from_first}..+{count} of {from:?} to {to_first}.. of {to:?}");
        return Err(Error::shape("copy of columns", what));
    }
    if rows == 0 || count == 0 {
        return Ok(());
    }
    match from.device() {
        Device::Cpu => cpu::columns(from, from_first, to, to_first, count),
        Device::Cuda(_) => cuda::columns(from, from_first, to, to_first, count),
    }
}
