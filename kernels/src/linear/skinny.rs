//! Products on a GPU that are not large products of 16-bit types: in f32 (`simt.cu`), with a LoRA rank (`lora.cu`), of
//! gradients for weights (`weight_grad.cu`), and for a few tokens (`decode.cu`).
//!
//! Shapes have been checked by the callers. The 16-bit kernels take rows of whole 16-byte pieces; what does not fit them
//! (odd widths, mixed types, views that begin in between) goes to `simt.cu`, which takes everything and is slower. Slices
//! of a sum are as many as the shape and the GPU say, so that results are the same from run to run.

use super::{
    Terms, Weight,
    codes::Codes,
    narrow::{self, Kind},
};
use crate::{
    cuda::{entry, one, size},
    dropout::{self, Mask},
    elementwise,
    quantize::QuantTensor,
};
use nibble_runtime::{
    DType, Error, Result, Tag, Tensor,
    cuda::{Args, Chip, Entry, Gpu, Module},
};

const SIMT_PARAMS: &[usize] = &[8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 8];
const SUM_PARAMS: &[usize] = &[8, 8, 8, 4, 4, 4];
/// Three matrices, three sizes, the scale, the mask.
const LORA_PARAMS: &[usize] = &[8, 8, 8, 4, 4, 4, 4, 8, 4, 4, 4, 4];
/// Three matrices, three sizes, the slice, the mask.
const LORA_GRAD_PARAMS: &[usize] = &[8, 8, 8, 4, 4, 4, 4, 8, 4, 4, 4, 4];
const DROPPED_ADD_PARAMS: &[usize] = &[8, 8, 8, 4, 4, 4, 8, 4, 4, 4, 4];
const DENSE_PARAMS: &[usize] = &[8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4];
const CODES_PARAMS: &[usize] = &[8, 8, 8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 8];

pub(crate) static SIMT: Module = Module {
    name: "simt",
    ptx: include_str!("../../ptx/simt.ptx"),
    entries: &[
        one("simt_forward_full_128", SIMT_PARAMS),
        one("simt_forward_half_128", SIMT_PARAMS),
        one("simt_forward_codes_128", SIMT_PARAMS),
        one("simt_forward_full_64", SIMT_PARAMS),
        one("simt_forward_half_64", SIMT_PARAMS),
        one("simt_forward_codes_64", SIMT_PARAMS),
        one("simt_forward_any", SIMT_PARAMS),
        one("simt_input_grad_full_128", SIMT_PARAMS),
        one("simt_input_grad_half_128", SIMT_PARAMS),
        one("simt_input_grad_codes_128", SIMT_PARAMS),
        one("simt_input_grad_full_64", SIMT_PARAMS),
        one("simt_input_grad_half_64", SIMT_PARAMS),
        one("simt_input_grad_codes_64", SIMT_PARAMS),
        one("simt_input_grad_any", SIMT_PARAMS),
        one("simt_weight_grad_full_128", SIMT_PARAMS),
        one("simt_weight_grad_full_64", SIMT_PARAMS),
        one("simt_weight_grad_any", SIMT_PARAMS),
        Entry { name: "simt_sum", floats: true, params: SUM_PARAMS },
    ],
};

