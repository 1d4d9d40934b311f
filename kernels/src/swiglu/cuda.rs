//! Launch of SwiGLU and its gradient.

use crate::cuda::{check_dtype, entry, size};
use nibble_runtime::{
    Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "swiglu",
    ptx: include_str!("../../ptx/swiglu.ptx"),
    entries: &[
        Entry { name: "swiglu_forward", floats: true, params: &[8, 8, 8, 8] },
        Entry { name: "swiglu_backward", floats: true, params: &[8, 8, 8, 8] },
    ],
};

/// Bytes of an array that a block moves at a time: 256 threads, 16 bytes each.
const BLOCK: usize = 256 * 16;

pub(super) fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check_dtype("swiglu", gate.dtype(), &[up])?;
    let name = entry("swiglu_forward", gate.dtype())?;
    let mut out = Tensor::empty(gate.shape(), gate.dtype(), gate.device(), Tag::Workspace)?;
    // Two runs a thread.
    let (grid, n) = (size("swiglu", out.size_bytes().div_ceil(2 * BLOCK))?, out.numel() as u64);
    let args = Args::new().input(gate).input(up).output(&mut out).u64(n);
    Gpu::of(gate.device())?.launch(&MODULE, &name, [grid, 1, 1], [256, 1, 1], 0, args)?;
    Ok(out)
}

pub(super) fn backward(gate: Tensor, up: Tensor, grad: &Tensor) -> Result<(Tensor, Tensor)> {
    check_dtype("swiglu backward", gate.dtype(), &[&up, grad])?;
    let name = entry("swiglu_backward", gate.dtype())?;
    let own = |x: Tensor| if x.is_unique() { Ok(x) } else { x.copy(Tag::Workspace) };
    let (mut gate, mut up) = (own(gate)?, own(up)?);
    let (grid, n) = (size("swiglu backward", gate.size_bytes().div_ceil(BLOCK))?, gate.numel() as u64);
    let args = Args::new().output(&mut gate).output(&mut up).input(grad).u64(n);
    Gpu::of(grad.device())?.launch(&MODULE, &name, [grid, 1, 1], [256, 1, 1], 0, args)?;
    Ok((gate, up))
}
