//! A linear layer: a frozen or trainable weight, and a LoRA adapter beside it.
//!
//! With dropout `m` on the adapter's input and `t = s·m(x)·Aᵀ`, `y = x·Wᵀ + t·Bᵀ` (Hu et al., "LoRA", arXiv 2106.09685).
//! Backward, from the gradient `g` of `y`, with `u = s·g·B`:
//! `dB = gᵀ·t`, `dA = uᵀ·m(x)`, `dx = g·W + m(u·A)`, and `dW = gᵀ·x` where the weight trains.

use super::Pass;
use nibble_kernels::{
    cast::into_dtype,
    linear::{Weight, forward_lora, input_grad_lora, input_grad_lora_add, lora, weight_grad},
};
use nibble_runtime::{DType, ParamId, Result, Tag, Tensor};
use std::collections::BTreeMap;

/// Gradients of a layer's parameters.
pub(crate) type ParamGrads = BTreeMap<ParamId, Tensor>;

/// A tensor (or a table) that trains if it has an id.
#[derive(Debug)]
pub struct Param<T = Tensor> {
    /// Name in files, without the adapter's prefix.
    pub name: String,
    /// Set if it trains.
    pub id: Option<ParamId>,
    /// f32 if it trains.
    pub value: T,
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
fn cast(param: &Param, dtype: DType) -> Result<Tensor> {
    into_dtype(param.value.clone(), dtype, Tag::Workspace)
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

    /// The output `[T, N]`, added to `residual` if there is one, and the adapter's `t` `[T, r]`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        pass: &Pass,
        residual: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let dtype = x.dtype();
        let t = self.low_rank(x, pass)?;
        let b = self.lora.as_ref().map(|lora| cast(&lora.b, dtype)).transpose()?;
        let y = forward_lora(x, &self.weight(dtype)?, t.as_ref().zip(b.as_ref()), residual, dtype, Tag::Activations)?;
        Ok((y, t))
    }

    /// The adapter's `t` `[T, r]`, where there is one.
    pub(crate) fn low_rank(&self, x: &Tensor, pass: &Pass) -> Result<Option<Tensor>> {
        let Some(lora) = &self.lora else { return Ok(None) };
        let mask = pass.mask(lora.dropout, self.index);
        Ok(Some(lora::down(x, &cast(&lora.a, x.dtype())?, lora.scale, mask, Tag::Activations)?))
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
        let dtype = x.dtype();
        if let Some(id) = self.id {
            grads.insert(id, weight_grad(grad, x, 1.0)?);
        }
        let mut branch = None;
        if let (Some(lora), Some(t)) = (&self.lora, t) {
            let mask = pass.mask(lora.dropout, self.index);
            let u = lora::grad_down(grad, &cast(&lora.b, dtype)?, lora.scale, Tag::Workspace)?;
            if let Some(id) = lora.b.id {
                grads.insert(id, lora::weight_grad(grad, t, 1.0, None)?);
            }
            if let Some(id) = lora.a.id {
                grads.insert(id, lora::weight_grad(&u, x, 1.0, mask)?);
            }
            branch = Some((u, cast(&lora.a, dtype)?, mask));
        }
        let Some(slot) = dx else { return Ok(()) };
        let weight = self.weight(dtype)?;
        // Without dropout the branch is part of the product.
        let inside = branch.as_ref().filter(|(_, _, mask)| mask.is_none()).map(|(u, a, _)| (u, a));
        let mut dx = match slot.take() {
            None => input_grad_lora(grad, &weight, inside, dtype, Tag::Workspace)?,
            Some(mut dx) => {
                input_grad_lora_add(grad, &weight, inside, &mut dx)?;
                dx
            }
        };
        if let Some((u, a, Some(mask))) = &branch {
            lora::dropped_add(u, a, *mask, &mut dx)?;
        }
        *slot = Some(dx);
        Ok(())
    }

    /// The weight as products take it: one that trains, in the type of the computation.
    fn weight(&self, dtype: DType) -> Result<Weight> {
        match (&self.weight, self.id) {
            (Weight::Dense(value), Some(_)) => Ok(Weight::Dense(into_dtype(value.clone(), dtype, Tag::Workspace)?)),
            (weight, _) => Ok(weight.clone()),
        }
    }
}
