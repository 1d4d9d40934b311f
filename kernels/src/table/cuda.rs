//! Launches of the kernels of 8-bit tables.

use super::Rows8;
use crate::cuda::{entry, size};
use nibble_runtime::{
    DType, Error, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

const DECODE: &[usize] = &[8, 8, 8, 8, 4, 4, 4];

pub(crate) static MODULE: Module = Module {
    name: "table",
    ptx: include_str!("../../ptx/table.ptx"),
    entries: &[
        Entry { name: "table_quantize", floats: true, params: &[8, 8, 8, 4] },
        Entry { name: "table_rows", floats: true, params: &[8, 4, 8, 8, 8, 4, 4] },
        Entry { name: "table_columns", floats: true, params: &[8, 8, 4, 4, 4, 4, 4] },
        Entry { name: "table_decode_8_f16", floats: false, params: DECODE },
        Entry { name: "table_decode_8_bf16", floats: false, params: DECODE },
        Entry { name: "table_decode_16_f16", floats: false, params: DECODE },
        Entry { name: "table_decode_16_bf16", floats: false, params: DECODE },
    ],
};

const OP: &str = "8-bit table";
const THREADS: u32 = 128;

/// Most rows that are multiplied by the codes themselves.
pub(super) const DECODE_ROWS: usize = 16;
/// Rows of the table that a block of that kernel takes.
const DECODE_BLOCK: u32 = 64;

pub(super) fn quantize(x: &Tensor, codes: &mut Tensor, scales: &mut Tensor) -> Result<()> {
    let (vocab, width) = x.dims2(OP)?;
    let args = Args::new().input(x).output(codes).output(scales).u32(size(OP, width)?);
    let (name, grid) = (entry("table_quantize", x.dtype())?, [size(OP, vocab)?, 1, 1]);
    Gpu::of(x.device())?.launch(&MODULE, &name, grid, [THREADS, 1, 1], 0, args)
}

/// Rows of a table.
#[derive(Clone, Copy)]
pub(super) enum Which<'a> {
    /// From this one on.
    Range(usize),
    /// Those of the ids, i32. The caller has checked them; one outside of the table gives a row of NaN.
    Ids(&'a Tensor),
}

/// `count` rows in `dtype`.
pub(super) fn rows(table: &Rows8, which: Which, count: usize, dtype: DType, tag: Tag) -> Result<Tensor> {
    let (vocab, width) = table.dims()?;
    let (ids, first) = match which {
        Which::Range(first) => (None, first),
        Which::Ids(ids) => (Some(ids), 0),
    };
    let name = entry("table_rows", dtype)?;
    let mut out = Tensor::empty(&[count, width], dtype, table.codes.device(), tag)?;
    let args = Args::new().input_opt(ids).u32(size(OP, first)?).input(&table.codes).input(&table.scales);
    let args = args.output(&mut out).moves(count * width * (1 + dtype.size()));
    let args = args.u32(size(OP, vocab)?).u32(size(OP, width)?);
    Gpu::of(table.codes.device())?.launch(&MODULE, &name, [size(OP, count)?, 1, 1], [THREADS, 1, 1], 0, args)?;
    Ok(out)
}

/// See [`super::columns`].
pub(super) fn columns(from: &Tensor, from_first: usize, to: &mut Tensor, to_first: usize, count: usize) -> Result<()> {
    let ((rows, from_width), (_, to_width)) = (from.dims2(OP)?, to.dims2(OP)?);
    let name = entry("table_columns", from.dtype())?;
    // Sixteen bytes a thread, four times.
    let share = (count * from.dtype().size()).div_ceil(THREADS as usize * 16 * 4);
    let grid = [size(OP, rows)?, size(OP, share)?.clamp(1, 65_535), 1];
    let args = Args::new().input(from).output(to).u32(size(OP, from_first)?).u32(size(OP, from_width)?);
    let args = args.u32(size(OP, to_first)?).u32(size(OP, to_width)?).u32(size(OP, count)?);
    Gpu::of(from.device())?.launch(&MODULE, &name, grid, [THREADS, 1, 1], 0, args)
}

/// `out = x · tableᵀ` for few rows of 16 bits, `out` f32 `[T, V]`; `false` where the kernel does not take them. Shapes have
/// been checked. The weights are not rounded to the type of `x`.
pub(super) fn decode(x: &Tensor, table: &Rows8, out: &mut Tensor) -> Result<bool> {
    let ((tokens, width), (vocab, _)) = (x.dims2(OP)?, table.dims()?);
    let aligned = x.device_pointer()?.is_multiple_of(16) && table.codes.device_pointer()?.is_multiple_of(8);
    let whole = width > 0 && width.is_multiple_of(8) && vocab > 0;
    if !(1..=DECODE_ROWS).contains(&tokens) || !matches!(x.dtype(), DType::F16 | DType::BF16) || !aligned || !whole {
        return Ok(false);
    }
    if x.device() != table.codes.device() {
        return Err(Error::invalid(OP, format!("operands on {} and {}", x.device(), table.codes.device())));
    }
    let name = entry(&format!("table_decode_{}", if tokens <= 8 { 8 } else { 16 }), x.dtype())?;
    let rows = size(OP, vocab)?;
    let args = Args::new().input(x).input(&table.codes).input(&table.scales).output(out);
    let args = args.u32(rows).u32(size(OP, width)?).u32(size(OP, tokens)?);
    Gpu::of(x.device())?.launch(&MODULE, &name, [rows.div_ceil(DECODE_BLOCK), 1, 1], [256, 1, 1], 0, args)?;
    Ok(true)
}
