//! Checks and launches.

use super::{Factors, MOST_ROWS, Part};
use crate::{
    attention::Heads,
    cast::cuda::code,
    cuda::{entry, hopper, one, size},
    linear::Codes,
    quantize::{QuantTensor, QuantType},
    rotary::RotaryTable,
};
use nibble_runtime::{
    DType, Device, Error, Result, Tag, Tensor,
    cuda::{Args, Chip, Entry, Gpu, Module},
};

const OP: &str = "decoding step";

const PRODUCT: &[usize] = &[320];
const LOW_RANK: &[usize] = &[80];
const ATTEND: &[usize] = &[88];

const LINEAR_ENTRIES: &[Entry] = &[
    one("decoding_plain_8_f16", PRODUCT),
    one("decoding_plain_16_f16", PRODUCT),
    one("decoding_turn_8_f16", PRODUCT),
    one("decoding_turn_16_f16", PRODUCT),
    one("decoding_gate_8_f16", PRODUCT),
    one("decoding_gate_16_f16", PRODUCT),
    one("decoding_low_rank_f16", LOW_RANK),
    one("decoding_plain_8_bf16", PRODUCT),
    one("decoding_plain_16_bf16", PRODUCT),
    one("decoding_turn_8_bf16", PRODUCT),
    one("decoding_turn_16_bf16", PRODUCT),
    one("decoding_gate_8_bf16", PRODUCT),
    one("decoding_gate_16_bf16", PRODUCT),
    one("decoding_low_rank_bf16", LOW_RANK),
];

pub(crate) static LINEAR: Module =
    Module { name: "decoding_linear", ptx: include_str!("../../ptx/decoding_linear.ptx"), entries: LINEAR_ENTRIES };
/// The same source for Hopper, where a product starts while the launch before it ends.
pub(crate) static LINEAR_HOPPER: Module = Module {
    name: "decoding_linear_sm90a",
    ptx: include_str!("../../ptx/decoding_linear_sm90a.ptx"),
    entries: LINEAR_ENTRIES,
};

/// Hopper's own products.
pub(crate) static RING_HOPPER: Module = Module {
    name: "decoding_ring_sm90a",
    ptx: include_str!("../../ptx/decoding_ring_sm90a.ptx"),
    entries: &[
        one("decoding_ring1_plain_8_f16", PRODUCT),
        one("decoding_ring1_plain_16_f16", PRODUCT),
        one("decoding_ring4_plain_8_f16", PRODUCT),
        one("decoding_ring4_plain_16_f16", PRODUCT),
        one("decoding_ring1_turn_8_f16", PRODUCT),
        one("decoding_ring1_turn_16_f16", PRODUCT),
        one("decoding_ring4_turn_8_f16", PRODUCT),
        one("decoding_ring4_turn_16_f16", PRODUCT),
        one("decoding_ring1_gate_8_f16", PRODUCT),
        one("decoding_ring1_gate_16_f16", PRODUCT),
        one("decoding_ring4_gate_8_f16", PRODUCT),
        one("decoding_ring4_gate_16_f16", PRODUCT),
        one("decoding_ring1_plain_8_bf16", PRODUCT),
        one("decoding_ring1_plain_16_bf16", PRODUCT),
        one("decoding_ring4_plain_8_bf16", PRODUCT),
        one("decoding_ring4_plain_16_bf16", PRODUCT),
        one("decoding_ring1_turn_8_bf16", PRODUCT),
        one("decoding_ring1_turn_16_bf16", PRODUCT),
        one("decoding_ring4_turn_8_bf16", PRODUCT),
        one("decoding_ring4_turn_16_bf16", PRODUCT),
        one("decoding_ring1_gate_8_bf16", PRODUCT),
        one("decoding_ring1_gate_16_bf16", PRODUCT),
        one("decoding_ring4_gate_8_bf16", PRODUCT),
        one("decoding_ring4_gate_16_bf16", PRODUCT),
    ],
};

fn linear(gpu: &Gpu) -> &'static Module {
    if hopper(gpu.chip()) { &LINEAR_HOPPER } else { &LINEAR }
}

pub(crate) static ATTENTION: Module = Module {
    name: "decoding_attention",
    ptx: include_str!("../../ptx/decoding_attention.ptx"),
    entries: &[
        one("decoding_attend_d64_f16", ATTEND),
        one("decoding_attend_d96_f16", ATTEND),
        one("decoding_attend_d128_f16", ATTEND),
        one("decoding_attend_d64_bf16", ATTEND),
        one("decoding_attend_d96_bf16", ATTEND),
        one("decoding_attend_d128_bf16", ATTEND),
    ],
};

