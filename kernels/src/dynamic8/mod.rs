//! The dynamic 8-bit map and block-wise 8-bit quantization.
//!
//! A map has 256 values in [-1, 1] (or [0, 1]), dense near zero: an indicator bit picks the decimal exponent and the bits
//! that are left divide the decade. A block is scaled by its largest magnitude and each value takes the nearest entry.
//!
//! Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561, and Dettmers et al.,
//! "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861; entries and codes as bitsandbytes'.

use nibble_runtime::{Device, Result, Tag, Tensor, cuda::Gpu};
use std::sync::{LazyLock, Mutex, PoisonError};

/// 256 values, ascending.
pub type Map = [f32; 256];

/// The map for values of both signs: 127 negative ones, zero, 128 positive ones.
pub fn signed_map() -> &'static Map {
    static MAP: LazyLock<Map> = LazyLock::new(|| dynamic_map(true));
    &MAP
}

/// The map for values that are never negative.
pub fn unsigned_map() -> &'static Map {
    static MAP: LazyLock<Map> = LazyLock::new(|| dynamic_map(false));
    &MAP
}

/// The signed map on `device`, f32 `[256]`: one tensor, which all that use it share.
///
/// # Errors
/// The device cannot be used or is out of memory.
pub fn signed_map_on(device: Device) -> Result<Tensor> {
    shared(device, true)
}

/// The unsigned map on `device`, f32 `[256]`.
///
/// # Errors
/// As [`signed_map_on`].
pub fn unsigned_map_on(device: Device) -> Result<Tensor> {
    shared(device, false)
}

fn shared(device: Device, signed: bool) -> Result<Tensor> {
    static MADE: Mutex<Vec<(Device, bool, Tensor)>> = Mutex::new(Vec::new());
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((.., map)) = made.iter().find(|(at, kind, _)| (*at, *kind) == (device, signed)) {
        return Ok(map.clone());
    }
    let map = if signed { signed_map() } else { unsigned_map() };
    let map = Tensor::from_slice(map, &[256], Tag::Weights)?.into_device(device, Tag::Weights)?;
    // Other streams than the one that copies it use it too, without a mark to wait for.
    if let Device::Cuda(_) = device {
        Gpu::of(device)?.synchronize()?;
    }
    made.push((device, signed, map.clone()));
    Ok(map)
}

/// Decades that the map spans.
const DECADES: i32 = 7;

fn dynamic_map(signed: bool) -> Map {
    let mut values = vec![0.0, 1.0];
    for decade in 0..DECADES {
        let intervals = 1usize << (decade + i32::from(!signed));
        // Evenly spaced from 0.1 to 1, counted from the nearer end and rounded once, as the reference does.
        let step = (1.0 - 0.1f32) / intervals as f32;
        let point = |i: usize| match i < intervals.div_ceil(2) {
            true => step.mul_add(i as f32, 0.1),
            false => (-step).mul_add((intervals - i) as f32, 1.0),
        };
        let scale = 10f64.powi(decade - (DECADES - 1)) as f32;
        for i in 0..intervals {
            let value = scale * ((point(i) + point(i + 1)) / 2.0);
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|i| values[i])
}

/// Index of the entry nearest to `x`. Between two entries the midpoint itself goes to the even index; NaN gives 0.
#[inline]
pub fn encode(map: &Map, x: f32) -> u8 {
    // A search over the odd entries, which ends at an even one with `x` between its neighbours.
    // Without branches: which way it goes is a coin toss at every turn.
    let mut at = 127;
    for step in [64, 32, 16, 8, 4, 2, 1] {
        at = at - step + 2 * step * usize::from(x > map[at & 255]);
    }
    let midpoint = |neighbour: usize| (map[neighbour & 255] + map[at & 255]) * 0.5;
    let up = x > midpoint(at + 1);
    let down = (at > 0) & (x < midpoint(at.saturating_sub(1)));
    (at + usize::from(up) - usize::from(down)) as u8
}

/// Largest magnitude of a block; NaN counts for nothing.
pub(crate) fn absmax(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, x| x.abs().max(max))
}

