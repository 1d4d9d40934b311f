//! Matrix products of a linear layer, with dense or 4-bit weights.
//!
//! For a weight `W` `[N, K]` (rows are outputs), input `x` `[T, K]` and output gradient `g` `[T, N]`:
//!
//! | function | computes | shape |
//! |---|---|---|
//! | [`forward`] | `x · Wᵀ` | `[T, N]` |
//! | [`input_grad`] | `g · W` | `[T, K]` |
//! | [`weight_grad`] | `gᵀ · x` | `[N, K]` f32 |
//!
//! `_add` variants add a scaled product to an existing matrix. `_lora` variants add a low-rank branch in the same sums:
//! `t · Bᵀ` for `t` `[T, r]` and `B` `[N, r]`, or `u · A` for `u` `[T, r]` and `A` `[r, K]`, whose scale is in `t` or `u`.
//!
//! On the CPU products run in f32 whatever the types of the operands; the result is rounded once, to the type of `x` or
//! `g` or to the one asked for. A weight that is not dense f32 is converted panel by panel, never as a whole. On a GPU
//! operands of one 16-bit type are multiplied by tensor cores with sums in f32 (`gemm.cuh`), 4-bit weights rounded to that
//! type once on the way; all others in f32 as on the CPU (`simt.cu`). A forward product of at most 16 rows reads the weight
//! once and does not round 4-bit ones (`decode.cu`). Hopper multiplies large dense matrices with instructions of its own
//! (`gemm_hopper_sm90a.cu`); from 512 rows on 4-bit weights are dequantized for that into workspace, one at a time. Of fewer
//! rows it has another kernel, which decodes every weight once for up to 256 (`codes_hopper_sm90a.cu`). SwiGLU and its gradients
//! may be made within its large products ([`forward_gated`], [`input_grad_gated`]).

mod codes;
mod codes_hopper;
mod cpu;
mod cuda;
#[cfg(test)]
mod cuda_tests;
mod gated;
mod hopper;
pub mod lora;
pub(crate) mod matrix;
mod narrow;
mod skinny;
#[cfg(test)]
mod skinny_tests;

pub(crate) use codes::Codes;
pub(crate) use skinny::{DECODE, LORA, SIMT, WEIGHT_GRAD};

pub(crate) use codes_hopper::CODES_HOPPER;
pub(crate) use hopper::GEMM_HOPPER;
pub(crate) use narrow::NARROW_HOPPER;

pub(crate) use cuda::{GEMM_DENSE_BF16, GEMM_DENSE_F16, GEMM_GENERAL, GEMM_QUANT_BF16, GEMM_QUANT_F16};

use crate::quantize::QuantTensor;
use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor, cuda::Chip};

/// A weight matrix `[N, K]`.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a model has a few hundred, and few of them are dense")]
pub enum Weight {
    /// As it is: f32, f16 or bf16.
    Dense(Tensor),
    /// In 4 bits.
    Quantized(QuantTensor),
}

impl Weight {
    /// The matrix, if it is not quantized.
    pub(crate) fn unquantized(&self) -> Option<&Tensor> {
        match self {
            Weight::Dense(tensor) => Some(tensor),
            Weight::Quantized(_) => None,
        }
    }

    /// `(N, K)`: outputs and inputs.
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Weight::Dense(tensor) => tensor.dims2("weight"),
            Weight::Quantized(quantized) => match quantized.shape[..] {
                [n, k] => Ok((n, k)),
                _ => Err(Error::shape("weight", format!("expected a matrix, found shape {:?}", quantized.shape))),
            },
        }
    }

    /// Converts the flat elements from `start` on into `out`.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Weight::Dense(tensor) => tensor.read_f32(start, out),
            Weight::Quantized(quantized) => quantized.read_f32(start, out),
        }
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        match self {
            Weight::Dense(tensor) => tensor.size_bytes(),
            Weight::Quantized(quantized) => quantized.size_bytes(),
        }
    }
}

