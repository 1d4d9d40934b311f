//! The products of a LoRA adapter beside a weight, with dropout made on the way, and the product of a few tokens.
//!
//! With `A` `[r, K]`, `B` `[N, r]` and a dropout mask `m` on the adapter's input, `y = x·Wᵀ + s·(m(x)·Aᵀ)·Bᵀ`:
//!
//! | function | computes | shape |
//! |---|---|---|
//! | [`down`] | `t = s·m(x)·Aᵀ` | `[T, r]` |
//! | [`up_add`] | `y += s·t·Bᵀ` | `[T, N]` |
//! | [`grad_down`] | `u = s·g·B` | `[T, r]` |
//! | [`weight_grad`] | `s·uᵀ·m(x)` | `[r, K]` f32 |
//! | [`dropped_add`] | `dx += m(u·A)` | `[T, K]` |
//! | [`decode`] | `x·Wᵀ + s·t·Bᵀ + residual` | `[T, N]` |
//!
//! `A` and `B` may have any float type; on a GPU those of the type of `x` are fast, so cast them first. Sources: Hu et al.,
//! "LoRA", arXiv 2106.09685.

use super::{Weight, forward, forward_add, input_grad, input_grad_add, skinny};
use crate::{
    dropout::{self, Mask},
    elementwise,
};
use nibble_runtime::{Device, Error, Result, Tag, Tensor};

pub use super::skinny::Branch;

/// Checks that dimension `of_left` of one matrix is as long as dimension `of_right` of the other.
fn fit(op: &'static str, left: &Tensor, right: &Tensor, [of_left, of_right]: [usize; 2]) -> Result<()> {
    let (l, r) = (left.dims2(op)?, right.dims2(op)?);
    let side = |dims: (usize, usize), which| if which == 0 { dims.0 } else { dims.1 };
    if side(l, of_left) == side(r, of_right) {
        return Ok(());
    }
    Err(Error::shape(op, format!("{:?} and {:?} do not fit", left.shape(), right.shape())))
}

fn check_mask(mask: Option<Mask>) -> Result<()> {
    mask.map_or(Ok(()), |mask| mask.check())
}

fn dropped(x: &Tensor, mask: Option<Mask>) -> Result<Tensor> {
    mask.map_or_else(|| Ok(x.clone()), |mask| dropout::apply(x, mask))
}

/// `scale · m(x) · Aᵀ` `[T, r]` in the type of `x`, counted under `tag`.
///
/// # Errors
/// Widths of `x` and `a` differ; the mask's probability is outside of [0, 1).
pub fn down(x: &Tensor, a: &Tensor, scale: f32, mask: Option<Mask>, tag: Tag) -> Result<Tensor> {
    fit("LoRA down", x, a, [1, 1])?;
    check_mask(mask)?;
    match x.device() {
        Device::Cpu => {
            let (x, a) = (dropped(x, mask)?, Weight::Dense(a.clone()));
            if scale == 1.0 {
                return forward(&x, &a, tag);
            }
            let mut out = Tensor::zeros(&[x.shape()[0], a.dims()?.0], x.dtype(), x.device(), tag)?;
            forward_add(&x, &a, scale, &mut out)?;
            Ok(out.retag(tag))
        }
        Device::Cuda(_) => skinny::lora_down(x, a, scale, mask, tag),
    }
}

/// `out += scale · t · Bᵀ`.
///
/// # Errors
/// Shapes do not fit.
pub fn up_add(t: &Tensor, b: &Tensor, scale: f32, out: &mut Tensor) -> Result<()> {
    let op = "LoRA up";
    fit(op, t, b, [1, 1])?;
    fit(op, t, out, [0, 0])?;
    fit(op, b, out, [0, 1])?;
    match t.device() {
        Device::Cpu => forward_add(t, &Weight::Dense(b.clone()), scale, out),
        Device::Cuda(_) => skinny::lora_up_add(t, b, scale, out),
    }
}

