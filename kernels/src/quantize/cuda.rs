//! CUDA kernels of 4-bit quantization.

use super::{Absmax, Parts, QuantTensor, QuantType, SCALE_BLOCK, ScaleRounding, scales::MEAN_PIECE};
use crate::{
    cuda::{entry, size},
    dynamic8,
};
use nibble_runtime::{
    DType, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static QUANTIZE: Module = Module {
    name: "quantize",
    ptx: include_str!("../../ptx/quantize.ptx"),
    entries: &[
        Entry { name: "quantize_nf4", floats: true, params: &[8, 8, 8, 8, 4, 4] },
        Entry { name: "quantize_fp4", floats: true, params: &[8, 8, 8, 8, 4, 4] },
        Entry { name: "quantize_sums", floats: false, params: &[8, 8, 8] },
        Entry { name: "quantize_scales", floats: false, params: &[8, 8, 8, 8, 8, 8, 8, 4] },
    ],
};

pub(crate) static DEQUANTIZE: Module = Module {
    name: "dequantize",
    ptx: include_str!("../../ptx/dequantize.ptx"),
    entries: &[Entry { name: "dequantize", floats: true, params: &[8, 8, 8, 8, 8, 8, 8, 4, 4, 4] }],
};

/// Elements that a block of threads handles, in both modules.
const TILE: usize = 4096;
/// Threads of a block in both modules.
const THREADS: u32 = 128;
/// Threads of a block that works on scales.
const SCALE_THREADS: u32 = 256;
/// Scale blocks that a block of threads codes: one a warp.
const SCALE_BLOCKS: usize = 8;

fn blocks(count: usize, each: usize) -> Result<[u32; 3]> {
    Ok([size("quantize", count.div_ceil(each))?, 1, 1])
}

/// Quantizes `x` into `packed` (two codes a byte) and `absmax` (one a block).
pub(super) fn quantize(
    x: &Tensor,
    quant_type: QuantType,
    block_size: usize,
    packed: &mut Tensor,
    absmax: &mut Tensor,
) -> Result<()> {
    let name = match quant_type {
        QuantType::Nf4 => "quantize_nf4",
        QuantType::Fp4 => "quantize_fp4",
    };
    let aligned = x.device_pointer()? % 16 == 0;
    let args = Args::new()
        .input(x)
        .output(packed)
        .output(absmax)
        .u64(x.numel() as u64)
        .u32(block_size.trailing_zeros())
        .u32(aligned.into());
    let grid = blocks(x.numel(), TILE)?;
    Gpu::of(x.device())?.launch(&QUANTIZE, &entry(name, x.dtype())?, grid, [THREADS, 1, 1], 0, args)
}

/// Double quantization of `scales` around their mean.
pub(super) fn quantize_scales(scales: &Tensor, rounding: ScaleRounding, tag: Tag) -> Result<Absmax> {
    let (count, device) = (scales.numel(), scales.device());
    let gpu = Gpu::of(device)?;
    // Of 8 bytes each, as the f64 numbers that they hold.
    let mut sums = Tensor::empty(&[count.div_ceil(MEAN_PIECE)], DType::I64, device, Tag::Workspace)?;
    let mut codes = Tensor::empty(&[count], DType::U8, device, tag)?;
    let mut absmax2 = Tensor::empty(&[count.div_ceil(SCALE_BLOCK)], DType::F32, device, tag)?;
    let mut offset = Tensor::empty(&[1], DType::F32, device, tag)?;
    let code = dynamic8::signed_map_on(device)?;
    let threads = [SCALE_THREADS, 1, 1];
    let args = Args::new().input(scales).output(&mut sums).u64(count as u64);
    gpu.launch(&QUANTIZE, "quantize_sums", blocks(count, MEAN_PIECE)?, threads, 0, args)?;
    let args = Args::new()
        .input(scales)
        .input(&sums)
        .input(&code)
        .output(&mut codes)
        .output(&mut absmax2)
        .output(&mut offset)
        .u64(count as u64)
        .u32((rounding == ScaleRounding::Stepped).into());
    gpu.launch(&QUANTIZE, "quantize_scales", blocks(count, SCALE_BLOCKS * SCALE_BLOCK)?, threads, 0, args)?;
    Ok(Absmax::Double { codes, absmax2, code, offset, block_size: SCALE_BLOCK })
}

/// The whole of `quantized` into `out`, which has its shape and dtype.
pub(super) fn dequantize(quantized: &QuantTensor, out: &mut Tensor) -> Result<()> {
    let Parts { packed, absmax, nested, quant_type, block_shift, dtype, numel } = quantized.parts()?;
    // Four bytes are read at a time.
    let moved = (packed.device_pointer()? % 4 != 0).then(|| packed.copy(Tag::Workspace)).transpose()?;
    let args = Args::new()
        .input(moved.as_ref().unwrap_or(packed))
        .input(absmax)
        .input_opt(nested.map(|nested| nested.absmax2))
        .input_opt(nested.map(|nested| nested.code))
        .input_opt(nested.map(|nested| nested.offset))
        .output(out)
        .u64(numel as u64)
        .u32(block_shift)
        .u32(nested.map_or(0, |nested| nested.block_shift))
        .u32(quant_type.index());
    let gpu = Gpu::of(packed.device())?;
    gpu.launch(&DEQUANTIZE, &entry("dequantize", dtype)?, blocks(numel, TILE)?, [THREADS, 1, 1], 0, args)
}
