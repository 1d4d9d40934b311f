//! Products over 4-bit weights on Hopper that are decoded on their way: which of them, and the launches of codes_entries.cuh.

use super::{InputGrad, Weight, codes::Codes, hopper::Product};
use crate::{
    cuda::{entry, hopper, one},
    quantize::QuantTensor,
};
use nibble_runtime::{
    DType, Result, Tensor,
    cuda::{Args, Chip, Gpu, Module},
};
use std::sync::LazyLock;

/// What all begin with: x, a weight and the second pair, how they are quantized, sizes. Then their results.
const PRODUCT: &[usize] = &[128, 128, 128, 128, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4, 8, 8, 4, 4, 4];
/// The other weight and its pair, gate, up and SwiGLU.
const GATED: &[usize] = &[128, 128, 128, 128, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4, 128, 128, 128, 8, 8, 8, 8, 4, 8, 8, 8];
/// Gate, up, their gradients and SwiGLU.
const SWIGLU_GRAD: &[usize] = &[128, 128, 128, 128, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4, 8, 8, 8, 8, 8];

macro_rules! module {
    ($dtype:literal) => {
        Module {
            name: concat!("codes_", $dtype, "_sm90a"),
            ptx: include_str!(concat!("../../ptx/codes_", $dtype, "_sm90a.ptx")),
            entries: &[
                one(concat!("codes_hopper_forward_256_", $dtype), PRODUCT),
                one(concat!("codes_hopper_forward_128_", $dtype), PRODUCT),
                one(concat!("codes_hopper_input_grad_256_", $dtype), PRODUCT),
                one(concat!("codes_hopper_input_grad_128_", $dtype), PRODUCT),
                one(concat!("codes_hopper_gated_", $dtype), GATED),
                one(concat!("codes_hopper_swiglu_grad_", $dtype), SWIGLU_GRAD),
            ],
        }
    };
}
pub(crate) static CODES_BF16: Module = module!("bf16");
pub(crate) static CODES_F16: Module = module!("f16");

/// Columns of the result in a tile.
const COLUMNS: u32 = 128;
/// Along the contraction, and codes of a box.
const DEPTH: u32 = 64;
/// One warpgroup that brings, two that multiply.
const THREADS: u32 = 3 * 128;
/// Fewer rows are for the kernels that read a weight once for all of them.
const ROWS: u32 = 17;

/// How a product is shared out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Shares {
    /// Rows of the result in a tile: 256 or 128.
    pub rows: u32,
    /// Blocks of a cluster, which share the contraction of a tile: 1, 2, 4 or 8.
    pub blocks: u32,
}

impl Shares {
    /// Tiles of a result `[m, n]`.
    fn tiles(self, m: u32, n: u32) -> u64 {
        u64::from(m.div_ceil(self.rows)) * u64::from(n.div_ceil(COLUMNS))
    }

    /// What takes the least time, by the steps of the block that has the most. A step of a small tile takes 0.6 of one of a
    /// large tile; to write a tile takes some six steps, to add up what a cluster has of it ten.
    fn choose(m: u32, n: u32, steps: u32, sms: u32) -> Shares {
        let all = [256, 128].into_iter().flat_map(|rows| [1, 2, 4, 8].map(|blocks| Shares { rows, blocks }));
        let cost = |shares: Shares| {
            let step = if shares.rows == 256 { 1.0 } else { 0.6 };
            let rounds = shares.tiles(m, n).div_ceil(sms.into()) as f64;
            let last = if shares.blocks == 1 { 6.0 } else { 10.0 };
            rounds * (f64::from(steps.div_ceil(shares.blocks)) * step + last)
        };
        // Blocks of a cluster have no second tile.
        let fits = |shares: &Shares| shares.blocks == 1 || shares.tiles(m, n) * u64::from(shares.blocks) <= sms.into();
        let best = all.filter(fits).min_by(|&a, &b| cost(a).total_cmp(&cost(b)));
        best.unwrap_or(Shares { rows: 256, blocks: 1 })
    }