/// Threads of a block of the products, and the shared memory of its table.
const PRODUCT_THREADS: u32 = 512;
const TABLE_BYTES: usize = 64 << 10;
const LOW_THREADS: usize = 256;
/// Keys of a tile, rows and threads of a block, and chunks of a sequence's keys at most, of attention.
const KEYS: usize = 64;
const ATTEND_ROWS: usize = 16;
const ATTEND_THREADS: u32 = 128;
const MOST_PARTS: usize = 32;

/// How Hopper's own kernel takes a product.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Ring {
    /// Blocks of a cluster, which share the inner dimension.
    cluster: u32,
    /// Bytes of a block.
    shared: usize,
}

impl Ring {
    /// The largest inner dimension of which a block holds x.
    const INNER: usize = 4096;
    const THREADS: u32 = 640;

    /// Of `rows` rows; `None` where product.cuh's kernel takes it.
    fn of(chip: Chip, rows: usize, k: usize) -> Option<Ring> {
        if !hopper(chip) || !k.is_multiple_of(256) || k > 4 * Ring::INNER {
            return None;
        }
        let (columns, cluster) = (rows.div_ceil(8), if k <= Ring::INNER { 1 } else { 4 });
        let shared = 256 * 128 + (2 * 16 * columns + 2 * 4) * 512 + 256 + 3 * (16 * (2048 + 32) + 4096);
        Some(Ring { cluster, shared })
    }

    /// Launches `kernel` for weights in `tiles`.
    fn launch(self, gpu: &Gpu, kernel: &str, dtype: DType, tiles: u32, args: Args) -> Result<()> {
        let Ring { cluster, shared } = self;
        let (module, threads) = (&RING_HOPPER, Ring::THREADS);
        let name = entry(&format!("decoding_ring{cluster}_{kernel}"), dtype)?;
        let at_once = match cluster {
            1 => gpu.sm_count(),
            _ => gpu.clusters_at_once(module, &name, cluster, threads, shared)?,
        };
        gpu.launch(module, &name, [cluster * tiles.min(at_once.max(1)), 1, 1], [threads, 1, 1], shared, args.early())
    }
}

fn misfit(what: String) -> Error {
    Error::shape(OP, what)
}

/// Checks type and shape.
fn check(name: &str, tensor: &Tensor, dtype: DType, shape: &[usize]) -> Result<()> {
    if (tensor.dtype(), tensor.shape()) != (dtype, shape) {
        return Err(misfit(format!("{name} is {tensor:?}; expected {dtype} {shape:?}")));
    }
    Ok(())
}

/// `(T, K)` of an input in a 16-bit type, after a check of its table of tokens.
fn rows_of(x: &Tensor, tokens: &Tensor) -> Result<(usize, usize)> {
    let (rows, k) = x.dims2(OP)?;
    if !(1..=MOST_ROWS).contains(&rows) || !matches!(x.dtype(), DType::F16 | DType::BF16) || !k.is_multiple_of(16) {
        return Err(misfit(format!(
            "input {x:?}; expected 1 to {MOST_ROWS} rows of 16 bits, their width a multiple of 16"
        )));
    }
    check("table of tokens", tokens, DType::I32, &[rows, 4])?;
    Ok((rows, k))
}

fn check_device(tensors: &[&Tensor], device: Device) -> Result<()> {
    match tensors.iter().find(|tensor| tensor.device() != device) {
        Some(other) => Err(Error::invalid(OP, format!("operands on {device} and {}", other.device()))),
        None => Ok(()),
    }
}

