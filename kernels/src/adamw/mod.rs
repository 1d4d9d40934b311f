//! AdamW updates with 32-bit or block-wise 8-bit moments.
//!
//! ```text
//! m ← β₁·m + (1 − β₁)·g        v ← β₂·v + (1 − β₂)·g²        g is the gradient times `grad_scale`
//! w ← w − lr · (m / bc₁) / (√(v / bc₂) + ε)                  bcᵢ = 1 − βᵢᵗ, t counted from 1
//! w ← w · (1 − lr · weight_decay)                            before the line above, or after it
//! ```
//! All arithmetic is in f32. In the 8-bit form the moments are stored as codes with one scale a block of 256: they are
//! decoded, updated, used at full precision, and encoded again; a negative `m` is never rounded to zero.
//!
//! Sources: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101; Dettmers et al., "8-bit
//! Optimizers via Block-wise Quantization", arXiv 2110.02861.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
mod list;
#[cfg(test)]
mod tests;

pub use list::{Job, MomentsMut, Part, step_all, step_on, use_after};

use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};

/// Elements that share a scale in the 8-bit form.
pub const BLOCK: usize = 256;

/// When weight decay happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DecayOrder {
    /// Before the step, as PyTorch does.
    #[default]
    Before,
    /// After the step, as bitsandbytes does.
    After,
}

/// Settings of an update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Keeps the denominator from zero.
    pub eps: f64,
    /// Share of a weight that a step of learning rate 1 removes.
    pub weight_decay: f64,
    /// When weight decay happens.
    pub decay_order: DecayOrder,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        AdamWConfig {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            decay_order: DecayOrder::Before,
        }
    }
}

impl AdamWConfig {
    /// Checks that the settings are numbers that an update can work with.
    ///
    /// # Errors
    /// Names the setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        let below_one = |x: f64| (0.0..1.0).contains(&x);
        let not_negative = |x: f64| x >= 0.0 && x.is_finite();
        for (name, value, valid, range) in [
            ("lr", self.lr, not_negative(self.lr), "at least 0"),
            ("beta1", self.beta1, below_one(self.beta1), "in [0, 1)"),
            ("beta2", self.beta2, below_one(self.beta2), "in [0, 1)"),
            ("eps", self.eps, not_negative(self.eps), "at least 0"),
            ("weight_decay", self.weight_decay, not_negative(self.weight_decay), "at least 0"),
        ] {
            if !valid {
                return Err(Error::invalid("adamw", format!("{name} is {value}; expected a number {range}")));
            }
        }
        Ok(())
    }
}

/// A moment in 8 bits.
#[derive(Clone, Debug)]
pub struct State8 {
    /// u8, one an element: indices into the dynamic map, the signed one for m, the unsigned one for v.
    pub codes: Tensor,
    /// f32 `[ceil(elements / 256)]`: the largest magnitude of each block.
    pub absmax: Tensor,
}

impl State8 {
    /// A moment of zeros for a parameter of `numel` elements.
    pub fn zeros(numel: usize, device: Device, tag: Tag) -> Result<Self> {
        Ok(State8 {
            codes: Tensor::zeros(&[numel], DType::U8, device, tag)?,
            absmax: Tensor::zeros(&[numel.div_ceil(BLOCK)], DType::F32, device, tag)?,
        })
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        self.codes.size_bytes() + self.absmax.size_bytes()
    }
}

/// What the formulas need, computed once a step.
#[derive(Clone, Copy)]
struct Coefficients {
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    /// The denominator is `√v · root_scale + eps`.
    root_scale: f32,
    eps: f32,
    decay_before: f32,
    decay_after: f32,
    grad_scale: f32,
}

impl Coefficients {
    fn new(config: &AdamWConfig, step: u32, grad_scale: f32) -> Self {
        let AdamWConfig { lr, beta1, beta2, eps, weight_decay, decay_order } = *config;
        let decay = (1.0 - lr * weight_decay) as f32;
        match decay_order {
            // Scalars in f64, and √v / √bc₂ + ε.
            DecayOrder::Before => {
                let correction = |beta: f64| 1.0 - beta.powf(f64::from(step));
                Coefficients {
                    beta1: beta1 as f32,
                    one_minus_beta1: (1.0 - beta1) as f32,
                    beta2: beta2 as f32,
                    one_minus_beta2: (1.0 - beta2) as f32,
                    step_size: (lr / correction(beta1)) as f32,
                    root_scale: correction(beta2).sqrt().recip() as f32,
                    eps: eps as f32,
                    decay_before: decay,
                    decay_after: 1.0,
                    grad_scale,
                }
            }
            // Scalars in f32 (1 − β₂ differs in its fifth digit), and √v + ε·√bc₂, the factor being moved to the step.
            DecayOrder::After => {
                let (beta1, beta2) = (beta1 as f32, beta2 as f32);
                let correction = |beta: f32| 1.0 - beta.powf(step as f32);
                let root = correction(beta2).sqrt();
                Coefficients {
                    beta1,
                    one_minus_beta1: 1.0 - beta1,
                    beta2,
                    one_minus_beta2: 1.0 - beta2,
                    step_size: lr as f32 * root / correction(beta1),
                    root_scale: 1.0,
                    eps: root * eps as f32,
                    decay_before: 1.0,
                    decay_after: decay,
                    grad_scale,
                }
            }
        }
    }