    /// Bytes of shared memory of a block: ring, tables and barriers of its stages, slabs of two warpgroups, and what it takes
    /// to start at a multiple of 1024.
    fn shared(self) -> usize {
        let stages = if self.rows == 256 { 4 } else { 5 };
        let stage = (self.rows as usize + 128) * 128 + 128 * 32;
        stages * stage + 2 * 32 * 68 * 4 + 2 * 5 * 8 + 1024
    }
}

/// `NIBBLE_DEQUANTIZE` is set: large products dequantize 4-bit weights as a whole. For benchmarks.
static DEQUANTIZE: LazyLock<bool> = LazyLock::new(|| std::env::var_os("NIBBLE_DEQUANTIZE").is_some());

/// What a test wants, whatever the shape: `Some(None)` wants other kernels.
fn forced() -> Option<Option<Shares>> {
    #[cfg(test)]
    if let Some(shares) = tests::SHARES.get() {
        return Some(Some(shares));
    }
    #[cfg(test)]
    if super::hopper::tests::COLUMNS.get().is_some() {
        return Some(None);
    }
    (*DEQUANTIZE || super::cuda::forced().is_some()).then_some(None)
}

/// How this kind of GPU takes a product of 16-bit rows `[m, k]` with a 4-bit weight into `[m, n]`; `None` where other kernels
/// do. `rank` is that of the low-rank branch, or 0.
pub(super) fn shares_on(chip: Chip, [m, n, k, rank]: [u32; 4]) -> Option<Shares> {
    // A block of 64 codes lies in one row, whichever of the sizes is that of a row.
    let whole = m > 0 && n > 0 && k > 0 && n.is_multiple_of(64) && k.is_multiple_of(64) && rank.is_multiple_of(8);
    if !hopper(chip) || !whole {
        return None;
    }
    let steps = k.div_ceil(DEPTH) + rank.div_ceil(DEPTH);
    let shares = match forced() {
        Some(shares) => shares?,
        None if m < ROWS => return None,
        None => Shares::choose(m, n, steps, chip.sms.max(1)),
    };
    (shares.tiles(m, n) * u64::from(shares.blocks) <= i32::MAX as u64).then_some(shares)
}

/// Rows `a` `[m, depth]` and a weight of codes, `[n, depth]` forward and `[depth, n]` otherwise, with its second pair.
struct Operand<'a> {
    a: &'a Tensor,
    weight: &'a QuantTensor,
    lora: Option<(&'a Tensor, &'a Tensor)>,
}

impl<'a> Operand<'a> {
    /// `None` where the weight is dense.
    fn new(a: &'a Tensor, weight: &'a Weight, lora: Option<(&'a Tensor, &'a Tensor)>) -> Option<Self> {
        let Weight::Quantized(weight) = weight else { return None };
        Some(Operand { a, weight, lora: lora.filter(|(left, _)| left.shape()[1] > 0) })
    }

    fn rank(&self) -> u32 {
        self.lora.map_or(0, |(left, _)| left.shape()[1] as u32)
    }

    /// Whether a kernel may read it, and `others` beside it.
    fn fits(&self, others: &[&Tensor]) -> Result<bool> {
        let pair = self.lora.into_iter().flat_map(|(left, right)| [left, right]);
        let mut fits = self.weight.block_size >= DEPTH as usize;
        for tensor in [self.a, &self.weight.packed].into_iter().chain(pair).chain(others.iter().copied()) {
            fits = fits && tensor.device_pointer()? % 16 == 0;
        }
        Ok(fits)
    }

    /// Appends codes and pair, in boxes of `box_rows`, and what the codes stand for.
    fn append(&self, args: Args, [row, box_rows]: [u32; 2], rows: u32) -> Result<Args> {
        let codes = Codes::of("linear", self.weight)?;
        let packed = self.weight.packed.reshape(&[self.weight.numel() / row as usize, row as usize / 2])?;
        // Without a second pair its maps are not looked at.
        let (left, right) = self.lora.unwrap_or((self.a, self.a));
        let args = args
            .tensor_map(&packed, box_rows, DEPTH / 2)
            .tensor_map(left, rows, DEPTH)
            .tensor_map(right, box_rows, DEPTH);
        Ok(args.input_opt(codes.absmax).input_opt(codes.nested).input_opt(codes.map).input_opt(codes.offset))
    }

