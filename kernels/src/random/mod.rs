//! Tensors of seeded random numbers, made where they are to be.

pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use nibble_runtime::{
    DType, Device, Result, Tag, Tensor,
    rng::{Philox, Stream},
};
use rayon::prelude::*;

/// [`Stream::purpose`] of random tensors.
const PURPOSE: u32 = 4;
/// Elements that one task makes.
const CHUNK: usize = 1 << 14;

/// Normal numbers of standard deviation `std` and mean 0 in `dtype`; `number` names the tensor among those of `seed`. The
/// same on every device but for the last bits of logarithm and cosine.
///
/// # Errors
/// `dtype` is not a float type, or the device is out of memory.
pub fn normal(
    shape: &[usize],
    dtype: DType,
    device: Device,
    std: f32,
    seed: u64,
    number: u32,
    tag: Tag,
) -> Result<Tensor> {
    let stream = Stream { purpose: PURPOSE, step: number, layer: 0 };
    if device != Device::Cpu {
        return cuda::normal(shape, dtype, device, std, seed, stream, tag);
    }
    let rng = Philox::new(seed, stream);
    let mut out = Tensor::empty(shape, DType::F32, device, tag)?;
    out.as_mut_slice::<f32>()?.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, out)| {
        for (position, out) in ((chunk * CHUNK) as u64..).zip(out) {
            *out = std * rng.normal(position);
        }
    });
    out.into_dtype(dtype, tag)
}
