//! Large products on a GPU: which kernel, which tile, and what the kernels rely on.

use super::{
    Terms, Weight,
    codes::Codes,
    codes_hopper, hopper,
    skinny::{self, Direction},
};
use crate::cuda::{entry, size};
use nibble_runtime::{
    DType, Error, Result, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};
use std::sync::LazyLock;

/// Parameters of gemm_general.cu; gemm_entries.cuh has one more, the stages.
const GENERAL: &[usize] = &[8, 8, 8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 8, 4, 4, 4, 4, 4];
const TILED: &[usize] = &[8, 8, 8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 8, 4, 4, 4, 4, 4, 4];

macro_rules! tiled {
    ($weight:literal, $dtype:literal) => {
        Module {
            name: concat!("gemm_", $weight, "_", $dtype),
            ptx: include_str!(concat!("../../ptx/gemm_", $weight, "_", $dtype, ".ptx")),
            entries: &[
                tiled!($weight, "forward", "256", $dtype),
                tiled!($weight, "forward", "128", $dtype),
                tiled!($weight, "forward", "64", $dtype),
                tiled!($weight, "input_grad", "256", $dtype),
                tiled!($weight, "input_grad", "128", $dtype),
                tiled!($weight, "input_grad", "64", $dtype),
            ],
        }
    };
    ($weight:literal, $direction:literal, $rows:literal, $dtype:literal) => {
        Entry {
            name: concat!("gemm_", $weight, "_", $direction, "_", $rows, "_", $dtype),
            floats: false,
            params: TILED,
        }
    };
}

pub(crate) static GEMM_DENSE_BF16: Module = tiled!("dense", "bf16");
pub(crate) static GEMM_DENSE_F16: Module = tiled!("dense", "f16");
pub(crate) static GEMM_QUANT_BF16: Module = tiled!("quant", "bf16");
pub(crate) static GEMM_QUANT_F16: Module = tiled!("quant", "f16");
pub(crate) static GEMM_GENERAL: Module = Module {
    name: "gemm_general",
    ptx: include_str!("../../ptx/gemm_general.ptx"),
    entries: &[
        Entry { name: "gemm_general_forward_bf16", floats: false, params: GENERAL },
        Entry { name: "gemm_general_forward_f16", floats: false, params: GENERAL },
        Entry { name: "gemm_general_input_grad_bf16", floats: false, params: GENERAL },
        Entry { name: "gemm_general_input_grad_f16", floats: false, params: GENERAL },
    ],
};

/// `out = scale · (x · Wᵀ + t · Bᵀ) + …` by the terms, whose shapes have been checked.
pub(super) fn forward_into(x: &Tensor, weight: &Weight, scale: f32, terms: Terms, out: &mut Tensor) -> Result<()> {
    if !on_tensor_cores(x, weight, terms, out) {
        return skinny::products(Direction::Forward, x, weight, scale, terms, out);
    }
    // A tile that is asked for is one of the large product's.
    if forced().is_none() && skinny::decode(x, weight, scale, terms, out)? {
        return Ok(());
    }
    product(true, x, weight, scale, terms, out)
}

/// `out = scale · (g · W + u · A) + …` by the terms, whose shapes have been checked.
pub(super) fn input_grad_into(g: &Tensor, weight: &Weight, scale: f32, terms: Terms, out: &mut Tensor) -> Result<()> {
    match on_tensor_cores(g, weight, terms, out) {
        true => product(false, g, weight, scale, terms, out),
        false => skinny::products(Direction::InputGrad, g, weight, scale, terms, out),
    }
}

/// Whether the operands are of one 16-bit type, and the result too or f32.
fn on_tensor_cores(x: &Tensor, weight: &Weight, terms: Terms, out: &Tensor) -> bool {
    let fits = |tensor: &Tensor| tensor.dtype() == x.dtype();
    let weight_fits = match weight {
        Weight::Dense(tensor) => fits(tensor),
        Weight::Quantized(_) => true,
    };
    let branch_fits = terms.lora.is_none_or(|(left, right)| fits(left) && fits(right));
    let out_fits = fits(out) || out.dtype() == DType::F32;
    x.dtype() != DType::F32 && weight_fits && branch_fits && out_fits
}