fn check(op: &'static str, rows: &Tensor, inner: usize, out: &Tensor, columns: usize) -> Result<()> {
    let (t, found) = rows.dims2(op)?;
    if found != inner || out.shape() != [t, columns] {
        let what = format!(
            "operand {:?} and result {:?} do not fit; expected [T, {inner}] and [T, {columns}]",
            rows.shape(),
            out.shape()
        );
        return Err(Error::shape(op, what));
    }
    Ok(())
}

/// What is added to a product.
#[derive(Clone, Copy, Default)]
struct Terms<'a> {
    /// `(t, B)` or `(u, A)`.
    lora: Option<(&'a Tensor, &'a Tensor)>,
    /// In the type and shape of the result.
    residual: Option<&'a Tensor>,
    /// Whether to add to what the result holds.
    add: bool,
}

impl Terms<'_> {
    /// Checks the low-rank branch of a product with `rows` rows, and that the residual is like `out`. `columns` are those
    /// of `out`; they are B's rows or A's columns.
    fn check(&self, op: &'static str, out: &Tensor, transposed: bool) -> Result<()> {
        let (rows, columns) = out.dims2(op)?;
        if let Some((left, right)) = self.lora {
            let ((t, rank), (outer, inner)) = (left.dims2(op)?, right.dims2(op)?);
            let expected = if transposed { (columns, rank) } else { (rank, columns) };
            if t != rows || (outer, inner) != expected {
                let what = format!(
                    "low-rank branch {:?} and {:?} does not fit a result {:?}",
                    left.shape(),
                    right.shape(),
                    out.shape()
                );
                return Err(Error::shape(op, what));
            }
        }
        match self.residual {
            Some(residual) if (residual.shape(), residual.dtype()) != (out.shape(), out.dtype()) => {
                let what = format!(
                    "residual {} {:?} differs from the result {} {:?}",
                    residual.dtype(),
                    residual.shape(),
                    out.dtype(),
                    out.shape()
                );
                Err(Error::shape(op, what))
            }
            _ => Ok(()),
        }
    }
}

/// Runs `product(x, out, accumulate)` in f32 and rounds to the type of `out`.
fn rounded(out: &mut Tensor, terms: Terms, product: impl FnOnce(&mut [f32], bool) -> Result<()>) -> Result<()> {
    let add = terms.add || terms.residual.is_some();
    if out.dtype() == DType::F32 {
        if let Some(residual) = terms.residual {
            out.copy_from(0, residual)?;
        }
        return product(out.as_mut_slice()?, add);
    }
    let mut wide = match terms.residual {
        Some(residual) => residual.cast(DType::F32, Tag::Workspace)?,
        None if terms.add => out.cast(DType::F32, Tag::Workspace)?,
        None => Tensor::empty(out.shape(), DType::F32, out.device(), Tag::Workspace)?,
    };
    product(wide.as_mut_slice()?, add)?;
    *out = wide.cast(out.dtype(), Tag::Workspace)?;
    Ok(())
}

fn forward_into(x: &Tensor, weight: &Weight, scale: f32, terms: Terms, out: &mut Tensor) -> Result<()> {
    let op = "linear forward";
    let (n, k) = weight.dims()?;
    check(op, x, k, out, n)?;
    terms.check(op, out, true)?;
    match x.device() {
        Device::Cpu => cpu::times(cpu::Side::Forward, x, weight, scale, terms, out),
        Device::Cuda(_) => cuda::forward_into(x, weight, scale, terms, out),
    }
}

fn input_grad_into(grad: &Tensor, weight: &Weight, scale: f32, terms: Terms, out: &mut Tensor) -> Result<()> {
    let op = "linear input gradient";
    let (n, k) = weight.dims()?;
    check(op, grad, n, out, k)?;
    terms.check(op, out, false)?;
    match grad.device() {
        Device::Cpu => cpu::times(cpu::Side::Backward, grad, weight, scale, terms, out),
        Device::Cuda(_) => cuda::input_grad_into(grad, weight, scale, terms, out),
    }
}

/// `x · Wᵀ` in the type of `x`, counted under `tag`.
///
/// # Errors
/// `x` is not `[T, K]`.
pub fn forward(x: &Tensor, weight: &Weight, tag: Tag) -> Result<Tensor> {
    forward_as(x, weight, x.dtype(), tag)
}

