//! Double quantization: the scales of a matrix in 8 bits.

use super::{Absmax, SCALE_BLOCK};
use crate::dynamic8;
use nibble_runtime::{Device, Result, Tag, Tensor};
use std::sync::LazyLock;

/// How a scale, centred and divided by the largest magnitude of its block, becomes an 8-bit code. bitsandbytes has two ways,
/// which differ by one code where a value is near the middle between two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ScaleRounding {
    /// The code nearest to the value: bitsandbytes where it quantizes on a GPU.
    Exact,
    /// The value is first rounded to one of 65,536 even steps from -1 to 1, and the code nearest to that step is taken:
    /// bitsandbytes where it quantizes on a CPU, so that checkpoints quantized there come out the same to the byte.
    #[default]
    Stepped,
}

/// Steps from -1 to 1, less one.
const LAST_STEP: usize = 65_535;

/// The code of each step: that of the nearest entry of the signed map, the lower one in the middle between two.
static STEPS: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let map = dynamic8::signed_map();
    let mut code = 0;
    let code_of_step = |step: usize| {
        let value = -1.0 + (2.0 * step as f32) / LAST_STEP as f32;
        while code < 255 && 0.5 * (map[code] + map[code + 1]) < value {
            code += 1;
        }
        code as u8
    };
    (0..=LAST_STEP).map(code_of_step).collect()
});

/// [`ScaleRounding::Stepped`] of a value in [-1, 1]; NaN (0 · 1/0, in a block of zeros) gives 0.
fn stepped(steps: &[u8], x: f32) -> u8 {
    // Each operation is rounded to f32, as in the reference.
    let step = (x.clamp(-1.0, 1.0) + 1.0) * 0.5 * LAST_STEP as f32 + 0.5;
    steps[step as usize & LAST_STEP]
}

/// Scales summed by a task of [`mean`].
pub(super) const MEAN_PIECE: usize = 4096;

/// Running sums of a task, added in pairs at its end. The kernel has as many threads.
const MEAN_LANES: usize = 256;

/// The sum of `count` numbers in a fixed order, which the GPU keeps too: each of 256 lanes adds up every 256th, and the
/// upper half of the lanes is added to the lower until one is left.
fn sum(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut lanes = [0.0; MEAN_LANES];
    for (i, x) in numbers.enumerate() {
        lanes[i % MEAN_LANES] += x;
    }
    let mut width = MEAN_LANES / 2;
    while width > 0 {
        let (lower, upper) = lanes.split_at_mut(width);
        lower.iter_mut().zip(upper).for_each(|(a, b)| *a += *b);
        width /= 2;
    }
    lanes[0]
}

/// Mean of the scales, accumulated in f64: the same bits on every device.
pub(super) fn mean(scales: &[f32]) -> f32 {
    let pieces = scales.chunks(MEAN_PIECE).map(|piece| sum(piece.iter().map(|&x| f64::from(x))));
    (sum(pieces) / scales.len() as f64) as f32
}

/// Double quantization of `scales` around a given `offset`.
pub(super) fn quantize_scales(scales: &[f32], offset: f32, rounding: ScaleRounding, tag: Tag) -> Result<Absmax> {
    let centred: Vec<f32> = scales.iter().map(|&x| x - offset).collect();
    let map = dynamic8::signed_map();
    let (mut codes, absmax2) = dynamic8::quantize_blockwise(&centred, map, SCALE_BLOCK);
    if rounding == ScaleRounding::Stepped {
        let blocks = centred.chunks(SCALE_BLOCK).zip(codes.chunks_mut(SCALE_BLOCK)).zip(&absmax2);
        for ((values, codes), absmax) in blocks {
            let scale = 1.0 / absmax;
            codes.iter_mut().zip(values).for_each(|(code, x)| *code = stepped(&STEPS, x * scale));
        }
    }
    Ok(Absmax::Double {
        codes: Tensor::from_slice(&codes, &[codes.len()], tag)?,
        absmax2: Tensor::from_slice(&absmax2, &[absmax2.len()], tag)?,
        code: dynamic8::signed_map_on(Device::Cpu)?,
        offset: Tensor::from_slice(&[offset], &[1], tag)?,
        block_size: SCALE_BLOCK,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ends_and_what_is_no_number() {
        let of = |x| stepped(&STEPS, x);
        assert_eq!((of(-1.0), of(-7.0), of(1.0), of(f32::INFINITY), of(f32::NAN)), (0, 0, 255, 255, 0));
        // Zero lies between two steps.
        assert_eq!(of(0.0), dynamic8::encode(dynamic8::signed_map(), 1.0 / LAST_STEP as f32));
    }

    proptest! {
        /// A step is 3e-5 wide, so that only entries closer together than that can be skipped over.
        #[test]
        fn the_value_of_a_step_is_the_nearest_to_within_a_step(x in -1f32..1.0) {
            let map = dynamic8::signed_map();
            let distance = |code: u8| (map[code as usize] - x).abs();
            let (found, nearest) = (stepped(&STEPS, x), dynamic8::encode(map, x));
            prop_assert!(distance(found) <= distance(nearest) + 3.2e-5, "{x}: {found} and {nearest}");
            if map[nearest as usize].abs() > 0.01 {
                prop_assert!(found.abs_diff(nearest) <= 1);
            }
        }
    }
}
