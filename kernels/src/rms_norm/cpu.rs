//! CPU RMSNorm, a row at a time.

use crate::math::{dot, vectorized};
use rayon::prelude::*;

/// Rows that one task takes, and that one partial sum of the weight gradient covers.
const ROWS: usize = 64;

pub(super) fn rstd(x: &[f32], eps: f32, rstd: &mut [f32]) {
    let width = x.len() / rstd.len().max(1);
    rstd.par_chunks_mut(ROWS).zip(x.par_chunks(ROWS * width)).for_each(|(rstd, x)| {
        vectorized(
            #[inline(always)]
            || {
                for (rstd, row) in rstd.iter_mut().zip(x.chunks_exact(width)) {
                    *rstd = 1.0 / (dot(row, row) / width as f32 + eps).sqrt();
                }
            },
        );
    });
}

pub(super) fn apply(x: &[f32], weight: &[f32], rstd: &[f32], y: &mut [f32]) {
    let width = weight.len();
    y.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).zip(rstd.par_chunks(ROWS)).for_each(
        |((y, x), rstd)| {
            for ((y, x), &rstd) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(rstd) {
                for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
                    *y = x * rstd * w;
                }
            }
        },
    );
}

pub(super) fn backward_add(x: &[f32], weight: &[f32], rstd: &[f32], grad: &[f32], dx: &mut [f32]) {
    let width = weight.len();
    let rows = dx.par_chunks_mut(width).zip(x.par_chunks(width)).zip(grad.par_chunks(width)).zip(rstd.par_iter());
    rows.with_min_len(ROWS).for_each(|(((dx, x), grad), &rstd)| {
        vectorized(
            #[inline(always)]
            || {
                let mut sums = [0.0f32; 8];
                let ((g8, g1), (w8, w1), (x8, x1)) =
                    (grad.as_chunks::<8>(), weight.as_chunks::<8>(), x.as_chunks::<8>());
                let mut add = |g: &[f32], w: &[f32], x: &[f32]| {
                    for (((sum, &g), &w), &x) in sums.iter_mut().zip(g).zip(w).zip(x) {
                        *sum += g * w * x;
                    }
                };
                g8.iter().zip(w8).zip(x8).for_each(|((g, w), x)| add(g, w, x));
                add(g1, w1, x1);
                let mean = sums.iter().sum::<f32>() * rstd * rstd / width as f32;
                for (((dx, &g), &w), &x) in dx.iter_mut().zip(grad).zip(weight).zip(x) {
                    *dx += rstd * (g * w - x * mean);
                }
            },
        );
    });
}

/// Partial sums over fixed groups of rows, added in order: the same bits whatever the number of threads.
pub(super) fn weight_grad(x: &[f32], rstd: &[f32], grad: &[f32], dw: &mut [f32]) {
    let width = dw.len();
    let groups = x.par_chunks(ROWS * width).zip(grad.par_chunks(ROWS * width)).zip(rstd.par_chunks(ROWS));
    let partial: Vec<Vec<f32>> = groups
        .map(|((x, grad), rstd)| {
            let mut sum = vec![0.0; width];
            for ((x, grad), &rstd) in x.chunks_exact(width).zip(grad.chunks_exact(width)).zip(rstd) {
                for ((sum, &x), &g) in sum.iter_mut().zip(x).zip(grad) {
                    *sum += g * x * rstd;
                }
            }
            sum
        })
        .collect();
    for part in partial {
        dw.iter_mut().zip(part).for_each(|(dw, part)| *dw += part);
    }
}
