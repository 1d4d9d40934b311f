//! Large products on Hopper: which of them, and the launch of gemm_hopper_sm90a.cu.

use super::{InputGrad, Terms, Weight, codes::Codes};
use crate::{
    cuda::{entry, hopper, size},
    quantize::{QuantTensor, dequantize},
};
use nibble_runtime::{
    DType, Error, Result, Tag, Tensor,
    cuda::{Args, Chip, Entry, Gpu, Module},
};
use std::borrow::Cow;

/// Two pairs of maps, codes and how they are quantized, results, sizes.
const PARAMS: &[usize] = &[128, 128, 128, 128, 8, 8, 8, 8, 8, 8, 4, 4, 4, 8, 8, 4, 4, 4, 4, 4, 4, 4];
/// Six pairs, three times codes.
const JOINED: &[usize] = &[
    128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 8,
    4, 4, 4, 4, 4, 4, 4, 4, 4,
];

pub(crate) static GEMM_HOPPER: Module = Module {
    name: "gemm_hopper_sm90a",
    ptx: include_str!("../../ptx/gemm_hopper_sm90a.ptx"),
    entries: &[
        Entry { name: "gemm_hopper_forward_256_bf16", floats: false, params: PARAMS },
        Entry { name: "gemm_hopper_forward_128_bf16", floats: false, params: PARAMS },
        Entry { name: "gemm_hopper_input_grad_256_bf16", floats: false, params: PARAMS },
        Entry { name: "gemm_hopper_input_grad_128_bf16", floats: false, params: PARAMS },
        Entry { name: "gemm_hopper_input_grads_256_bf16", floats: false, params: JOINED },
        Entry { name: "gemm_hopper_input_grads_128_bf16", floats: false, params: JOINED },
        Entry { name: "gemm_hopper_forward_256_f16", floats: false, params: PARAMS },
        Entry { name: "gemm_hopper_forward_128_f16", floats: false, params: PARAMS },
        Entry { name: "gemm_hopper_input_grad_256_f16", floats: false, params: PARAMS },
        Entry { name: "gemm_hopper_input_grad_128_f16", floats: false, params: PARAMS },
        Entry { name: "gemm_hopper_input_grads_256_f16", floats: false, params: JOINED },
        Entry { name: "gemm_hopper_input_grads_128_f16", floats: false, params: JOINED },
    ],
};

/// Rows of a tile of the result.
const TILE_ROWS: u32 = 128;
/// Along the contraction, and columns of a box of the input gradient's weight.
const DEPTH: u32 = 64;
/// Ring, table of values, slabs of eight warps, barriers (two for each of at most six stages), and to start at a multiple of
/// 2048.
const SHARED: usize = (192 << 10) + 2048 + 8 * 16 * 40 * 4 + 2 * 6 * 8 + 2048;
/// One warpgroup that copies, two that multiply.
const THREADS: u32 = 3 * 128;

/// Rows from which on a weight is multiplied by this kernel: one that dequantizes it pays for writing it with that many.
const ROWS: u32 = 128;
/// Most 64 × 64 parts of matrices that are dequantized ahead.
const MOST_PARTS: u64 = 1 << 16;

/// What is multiplied; see [`super::cuda`]. Sizes are those of the product.
pub(super) struct Product<'a> {
    pub forward: bool,
    pub a: &'a Tensor,
    pub weight: &'a Weight,
    pub scale: f32,
    pub terms: Terms<'a>,
    pub m: u32,
    pub n: u32,
    pub k: u32,
}

/// How a product is shared out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Shares {
    /// Columns of the result in a tile: 256 or 128.
    columns: u32,
    /// Blocks of a cluster, which share the contraction of a tile: 1, 2, 4 or 8.
    blocks: u32,
}

impl Shares {
    /// Tiles of a result `[m, n]`.
    fn tiles(self, m: u32, n: u32) -> u64 {
        u64::from(m.div_ceil(TILE_ROWS)) * u64::from(n.div_ceil(self.columns))
    }

