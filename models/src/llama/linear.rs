//! A linear layer: a frozen or trainable weight, and a LoRA adapter beside it.
//!
//! With dropout `m` on the adapter's input and `t = s·m(x)·Aᵀ`, `y = x·Wᵀ + t·Bᵀ` (Hu et al., "LoRA", arXiv 2106.09685).
//! Backward, from the gradient `g` of `y`, with `u = s·g·B`:
//! `dB = gᵀ·t`, `dA = uᵀ·m(x)`, `dx = g·W + m(u·A)`, and `dW = gᵀ·x` where the weight trains.
//!
//! Linears on one input make `t`, `dA` and `dx` together: the input is read once, and `dx` is a sum within one product where
//! that is possible. Backward goes in three steps, because the input of `down` is made between them: from the gradients of the
//! outputs ([`Linear::back`]), to that of the input ([`input_grad`]), and what needs the input ([`parameter_grads`]).
//!
//! With DoRA the output is scaled column by column, `y·diag(gains)` ([`nibble_kernels::dora`]), and the gradient on its
//! way back too; the magnitude's gradient needs the output from before that, which is made again. Dropout is on the
//! adapter's input alone: peft drops that of the share of `x·Wᵀ` which the gains add, too, for one more product.

use super::Pass;
use nibble_kernels::{
    cast::into_dtype,
    dora,
    dropout::Mask,
    elementwise,
    linear::{
        InputGrad, Weight, forward_gated, forward_lora, input_grad_add, input_grad_gated, input_grads_lora, lora,
        weight_grad,
    },
    mixed,
    quantize::dequantize,
    swiglu,
};
use nibble_runtime::{DType, ParamId, Result, Tag, Tensor};
use std::{collections::BTreeMap, sync::OnceLock};

/// Gradients of a layer's parameters.
pub(crate) type ParamGrads = BTreeMap<ParamId, Tensor>;

/// A tensor (or a table) that trains if it has an id.
#[derive(Clone, Debug)]
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
    /// Lengths of the rows of `W + s·B·A`, with DoRA.
    pub magnitude: Option<Magnitude>,
    /// A and B from before training, where `s·B·A` of them was taken out of the base weight.
    pub taken: Option<(Tensor, Tensor)>,
}

/// DoRA's magnitude, and what follows from it and the weights until they change.
#[derive(Debug)]
pub struct Magnitude {
    /// `[N]`.
    pub param: Param,
    /// [`dora::inverse_norms`] and [`dora::gains`].
    made: OnceLock<(Tensor, Tensor)>,
}

impl Magnitude {
    /// With nothing made of it yet.
    pub fn new(param: Param) -> Self {
        Magnitude { param, made: OnceLock::new() }
    }
}

impl Lora {
    fn params(&self) -> impl Iterator<Item = &Param> {
        [&self.a, &self.b].into_iter().chain(self.magnitude.as_ref().map(|magnitude| &magnitude.param))
    }
}

/// Adds a gradient to those of other rows, where there are some.
pub(crate) fn put(grads: &mut ParamGrads, id: ParamId, grad: Tensor) -> Result<()> {
    match grads.get_mut(&id) {
        Some(sum) => elementwise::add_assign(sum, &grad),
        None => {
            grads.insert(id, grad);
            Ok(())
        }
    }
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

/// What the gradients by a linear's input and by the adapter's `A` are made from.
pub(crate) struct Back<'a> {
    /// The gradient of the output.
    grad: &'a Tensor,
    /// The same of the output before DoRA's gains.
    scaled: Option<Tensor>,
    /// `u` `[T, r]`.
    u: Option<Tensor>,
    mask: Option<Mask>,
}

impl Back<'_> {
    fn grad(&self) -> &Tensor {
        self.scaled.as_ref().unwrap_or(self.grad)
    }
}

/// Makes the adapters' `t` of linears on one input, where they have one that is not there yet: together where nothing is
/// dropped.
pub(crate) fn low_ranks(x: &Tensor, pass: &Pass, linears: &mut [(&Linear, &mut Option<Tensor>)]) -> Result<()> {
    let mut parts = Vec::new();
    for (linear, t) in linears {
        match &linear.lora {
            Some(lora) if t.is_none() && pass.mixture.is_none() && pass.mask(lora.dropout, 0).is_none() => {
                parts.push((t, linear.adapter(pass, lora, x.dtype())?.0, lora.scale));
            }
            _ => {}
        }
    }
    let adapters: Vec<_> = parts.iter().map(|(_, a, scale)| (a, *scale)).collect();
    if !adapters.is_empty() {
        let made = lora::down_all(x, &adapters, Tag::Activations)?;
        parts.into_iter().zip(made).for_each(|((t, ..), made)| **t = Some(made));
    }
    Ok(())
}

