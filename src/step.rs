//! One optimizer step: forward and backward over the window's batches, global norm, clipping, update.

use crate::{data::Batch, eval::packed, loss_scale::LossScale, paging::Paging, settings::Settings};
use anyhow::Result;
use nibble_kernels::adamw::{AdamWConfig, DecayOrder};
use nibble_models::{Llama, llama::DropoutKey};
use nibble_optim::{AdamW, Gradients, Update};
use nibble_runtime::{Tag, Tensor};
use std::sync::Arc;

/// What a step found.
#[derive(Clone, Debug)]
pub struct Step {
    /// Mean loss of the window's labelled tokens.
    pub loss: f64,
    /// Global norm of their gradient, before clipping.
    pub grad_norm: f64,
    /// Why training cannot go on; the parameters are those from before the last update then.
    pub fault: Option<String>,
}

/// What training keeps from step to step, besides the parameters.
pub struct Stepper {
    optimizer: AdamW,
    grads: Gradients,
    scaling: LossScale,
    max_grad_norm: f64,
    seed: u64,
    /// What each parameter's learning rate is multiplied by.
    rates: Vec<f64>,
    /// The parameters from before the last update, for when it turns out to have broken the model.
    good: Vec<Tensor>,
    paging: Option<Paging>,
}

impl Stepper {
    /// For the trainable parameters of `llama`.
    pub fn new(llama: &Llama, settings: &Settings) -> Result<Self> {
        let config = AdamWConfig {
            beta1: settings.betas[0],
            beta2: settings.betas[1],
            eps: settings.eps,
            weight_decay: settings.weight_decay,
            decay_order: DecayOrder::Before,
            ..AdamWConfig::default()
        };
        let paging = Paging::new(llama, settings)?;
        let (optimizer, grads) = match &paging {
            None => (AdamW::new(config, settings.optimizer_bits)?, Gradients::new()),
            Some(Paging { state, .. }) => {
                let optimizer = AdamW::paged(config, settings.optimizer_bits, Arc::clone(state))?;
                (optimizer, Gradients::paged(Arc::clone(state))?)
            }
        };
        Ok(Stepper {
            optimizer,
            grads,
            paging,
            scaling: LossScale::new(llama.dtype),
            max_grad_norm: settings.max_grad_norm,
            seed: settings.seed,
            rates: rates(llama, settings.lora_plus_ratio),
            good: snapshot(llama)?,
        })
    }

    /// The optimizer's pages, where it has any.
    pub fn paging(&self) -> Option<&Paging> {
        self.paging.as_ref()
    }

    /// The optimizer, to save.
    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// The optimizer, to restore.
    pub fn optimizer_mut(&mut self) -> &mut AdamW {
        &mut self.optimizer
    }

    /// What the next loss will be scaled by, to save.
    pub fn scaling(&self) -> LossScale {
        self.scaling
    }

    /// Scales the next loss by this, to restore.
    pub fn set_scaling(&mut self, scaling: LossScale) {
        self.scaling = scaling;
    }

    /// One update by the mean loss over all labelled tokens of `batches`, the first of which is micro-batch `first` of the
    /// run. A step whose scaled f16 gradients overflowed is left out.
    pub fn step(&mut self, llama: &mut Llama, batches: &[Batch], first: u32, lr: f64) -> Result<Step> {
        let labelled: usize = batches.iter().map(|batch| batch.unmasked()).sum();
        let scale = self.scaling.factor() / labelled as f32;
        let mut outputs = Vec::with_capacity(batches.len());
        for (batch, step) in batches.iter().zip(first..) {
            let key = DropoutKey { seed: self.seed, step };
            outputs.push(llama.train(packed(batch), scale, Some(key), &mut self.grads)?);
        }
        let mut clip = self.grads.clip_after(self.max_grad_norm, self.scaling.factor(), self.optimizer.late())?;
        let mut updates: Vec<Update> = llama
            .parameters_mut()
            .into_iter()
            .zip(&mut self.good)
            .zip(&self.rates)
            .map(|(((id, value), previous), &rate)| Update {
                id,
                rate,
                decay: value.shape().len() > 1,
                value,
                previous: Some(previous),
            })
            .collect();
        self.optimizer.step(&mut updates, &self.grads, lr, &mut clip)?;
        self.grads.clear();

        // All of the step has been handed to the device: only now is anything read back.
        let nll = outputs.iter().try_fold(0.0, |nll, output| output.sum().map(|sum| nll + sum))?;
        let verdict = clip.read()?;
        let (loss, grad_norm) = (nll / labelled as f64, verdict.norm);
        let fault = if !loss.is_finite() || (!verdict.gradients_finite && !self.scaling.is_dynamic()) {
            Some(format!("the loss is {loss} and the gradient norm {grad_norm}"))
        } else if !verdict.parameters_finite {
            Some(format!("the update with learning rate {lr} made parameters infinite"))
        } else {
            None
        };
        if fault.is_some() {
            restore(llama, &self.good)?;
        } else if !self.scaling.update(verdict.gradients_finite) {
            self.optimizer.revoke();
        }
        Ok(Step { loss, grad_norm, fault })
    }

    /// Why the last update cannot stand, if it broke the model in a part that was still under way when its step ended. The
    /// parameters are those from before it then. To be asked after the last step; until then the next step finds out.
    pub fn finish(&mut self, llama: &mut Llama) -> Result<Option<String>> {
        let sound = self.optimizer.late().map_or(Ok(true), |late| late.read().map(|late| late.parameters_finite))?;
        if sound {
            return Ok(None);
        }
        restore(llama, &self.good)?;
        Ok(Some("the last update made parameters infinite".into()))
    }
}

/// LoRA+: B and DoRA's magnitudes learn `ratio` times as fast as the rest, as in peft's `create_loraplus_optimizer`. (Hayou et al.,
/// "LoRA+", arXiv 2402.12354.)
fn rates(llama: &Llama, ratio: f64) -> Vec<f64> {
    let fast = |name: &str| name.ends_with(".lora_B.weight") || name.ends_with(".lora_magnitude_vector");
    llama.parameters().iter().map(|(_, name, _)| if fast(name) { ratio } else { 1.0 }).collect()
}

/// A copy of every trainable parameter.
fn snapshot(llama: &Llama) -> Result<Vec<Tensor>> {
    let copies = llama.parameters().into_iter().map(|(_, _, value)| value.copy(Tag::Adapters));
    Ok(copies.collect::<Result<_, _>>()?)
}

fn restore(llama: &mut Llama, snapshot: &[Tensor]) -> Result<()> {
    for ((_, value), copy) in llama.parameters_mut().into_iter().zip(snapshot) {
        value.copy_from(0, copy)?;
    }
    Ok(())
}