/// Quantizes `values` in blocks of `block` (at least 1): the codes, and the largest magnitude of each block.
pub fn quantize_blockwise(values: &[f32], map: &Map, block: usize) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0; values.len()];
    let absmax = values
        .chunks(block)
        .zip(codes.chunks_mut(block))
        .map(|(values, codes)| quantize_block(values, map, codes))
        .collect();
    (codes, absmax)
}

/// Quantizes one block; returns its largest magnitude.
pub(crate) fn quantize_block(values: &[f32], map: &Map, codes: &mut [u8]) -> f32 {
    let absmax = absmax(values);
    let scale = 1.0 / absmax;
    for (code, &x) in codes.iter_mut().zip(values) {
        *code = encode(map, x * scale);
    }
    absmax
}

/// Undoes [`quantize_blockwise`]: `map[code] · absmax` of each code's block.
pub fn dequantize_blockwise(codes: &[u8], absmax: &[f32], map: &Map, block: usize) -> Vec<f32> {
    let mut values = vec![0.0; codes.len()];
    for ((codes, values), &absmax) in codes.chunks(block).zip(values.chunks_mut(block)).zip(absmax) {
        dequantize_block(codes, absmax, map, values);
    }
    values
}

/// Dequantizes one block.
pub(crate) fn dequantize_block(codes: &[u8], absmax: f32, map: &Map, values: &mut [f32]) {
    for (value, &code) in values.iter_mut().zip(codes) {
        *value = map[code as usize] * absmax;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{Golden, bits};
    use proptest::prelude::*;

    #[test]
    fn maps_are_the_references_to_the_bit() {
        let golden = Golden::open("quant.safetensors");
        for (name, map) in [("map.dynamic_signed", signed_map()), ("map.dynamic_unsigned", unsigned_map())] {
            assert_eq!(bits(&golden.f32(name)), bits(map), "{name}");
        }
    }

    /// The nearest entries by looking at all of them.
    fn nearest(map: &Map, x: f32) -> Vec<u8> {
        let distance = |i: usize| (f64::from(map[i]) - f64::from(x)).abs();
        let least = (0..256).map(distance).fold(f64::INFINITY, f64::min);
        // Midpoints are rounded to f32.
        (0..256).filter(|&i| distance(i) <= least * (1.0 + 1e-6) + 1e-12).map(|i| i as u8).collect()
    }

    #[test]
    fn every_entry_encodes_to_itself_and_the_ends_saturate() {
        for map in [signed_map(), unsigned_map()] {
            for (i, &x) in map.iter().enumerate() {
                assert_eq!(encode(map, x), i as u8);
            }
            assert_eq!(map[usize::from(map[0] < 0.0) * 127], 0.0);
            assert_eq!((encode(map, -2.0), encode(map, 2.0), encode(map, f32::NAN)), (0, 255, 0));
        }
    }

    proptest! {
        #[test]
        fn encodes_to_the_nearest(x in -1.01f32..1.01, exponent in -8i32..1) {
            let x = x * 10f32.powi(exponent);
            for map in [signed_map(), unsigned_map()] {
                prop_assert!(nearest(map, x).contains(&encode(map, x)), "{x}");
            }
        }

        #[test]
        fn quantizing_again_changes_nothing(values in prop::collection::vec(-10f32..10.0, 0..700), block in 1usize..300) {
            let map = signed_map();
            let (codes, absmax) = quantize_blockwise(&values, map, block);
            let back = dequantize_blockwise(&codes, &absmax, map, block);
            for (i, (&x, &y)) in values.iter().zip(&back).enumerate() {
                // Entries lie at most 0.0142 apart.
                prop_assert!((x - y).abs() <= 0.0072 * absmax[i / block], "{x} became {y}");
            }
            for (a, b) in back.chunks(block).zip(codes.chunks(block)) {
                // A block that holds its largest magnitude as +1 comes back as it is.
                if b.contains(&255) {
                    prop_assert_eq!(&quantize_blockwise(a, map, block).0[..], b);
                }
            }
        }
    }
}