pub(crate) static LORA: Module = Module {
    name: "lora",
    ptx: include_str!("../../ptx/lora.ptx"),
    entries: &[
        one("lora_down_16_f16", LORA_PARAMS),
        one("lora_down_16_bf16", LORA_PARAMS),
        one("lora_down_64_f16", LORA_PARAMS),
        one("lora_down_64_bf16", LORA_PARAMS),
        one("lora_down_few_16_f16", LORA_PARAMS),
        one("lora_down_few_16_bf16", LORA_PARAMS),
        one("lora_down_drop_16_f16", LORA_PARAMS),
        one("lora_down_drop_16_bf16", LORA_PARAMS),
        one("lora_down_drop_64_f16", LORA_PARAMS),
        one("lora_down_drop_64_bf16", LORA_PARAMS),
        one("lora_down_drop_few_16_f16", LORA_PARAMS),
        one("lora_down_drop_few_16_bf16", LORA_PARAMS),
        one("lora_down_columns_16_f16", LORA_PARAMS),
        one("lora_down_columns_16_bf16", LORA_PARAMS),
        one("lora_down_columns_64_f16", LORA_PARAMS),
        one("lora_down_columns_64_bf16", LORA_PARAMS),
        one("lora_down_columns_few_16_f16", LORA_PARAMS),
        one("lora_down_columns_few_16_bf16", LORA_PARAMS),
        one("lora_dropped_add_f16", DROPPED_ADD_PARAMS),
        one("lora_dropped_add_bf16", DROPPED_ADD_PARAMS),
        one("lora_grad_16_f16", LORA_GRAD_PARAMS),
        one("lora_grad_16_bf16", LORA_GRAD_PARAMS),
        one("lora_grad_32_f16", LORA_GRAD_PARAMS),
        one("lora_grad_32_bf16", LORA_GRAD_PARAMS),
        one("lora_grad_drop_16_f16", LORA_GRAD_PARAMS),
        one("lora_grad_drop_16_bf16", LORA_GRAD_PARAMS),
        one("lora_grad_drop_32_f16", LORA_GRAD_PARAMS),
        one("lora_grad_drop_32_bf16", LORA_GRAD_PARAMS),
        one("lora_sum", &[8, 8, 4, 4, 4, 4, 4]),
    ],
};

pub(crate) static WEIGHT_GRAD: Module = Module {
    name: "weight_grad",
    ptx: include_str!("../../ptx/weight_grad.ptx"),
    entries: &[one("weight_grad_f16", &[8, 8, 8, 4, 4, 4, 4, 4]), one("weight_grad_bf16", &[8, 8, 8, 4, 4, 4, 4, 4])],
};

pub(crate) static DECODE: Module = Module {
    name: "decode",
    ptx: include_str!("../../ptx/decode.ptx"),
    entries: &[
        one("decode_dense_8_f16", DENSE_PARAMS),
        one("decode_dense_8_bf16", DENSE_PARAMS),
        one("decode_dense_16_f16", DENSE_PARAMS),
        one("decode_dense_16_bf16", DENSE_PARAMS),
        one("decode_dense_few_8_f16", DENSE_PARAMS),
        one("decode_dense_few_8_bf16", DENSE_PARAMS),
        one("decode_dense_few_16_f16", DENSE_PARAMS),
        one("decode_dense_few_16_bf16", DENSE_PARAMS),
        one("decode_codes_8_f16", CODES_PARAMS),
        one("decode_codes_8_bf16", CODES_PARAMS),
        one("decode_codes_16_f16", CODES_PARAMS),
        one("decode_codes_16_bf16", CODES_PARAMS),
    ],
};

/// Most tokens that `decode.cu` takes.
pub(super) const DECODE_TOKENS: usize = 16;

/// Which product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Direction {
    /// `x · Wᵀ`.
    Forward,
    /// `g · W`.
    InputGrad,
    /// `gᵀ · x`.
    WeightGrad,
}

/// Blocks along y or z of a grid.
fn across(op: &'static str, blocks: u32) -> Result<u32> {
    if blocks <= 65_535 {
        return Ok(blocks);
    }
    Err(Error::shape(op, format!("{blocks} rows of tiles; a grid has at most 65535")))
}

/// Whether the tensor begins at a multiple of `bytes`.
fn aligned(tensor: &Tensor, bytes: u64) -> Result<bool> {
    Ok(tensor.device_pointer()?.is_multiple_of(bytes))
}

/// Whether all are of one 16-bit type, that of `first`, and begin at multiples of 16 bytes.
fn sixteen_bits(first: &Tensor, others: &[&Tensor]) -> Result<bool> {
    let mut fits = first.dtype() != DType::F32 && first.dtype().is_float() && aligned(first, 16)?;
    for other in others {
        fits &= other.dtype() == first.dtype() && aligned(other, 16)?;
    }
    Ok(fits)
}

/// Number of a type in `simt.cu`.
fn type_number(op: &'static str, dtype: DType) -> Result<u32> {
    match dtype {
        DType::F32 => Ok(0),
        DType::F16 => Ok(1),
        DType::BF16 => Ok(2),
        found => Err(Error::DType { op, expected: "float".into(), found }),
    }
}

