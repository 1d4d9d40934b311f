//! Products with LoRA ranks on Hopper: which of them, and the launch of narrow_hopper_sm90a.cu.

use crate::cuda::{entry, hopper, one, size};
use nibble_runtime::{
    DType, Device, Result, Tag, Tensor,
    cuda::{Args, Chip, Entry, Gpu, Module},
};

/// Four maps; three times output, scale, column, rank and the ranks before; partial sums; six sizes.
const PRODUCT: &[usize] = &[128, 128, 128, 128, 8, 4, 4, 4, 4, 8, 4, 4, 4, 4, 8, 4, 4, 4, 4, 8, 4, 4, 4, 4, 4, 4];
/// Three maps; parts of u and of dB; four sizes.
const BOTH: &[usize] = &[128, 128, 128, 8, 8, 4, 4, 4, 4];
const BOTH_SUM: &[usize] = &[8, 8, 4, 4, 4, 8, 8, 4, 4];
/// Partial sums; three times output, scale and end; two sizes.
const SUM: &[usize] = &[8, 8, 4, 4, 8, 4, 4, 8, 4, 4, 4, 4];

const fn kernel(name: &'static str) -> Entry {
    one(name, PRODUCT)
}

pub(crate) static NARROW_HOPPER: Module = Module {
    name: "narrow_hopper_sm90a",
    ptx: include_str!("../../ptx/narrow_hopper_sm90a.ptx"),
    entries: &[
        kernel("narrow_rows_1_bf16"),
        kernel("narrow_rows_2_bf16"),
        kernel("narrow_rows_3_bf16"),
        kernel("narrow_columns_1_bf16"),
        kernel("narrow_columns_2_bf16"),
        kernel("narrow_columns_3_bf16"),
        kernel("narrow_grads_1_bf16"),
        kernel("narrow_grads_2_bf16"),
        kernel("narrow_grads_3_bf16"),
        kernel("narrow_rows_1_f16"),
        kernel("narrow_rows_2_f16"),
        kernel("narrow_rows_3_f16"),
        kernel("narrow_columns_1_f16"),
        kernel("narrow_columns_2_f16"),
        kernel("narrow_columns_3_f16"),
        kernel("narrow_grads_1_f16"),
        kernel("narrow_grads_2_f16"),
        kernel("narrow_grads_3_f16"),
        one("narrow_both_bf16", BOTH),
        one("narrow_both_f16", BOTH),
        Entry { name: "narrow_sum", floats: true, params: SUM },
        one("narrow_both_sum_bf16", BOTH_SUM),
        one("narrow_both_sum_f16", BOTH_SUM),
    ],
};

/// Rows and columns of a box; most columns of a group.
const BOX: usize = 64;
const BOX_BYTES: usize = BOX * BOX * 2;
const MOST_GROUPS: usize = 3;
const MOST_STAGES: usize = 12;
/// Shared memory of a block that has an SM to itself, and of one of two.
const WHOLE: usize = 227 << 10;
const HALF: usize = 113 << 10;
/// Rows of x from which on this kernel is faster than those of lora.cu.
const LEAST: usize = 512;

/// Which product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// `x [M, K] · wᵀ`, `w` `[r, K]`.
    Rows,
    /// `x [M, K] · w`, `w` `[K, r]`.
    Columns,
    /// `xᵀ · w`, `x` `[K, M]`, `w` `[K, r]`: `[M, r]`, or `[r, M]` if `transposed`.
    Grads { transposed: bool },
}

/// The operand with a rank, and what its product is multiplied with.
pub(super) type Narrow<'a> = (&'a Tensor, f32);

fn groups(rank: usize) -> usize {
    rank.div_ceil(BOX)
}

/// How a launch cuts its work.
#[derive(Clone, Copy, Debug)]
struct Plan {
    /// Warpgroups that multiply; each has 64 rows of the result.
    warpgroups: usize,
    tiles: usize,
    /// Steps of 64 of the contraction a slice, and slices.
    slice: usize,
    slices: usize,
    stages: usize,
    /// Bytes of shared memory.
    shared: usize,
}