    /// What takes the least time, by the steps of the block that has the most. A step of the narrow tile takes some 0.6 of the
    /// time of one of the wide tile; to write a tile takes some four steps, to add up what a cluster has of it eight.
    fn choose(m: u32, n: u32, steps: u32, sms: u32) -> Shares {
        let all = [256, 128].into_iter().flat_map(|columns| [1, 2, 4, 8].map(|blocks| Shares { columns, blocks }));
        let cost = |shares: Shares| {
            let step = if shares.columns == 256 { 1.0 } else { 0.6 };
            let rounds = shares.tiles(m, n).div_ceil(sms.into()) as f64;
            let last = if shares.blocks == 1 { 4.0 } else { 8.0 };
            rounds * (f64::from(steps.div_ceil(shares.blocks)) + last) * step
        };
        // Blocks of a cluster have no second tile.
        let fits = |shares: &Shares| shares.blocks == 1 || shares.tiles(m, n) * u64::from(shares.blocks) <= sms.into();
        let best = all.filter(fits).min_by(|&a, &b| cost(a).total_cmp(&cost(b)));
        best.unwrap_or(Shares { columns: 256, blocks: 1 })
    }

    /// Parts of 64 × 64 of tiles of a weight for a result of `n` columns and `steps` along the contraction.
    fn parts(self, n: u32, steps: u64) -> u64 {
        u64::from(n.div_ceil(self.columns)) * u64::from(self.columns / 64) * steps
    }

    /// Blocks of a grid for a result `[m, n]`: with `all`, of all SMs.
    fn grid(self, m: u32, n: u32, sms: u32, all: bool) -> u32 {
        match self.blocks {
            1 if all => sms,
            1 => self.tiles(m, n).min(sms.into()) as u32,
            blocks => self.tiles(m, n) as u32 * blocks,
        }
    }
}

/// What a test wants, whatever the shape.
fn forced() -> Option<Shares> {
    #[cfg(test)]
    return tests::SHARES.get();
    #[cfg(not(test))]
    None
}

/// How this kind of GPU takes a product of 16-bit rows `[m, k]` with a weight into `[m, n]`; `None` where other kernels do.
/// `rank` is that of the low-rank branch, or 0.
pub(super) fn shares_on(chip: Chip, [m, n, k, rank]: [u32; 4]) -> Option<Shares> {
    let forced = forced();
    let sms = chip.sms.max(1);
    let steps = k.div_ceil(DEPTH) + rank.div_ceil(DEPTH);
    let shares = forced.unwrap_or_else(|| Shares::choose(m, n, steps, sms));
    let tiles = shares.tiles(m, n);
    // Where most SMs would have no tile, the smaller ones of gemm.cuh do better.
    let busy = 2 * tiles * u64::from(shares.blocks) > u64::from(sms);
    if !hopper(chip) {
        return None;
    }
    if forced.is_none() && (m < ROWS || !busy || super::cuda::forced().is_some()) {
        return None;
    }
    // The TMA wants rows of whole 16 bytes.
    let whole = [n, k, rank].iter().all(|size| size.is_multiple_of(8));
    (whole && m > 0 && n > 0 && k > 0 && tiles <= i32::MAX as u64).then_some(shares)
}

/// Whether the kernel takes the product, and how it is shared out.
fn plan(gpu: &Gpu, product: &Product) -> Result<Option<Shares>> {
    let &Product { a, weight, terms, m, n, k, .. } = product;
    let lora = terms.lora.map(|(left, right)| [left, right]);
    let rank = lora.map_or(0, |[left, _]| left.shape()[1] as u32);
    let Some(shares) = shares_on(gpu.chip(), [m, n, k, rank]) else { return Ok(None) };
    if gpu.shared_per_block() < SHARED {
        return Ok(None);
    }
    let dense = match weight {
        Weight::Dense(tensor) => Some(tensor),
        Weight::Quantized(_) => None,
    };
    for tensor in [a].into_iter().chain(dense).chain(lora.into_iter().flatten()).chain(terms.residual) {
        if tensor.device_pointer()? % 16 != 0 {
            return Ok(None);
        }
    }
    Ok(Some(shares))
}

