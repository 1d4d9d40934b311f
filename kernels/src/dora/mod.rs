//! Rows of a weight that have a length of their own: what DoRA adds to a low-rank adapter.
//!
//! With `V = W + s·B·A` `[N, K]` and a magnitude `m` `[N]`, the weight is `diag(g)·V` with `g = m / ‖V‖`, row by row. For
//! `z = x·Vᵀ`, and with `‖V‖` taken as a constant in the backward pass, as the source does to save memory:
//!
//! | function | computes | shape |
//! |---|---|---|
//! | [`inverse_norms`] | `1 / ‖V‖` | f32 `[N]` |
//! | [`gains`] | `g = m · (1 / ‖V‖)` | f32 `[N]` |
//! | [`scale`] | `y = z·diag(g)`, and `dz = dy·diag(g)` | `[T, N]` |
//! | [`magnitude_grad`] | `dm = (1 / ‖V‖) · Σ_rows dy·z` | f32 `[N]` |
//!
//! Each of these is a part of [`crate::rms_norm`] with rows or columns that are not scaled, and runs its kernels.
//! Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, section 4.3.

#[cfg(test)]
mod tests;

use crate::rms_norm;
use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};

/// `value` for each of `count` rows or columns.
fn constant(value: f32, count: usize, device: Device) -> Result<Tensor> {
    Tensor::from_slice(&vec![value; count], &[count], Tag::Workspace)?.into_device(device, Tag::Workspace)
}

/// `a · b` of two f32 vectors.
fn times(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let column = a.reshape(&[a.numel(), 1])?;
    rms_norm::apply(&column, &constant(1.0, 1, a.device())?, b)?.reshape(a.shape())
}

fn check(op: &'static str, vector: &Tensor, length: usize) -> Result<()> {
    if vector.shape() != [length] || vector.dtype() != DType::F32 {
        let what = format!("{} {:?} is no f32 [{length}]", vector.dtype(), vector.shape());
        return Err(Error::shape(op, what));
    }
    Ok(())
}

/// `1 / ‖v‖` of each row of `v` `[N, K]`, f32 `[N]`.
///
/// # Errors
/// `v` is no matrix.
pub fn inverse_norms(v: &Tensor) -> Result<Tensor> {
    let (_, width) = v.dims2("DoRA norms")?;
    // RMSNorm's scale is 1/√(‖v‖²/K + ε).
    let (_, inverse) = rms_norm::forward(v, &constant(0.0, width, v.device())?, 0.0)?;
    let share = constant(1.0 / (width as f32).sqrt(), inverse.numel(), v.device())?;
    Ok(times(&inverse, &share)?.retag(Tag::Adapters))
}

/// `m · inverse_norms`: what each output is multiplied by.
///
/// # Errors
/// They are no f32 vectors of one length.
pub fn gains(magnitude: &Tensor, inverse_norms: &Tensor) -> Result<Tensor> {
    let count = inverse_norms.numel();
    check("DoRA gains", magnitude, count)?;
    check("DoRA gains", inverse_norms, count)?;
    Ok(times(magnitude, inverse_norms)?.retag(Tag::Adapters))
}

/// `x·diag(gains)` in the type of `x` `[T, N]`, counted under `tag`.
///
/// # Errors
/// Shapes do not fit.
pub fn scale(x: &Tensor, gains: &Tensor, tag: Tag) -> Result<Tensor> {
    let (rows, columns) = x.dims2("DoRA scale")?;
    check("DoRA scale", gains, columns)?;
    Ok(rms_norm::apply(x, gains, &constant(1.0, rows, x.device())?)?.retag(tag))
}

/// The gradient of the magnitude, f32 `[N]`, from `z` `[T, N]` (before it was scaled) and the gradient of what it became.
///
/// # Errors
/// Shapes do not fit.
pub fn magnitude_grad(z: &Tensor, grad: &Tensor, inverse_norms: &Tensor) -> Result<Tensor> {
    let op = "DoRA magnitude gradient";
    let (rows, columns) = z.dims2(op)?;
    check(op, inverse_norms, columns)?;
    let sums = rms_norm::weight_grad(z, &constant(1.0, rows, z.device())?, grad)?;
    Ok(times(&sums, inverse_norms)?.retag(Tag::Gradients))
}
