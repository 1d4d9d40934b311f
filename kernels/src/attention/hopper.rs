//! Attention on Hopper: what its kernels take, and their launch. They are in `hopper_forward.cuh` and `hopper_backward.cuh`.

use super::{
    Heads, Layout, Saved,
    cuda::{TILE, flops, scale_log2, small},
};
use crate::{
    cuda::{entry, hopper},
    rotary::{RotaryTable, Turn},
};
use nibble_runtime::{
    DType, Error, Result, Tag, Tensor,
    cuda::{Args, Chip, Entry, Gpu, Module},
};

const FORWARD: &[usize] = &[128, 128, 128, 8, 8, 8, 4, 4, 4, 4, 4];
const BACKWARD: &[usize] = &[128, 128, 128, 128, 8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 8, 8, 8, 4];
const FINISH: &[usize] = &[8, 8, 8, 4, 4, 8, 8, 8, 4];

pub(crate) static D128: Module = Module {
    name: "attention_hopper_d128_sm90a",
    ptx: include_str!("../../ptx/attention_hopper_d128_sm90a.ptx"),
    entries: &[
        Entry { name: "attention_hopper_forward_f16", floats: false, params: FORWARD },
        Entry { name: "attention_hopper_forward_bf16", floats: false, params: FORWARD },
        Entry { name: "attention_hopper_backward_f16", floats: false, params: BACKWARD },
        Entry { name: "attention_hopper_backward_bf16", floats: false, params: BACKWARD },
        Entry { name: "attention_hopper_finish_f16", floats: false, params: FINISH },
        Entry { name: "attention_hopper_finish_bf16", floats: false, params: FINISH },
    ],
};

/// Elements of a head.
const DIM: usize = 128;
/// Threads of a block: a warpgroup that copies, and two that multiply.
const THREADS: u32 = 3 * 128;
/// Heads that a block of the kernel that rounds dQ takes.
const FINISH_HEADS: usize = 4;
/// Query rows of a tile of the backward kernel.
const ROWS: usize = 64;
/// Columns of a box that the TMA copies.
const BOX: u32 = 64;
/// Q and O, two stages of K and of V; ten barriers.
const FORWARD_SHARED: usize = 6 * TILE * DIM * 2 + 10 * 8;
/// K, V, two stages of Q and dO, two of dS, two of dQ in f32, two of lse and delta; barriers and the ticket.
const BACKWARD_SHARED: usize =
    2 * TILE * DIM * 2 + 4 * ROWS * DIM * 2 + 2 * TILE * ROWS * 2 + 2 * ROWS * DIM * 4 + 4 * ROWS * 4 + 14 * 8;

/// Whether this kind of GPU and these heads are the kernels'.
fn suits(chip: Chip, heads: Heads) -> bool {
    hopper(chip) && heads.dim == DIM
}

/// Whether this GPU and these tensors are the kernels'. Sequences that reach keys of another pass are not: what lies
/// between their keys, and may be anything, would come along in a tile.
fn takes(gpu: &Gpu, tensors: &[&Tensor], heads: Heads, layout: &Layout, shared: usize) -> Result<bool> {
    let mut aligned = true;
    for tensor in tensors {
        aligned &= tensor.device_pointer()?.is_multiple_of(16);
    }
    let dtype = tensors[0].dtype();
    Ok(suits(gpu.chip(), heads)
        && !tests_forbid()
        && gpu.shared_per_block() >= shared
        && matches!(dtype, DType::F16 | DType::BF16)
        && tensors.iter().all(|tensor| tensor.dtype() == dtype)
        && layout.is_whole()
        && aligned)
}

/// Whether a test wants the other kernels.
fn tests_forbid() -> bool {
    #[cfg(test)]
    return tests::FORBIDDEN.get();
    #[cfg(not(test))]
    false
}

/// Attention into `o` and `lse`, if the kernel takes it; returns whether it did.
pub(super) fn forward(
    gpu: &Gpu,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    heads: Heads,
    layout: &Layout,
    (o, lse): (&mut Tensor, &mut Tensor),
) -> Result<bool> {
    if !takes(gpu, &[q, k, v], heads, layout, FORWARD_SHARED)? {
        return Ok(false);
    }
    let tiles = &layout.tables()?.queries;
    let items = small(tiles.shape()[0] * heads.query)?;
    // Rows beyond those that are reached read as zeros.
    let (k, v) = (k.rows(0, layout.keys())?, v.rows(0, layout.keys())?);
    let args =
        Args::new().tensor_map(q, TILE as u32, BOX).tensor_map(&k, TILE as u32, BOX).tensor_map(&v, TILE as u32, BOX);
    let args =
        args.flops(flops(heads, layout, 2)).output(o).output(lse).input(tiles).u32(items).u32(small(heads.query)?);
    let args = args.u32(small(heads.query / heads.kv)?).u32(small(layout.queries())?).f32(scale_log2(heads)).early();
    let grid = [items.min(gpu.sm_count().max(1)), 1, 1];
    let name = entry("attention_hopper_forward", q.dtype())?;
    gpu.launch(&D128, &name, grid, [THREADS, 1, 1], FORWARD_SHARED, args)?;
    Ok(true)
}