/// `normalized = rmsnorm(x)` with the norm's weight and ε, where there is one; and `t` `[T, R]`, where there are factors: `s·Aᵀ`
/// of it (or of `x`) in the columns of a row's adapter, and zeros elsewhere.
///
/// # Errors
/// Shapes or types do not fit.
pub fn low_rank(
    x: &Tensor,
    norm: Option<(&Tensor, f32, &mut Tensor)>,
    factors: Option<(&Factors, &mut Tensor)>,
    tokens: &Tensor,
) -> Result<()> {
    let (rows, k) = rows_of(x, tokens)?;
    let columns = factors.as_ref().map_or(0, |(factors, _)| factors.a.shape()[0]);
    if columns == 0 && norm.is_none() {
        return Ok(());
    }
    check_device(&[tokens], x.device())?;
    let args = Args::new().input(x);
    let (weight, eps, normalized) = match norm {
        Some((weight, eps, normalized)) => {
            check("norm", weight, weight.dtype(), &[k])?;
            check("normalized rows", normalized, x.dtype(), x.shape())?;
            check_device(&[weight, normalized], x.device())?;
            (Some(weight), eps, Some(normalized))
        }
        None => (None, 0.0, None),
    };
    let kind = weight.map_or(Ok(0), |weight| code(weight.dtype()))?;
    let normalizing = if weight.is_some() { k.div_ceil(8 * LOW_THREADS) } else { 0 };
    let args = args.input_opt(weight);
    let (args, t) = match factors {
        Some((Factors { a, owners, scales }, t)) => {
            check("A", a, x.dtype(), &[columns, k])?;
            check("owners of A's rows", owners, DType::I32, &[columns])?;
            check("scales of A's rows", scales, DType::F32, &[columns])?;
            check("t", t, x.dtype(), &[rows, columns])?;
            check_device(&[a, owners, scales, t], x.device())?;
            (args.input(a).input(owners).input(scales), Some(t))
        }
        None => (args.input_opt(None).input_opt(None).input_opt(None), None),
    };
    let args = args.input(tokens).output_opt(normalized).output_opt(t);
    let args = args.u32(kind).u32(size(OP, k)?).u32(size(OP, columns)?).f32(eps);
    let (name, grid) = (entry("decoding_low_rank", x.dtype())?, [size(OP, columns.max(normalizing))?, rows as u32, 1]);
    let args = Args::new().structure(args);
    let gpu = Gpu::of(x.device())?;
    gpu.launch(linear(gpu), &name, grid, [LOW_THREADS as u32, 1, 1], 0, args)
}

/// The structure of a part, after a check of its shapes for an input of `k` elements and `t` of `columns`.
fn part_args(part: &Part, k: usize, columns: usize, dtype: DType, device: Device) -> Result<Args> {
    let Part { weight, b, gains, column } = *part;
    let codes = Codes::of(OP, weight)?;
    let [n, inner] = weight.shape[..] else { return Err(misfit(format!("weight {:?}", weight.shape))) };
    let nested = codes.block_shift == 6 && codes.nested.is_some() && codes.nested_shift == 8;
    if inner != k || !k.is_multiple_of(64) || !nested || u32::try_from(n * k).is_err() {
        let (shape, block) = (&weight.shape, weight.block_size);
        let what =
            format!("weight {shape:?} in blocks of {block} for inputs of {k}; expected blocks of 64, nested in 256");
        return Err(misfit(what));
    }
    let rank = b.map_or(Ok(0), |b| b.dims2(OP).map(|(_, rank)| rank))?;
    if let Some(b) = b {
        check("B", b, dtype, &[n, rank])?;
    }
    if !rank.is_multiple_of(2) || !column.is_multiple_of(2) || column + rank > columns {
        return Err(misfit(format!("columns {column}..+{rank} of {columns}; expected even numbers")));
    }
    if let Some(gains) = gains {
        check("gains", gains, DType::F32, &[gains.dims2(OP)?.0, n])?;
    }
    check_device(&codes.tensors().chain([&weight.packed]).chain(b).chain(gains).collect::<Vec<_>>(), device)?;
    if !weight.packed.device_pointer()?.is_multiple_of(16) {
        return Err(misfit("codes begin at an odd address".into()));
    }
    let args = Args::new().input(&weight.packed).input_opt(codes.absmax).input_opt(codes.nested).input_opt(codes.map);
    let args = args.input_opt(codes.offset).input_opt(b).input_opt(gains);
    Ok(args.u32(size(OP, n)?).u32(size(OP, rank)?).u32(size(OP, column)?).u32(0))
}

/// Which product, and what it gives its results to.
struct Into<'a> {
    kernel: &'static str,
    /// Tiles of two times eight rows of weights.
    tiles: usize,
    residual: Option<&'a Tensor>,
    y: &'a mut Tensor,
    /// Keys, values, angles.
    cache: Option<(&'a mut Tensor, &'a mut Tensor, &'a RotaryTable)>,
}

