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
//! `_add` variants add a scaled product to an existing matrix. Products run in f32 whatever the types of the operands;
//! the result is rounded once to the type of `x` or `g`. A weight that is not dense f32 is converted panel by panel
//! ([`PANEL`] elements), never as a whole.

mod cpu;
pub mod lora;
pub(crate) mod matrix;
mod skinny;
#[cfg(test)]
mod skinny_tests;

pub(crate) use skinny::{DECODE, LORA, SIMT, WEIGHT_GRAD};

use crate::quantize::QuantTensor;
use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};

/// Elements of a weight that are held in f32 at a time: half a megabyte, which stays in a core's second-level cache.
pub const PANEL: usize = 128 << 10;

/// A weight matrix `[N, K]`.
#[derive(Clone, Debug)]
pub enum Weight {
    /// As it is: f32, f16 or bf16.
    Dense(Tensor),
    /// In 4 bits.
    Quantized(QuantTensor),
}

impl Weight {
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

/// Runs `product(x, out, accumulate)` in f32 and rounds to the type of `out`.
fn rounded(out: &mut Tensor, add: bool, product: impl FnOnce(&mut [f32], bool) -> Result<()>) -> Result<()> {
    if out.dtype() == DType::F32 {
        return product(out.as_mut_slice()?, add);
    }
    let mut wide = if add {
        out.cast(DType::F32, Tag::Workspace)?
    } else {
        Tensor::empty(out.shape(), DType::F32, out.device(), Tag::Workspace)?
    };
    product(wide.as_mut_slice()?, add)?;
    *out = wide.cast(out.dtype(), Tag::Workspace)?;
    Ok(())
}

fn forward_into(x: &Tensor, weight: &Weight, scale: f32, out: &mut Tensor, add: bool) -> Result<()> {
    let (n, k) = weight.dims()?;
    check("linear forward", x, k, out, n)?;
    match x.device() {
        Device::Cpu => {
            let x = x.to_f32()?;
            rounded(out, add, |out, add| cpu::times_transposed(&x, weight, n, k, scale, out, add))
        }
        Device::Cuda(_) => skinny::products(x, weight, scale, out, add, skinny::Direction::Forward),
    }
}

fn input_grad_into(grad: &Tensor, weight: &Weight, scale: f32, out: &mut Tensor, add: bool) -> Result<()> {
    let (n, k) = weight.dims()?;
    check("linear input gradient", grad, n, out, k)?;
    match grad.device() {
        Device::Cpu => {
            let grad = grad.to_f32()?;
            rounded(out, add, |out, add| cpu::times(&grad, weight, n, k, scale, out, add))
        }
        Device::Cuda(_) => skinny::products(grad, weight, scale, out, add, skinny::Direction::InputGrad),
    }
}

/// `x · Wᵀ` in the type of `x`, counted under `tag`.
///
/// # Errors
/// `x` is not `[T, K]`.
pub fn forward(x: &Tensor, weight: &Weight, tag: Tag) -> Result<Tensor> {
    let (t, n) = (x.dims2("linear forward")?.0, weight.dims()?.0);
    let mut out = Tensor::empty(&[t, n], x.dtype(), x.device(), tag)?;
    forward_into(x, weight, 1.0, &mut out, false)?;
    Ok(out)
}

/// `out += scale · x · Wᵀ`.
pub fn forward_add(x: &Tensor, weight: &Weight, scale: f32, out: &mut Tensor) -> Result<()> {
    forward_into(x, weight, scale, out, true)
}

/// `scale · g · W` in the type of `g`.
///
/// # Errors
/// `grad` is not `[T, N]`.
pub fn input_grad(grad: &Tensor, weight: &Weight, scale: f32) -> Result<Tensor> {
    let (t, k) = (grad.dims2("linear input gradient")?.0, weight.dims()?.1);
    let mut out = Tensor::empty(&[t, k], grad.dtype(), grad.device(), Tag::Workspace)?;
    input_grad_into(grad, weight, scale, &mut out, false)?;
    Ok(out)
}

/// `out += scale · g · W`.
pub fn input_grad_add(grad: &Tensor, weight: &Weight, scale: f32, out: &mut Tensor) -> Result<()> {
    input_grad_into(grad, weight, scale, out, true)
}

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