impl Plan {
    fn new(chip: Chip, kind: Kind, rows: usize, inner: usize, groups: usize, ranks: usize) -> Plan {
        let (sms, grads) = (chip.sms.max(1) as usize, matches!(kind, Kind::Grads { .. }));
        // Where ranks are many, as many bytes of them go to shared memory as of x: two boxes of x share them. Long rows
        // are faster so, in two slices: of 8192 x 14336 an H200 took 73 µs at a rank of 64, and in one slice 87 at 16.
        let warpgroups = if grads || groups > 1 || ranks >= BOX || inner >= 8192 { 2 } else { 1 };
        let (tiles, steps) = (rows.div_ceil(BOX * warpgroups), inner.div_ceil(BOX));
        let two = groups == 1 && (grads || tiles > sms);
        let (room, slots) = if two { (HALF, 2 * sms) } else { (WHOLE, sms) };
        let stage = (warpgroups + groups) * BOX_BYTES;
        let stages = ((room - 1024) / (stage + 16)).min(MOST_STAGES);
        let slices = (slots / tiles.max(1)).clamp(1, (steps / 4).max(1));
        let slice = steps.div_ceil(slices);
        let shared = stages * (stage + 16) + 1024;
        Plan { warpgroups, tiles, slice, slices: steps.div_ceil(slice), stages, shared }
    }

    /// Bytes of partial sums.
    fn workspace(&self, kind: Kind, rows: usize, ranks: usize) -> usize {
        let partial = matches!(kind, Kind::Grads { .. }) || self.slices > 1;
        if partial { self.slices * rows * ranks * size_of::<f32>() } else { 0 }
    }
}

/// Whether this kind of GPU takes products of 16-bit rows with these ranks by this kernel. `rows`: of x, as it lies there.
fn takes(chip: Chip, kind: Kind, rows: usize, [m, k]: [usize; 2], ranks: &[usize]) -> bool {
    let width = if matches!(kind, Kind::Grads { .. }) { m } else { k };
    let whole = ranks.iter().chain([&width]).all(|size| size.is_multiple_of(8));
    let fits = ranks.iter().all(|&rank| (1..=MOST_GROUPS * BOX).contains(&rank));
    let many = rows >= LEAST || always();
    hopper(chip) && whole && fits && many && m > 0 && k > 0 && m.max(k) < 1 << 30
}

/// Whether a test wants this kernel for any number of rows.
fn always() -> bool {
    #[cfg(test)]
    return tests::ALWAYS.get();
    #[cfg(not(test))]
    false
}

/// How many of the first ranks one launch takes.
fn together(ranks: &[usize]) -> usize {
    let mut left = MOST_GROUPS;
    ranks.iter().take_while(|&&rank| left.checked_sub(groups(rank)).inspect(|rest| left = *rest).is_some()).count()
}

/// Bytes of workspace of [`products`] for 16-bit `x` of `rows` rows; `None` where it takes none of them.
pub(super) fn workspace(chip: Chip, kind: Kind, rows: usize, [m, k]: [usize; 2], ranks: &[usize]) -> Option<usize> {
    takes(chip, kind, rows, [m, k], ranks).then(|| {
        let (mut most, mut rest) = (0, ranks);
        while !rest.is_empty() {
            let (these, others) = rest.split_at(together(rest));
            let sum = these.iter().sum();
            let plan = Plan::new(chip, kind, m, k, these.iter().map(|&rank| groups(rank)).sum(), sum);
            (most, rest) = (plan.workspace(kind, m, sum).max(most), others);
        }
        most
    })
}

