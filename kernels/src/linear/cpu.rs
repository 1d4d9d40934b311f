//! CPU products: the weight passes by in f32 panels of whole rows.

use super::{
    PANEL, Weight,
    matrix::{Matrix, MatrixMut, product},
};
use nibble_runtime::{DType, Result, Tag, Tensor};
use rayon::prelude::*;

/// Calls `f(first row, rows, panel)` for each panel of `weight` `[n, k]` in order.
fn for_panels(weight: &Weight, n: usize, k: usize, mut f: impl FnMut(usize, usize, &[f32])) -> Result<()> {
    if let Weight::Dense(tensor) = weight
        && tensor.dtype() == DType::F32
    {
        f(0, n, tensor.as_slice()?);
        return Ok(());
    }
    let panel_rows = (PANEL / k.max(1)).clamp(16, 1024).min(n.max(1));
    let mut panel = Tensor::empty(&[panel_rows, k], DType::F32, nibble_runtime::Device::Cpu, Tag::Workspace)?;
    let panel = panel.as_mut_slice::<f32>()?;
    for first in (0..n).step_by(panel_rows) {
        let rows = panel_rows.min(n - first);
        let panel = &mut panel[..rows * k];
        panel
            .par_chunks_mut(16 * k.max(1))
            .enumerate()
            .try_for_each(|(i, part)| weight.read_f32((first + 16 * i) * k, part))?;
        f(first, rows, panel);
    }
    Ok(())
}

/// `out [t, n] (+)= scale · x [t, k] · Wᵀ`.
pub(super) fn times_transposed(
    x: &[f32],
    weight: &Weight,
    n: usize,
    k: usize,
    scale: f32,
    out: &mut [f32],
    add: bool,
) -> Result<()> {
    let t = out.len() / n.max(1);
    for_panels(weight, n, k, |first, rows, panel| {
        let out = MatrixMut::strided(&mut out[first.min(t * n)..], t, rows, n);
        product(Matrix::new(x, t, k), Matrix::new(panel, rows, k).t(), scale, out, add, true);
    })
}

/// `out [t, k] (+)= scale · g [t, n] · W`.
pub(super) fn times(
    grad: &[f32],
    weight: &Weight,
    n: usize,
    k: usize,
    scale: f32,
    out: &mut [f32],
    add: bool,
) -> Result<()> {
    let t = out.len() / k.max(1);
    for_panels(weight, n, k, |first, rows, panel| {
        let grad = Matrix::strided(&grad[first.min(t * n)..], t, rows, n);
        product(grad, Matrix::new(panel, rows, k), scale, MatrixMut::new(out, t, k), add || first > 0, true);
    })
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
