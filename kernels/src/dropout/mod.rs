//! Dropout with a counter-based mask: element `i` is kept if its random number says so, and scaled by `1/(1 − p)`.
//!
//! The mask is a pure function of seed, step, layer and position, so the backward pass and a recomputed forward pass
//! make it again instead of storing it, on any device. Source: Srivastava et al., JMLR 15 (2014).

pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;

use nibble_runtime::{
    DType, Device, Error, Result, Tag, Tensor,
    rng::{Philox, Stream},
};
use rayon::prelude::*;

/// [`Stream::purpose`] of dropout masks.
const PURPOSE: u32 = 1;
/// Elements that one task takes (a multiple of 4).
const CHUNK: usize = 1 << 13;

/// Which elements are dropped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mask {
    /// Probability of dropping an element, in [0, 1).
    pub probability: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Micro-batch, counted over the whole run.
    pub step: u32,
    /// Linear layer within the model.
    pub layer: u32,
}

impl Mask {
    /// Elements are dropped where their random word is below this.
    pub(crate) fn threshold(&self) -> u32 {
        (f64::from(self.probability) * 4_294_967_296.0) as u32
    }

    /// What the kept elements are multiplied by.
    pub(crate) fn scale(&self) -> f32 {
        1.0 / (1.0 - self.probability)
    }

    /// The fourth counter word, as `Philox::block` packs it.
    pub(crate) fn purpose_layer(&self) -> u32 {
        PURPOSE << 16 | self.layer & 0xFFFF
    }

    /// # Errors
    /// The probability is outside of [0, 1).
    pub(crate) fn check(&self) -> Result<()> {
        if (0.0..1.0).contains(&self.probability) {
            return Ok(());
        }
        Err(Error::invalid("dropout", format!("probability {} is outside of [0, 1)", self.probability)))
    }
}

/// Applies the mask to `x`, any shape. Forward and backward are the same: pass the gradient to get the gradient.
///
/// # Errors
/// The probability is outside of [0, 1).
pub fn apply(x: &Tensor, mask: Mask) -> Result<Tensor> {
    mask.check()?;
    match x.device() {
        Device::Cpu => {
            let rng = Philox::new(mask.seed, Stream { purpose: PURPOSE, step: mask.step, layer: mask.layer });
            let (threshold, scale) = (mask.threshold(), mask.scale());
            let mut out = Tensor::empty(x.shape(), DType::F32, Device::Cpu, Tag::Workspace)?;
            let xs = x.to_f32()?;
            let chunks = out.as_mut_slice::<f32>()?.par_chunks_mut(CHUNK).zip(xs.par_chunks(CHUNK)).enumerate();
            chunks.for_each(|(chunk, (out, x))| {
                let first = (chunk * CHUNK / 4) as u64;
                for (block, (out, x)) in (first..).zip(out.chunks_mut(4).zip(x.chunks(4))) {
                    for ((out, &x), word) in out.iter_mut().zip(x).zip(rng.block(block)) {
                        *out = if word < threshold { 0.0 } else { x * scale };
                    }
                }
            });
            out.into_dtype(x.dtype(), Tag::Workspace)
        }
        Device::Cuda(_) => cuda::apply(x, mask),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    const MASK: Mask = Mask { probability: 0.25, seed: 7, step: 3, layer: 5 };

    #[test]
    fn drops_the_stated_share_and_keeps_the_mean() {
        let ones = Tensor::from_slice(&vec![1f32; 100_001], &[100_001], Tag::Workspace).unwrap();
        let out = apply(&ones, MASK).unwrap();
        let values = out.as_slice::<f32>().unwrap();
        assert!(values.iter().all(|&x| x == 0.0 || x == 4.0 / 3.0));
        let dropped = values.iter().filter(|&&x| x == 0.0).count() as f64 / 100_001.0;
        assert!((dropped - 0.25).abs() < 0.01, "{dropped}");
    }

    #[test]
    fn the_mask_depends_on_every_key_and_on_nothing_else() {
        let x = random(&[50, 7], 1);
        let out = apply(&x, MASK).unwrap();
        assert_eq!(out.bytes().unwrap(), apply(&x, MASK).unwrap().bytes().unwrap());
        assert_eq!(out.bytes().unwrap(), apply(&x.reshape(&[350]).unwrap(), MASK).unwrap().bytes().unwrap());
        for other in [Mask { seed: 8, ..MASK }, Mask { step: 4, ..MASK }, Mask { layer: 6, ..MASK }] {
            assert_ne!(out.bytes().unwrap(), apply(&x, other).unwrap().bytes().unwrap());
        }
        assert_eq!(apply(&x, Mask { probability: 0.0, ..MASK }).unwrap().bytes().unwrap(), x.bytes().unwrap());
        assert!(apply(&x, Mask { probability: 1.0, ..MASK }).is_err());
    }
}