/// `scale · g · B` `[T, r]` in the type of `g`, counted under `tag`.
///
/// # Errors
/// The width of `g` is not the height of `b`.
pub fn grad_down(grad: &Tensor, b: &Tensor, scale: f32, tag: Tag) -> Result<Tensor> {
    fit("LoRA gradient", grad, b, [1, 0])?;
    match grad.device() {
        Device::Cpu => Ok(input_grad(grad, &Weight::Dense(b.clone()), scale)?.retag(tag)),
        Device::Cuda(_) => skinny::lora_grad_down(grad, b, scale, tag),
    }
}

/// `scale · gᵀ · m(x)` as f32 `[N, K]`: of A with `g` the gradient of `t`, of B with `x` = `t` and no mask.
///
/// # Errors
/// `g` and `x` differ in rows; the mask's probability is outside of [0, 1).
pub fn weight_grad(grad: &Tensor, x: &Tensor, scale: f32, mask: Option<Mask>) -> Result<Tensor> {
    fit("weight gradient", grad, x, [0, 0])?;
    check_mask(mask)?;
    match x.device() {
        Device::Cpu => super::weight_grad(grad, &dropped(x, mask)?, scale),
        Device::Cuda(_) => skinny::weight_grad(grad, x, scale, mask),
    }
}

/// `dx += m(u · A)`. With a mask the product is rounded to the type of `u` before and after it is dropped.
///
/// # Errors
/// Shapes do not fit; the mask's probability is outside of [0, 1).
pub fn dropped_add(u: &Tensor, a: &Tensor, mask: Option<Mask>, dx: &mut Tensor) -> Result<()> {
    let op = "LoRA input gradient";
    fit(op, u, a, [1, 0])?;
    fit(op, u, dx, [0, 0])?;
    fit(op, a, dx, [1, 1])?;
    check_mask(mask)?;
    match u.device() {
        Device::Cpu => {
            let a = Weight::Dense(a.clone());
            match mask {
                None => input_grad_add(u, &a, 1.0, dx),
                Some(mask) => elementwise::add_assign(dx, &dropout::apply(&input_grad(u, &a, 1.0)?, mask)?),
            }
        }
        Device::Cuda(_) => skinny::lora_dropped_add(u, a, mask, dx),
    }
}

/// `x · Wᵀ + s · t · Bᵀ + residual` in the type of `x`, counted under `tag`: one pass over the weight where `x` has at
/// most 16 rows. On a GPU the result is then rounded once and 4-bit weights are not rounded to their type; on the CPU the
/// product with the residual and the branch are each rounded.
///
/// # Errors
/// Shapes do not fit.
pub fn decode(
    x: &Tensor,
    weight: &Weight,
    branch: Option<Branch>,
    residual: Option<&Tensor>,
    tag: Tag,
) -> Result<Tensor> {
    let op = "decoding product";
    let ((t, k), (n, columns)) = (x.dims2(op)?, weight.dims()?);
    if k != columns {
        return Err(Error::shape(op, format!("{:?} and a weight [{n}, {columns}] do not fit", x.shape())));
    }
    if let Some(Branch { t: left, b, .. }) = branch {
        fit(op, left, b, [1, 1])?;
        if (left.shape()[0], b.shape()[0]) != (t, n) {
            let what = format!("branch {:?} and {:?} of a result [{t}, {n}]", left.shape(), b.shape());
            return Err(Error::shape(op, what));
        }
    }
    if let Some(residual) = residual.filter(|residual| residual.shape() != [t, n]) {
        return Err(Error::shape(op, format!("residual {:?} of a result [{t}, {n}]", residual.shape())));
    }
    if let Device::Cuda(_) = x.device()
        && let Some(y) = skinny::decode(x, weight, branch, residual, tag)?
    {
        return Ok(y);
    }
    let mut y = match residual {
        None => forward(x, weight, tag)?,
        Some(residual) => {
            let mut y = residual.copy(tag)?;
            forward_add(x, weight, 1.0, &mut y)?;
            y
        }
    };
    if let Some(Branch { t, b, scale }) = branch {
        up_add(t, b, scale, &mut y)?;
    }
    Ok(y)
}
