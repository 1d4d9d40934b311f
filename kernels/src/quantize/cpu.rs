//! CPU kernels of 4-bit quantization.

use super::{
    QuantTensor, QuantType,
    codes::{Pairs, encode_fp4, encode_nf4},
    tensor::View,
};
use half::{bf16, f16};
use nibble_runtime::{DType, Error, Float, Result, Tensor};
use rayon::prelude::*;

/// Elements that a task handles at a time: a multiple of every block size, and small enough for the first-level cache.
const PIECE: usize = 4096;

/// Elements that are decoded before they are rounded; every block size is a multiple of half of it.
const STRIP: usize = 64;

/// Quantizes `x` into `packed` (two codes a byte) and `absmax` (one a block).
pub(super) fn quantize(
    x: &Tensor,
    quant_type: QuantType,
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    let numel = x.numel();
    let pieces = packed.par_chunks_mut(PIECE / 2).zip(absmax.par_chunks_mut(PIECE / block_size)).enumerate();
    pieces.try_for_each_init(
        || vec![0.0; PIECE],
        |values, (piece, (packed, absmax))| {
            let start = piece * PIECE;
            let values = &mut values[..PIECE.min(numel - start)];
            x.read_f32(start, values)?;
            let blocks = values.chunks_mut(block_size).zip(packed.chunks_mut(block_size / 2)).zip(absmax);
            for (index, ((values, packed), absmax)) in blocks.enumerate() {
                *absmax = block_absmax(values).ok_or_else(|| not_finite(start + index * block_size, values))?;
                // Of zero, 1/absmax is infinite, 0·∞ is NaN, and a NaN takes code 0.
                let scale = 1.0 / *absmax;
                if *absmax == 0.0 {
                    values.fill(0.0);
                }
                match quant_type {
                    QuantType::Nf4 => pack(values, scale, packed, encode_nf4),
                    QuantType::Fp4 => pack(values, scale, packed, encode_fp4),
                }
            }
            Ok(())
        },
    )
}

/// The largest magnitude, subnormal ones taken as zero; `None` if a value is not finite.
fn block_absmax(values: &[f32]) -> Option<f32> {
    // Magnitudes order like their bits; NaN and infinity come last.
    let bits = values.iter().fold(0, |max, x| max.max(x.to_bits() & 0x7FFF_FFFF));
    let absmax = f32::from_bits(bits);
    absmax.is_finite().then_some(if absmax.is_normal() { absmax } else { 0.0 })
}

fn not_finite(start: usize, values: &[f32]) -> Error {
    let (index, x) = values.iter().enumerate().find(|(_, x)| !x.is_finite()).unwrap_or((0, &f32::NAN));
    Error::invalid("quantize", format!("element {} is {x}; only finite numbers can be quantized", start + index))
}

/// Codes of `values` times `scale`, two a byte; a missing last one counts as zero.
#[inline(always)]
fn pack(values: &[f32], scale: f32, packed: &mut [u8], encode: impl Fn(f32) -> u8) {
    let mut codes = [0; STRIP];
    for (values, packed) in values.chunks(STRIP).zip(packed.chunks_mut(STRIP / 2)) {
        for (code, &x) in codes.iter_mut().zip(values) {
            *code = encode(x * scale);
        }
        if values.len() % 2 == 1 {
            codes[values.len()] = encode(0.0 * scale);
        }
        for (byte, pair) in packed.iter_mut().zip(codes.as_chunks::<2>().0) {
            *byte = pair[0] << 4 | pair[1];
        }
    }
}

/// See [`QuantTensor::read_f32`]; the range has been checked.
pub(super) fn read_f32(view: &View, start: usize, out: &mut [f32]) {
    match view.dtype {
        DType::BF16 => decode(view, start, out, scale_bf16),
        DType::F16 => decode(view, start, out, scale_f16),
        _ => decode(view, start, out, |values, scale| values.iter_mut().for_each(|x| *x *= scale)),
    }
}

/// Decodes block by block; `finish` multiplies code values by their scale and rounds them.
#[inline(always)]
fn decode(view: &View, start: usize, mut out: &mut [f32], finish: impl Fn(&mut [f32], f32)) {
    let pairs = view.quant_type.pairs();
    let mut position = start;
    while !out.is_empty() {
        let block = position >> view.block_shift;
        let left = ((block + 1) << view.block_shift) - position;
        let (values, rest) = out.split_at_mut(left.min(out.len()));
        expand(view.packed, position, values, pairs);
        position += values.len();
        out = rest;
        finish(values, view.scales.get(block));
    }
}

