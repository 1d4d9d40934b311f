//! Launch of what rows of several adapters need.

use crate::cuda::{entry, size};
use nibble_runtime::{
    Result, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "mixed",
    ptx: include_str!("../../ptx/mixed.ptx"),
    entries: &[
        Entry { name: "mixed_keep_own", floats: true, params: &[8, 8, 8, 8, 4, 4] },
        Entry { name: "mixed_scale_own", floats: true, params: &[8, 8, 8, 4, 4] },
    ],
};

const THREADS: u32 = 256;

/// Blocks for `n` elements: enough for each, and no more than a large GPU holds a few times over.
fn grid(n: usize) -> [u32; 3] {
    [(n.div_ceil(THREADS as usize).clamp(1, 4096)) as u32, 1, 1]
}

pub(super) fn keep_own(t: &mut Tensor, owners: &Tensor, columns: &Tensor, scales: &Tensor) -> Result<()> {
    let (op, (rows, width)) = ("mixed adapters", t.dims2("mixed adapters")?);
    let (gpu, name, grid) = (Gpu::of(t.device())?, entry("mixed_keep_own", t.dtype())?, grid(t.numel()));
    let args = Args::new().output(t).input(owners).input(columns).input(scales);
    gpu.launch(&MODULE, &name, grid, [THREADS, 1, 1], 0, args.u32(size(op, rows)?).u32(size(op, width)?))
}

pub(super) fn scale_own(y: &mut Tensor, owners: &Tensor, gains: &Tensor) -> Result<()> {
    let (op, (rows, width)) = ("mixed adapters", y.dims2("mixed adapters")?);
    let (gpu, name, grid) = (Gpu::of(y.device())?, entry("mixed_scale_own", y.dtype())?, grid(y.numel()));
    let args = Args::new().output(y).input(owners).input(gains);
    gpu.launch(&MODULE, &name, grid, [THREADS, 1, 1], 0, args.u32(size(op, rows)?).u32(size(op, width)?))
}
