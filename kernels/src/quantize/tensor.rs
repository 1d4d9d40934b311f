//! The quantized matrix: its parts, their consistency, and access to its values.

use super::{QuantType, check_block_size, check_float, cpu, dequantize};
use crate::dynamic8;
use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};

/// Block-wise scales of a [`QuantTensor`].
#[derive(Clone, Debug)]
pub enum Absmax {
    /// One f32 a block: `[blocks]`.
    Single(Tensor),
    /// The scales themselves quantized to 8 bits: `absmax[i] = code[codes[i]] * absmax2[i / block_size] + offset`.
    Double {
        /// u8 `[blocks]`.
        codes: Tensor,
        /// f32 `[ceil(blocks / block_size)]`.
        absmax2: Tensor,
        /// The dynamic map, f32 `[256]`.
        code: Tensor,
        /// Mean of the scales, subtracted before quantization: f32 `[1]`.
        offset: Tensor,
        /// 256 unless a file says otherwise.
        block_size: usize,
    },
}

/// The tensors of a quantized matrix and what it takes to read them, on whatever device they are; their types and
/// lengths fit together.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// u8 `[ceil(N·K / 2)]`.
    pub packed: &'a Tensor,
    /// f32 `[blocks]`, or u8 `[blocks]` where `nested` is there.
    pub absmax: &'a Tensor,
    /// What double quantization adds.
    pub nested: Option<Nested<'a>>,
    /// Code book.
    pub quant_type: QuantType,
    /// Logarithm of the block size.
    pub block_shift: u32,
    /// Type that dequantized values are rounded to.
    pub dtype: DType,
    /// Number of weights.
    pub numel: usize,
}

/// See [`Absmax::Double`].
#[derive(Clone, Copy, Debug)]
pub struct Nested<'a> {
    /// f32 `[ceil(blocks / 2^block_shift)]`.
    pub absmax2: &'a Tensor,
    /// f32 `[256]`.
    pub code: &'a Tensor,
    /// f32 `[1]`.
    pub offset: &'a Tensor,
    /// Logarithm of the block size of the scales.
    pub block_shift: u32,
}

/// A matrix quantized to 4 bits.
#[derive(Clone, Debug)]
pub struct QuantTensor {
    /// u8 `[ceil(N·K / 2)]`: flat row-major elements, the even one in the high nibble.
    pub packed: Tensor,
    /// Scales of the blocks.
    pub absmax: Absmax,
    /// Code book.
    pub quant_type: QuantType,
    /// Elements in a block: a power of two, 32 to 4096.
    pub block_size: usize,
    /// `[N, K]` (rows are outputs).
    pub shape: Vec<usize>,
    /// Type that dequantized values are rounded to.
    pub dtype: DType,
    /// The matrix itself, where memory is spent to have it ([`QuantTensor::hold_dense`]).
    pub dense: Option<Tensor>,
}

/// Whether a table is the dynamic map, of which one copy on a device serves all tensors.
fn is_signed_map(code: &Tensor) -> bool {
    code.as_slice::<f32>().is_ok_and(|code| code == dynamic8::signed_map())
}

/// The scales of a quantized matrix, with consistent lengths.
#[derive(Clone, Copy)]
pub(super) enum Scales<'a> {
    Single(&'a [f32]),
    Double { codes: &'a [u8], absmax2: &'a [f32], code: &'a [f32; 256], offset: f32, block_shift: u32 },
}

impl Scales<'_> {
    #[inline(always)]
    pub(super) fn get(&self, block: usize) -> f32 {
        match *self {
            Scales::Single(absmax) => absmax[block],
            // Two roundings, as the reference: no fused multiply-add.
            Scales::Double { codes, absmax2, code, offset, block_shift } => {
                code[codes[block] as usize] * absmax2[block >> block_shift] + offset
            }
        }
    }
}

/// Borrowed parts of a quantized matrix whose lengths have been checked.
pub(super) struct View<'a> {
    pub packed: &'a [u8],
    pub scales: Scales<'a>,
    pub quant_type: QuantType,
    /// Logarithm of the block size.
    pub block_shift: u32,
    pub dtype: DType,
    pub numel: usize,
}