/// The products of `x` with all of `narrow`, whose shapes have been checked, counted under `tag`; `None` where other
/// kernels make them. Of gradients in f32, else in the type of `x`.
pub(super) fn products(kind: Kind, x: &Tensor, narrow: &[Narrow], tag: Tag) -> Result<Option<Vec<Tensor>>> {
    let op = "LoRA product";
    let Device::Cuda(_) = x.device() else { return Ok(None) };
    let (gpu, (rows, columns)) = (Gpu::of(x.device())?, x.dims2(op)?);
    let by_columns = kind != Kind::Rows;
    let ranks: Vec<usize> = narrow.iter().map(|(w, _)| w.shape()[usize::from(by_columns)]).collect();
    let sizes = if matches!(kind, Kind::Grads { .. }) { [columns, rows] } else { [rows, columns] };
    let mut taken = x.dtype() != DType::F32 && takes(gpu.chip(), kind, rows, sizes, &ranks);
    for tensor in narrow.iter().map(|(w, _)| *w).chain([x]) {
        taken = taken && tensor.dtype() == x.dtype() && tensor.device_pointer()? % 16 == 0;
    }
    if !taken || gpu.shared_per_block() < WHOLE {
        return Ok(None);
    }
    let (mut outs, mut first) = (Vec::new(), 0);
    while first < narrow.len() {
        let count = together(&ranks[first..]);
        let these = first..first + count;
        outs.extend(launch(gpu, kind, x, &narrow[these.clone()], &ranks[these], sizes, tag)?);
        first += count;
    }
    Ok(Some(outs))
}

/// As [`products`], of one operand.
pub(super) fn product(kind: Kind, x: &Tensor, narrow: Narrow, tag: Tag) -> Result<Option<Tensor>> {
    Ok(products(kind, x, &[narrow], tag)?.and_then(|mut outs| outs.pop()))
}

/// The products that one launch makes.
fn launch(
    gpu: &Gpu,
    kind: Kind,
    x: &Tensor,
    narrow: &[Narrow],
    ranks: &[usize],
    [m, k]: [usize; 2],
    tag: Tag,
) -> Result<Vec<Tensor>> {
    let op = "LoRA product";
    let (name, dtype, transposed) = match kind {
        Kind::Rows => ("rows", x.dtype(), false),
        Kind::Columns => ("columns", x.dtype(), false),
        Kind::Grads { transposed } => ("grads", DType::F32, transposed),
    };
    let shape = |rank| if transposed { [rank, m] } else { [m, rank] };
    let empty = |&rank: &usize| Tensor::empty(&shape(rank), dtype, x.device(), tag);
    let mut outs = ranks.iter().map(empty).collect::<Result<Vec<Tensor>>>()?;
    let (count, sum) = (ranks.iter().map(|&rank| groups(rank)).sum(), ranks.iter().sum::<usize>());
    let plan = Plan::new(gpu.chip(), kind, m, k, count, sum);
    let partial_bytes = plan.workspace(kind, m, sum);
    let mut partial = match partial_bytes {
        0 => None,
        bytes => Some(Tensor::empty(&[bytes / size_of::<f32>()], DType::F32, x.device(), Tag::Workspace)?),
    };

    // Of each group which operand, from which of its columns on. Those that there are not are looked at by nobody.
    let parts = ranks.iter().enumerate().flat_map(|(i, &rank)| (0..groups(rank)).map(move |j| (i, j * BOX)));
    let parts: Vec<(usize, usize)> = parts.chain([(0, 0); MOST_GROUPS]).take(MOST_GROUPS).collect();
    let side = BOX as u32;
    let mut args = Args::new().tensor_map(x, side, side);
    for &(i, _) in &parts {
        args = args.tensor_map(narrow[i].0, side, side);
    }
    for &(i, column) in &parts {
        let before: usize = ranks[..i].iter().sum();
        args = args.output_opt(partial.is_none().then_some(&mut outs[i])).f32(narrow[i].1);
        args = args.u32(column as u32).u32(ranks[i] as u32).u32(before as u32);
    }
    let moved = narrow.iter().map(|(w, _)| w.size_bytes()).sum::<usize>() + partial_bytes;
    let args = args.output_opt(partial.as_mut()).moves(x.size_bytes() + moved);
    let args = args.flops(2.0 * m as f64 * k as f64 * sum as f64);
    let args = args.u32(size(op, m)?).u32(size(op, k)?).u32(sum as u32);
    let args = args.u32(plan.slice as u32).u32(plan.stages as u32).u32(transposed.into()).early();
    let kernel = entry(&format!("narrow_{name}_{count}"), x.dtype())?;
    let grid = [size(op, plan.tiles)?, plan.slices as u32, 1];
    gpu.launch(&NARROW_HOPPER, &kernel, grid, [plan.warpgroups as u32 * 128 + 32, 1, 1], plan.shared, args)?;

    let Some(partial) = partial else { return Ok(outs) };
    let mut scaled: Vec<(&mut Tensor, f32)> = outs.iter_mut().zip(narrow.iter().map(|(_, scale)| *scale)).collect();
    add_up(gpu, &partial, plan.slices, &mut scaled)?;
    Ok(outs)
}

