//! Sums of squares: the global norm of gradients, and what it says about a step.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;

use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};

/// The sum of the squares of a float tensor's elements, accumulated in f64. The same bits for any number of threads.
///
/// # Errors
/// `x` does not hold floats, or is not in host memory.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    match x.device() {
        Device::Cpu => cpu::sum_of_squares(x),
        device => Err(Error::NoKernel { op: "sum_of_squares", device }),
    }
}

/// Elements whose squares are summed together, here and in norm.cu. Fixed, so that the order of additions depends neither on
/// the number of threads nor on where gradients lie.
pub const PIECE: usize = 1 << 14;

/// The sums of squares of gradients, piece by piece, from which their global norm comes. Gradients that lie in several
/// places, or are only for a while where they can be read fast, are summed as they are at hand: the result is the same to
/// the bit.
#[derive(Debug)]
pub struct Squares {
    /// f64 in i64 words `[pieces]`: a tensor has no doubles.
    partial: Tensor,
}

impl Squares {
    /// Room for the sums of `pieces` pieces, none of which has been put yet.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(pieces: usize, device: Device) -> Result<Self> {
        Ok(Squares { partial: Tensor::zeros(&[pieces], DType::I64, device, Tag::Workspace)? })
    }

    /// Puts the sums of float tensors, each from the piece on that is given with it: every tensor but the last of a
    /// parameter has a whole number of pieces. No two of them share a piece; what was put there before is forgotten.
    ///
    /// # Errors
    /// There is no room for the pieces, a tensor does not hold floats, or is elsewhere.
    pub fn put(&mut self, parts: &[(usize, &Tensor)]) -> Result<()> {
        let (room, device) = (self.partial.numel(), self.partial.device());
        for (first, values) in parts {
            if first + values.numel().div_ceil(PIECE) > room || values.device() != device {
                let what = format!("{values:?} from piece {first} on does not fit {room} pieces on {device}");
                return Err(Error::shape("norm", what));
            }
        }
        debug_assert!(apart(parts), "two tensors of one launch are put into one piece");
        if device != Device::Cpu {
            return cuda::put(&mut self.partial, parts);
        }
        for (first, values) in parts {
            let sums = cpu::pieces(values)?;
            let words = &mut self.partial.as_mut_slice::<i64>()?[*first..first + sums.len()];
            words.iter_mut().zip(sums).for_each(|(word, sum)| *word = sum.to_bits() as i64);
        }
        Ok(())
    }

    /// What the gradients, which carry `loss_scale`, say about their update: see [`Clip::new`]. If the update `before`
    /// found that a parameter is not finite, this says so too, and its update is left out.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn clip(&self, max_norm: f64, loss_scale: f32, before: Option<&Clip>) -> Result<Clip> {
        let before = before.map(|before| &before.state);
        if self.partial.device() != Device::Cpu {
            return Ok(Clip { state: cuda::clip(&self.partial, max_norm, loss_scale, before)? });
        }
        let sound = before.map_or(Ok(true), |before| Ok::<_, Error>(before.as_slice::<f32>()?[3] == 1.0))?;
        let squares: f64 = self.partial.as_slice::<i64>()?.iter().map(|&word| f64::from_bits(word as u64)).sum();
        let norm = squares.sqrt() / f64::from(loss_scale);
        let finite = f32::from(sound && norm.is_finite());
        let state = [norm as f32, clip_scale(norm, max_norm) / loss_scale, finite, f32::from(sound)];
        Ok(Clip { state: Tensor::from_slice(&state, &[4], Tag::Workspace)? })
    }
}

/// Whether no two of the tensors share a piece.
fn apart(parts: &[(usize, &Tensor)]) -> bool {
    let mut pieces: Vec<_> = parts.iter().map(|(first, values)| (*first, values.numel().div_ceil(PIECE))).collect();
    pieces.sort_unstable();
    pieces.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
}

/// What the gradients of a step say about its update. It stays where they are, so that a GPU goes on to the update
/// without the host; [`Clip::read`] is for when the step is done.
#[derive(Debug)]
pub struct Clip {
    /// f32 `[4]`: the norm, the factor, whether the norm is finite, and whether the updated parameters are (1 or 0).
    state: Tensor,
}

/// A [`Clip`], read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// Global norm of the gradients without the loss scale.
    pub norm: f64,
    /// Whether it is finite; the update has been left out otherwise.
    pub gradients_finite: bool,
    /// Whether every parameter was after the update.
    pub parameters_finite: bool,
}

impl Clip {
    /// From the gradients of a step, which carry `loss_scale`. The update is to multiply them by
    /// `min(1, max_norm / (norm + 1e-6)) / loss_scale`, as PyTorch's `clip_grad_norm_` (`max_norm` 0 or infinite: no
    /// clipping). The sum is accumulated in f64, in an order that depends on the sizes alone.
    ///
    /// # Errors
    /// There is no gradient, one does not hold floats, or they are on several devices.
    pub fn new(grads: &[&Tensor], max_norm: f64, loss_scale: f32) -> Result<Self> {
        let device = grads.first().map(|grad| grad.device());
        let device = device.ok_or_else(|| Error::invalid("clip", "there are no gradients"))?;
        if grads.iter().any(|grad| grad.device() != device) {
            return Err(Error::invalid("clip", "gradients are on several devices"));
        }
        let mut pieces = 0;
        let mut parts = Vec::with_capacity(grads.len());
        for &grad in grads {
            parts.push((pieces, grad));
            pieces += grad.numel().div_ceil(PIECE);
        }
        let mut squares = Squares::new(pieces, device)?;
        squares.put(&parts)?;
        squares.clip(max_norm, loss_scale, None)
    }

