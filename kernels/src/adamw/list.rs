//! The update of all parameters at once: what an optimizer does in a step.

use super::{
    AdamWConfig, BLOCK, Coefficients, State8, check_moments8, check_moments32, check_param, check_settings, cpu, cuda,
};
use crate::norm::Clip;
use nibble_runtime::{
    DType, Device, Error, Result, Tensor,
    cuda::{Event, Stream},
};
use rayon::prelude::*;
use std::sync::Arc;

/// The moments of a parameter, to be updated.
pub enum MomentsMut<'a> {
    /// f32, as many elements as the parameter.
    F32 { m: &'a mut Tensor, v: &'a mut Tensor },
    /// Block-wise 8-bit codes.
    Bits8 { m: &'a mut State8, v: &'a mut State8 },
}

/// A run of a parameter's elements, with what updates it. Gradients and moments of a parameter may lie in several places.
pub struct Part<'a> {
    /// The first element, counted in the parameter.
    pub start: usize,
    /// Its gradient, of any float type, not yet scaled: as many elements as are to be updated.
    pub grad: Tensor,
    /// Overwritten.
    pub moments: MomentsMut<'a>,
}

/// A parameter to update.
pub struct Job<'a> {
    /// f32, overwritten.
    pub param: &'a mut Tensor,
    /// Whether weight decay applies.
    pub decay: bool,
    /// What the step's learning rate is multiplied by for this parameter.
    pub rate: f64,
    /// Gets the values from before the update, f32.
    pub previous: Option<&'a mut Tensor>,
    /// What to update; no two parts share elements.
    pub parts: Vec<Part<'a>>,
}

impl<'a> Job<'a> {
    /// The update of a whole parameter.
    pub fn whole(param: &'a mut Tensor, grad: &Tensor, moments: MomentsMut<'a>, decay: bool) -> Self {
        Job { param, decay, rate: 1.0, previous: None, parts: vec![Part { start: 0, grad: grad.clone(), moments }] }
    }

    fn check(&self) -> Result<()> {
        let (op, param) = ("adamw", &*self.param);
        check_param(param)?;
        if !(self.rate >= 0.0 && self.rate.is_finite()) {
            return Err(Error::invalid(op, format!("a learning rate times {}; expected at least 0", self.rate)));
        }
        for Part { start, grad, moments } in &self.parts {
            let count = grad.numel();
            if !grad.dtype().is_float() {
                return Err(Error::DType { op, expected: "float".into(), found: grad.dtype() });
            }
            let whole_blocks = matches!(moments, MomentsMut::F32 { .. }) || start % BLOCK == 0;
            if start.checked_add(count).is_none_or(|end| end > param.numel()) || !whole_blocks {
                let what = format!("elements {start}..+{count} of a parameter of shape {:?}", param.shape());
                return Err(Error::shape(op, what));
            }
            match moments {
                MomentsMut::F32 { m, v } => check_moments32(m, v, count)?,
                MomentsMut::Bits8 { m, v } => check_moments8(m, v, count)?,
            }
        }
        match &self.previous {
            Some(previous) if previous.shape() != param.shape() || previous.dtype() != DType::F32 => {
                let what = format!("{previous:?} is to keep the values of {param:?}");
                Err(Error::shape(op, what))
            }
            Some(previous) if !previous.is_unique() => Err(Error::Shared { op }),
            _ => Ok(()),
        }
    }
}

/// Update number `step` (from 1 on) of all parameters, by gradients times the factor of `clip`. Where its norm is not
/// finite nothing is changed. `clip` notes whether every parameter is finite afterwards. On a GPU all parameters of one
/// learning rate are one launch, and nobody waits for it; the results are those of [`super::step32`] and [`super::step8`] to the bit, however parameters
/// are cut into parts.
///
/// # Errors
/// Types, shapes or settings do not fit, or a tensor to be written is shared; nothing has been written then.
pub fn step_all(jobs: &mut [Job], config: &AdamWConfig, step: u32, clip: &mut Clip) -> Result<()> {
    step_on(jobs, config, step, clip, None).map(drop)
}

/// As [`step_all`], on another stream of a GPU, which must come behind what made `clip`, parameters, gradients and moments, as
/// lanes of a pager do on which pages were staged. Whoever gives the stream lets the compute stream wait for it, or for
/// some of it by [`use_after`], and keeps what is returned until then.
///
/// # Errors
/// As [`step_all`].
pub fn step_on(
    jobs: &mut [Job],
    config: &AdamWConfig,
    step: u32,
    clip: &mut Clip,
    stream: Option<Stream>,
) -> Result<Vec<Tensor>> {
    check_settings(config, step)?;
    jobs.iter().try_for_each(Job::check)?;
    match jobs.first().map(|job| job.param.device()) {
        None => Ok(Vec::new()),
        Some(Device::Cpu) => on_cpu(jobs, config, step, clip).map(|()| Vec::new()),
        Some(device) => {
            jobs.sort_by(|a, b| a.rate.total_cmp(&b.rate));
            let mut kept = Vec::new();
            for jobs in jobs.chunk_by_mut(|a, b| a.rate == b.rate) {
                let config = AdamWConfig { lr: config.lr * jobs[0].rate, ..*config };
                kept.extend(cuda::step_on(jobs, &Coefficients::new(&config, step, 1.0), clip, device, stream)?);
            }
            Ok(kept)
        }
    }
}

/// Lets `clip`, parameters and gradients be used behind `done`, a mark behind their update on another stream. Moments are
/// that stream's own.
pub fn use_after(jobs: &mut [Job], clip: &mut Clip, done: &Arc<Event>) {
    clip.state_mut().use_after(done);
    for Job { param, previous, parts, .. } in jobs {
        param.use_after(done);
        previous.iter().for_each(|previous| previous.use_after(done));
        parts.iter().for_each(|part| part.grad.use_after(done));
    }
}

fn on_cpu(jobs: &mut [Job], config: &AdamWConfig, step: u32, clip: &mut Clip) -> Result<()> {
    let (factor, finite) = clip.factor()?;
    if !finite {
        return Ok(());
    }
    let update = |job: &mut Job| -> Result<bool> {
        let weight_decay = if job.decay { config.weight_decay } else { 0.0 };
        let config = AdamWConfig { lr: config.lr * job.rate, weight_decay, ..*config };
        let coefficients = Coefficients::new(&config, step, factor);
        let mut finite = true;
        for Part { start, grad, moments } in &mut job.parts {
            let range = *start..*start + grad.numel();
            let w = &mut job.param.as_mut_slice::<f32>()?[range.clone()];
            if let Some(previous) = &mut job.previous {
                previous.as_mut_slice::<f32>()?[range].copy_from_slice(w);
            }
            match moments {
                MomentsMut::F32 { m, v } => cpu::step32(w, grad, m, v, &coefficients)?,
                MomentsMut::Bits8 { m, v } => cpu::step8(w, grad, m, v, &coefficients)?,
            }
            finite &= w.iter().all(|x| x.is_finite());
        }
        Ok(finite)
    };
    let finite: Vec<bool> = jobs.par_iter_mut().map(update).collect::<Result<_>>()?;
    if finite.contains(&false) {
        clip.found_infinite()?;
    }
    Ok(())
}
