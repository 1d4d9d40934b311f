//! The update of all parameters at once: what an optimizer does in a step.

use super::{AdamWConfig, Coefficients, State8, check8, check32, cpu, cuda};
use crate::norm::Clip;
use nibble_runtime::{DType, Device, Error, Result, Tensor};
use rayon::prelude::*;

/// The moments of a parameter, to be updated.
pub enum MomentsMut<'a> {
    /// f32, as many elements as the parameter.
    F32 { m: &'a mut Tensor, v: &'a mut Tensor },
    /// Block-wise 8-bit codes.
    Bits8 { m: &'a mut State8, v: &'a mut State8 },
}

/// A parameter to update.
pub struct Job<'a> {
    /// f32, overwritten.
    pub param: &'a mut Tensor,
    /// Its gradient, of any float type, not yet scaled.
    pub grad: &'a Tensor,
    /// Overwritten.
    pub moments: MomentsMut<'a>,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Gets the values from before the update, f32.
    pub previous: Option<&'a mut Tensor>,
}

impl Job<'_> {
    fn check(&self, config: &AdamWConfig, step: u32) -> Result<()> {
        let (param, grad) = (&*self.param, self.grad);
        match &self.moments {
            MomentsMut::F32 { m, v } => check32(param, grad, m, v, config, step, 1.0)?,
            MomentsMut::Bits8 { m, v } => check8(param, grad, m, v, config, step, 1.0)?,
        }
        match &self.previous {
            Some(previous) if previous.shape() != param.shape() || previous.dtype() != DType::F32 => {
                let what = format!("{previous:?} is to keep the values of {param:?}");
                Err(Error::shape("adamw", what))
            }
            Some(previous) if !previous.is_unique() => Err(Error::Shared { op: "adamw" }),
            _ => Ok(()),
        }
    }
}

/// Update number `step` (from 1 on) of all parameters, by gradients times the factor of `clip`. Where its norm is not
/// finite nothing is changed. `clip` notes whether every parameter is finite afterwards. On a GPU all of it is one launch
/// that nobody waits for; the results are those of [`super::step32`] and [`super::step8`] to the bit.
///
/// # Errors
/// Types, shapes or settings do not fit, or a tensor to be written is shared; nothing has been written then.
pub fn step_all(jobs: &mut [Job], config: &AdamWConfig, step: u32, clip: &mut Clip) -> Result<()> {
    jobs.iter().try_for_each(|job| job.check(config, step))?;
    match jobs.first().map(|job| job.param.device()) {
        None => Ok(()),
        Some(Device::Cpu) => on_cpu(jobs, config, step, clip),
        Some(device) => cuda::step_all(jobs, &Coefficients::new(config, step, 1.0), clip, device),
    }
}

fn on_cpu(jobs: &mut [Job], config: &AdamWConfig, step: u32, clip: &mut Clip) -> Result<()> {
    let (factor, finite) = clip.factor()?;
    if !finite {
        return Ok(());
    }
    let update = |job: &mut Job| -> Result<bool> {
        if let Some(previous) = &mut job.previous {
            previous.copy_from(0, job.param)?;
        }
        let weight_decay = if job.decay { config.weight_decay } else { 0.0 };
        let coefficients = Coefficients::new(&AdamWConfig { weight_decay, ..*config }, step, factor);
        match &mut job.moments {
            MomentsMut::F32 { m, v } => cpu::step32(job.param, job.grad, m, v, &coefficients)?,
            MomentsMut::Bits8 { m, v } => cpu::step8(job.param, job.grad, m, v, &coefficients)?,
        }
        Ok(job.param.as_slice::<f32>()?.iter().all(|x| x.is_finite()))
    };
    let finite: Vec<bool> = jobs.par_iter_mut().map(update).collect::<Result<_>>()?;
    if finite.contains(&false) {
        clip.found_infinite()?;
    }
    Ok(())
}