    /// The arguments that all kernels begin with.
    fn head(&self, forward: bool, shares: Shares, box_rows: u32, [m, n, depth]: [u32; 3]) -> Result<Args> {
        let codes = Codes::of("linear", self.weight)?;
        let args = Args::new().tensor_map(self.a, shares.rows, DEPTH).cluster(shares.blocks);
        let row = if forward { depth } else { n };
        let args = self.append(args, [row, box_rows], shares.rows)?;
        let args = args.u32(codes.block_shift).u32(codes.nested_shift).u32(codes.quant_type);
        Ok(args.u32(m).u32(n).u32(depth).u32(self.rank()))
    }
}

fn launch(gpu: &Gpu, kernel: &str, dtype: DType, shares: Shares, tiles: u64, args: Args) -> Result<()> {
    let module = if dtype == DType::BF16 { &CODES_BF16 } else { &CODES_F16 };
    let blocks = match shares.blocks {
        1 => tiles.min(gpu.sm_count().into()) as u32,
        blocks => tiles as u32 * blocks,
    };
    let name = entry(&format!("codes_hopper_{kernel}"), dtype)?;
    gpu.launch(module, &name, [blocks, 1, 1], [THREADS, 1, 1], shares.shared(), args)
}

/// Computes the product into `out` if this is a Hopper GPU and the kernel takes it; returns whether it did. Types, devices
/// and the parts of the weight have been checked.
pub(super) fn product(gpu: &Gpu, product: &Product, out: &mut Tensor) -> Result<bool> {
    let &Product { forward, a, weight, scale, terms, m, n, k } = product;
    let Some(operand) = Operand::new(a, weight, terms.lora) else { return Ok(false) };
    let Some(shares) = shares_on(gpu.chip(), [m, n, k, operand.rank()]) else { return Ok(false) };
    let others: Vec<&Tensor> = terms.residual.into_iter().chain([&*out]).collect();
    if gpu.shared_per_block() < shares.shared() || !operand.fits(&others)? {
        return Ok(false);
    }
    let box_rows = if forward { COLUMNS } else { DEPTH };
    let args = operand
        .head(forward, shares, box_rows, [m, n, k])?
        .flops(2.0 * f64::from(m) * f64::from(n) * (f64::from(k) + f64::from(operand.rank())))
        .output(out)
        .input_opt(terms.residual)
        .f32(scale)
        .u32(terms.add.into())
        .u32((out.dtype() == DType::F32).into());
    let kernel = format!("{}_{}", if forward { "forward" } else { "input_grad" }, shares.rows);
    launch(gpu, &kernel, a.dtype(), shares, shares.tiles(m, n), args)?;
    Ok(true)
}

/// Sizes of a product of `a` with a weight into `n` columns: `[m, n, depth]`; `None` where they are too large, or types differ.
fn sizes(operand: &Operand, n: usize) -> Result<Option<[u32; 3]>> {
    let (m, depth) = operand.a.dims2("linear")?;
    let same = operand.lora.is_none_or(|(left, right)| [left, right].iter().all(|x| x.dtype() == operand.a.dtype()));
    let sizes = [m, n, depth].map(|size| i32::try_from(size).ok().map(i32::unsigned_abs));
    let [Some(m), Some(n), Some(depth)] = sizes else { return Ok(None) };
    Ok((same && operand.a.dtype() != DType::F32).then_some([m, n, depth]))
}