fn product(x: &Tensor, parts: &[Part], t: Option<&Tensor>, tokens: &Tensor, into: Into) -> Result<()> {
    let (rows, k) = rows_of(x, tokens)?;
    let (gpu, device, dtype) = (Gpu::of(x.device())?, x.device(), x.dtype());
    let columns = t.map_or(Ok(0), |t| t.dims2(OP).map(|(_, columns)| columns))?;
    if let Some(t) = t {
        check("t", t, dtype, &[rows, columns])?;
    }
    check_device(&[tokens, &*into.y].into_iter().chain(t).chain(into.residual).collect::<Vec<_>>(), device)?;
    let quant_type = parts[0].weight.quant_type;
    if parts.iter().any(|part| part.weight.quant_type != quant_type) {
        return Err(misfit("the weights have code books of two kinds".into()));
    }
    let flops: f64 = parts.iter().map(|part| 2.0 * (rows * part.weight.numel()) as f64).sum();
    let mut args = Args::new().flops(flops);
    for i in 0..3 {
        args = args.structure(part_args(parts.get(i).unwrap_or(&parts[0]), k, columns, dtype, device)?);
    }
    let args = args.input(x).input_opt(t).input(tokens).input_opt(into.residual).output(into.y);
    let (args, half, length) = match into.cache {
        Some((keys, values, rope)) => {
            let args = args.output(keys).output(values).input(&rope.cos).input(&rope.sin);
            (args, rope.cos.shape()[1], rope.len())
        }
        None => (args.input_opt(None).input_opt(None).input_opt(None).input_opt(None), 0, 0),
    };
    let (tiles, padded) = (size(OP, into.tiles)?, if rows <= 8 { 8 } else { 16 });
    // Angles are counted in 32 bits.
    size(OP, length * half)?;
    let args = args.u32(size(OP, k)?).u32(rows as u32).u32(size(OP, columns)?).u32(size(OP, half)?);
    let args = args.u32(size(OP, length)?).u32(tiles);
    let args = Args::new().structure(args.u32(u32::from(quant_type == QuantType::Fp4)).u32(0));
    let kernel = format!("{}_{padded}", into.kernel);
    if let (Some(ring), true) = (Ring::of(gpu.chip(), rows, k), words_of_scales(parts)?) {
        return ring.launch(gpu, &kernel, dtype, tiles, args);
    }
    let name = entry(&format!("decoding_{kernel}"), dtype)?;
    let module = linear(gpu);
    let args = if std::ptr::eq(module, &LINEAR_HOPPER) { args.early() } else { args };
    gpu.launch(module, &name, [tiles.min(gpu.sm_count()), 1, 1], [PRODUCT_THREADS, 1, 1], TABLE_BYTES, args)
}

/// Whether four bytes of scales may be read at once where a row has a multiple of them.
fn words_of_scales(parts: &[Part]) -> Result<bool> {
    let mut all = true;
    for part in parts {
        if let Some(absmax) = Codes::of(OP, part.weight)?.absmax {
            all &= absmax.device_pointer()?.is_multiple_of(4);
        }
    }
    Ok(all)
}

fn outputs(weight: &QuantTensor) -> usize {
    weight.shape[0]
}

/// `y = gains ∘ (x·Wᵀ + t·Bᵀ) + residual`, `[T, N]`.
///
/// # Errors
/// Shapes or types do not fit.
pub fn add(
    x: &Tensor,
    part: Part,
    t: Option<&Tensor>,
    residual: Option<&Tensor>,
    tokens: &Tensor,
    y: &mut Tensor,
) -> Result<()> {
    let shape = [x.shape()[0], outputs(part.weight)];
    for tensor in residual.into_iter().chain([&*y]) {
        check("result or residual", tensor, x.dtype(), &shape)?;
    }
    let tiles = shape[1].div_ceil(16);
    product(x, &[part], t, tokens, Into { kernel: "plain", tiles, residual, y, cache: None })
}

/// `a = silu(gate)·up`, `[T, F]`, of the products with the two parts.
///
/// # Errors
/// Shapes or types do not fit.
pub fn gate(x: &Tensor, parts: [Part; 2], t: Option<&Tensor>, tokens: &Tensor, a: &mut Tensor) -> Result<()> {
    let width = outputs(parts[0].weight);
    if outputs(parts[1].weight) != width {
        return Err(misfit(format!("gate of {width} and up of {}", outputs(parts[1].weight))));
    }
    check("result", a, x.dtype(), &[x.shape()[0], width])?;
    product(x, &parts, t, tokens, Into { kernel: "gate", tiles: width.div_ceil(8), residual: None, y: a, cache: None })
}

