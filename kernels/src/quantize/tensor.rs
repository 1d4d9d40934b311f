//! The quantized matrix: its parts, their consistency, and access to its values.

use super::{QuantType, check_block_size, check_float, cpu};
use nibble_runtime::{DType, Device, Error, Result, Tensor};

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
        /// Mean of the scales, subtracted before quantization.
        offset: f32,
        /// 256 unless a file says otherwise.
        block_size: usize,
    },
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
}

/// The scales of a quantized matrix, with consistent lengths.
#[derive(Clone, Copy)]
pub(super) enum Scales<'a> {
    Single(&'a [f32]),
    Double { codes: &'a [u8], absmax2: &'a [f32], code: &'a [f32; 256], offset: f32, block_size: usize },
}

impl Scales<'_> {
    #[inline(always)]
    pub(super) fn get(&self, block: usize) -> f32 {
        match *self {
            Scales::Single(absmax) => absmax[block],
            // Two roundings, as the reference: no fused multiply-add.
            Scales::Double { codes, absmax2, code, offset, block_size } => {
                code[codes[block] as usize] * absmax2[block / block_size] + offset
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
        let tensor = QuantTensor { packed, absmax, quant_type, block_size, shape, dtype };
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

    /// The parts as slices, after the checks that cost no more than a few comparisons.
    pub(super) fn view(&self) -> Result<View<'_>> {
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
        let length = |part: &str, found: usize, expected: usize| {
            if found == expected {
                return Ok(());
            }
            let what = format!(
                "{part} has {found} elements; shape {:?} with block size {} needs {expected}",
                self.shape, self.block_size
            );
            Err(Error::shape(op, what))
        };
        let packed = self.packed.as_slice::<u8>()?;
        length("packed", packed.len(), numel.div_ceil(2))?;
        let blocks = numel.div_ceil(self.block_size);
        let scales = match &self.absmax {
            Absmax::Single(absmax) => {
                let absmax = absmax.as_slice::<f32>()?;
                length("absmax", absmax.len(), blocks)?;
                Scales::Single(absmax)
            }
            Absmax::Double { codes, absmax2, code, offset, block_size } => {
                if !block_size.is_power_of_two() {
                    let what = format!("nested block size {block_size}; expected a power of two");
                    return Err(Error::invalid(op, what));
                }
                let (codes, absmax2) = (codes.as_slice::<u8>()?, absmax2.as_slice::<f32>()?);
                length("absmax", codes.len(), blocks)?;
                length("nested absmax", absmax2.len(), blocks.div_ceil(*block_size))?;
                let code = code.as_slice::<f32>()?.try_into().map_err(|_| {
                    Error::shape(op, format!("the nested map has shape {:?}; expected [256]", code.shape()))
                })?;
                Scales::Double { codes, absmax2, code, offset: *offset, block_size: *block_size }
            }
        };
        Ok(View {
            packed,
            scales,
            quant_type: self.quant_type,
            block_shift: self.block_size.trailing_zeros(),
            dtype: self.dtype,
            numel,
        })
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
                Absmax::Double { codes, absmax2, .. } => codes.size_bytes() + absmax2.size_bytes() + size_of::<f32>(),
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
        let op = "dequantize";
        let view = self.view()?;
        if start.checked_add(out.len()).is_none_or(|end| end > view.numel) {
            let what = format!("elements {start}..+{} of a tensor of {}", out.len(), view.numel);
            return Err(Error::shape(op, what));
        }
        match self.packed.device() {
            Device::Cpu => cpu::read_f32(&view, start, out),
            device => return Err(Error::NoKernel { op, device }),
        }
        Ok(())
    }
}