/// Gate and up `[m, n]` of `x`, and SwiGLU of them, in one launch, if this is a Hopper GPU and the kernel takes them; returns
/// whether it did. Shapes have been checked.
pub(super) fn gated(
    x: &Tensor,
    weights: [&Weight; 2],
    lora: [Option<(&Tensor, &Tensor)>; 2],
    [gate, up, output]: [&mut Tensor; 3],
) -> Result<bool> {
    let gpu = Gpu::of(x.device())?;
    let (first, second) = (Operand::new(x, weights[0], lora[0]), Operand::new(x, weights[1], lora[1]));
    let (Some(first), Some(second)) = (first, second) else { return Ok(false) };
    let Some([m, n, depth]) = sizes(&first, output.shape()[1])? else { return Ok(false) };
    let alike = |x: &QuantTensor| {
        let Codes { block_shift, nested_shift, quant_type, nested, .. } = Codes::of("linear", x)?;
        nibble_runtime::Result::Ok((block_shift, nested_shift, quant_type, nested.is_some()))
    };
    if sizes(&second, n as usize)?.is_none() || alike(first.weight)? != alike(second.weight)? {
        return Ok(false);
    }
    // A tile has half as many columns of each.
    let shares =
        shares_on(gpu.chip(), [m, n, depth, first.rank()]).filter(|shares| shares.rows == 256 && shares.blocks == 1);
    let Some(shares) = shares.filter(|_| second.rank() % 8 == 0) else { return Ok(false) };
    let outs = [&*gate, &*up, &*output];
    if gpu.shared_per_block() < shares.shared() || !first.fits(&outs)? || !second.fits(&[])? {
        return Ok(false);
    }
    let args = first.head(true, shares, COLUMNS / 2, [m, n, depth])?;
    let args = second.append(args, [depth, COLUMNS / 2], shares.rows)?.u32(second.rank());
    let inner = 2.0 * f64::from(depth) + f64::from(first.rank()) + f64::from(second.rank());
    let args = args.flops(2.0 * f64::from(m) * f64::from(n) * inner).output(gate).output(up).output(output);
    let tiles = u64::from(m.div_ceil(shares.rows)) * u64::from(n.div_ceil(COLUMNS / 2));
    launch(gpu, "gated", x.dtype(), shares, tiles, args)?;
    Ok(true)
}

/// Turns gate and up `[m, n]` into their gradients from that of SwiGLU's output, which `part` makes, and makes the output again,
/// in one launch, if this is a Hopper GPU and the kernel takes them; returns whether it did. Shapes have been checked.
pub(super) fn swiglu_grads(part: &InputGrad, [gate, up, output]: [&mut Tensor; 3]) -> Result<bool> {
    let gpu = Gpu::of(part.grad.device())?;
    let Some(operand) = Operand::new(part.grad, part.weight, part.lora) else { return Ok(false) };
    let Some([m, n, depth]) = sizes(&operand, output.shape()[1])? else { return Ok(false) };
    let shares = shares_on(gpu.chip(), [m, n, depth, operand.rank()]).filter(|shares| shares.rows == 256);
    let Some(shares) = shares else { return Ok(false) };
    if gpu.shared_per_block() < shares.shared() || !operand.fits(&[gate, up, output])? {
        return Ok(false);
    }
    let args = operand.head(false, shares, DEPTH, [m, n, depth])?;
    let args = args.flops(2.0 * f64::from(m) * f64::from(n) * (f64::from(depth) + f64::from(operand.rank())));
    let args = args.input(gate).input(up).output(gate).output(up).output(output);
    launch(gpu, "swiglu_grad", part.grad.dtype(), shares, shares.tiles(m, n), args)?;
    Ok(true)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        /// How this thread's products are shared out, whatever the shape.
        pub(crate) static SHARES: Cell<Option<Shares>> = const { Cell::new(None) };
    }

    #[test]
    fn shares_suit_the_shape() {
        let shares = |m, n, k: u32| {
            let Shares { rows, blocks } = Shares::choose(m, n, k / 64, 132);
            (rows, blocks)
        };
        assert_eq!((shares(8192, 4096, 4096), shares(2048, 14336, 4096)), ((256, 1), (256, 1)));
        assert_eq!((shares(256, 14336, 4096), shares(256, 4096, 14336)), ((256, 1), (256, 4)));
        assert_eq!((shares(64, 4096, 4096), shares(64, 1024, 4096)), ((128, 4), (128, 8)));
        for rows in [256, 128] {
            assert!(Shares { rows, blocks: 1 }.shared() <= 227 << 10);
        }
    }
}