/// Each output, times its scale, from `partial`: slices of what all of them take one after another.
fn add_up(gpu: &Gpu, partial: &Tensor, slices: usize, outs: &mut [(&mut Tensor, f32)]) -> Result<()> {
    let op = "LoRA product";
    let Some(dtype) = outs.first().map(|(out, _)| out.dtype()) else { return Ok(()) };
    let (mut args, mut end) = (Args::new().input(partial), 0);
    for i in 0..MOST_GROUPS {
        let (out, scale) = match outs.get_mut(i) {
            Some((out, scale)) => (Some(&mut **out), *scale),
            None => (None, 0.0),
        };
        end += out.as_ref().map_or(0, |out| out.numel());
        args = args.output_opt(out).f32(scale).u32(size(op, end)?);
    }
    let args = args.u32(size(op, slices)?).u32(size(op, end)?).early();
    let grid = [size(op, end.div_ceil(1024))?, 1, 1];
    gpu.launch(&NARROW_HOPPER, &entry("narrow_sum", dtype)?, grid, [256, 1, 1], 0, args)
}

/// Columns of `g` that a block of `narrow_both` has, and its threads.
const BOTH_COLUMNS: usize = 4 * BOX;
const BOTH_THREADS: u32 = 4 * 128 + 32;
/// Its part of B; four stages of four boxes and one; barriers; to start at a multiple of 1024.
const BOTH_SHARED: usize = (4 + 4 * 5) * BOX_BYTES + 9 * 8 + 1024;
/// The largest rank for which writing and reading parts of u takes clearly less than reading the gradient a second time.
const BOTH_RANK: usize = 32;

/// Blocks along the columns of a gradient `[tokens, n]`, steps of 64 tokens a slice, and slices.
fn both_plan(chip: Chip, tokens: usize, n: usize) -> [usize; 3] {
    let (blocks, steps) = (n.div_ceil(BOTH_COLUMNS), tokens.div_ceil(BOX));
    let slices = (chip.sms as usize / blocks.max(1)).clamp(1, (steps / 4).max(1));
    let slice = steps.div_ceil(slices);
    [blocks, slice, steps.div_ceil(slice)]
}

/// Bytes of workspace of [`both`]; `None` where it does not take the products.
pub(super) fn both_workspace(chip: Chip, tokens: usize, n: usize, rank: usize) -> Option<usize> {
    let taken = rank <= BOTH_RANK && takes(chip, Kind::Columns, tokens, [tokens, n], &[rank]);
    taken.then(|| {
        let [blocks, _, slices] = both_plan(chip, tokens, n);
        (blocks * tokens + slices * n) * rank * size_of::<f32>()
    })
}

