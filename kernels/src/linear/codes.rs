//! What the kernels of products are told about a 4-bit weight.

use crate::quantize::{Absmax, QuantTensor, QuantType};
use nibble_runtime::{DType, Error, Result, Tensor};

/// What a kernel is told about a weight of codes; nothing of a dense one.
#[derive(Default)]
pub(crate) struct Codes<'a> {
    pub(crate) absmax: Option<&'a Tensor>,
    pub(crate) nested: Option<&'a Tensor>,
    pub(crate) map: Option<&'a Tensor>,
    pub(crate) offset: Option<&'a Tensor>,
    pub(crate) block_shift: u32,
    pub(crate) nested_shift: u32,
    /// Row of `CODE_VALUES`.
    pub(crate) quant_type: u32,
}

impl<'a> Codes<'a> {
    /// The parts of `quantized`, after a check that kernels stay inside of them.
    pub(crate) fn of(op: &'static str, quantized: &'a QuantTensor) -> Result<Self> {
        let (numel, block_size) = (quantized.numel(), quantized.block_size);
        let power = |size: usize, least: usize| match size.is_power_of_two() && size >= least {
            true => Ok(size.trailing_zeros()),
            false => Err(Error::invalid(op, format!("block size {size}; expected a power of two from {least} on"))),
        };
        let block_shift = power(block_size, 32)?;
        let blocks = numel.div_ceil(block_size);
        let part = |name: &str, tensor: &Tensor, dtype: DType, length: usize| {
            if (tensor.dtype(), tensor.numel()) == (dtype, length) {
                return Ok(());
            }
            let (found, shape) = (tensor.dtype(), tensor.shape());
            let what = format!("{name} is {found} {shape:?}; {:?} in 4 bits needs {length} {dtype}", quantized.shape);
            Err(Error::shape(op, what))
        };
        part("packed", &quantized.packed, DType::U8, numel.div_ceil(2))?;
        let quant_type = match quantized.quant_type {
            QuantType::Nf4 => 0,
            QuantType::Fp4 => 1,
        };
        let codes = Codes { block_shift, quant_type, ..Codes::default() };
        match &quantized.absmax {
            Absmax::Single(absmax) => {
                part("absmax", absmax, DType::F32, blocks)?;
                Ok(Codes { absmax: Some(absmax), ..codes })
            }
            Absmax::Double { codes: absmax, absmax2, code, offset, block_size } => {
                let nested_shift = power(*block_size, 1)?;
                part("absmax", absmax, DType::U8, blocks)?;
                part("nested absmax", absmax2, DType::F32, blocks.div_ceil(*block_size))?;
                part("nested map", code, DType::F32, 256)?;
                part("nested offset", offset, DType::F32, 1)?;
                let (absmax, nested, map) = (Some(absmax), Some(absmax2), Some(code));
                Ok(Codes { absmax, nested, map, offset: Some(offset), nested_shift, ..codes })
            }
        }
    }

    /// Its tensors.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &'a Tensor> {
        [self.absmax, self.nested, self.map, self.offset].into_iter().flatten()
    }
}