impl QuantTensor {
    /// A quantized matrix of checked parts.
    ///
    /// # Errors
    /// As [`QuantTensor::validate`].
    pub fn new_checked(
        packed: Tensor,
        absmax: Absmax,
        quant_type: QuantType,
        block_size: usize,
        shape: Vec<usize>,
        dtype: DType,
    ) -> Result<Self> {
        let tensor = QuantTensor { packed, absmax, quant_type, block_size, shape, dtype, dense: None };
        tensor.validate()?;
        Ok(tensor)
    }

    /// Checks that the parts fit together: types, lengths, block sizes, and scales that are finite numbers.
    ///
    /// # Errors
    /// Names the part that does not fit, what it is and what was expected.
    pub fn validate(&self) -> Result<()> {
        for (block, scale) in self.scales()?.into_iter().enumerate() {
            if !scale.is_finite() {
                return Err(Error::invalid("quantized tensor", format!("the scale of block {block} is {scale}")));
            }
        }
        Ok(())
    }

    /// The tensors, after checks of their types, lengths and devices, which cost no more than a few comparisons. Their
    /// values are not read.
    ///
    /// # Errors
    /// As [`QuantTensor::validate`], values apart.
    pub fn parts(&self) -> Result<Parts<'_>> {
        let op = "quantized tensor";
        let [rows, columns] = self.shape[..] else {
            return Err(Error::shape(op, format!("expected shape [N, K], found {:?}", self.shape)));
        };
        let numel = rows
            .checked_mul(columns)
            .filter(|&numel| numel > 0)
            .ok_or_else(|| Error::shape(op, format!("shape {:?} is empty or larger than memory", self.shape)))?;
        check_block_size(op, self.block_size)?;
        check_float(op, self.dtype)?;
        let part = |name: &str, tensor: &Tensor, dtype: DType, expected: usize| {
            if tensor.dtype() != dtype {
                return Err(Error::DType { op, expected: dtype.to_string(), found: tensor.dtype() });
            }
            let (found, here, there) = (tensor.numel(), self.packed.device(), tensor.device());
            if found != expected {
                let (shape, block) = (&self.shape, self.block_size);
                let what =
                    format!("{name} has {found} elements; shape {shape:?} with block size {block} needs {expected}");
                return Err(Error::shape(op, what));
            }
            if here != there {
                return Err(Error::invalid(op, format!("packed is on {here} and {name} on {there}")));
            }
            Ok(())
        };
        part("packed", &self.packed, DType::U8, numel.div_ceil(2))?;
        let blocks = numel.div_ceil(self.block_size);
        let (absmax, nested) = match &self.absmax {
            Absmax::Single(absmax) => {
                part("absmax", absmax, DType::F32, blocks)?;
                (absmax, None)
            }
            Absmax::Double { codes, absmax2, code, offset, block_size } => {
                if !block_size.is_power_of_two() {
                    let what = format!("nested block size {block_size}; expected a power of two");
                    return Err(Error::invalid(op, what));
                }
                part("absmax", codes, DType::U8, blocks)?;
                part("nested absmax", absmax2, DType::F32, blocks.div_ceil(*block_size))?;
                part("the nested map", code, DType::F32, 256)?;
                part("the nested offset", offset, DType::F32, 1)?;
                (codes, Some(Nested { absmax2, code, offset, block_shift: block_size.trailing_zeros() }))
            }
        };
        Ok(Parts {
            packed: &self.packed,
            absmax,
            nested,
            quant_type: self.quant_type,
            block_shift: self.block_size.trailing_zeros(),
            dtype: self.dtype,
            numel,
        })
    }

    /// [`QuantTensor::parts`] of a matrix in host memory, as slices.
    pub(super) fn view(&self) -> Result<View<'_>> {
        let parts = self.parts()?;
        let scales = match parts.nested {
            None => Scales::Single(parts.absmax.as_slice()?),
            Some(Nested { absmax2, code, offset, block_shift }) => {
                let shape = || Error::shape("quantized tensor", "the nested map or offset has another length");
                Scales::Double {
                    codes: parts.absmax.as_slice()?,
                    absmax2: absmax2.as_slice()?,
                    code: code.as_slice()?.try_into().map_err(|_| shape())?,
                    offset: *offset.as_slice()?.first().ok_or_else(shape)?,
                    block_shift,
                }
            }
        };
        let Parts { packed, quant_type, block_shift, dtype, numel, .. } = parts;
        Ok(View { packed: packed.as_slice()?, scales, quant_type, block_shift, dtype, numel })
    }

    /// The same matrix on `device`, its tensors counted under `tag`.
    ///
    /// # Errors
    /// The device cannot be used or is out of memory.
    pub fn to_device(&self, device: Device, tag: Tag) -> Result<Self> {
        let absmax = match &self.absmax {
            Absmax::Single(absmax) => Absmax::Single(absmax.to_device(device, tag)?),
            Absmax::Double { codes, absmax2, code, offset, block_size } => Absmax::Double {
                codes: codes.to_device(device, tag)?,
                absmax2: absmax2.to_device(device, tag)?,
                code: match is_signed_map(code) {
                    true => dynamic8::signed_map_on(device)?,
                    false => code.to_device(device, tag)?,
                },
                offset: offset.to_device(device, tag)?,
                block_size: *block_size,
            },
        };
        let packed = self.packed.to_device(device, tag)?;
        Ok(QuantTensor { packed, absmax, shape: self.shape.clone(), dense: None, ..*self })
    }

    /// Holds the matrix dequantized to this type, beside its codes, or no longer: products that would dequantize it as a whole
    /// ([`dequantizes`](crate::linear::dequantizes)) to that type take it instead.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn hold_dense(&mut self, dtype: Option<DType>, tag: Tag) -> Result<()> {
        if self.dense.as_ref().map(Tensor::dtype) != dtype {
            self.dense = None;
            let held = dtype.map(|dtype| dequantize(&QuantTensor { dtype, ..self.clone() }, tag));
            self.dense = held.transpose()?;
        }
        Ok(())
    }

    /// Number of weights.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of codes and scales. The dynamic map is not counted: it is the same for every tensor.
    pub fn size_bytes(&self) -> usize {
        self.packed.size_bytes()
            + match &self.absmax {
                Absmax::Single(absmax) => absmax.size_bytes(),
                Absmax::Double { codes, absmax2, offset, .. } => {
                    codes.size_bytes() + absmax2.size_bytes() + offset.size_bytes()
                }
            }
    }

    /// Bits that a weight takes, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.size_bytes() as f64 / self.numel() as f64
    }

    /// The scale of each block.
    ///
    /// # Errors
    /// The parts do not fit together.
    pub fn scales(&self) -> Result<Vec<f32>> {
        let view = self.view()?;
        let blocks = view.numel.div_ceil(self.block_size);
        Ok((0..blocks).map(|block| view.scales.get(block)).collect())
    }

    /// Dequantizes the weights from flat index `start` on into `out`: each is rounded to the tensor's dtype and widened
    /// again. Any range will do; runs on the calling thread.
    ///
    /// # Errors
    /// The range goes beyond the tensor, or its parts do not fit together.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<()> {
        let width = out.len();
        self.read_rows(std::iter::once(start), width, out)
    }

    /// As [`QuantTensor::read_f32`], `width` weights from each of `starts` on, one row of `out` after another.
    pub(crate) fn read_rows(&self, starts: impl Iterator<Item = usize>, width: usize, out: &mut [f32]) -> Result<()> {
        let op = "dequantize";
        let view = self.view()?;
        if let device @ Device::Cuda(_) = self.packed.device() {
            return Err(Error::NoKernel { op, device });
        }
        for (start, row) in starts.zip(out.chunks_exact_mut(width.max(1))) {
            if start.checked_add(width).is_none_or(|end| end > view.numel) {
                let what = format!("elements {start}..+{width} of a tensor of {}", view.numel);
                return Err(Error::shape(op, what));
            }
            cpu::read_f32(&view, start, row);
        }
        Ok(())
    }
}
