//! Products of few rows with 4-bit weights on Hopper: which of them, and the launch of codes_hopper_sm90a.cu.

use super::{Weight, codes::Codes, hopper::Product};
use crate::cuda::{entry, hopper, one};
use nibble_runtime::{
    DType, Error, Result, Tag, Tensor,
    cuda::{Args, Chip, Gpu, Module},
};

const PARAMS: &[usize] = &[128, 128, 128, 128, 8, 8, 8, 8, 4, 4, 4, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4, 4];

pub(crate) static CODES_HOPPER: Module = Module {
    name: "codes_hopper_sm90a",
    ptx: include_str!("../../ptx/codes_hopper_sm90a.ptx"),
    entries: &[
        one("codes_hopper_forward_256_bf16", PARAMS),
        one("codes_hopper_forward_128_bf16", PARAMS),
        one("codes_hopper_forward_64_bf16", PARAMS),
        one("codes_hopper_input_grad_256_bf16", PARAMS),
        one("codes_hopper_input_grad_128_bf16", PARAMS),
        one("codes_hopper_input_grad_64_bf16", PARAMS),
        one("codes_hopper_forward_256_f16", PARAMS),
        one("codes_hopper_forward_128_f16", PARAMS),
        one("codes_hopper_forward_64_f16", PARAMS),
        one("codes_hopper_input_grad_256_f16", PARAMS),
        one("codes_hopper_input_grad_128_f16", PARAMS),
        one("codes_hopper_input_grad_64_f16", PARAMS),
    ],
};

/// Columns of the result in a tile.
const COLUMNS: u32 = 128;
/// Along the contraction, and codes of a box.
const DEPTH: u32 = 64;
/// Rows that a block writes at a time: a tile has as many shares at most.
const SLAB: u32 = 16;
/// One warpgroup that brings, two that multiply.
const THREADS: u32 = 3 * 128;
/// Fewer rows are for the kernels that read a weight once for all of them.
const ROWS: u32 = 17;
/// Of the tiles that are shared the kernel counts no more.
const MAX_SHARED_TILES: u64 = 128;

/// How a product is shared out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Shares {
    /// Rows of the result in a tile: 256, 128 or 64.
    pub rows: u32,
    /// Blocks that share the contraction of a tile.
    pub blocks: u32,
}

impl Shares {
    /// Tiles of a result `[m, n]`.
    fn tiles(self, m: u32, n: u32) -> u64 {
        u64::from(m.div_ceil(self.rows)) * u64::from(n.div_ceil(COLUMNS))
    }

    /// What takes the least time, by the steps of the block that has the most.
    fn choose(m: u32, n: u32, steps: u32, sms: u32) -> Shares {
        let sizes = [256, 128, 64].map(|rows| (1..=rows / SLAB).map(move |blocks| Shares { rows, blocks }));
        // In nanoseconds, as an H200 takes them: a step, what starts and ends a tile, and to leave sums, wait for and read them,
        // of two blocks or more.
        let cost = |shares: Shares| {
            let (step, pair, more) = match shares.rows {
                256 => (690, 5000, 7500),
                128 => (510, 3500, 4500),
                _ => (500, 1200, 2600),
            };
            let sums = match shares.blocks {
                1 => 0,
                2 => pair,
                _ => more,
            };
            let rounds = shares.tiles(m, n).div_ceil(sms.into());
            rounds * (u64::from(steps.div_ceil(shares.blocks)) * step + 3600 + sums)
        };
        let best =
            sizes.into_iter().flatten().filter(|shares| shares.fits(m, n, sms)).min_by_key(|&shares| cost(shares));
        best.unwrap_or(Shares { rows: 256, blocks: 1 })
    }

    /// Whether all blocks that wait for one another are on the GPU at once.
    fn fits(self, m: u32, n: u32, sms: u32) -> bool {
        let tiles = self.tiles(m, n);
        self.blocks == 1 || (tiles <= MAX_SHARED_TILES && tiles * u64::from(self.blocks) <= sms.into())
    }

    /// Blocks of a cluster: two that share a tile. More read each other's sums from global memory.
    fn cluster(self) -> u32 {
        if self.blocks == 2 { 2 } else { 1 }
    }

    /// Sums that the blocks leave for one another in global memory.
    fn sums(self, m: u32, n: u32) -> usize {
        if self.blocks <= 2 {
            return 0;
        }
        self.tiles(m, n) as usize * (self.blocks * self.rows * COLUMNS) as usize
    }

    /// Bytes of shared memory of a block: tokens, codes and tables of its stages, slabs of two warpgroups, scales, barriers, and
    /// what it takes to start at a multiple of 1024.
    fn shared(self) -> usize {
        let stages = match self.rows {
            256 => 5,
            128 => 8,
            _ => 12,
        };
        let stage = self.rows as usize * 128 + 2 * 128 * 32;
        stages * stage + 4 * 16 * 68 * 4 + 256 * 4 + 25 * 8 + 1024
    }
}

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
    super::cuda::forced().map(|_| None)
}