/// q `[T, H·d]`, turned, and the tokens' rows of the cache `[capacity, G·d]`: k, turned, and v. Positions beyond `rope` count as
/// its last; that rows are within the cache is for the caller to see to.
///
/// # Errors
/// Shapes or types do not fit.
pub fn turn(
    x: &Tensor,
    parts: [Part; 3],
    t: Option<&Tensor>,
    tokens: &Tensor,
    rope: &RotaryTable,
    q: &mut Tensor,
    (keys, values): (&mut Tensor, &mut Tensor),
) -> Result<()> {
    let [wide, narrow, of_values] = parts.map(|part| outputs(part.weight));
    let head = 2 * rope.cos.shape()[1];
    check("q", q, x.dtype(), &[x.shape()[0], wide])?;
    let capacity = keys.dims2(OP)?.0;
    check("keys", keys, x.dtype(), &[capacity, narrow])?;
    check("values", values, x.dtype(), &[capacity, narrow])?;
    check_device(&[keys, values, &rope.cos], x.device())?;
    if of_values != narrow
        || head == 0
        || !head.is_multiple_of(16)
        || !(wide % head == 0 && narrow % head == 0)
        || rope.is_empty()
    {
        return Err(misfit(format!("q of {wide}, k of {narrow} and v of {of_values} in heads of {head}")));
    }
    let into = Into {
        kernel: "turn",
        tiles: (wide + 2 * narrow) / 16,
        residual: None,
        y: q,
        cache: Some((keys, values, rope)),
    };
    product(x, &parts, t, tokens, into)
}

/// What [`attend`] works in, for so many rows.
#[derive(Debug)]
pub struct Scratch {
    parts: usize,
    o: Tensor,
    lse: Tensor,
    arrived: Tensor,
}

impl Scratch {
    /// For `rows` rows.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(rows: usize, heads: Heads, device: Device) -> Result<Self> {
        // Enough blocks for all multiprocessors, and no more of a long sequence's than a warp sums up.
        let parts = (64 / rows.max(1)).clamp(4, MOST_PARTS);
        let floats = |shape: &[usize]| Tensor::empty(shape, DType::F32, device, Tag::Workspace);
        let arrived = Tensor::zeros(&[rows, heads.kv], DType::I32, device, Tag::Workspace)?;
        let (o, lse) = (floats(&[rows, parts, heads.query, heads.dim])?, floats(&[rows, parts, heads.query])?);
        Ok(Scratch { parts, o, lse, arrived })
    }
}

/// `o` `[T, H·d]`: attention of each row of `q` to the keys of its sequence in the cache, up to its own position.
///
/// # Errors
/// Shapes or types do not fit, or there is no kernel for the heads.
pub fn attend(
    q: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    tokens: &Tensor,
    heads: Heads,
    scratch: &mut Scratch,
    o: &mut Tensor,
) -> Result<()> {
    let (rows, _) = rows_of(q, tokens)?;
    let capacity = keys.dims2(OP)?.0;
    check("q", q, q.dtype(), &[rows, heads.query * heads.dim])?;
    check("result", o, q.dtype(), q.shape())?;
    for tensor in [keys, values] {
        check("cache", tensor, q.dtype(), &[capacity, heads.kv * heads.dim])?;
    }
    check("scratch", &scratch.lse, DType::F32, &[rows, scratch.parts, heads.query])?;
    check_device(&[keys, values, tokens, &scratch.o, &*o], q.device())?;
    if !super::fits_heads(heads) {
        return Err(misfit(format!("no kernel for {heads:?}")));
    }
    let parts = scratch.parts;
    let args = Args::new().input(q).input(keys).input(values).input(tokens).output(&mut scratch.o);
    let args = args.output(&mut scratch.lse).output(&mut scratch.arrived).output(o);
    let args = args.u32(size(OP, heads.query)?).u32(size(OP, heads.query / heads.kv)?).u32(size(OP, heads.dim)?);
    let args = args.u32(size(OP, parts)?).f32(heads.scale() * std::f32::consts::LOG2_E).u32(0);
    let dim = [64, 96, 128].into_iter().find(|&dim| heads.dim <= dim).unwrap_or(128);
    let name = entry(&format!("decoding_attend_d{dim}"), q.dtype())?;
    let (grid, shared) = ([size(OP, rows * parts)?, size(OP, heads.kv)?, 1], (ATTEND_ROWS + 4 * KEYS) * dim * 2);
    Gpu::of(q.device())?.launch(&ATTENTION, &name, grid, [ATTEND_THREADS, 1, 1], shared, Args::new().structure(args))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_suit_the_shape() {
        let ring = |rows, k| Ring::of(Chip { capability: (9, 0), sms: 132 }, rows, k);
        let cluster = |rows, k| ring(rows, k).map(|ring| ring.cluster);
        assert_eq!((cluster(1, 4096), cluster(16, 14336)), (Some(1), Some(4)));
        assert_eq!((cluster(1, 576), cluster(1, 16640)), (None, None));
        assert_eq!(Ring::of(Chip { capability: (8, 0), sms: 108 }, 1, 4096), None);
        // With tables of scales.
        assert!(ring(16, 4096).unwrap().shared + 3200 <= 227 << 10);
    }
}
