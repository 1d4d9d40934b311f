//! Large products on Hopper: which of them, and the launch of gemm_hopper_sm90a.cu.

use super::{InputGrad, Terms, Weight};
use crate::{
    cuda::{entry, hopper, one, size},
    quantize::{QuantTensor, dequantize},
};
use nibble_runtime::{
    DType, Error, Result, Tag, Tensor,
    cuda::{Args, Chip, Gpu, Module},
};
use std::borrow::Cow;

const PARAMS: &[usize] = &[128, 128, 128, 128, 8, 8, 128, 128, 4, 4, 4, 4, 4, 4];
const GATED: &[usize] = &[128, 128, 128, 128, 128, 8, 128, 128, 4, 4, 4, 4];
const DIFFERENTIATED: &[usize] = &[128, 128, 128, 128, 128, 128, 8, 8, 128, 128, 128, 4, 4, 4, 4];
const JOINED: &[usize] = &[128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 8, 128, 4, 4, 4, 4, 4, 4, 4, 4];

pub(crate) static GEMM_HOPPER: Module = Module {
    name: "gemm_hopper_sm90a",
    ptx: include_str!("../../ptx/gemm_hopper_sm90a.ptx"),
    entries: &[
        one("gemm_hopper_forward_256_bf16", PARAMS),
        one("gemm_hopper_forward_128_bf16", PARAMS),
        one("gemm_hopper_input_grad_256_bf16", PARAMS),
        one("gemm_hopper_input_grad_128_bf16", PARAMS),
        one("gemm_hopper_input_grads_256_bf16", JOINED),
        one("gemm_hopper_input_grads_128_bf16", JOINED),
        one("gemm_hopper_gated_bf16", GATED),
        one("gemm_hopper_differentiated_bf16", DIFFERENTIATED),
        one("gemm_hopper_forward_256_f16", PARAMS),
        one("gemm_hopper_forward_128_f16", PARAMS),
        one("gemm_hopper_input_grad_256_f16", PARAMS),
        one("gemm_hopper_input_grad_128_f16", PARAMS),
        one("gemm_hopper_input_grads_256_f16", JOINED),
        one("gemm_hopper_input_grads_128_f16", JOINED),
        one("gemm_hopper_gated_f16", GATED),
        one("gemm_hopper_differentiated_f16", DIFFERENTIATED),
    ],
};

/// Rows of a tile of the result.
const TILE_ROWS: u32 = 128;
/// Along the contraction, and columns of a box of the input gradient's weight.
const DEPTH: u32 = 64;
/// Rows and columns of a box of a product, and of what is added to it.
const SLAB: u32 = 64;
/// Rows of a box of what SwiGLU makes of a product.
const MADE_ROWS: u32 = 8;
/// Words of 64 bits of a tensor map, where none is looked at.
const MAP_WORDS: usize = 16;
/// Ring, sums and what is made of them, barriers (two for each of at most five stages, three for each of two warpgroups), and to start at a multiple of 1024.
const SHARED: usize = (220 << 10) + (2 * 5 + 3 * 2) * 8 + 1024;
/// One warpgroup that copies and writes, two that multiply.
const THREADS: u32 = 3 * 128;

/// Rows from which on a dense weight is multiplied by this kernel, and a quantized one dequantized for it: one pass over
/// the weight more, which that many rows pay for.
const DENSE_ROWS: u32 = 128;
const QUANTIZED_ROWS: u32 = 512;

/// Whether products of so many 16-bit rows with 4-bit weights dequantize these as a whole on this kind of GPU, where their results
/// have tiles for most multiprocessors; these have use for [`QuantTensor::hold_dense`].
pub fn dequantizes(chip: Chip, rows: usize) -> bool {
    hopper(chip) && rows >= QUANTIZED_ROWS as usize
}

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

impl<'a> Product<'a> {
    /// Of rows `a` and a weight, into `out`; their shapes have been checked.
    pub fn new(forward: bool, a: &'a Tensor, weight: &'a Weight, terms: Terms<'a>, out: &Tensor) -> Result<Self> {
        let ((m, k), n) = (a.dims2("linear")?, out.shape()[1]);
        let [m, n, k] = [size("linear", m)?, size("linear", n)?, size("linear", k)?];
        Ok(Product { forward, a, weight, scale: 1.0, terms, m, n, k })
    }

    /// The second pair, if it has a rank.
    fn pair(&self) -> Option<(&'a Tensor, &'a Tensor)> {
        self.terms.lora.filter(|(left, _)| left.shape()[1] > 0)
    }

    fn rank(&self) -> u32 {
        self.pair().map_or(0, |(left, _)| left.shape()[1] as u32)
    }

