//! Launch of element-wise sums.

use crate::{
    cast::cuda::code,
    cuda::{entry, size},
};
use nibble_runtime::{
    Result, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "elementwise",
    ptx: include_str!("../../ptx/elementwise.ptx"),
    entries: &[Entry { name: "elementwise_add_assign", floats: true, params: &[8, 8, 4, 8] }],
};

/// Bytes of the sum that a block makes: 256 threads, two runs of 16 bytes.
const BLOCK: usize = 2 * 256 * 16;

pub(super) fn add_assign(into: &mut Tensor, x: &Tensor) -> Result<()> {
    let (name, type_) = (entry("elementwise_add_assign", into.dtype())?, code(x.dtype())?);
    let (grid, n) = (size("add", into.size_bytes().div_ceil(BLOCK))?, into.numel() as u64);
    let gpu = Gpu::of(into.device())?;
    gpu.launch(&MODULE, &name, [grid, 1, 1], [256, 1, 1], 0, Args::new().output(into).input(x).u32(type_).u64(n))
}