/// The right operand of [`simt`].
enum Right<'a> {
    Dense(&'a Tensor),
    Codes(&'a QuantTensor),
}

/// `out [m, n] = scale · a · b (+ out)` by `simt.cu`, for operands of any float type and b of codes.
fn simt(
    direction: Direction,
    a: &Tensor,
    b: Right,
    (m, n, inner): (usize, usize, usize),
    scale: f32,
    out: &mut Tensor,
    add: bool,
) -> Result<()> {
    let gpu = Gpu::of(out.device())?;
    // Names for errors and of the kernels, and the row widths of a and b.
    let (op, name, widths) = match direction {
        Direction::Forward => ("linear forward", "forward", [inner, inner]),
        Direction::InputGrad => ("linear input gradient", "input_grad", [inner, n]),
        Direction::WeightGrad => ("weight gradient", "weight_grad", [m, n]),
    };
    if m == 0 || n == 0 {
        return Ok(());
    }
    if inner == 0 {
        if !add {
            *out = Tensor::zeros(out.shape(), out.dtype(), out.device(), Tag::Workspace)?;
        }
        return Ok(());
    }
    let (codes, b, b_type) = match b {
        Right::Dense(tensor) => (None, tensor, tensor.dtype()),
        Right::Codes(quantized) => (Some(Codes::of(op, quantized)?), &quantized.packed, quantized.dtype),
    };
    let (kind, bytes) = match (&codes, b_type) {
        (Some(_), _) => ("codes", 2),
        (None, DType::F32) => ("full", 16),
        (None, _) => ("half", 8),
    };
    let numbers = [type_number(op, a.dtype())?, type_number(op, b_type)?];
    let whole = a.dtype() == DType::F32
        && widths.iter().chain([&n]).all(|width| width.is_multiple_of(4))
        && (direction != Direction::WeightGrad || kind == "full")
        && aligned(a, 16)?
        && aligned(b, bytes)?
        && aligned(out, 16)?;

    let [rows, cols, inner] = [size(op, m)?, size(op, n)?, size(op, inner)?];
    let sms = gpu.sm_count();
    let tiles = |side: u32| u64::from(rows.div_ceil(side)) * u64::from(cols.div_ceil(side));
    let side = if whole && tiles(128) >= sms.into() { 128 } else { 64 };
    let full = u64::from(if side == 128 { sms } else { 4 * sms }); // blocks that run at once
    let slices = match tiles(side) {
        tiles if 2 * tiles >= full => 1,
        tiles => (full.div_ceil(tiles) as u32).min(inner.div_ceil(128)),
    };
    let slice = inner.div_ceil(slices).next_multiple_of(16);
    let slices = inner.div_ceil(slice);
    let direct = slices == 1 && out.dtype() == DType::F32;

    let kernel = if whole { format!("simt_{name}_{kind}_{side}") } else { format!("simt_{name}_any") };
    let grid = [cols.div_ceil(side), across(op, rows.div_ceil(side))?, across(op, slices)?];
    let quantized = codes.is_some();
    let codes = codes.unwrap_or_default();
    let launch = |to: &mut Tensor, scale: f32, add: bool| {
        let args = Args::new().input(a).input(b).output(to).flops(flops(rows, cols, inner));
        let args = args.input_opt(codes.absmax).input_opt(codes.nested).input_opt(codes.map);
        let args = args.u32(rows).u32(cols).u32(inner).u32(slice).f32(scale).u32(add.into());
        let args = args.u32(numbers[0]).u32(numbers[1]).u32(quantized.into()).u32(codes.quant_type);
        let args = args.u32(codes.block_shift).u32(codes.nested_shift).input_opt(codes.offset);
        gpu.launch(&SIMT, &kernel, grid, [side * side / 64, 1, 1], 0, args)
    };
    if direct {
        return launch(out, scale, add);
    }
    let mut partial = Tensor::empty(&[slices as usize, m, n], DType::F32, out.device(), Tag::Workspace)?;
    launch(&mut partial, 1.0, false)?;
    let numel = (m * n) as u64;
    let blocks = size(op, (m * n).div_ceil(256))?;
    let kernel = entry("simt_sum", out.dtype())?;
    let args = Args::new().input(&partial).output(out).u64(numel).u32(slices).f32(scale).u32(add.into());
    gpu.launch(&SIMT, &kernel, [blocks, 1, 1], [256, 1, 1], 0, args)
}

/// `out = scale · (x · Wᵀ + t · Bᵀ) + …` or `scale · (g · W + u · A) + …` by the terms in f32 arithmetic, for any float
/// types and any shape. A weight of codes is rounded to its own type on the way, as on the CPU. Where the result has 16
/// bits it is rounded after each of the two products.
pub(super) fn products(
    direction: Direction,
    x: &Tensor,
    weight: &Weight,
    scale: f32,
    terms: Terms,
    out: &mut Tensor,
) -> Result<()> {
    let (t, (n, k)) = (x.shape()[0], weight.dims()?);
    let (inner, columns) = if direction == Direction::Forward { (k, n) } else { (n, k) };
    let right = match weight {
        Weight::Dense(tensor) => Right::Dense(tensor),
        Weight::Quantized(quantized) => Right::Codes(quantized),
    };
    if let Some(residual) = terms.residual {
        out.copy_from(0, residual)?;
    }
    let add = terms.add || terms.residual.is_some();
    simt(direction, x, right, (t, columns, inner), scale, out, add)?;
    let Some((left, right)) = terms.lora else { return Ok(()) };
    let sizes = (t, columns, left.shape()[1]);
    simt(direction, left, Right::Dense(right), sizes, scale, out, true)
}

/// Dropout as kernels take it: seed, step, purpose and layer, threshold, scale of what is kept.
fn mask_args(args: Args, mask: Option<Mask>) -> Args {
    let Some(mask) = mask else { return args.u64(0).u32(0).u32(0).u32(0).f32(1.0) };
    args.u64(mask.seed).u32(mask.step).u32(mask.purpose_layer()).u32(mask.threshold()).f32(mask.scale())
}

/// `x` or `m(x)`.
fn dropped(x: &Tensor, mask: Option<Mask>) -> Result<Tensor> {
    mask.map_or_else(|| Ok(x.clone()), |mask| dropout::apply(x, mask))
}

/// `scale · m(x) · w` `[T, r]` in the type of `x`, where `w` is `[r, K]`, or `[K, r]` if `columns` (without a mask).
fn down(x: &Tensor, w: &Tensor, columns: bool, scale: f32, mask: Option<Mask>, tag: Tag) -> Result<Tensor> {
    let op = "LoRA down";
    let (gpu, (t, k)) = (Gpu::of(x.device())?, x.dims2(op)?);
    let r = w.shape()[usize::from(columns)];
    let kind = if columns { Kind::Columns } else { Kind::Rows };
    if mask.is_none()
        && let Some(out) = narrow::product(kind, x, (w, scale), tag)?
    {
        return Ok(out);
    }
    let mut out = Tensor::empty(&[t, r], x.dtype(), x.device(), tag)?;
    if t == 0 || r == 0 {
        return Ok(out);
    }
    if !(k > 0 && k.is_multiple_of(8) && r.is_multiple_of(2) && sixteen_bits(x, &[w])?) {
        let direction = if columns { Direction::InputGrad } else { Direction::Forward };
        simt(direction, &dropped(x, mask)?, Right::Dense(w), (t, r, k), scale, &mut out, false)?;
        return Ok(out.retag(tag));
    }
    let [rows, cols, inner] = [size(op, t)?, size(op, r)?, size(op, k)?];
    let kind = match (columns, mask) {
        (true, _) => "columns_",
        (false, Some(_)) => "drop_",
        (false, None) => "",
    };
    // Sixteen rows a block where 64 would leave most processors without one.
    let few = rows.div_ceil(64) < gpu.sm_count() / 2;
    let (shape, block_rows, block_cols) = match (cols <= 16, few) {
        (true, true) => ("few_16", 16, 16),
        (true, false) => ("16", 64, 16),
        (false, _) => ("64", 64, 64),
    };
    let kernel = entry(&format!("lora_down_{kind}{shape}"), x.dtype())?;
    let args = Args::new().input(x).input(w).output(&mut out).flops(flops(rows, cols, inner));
    let args = args.u32(rows).u32(cols).u32(inner).f32(scale);
    let grid = [rows.div_ceil(block_rows), across(op, cols.div_ceil(block_cols))?, 1];
    gpu.launch(&LORA, &kernel, grid, [256, 1, 1], 0, mask_args(args, mask))?;
    Ok(out)
}

/// `scale · m(x) · Aᵀ` `[T, r]` for A `[r, K]`, in the type of `x`. Fast if A has that type.
pub(super) fn lora_down(x: &Tensor, a: &Tensor, scale: f32, mask: Option<Mask>, tag: Tag) -> Result<Tensor> {
    down(x, a, false, scale, mask, tag)
}

/// `scale · g · B` `[T, r]` for B `[N, r]`, in the type of `g`. Fast if B has that type.
pub(super) fn lora_grad_down(grad: &Tensor, b: &Tensor, scale: f32, tag: Tag) -> Result<Tensor> {
    down(grad, b, true, scale, None, tag)
}

/// `dx += m(u · A)`; the product is rounded before it is dropped, and after, as on the CPU.
pub(super) fn lora_dropped_add(u: &Tensor, a: &Tensor, mask: Mask, dx: &mut Tensor) -> Result<()> {
    let op = "LoRA input gradient";
    let (gpu, (t, r), (_, k)) = (Gpu::of(u.device())?, u.dims2(op)?, dx.dims2(op)?);
    if t == 0 || k == 0 || r == 0 {
        return Ok(());
    }
    if !(k.is_multiple_of(8) && r.is_multiple_of(2) && sixteen_bits(dx, &[u, a])?) {
        let mut through = Tensor::empty(dx.shape(), u.dtype(), u.device(), Tag::Workspace)?;
        simt(Direction::InputGrad, u, Right::Dense(a), (t, k, r), 1.0, &mut through, false)?;
        return elementwise::add_assign(dx, &dropout::apply(&through, mask)?);
    }
    let [rows, cols, rank] = [size(op, t)?, size(op, k)?, size(op, r)?];
    let kernel = entry("lora_dropped_add", dx.dtype())?;
    let args = Args::new().input(u).input(a).output(dx).flops(flops(rows, cols, rank));
    let args = args.u32(rows).u32(cols).u32(rank);
    let grid = [cols.div_ceil(256), across(op, rows.div_ceil(32))?, 1];
    gpu.launch(&LORA, &kernel, grid, [256, 1, 1], 0, mask_args(args, Some(mask)))
}

/// Slices of `tokens`, and their number, so that about `blocks` blocks run where `tiles` would. At least `least` tokens each.
fn slices(tokens: u32, tiles: u32, blocks: u32, least: u32) -> (u32, u32) {
    let wanted = (blocks / tiles.max(1)).clamp(1, tokens.div_ceil(least).max(1));
    let slice = tokens.div_ceil(wanted).next_multiple_of(32);
    (slice, tokens.div_ceil(slice))
}

/// How the tokens of a gradient of a weight are cut, by kernel.
enum Cut {
    /// lora.cu: slices of so many tokens, and their number.
    Thin(u32, u32),
    /// weight_grad.cu: the same.
    Tiles(u32, u32),
}

/// The cut for `tokens` rows of 16 bits and a gradient `[rows, cols]`; `None` where simt.cu takes them.
fn cut(chip: Chip, tokens: u32, rows: u32, cols: u32, dropped: bool) -> Option<Cut> {
    let (few, many) = (rows.min(cols), rows.max(cols));
    if few <= 32 && few.is_multiple_of(2) && many.is_multiple_of(8) && !(cols < rows && dropped) {
        let (slice, count) = slices(tokens, many.div_ceil(256), 2 * chip.sms, 64);
        return Some(Cut::Thin(slice, count));
    }
    if !(rows.is_multiple_of(8) && cols.is_multiple_of(8)) {
        return None;
    }
    let tiles = cols.div_ceil(128).saturating_mul(rows.div_ceil(128));
    let blocks = if tiles >= chip.sms { 1 } else { 2 * chip.sms };
    let (slice, count) = slices(tokens, tiles, blocks, 128);
    Some(Cut::Tiles(slice, count))
}

/// Bytes of workspace of [`weight_grad`] for `tokens` rows of 16 bits and a gradient `[n, k]` on this kind of GPU. (That of
/// sizes which no tensor core takes is not counted.)
pub fn weight_grad_workspace(chip: Chip, tokens: usize, n: usize, k: usize, dropped: bool) -> usize {
    let [t, rows, cols] = [tokens, n, k].map(|size| u32::try_from(size).unwrap_or(u32::MAX));
    let partial = |count: u32| count as usize * n * k * size_of::<f32>();
    let (few, many) = (n.min(k), n.max(k));
    let narrow = narrow::workspace(chip, Kind::Grads { transposed: n <= k }, tokens, [many, tokens], &[few]);
    if let (Some(bytes), false) = (narrow, dropped) {
        return bytes;
    }
    match cut(chip, t, rows, cols, dropped) {
        Some(Cut::Thin(_, count)) => partial(count),
        Some(Cut::Tiles(_, count)) => {
            (if count > 1 { partial(count) } else { 0 }) + if dropped { tokens * k * DType::BF16.size() } else { 0 }
        }
        None => 0,
    }
}

/// `scale · gᵀ · m(x)` as f32 `[N, K]`.
pub(super) fn weight_grad(grad: &Tensor, x: &Tensor, scale: f32, mask: Option<Mask>) -> Result<Tensor> {
    let op = "weight gradient";
    let (gpu, (t, n), (_, k)) = (Gpu::of(grad.device())?, grad.dims2(op)?, x.dims2(op)?);
    let empty = |shape: &[usize], tag| Tensor::empty(shape, DType::F32, grad.device(), tag);
    if t == 0 || n == 0 || k == 0 {
        return Tensor::zeros(&[n, k], DType::F32, grad.device(), Tag::Gradients);
    }
    if mask.is_none() {
        // Of A the rank is the rows of the gradient, of B the columns.
        let (large, small, kind) = match n <= k {
            true => (x, grad, Kind::Grads { transposed: true }),
            false => (grad, x, Kind::Grads { transposed: false }),
        };
        if let Some(out) = narrow::product(kind, large, (small, scale), Tag::Gradients)? {
            return Ok(out);
        }
    }
    let [tokens, rows, cols] = [size(op, t)?, size(op, n)?, size(op, k)?];
    let pairs = sixteen_bits(grad, &[x])?;
    let cut = if pairs { cut(gpu.chip(), tokens, rows, cols, mask.is_some()) } else { None };
    if let Some(Cut::Thin(slice, count)) = cut {
        let (few, many, transposed) = (rows.min(cols), rows.max(cols), cols < rows);
        let (small, large) = if transposed { (x, grad) } else { (grad, x) };
        let tiles = many.div_ceil(256);
        let mut partial = empty(&[count as usize, few as usize, many as usize], Tag::Workspace)?;
        let width = if few <= 16 { 16 } else { 32 };
        let drop = if mask.is_some() { "drop_" } else { "" };
        let kernel = entry(&format!("lora_grad_{drop}{width}"), x.dtype())?;
        let args = Args::new().input(small).input(large).output(&mut partial).flops(flops(tokens, few, many));
        let args = mask_args(args.u32(tokens).u32(few).u32(many).u32(slice), mask);
        gpu.launch(&LORA, &kernel, [tiles, across(op, count)?, 1], [256, 1, 1], 0, args)?;
        let mut out = empty(&[n, k], Tag::Gradients)?;
        sum(gpu, &partial, &mut out, (count, few, many), scale, transposed)?;
        return Ok(out);
    }
    let x = &dropped(x, mask)?;
    let mut out = empty(&[n, k], Tag::Gradients)?;
    let Some(Cut::Tiles(slice, count)) = cut else {
        simt(Direction::WeightGrad, grad, Right::Dense(x), (n, k, t), scale, &mut out, false)?;
        return Ok(out);
    };
    let kernel = entry("weight_grad", x.dtype())?;
    let (across_x, across_y) = (cols.div_ceil(128), across(op, rows.div_ceil(128))?);
    let launch = |to: &mut Tensor, scale: f32| {
        let args = Args::new().input(grad).input(x).output(to).flops(flops(tokens, rows, cols));
        let args = args.u32(tokens).u32(rows).u32(cols).u32(slice).f32(scale);
        gpu.launch(&WEIGHT_GRAD, &kernel, [across_x, across_y, count], [256, 1, 1], 0, args)
    };
    if count == 1 {
        launch(&mut out, scale)?;
    } else {
        let mut partial = empty(&[count as usize, n, k], Tag::Workspace)?;
        launch(&mut partial, 1.0)?;
        sum(gpu, &partial, &mut out, (count, rows, cols), scale, false)?;
    }
    Ok(out)
}

/// Floating-point operations of a product of these sizes.
fn flops(a: u32, b: u32, c: u32) -> f64 {
    2.0 * f64::from(a) * f64::from(b) * f64::from(c)
}

/// `out = scale · Σ partial` over the first index of `partial` `[count, few, many]`, transposed or not.
fn sum(
    gpu: &Gpu,
    partial: &Tensor,
    out: &mut Tensor,
    (count, few, many): (u32, u32, u32),
    scale: f32,
    transposed: bool,
) -> Result<()> {
    let args = Args::new().input(partial).output(out).u32(count).u32(few).u32(many).f32(scale).u32(transposed.into());
    gpu.launch(&LORA, "lora_sum", [many.div_ceil(256), across("weight gradient", few)?, 1], [256, 1, 1], 0, args)
}

/// `out = scale · (x · Wᵀ + t · Bᵀ) + …` by the terms for at most [`DECODE_TOKENS`] rows of `x`; `false` where no kernel
/// takes them. Rounded once; a weight of codes is not rounded to a type.
pub(super) fn decode(x: &Tensor, weight: &Weight, scale: f32, terms: Terms, out: &mut Tensor) -> Result<bool> {
    let op = "decoding product";
    let (gpu, (t, k), (n, _)) = (Gpu::of(x.device())?, x.dims2(op)?, weight.dims()?);
    let (left, right) = (terms.lora.map(|(left, _)| left), terms.lora.map(|(_, right)| right));
    let types_fit = [left, right].iter().flatten().all(|part| part.dtype() == x.dtype())
        && (out.dtype() == x.dtype() || out.dtype() == DType::F32);
    let rows_fit = match weight {
        Weight::Dense(w) => k.is_multiple_of(8) && sixteen_bits(x, &[w])?,
        Weight::Quantized(q) => {
            k.is_multiple_of(64) && q.block_size >= 64 && sixteen_bits(x, &[])? && aligned(&q.packed, 8)?
        }
    };
    if !(types_fit && rows_fit && (1..=DECODE_TOKENS).contains(&t) && n > 0 && k > 0) {
        return Ok(false);
    }
    let [tokens, rows, inner] = [size(op, t)?, size(op, n)?, size(op, k)?];
    let rank = size(op, left.map_or(0, |left| left.shape()[1]))?;
    let (width, full) = (if t <= 8 { 8 } else { 16 }, out.dtype() == DType::F32);
    let add = terms.add;
    let terms =
        |args: Args, out: &mut Tensor| args.output(out).input_opt(left).input_opt(right).input_opt(terms.residual);
    let sizes =
        |args: Args| args.u32(rows).u32(inner).u32(tokens).u32(rank).f32(scale).u32(add.into()).u32(full.into());
    match weight {
        Weight::Dense(w) => {
            // Sixteen rows a block where 64 would leave most processors without one.
            let (few, block_rows) = if rows.div_ceil(64) < 2 * gpu.sm_count() { ("few_", 16) } else { ("", 64) };
            let kernel = entry(&format!("decode_dense_{few}{width}"), x.dtype())?;
            let args = sizes(terms(Args::new().input(x).input(w), out));
            gpu.launch(&DECODE, &kernel, [rows.div_ceil(block_rows), 1, 1], [256, 1, 1], 0, args)?;
        }
        Weight::Quantized(quantized) => {
            let codes = Codes::of(op, quantized)?;
            let kernel = entry(&format!("decode_codes_{width}"), x.dtype())?;
            let args = terms(Args::new().input(x).input(&quantized.packed), out);
            let args = args.input_opt(codes.absmax).input_opt(codes.nested).input_opt(codes.map);
            let args = sizes(args).u32(codes.quant_type).u32(codes.block_shift).u32(codes.nested_shift);
            let args = args.input_opt(codes.offset);
            // A block makes its table once; many rows take turns in the blocks that run at once.
            let tiles = rows.div_ceil(16);
            let blocks = if tiles <= 8 * gpu.sm_count() { tiles } else { 3 * gpu.sm_count() };
            gpu.launch(&DECODE, &kernel, [blocks, 1, 1], [256, 1, 1], 0, args)?;
        }
    }
    Ok(true)
}