    /// The arguments that kernels begin with: the operands, of which `b` is the weight, for tiles of so many columns.
    fn operands(&self, b: &Tensor, columns: u32) -> Args {
        // Forward a tile of b is rows of the weight; backward it is boxes of its columns.
        let rows = if self.forward { columns } else { DEPTH };
        let flops = 2.0 * f64::from(self.m) * f64::from(self.n) * (f64::from(self.k) + f64::from(self.rank()));
        let args = Args::new().flops(flops).tensor_map(self.a, TILE_ROWS, DEPTH).tensor_map(b, rows, DEPTH);
        match self.pair() {
            Some((left, right)) => args.tensor_map(left, TILE_ROWS, DEPTH).tensor_map(right, rows, DEPTH),
            None => args.words(&[], MAP_WORDS).words(&[], MAP_WORDS),
        }
    }
}

/// Launches the kernel of this name, whose arguments end with the product's sizes.
fn launch(gpu: &Gpu, name: &str, columns: u32, product: &Product, args: Args) -> Result<()> {
    let &Product { a, m, n, k, .. } = product;
    let entry = entry(&format!("gemm_hopper_{name}"), a.dtype())?;
    let blocks = tiles(m, n, columns).min(gpu.sm_count().into()) as u32;
    let args = args.u32(m).u32(n).u32(k).u32(product.rank());
    gpu.launch(&GEMM_HOPPER, &entry, [blocks, 1, 1], [THREADS, 1, 1], SHARED, args.early())
}

/// Tiles of so many columns in a result `[m, n]`.
fn tiles(m: u32, n: u32, columns: u32) -> u64 {
    u64::from(m.div_ceil(TILE_ROWS)) * u64::from(n.div_ceil(columns))
}

/// Columns of the tiles, by the work of the SM that has the most. The narrow tile takes some 0.6 of the time of the wide
/// one.
fn tile_columns(m: u32, n: u32, sms: u32) -> u32 {
    let rounds = |columns: u32| tiles(m, n, columns).div_ceil(sms.into());
    if 6 * rounds(128) < 10 * rounds(256) { 128 } else { 256 }
}

/// Columns of the tiles that a test wants, whatever the shape.
fn forced() -> Option<u32> {
    #[cfg(test)]
    return tests::COLUMNS.get();
    #[cfg(not(test))]
    None
}

/// Columns of the tiles with which this kind of GPU takes a product of 16-bit rows `[m, k]` with a weight, 4-bit or not, into
/// `[m, n]`; `None` where other kernels do. `rank` is that of the low-rank branch, or 0.
pub(super) fn columns_on(chip: Chip, quantized: bool, [m, n, k, rank]: [u32; 4]) -> Option<u32> {
    let forced = forced();
    let sms = chip.sms.max(1);
    let columns = forced.unwrap_or(tile_columns(m, n, sms));
    let tiles = tiles(m, n, columns);
    // Where most SMs would have no tile, the smaller ones of gemm.cuh do better.
    let busy = 2 * tiles > u64::from(sms);
    let rows = if quantized { QUANTIZED_ROWS } else { DENSE_ROWS };
    if !hopper(chip) {
        return None;
    }
    if forced.is_none() && (m < rows || !busy || super::cuda::forced().is_some()) {
        return None;
    }
    // The TMA wants rows of whole 16 bytes.
    let whole = [n, k, rank].iter().all(|size| size.is_multiple_of(8));
    (whole && m > 0 && n > 0 && k > 0 && tiles <= i32::MAX as u64).then_some(columns)
}

/// Whether the kernel takes the product, and with tiles of how many columns.
fn plan(gpu: &Gpu, product: &Product) -> Result<Option<u32>> {
    let &Product { a, weight, terms, m, n, k, .. } = product;
    let lora = terms.lora.map(|(left, right)| [left, right]);
    let quantized = matches!(weight, Weight::Quantized(_));
    let Some(columns) = columns_on(gpu.chip(), quantized, [m, n, k, product.rank()]) else { return Ok(None) };
    if gpu.shared_per_block() < SHARED {
        return Ok(None);
    }
    for tensor in [a].into_iter().chain(weight.unquantized()).chain(lora.into_iter().flatten()).chain(terms.residual) {
        if tensor.device_pointer()? % 16 != 0 {
            return Ok(None);
        }
    }
    Ok(Some(columns))
}

