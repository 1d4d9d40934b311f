//! The products of a LoRA adapter that are not part of its layer's, with dropout made on the way.
//!
//! With `A` `[r, K]`, `B` `[N, r]` and a dropout mask `m` on the adapter's input, `y = x·Wᵀ + s·(m(x)·Aᵀ)·Bᵀ`:
//!
//! | function | computes | shape |
//! |---|---|---|
//! | [`down`] | `t = s·m(x)·Aᵀ` | `[T, r]` |
//! | [`super::forward_lora`] | `y = x·Wᵀ + t·Bᵀ` | `[T, N]` |
//! | [`weight_grad`] | `gᵀ·t`, the gradient of `B` | `[N, r]` f32 |
//! | [`grad_down`] | `u = s·g·B` | `[T, r]` |
//! | [`weight_grad`] | `uᵀ·m(x)`, the gradient of `A` | `[r, K]` f32 |
//! | [`dropped_add`] | `dx += m(u·A)` | `[T, K]` |
//! | [`super::input_grad_lora`] | `dx = g·W + u·A` where nothing is dropped | `[T, K]` |
//!
//! `A` and `B` may have any float type; on a GPU those of the type of `x` are fast, so cast them first. Source: Hu et al.,
//! "LoRA", arXiv 2106.09685.

use super::{
    Terms, Weight, forward_into, input_grad,
    narrow::{self, Kind},
    skinny,
};
use crate::{
    dropout::{self, Mask},
    elementwise,
};
use nibble_runtime::{Device, Error, Result, Tag, Tensor, cuda::Chip};

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
            let mut out = Tensor::empty(&[x.shape()[0], a.dims()?.0], x.dtype(), x.device(), tag)?;
            forward_into(&x, &a, scale, Terms::default(), &mut out)?;
            Ok(out.retag(tag))
        }
        Device::Cuda(_) => skinny::lora_down(x, a, scale, mask, tag),
    }
}

/// [`down`] of several adapters `(A, scale)` on one input, where nothing is dropped. Hopper reads the input once for all.
///
/// # Errors
/// Widths of `x` and an A differ.
pub fn down_all(x: &Tensor, adapters: &[(&Tensor, f32)], tag: Tag) -> Result<Vec<Tensor>> {
    adapters.iter().try_for_each(|(a, _)| fit("LoRA down", x, a, [1, 1]))?;
    match narrow::products(Kind::Rows, x, adapters, tag)? {
        Some(outs) => Ok(outs),
        None => adapters.iter().map(|&(a, scale)| down(x, a, scale, None, tag)).collect(),
    }
}

/// [`weight_grad`] of several gradients `g` with one `x`, where nothing is dropped. Hopper reads `x` once for all.
///
/// # Errors
/// A `g` and `x` differ in rows.
pub fn weight_grads(grads: &[&Tensor], x: &Tensor) -> Result<Vec<Tensor>> {
    grads.iter().try_for_each(|g| fit("weight gradient", g, x, [0, 0]))?;
    let narrow: Vec<_> = grads.iter().map(|&g| (g, 1.0)).collect();
    match narrow::products(Kind::Grads { transposed: true }, x, &narrow, Tag::Gradients)? {
        Some(outs) => Ok(outs),
        None => grads.iter().map(|g| weight_grad(g, x, 1.0, None)).collect(),
    }
}

/// Bytes of workspace on this kind of GPU of [`down_all`] of 16-bit rows `[tokens, k]` with adapters of these ranks.
pub fn down_workspace(chip: Chip, tokens: usize, k: usize, ranks: &[usize]) -> usize {
    narrow::workspace(chip, Kind::Rows, tokens, [tokens, k], ranks).unwrap_or(0)
}

/// The same of [`grad_down_and_up`], from rows of `n`.
pub fn grad_down_and_up_workspace(chip: Chip, tokens: usize, n: usize, rank: usize) -> usize {
    let one_by_one = || {
        let down = narrow::workspace(chip, Kind::Columns, tokens, [tokens, n], &[rank]).unwrap_or(0);
        down.max(super::weight_grad_workspace(chip, tokens, n, rank, false))
    };
    narrow::both_workspace(chip, tokens, n, rank).unwrap_or_else(one_by_one)
}

/// The same of [`weight_grads`].
pub fn weight_grads_workspace(chip: Chip, tokens: usize, k: usize, ranks: &[usize]) -> usize {
    let one_by_one = || ranks.iter().map(|&rank| super::weight_grad_workspace(chip, tokens, rank, k, false)).max();
    let together = narrow::workspace(chip, Kind::Grads { transposed: true }, tokens, [k, tokens], ranks);
    together.or_else(one_by_one).unwrap_or(0)
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

/// `u = scale · g · B` `[T, r]`, in the type of `g` and counted under `tag`, and `gᵀ · t`, the gradient of B; for few ranks Hopper
/// reads `g` once for both.
///
/// # Errors
/// Shapes do not fit.
pub fn grad_down_and_up(grad: &Tensor, t: &Tensor, b: &Tensor, scale: f32, tag: Tag) -> Result<(Tensor, Tensor)> {
    fit("LoRA gradient", grad, b, [1, 0])?;
    fit("LoRA gradient", grad, t, [0, 0])?;
    fit("LoRA gradient", t, b, [1, 1])?;
    match narrow::both(grad, t, b, scale, tag)? {
        Some(both) => Ok(both),
        None => Ok((grad_down(grad, b, scale, tag)?, weight_grad(grad, t, 1.0, None)?)),
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

/// `dx += m(u · A)`. The product is rounded to the type of `u` before and after it is dropped.
///
/// # Errors
/// Shapes do not fit; the mask's probability is outside of [0, 1).
pub fn dropped_add(u: &Tensor, a: &Tensor, mask: Mask, dx: &mut Tensor) -> Result<()> {
    let op = "LoRA input gradient";
    fit(op, u, a, [1, 0])?;
    fit(op, u, dx, [0, 0])?;
    fit(op, a, dx, [1, 1])?;
    mask.check()?;
    match u.device() {
        Device::Cpu => {
            let through = input_grad(u, &Weight::Dense(a.clone()), 1.0)?;
            elementwise::add_assign(dx, &dropout::apply(&through, mask)?)
        }
        Device::Cuda(_) => skinny::lora_dropped_add(u, a, mask, dx),
    }
}
