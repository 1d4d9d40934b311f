//! CUDA launch of random tensors.

use crate::cuda::{entry, size};
use nibble_runtime::{
    DType, Device, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
    rng::Stream,
};

pub(crate) static MODULE: Module = Module {
    name: "random",
    ptx: include_str!("../../ptx/random.ptx"),
    entries: &[Entry { name: "random_normal", floats: true, params: &[8, 8, 4, 8, 4, 4] }],
};

/// See [`super::normal`].
pub(super) fn normal(
    shape: &[usize],
    dtype: DType,
    device: Device,
    std: f32,
    seed: u64,
    Stream { purpose, step, layer }: Stream,
    tag: Tag,
) -> Result<Tensor> {
    let mut out = Tensor::empty(shape, dtype, device, tag)?;
    let numel = out.numel();
    let blocks = size("random", numel.div_ceil(512))?; // a thread makes two
    let args = Args::new().output(&mut out).u64(numel as u64).f32(std).u64(seed).u32(step).u32(purpose << 16 | layer);
    Gpu::of(device)?.launch(&MODULE, &entry("random_normal", dtype)?, [blocks, 1, 1], [256, 1, 1], 0, args)?;
    Ok(out)
}