    /// A copy for an update that goes on beside others, so that they need not wait for its word on parameters.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn beside(&self) -> Result<Clip> {
        Ok(Clip { state: self.state.copy(Tag::Workspace)? })
    }

    /// What to multiply the gradients by, and whether they are finite: on the host.
    pub(crate) fn factor(&self) -> Result<(f32, bool)> {
        let state = self.state.as_slice::<f32>()?;
        Ok((state[1], state[2] == 1.0))
    }

    /// Notes that a parameter is not finite: on the host.
    pub(crate) fn found_infinite(&mut self) -> Result<()> {
        self.state.as_mut_slice::<f32>()?[3] = 0.0;
        Ok(())
    }

    /// The numbers, for a kernel to read and to mark.
    pub(crate) fn state_mut(&mut self) -> &mut Tensor {
        &mut self.state
    }

    /// The numbers. Waits for the device.
    pub fn read(&self) -> Result<Verdict> {
        let state = self.state.to_device(Device::Cpu, Tag::Workspace)?;
        let &[norm, _, gradients, parameters] = state.as_slice::<f32>()? else {
            return Err(Error::shape("clip", format!("state {:?}", self.state.shape())));
        };
        Ok(Verdict { norm: norm.into(), gradients_finite: gradients == 1.0, parameters_finite: parameters == 1.0 })
    }
}

/// What gradients of this global norm are multiplied by so that their norm is at most `max_norm`:
/// `max_norm / (norm + 1e-6)`, at most 1, as PyTorch's `clip_grad_norm_`. A `max_norm` of 0 or infinity turns clipping
/// off. A norm that is not finite gives a useless factor: check it first.
pub fn clip_scale(norm: f64, max_norm: f64) -> f32 {
    if max_norm == 0.0 || max_norm.is_infinite() {
        return 1.0;
    }
    (max_norm / (norm + 1e-6)).min(1.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use nibble_runtime::Tag;
    use proptest::prelude::*;

    #[test]
    fn integers_are_refused_and_nothing_sums_to_zero() {
        assert!(sum_of_squares(&Tensor::from_slice(&[1i32], &[1], Tag::Workspace).unwrap()).is_err());
        assert_eq!(sum_of_squares(&Tensor::from_slice::<f32>(&[], &[0], Tag::Workspace).unwrap()).unwrap(), 0.0);
    }

    #[test]
    fn squares_beyond_f32_do_not_overflow() {
        let x = Tensor::from_slice(&[1e30f32, -1e-30], &[2], Tag::Workspace).unwrap();
        assert!((sum_of_squares(&x).unwrap() / 1e60 - 1.0).abs() < 1e-6);
    }

    #[test]
    fn clipping_follows_pytorch() {
        assert_eq!(clip_scale(0.5, 1.0), 1.0);
        assert_eq!(clip_scale(0.0, 1.0), 1.0);
        assert_eq!(clip_scale(4.0, 1.0), (1.0 / 4.000001) as f32);
        assert_eq!(clip_scale(1e9, 0.0), 1.0);
        assert_eq!(clip_scale(1e9, f64::INFINITY), 1.0);
    }

    #[test]
    fn the_factor_brings_the_norm_down_to_the_limit() {
        let grads = [[3f32, 0.0], [0.0, 4.0]].map(|x| Tensor::from_slice(&x, &[2], Tag::Workspace).unwrap());
        let clip = Clip::new(&[&grads[0], &grads[1]], 1.0, 2.0).unwrap();
        assert_eq!(clip.factor().unwrap(), (clip_scale(2.5, 1.0) / 2.0, true));
        assert_eq!(clip.read().unwrap(), Verdict { norm: 2.5, gradients_finite: true, parameters_finite: true });
        assert!(Clip::new(&[], 1.0, 1.0).is_err());
    }

    proptest! {
        #[test]
        fn is_exact_and_independent_of_the_number_of_threads(
            seed in prop::collection::vec(-1e3f32..1e3, 1..100), repeat in 1usize..700, half in any::<bool>(),
        ) {
            let values = seed.repeat(repeat);
            let dtype = if half { DType::BF16 } else { DType::F32 };
            let x = Tensor::from_slice(&values, &[values.len()], Tag::Workspace).unwrap();
            let x = x.into_dtype(dtype, Tag::Workspace).unwrap();
            let exact: f64 = x.to_f32().unwrap().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let sum = sum_of_squares(&x).unwrap();
            prop_assert!((sum - exact).abs() <= 1e-12 * exact);
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                prop_assert_eq!(pool.install(|| sum_of_squares(&x)).unwrap().to_bits(), sum.to_bits());
            }
        }
    }
}
