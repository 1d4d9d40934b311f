//! The products beside SwiGLU: that of `up`, which its output follows, and the input gradient of `down`, which is the gradient of
//! its output. Hopper makes SwiGLU and its gradients where the sums are, in registers; elsewhere they are passes of their own.

use super::{InputGrad, Terms, Weight, check, forward_lora, hopper, input_grad_lora};
use crate::swiglu::{self, Backward};
use nibble_runtime::{Device, Result, Tag, Tensor};

/// `up = x · Wᵀ + t · Bᵀ` `[T, N]`, counted under `tag`, and `silu(gate) · up`, both in the type of `x`. `lora` is `(t, B)`.
///
/// # Errors
/// Shapes do not fit.
pub fn forward_gated(
    x: &Tensor,
    weight: &Weight,
    lora: Option<(&Tensor, &Tensor)>,
    gate: &Tensor,
    tag: Tag,
) -> Result<(Tensor, Tensor)> {
    if let Device::Cuda(_) = x.device() {
        let (op, (n, k)) = ("linear forward", weight.dims()?);
        let (t, terms) = (x.dims2(op)?.0, Terms { lora, ..Terms::default() });
        let empty = |tag| Tensor::empty(&[t, n], x.dtype(), x.device(), tag);
        let (mut up, mut output) = (empty(tag)?, empty(Tag::Workspace)?);
        check(op, x, k, &up, n)?;
        terms.check(op, &up, true)?;
        let product = hopper::Product::new(true, x, weight, terms, &up)?;
        if gate.shape() == up.shape() && hopper::gated(&product, gate, &mut up, &mut output)? {
            return Ok((up, output));
        }
    }
    let up = forward_lora(x, weight, lora, None, x.dtype(), tag)?;
    let output = swiglu::forward(gate, &up)?;
    Ok((up, output))
}

/// The gradients of `gate` and `up` from that of SwiGLU's output, which is the input gradient `g · W + u · A`; and the output. As
/// in [`swiglu::backward`] they take the places of `gate` and `up` where they can.
///
/// # Errors
/// Shapes do not fit.
pub fn input_grad_gated(part: InputGrad, mut gate: Tensor, mut up: Tensor) -> Result<Backward> {
    let InputGrad { grad, weight, lora } = part;
    if let Device::Cuda(_) = grad.device() {
        let (op, (n, k)) = ("linear input gradient", weight.dims()?);
        let (t, terms) = (grad.dims2(op)?.0, Terms { lora, ..Terms::default() });
        let mut output = Tensor::empty(&[t, k], grad.dtype(), grad.device(), Tag::Workspace)?;
        check(op, grad, n, &output, k)?;
        terms.check(op, &output, false)?;
        let product = hopper::Product::new(false, grad, weight, terms, &output)?;
        if [&gate, &up].iter().all(|x| x.shape() == output.shape()) {
            (gate, up) = (swiglu::own(gate)?, swiglu::own(up)?);
            if hopper::differentiated(&product, &mut gate, &mut up, &mut output)? {
                return Ok(Backward { output, gate, up });
            }
        }
    }
    swiglu::backward(gate, up, input_grad_lora(grad, weight, lora, grad.dtype(), Tag::Workspace)?)
}