/// How this kind of GPU takes a product of 16-bit rows `[m, k]` with a 4-bit weight into `[m, n]`; `None` where other kernels
/// do. `rank` is that of the low-rank branch, or 0.
fn shares_on(chip: Chip, sizes @ [m, n, k, rank]: [u32; 4]) -> Option<Shares> {
    // A block of 64 codes lies in one row, whichever of the sizes is that of a row.
    let whole = m > 0 && n > 0 && k > 0 && n.is_multiple_of(64) && k.is_multiple_of(64) && rank.is_multiple_of(8);
    if !hopper(chip) || !whole {
        return None;
    }
    let sms = chip.sms.max(1);
    let shares = match forced() {
        Some(shares) => shares.filter(|shares| shares.fits(m, n, sms))?,
        None if m < ROWS || super::hopper::columns_on(chip, true, sizes).is_some() => return None,
        None => Shares::choose(m, n, k.div_ceil(DEPTH) + rank.div_ceil(DEPTH), sms),
    };
    (shares.tiles(m, n) <= i32::MAX as u64).then_some(shares)
}

/// Bytes of workspace of such a product, or `None` where other kernels take it.
pub(super) fn workspace(chip: Chip, sizes @ [m, n, ..]: [u32; 4]) -> Option<usize> {
    shares_on(chip, sizes).map(|shares| shares.sums(m, n) * size_of::<f32>())
}

/// Computes the product into `out` if this is a Hopper GPU and the kernel takes it; returns whether it did. Types, devices
/// and the parts of the weight have been checked.
pub(super) fn product(gpu: &Gpu, product: &Product, out: &mut Tensor) -> Result<bool> {
    let &Product { forward, a, weight, scale, terms, m, n, k } = product;
    let Weight::Quantized(weight) = weight else { return Ok(false) };
    let lora = terms.lora.filter(|(left, _)| left.shape()[1] > 0);
    let rank = lora.map_or(0, |(left, _)| left.shape()[1] as u32);
    let Some(shares) = shares_on(gpu.chip(), [m, n, k, rank]) else { return Ok(false) };
    if gpu.shared_per_block() < shares.shared() || weight.block_size < DEPTH as usize {
        return Ok(false);
    }
    let pair = lora.into_iter().flat_map(|(left, right)| [left, right]);
    for tensor in [a, &weight.packed, &*out].into_iter().chain(pair).chain(terms.residual) {
        if tensor.device_pointer()? % 16 != 0 {
            return Ok(false);
        }
    }
    let mut sums = match shares.sums(m, n) {
        0 => None,
        count => match Tensor::empty(&[count], DType::F32, a.device(), Tag::Workspace) {
            Ok(sums) => Some(sums),
            Err(Error::OutOfMemory(_)) => return Ok(false),
            Err(error) => return Err(error),
        },
    };
    let codes = Codes::of("linear", weight)?;
    let (row, box_rows, direction) = if forward { (k, COLUMNS, "forward") } else { (n, DEPTH, "input_grad") };
    let packed = weight.packed.reshape(&[weight.numel() / row as usize, row as usize / 2])?;
    // Without a second pair its maps are not looked at.
    let (left, right) = lora.unwrap_or((a, a));
    let args = Args::new()
        .early()
        .cluster(shares.cluster())
        .tensor_map(a, shares.rows, DEPTH)
        .tensor_map(&packed, box_rows, DEPTH / 2)
        .tensor_map(left, shares.rows, DEPTH)
        .tensor_map(right, box_rows, DEPTH)
        .flops(2.0 * f64::from(m) * f64::from(n) * (f64::from(k) + f64::from(rank)))
        .input_opt(codes.absmax)
        .input_opt(codes.nested)
        .input_opt(codes.map)
        .input_opt(codes.offset)
        .u32(codes.block_shift)
        .u32(codes.nested_shift)
        .u32(codes.quant_type)
        .output(out)
        .input_opt(terms.residual)
        .output_opt(sums.as_mut())
        .u32(m)
        .u32(n)
        .u32(k)
        .u32(rank)
        .f32(scale)
        .u32(terms.add.into())
        .u32((out.dtype() == DType::F32).into())
        .u32(shares.blocks);
    let name = entry(&format!("codes_hopper_{direction}_{}", shares.rows), a.dtype())?;
    let blocks = shares.tiles(m, n) as u32 * shares.blocks;
    gpu.launch(&CODES_HOPPER, &name, [blocks, 1, 1], [THREADS, 1, 1], shares.shared(), args)?;
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
            let shares = Shares::choose(m, n, k / 64, 132);
            assert!(shares.fits(m, n, 132) && shares.blocks <= shares.rows / SLAB);
            (shares.rows, shares.blocks)
        };
        assert_eq!((shares(256, 14336, 4096), shares(256, 4096, 14336)), ((256, 1), (256, 4)));
        assert_eq!((shares(256, 4096, 4096), shares(256, 1024, 4096)), ((256, 4), (128, 8)));
        assert_eq!((shares(256, 4096, 1024), shares(384, 4096, 4096)), ((128, 2), (256, 2)));
        assert_eq!((shares(128, 4096, 4096), shares(128, 14336, 4096)), ((128, 4), (128, 1)));
        assert_eq!((shares(64, 4096, 4096), shares(17, 14336, 4096)), ((64, 4), (64, 1)));
    }

    #[test]
    fn blocks_have_the_memory() {
        for rows in [256, 128, 64] {
            let shares = Shares { rows, blocks: 3 };
            assert!(shares.shared() <= 227 << 10, "{rows}");
            assert_eq!(shares.sums(2 * rows, 129), 4 * 3 * (rows * 128) as usize);
        }
    }
}