/// As [`forward`], rounded to `dtype` instead.
pub fn forward_as(x: &Tensor, weight: &Weight, dtype: DType, tag: Tag) -> Result<Tensor> {
    let (t, n) = (x.dims2("linear forward")?.0, weight.dims()?.0);
    let mut out = Tensor::empty(&[t, n], dtype, x.device(), tag)?;
    forward_into(x, weight, 1.0, Terms::default(), &mut out)?;
    Ok(out)
}

/// `x · Wᵀ + t · Bᵀ + residual` as `dtype`, rounded once and counted under `tag`. `lora` is `(t, B)`; the residual `[T, N]`
/// is of type `dtype`.
///
/// # Errors
/// Shapes do not fit; the residual is of another type.
pub fn forward_lora(
    x: &Tensor,
    weight: &Weight,
    lora: Option<(&Tensor, &Tensor)>,
    residual: Option<&Tensor>,
    dtype: DType,
    tag: Tag,
) -> Result<Tensor> {
    let (t, n) = (x.dims2("linear forward")?.0, weight.dims()?.0);
    let mut out = Tensor::empty(&[t, n], dtype, x.device(), tag)?;
    forward_into(x, weight, 1.0, Terms { lora, residual, add: false }, &mut out)?;
    Ok(out.retag(tag))
}

/// `out += scale · x · Wᵀ`.
pub fn forward_add(x: &Tensor, weight: &Weight, scale: f32, out: &mut Tensor) -> Result<()> {
    forward_into(x, weight, scale, Terms { add: true, ..Terms::default() }, out)
}

/// `scale · g · W` in the type of `g`.
///
/// # Errors
/// `grad` is not `[T, N]`.
pub fn input_grad(grad: &Tensor, weight: &Weight, scale: f32) -> Result<Tensor> {
    let (t, k) = (grad.dims2("linear input gradient")?.0, weight.dims()?.1);
    let mut out = Tensor::empty(&[t, k], grad.dtype(), grad.device(), Tag::Workspace)?;
    input_grad_into(grad, weight, scale, Terms::default(), &mut out)?;
    Ok(out)
}

/// `out += scale · g · W`.
pub fn input_grad_add(grad: &Tensor, weight: &Weight, scale: f32, out: &mut Tensor) -> Result<()> {
    input_grad_into(grad, weight, scale, Terms { add: true, ..Terms::default() }, out)
}

/// `g · W + u · A` as `dtype`, rounded once and counted under `tag`. `lora` is `(u, A)`.
///
/// # Errors
/// Shapes do not fit.
pub fn input_grad_lora(
    grad: &Tensor,
    weight: &Weight,
    lora: Option<(&Tensor, &Tensor)>,
    dtype: DType,
    tag: Tag,
) -> Result<Tensor> {
    let (t, k) = (grad.dims2("linear input gradient")?.0, weight.dims()?.1);
    let mut out = Tensor::empty(&[t, k], dtype, grad.device(), tag)?;
    input_grad_into(grad, weight, 1.0, Terms { lora, ..Terms::default() }, &mut out)?;
    Ok(out.retag(tag))
}

/// A product of [`input_grads_lora`].
#[derive(Clone, Copy, Debug)]
pub struct InputGrad<'a> {
    /// `g` `[T, N]`.
    pub grad: &'a Tensor,
    /// `W` `[N, K]`.
    pub weight: &'a Weight,
    /// `(u, A)`: `[T, r]` and `[r, K]`.
    pub lora: Option<(&'a Tensor, &'a Tensor)>,
}