/// The weight as the kernel takes it; `None` where there is no memory for that.
fn dense(weight: &Weight, dtype: DType) -> Result<Option<Cow<'_, Tensor>>> {
    match weight {
        Weight::Dense(tensor) => Ok(Some(Cow::Borrowed(tensor))),
        Weight::Quantized(quantized) => {
            if let Some(held) = quantized.dense.as_ref().filter(|held| held.dtype() == dtype) {
                return Ok(Some(Cow::Borrowed(held)));
            }
            match dequantize(&QuantTensor { dtype, ..quantized.clone() }, Tag::Workspace) {
                Ok(tensor) => Ok(Some(Cow::Owned(tensor))),
                Err(Error::OutOfMemory(_)) => Ok(None),
                Err(error) => Err(error),
            }
        }
    }
}

/// Most products that [`sum`] takes.
pub(super) const MOST_SUMMED: usize = 3;

/// Columns of the tiles with which this kind of GPU makes the sum of input gradients `[m, n]` of 16-bit rows in one launch, of
/// linears with these outputs and ranks. All quantized weights are dequantized for that: what this takes beyond the largest is
/// at most what the result takes.
pub(super) fn sums_on(chip: Chip, quantized: bool, m: usize, n: usize, parts: &[[usize; 2]]) -> Option<u32> {
    let number = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
    let columns =
        |&[k, rank]: &[usize; 2]| columns_on(chip, quantized, [number(m), number(n), number(k), number(rank)]);
    let first = columns(parts.first()?)?;
    let (all, largest) = parts.iter().fold((0, 0), |(all, largest), &[k, _]| (all + k, k.max(largest)));
    let small = !quantized || all - largest <= m;
    let count = (2..=MOST_SUMMED).contains(&parts.len());
    (count && small && parts.iter().all(|part| columns(part).is_some())).then_some(first)
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
        for tensor in [*grad].into_iter().chain(weight.unquantized()).chain(lora.iter().flat_map(|&(u, a)| [u, a])) {
            fits = fits
                && tensor.dtype() == dtype
                && tensor.device() == out.device()
                && tensor.device_pointer()? % 16 == 0;
        }
    }
    let quantized = parts.iter().any(|part| matches!(part.weight, Weight::Quantized(_)));
    let columns = sums_on(gpu.chip(), quantized, m, n, &depths);
    let Some(columns) = columns.filter(|_| fits && gpu.shared_per_block() >= SHARED) else { return Ok(false) };
    let mut weights = Vec::new();
    for part in parts {
        let Some(weight) = dense(part.weight, dtype)? else { return Ok(false) };
        weights.push(weight);
    }
    // Pairs that there are not have no depth, and their maps are not looked at.
    let mut pairs: Vec<(&Tensor, &Tensor, usize)> = Vec::new();
    for (InputGrad { grad, lora, .. }, weight) in parts.iter().zip(&weights) {
        pairs.push((grad, weight, grad.shape()[1]));
        pairs.extend(lora.map(|(u, a)| (u, a, u.shape()[1])).filter(|(.., rank)| *rank > 0));
    }
    let flops = pairs.iter().map(|(.., depth)| *depth as f64).sum::<f64>() * 2.0 * m as f64 * n as f64;
    pairs.resize(2 * MOST_SUMMED, (pairs[0].0, pairs[0].1, 0));
    let moved: usize = parts.iter().zip(&weights).map(|(part, w)| part.grad.size_bytes() + w.size_bytes()).sum();
    let mut args = Args::new().flops(flops);
    for (a, b, _) in &pairs {
        args = args.tensor_map(a, TILE_ROWS, DEPTH).tensor_map(b, DEPTH, DEPTH);
    }
    let (m, n) = (size(op, m)?, size(op, n)?);
    let args = args.moves(moved);
    let args = match out.dtype() {
        DType::F32 => args.output(out).words(&[], MAP_WORDS),
        _ => args.output_opt(None).output_map(out, SLAB, SLAB),
    };
    let mut args = args.u32(m).u32(n);
    for (.., depth) in &pairs {
        args = args.u32(size(op, *depth)?);
    }
    let entry = entry(&format!("gemm_hopper_input_grads_{columns}"), dtype)?;
    let blocks = tiles(m, n, columns).min(gpu.sm_count().into()) as u32;
    gpu.launch(&GEMM_HOPPER, &entry, [blocks, 1, 1], [THREADS, 1, 1], SHARED, args.early())?;
    Ok(true)
}

