//! Launch of the rotary embedding.

use super::{Direction, RotaryTable};
use crate::cuda::{entry, size};
use nibble_runtime::{
    DType, Error, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "rotary",
    ptx: include_str!("../../ptx/rotary.ptx"),
    entries: &[Entry { name: "rotary_apply", floats: true, params: &[8, 8, 8, 8, 4, 4, 4, 4, 4] }],
};

/// Heads that a thread turns, as in the kernel.
const HEADS: usize = 4;

/// `x` `[T, heads · 2 · half]`, turned in place if it is alone in its storage; shapes were checked.
pub(super) fn apply(x: Tensor, positions: &Tensor, table: &RotaryTable, direction: Direction) -> Result<Tensor> {
    let op = "rotary";
    let (tokens, width) = x.dims2(op)?;
    let half = table.cos.shape()[1];
    if positions.dtype() != DType::I32 {
        return Err(Error::DType { op, expected: DType::I32.to_string(), found: positions.dtype() });
    }
    if table.is_empty() && tokens > 0 {
        return Err(Error::invalid(op, "the table has no position"));
    }
    let heads = width / (2 * half);
    let run = 16 / x.dtype().size();
    let runs = if half.is_multiple_of(run) { half / run } else { half };
    let work = size(op, tokens * heads.div_ceil(HEADS) * runs)?;
    // The kernel counts pairs if the address turns out to be odd; that must fit too.
    size(op, tokens * heads.div_ceil(HEADS) * half)?;
    let name = entry("rotary_apply", x.dtype())?;
    let mut x = if x.is_unique() { x } else { x.copy(Tag::Activations)? };
    let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
    let args = Args::new().output(&mut x).input(positions).input(&table.cos).input(&table.sin);
    let args = args.u32(tokens as u32).u32(heads as u32).u32(half as u32).u32(size(op, table.len())?).f32(sign);
    Gpu::of(x.device())?.launch(&MODULE, &name, [work.div_ceil(256), 1, 1], [256, 1, 1], 0, args)?;
    Ok(x)
}
