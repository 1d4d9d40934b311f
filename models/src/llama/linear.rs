//! A linear layer: a frozen or trainable weight, and a LoRA adapter beside it.
//!
//! With dropout `m` on the adapter's input, `y = x·Wᵀ + s·(m(x)·Aᵀ)·Bᵀ` (Hu et al., "LoRA", arXiv 2106.09685).
//! Backward, from the gradient `g` of `y`, with `t = m(x)·Aᵀ` saved and `u = s·g·B`:
//! `dB = s·gᵀ·t`, `dA = uᵀ·m(x)`, `dx = g·W + m(u·A)`, and `dW = gᵀ·x` where the weight trains.

use super::Pass;
use nibble_kernels::{
    cast::into_dtype,
    dropout,
    linear::{Weight, forward, forward_add, input_grad, input_grad_add, weight_grad},
};
use nibble_runtime::{DType, ParamId, Result, Tag, Tensor};
use std::collections::BTreeMap;

/// Gradients of a layer's parameters.
pub(crate) type ParamGrads = BTreeMap<ParamId, Tensor>;

/// A tensor that trains if it has an id.
#[derive(Debug)]
pub struct Param {
    /// Name in files, without the adapter's prefix.
    pub name: String,
    /// Set if it trains.
    pub id: Option<ParamId>,
    /// f32 if it trains.
    pub value: Tensor,
}

/// A LoRA adapter of one linear layer.
#[derive(Debug)]
pub struct Lora {
    /// `[r, K]`.
    pub a: Param,
    /// `[N, r]`.
    pub b: Param,
    /// α/r, or α/√r (rank-stabilized).
    pub scale: f32,
    /// Probability of dropping an input element.
    pub dropout: f32,
}

/// A linear layer without bias.
#[derive(Debug)]
pub struct Linear {
    /// Module path, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Number of the linear in the model: the key of its dropout masks.
    pub index: u32,
    /// `[N, K]`.
    pub weight: Weight,
    /// Set if the weight trains (it is dense f32 then).
    pub id: Option<ParamId>,
    /// The adapter, if the layer has one.
    pub lora: Option<Lora>,
}

/// A parameter in the type of the computation.
fn cast(param: &Param, dtype: DType) -> Result<Weight> {
    Ok(Weight::Dense(into_dtype(param.value.clone(), dtype, Tag::Workspace)?))
}

impl Linear {
    /// Names of the two adapter parameters and of the weight, with those that train.
    pub fn visit<'a>(&'a self, f: &mut impl FnMut(ParamId, String, &'a Tensor)) {
        if let (Some(id), Weight::Dense(value)) = (self.id, &self.weight) {
            f(id, format!("{}.weight", self.name), value);
        }
        for param in self.lora.iter().flat_map(|lora| [&lora.a, &lora.b]) {
            if let Some(id) = param.id {
                f(id, param.name.clone(), &param.value);
            }
        }
    }

    /// As [`Linear::visit`], to write.
    pub fn visit_mut<'a>(&'a mut self, f: &mut impl FnMut(ParamId, &'a mut Tensor)) {
        if let (Some(id), Weight::Dense(value)) = (self.id, &mut self.weight) {
            f(id, value);
        }
        for param in self.lora.iter_mut().flat_map(|lora| [&mut lora.a, &mut lora.b]) {
            if let Some(id) = param.id {
                f(id, &mut param.value);
            }
        }
    }

    /// `m(x)`: the adapter's input.
    fn dropped(&self, x: &Tensor, lora: &Lora, pass: &Pass) -> Result<Tensor> {
        Ok(match pass.mask(lora.dropout, self.index) {
            Some(mask) => dropout::apply(x, mask)?,
            None => x.clone(),
        })
    }

    /// The output `[T, N]`, added to `residual` if there is one, and the adapter's `t` `[T, r]`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        pass: &Pass,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let mut y = match residual {
            None => forward(x, &self.weight, Tag::Activations)?,
            Some(residual) => {
                let mut y = residual.copy(Tag::Activations)?;
                forward_add(x, &self.weight, 1.0, &mut y)?;
                y
            }
        };
        let Some(lora) = &self.lora else { return Ok((y, None)) };
        let t = forward(&self.dropped(x, lora, pass)?, &cast(&lora.a, x.dtype())?, Tag::Activations)?;
        forward_add(&t, &cast(&lora.b, x.dtype())?, lora.scale, &mut y)?;
        Ok((y, Some(t)))
    }

    /// Puts the parameters' gradients into `grads` and adds that of the input to `dx`, making it if it is not there yet.
    /// Skips the input's gradient where `dx` is `None`.
    pub(crate) fn backward(
        &self,
        x: &Tensor,
        t: Option<&Tensor>,
        grad: &Tensor,
        pass: &Pass,
        dx: Option<&mut Option<Tensor>>,
        grads: &mut ParamGrads,
    ) -> Result<()> {
        if let Some(id) = self.id {
            grads.insert(id, weight_grad(grad, x, 1.0)?);
        }
        let mut adapter = None;
        if let (Some(lora), Some(t)) = (&self.lora, t) {
            let u = input_grad(grad, &cast(&lora.b, x.dtype())?, lora.scale)?; // [T, r]
            if let Some(id) = lora.b.id {
                grads.insert(id, weight_grad(grad, t, lora.scale)?);
            }
            if let Some(id) = lora.a.id {
                grads.insert(id, weight_grad(&u, &self.dropped(x, lora, pass)?, 1.0)?);
            }
            adapter = Some((lora, u));
        }
        let Some(slot) = dx else { return Ok(()) };
        let mut dx = match slot.take() {
            None => input_grad(grad, &self.weight, 1.0)?,
            Some(mut dx) => {
                input_grad_add(grad, &self.weight, 1.0, &mut dx)?;
                dx
            }
        };
        if let Some((lora, u)) = adapter {
            let a = cast(&lora.a, x.dtype())?;
            match pass.mask(lora.dropout, self.index) {
                None => input_grad_add(&u, &a, 1.0, &mut dx)?,
                Some(mask) => {
                    let through = dropout::apply(&input_grad(&u, &a, 1.0)?, mask)?;
                    nibble_kernels::elementwise::add_assign(&mut dx, &through)?;
                }
            }
        }
        *slot = Some(dx);
        Ok(())
    }
}