/// Computes the product into `out` if this is a Hopper GPU and the kernel takes it; returns whether it did. Types and
/// devices have been checked. A quantized weight is dequantized as a whole first; where there is no memory for that, the
/// product is left to the kernels that decode as they go.
pub(super) fn product(gpu: &Gpu, product: &Product, out: &mut Tensor) -> Result<bool> {
    let Some(columns) = plan(gpu, product)? else { return Ok(false) };
    if out.device_pointer()? % 16 != 0 {
        return Ok(false);
    }
    let &Product { forward, a, weight, scale, terms, .. } = product;
    let Some(b) = dense(weight, a.dtype())? else { return Ok(false) };
    let direction = if forward { "forward" } else { "input_grad" };
    let args = product.operands(&b, columns);
    let added = |out| if terms.add { Some(out) } else { terms.residual };
    let args = if out.dtype() == DType::F32 {
        args.output(out).input_opt(added(out)).words(&[], MAP_WORDS).words(&[], MAP_WORDS).u32(0)
    } else {
        let args = args.output_opt(None).input_opt(None).output_map(out, SLAB, SLAB);
        match added(out) {
            Some(added) => args.tensor_map(added, SLAB, SLAB).u32(1),
            None => args.words(&[], MAP_WORDS).u32(0),
        }
    };
    launch(gpu, &format!("{direction}_{columns}"), columns, product, args.f32(scale))?;
    Ok(true)
}

/// Columns of the tiles of products that SwiGLU follows.
const FOLLOWED_COLUMNS: u32 = 256;

/// The weight as a kernel takes it that SwiGLU follows, with `others` `[m, n]` beside the product's own operands; `None` where
/// it does not. Shapes have been checked.
fn followed<'a>(gpu: &Gpu, product: &Product<'a>, others: &[&Tensor]) -> Result<Option<Cow<'a, Tensor>>> {
    let &Product { a, weight, terms, .. } = product;
    let pair = terms.lora.into_iter().flat_map(|(left, right)| [left, right]);
    let mut fits = a.dtype() != DType::F32;
    for tensor in pair.chain(weight.unquantized()).chain(others.iter().copied()) {
        fits = fits && tensor.dtype() == a.dtype() && tensor.device() == a.device();
    }
    for tensor in others {
        fits = fits && tensor.device_pointer()? % 16 == 0;
    }
    if !fits || plan(gpu, product)? != Some(FOLLOWED_COLUMNS) {
        return Ok(None);
    }
    dense(weight, a.dtype())
}

/// `up = x · Wᵀ + t · Bᵀ` and `output = silu(gate) · up` of a forward product, all `[m, n]`, if this is a Hopper GPU and the
/// kernel takes them; returns whether it did. Shapes have been checked.
pub(super) fn gated(product: &Product, gate: &Tensor, up: &mut Tensor, output: &mut Tensor) -> Result<bool> {
    let gpu = Gpu::of(gate.device())?;
    let Some(b) = followed(gpu, product, &[gate, up, output])? else { return Ok(false) };
    let args = product.operands(&b, FOLLOWED_COLUMNS).uncounted_map(gate, TILE_ROWS, DEPTH).input(gate);
    let args = args.output_map(up, MADE_ROWS, SLAB).output_map(output, MADE_ROWS, SLAB);
    launch(gpu, "gated", FOLLOWED_COLUMNS, product, args)?;
    Ok(true)
}

/// `gate` and `up` become their gradients, from that of SwiGLU's output, an input gradient; and `output = silu(gate) · up`; all
/// `[m, n]`. As [`gated`].
pub(super) fn differentiated(
    product: &Product,
    gate: &mut Tensor,
    up: &mut Tensor,
    output: &mut Tensor,
) -> Result<bool> {
    let gpu = Gpu::of(gate.device())?;
    let Some(b) = followed(gpu, product, &[gate, up, output])? else { return Ok(false) };
    let args = product.operands(&b, FOLLOWED_COLUMNS);
    let args = args.uncounted_map(gate, TILE_ROWS, DEPTH).uncounted_map(up, TILE_ROWS, DEPTH).input(gate).input(up);
    let args = args.output_map(gate, MADE_ROWS, SLAB).output_map(up, MADE_ROWS, SLAB);
    launch(gpu, "differentiated", FOLLOWED_COLUMNS, product, args.output_map(output, MADE_ROWS, SLAB))?;
    Ok(true)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        /// This thread's products take tiles of so many columns, whatever the shape.
        pub(crate) static COLUMNS: Cell<Option<u32>> = const { Cell::new(None) };
    }

    #[test]
    fn tiles_suit_the_shape() {
        let columns = |m, n| tile_columns(m, n, 132);
        assert_eq!((columns(8192, 4096), columns(8192, 14336), columns(2048, 14336)), (256, 256, 256));
        // 64 wide tiles would leave half of the SMs without one.
        assert_eq!(columns(2048, 1024), 128);
        assert_eq!(SHARED.min(227 << 10), SHARED);
    }
}