/// Code values of the elements from `position` on.
#[inline(always)]
fn expand(packed: &[u8], position: usize, mut out: &mut [f32], pairs: &Pairs) {
    let mut byte = position / 2;
    if position % 2 == 1 {
        let Some((first, rest)) = out.split_first_mut() else { return };
        *first = pairs[packed[byte] as usize][1];
        byte += 1;
        out = rest;
    }
    let (whole, last) = out.as_chunks_mut::<2>();
    let (bytes, after) = packed[byte..].split_at(whole.len());
    for (pair, &byte) in whole.iter_mut().zip(bytes) {
        *pair = pairs[byte as usize];
    }
    if let ([last], [byte, ..]) = (last, after) {
        *last = pairs[*byte as usize][0];
    }
}

/// Multiplies and rounds to the nearest bf16, to even on a tie. Products are finite, so bit arithmetic does.
#[inline(always)]
fn scale_bf16(values: &mut [f32], scale: f32) {
    for x in values {
        let bits = (*x * scale).to_bits();
        *x = f32::from_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000);
    }
}

/// Bits of 2⁻¹⁴, the smallest normal f16, in f32.
const MIN_F16: u32 = (127 - 14) << 23;

/// As [`scale_bf16`] for f16, whose numbers below 2⁻¹⁴ are multiples of 2⁻²⁴ and which ends at 65504.
#[inline(always)]
fn scale_f16(values: &mut [f32], scale: f32) {
    for x in values {
        let bits = (*x * scale).to_bits();
        let magnitude = bits & 0x7FFF_FFFF;
        let normal = f32::from_bits((magnitude + 0xFFF + (magnitude >> 13 & 1)) & !0x1FFF);
        // In [0.5, 1) the unit in the last place of f32 is 2⁻²⁴.
        let subnormal = f32::from_bits(magnitude) + 0.5 - 0.5;
        let rounded = if magnitude < MIN_F16 { subnormal } else { normal };
        let bounded = if rounded > 65504.0 { f32::INFINITY } else { rounded };
        *x = f32::from_bits(bounded.to_bits() | bits & 0x8000_0000);
    }
}

/// The whole of `quantized` into `out`, which has its shape and dtype.
pub(super) fn dequantize(quantized: &QuantTensor, out: &mut Tensor) -> Result<()> {
    fn narrow<T: Float>(view: &View, out: &mut [T]) {
        out.par_chunks_mut(PIECE).enumerate().for_each_init(
            || vec![0.0; PIECE],
            |values, (piece, out)| {
                let values = &mut values[..out.len()];
                read_f32(view, piece * PIECE, values);
                out.iter_mut().zip(values).for_each(|(out, &mut x)| *out = T::from_f32(x));
            },
        );
    }
    let view = quantized.view()?;
    match quantized.dtype {
        DType::F16 => narrow(&view, out.as_mut_slice::<f16>()?),
        DType::BF16 => narrow(&view, out.as_mut_slice::<bf16>()?),
        _ => {
            let out = out.as_mut_slice::<f32>()?;
            out.par_chunks_mut(PIECE).enumerate().for_each(|(piece, out)| read_f32(&view, piece * PIECE, out));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rounds_as_the_half_crate_does(x in prop_oneof![any::<f32>(), -70000f32..70000.0, -1e-4f32..1e-4, -1e-7f32..1e-7]) {
            prop_assume!(x.is_finite());
            let (mut of_f16, mut of_bf16) = ([x], [x]);
            scale_f16(&mut of_f16, 1.0);
            scale_bf16(&mut of_bf16, 1.0);
            prop_assert_eq!(of_f16[0].to_bits(), f16::from_f32(x).to_f32().to_bits());
            prop_assert_eq!(of_bf16[0].to_bits(), bf16::from_f32(x).to_f32().to_bits());
        }

        #[test]
        fn rounds_ties_to_even(bits in 0u16..0x7BFF) {
            // Half-way between two neighbouring numbers.
            let (a, b) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
            let of_f16 = (a + b) / 2.0;
            let of_bf16 = f32::from_bits(u32::from(bits) << 16 | 0x8000);
            let (mut x, mut y) = ([of_f16], [of_bf16]);
            scale_f16(&mut x, 1.0);
            scale_bf16(&mut y, 1.0);
            prop_assert_eq!(x[0].to_bits(), f16::from_f32(of_f16).to_f32().to_bits());
            prop_assert_eq!(y[0].to_bits(), bf16::from_f32(of_bf16).to_f32().to_bits());
        }
    }
}
