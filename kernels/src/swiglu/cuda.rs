//! Launch of SwiGLU and its gradient.

use super::Backward;
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

/// The tensor itself where nothing else refers to it, else a copy.
pub(crate) fn own(x: Tensor) -> Result<Tensor> {
    if x.is_unique() { Ok(x) } else { x.copy(Tag::Workspace) }
}

pub(super) fn backward(gate: Tensor, up: Tensor, grad: Tensor) -> Result<Backward> {
    check_dtype("swiglu backward", gate.dtype(), &[&up, &grad])?;
    let name = entry("swiglu_backward", gate.dtype())?;
    let (mut gate, mut up, mut output) = (own(gate)?, own(up)?, own(grad)?);
    let (bytes, n) = (gate.size_bytes(), gate.numel() as u64);
    let args = Args::new().output(&mut gate).output(&mut up).output(&mut output).moves(6 * bytes).u64(n);
    let grid = [size("swiglu backward", bytes.div_ceil(BLOCK))?, 1, 1];
    Gpu::of(gate.device())?.launch(&MODULE, &name, grid, [256, 1, 1], 0, args)?;
    Ok(Backward { output, gate, up })
}
