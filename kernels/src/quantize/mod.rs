//! NF4 and FP4 block-wise quantization, with double quantization.
//!
//! Blocks of `block_size` elements run over the flat row-major matrix; the last one may be short. A block's scale is
//! its largest magnitude (`absmax`); each element is multiplied by `1 / absmax` in f32 and takes the code whose value
//! is nearest (on a midpoint the lower one). Double quantization subtracts the mean of the scales (`offset`) and
//! quantizes the rest to 8 bits with the signed dynamic map in blocks of 256: 4.127 bits a weight at block 64. The
//! rule by which a scale takes its code is the caller's to choose: see [`ScaleRounding`].
//!
//! Blocks whose largest magnitude is subnormal in f32 are stored as zeros: `1 / absmax` would overflow.
//!
//! Source: Dettmers et al., "QLoRA", arXiv 2305.14314; byte-compatible with bitsandbytes.

mod codes;
mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
mod scales;
mod tensor;
#[cfg(test)]
mod tests;

pub use codes::{FP4, FP4_MIDPOINTS, NF4, NF4_MIDPOINTS, QuantType};
pub use scales::ScaleRounding;
pub use tensor::{Absmax, Nested, Parts, QuantTensor};

use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};

/// Block sizes that can be used: powers of two from the first to the last.
pub const BLOCK_SIZES: std::ops::RangeInclusive<usize> = 32..=4096;

/// Scales in a block of the double quantization.
pub const SCALE_BLOCK: usize = 256;

fn check_block_size(op: &'static str, block_size: usize) -> Result<()> {
    if block_size.is_power_of_two() && BLOCK_SIZES.contains(&block_size) {
        return Ok(());
    }
    Err(Error::invalid(op, format!("block size {block_size}; expected a power of two from 32 to 4096")))
}

fn check_float(op: &'static str, dtype: DType) -> Result<()> {
    if dtype.is_float() {
        return Ok(());
    }
    Err(Error::DType { op, expected: "float".into(), found: dtype })
}

/// Quantizes a float matrix `x` `[N, K]`. `dtype` is the type that dequantized values will be rounded to, in most
/// cases that of `x`. `double_quant` is `None` for scales in f32. The result's memory is counted under `tag`.
///
/// A GPU gives the bytes that the CPU gives, and is not waited for. It cannot report a NaN or an infinity: the scale of a
/// block that holds one is NaN, and so is every value that is dequantized from it (with double quantization, from all).
///
/// # Errors
/// `x` is not a matrix of floats, is empty, or (on the CPU) holds a NaN or an infinity; `block_size` is not a power of
/// two from 32 to 4096; `dtype` is not a float type.
pub fn quantize(
    x: &Tensor,
    quant_type: QuantType,
    block_size: usize,
    double_quant: Option<ScaleRounding>,
    dtype: DType,
    tag: Tag,
) -> Result<QuantTensor> {
    let op = "quantize";
    x.dims2(op)?;
    check_float(op, x.dtype())?;
    check_float(op, dtype)?;
    check_block_size(op, block_size)?;
    let numel = x.numel();
    if numel == 0 {
        return Err(Error::shape(op, format!("shape {:?} has no elements", x.shape())));
    }
    let device = x.device();
    let mut packed = Tensor::empty(&[numel.div_ceil(2)], DType::U8, device, tag)?;
    let mut scales = Tensor::empty(&[numel.div_ceil(block_size)], DType::F32, device, tag)?;
    match device {
        Device::Cpu => cpu::quantize(x, quant_type, block_size, packed.as_mut_slice()?, scales.as_mut_slice()?)?,
        Device::Cuda(_) => cuda::quantize(x, quant_type, block_size, &mut packed, &mut scales)?,
    }
    let absmax = match (double_quant, device) {
        (None, _) => Absmax::Single(scales),
        (Some(rounding), Device::Cpu) => {
            let scales = scales.as_slice()?;
            scales::quantize_scales(scales, scales::mean(scales), rounding, tag)?
        }
        (Some(rounding), Device::Cuda(_)) => cuda::quantize_scales(&scales, rounding, tag)?,
    };
    Ok(QuantTensor { packed, absmax, quant_type, block_size, shape: x.shape().to_vec(), dtype, dense: None })
}

/// Bytes of the tensors that [`quantize`] makes of `numel` weights, whose scales are quantized too if `double`.
pub fn tensor_bytes(numel: usize, block_size: usize, double: bool) -> Vec<usize> {
    let (packed, scales) = (numel.div_ceil(2), numel.div_ceil(block_size));
    match double {
        false => vec![packed, scales * size_of::<f32>()],
        true => vec![packed, scales, scales.div_ceil(SCALE_BLOCK) * size_of::<f32>(), size_of::<f32>()],
    }
}

/// The matrix `[N, K]` that `quantized` stands for, in its dtype: `value[code] · absmax` in f32, then one rounding.
///
/// # Errors
/// The parts of `quantized` do not fit together (see [`QuantTensor::validate`]).
pub fn dequantize(quantized: &QuantTensor, tag: Tag) -> Result<Tensor> {
    let device = quantized.packed.device();
    let mut out = Tensor::empty(&quantized.shape, quantized.dtype, device, tag)?;
    match device {
        Device::Cpu => cpu::dequantize(quantized, &mut out)?,
        Device::Cuda(_) => cuda::dequantize(quantized, &mut out)?,
    }
    Ok(out)
}