/// A product of 16-bit rows `a` with a weight or its transpose.
fn product(forward: bool, a: &Tensor, weight: &Weight, scale: f32, terms: Terms, out: &mut Tensor) -> Result<()> {
    let (op, direction) = if forward { ("linear forward", "forward") } else { ("linear input gradient", "input_grad") };
    let dtype = a.dtype();
    let (gpu, (m, k), n) = (Gpu::of(a.device())?, a.dims2(op)?, out.shape()[1]);
    let (b, scales) = match weight {
        Weight::Dense(tensor) => (tensor, Codes::default()),
        Weight::Quantized(quantized) => (&quantized.packed, Codes::of(op, quantized)?),
    };
    let quantized = scales.absmax.is_some();
    let dense = [(!quantized).then_some(b), terms.lora.map(|(left, _)| left), terms.lora.map(|(_, right)| right)];
    if let Some(other) = dense.into_iter().flatten().find(|tensor| tensor.dtype() != dtype) {
        return Err(Error::DType { op, expected: dtype.to_string(), found: other.dtype() });
    }
    if out.dtype() != dtype && out.dtype() != DType::F32 {
        return Err(Error::DType { op, expected: format!("{dtype} or f32"), found: out.dtype() });
    }
    let lora = terms.lora.map(|(left, right)| [left, right]);
    let inputs = || [b].into_iter().chain(scales.tensors()).chain(lora.into_iter().flatten()).chain(terms.residual);
    if let Some(other) = inputs().chain([&*out]).find(|tensor| tensor.device() != a.device()) {
        return Err(Error::invalid(op, format!("operands on {} and {}", a.device(), other.device())));
    }
    let rank = lora.map_or(0, |[left, _]| left.shape()[1]);
    let [m, n, k, rank] = [size(op, m)?, size(op, n)?, size(op, k)?, size(op, rank)?];
    if m == 0 || n == 0 {
        return Ok(());
    }
    let large = hopper::Product { forward, a, weight, scale, terms, m, n, k };
    if codes_hopper::product(gpu, &large, out)? || hopper::product(gpu, &large, out)? {
        return Ok(());
    }

    // A row of W: along the contraction forward, along the result's columns backward.
    let width = if forward { k } else { n };
    let whole_rows = k > 0 && k % 8 == 0 && width % if quantized { 32 } else { 8 } == 0;
    let aligned = |tensor: &Tensor| Ok::<_, Error>(tensor.device_pointer()? % 16 == 0);
    let mut tiled = whole_rows && aligned(a)? && aligned(b)? && aligned(out)?;
    for tensor in lora.into_iter().flatten().chain(terms.residual) {
        tiled &= aligned(tensor)?;
    }

    let (wide, add) = (out.dtype() == DType::F32, terms.add);
    let args = Args::new()
        .flops(2.0 * f64::from(m) * f64::from(n) * (f64::from(k) + f64::from(rank)))
        .output(out)
        .input_opt(terms.residual)
        .input(a)
        .input(b)
        .input_opt(scales.absmax)
        .input_opt(scales.nested)
        .input_opt(scales.map)
        .input_opt(lora.map(|[left, _]| left))
        .input_opt(lora.map(|[_, right]| right))
        .u32(m)
        .u32(n)
        .u32(k)
        .u32(rank)
        .f32(scale)
        .input_opt(scales.offset)
        .u32(scales.block_shift)
        .u32(scales.nested_shift)
        .u32(scales.quant_type)
        .u32(add.into())
        .u32(wide.into());
    if !tiled {
        let entry = entry(&format!("gemm_general_{direction}"), dtype)?;
        let blocks = blocks(op, m, n, 64, 64)?;
        return gpu.launch(&GEMM_GENERAL, &entry, [blocks, 1, 1], [256, 1, 1], 0, args);
    }
    let plan = Plan::choose(m, n, gpu.sm_count(), gpu.shared_per_block(), quantized);
    let (module, kind) = match (quantized, dtype) {
        (false, DType::BF16) => (&GEMM_DENSE_BF16, "dense"),
        (false, _) => (&GEMM_DENSE_F16, "dense"),
        (true, DType::BF16) => (&GEMM_QUANT_BF16, "quant"),
        (true, _) => (&GEMM_QUANT_F16, "quant"),
    };
    let entry = entry(&format!("gemm_{kind}_{direction}_{}", plan.tile.rows), dtype)?;
    let blocks = blocks(op, m, n, plan.tile.rows, TILE_COLUMNS)?;
    let block = [plan.tile.threads, 1, 1];
    gpu.launch(module, &entry, [blocks, 1, 1], block, plan.shared, args.u32(plan.stages))
}

/// Tiles of `rows` × `columns` in a matrix `[m, n]`.
fn blocks(op: &'static str, m: u32, n: u32, rows: u32, columns: u32) -> Result<u32> {
    size(op, m.div_ceil(rows) as usize * n.div_ceil(columns) as usize)
}

const TILE_COLUMNS: u32 = 128;
/// Bytes of a row of a stage: 64 elements along the contraction.
const STAGE_ROW: usize = 128;
/// The dynamic map and the code book.
const TABLES: usize = (256 + 16) * size_of::<f32>();
const MAX_STAGES: u32 = 4;

/// A tile of gemm.cuh.
#[derive(Debug, PartialEq)]
pub(super) struct Tile {
    rows: u32,
    threads: u32,
    /// That an SM has registers for.
    blocks: u32,
    /// Relative speed of an SM that has all of its blocks, and of one with a single block.
    speed: (f64, f64),
}