/// A weight as the kernel takes it.
enum Matrix<'a> {
    /// It is there.
    Dense(Cow<'a, Tensor>),
    /// The kernel makes it of codes in a tensor that nothing is in yet.
    Ahead(&'a QuantTensor, Tensor),
}

impl<'a> Matrix<'a> {
    /// `None` where there is no memory for a quantized weight's. `ahead`: whether the kernel may make it.
    fn new(weight: &'a Weight, dtype: DType, ahead: bool) -> Result<Option<Self>> {
        let made = match weight {
            Weight::Dense(tensor) => return Ok(Some(Matrix::Dense(Cow::Borrowed(tensor)))),
            Weight::Quantized(quantized) if ahead => {
                let device = quantized.packed.device();
                let made = Tensor::empty(&quantized.shape, dtype, device, Tag::Workspace);
                made.map(|tensor| Matrix::Ahead(quantized, tensor))
            }
            Weight::Quantized(quantized) => {
                let made = dequantize(&QuantTensor { dtype, ..quantized.clone() }, Tag::Workspace);
                made.map(|tensor| Matrix::Dense(Cow::Owned(tensor)))
            }
        };
        match made {
            Ok(matrix) => Ok(Some(matrix)),
            Err(Error::OutOfMemory(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn tensor(&self) -> &Tensor {
        match self {
            Matrix::Dense(tensor) => tensor,
            Matrix::Ahead(_, tensor) => tensor,
        }
    }

    /// Appends codes, or none, and where the matrix is made of them.
    fn append(&mut self, args: Args) -> Result<Args> {
        Ok(match self {
            Matrix::Dense(_) => no_codes(args),
            Matrix::Ahead(quantized, tensor) => {
                let codes = Codes::of("linear", quantized)?;
                let args = args.input(&quantized.packed).input_opt(codes.absmax).input_opt(codes.nested);
                args.input_opt(codes.map).input_opt(codes.offset).output(tensor)
            }
        })
    }
}

/// In the place of codes of a weight and of what is made of them.
fn no_codes(args: Args) -> Args {
    (0..6).fold(args, |args, _| args.input_opt(None))
}

/// Appends how codes are quantized.
fn append_kind(args: Args, kind: Option<[u32; 3]>) -> Args {
    kind.unwrap_or_default().into_iter().fold(args, Args::u32)
}

/// How the codes of the weights are quantized: shift of a block, of a block of its scales, and type. `None` where the kernel
/// cannot make their matrices, which are `parts` of 64 × 64 in all.
fn kind(weights: &[&Weight], parts: u64) -> Result<Option<[u32; 3]>> {
    let mut kinds = Vec::new();
    for weight in weights {
        let Weight::Quantized(weight) = weight else { continue };
        let codes = Codes::of("linear", weight)?;
        let row = weight.shape.last().copied().unwrap_or(0);
        // A row of a part lies in one block. Elements are counted in 32 bits.
        let fits = row.is_multiple_of(64)
            && weight.block_size >= 64
            && u32::try_from(weight.numel()).is_ok()
            && weight.packed.device_pointer()? % 4 == 0;
        kinds.push(fits.then_some([codes.block_shift, codes.nested_shift, codes.quant_type]));
    }
    let first = kinds.first().copied().flatten();
    Ok(first.filter(|_| parts <= MOST_PARTS && kinds.iter().all(|kind| *kind == first)))
}

/// Most products that [`sum`] takes.
pub(super) const MOST_SUMMED: usize = 3;

/// How this kind of GPU makes the sum of input gradients `[m, n]` of 16-bit rows in one launch, of
/// linears with these outputs and ranks. All quantized weights are dequantized for that: what this takes beyond the largest is
/// at most what the result takes.
pub(super) fn sums_on(chip: Chip, quantized: bool, m: usize, n: usize, parts: &[[usize; 2]]) -> Option<Shares> {
    let number = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
    let one = |&[k, rank]: &[usize; 2]| shares_on(chip, [number(m), number(n), number(k), number(rank)]);
    let [k, rank] = parts.iter().fold([0, 0], |[k, rank], part| [k + part[0], rank + part[1]]);
    let shares = one(&[k, rank])?;
    let (all, largest) = parts.iter().fold((0, 0), |(all, largest), &[k, _]| (all + k, k.max(largest)));
    let small = !quantized || all - largest <= m;
    let count = (2..=MOST_SUMMED).contains(&parts.len());
    (count && small && parts.iter().all(|part| one(part).is_some())).then_some(shares)
}

/// Computes the sum of the products into `out` if this is a Hopper GPU and the kernel takes them; returns whether it did.
/// Shapes have been checked.
pub(super) fn sum(parts: &[InputGrad], out: &mut Tensor) -> Result<bool> {
    let op = "linear input gradient";
    let (gpu, (m, n)) = (Gpu::of(out.device())?, out.dims2(op)?);
    let Some(InputGrad { grad: first, .. }) = parts.first() else { return Ok(false) };
    let dtype = first.dtype();
    let mut depths = Vec::new();
    let mut fits = dtype != DType::F32 && (out.dtype() == dtype || out.dtype() == DType::F32);
    for InputGrad { grad, weight, lora } in parts {
        depths.push([grad.shape()[1], lora.map_or(0, |(u, _)| u.shape()[1])]);
        let weight = match weight {
            Weight::Dense(tensor) => Some(tensor),
            Weight::Quantized(_) => None,
        };
        for tensor in [*grad].into_iter().chain(weight).chain(lora.iter().flat_map(|&(u, a)| [u, a])) {
            fits = fits
                && tensor.dtype() == dtype
                && tensor.device() == out.device()
                && tensor.device_pointer()? % 16 == 0;
        }
    }
    let quantized = parts.iter().any(|part| matches!(part.weight, Weight::Quantized(_)));
    let shares = sums_on(gpu.chip(), quantized, m, n, &depths);
    let Some(shares) = shares.filter(|_| fits && gpu.shared_per_block() >= SHARED) else { return Ok(false) };
    let (m, n) = (size(op, m)?, size(op, n)?);
    let steps: usize = depths.iter().flatten().map(|depth| depth.div_ceil(DEPTH as usize)).sum();
    let kind = kind(&parts.iter().map(|part| part.weight).collect::<Vec<_>>(), shares.parts(n, steps as u64))?;
    let mut weights = Vec::new();
    for part in parts {
        let Some(weight) = Matrix::new(part.weight, dtype, kind.is_some())? else { return Ok(false) };
        weights.push(weight);
    }
    // A pair of each weight and of its adapter. Those that there are not have no depth, and their maps are not looked at.
    let mut pairs: Vec<(&Tensor, &Tensor, usize)> = Vec::new();
    for (InputGrad { grad, lora, .. }, weight) in parts.iter().zip(&weights) {
        let (u, a) = lora.unwrap_or((grad, weight.tensor()));
        pairs.push((grad, weight.tensor(), grad.shape()[1]));
        pairs.push((u, a, lora.map_or(0, |(u, _)| u.shape()[1])));
    }
    let flops = pairs.iter().map(|(.., depth)| *depth as f64).sum::<f64>() * 2.0 * f64::from(m) * f64::from(n);
    pairs.resize(2 * MOST_SUMMED, (pairs[0].0, pairs[0].1, 0));
    let moved: usize = parts.iter().map(|part| part.grad.size_bytes() + part.weight.size_bytes()).sum();
    let mut args = Args::new().flops(flops).moves(moved).cluster(shares.blocks);
    for &(a, b, depth) in &pairs {
        let (a, b) = if depth > 0 { (a, b) } else { (pairs[0].0, pairs[0].1) };
        args = args.tensor_map(a, TILE_ROWS, DEPTH).tensor_map(b, DEPTH, DEPTH);
    }
    let depths: Vec<u32> = pairs.iter().map(|(.., depth)| size(op, *depth)).collect::<Result<_>>()?;
    for weight in &mut weights {
        args = weight.append(args)?;
    }
    for _ in weights.len()..MOST_SUMMED {
        args = no_codes(args);
    }
    let mut args = append_kind(args, kind).output(out).u32(m).u32(n);
    for depth in depths {
        args = args.u32(depth);
    }
    let args = args.u32((out.dtype() == DType::F32).into());
    let entry = entry(&format!("gemm_hopper_input_grads_{}", shares.columns), dtype)?;
    let blocks = shares.grid(m, n, gpu.sm_count(), kind.is_some());
    gpu.launch(&GEMM_HOPPER, &entry, [blocks, 1, 1], [THREADS, 1, 1], SHARED, args)?;
    Ok(true)
}

/// Computes the product into `out` if this is a Hopper GPU and the kernel takes it; returns whether it did. Types and
/// devices have been checked. A quantized weight is dequantized as a whole, by the kernel itself while it multiplies; where
/// there is no memory for that, the product is left to the kernels that decode as they go.
pub(super) fn product(gpu: &Gpu, product: &Product, out: &mut Tensor) -> Result<bool> {
    let Some(shares) = plan(gpu, product)? else { return Ok(false) };
    if out.device_pointer()? % 16 != 0 {
        return Ok(false);
    }
    let &Product { forward, a, weight, scale, terms, m, n, k } = product;
    let dtype = a.dtype();
    let lora = terms.lora.filter(|(left, _)| left.shape()[1] > 0);
    let rank = lora.map_or(0, |(left, _)| left.shape()[1] as u32);
    let steps = k.div_ceil(DEPTH) + rank.div_ceil(DEPTH);
    let kind = kind(&[weight], shares.parts(n, steps.into()))?;
    let Some(mut b) = Matrix::new(weight, dtype, kind.is_some())? else { return Ok(false) };
    // Without a second pair its maps are not looked at.
    let (left, right) = lora.unwrap_or((a, b.tensor()));
    // Forward a tile of b is rows of the weight; backward it is boxes of its columns.
    let (box_rows, box_columns) = if forward { (shares.columns, DEPTH) } else { (DEPTH, DEPTH) };
    let (wide, add) = (out.dtype() == DType::F32, terms.add);
    let args = Args::new()
        .cluster(shares.blocks)
        .flops(2.0 * f64::from(m) * f64::from(n) * (f64::from(k) + f64::from(rank)))
        .tensor_map(a, TILE_ROWS, DEPTH)
        .tensor_map(b.tensor(), box_rows, box_columns)
        .tensor_map(left, TILE_ROWS, DEPTH)
        .tensor_map(right, box_rows, box_columns);
    let args = append_kind(b.append(args)?, kind)
        .output(out)
        .input_opt(terms.residual)
        .u32(m)
        .u32(n)
        .u32(k)
        .u32(rank)
        .f32(scale)
        .u32(add.into())
        .u32(wide.into());
    let direction = if forward { "forward" } else { "input_grad" };
    let entry = entry(&format!("gemm_hopper_{direction}_{}", shares.columns), dtype)?;
    let blocks = shares.grid(m, n, gpu.sm_count(), kind.is_some());
    gpu.launch(&GEMM_HOPPER, &entry, [blocks, 1, 1], [THREADS, 1, 1], SHARED, args)?;
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

    /// Products of tiles of so many columns, by clusters of so many blocks.
    pub(crate) fn shares(columns: u32, blocks: u32) -> Shares {
        Shares { columns, blocks }
    }

    #[test]
    fn tiles_suit_the_shape() {
        let shares = |m, n, k: u32| {
            let Shares { columns, blocks } = Shares::choose(m, n, k / DEPTH, 132);
            (columns, blocks)
        };
        assert_eq!((shares(8192, 4096, 4096), shares(8192, 14336, 4096)), ((256, 1), (256, 1)));
        assert_eq!((shares(2048, 14336, 4096), shares(256, 14336, 4096)), ((256, 1), (256, 1)));
        // 64 wide tiles would leave half of the SMs without one.
        assert_eq!(shares(2048, 1024, 4096), (128, 1));
        assert_eq!((shares(256, 4096, 14336), shares(256, 1024, 4096)), ((256, 4), (128, 8)));
        assert_eq!(SHARED.min(227 << 10), SHARED);
    }
}