/// Parts that dQ is summed in, of `count` tiles of keys.
fn parts(count: usize, heads: Heads) -> usize {
    count * (TILE / ROWS) * heads.query
}

/// Whether so many tiles are not much more than their rows.
fn dense(count: usize, rows: usize) -> bool {
    count * TILE <= 2 * rows.max(TILE)
}

/// Bytes of dQ's sums and their counters for whole sequences of `rows` 16-bit rows in `count` tiles of keys, on this kind of
/// GPU; nothing where other kernels take them.
pub(super) fn workspace(chip: Chip, heads: Heads, count: usize, rows: usize) -> [usize; 2] {
    if !suits(chip, heads) || !dense(count, rows) {
        return [0, 0];
    }
    let parts = parts(count, heads);
    [parts * ROWS * DIM * size_of::<f32>(), (parts + 1) * size_of::<i32>()]
}

/// The angles by which gradients turn back, or that they do not.
fn angles(args: Args, turn: Option<Turn>) -> Result<Args> {
    let table = turn.map(|turn| turn.table);
    let args = args.input_opt(turn.map(|turn| turn.positions)).input_opt(table.map(|table| &table.cos));
    let length = small(table.map_or(0, RotaryTable::len))?;
    Ok(args.input_opt(table.map(|table| &table.sin)).u32(length).early())
}

/// Gradients into `dq`, `dk` and `dv`, if the kernel takes them; returns whether it did. `delta` is rowsum(dO ∘ O). Those of q
/// and k turn back by `turn`.
///
/// dQ is summed in f32, in tiles of 128 rows a sequence: batches of sequences much shorter than that are left to the other
/// kernels, and so are all where there is no memory for the sums.
pub(super) fn backward(
    gpu: &Gpu,
    saved: &Saved,
    grad: &Tensor,
    delta: &Tensor,
    (heads, layout): (Heads, &Layout),
    turn: Option<Turn>,
    (dq, dk, dv): (&mut Tensor, &mut Tensor, &mut Tensor),
) -> Result<bool> {
    let Saved { q, k, v, lse, .. } = *saved;
    let (blocks, rows) = (&layout.tables()?.keys, layout.queries());
    let count = blocks.shape()[0];
    if !takes(gpu, &[q, k, v, grad], heads, layout, BACKWARD_SHARED)? || !dense(count, rows) {
        return Ok(false);
    }
    let parts = parts(count, heads);
    let empty = Tensor::empty(&[parts, ROWS * DIM], DType::F32, q.device(), Tag::Workspace);
    let mut sums = match empty {
        Err(Error::OutOfMemory(_)) => return Ok(false),
        sums => sums?,
    };
    // The ticket, and a counter a part.
    let mut counters = Tensor::zeros(&[parts + 1], DType::I32, q.device(), Tag::Workspace)?;
    let kv_rows = |tensor: &Tensor| tensor.rows(0, layout.keys());
    let (k, v, edge, rows_box) = (kv_rows(k)?, kv_rows(v)?, TILE as u32, ROWS as u32);
    let args = Args::new().tensor_map(q, rows_box, BOX).tensor_map(&k, edge, BOX).tensor_map(&v, edge, BOX);
    let args = args
        .flops(flops(heads, layout, 5))
        .tensor_map(grad, rows_box, BOX)
        .input(lse)
        .input(delta)
        .output(&mut sums)
        .output(dk)
        .output(dv);
    let args = args.output(&mut counters).input(blocks).u32(small(heads.query)?).u32(small(heads.query / heads.kv)?);
    let args = args.u32(small(rows)?).f32(heads.scale()).f32(scale_log2(heads));
    let (args, grid) = (angles(args, turn)?, [small(count * heads.kv)?, 1, 1]);
    let name = entry("attention_hopper_backward", q.dtype())?;
    gpu.launch(&D128, &name, grid, [THREADS, 1, 1], BACKWARD_SHARED, args)?;

    let args = Args::new().input(&sums).output(dq).input(blocks).u32(small(heads.query)?).f32(heads.scale());
    let (args, grid) =
        (angles(args, turn)?, [small(count * (TILE / ROWS) * heads.query.div_ceil(FINISH_HEADS))?, 1, 1]);
    gpu.launch(&D128, &entry("attention_hopper_finish", q.dtype())?, grid, [256, 1, 1], 0, args)?;
    Ok(true)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        /// Whether this thread's attention is left to the other kernels.
        pub(crate) static FORBIDDEN: Cell<bool> = const { Cell::new(false) };
    }

    #[test]
    fn shared_memory_fits() {
        assert!(FORWARD_SHARED.max(BACKWARD_SHARED) <= 227 << 10);
    }
}