static TILES: [Tile; 3] = [
    Tile { rows: 256, threads: 256, blocks: 1, speed: (1.0, 1.0) },
    Tile { rows: 128, threads: 128, blocks: 2, speed: (0.95, 0.7) },
    Tile { rows: 64, threads: 128, blocks: 2, speed: (0.8, 0.5) },
];

/// `NIBBLE_GEMM_TILE` is 256, 128 or 64: use that tile of gemm.cuh whatever the shape and GPU. For benchmarks.
static FORCED: LazyLock<Option<&'static Tile>> = LazyLock::new(|| {
    let rows = std::env::var("NIBBLE_GEMM_TILE").ok()?.parse::<u32>().ok()?;
    TILES.iter().find(|tile| tile.rows == rows)
});

pub(super) fn forced() -> Option<&'static Tile> {
    #[cfg(test)]
    if let Some(tile) = tests::TILE.get() {
        return Some(&TILES[tile]);
    }
    *FORCED
}

/// How a product runs.
struct Plan {
    tile: &'static Tile,
    stages: u32,
    /// Bytes of shared memory of a block.
    shared: usize,
}

impl Plan {
    /// The plan that takes the least time for a result `[m, n]`, by the number of tiles that the busiest SM gets.
    fn choose(m: u32, n: u32, sms: u32, shared_per_block: usize, quantized: bool) -> Plan {
        let cost = |tile: &Tile| {
            let tiles = u64::from(m.div_ceil(tile.rows)) * u64::from(n.div_ceil(TILE_COLUMNS));
            let busiest = tiles.div_ceil(sms.max(1).into());
            let speed = if busiest >= tile.blocks.into() { tile.speed.0 } else { tile.speed.1 };
            busiest as f64 * f64::from(tile.rows) / speed
        };
        let best = TILES.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).unwrap_or(&TILES[0]);
        Plan::of(forced().unwrap_or(best), shared_per_block, quantized)
    }

    /// As many stages as fit, without keeping a second block off the SM if there can be one.
    fn of(tile: &'static Tile, shared_per_block: usize, quantized: bool) -> Plan {
        let bytes = |stages: u32| {
            let (rings, a) = (stages as usize, tile.rows as usize * STAGE_ROW);
            let b = TILE_COLUMNS as usize * STAGE_ROW;
            if quantized { rings * a + 2 * b + TABLES } else { rings * (a + b) }
        };
        // An SM has the memory of the largest block and one KiB, and each block takes one KiB more than it asked for.
        let fits = |stages: u32, blocks: u32| (bytes(stages) + 1024) * blocks as usize <= shared_per_block + 1024;
        for blocks in (1..=tile.blocks).rev() {
            if let Some(stages) = (2..=MAX_STAGES).rev().find(|&stages| fits(stages, blocks)) {
                return Plan { tile, stages, shared: bytes(stages) };
            }
        }
        Plan { tile, stages: 2, shared: bytes(2) }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        /// Which of the tiles this thread's products take, whatever the shape.
        pub(crate) static TILE: Cell<Option<usize>> = const { Cell::new(None) };
    }

    #[test]
    fn every_tile_fits_every_gpu() {
        // A100, RTX 3090 and 4090, H100.
        for shared in [163 << 10, 99 << 10, 227 << 10] {
            for tile in &TILES {
                for quantized in [false, true] {
                    let plan = Plan::of(tile, shared, quantized);
                    assert!(plan.shared <= shared && plan.stages >= 2, "{tile:?} {shared} {quantized}");
                    let epilogue = tile.threads as usize / 32 * 16 * (64 + 8) * 4;
                    assert!(plan.shared >= epilogue);
                }
            }
        }
        assert_eq!(Plan::of(&TILES[0], 227 << 10, false).stages, 4);
        assert_eq!(Plan::of(&TILES[1], 227 << 10, false).stages, 3);
        assert_eq!(Plan::of(&TILES[1], 227 << 10, true).stages, 4);
    }

    #[test]
    fn tiles_are_counted() {
        assert_eq!(blocks("test", 1 << 20, 14336, 256, TILE_COLUMNS).unwrap(), 4096 * 112);
        let most = i32::MAX as u32;
        assert!(blocks("test", most, most, 256, TILE_COLUMNS).is_err());
    }

    #[test]
    fn large_products_take_the_large_tile_and_small_ones_fill_the_gpu() {
        let rows = |m, n| Plan::choose(m, n, 132, 227 << 10, true).tile.rows;
        assert_eq!((rows(8192, 4096), rows(8192, 14336), rows(2048, 4096)), (256, 256, 256));
        assert!(rows(2048, 1024) < 256 && rows(256, 4096) == 64);
    }
}
