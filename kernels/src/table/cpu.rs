//! Tables in 8 bits on the CPU.

use crate::math::vectorized;
use nibble_runtime::{Result, Tensor};
use rayon::prelude::*;

/// Elements that a task makes at least, so that starting it costs little.
const TASK: usize = 16 << 10;

/// The scale of a row, NaN where it holds something that is not a number.
fn scale(row: &[f32]) -> f32 {
    // By their bits magnitudes compare as numbers do, and a NaN is more than all.
    let top = f32::from_bits(row.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0));
    match top / 127.0 {
        _ if !top.is_finite() => f32::NAN,
        scale if scale < f32::MIN_POSITIVE => 0.0,
        scale => scale,
    }
}

/// Codes `[V, D]` and scales `[V]` of `x`.
pub(super) fn quantize(x: &Tensor, codes: &mut [i8], scales: &mut [f32]) -> Result<()> {
    let width = codes.len() / scales.len().max(1);
    if width == 0 {
        scales.fill(0.0);
        return Ok(());
    }
    codes.par_chunks_mut(width).zip(scales).enumerate().try_for_each_init(
        || vec![0f32; width],
        |row, (number, (codes, found))| {
            x.read_f32(number * width, row)?;
            *found = scale(row);
            let coded = *found > 0.0;
            for (code, &x) in codes.iter_mut().zip(&*row) {
                *code = if coded { (x / *found).round_ties_even() as i8 } else { 0 };
            }
            Ok(())
        },
    )
}

/// The rows `numbers`, which are there, into `out` `[numbers, D]`.
pub(super) fn rows(codes: &[i8], scales: &[f32], numbers: &[usize], out: &mut [f32]) {
    let width = out.len() / numbers.len().max(1);
    out.par_chunks_mut(width.max(1)).zip(numbers).with_min_len(TASK / width.max(1)).for_each(|(out, &number)| {
        let (scale, codes) = (scales[number], &codes[number * width..][..width]);
        vectorized(
            #[inline(always)]
            || out.iter_mut().zip(codes).for_each(|(x, &code)| *x = f32::from(code) * scale),
        );
    });
}

/// See [`super::columns`].
pub(super) fn columns(from: &Tensor, from_first: usize, to: &mut Tensor, to_first: usize, count: usize) -> Result<()> {
    let size = from.dtype().size();
    let (from_width, to_width) = (from.dims2("columns")?.1 * size, to.dims2("columns")?.1 * size);
    let (from_first, to_first, count) = (from_first * size, to_first * size, count * size);
    let from_rows = from.bytes()?.chunks_exact(from_width.max(1));
    for (from, to) in from_rows.zip(to.bytes_mut()?.chunks_exact_mut(to_width.max(1))) {
        to[to_first..][..count].copy_from_slice(&from[from_first..][..count]);
    }
    Ok(())
}