/// The gradient of the input of these linears.
pub(crate) fn input_grad(linears: &[(&Linear, &Back)], pass: &Pass) -> Result<Tensor> {
    let mut operands = Vec::new();
    for (linear, back) in linears {
        let dtype = back.grad.dtype();
        let a = linear.own_adapter(pass, dtype)?.map(|(a, _)| a);
        operands.push((linear.weight(dtype)?, back.u.as_ref().zip(a)));
    }
    let mut parts = Vec::new();
    for ((_, back), (weight, low_rank)) in linears.iter().zip(&operands) {
        // With dropout the branch is not part of the product.
        let lora = low_rank.as_ref().filter(|_| back.mask.is_none()).map(|(u, a)| (*u, a));
        parts.push(InputGrad { grad: back.grad(), weight, lora });
    }
    let dtype = parts.first().map_or(DType::F32, |part| part.grad.dtype());
    let mut dx = input_grads_lora(&parts, dtype, Tag::Workspace)?;
    for ((_, back), (_, low_rank)) in linears.iter().zip(&operands) {
        if let (Some(mask), Some((u, a))) = (back.mask, low_rank) {
            lora::dropped_add(u, a, mask, &mut dx)?;
        }
    }
    Ok(dx)
}

/// SwiGLU backward, from what is before its output: `linear`, whose input it is.
pub(crate) fn swiglu_grads(
    linear: &Linear,
    back: &Back,
    gate: Tensor,
    up: Tensor,
    pass: &Pass,
) -> Result<swiglu::Backward> {
    if back.mask.is_some() {
        return swiglu::backward(gate, up, input_grad(&[(linear, back)], pass)?);
    }
    let (grad, weight) = (back.grad(), linear.weight(back.grad.dtype())?);
    let a = linear.own_adapter(pass, grad.dtype())?.map(|(a, _)| a);
    input_grad_gated(InputGrad { grad, weight: &weight, lora: back.u.as_ref().zip(a.as_ref()) }, gate, up)
}

/// Adds the gradients by what multiplies the input `x` of these linears to `grads`: of A, of weights that train, and DoRA's
/// magnitudes. Each has the adapter's `t`.
pub(crate) fn parameter_grads(
    x: &Tensor,
    linears: &[(&Linear, Option<&Tensor>, Back)],
    pass: &Pass,
    grads: &mut ParamGrads,
) -> Result<()> {
    let mut shared = Vec::new();
    for (linear, t, back) in linears {
        linear.weight_grads(x, *t, back, pass, grads)?;
        let id = linear.lora.as_ref().and_then(|lora| lora.a.id);
        match (id, &back.u, back.mask) {
            (Some(id), Some(u), None) => shared.push((id, u)),
            (Some(id), Some(u), mask) => put(grads, id, lora::weight_grad(u, x, 1.0, mask)?)?,
            _ => {}
        }
    }
    if shared.is_empty() {
        return Ok(());
    }
    let us: Vec<&Tensor> = shared.iter().map(|(_, u)| *u).collect();
    shared.iter().zip(lora::weight_grads(&us, x)?).try_for_each(|((id, _), grad)| put(grads, *id, grad))
}

impl Linear {
    /// The weight and the adapter's parameters, as far as they train.
    pub fn visit<'a>(&'a self, f: &mut impl FnMut(ParamId, String, &'a Tensor)) {
        if let (Some(id), Weight::Dense(value)) = (self.id, &self.weight) {
            f(id, format!("{}.weight", self.name), value);
        }
        for param in self.lora.iter().flat_map(Lora::params) {
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
        let Some(Lora { a, b, magnitude, .. }) = &mut self.lora else { return };
        let magnitude = magnitude.as_mut().map(|magnitude| {
            // Whoever may write does.
            magnitude.made = OnceLock::new();
            &mut magnitude.param
        });
        for param in [a, b].into_iter().chain(magnitude) {
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
        if let Some((mixture, owners)) = &pass.mixture {
            let weight = self.weight(dtype)?;
            let y = match mixture.side(self.index) {
                Some(adapters) => mixed::forward(x, &weight, adapters, owners, residual, Tag::Activations)?,
                None => forward_lora(x, &weight, None, residual, dtype, Tag::Activations)?,
            };
            return Ok((y, None));
        }
        let t = self.low_rank(x, pass)?;
        Ok((self.output(x, pass, t.as_ref(), residual)?, t))
    }

    /// The output of [`Linear::forward`] from the adapter's `t` that this made.
    pub(crate) fn output(
        &self,
        x: &Tensor,
        pass: &Pass,
        t: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let dtype = x.dtype();
        let b = self.own_adapter(pass, dtype)?.map(|(_, b)| b);
        let low_rank = t.zip(b.as_ref());
        match self.gains()? {
            None => forward_lora(x, &self.weight(dtype)?, low_rank, residual, dtype, Tag::Activations),
            Some((_, gains)) => {
                let z = forward_lora(x, &self.weight(dtype)?, low_rank, None, dtype, Tag::Workspace)?;
                let mut y = dora::scale(&z, gains, Tag::Activations)?;
                residual.map_or(Ok(()), |residual| elementwise::add_assign(&mut y, residual))?;
                Ok(y)
            }
        }
    }

    /// As [`Linear::output`], of a linear without gains, and `silu(gate)` times it.
    pub(crate) fn gated_output(
        &self,
        x: &Tensor,
        pass: &Pass,
        t: Option<&Tensor>,
        gate: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let b = self.own_adapter(pass, x.dtype())?.map(|(_, b)| b);
        forward_gated(x, &self.weight(x.dtype())?, t.zip(b.as_ref()), gate, Tag::Activations)
    }

    /// `W` in f32, in storage of its own.
    pub(crate) fn dense(&self) -> Result<Tensor> {
        let dense = match &self.weight {
            Weight::Dense(tensor) => tensor.clone(),
            Weight::Quantized(quantized) => dequantize(quantized, Tag::Workspace)?,
        };
        let dense = into_dtype(dense, DType::F32, Tag::Workspace)?;
        if dense.is_unique() { Ok(dense) } else { dense.copy(Tag::Workspace) }
    }

    /// `1/‖V‖` and the gains of the outputs, with DoRA: made when they are first asked for, and anew after the parameters
    /// have been given out to write.
    pub(crate) fn gains(&self) -> Result<Option<&(Tensor, Tensor)>> {
        self.lora.as_ref().map_or(Ok(None), |lora| self.gains_of(lora))
    }

    /// The same, of an adapter that is for this layer.
    pub(crate) fn gains_of<'a>(&self, lora: &'a Lora) -> Result<Option<&'a (Tensor, Tensor)>> {
        let Lora { a, b, scale, magnitude: Some(Magnitude { param, made }), .. } = lora else {
            return Ok(None);
        };
        if let Some(made) = made.get() {
            return Ok(Some(made));
        }
        let mut v = self.dense()?;
        input_grad_add(&b.value, &Weight::Dense(a.value.clone()), *scale, &mut v)?;
        let inverse_norms = dora::inverse_norms(&v)?;
        let gains = dora::gains(&param.value, &inverse_norms)?;
        Ok(Some(made.get_or_init(|| (inverse_norms, gains))))
    }

