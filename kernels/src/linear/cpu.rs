//! CPU products. Each task makes a strip of the result's columns from its own part of the weights, end to end: it converts
//! a panel of a weight to f32, multiplies, goes on to the next. Tasks share nothing and wait for nobody.

use super::{
    Terms, Weight,
    matrix::{Matrix, MatrixMut, product},
    rounded,
};
use crate::math::vectorized;
use half::{bf16, f16};
use nibble_runtime::{DType, Device, Float, Result, Tag, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Columns of the result that a task makes: whole vectors, so many that a panel is converted fast against its use.
pub(super) const STRIP: usize = 96;

/// Length of the inner dimension in a panel.
pub(super) const DEPTH: usize = 2048;

/// Bytes of the panels of a product with `columns` columns and this inner dimension, if every thread has one.
pub(super) fn panel_bytes(columns: usize, inner: usize) -> usize {
    let strips = columns.div_ceil(STRIP).min(rayon::current_num_threads());
    strips * columns.min(STRIP) * inner.min(DEPTH) * size_of::<f32>()
}

/// Which way round a weight `[N, K]` is multiplied.
#[derive(Clone, Copy)]
pub(super) enum Side {
    /// `x [T, K] · Wᵀ`.
    Forward,
    /// `g [T, N] · W`.
    Backward,
}

/// The product of `x` with `weight`, and with the low-rank branch, as `terms` say. Shapes have been checked.
pub(super) fn times(side: Side, x: &Tensor, weight: &Weight, scale: f32, terms: Terms, out: &mut Tensor) -> Result<()> {
    let mut factors = vec![(x.to_f32()?, weight)];
    let low_rank = terms.lora.map(|(left, right)| (left, Weight::Dense(right.clone())));
    if let Some((left, right)) = &low_rank {
        factors.push((left.to_f32()?, right));
    }
    let columns = out.dims2("linear")?.1;
    rounded(out, terms, |out, add| {
        if let [(x, Weight::Dense(w))] = &factors[..]
            && w.dtype() == DType::F32
        {
            // Nothing to convert; and a LoRA matrix can be too narrow for strips.
            let (n, k) = w.dims2("linear")?;
            let w = side.orient(Matrix::new(w.as_slice()?, n, k));
            let t = out.len() / columns.max(1);
            product(Matrix::new(x, t, w.rows()), w, scale, MatrixMut::new(out, t, columns), add, true);
            return Ok(());
        }
        let t = out.len() / columns.max(1);
        MatrixMut::new(out, t, columns).strips(STRIP).into_par_iter().try_for_each(|mut strip| {
            let mut add = add;
            for (x, weight) in &factors {
                add_product(side, x, weight, scale, &mut strip, add)?;
                add = true;
            }
            Ok(())
        })
    })
}

impl Side {
    fn orient(self, w: Matrix) -> Matrix {
        match self {
            Side::Forward => w.t(),
            Side::Backward => w,
        }
    }
}

/// `strip (+)= scale · x · (Wᵀ or W)`, panel by panel.
fn add_product(side: Side, x: &[f32], weight: &Weight, scale: f32, strip: &mut MatrixMut, add: bool) -> Result<()> {
    let (n, k) = weight.dims()?;
    let inner = match side {
        Side::Forward => k,
        Side::Backward => n,
    };
    let own = strip.first_column()..strip.first_column() + strip.columns();
    let mut panel = Tensor::empty(&[own.len() * DEPTH.min(inner)], DType::F32, Device::Cpu, Tag::Workspace)?;
    for start in (0..inner.max(1)).step_by(DEPTH) {
        let part = start..inner.min(start + DEPTH);
        let (rows, columns) = match side {
            Side::Forward => (own.clone(), part.clone()),
            Side::Backward => (part.clone(), own.clone()),
        };
        let w = side.orient(block(weight, k, rows, columns, panel.as_mut_slice()?)?);
        let x = Matrix::strided(&x[start.min(x.len())..], strip.rows(), part.len(), inner);
        product(x, w, scale, strip.reborrow(), add || start > 0, false);
    }
    Ok(())
}

/// A block of a weight of width `k`: in place if it is f32, otherwise converted into `panel`.
fn block<'a>(
    weight: &'a Weight,
    k: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    panel: &'a mut [f32],
) -> Result<Matrix<'a>> {
    let (height, width) = (rows.len(), columns.len());
    let panel = &mut panel[..height * width];
    let starts = rows.clone().map(|row| row * k + columns.start);
    match weight {
        Weight::Quantized(quantized) => quantized.read_rows(starts, width, panel)?,
        Weight::Dense(tensor) => match tensor.dtype() {
            DType::BF16 => widen(tensor.as_slice::<bf16>()?, starts, width, panel),
            DType::F16 => widen(tensor.as_slice::<f16>()?, starts, width, panel),
            _ => return Ok(Matrix::strided(&tensor.as_slice()?[rows.start * k + columns.start..], height, width, k)),
        },
    }
    Ok(Matrix::new(panel, height, width))
}

/// Converts `width` values from each of `starts` on.
fn widen<T: Float>(values: &[T], starts: impl Iterator<Item = usize>, width: usize, out: &mut [f32]) {
    vectorized(
        #[inline(always)]
        || {
            for (start, out) in starts.zip(out.chunks_exact_mut(width.max(1))) {
                out.iter_mut().zip(&values[start..][..width]).for_each(|(out, &x)| *out = x.to_f32());
            }
        },
    );
}

/// `out [n, k] (+)= scale · gᵀ · x`.
pub(crate) fn weight_grad(
    grad: &[f32],
    x: &[f32],
    (t, n, k): (usize, usize, usize),
    scale: f32,
    out: &mut [f32],
    add: bool,
) {
    product(Matrix::new(grad, t, n).t(), Matrix::new(x, t, k), scale, MatrixMut::new(out, n, k), add, true);
}
