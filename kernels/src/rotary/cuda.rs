//! Launch of the rotary embedding.

use super::{Direction, RotaryTable};
use crate::cuda::{check_dtype, entry, size};
use nibble_runtime::{
    DType, Error, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "rotary",
    ptx: include_str!("../../ptx/rotary.ptx"),
    entries: &[Entry { name: "rotary_apply", floats: true, params: &[8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4] }],
};

/// Heads that a thread turns, as in the kernel.
const HEADS: usize = 4;

/// Most tensors of a launch.
const MOST: usize = 2;

/// One or two tensors `[T, heads · 2 · half]` of the same tokens, turned in place where they are alone in their storage; shapes
/// were checked.
pub(super) fn apply<const N: usize>(
    mut xs: [Tensor; N],
    positions: &Tensor,
    table: &RotaryTable,
    direction: Direction,
) -> Result<[Tensor; N]> {
    const { assert!(1 <= N && N <= MOST) }
    let op = "rotary";
    let (tokens, half, dtype) = (positions.numel(), table.cos.shape()[1], xs[0].dtype());
    if positions.dtype() != DType::I32 {
        return Err(Error::DType { op, expected: DType::I32.to_string(), found: positions.dtype() });
    }
    if table.is_empty() && tokens > 0 {
        return Err(Error::invalid(op, "the table has no position"));
    }
    check_dtype(op, dtype, &xs.each_ref())?;
    let mut heads = [0; MOST];
    for (heads, x) in heads.iter_mut().zip(&mut xs) {
        *heads = x.dims2(op)?.1 / (2 * half);
        if !x.is_unique() {
            *x = x.copy(Tag::Activations)?;
        }
    }
    let groups: usize = heads.iter().map(|heads| heads.div_ceil(HEADS)).sum();
    let run = 16 / dtype.size();
    let runs = if half.is_multiple_of(run) { half / run } else { half };
    let work = size(op, tokens * groups * runs)?;
    // The kernel counts pairs if an address turns out to be odd; that must fit too.
    size(op, tokens * groups * half)?;
    let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
    let mut args = xs.iter_mut().fold(Args::new(), Args::in_place);
    for _ in N..MOST {
        args = args.output_opt(None);
    }
    let args = args.input(positions).input(&table.cos).input(&table.sin).u32(tokens as u32);
    let args = heads.iter().fold(args, |args, &heads| args.u32(heads as u32));
    let args = args.u32(half as u32).u32(size(op, table.len())?).f32(sign);
    let (name, grid) = (entry("rotary_apply", dtype)?, [work.div_ceil(256), 1, 1]);
    Gpu::of(xs[0].device())?.launch(&MODULE, &name, grid, [256, 1, 1], 0, args)?;
    Ok(xs)
}