/// `scale · g · B` `[T, r]` and `gᵀ · t` f32 `[N, r]` in one pass over `g`; `None` where other kernels make them.
pub(super) fn both(grad: &Tensor, t: &Tensor, b: &Tensor, scale: f32, tag: Tag) -> Result<Option<(Tensor, Tensor)>> {
    let op = "LoRA product";
    let Device::Cuda(_) = grad.device() else { return Ok(None) };
    let (gpu, (tokens, n), (_, rank)) = (Gpu::of(grad.device())?, grad.dims2(op)?, b.dims2(op)?);
    let mut taken = grad.dtype() != DType::F32 && both_workspace(gpu.chip(), tokens, n, rank).is_some();
    for tensor in [grad, t, b] {
        taken = taken && tensor.dtype() == grad.dtype() && tensor.device_pointer()? % 16 == 0;
    }
    if !taken || gpu.shared_per_block() < BOTH_SHARED {
        return Ok(None);
    }
    let [blocks, slice, slices] = both_plan(gpu.chip(), tokens, n);
    let empty = |shape: &[usize], dtype, tag| Tensor::empty(shape, dtype, grad.device(), tag);
    let mut u = empty(&[tokens, rank], grad.dtype(), tag)?;
    let mut of_b = empty(&[n, rank], DType::F32, Tag::Gradients)?;
    let mut u_parts = empty(&[blocks, tokens, rank], DType::F32, Tag::Workspace)?;
    let mut b_parts = empty(&[slices, n, rank], DType::F32, Tag::Workspace)?;
    let side = BOX as u32;
    let args = Args::new().tensor_map(grad, side, side).tensor_map(b, side, side).tensor_map(t, side, side);
    let args = args.output(&mut u_parts).output(&mut b_parts).flops(4.0 * (tokens * n) as f64 * rank as f64);
    let args = args.u32(size(op, tokens)?).u32(size(op, n)?).u32(rank as u32).u32(slice as u32).early();
    let grid = [size(op, blocks)?, slices as u32, 1];
    let kernel = entry("narrow_both", grad.dtype())?;
    gpu.launch(&NARROW_HOPPER, &kernel, grid, [BOTH_THREADS, 1, 1], BOTH_SHARED, args)?;
    let (u_total, b_total) = (u.numel(), of_b.numel());
    let args = Args::new().input(&u_parts).output(&mut u).f32(scale).u32(size(op, u_total)?).u32(size(op, blocks)?);
    let args = args.input(&b_parts).output(&mut of_b).u32(size(op, b_total)?).u32(size(op, slices)?).early();
    let grid = [size(op, u_total.max(b_total).div_ceil(1024))?, 2, 1];
    gpu.launch(&NARROW_HOPPER, &entry("narrow_both_sum", grad.dtype())?, grid, [256, 1, 1], 0, args)?;
    Ok(Some((u, of_b)))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        /// This thread's products take this kernel, whatever the number of rows.
        pub(crate) static ALWAYS: Cell<bool> = const { Cell::new(false) };
    }

    const H100: Chip = Chip { capability: (9, 0), sms: 132 };

    #[test]
    fn launches_fill_the_gpu_and_fit_it() {
        for kind in [Kind::Rows, Kind::Columns, Kind::Grads { transposed: true }] {
            for (rows, inner) in [(8192, 4096), (8192, 14336), (2048, 4096), (4096, 8192), (14336, 8192), (1024, 8192)]
            {
                for ranks in [&[16][..], &[64], &[16, 16, 16], &[64, 64, 64], &[128]] {
                    let (count, sum) = (ranks.iter().map(|&rank| groups(rank)).sum(), ranks.iter().sum());
                    let plan = Plan::new(H100, kind, rows, inner, count, sum);
                    assert!(plan.shared <= WHOLE && plan.stages >= 4, "{kind:?} {rows} {inner} {ranks:?}: {plan:?}");
                    let blocks = plan.tiles * plan.slices;
                    assert!(blocks >= 96, "{kind:?} {rows} {inner} {ranks:?}: {blocks} blocks");
                }
            }
        }
        let plans = [14336, 4096, 1024].map(|n| both_plan(H100, 8192, n));
        assert!(plans.iter().all(|[blocks, _, slices]| blocks * slices >= 96), "{plans:?}");
        assert_eq!(BOTH_SHARED.min(WHOLE), BOTH_SHARED);
        assert_eq!(together(&[16, 16, 16, 16]), 3);
        assert_eq!((together(&[64, 128, 8]), together(&[128, 128])), (2, 1));
    }
}