    /// Updates one element: the parameter, and its moments.
    #[inline(always)]
    fn update(&self, w: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
        let g = g * self.grad_scale;
        *m = *m * self.beta1 + self.one_minus_beta1 * g;
        *v = *v * self.beta2 + self.one_minus_beta2 * g * g;
        let moved = *w * self.decay_before - self.step_size * *m / (v.sqrt() * self.root_scale + self.eps);
        *w = moved * self.decay_after;
    }
}

fn check_settings(config: &AdamWConfig, step: u32) -> Result<()> {
    config.validate()?;
    if step == 0 {
        return Err(Error::invalid("adamw", "step is 0; the first is 1"));
    }
    Ok(())
}

fn check_param(param: &Tensor) -> Result<()> {
    let op = "adamw";
    if param.dtype() != DType::F32 {
        return Err(Error::DType { op, expected: "f32".into(), found: param.dtype() });
    }
    if !param.is_unique() {
        return Err(Error::Shared { op });
    }
    Ok(())
}

fn check(config: &AdamWConfig, step: u32, grad_scale: f32, param: &Tensor, grad: &Tensor) -> Result<()> {
    let op = "adamw";
    check_settings(config, step)?;
    if !grad_scale.is_finite() {
        return Err(Error::invalid(op, format!("grad_scale is {grad_scale}; expected a finite scale")));
    }
    if param.shape() != grad.shape() {
        let what = format!("the parameter has shape {:?}, its gradient {:?}", param.shape(), grad.shape());
        return Err(Error::shape(op, what));
    }
    if !grad.dtype().is_float() {
        return Err(Error::DType { op, expected: "float".into(), found: grad.dtype() });
    }
    check_param(param)
}

fn check_moments32(m: &Tensor, v: &Tensor, numel: usize) -> Result<()> {
    check_state("m", m, DType::F32, numel)?;
    check_state("v", v, DType::F32, numel)
}

fn check_moments8(m: &State8, v: &State8, numel: usize) -> Result<()> {
    for (name, state) in [("m", m), ("v", v)] {
        check_state(name, &state.codes, DType::U8, numel)?;
        check_state(name, &state.absmax, DType::F32, numel.div_ceil(BLOCK))?;
    }
    Ok(())
}

fn check_state(name: &str, tensor: &Tensor, dtype: DType, numel: usize) -> Result<()> {
    let op = "adamw";
    if tensor.dtype() != dtype {
        return Err(Error::DType { op, expected: dtype.to_string(), found: tensor.dtype() });
    }
    if tensor.numel() != numel {
        let what = format!("{name} has {} elements; {numel} are needed", tensor.numel());
        return Err(Error::shape(op, what));
    }
    if !tensor.is_unique() {
        return Err(Error::Shared { op });
    }
    Ok(())
}

/// One update of `param` (f32) with 32-bit moments `m` and `v` (f32, as many elements). Overwrites all three.
///
/// `step` is the number of this update, from 1 on. The gradient, of any float type, is multiplied by `grad_scale` on the
/// way: the clipping factor over the loss scale.
///
/// # Errors
/// Types, shapes or settings do not fit, or a tensor to be written is shared; nothing has been written then.
pub fn step32(
    param: &mut Tensor,
    grad: &Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    config: &AdamWConfig,
    step: u32,
    grad_scale: f32,
) -> Result<()> {
    check(config, step, grad_scale, param, grad)?;
    check_moments32(m, v, param.numel())?;
    let coefficients = Coefficients::new(config, step, grad_scale);
    match param.device() {
        Device::Cpu => cpu::step32(param.as_mut_slice()?, grad, m, v, &coefficients),
        device => Err(Error::NoKernel { op: "adamw", device }),
    }
}

/// As [`step32`], with 8-bit moments.
///
/// # Errors
/// As [`step32`].
pub fn step8(
    param: &mut Tensor,
    grad: &Tensor,
    m: &mut State8,
    v: &mut State8,
    config: &AdamWConfig,
    step: u32,
    grad_scale: f32,
) -> Result<()> {
    check(config, step, grad_scale, param, grad)?;
    check_moments8(m, v, param.numel())?;
    let coefficients = Coefficients::new(config, step, grad_scale);
    match param.device() {
        Device::Cpu => cpu::step8(param.as_mut_slice()?, grad, m, v, &coefficients),
        device => Err(Error::NoKernel { op: "adamw", device }),
    }
}