/// The sum of `g · W + u · A` over the linears on one input, as `dtype` and counted under `tag`. Hopper adds them up before it
/// rounds; elsewhere each is rounded.
///
/// # Errors
/// There are none, or shapes do not fit.
pub fn input_grads_lora(parts: &[InputGrad], dtype: DType, tag: Tag) -> Result<Tensor> {
    let op = "linear input gradient";
    let Some((first, rest)) = parts.split_first() else { return Err(Error::invalid(op, "of no linear")) };
    let (t, k) = (first.grad.dims2(op)?.0, first.weight.dims()?.1);
    let mut out = Tensor::empty(&[t, k], dtype, first.grad.device(), tag)?;
    for InputGrad { grad, weight, lora } in parts {
        let (n, columns) = weight.dims()?;
        check(op, grad, n, &out, columns)?;
        Terms { lora: *lora, ..Terms::default() }.check(op, &out, false)?;
    }
    if matches!(out.device(), Device::Cuda(_)) && hopper::sum(parts, &mut out)? {
        return Ok(out);
    }
    input_grad_into(first.grad, first.weight, 1.0, Terms { lora: first.lora, ..Terms::default() }, &mut out)?;
    for InputGrad { grad, weight, lora } in rest {
        input_grad_lora_add(grad, weight, *lora, &mut out)?;
    }
    Ok(out.retag(tag))
}

/// `out += g · W + u · A`, with `lora` as [`input_grad_lora`] takes it.
///
/// # Errors
/// Shapes do not fit.
pub fn input_grad_lora_add(
    grad: &Tensor,
    weight: &Weight,
    lora: Option<(&Tensor, &Tensor)>,
    out: &mut Tensor,
) -> Result<()> {
    input_grad_into(grad, weight, 1.0, Terms { lora, add: true, ..Terms::default() }, out)
}

/// Bytes of workspace that a product of 16-bit rows `[m, k]` with a 4-bit weight takes on this kind of GPU, into `[m, n]` with a
/// low-rank branch of `rank` (or 0): the weight as a whole unless that is `held` ([`QuantTensor::hold_dense`]), sums of blocks that
/// share a tile, or nothing.
pub fn product_workspace(chip: Chip, m: usize, n: usize, k: usize, rank: usize, held: bool) -> usize {
    let sizes = [m, n, k, rank].map(|size| u32::try_from(size).unwrap_or(u32::MAX));
    if hopper::columns_on(chip, true, sizes).is_some() {
        return if held { 0 } else { n * k * DType::BF16.size() };
    }
    codes_hopper::workspace(chip, sizes).unwrap_or(0)
}

/// Bytes of workspace of [`input_grads_lora`] for 16-bit rows and 4-bit weights on this kind of GPU, into `[m, n]`, of linears
/// with these outputs and ranks (or 0): the weights at once, or one after another; none that are `held`.
pub fn input_grads_bytes(chip: Chip, m: usize, n: usize, parts: &[[usize; 2]], held: bool) -> usize {
    match hopper::sums_on(chip, true, m, n, parts) {
        Some(_) if held => 0,
        Some(_) => parts.iter().map(|[k, _]| n * k * DType::BF16.size()).sum(),
        None => parts.iter().map(|&[k, rank]| product_workspace(chip, m, n, k, rank, held)).max().unwrap_or(0),
    }
}

/// Bytes of workspace, at most, of a product on the CPU with this inner dimension into rows of `columns`, if anything is
/// converted for it: a weight that is not f32, or one with a low-rank branch.
pub fn panel_bytes(columns: usize, inner: usize) -> usize {
    cpu::panel_bytes(columns, inner)
}

pub use gated::{forward_gated, input_grad_gated};
pub use hopper::dequantizes;
pub use skinny::weight_grad_workspace;

/// `scale · gᵀ · x` as f32 `[N, K]`, for a trainable weight.
pub fn weight_grad(grad: &Tensor, x: &Tensor, scale: f32) -> Result<Tensor> {
    let ((t, n), (rows, k)) = (grad.dims2("weight gradient")?, x.dims2("weight gradient")?);
    if t != rows {
        let what = format!("gradient {:?} and input {:?} differ in rows", grad.shape(), x.shape());
        return Err(Error::shape("weight gradient", what));
    }
    match x.device() {
        Device::Cpu => {
            let mut out = Tensor::empty(&[n, k], DType::F32, Device::Cpu, Tag::Gradients)?;
            cpu::weight_grad(&grad.to_f32()?, &x.to_f32()?, (t, n, k), scale, out.as_mut_slice()?, false);
            Ok(out)
        }
        Device::Cuda(_) => skinny::weight_grad(grad, x, scale, None),
    }
}

#[cfg(test)]
mod tests;
