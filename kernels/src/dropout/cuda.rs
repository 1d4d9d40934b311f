//! Launch of dropout.

use super::Mask;
use crate::cuda::{entry, size};
use nibble_runtime::{
    Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "dropout",
    ptx: include_str!("../../ptx/dropout.ptx"),
    entries: &[Entry { name: "dropout_apply", floats: true, params: &[8, 8, 8, 8, 4, 4, 4, 4] }],
};

/// Bytes of the result that a block makes: 256 threads, 16 bytes each.
const BLOCK: usize = 256 * 16;

pub(super) fn apply(x: &Tensor, mask: Mask) -> Result<Tensor> {
    let name = entry("dropout_apply", x.dtype())?;
    let mut out = Tensor::empty(x.shape(), x.dtype(), x.device(), Tag::Workspace)?;
    let (grid, n) = (size("dropout", x.size_bytes().div_ceil(BLOCK))?, x.numel() as u64);
    let args = Args::new().input(x).output(&mut out).u64(n);
    let args = args.u64(mask.seed).u32(mask.step).u32(mask.purpose_layer()).u32(mask.threshold()).f32(mask.scale());
    Gpu::of(x.device())?.launch(&MODULE, &name, [grid, 1, 1], [256, 1, 1], 0, args)?;
    Ok(out)
}