    /// The adapter's `t` `[T, r]`, where there is one.
    pub(crate) fn low_rank(&self, x: &Tensor, pass: &Pass) -> Result<Option<Tensor>> {
        let Some(lora) = &self.lora else { return Ok(None) };
        let mask = pass.mask(lora.dropout, self.index);
        let (a, _) = self.adapter(pass, lora, x.dtype())?;
        Ok(Some(lora::down(x, &a, lora.scale, mask, Tag::Activations)?))
    }

    /// [`Linear::adapter`] of its own adapter, if it has one.
    fn own_adapter(&self, pass: &Pass, dtype: DType) -> Result<Option<(Tensor, Tensor)>> {
        self.lora.as_ref().map(|lora| self.adapter(pass, lora, dtype)).transpose()
    }

    /// A and B in the type of the computation.
    fn adapter(&self, pass: &Pass, lora: &Lora, dtype: DType) -> Result<(Tensor, Tensor)> {
        match pass.casts.of(self.index) {
            Some(made) => Ok(made),
            None => Ok((cast(&lora.a, dtype)?, cast(&lora.b, dtype)?)),
        }
    }

    /// From the gradient of the output: that of B goes to `grads`, and what others are made from is returned.
    pub(crate) fn back<'a>(
        &self,
        t: Option<&Tensor>,
        grad: &'a Tensor,
        pass: &Pass,
        grads: &mut ParamGrads,
    ) -> Result<Back<'a>> {
        let scaled = match self.gains()? {
            Some((_, gains)) => Some(dora::scale(grad, gains, Tag::Workspace)?),
            None => None,
        };
        let mut back = Back { grad, scaled, u: None, mask: None };
        if let (Some(lora), Some(t)) = (&self.lora, t) {
            let (_, b) = self.adapter(pass, lora, grad.dtype())?;
            let u = match lora.b.id {
                None => lora::grad_down(back.grad(), &b, lora.scale, Tag::Workspace)?,
                Some(id) => {
                    let (u, of_b) = lora::grad_down_and_up(back.grad(), t, &b, lora.scale, Tag::Workspace)?;
                    put(grads, id, of_b)?;
                    u
                }
            };
            (back.u, back.mask) = (Some(u), pass.mask(lora.dropout, self.index));
        }
        Ok(back)
    }

    /// Adds the gradients of a weight that trains and of DoRA's magnitude.
    fn weight_grads(
        &self,
        x: &Tensor,
        t: Option<&Tensor>,
        back: &Back,
        pass: &Pass,
        grads: &mut ParamGrads,
    ) -> Result<()> {
        if let Some(id) = self.id {
            put(grads, id, weight_grad(back.grad, x, 1.0)?)?;
        }
        if let (Some(lora @ Lora { magnitude: Some(Magnitude { param, .. }), .. }), Some((inverse_norms, _))) =
            (&self.lora, self.gains()?)
            && let Some(id) = param.id
        {
            let (dtype, (_, b)) = (x.dtype(), self.adapter(pass, lora, x.dtype())?);
            let low_rank = t.map(|t| (t, &b));
            let z = forward_lora(x, &self.weight(dtype)?, low_rank, None, dtype, Tag::Workspace)?;
            put(grads, id, dora::magnitude_grad(&z, back.grad, inverse_norms)?)?;
        }
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
