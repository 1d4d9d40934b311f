//! Attention on a GPU: work tables, checks and launches. The kernels are in `forward.cuh`, `decode.cuh` and `backward.cuh`
//! (16 bits, tensor cores) and in `attention_simple.cu` (f32, and odd sizes of heads); Hopper's own are launched by `hopper`.

use super::{Heads, Layout, Saved, Segment, hopper};
use crate::{
    cuda::{check_dtype, entry, one, size},
    rotary::Turn,
};
use nibble_runtime::{
    DType, Device, Error, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

/// Query rows, and key rows, of an entry of a table at most.
pub(super) const TILE: usize = 128;
/// Keys of a tile of the 16-bit kernels; backward, also those of a block.
const KEYS: usize = 64;
/// Threads of a block of the 16-bit kernels, and of the simple ones.
const THREADS: u32 = 128;
const SIMPLE_THREADS: u32 = 256;
/// Query rows that a block of the delta kernel takes.
const DELTA_ROWS: usize = 16;
/// Rows (query and head of a group) of a block in decoding.
const DECODE_ROWS: usize = 16;
/// With more queries than this in a segment there are enough blocks without cutting the keys into chunks.
const DECODE_QUERIES: usize = 16;
/// Keys of a chunk: at least this many, and more so that there are about [`DECODE_CHUNKS`] chunks at most.
const DECODE_KEYS: usize = 128;
const DECODE_CHUNKS: usize = 64;

const FORWARD: &[usize] = &[8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4];
const COMBINE: &[usize] = &[8, 8, 8, 8, 8, 4, 4, 4, 4];
const DELTA: &[usize] = &[8, 8, 8, 4, 4, 4];
const BACKWARD_KEYS: &[usize] = &[8, 8, 8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4];
const BACKWARD_QUERIES: &[usize] = &[8, 8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4];
const SIMPLE_KEYS: &[usize] = &[8, 8, 8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4];
const SIMPLE_QUERIES: &[usize] = &[8, 8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4];

const ENTRIES: &[Entry] = &[
    one("attention_forward_f16", FORWARD),
    one("attention_forward_bf16", FORWARD),
    one("attention_decode_f16", FORWARD),
    one("attention_decode_bf16", FORWARD),
    one("attention_combine_f16", COMBINE),
    one("attention_combine_bf16", COMBINE),
    one("attention_delta_f16", DELTA),
    one("attention_delta_bf16", DELTA),
    one("attention_keys_f16", BACKWARD_KEYS),
    one("attention_keys_bf16", BACKWARD_KEYS),
    one("attention_queries_f16", BACKWARD_QUERIES),
    one("attention_queries_bf16", BACKWARD_QUERIES),
];

/// Heads of up to 64 elements, in 16 bits.
pub(crate) static D64: Module =
    Module { name: "attention_d64", ptx: include_str!("../../ptx/attention_d64.ptx"), entries: ENTRIES };
/// Heads of up to 96 elements, in 16 bits.
pub(crate) static D96: Module =
    Module { name: "attention_d96", ptx: include_str!("../../ptx/attention_d96.ptx"), entries: ENTRIES };
/// Heads of up to 128 elements, in 16 bits.
pub(crate) static D128: Module =
    Module { name: "attention_d128", ptx: include_str!("../../ptx/attention_d128.ptx"), entries: ENTRIES };
/// Every other size and type.
pub(crate) static SIMPLE: Module = Module {
    name: "attention_simple",
    ptx: include_str!("../../ptx/attention_simple.ptx"),
    entries: &[
        Entry { name: "attention_delta", floats: true, params: DELTA },
        one("attention_simple_forward_d64_f32", FORWARD),
        one("attention_simple_forward_d128_f32", FORWARD),
        Entry { name: "attention_simple_forward_d256", floats: true, params: FORWARD },
        one("attention_simple_keys_d64_f32", SIMPLE_KEYS),
        one("attention_simple_keys_d128_f32", SIMPLE_KEYS),
        Entry { name: "attention_simple_keys_d256", floats: true, params: SIMPLE_KEYS },
        one("attention_simple_queries_d64_f32", SIMPLE_QUERIES),
        one("attention_simple_queries_d128_f32", SIMPLE_QUERIES),
        Entry { name: "attention_simple_queries_d256", floats: true, params: SIMPLE_QUERIES },
    ],
};

/// Work for the kernels, i32 `[_, 4]` each. Longest first, so that no block starts late and ends last.
#[derive(Clone, Debug)]
pub(super) struct Tables {
    /// Tiles of queries: first query row, rows, first key row of the sequence, keys that the first query sees.
    pub(super) queries: Tensor,
    /// Tiles of keys: first key row, rows from there to the end of the sequence, the tile's number among all, its number in
    /// its sequence.
    pub(super) keys: Tensor,
    /// Few queries against many keys.
    decode: Option<Decode>,
}

#[derive(Clone, Debug)]
struct Decode {
    /// Two rows a chunk: first query row, queries, first key row, keys; keys that the first query sees, 0, 0, 0.
    chunks: Tensor,
    /// One a query: first chunk, chunks, number of the query in its segment, 0.
    rows: Tensor,
    /// Most queries of a segment.
    most: usize,
}

type Row = [i32; 4];

/// Tiles of at most [`TILE`] queries, and of as many keys, of each segment.
fn tiles(segments: &[Segment]) -> (Vec<Row>, Vec<Row>) {
    let row = |values: [usize; 4]| values.map(|value| value as i32); // `Layout::new` checked the largest
    let (mut queries, mut keys) = (Vec::new(), Vec::new());
    for s in segments {
        for first in (0..s.queries).step_by(TILE) {
            let left = s.queries - first;
            queries.push(row([s.query + first, TILE.min(left), s.key, s.keys - s.queries + first + 1]));
            keys.push(row([s.query + first, left, keys.len(), first / TILE]));
        }
    }
    queries.sort_by_key(|&[_, rows, _, visible]| std::cmp::Reverse(visible + rows));
    keys.sort_by_key(|&[_, rows, _, _]| std::cmp::Reverse(rows));
    (queries, keys)
}

/// Chunks of the keys of each segment, and for each query its chunks.
fn chunks(segments: &[Segment]) -> (Vec<Row>, Vec<Row>) {
    let row = |values: [usize; 4]| values.map(|value| value as i32);
    let (mut chunks, mut rows): (Vec<Row>, Vec<Row>) = (Vec::new(), Vec::new());
    for s in segments.iter().filter(|s| s.queries > 0) {
        let length = s.keys.div_ceil(DECODE_CHUNKS).next_multiple_of(KEYS).max(DECODE_KEYS);
        let (first, count) = (chunks.len() / 2, s.keys.div_ceil(length));
        for start in (0..s.keys).step_by(length) {
            chunks.push(row([s.query, s.queries, s.key + start, length.min(s.keys - start)]));
            chunks.push([(s.keys - s.queries + 1) as i32 - start as i32, 0, 0, 0]);
        }
        rows.extend((0..s.queries).map(|query| row([first, count, query, 0])));
    }
    (chunks, rows)
}

impl Tables {
    /// Makes the tables and starts their copy.
    pub(super) fn new(segments: &[Segment], device: Device) -> Result<Self> {
        let (queries, keys) = tiles(segments);
        let most = segments.iter().map(|s| s.queries).max().unwrap_or(0);
        let decodes = most <= DECODE_QUERIES && segments.iter().any(|s| s.keys >= s.queries + KEYS);
        let (chunks, rows) = if decodes { chunks(segments) } else { Default::default() };
        let all: Vec<i32> = [&queries, &keys, &chunks, &rows].into_iter().flatten().flatten().copied().collect();
        let all = Tensor::from_slice(&all, &[all.len() / 4, 4], Tag::Workspace)?.to_device(device, Tag::Workspace)?;
        let mut start = 0;
        let mut part = |rows: &[Row]| {
            start += rows.len();
            all.rows(start - rows.len(), rows.len())
        };
        let (queries, keys) = (part(&queries)?, part(&keys)?);
        let decode = Decode { chunks: part(&chunks)?, rows: part(&rows)?, most };
        Ok(Tables { queries, keys, decode: decodes.then_some(decode) })
    }
}

/// Bytes of the tables of whole sequences of these lengths, i32 `[_, 4]` in one tensor.
pub(super) fn table_bytes(lengths: &[usize]) -> usize {
    2 * tiles_of(lengths) * size_of::<Row>()
}

/// Tiles of keys (and of queries) of whole sequences.
pub(super) fn tiles_of(lengths: &[usize]) -> usize {
    lengths.iter().map(|length| length.div_ceil(TILE)).sum()
}

/// Which kernels take a head, and the sizes that they have.
#[derive(Clone, Copy)]
enum Kernels {
    /// Tensor cores.
    Tensor { module: &'static Module, dim: usize },
    /// `attention_simple.cu`.
    Simple { dim: usize },
}

impl Kernels {
    /// Those for these tensors, which the tensor-core kernels read in pieces of 16 bytes.
    fn choose(tensors: &[&Tensor], dim: usize) -> Result<Self> {
        let dtype = tensors[0].dtype();
        check_dtype("attention", dtype, tensors)?;
        let mut aligned = dim.is_multiple_of(8);
        for tensor in tensors {
            aligned &= tensor.device_pointer()?.is_multiple_of(16);
        }
        Ok(match (dtype, dim) {
            (DType::F16 | DType::BF16, 1..=64) if aligned => Kernels::Tensor { module: &D64, dim: 64 },
            (DType::F16 | DType::BF16, 65..=96) if aligned => Kernels::Tensor { module: &D96, dim: 96 },
            (DType::F16 | DType::BF16, 97..=128) if aligned => Kernels::Tensor { module: &D128, dim: 128 },
            (DType::F32, 1..=64) => Kernels::Simple { dim: 64 },
            (DType::F32, 65..=128) => Kernels::Simple { dim: 128 },
            (DType::F32 | DType::F16 | DType::BF16, 1..=256) => Kernels::Simple { dim: 256 },
            (DType::F32 | DType::F16 | DType::BF16, _) => {
                let what = format!("heads of {dim} elements; the GPU kernels take up to 256");
                return Err(Error::invalid("attention", what));
            }
            _ => return Err(Error::DType { op: "attention", expected: "float".into(), found: dtype }),
        })
    }

    /// Bytes of a row of a tile, and rows of a tile on the walk of the backward kernels.
    fn backward_walk(dim: usize) -> (usize, usize) {
        (2 * dim, if dim > 64 { 32 } else { 64 })
    }

    /// Rows of a tile of the simple kernels: forward; backward, those that a block owns and those that it walks over.
    fn simple_rows(dim: usize) -> (usize, usize, usize) {
        match dim {
            64 => (64, 64, 32),
            128 => (64, 32, 32),
            _ => (32, 16, 16),
        }
    }
}

/// A number that a kernel takes as u32.
pub(super) fn small(value: usize) -> Result<u32> {
    size("attention", value)
}

/// The numbers that follow the pointers of most kernels: heads, heads of a group, elements of a head, query rows.
fn numbers(args: Args, heads: Heads, last: usize) -> Result<Args> {
    // Within a tile elements are counted in 32 bits.
    small(TILE * heads.query * heads.dim)?;
    Ok(args.u32(small(heads.query)?).u32(small(heads.query / heads.kv)?).u32(small(heads.dim)?).u32(small(last)?))
}

/// Floating-point operations of so many products over the pairs of a query and a key that it sees.
pub(super) fn flops(heads: Heads, layout: &Layout, products: usize) -> f64 {
    let pairs = |s: &Segment| s.queries as f64 * (s.keys as f64 - (s.queries as f64 - 1.0) / 2.0);
    let pairs: f64 = layout.segments().iter().map(pairs).sum();
    2.0 * products as f64 * pairs * (heads.query * heads.dim) as f64
}

/// scale · log₂e: exponentials are powers of two.
pub(super) fn scale_log2(heads: Heads) -> f32 {
    heads.scale() * std::f32::consts::LOG2_E
}

pub(super) fn forward(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, layout: &Layout) -> Result<(Tensor, Tensor)> {
    let gpu = Gpu::of(q.device())?;
    let rows = layout.queries();
    let mut o = Tensor::empty(q.shape(), q.dtype(), q.device(), Tag::Activations)?;
    let mut lse = Tensor::empty(&[heads.query, rows], DType::F32, q.device(), Tag::Activations)?;
    if rows == 0 {
        return Ok((o, lse));
    }
    let tables = layout.tables()?;
    if hopper::forward(gpu, (q, k, v), heads, layout, (&mut o, &mut lse))? {
        return Ok((o, lse));
    }
    let blocks = tables.queries.shape()[0] * heads.query;
    match (Kernels::choose(&[q, k, v], heads.dim)?, &tables.decode) {
        (Kernels::Tensor { module, dim }, Some(table)) => {
            decode(gpu, module, dim, (q, k, v), heads, table, (&mut o, &mut lse))?;
        }
        (Kernels::Tensor { module, dim }, None) => {
            let args = Args::new().input(q).input(k).input(v).output(&mut o).output(&mut lse).input(&tables.queries);
            let args = args.flops(flops(heads, layout, 2));
            let args = numbers(args, heads, rows)?.f32(scale_log2(heads));
            let shared = (TILE + 4 * KEYS) * dim * 2;
            let name = entry("attention_forward", q.dtype())?;
            gpu.launch(module, &name, [small(blocks)?, 1, 1], [THREADS, 1, 1], shared, args)?;
        }
        (Kernels::Simple { dim }, _) => {
            let args = Args::new().input(q).input(k).input(v).output(&mut o).output(&mut lse).input(&tables.queries);
            let args = args.flops(flops(heads, layout, 2));
            let args = numbers(args, heads, rows)?.f32(heads.scale());
            let (tile, ..) = Kernels::simple_rows(dim);
            let (grid, shared) = (blocks * (TILE / tile), (2 * tile * (dim + 4) + tile * (tile + 4)) * 4);
            let name = entry(&format!("attention_simple_forward_d{dim}"), q.dtype())?;
            gpu.launch(&SIMPLE, &name, [small(grid)?, 1, 1], [SIMPLE_THREADS, 1, 1], shared, args)?;
        }
    }
    Ok((o, lse))
}

/// Chunks of the keys one beside the other, then their sum.
fn decode(
    gpu: &Gpu,
    module: &'static Module,
    dim: usize,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    heads: Heads,
    Decode { chunks, rows, most }: &Decode,
    (o, lse): (&mut Tensor, &mut Tensor),
) -> Result<()> {
    let (count, most) = (chunks.shape()[0] / 2, *most);
    let part = |shape: &[usize]| Tensor::empty(shape, DType::F32, q.device(), Tag::Workspace);
    let mut part_o = part(&[count, most, heads.query, heads.dim])?;
    let mut part_lse = part(&[count, most, heads.query])?;
    let args = Args::new().input(q).input(k).input(v).output(&mut part_o).output(&mut part_lse).input(chunks);
    let args = numbers(args, heads, most)?.f32(scale_log2(heads));
    let blocks = (most * (heads.query / heads.kv)).div_ceil(DECODE_ROWS);
    let grid = [small(count)?, small(heads.kv)?, small(blocks)?];
    let shared = (DECODE_ROWS + 4 * KEYS) * dim * 2;
    gpu.launch(module, &entry("attention_decode", q.dtype())?, grid, [THREADS, 1, 1], shared, args)?;

    let total = rows.shape()[0];
    let args = Args::new().input(&part_o).input(&part_lse).output(o).output(lse).input(rows);
    let args = args.u32(small(heads.query)?).u32(small(heads.dim)?).u32(small(most)?).u32(small(total)?);
    let grid = [small(total * heads.query)?, 1, 1];
    gpu.launch(module, &entry("attention_combine", q.dtype())?, grid, [THREADS, 1, 1], 0, args)
}

pub(super) fn backward(
    saved: &Saved,
    grad: &Tensor,
    heads: Heads,
    layout: &Layout,
    turn: Option<Turn>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let Saved { q, k, v, o, lse } = *saved;
    let gpu = Gpu::of(q.device())?;
    let rows = layout.queries();
    let like = |tensor: &Tensor| Tensor::empty(tensor.shape(), q.dtype(), q.device(), Tag::Workspace);
    let (mut dq, mut dk, mut dv) = (like(q)?, like(k)?, like(v)?);
    if rows == 0 {
        return Ok((dq, dk, dv));
    }
    let tables = layout.tables()?;
    let kernels = Kernels::choose(&[q, k, v, o, grad], heads.dim)?;
    let module = match kernels {
        Kernels::Tensor { module, .. } => module,
        Kernels::Simple { .. } => &SIMPLE,
    };

    let mut delta = Tensor::empty(&[heads.query, rows], DType::F32, q.device(), Tag::Workspace)?;
    let args = Args::new().input(o).input(grad).output(&mut delta);
    let args = args.u32(small(heads.query)?).u32(small(heads.dim)?).u32(small(rows)?);
    let grid = [small(rows.div_ceil(DELTA_ROWS) * heads.query)?, 1, 1];
    gpu.launch(module, &entry("attention_delta", q.dtype())?, grid, [256, 1, 1], 0, args)?;

    let inputs = || Args::new().input(q).input(k).input(v).input(grad).input(lse).input(&delta);
    if hopper::backward(gpu, saved, grad, &delta, (heads, layout), turn, (&mut dq, &mut dk, &mut dv))? {
        return Ok((dq, dk, dv));
    }
    let for_keys = inputs().flops(flops(heads, layout, 4)).output(&mut dk).output(&mut dv).input(&tables.keys);
    let for_keys = numbers(for_keys, heads, rows)?.f32(heads.scale());
    let for_queries = inputs().flops(flops(heads, layout, 3)).output(&mut dq).input(&tables.queries);
    let for_queries = numbers(for_queries, heads, rows)?.f32(heads.scale());
    let (key_blocks, query_blocks) = (tables.keys.shape()[0] * heads.kv, tables.queries.shape()[0] * heads.query);
    match kernels {
        Kernels::Tensor { module, dim } => {
            let (row, walk) = Kernels::backward_walk(dim);
            let grid = [small(key_blocks * (TILE / KEYS))?, 1, 1];
            // Two stages of Q, dO, lse and delta; then P of two pairs of warps, 32 keys each.
            let shared = 2 * (2 * walk * row + 2 * walk * 4) + 2 * 32 * walk * 2;
            let (name, args) = (entry("attention_keys", q.dtype())?, for_keys.f32(scale_log2(heads)));
            gpu.launch(module, &name, grid, [THREADS, 1, 1], shared, args)?;
            let (grid, shared) = ([small(query_blocks)?, 1, 1], 2 * TILE * row + 4 * walk * row);
            let (name, args) = (entry("attention_queries", q.dtype())?, for_queries.f32(scale_log2(heads)));
            gpu.launch(module, &name, grid, [THREADS, 1, 1], shared, args)?;
        }
        Kernels::Simple { dim } => {
            let (_, own, walk) = Kernels::simple_rows(dim);
            let tiles = 2 * (own + walk) * (dim + 4);
            let (block, shared) = ([SIMPLE_THREADS, 1, 1], (tiles + 2 * walk * (own + 4)) * 4);
            let grid = [small(key_blocks * (TILE / own))?, 1, 1];
            let name = entry(&format!("attention_simple_keys_d{dim}"), q.dtype())?;
            gpu.launch(&SIMPLE, &name, grid, block, shared, for_keys)?;
            let (grid, shared) = ([small(query_blocks * (TILE / own))?, 1, 1], (tiles + own * (walk + 4)) * 4);
            let name = entry(&format!("attention_simple_queries_d{dim}"), q.dtype())?;
            gpu.launch(&SIMPLE, &name, grid, block, shared, for_queries)?;
        }
    }
    Ok((Turn::back(turn, dq)?, Turn::back(turn, dk)?, dv))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every pair of a query and a key that it sees is in one tile or chunk, and no other pair is.
        #[test]
        fn tables_cover_what_attends(
            parts in prop::collection::vec((0usize..300, 0usize..400), 0..6), few: bool, gap in 0usize..9
        ) {
            let (mut query, mut key, mut segments) = (0, 0, Vec::new());
            for (queries, more) in parts {
                let queries = if few { queries % (DECODE_QUERIES + 1) } else { queries };
                segments.push(Segment { query, queries, key, keys: queries + more });
                query += queries;
                key += queries + more + gap;
            }
            // For each query the first key row and the keys that it sees.
            let expected: Vec<(usize, usize)> = segments.iter()
                .flat_map(|s| (0..s.queries).map(|i| (s.key, s.keys - s.queries + i + 1))).collect();
            let (queries, keys) = tiles(&segments);
            prop_assert!(queries.is_sorted_by_key(|t| -(t[1] + t[3])) && keys.is_sorted_by_key(|t| -t[1]));
            let mut found = vec![(0, 0); expected.len()];
            for [first, rows, key, visible] in queries {
                prop_assert!(rows as usize <= TILE);
                for i in 0..rows {
                    found[(first + i) as usize] = (key as usize, (visible + i) as usize);
                }
            }
            prop_assert_eq!(&found, &expected);
            let mut numbers: Vec<i32> = keys.iter().map(|t| t[2]).collect();
            numbers.sort_unstable();
            prop_assert!(numbers.iter().copied().eq(0..keys.len() as i32));
            for s in &segments {
                let own: Vec<_> = keys.iter().filter(|t| (s.query..s.query + s.queries).contains(&(t[0] as usize))).collect();
                prop_assert_eq!(own.len(), s.queries.div_ceil(TILE));
                prop_assert!(own.iter().all(|t| (t[0] + t[1]) as usize == s.query + s.queries));
                // Numbers in the sequence, which come in order, and among all, which follow one another.
                prop_assert!(own.iter().enumerate().all(|(i, t)| (t[3] as usize, t[2]) == (i, own[0][2] + i as i32)));
            }

            let (chunks, rows) = chunks(&segments);
            prop_assert_eq!(rows.len(), expected.len());
            for (row, [first, count, query, _]) in rows.into_iter().enumerate() {
                let own = &chunks[2 * first as usize..2 * (first + count) as usize];
                let (mut next, mut seen) = (expected[row].0 as i32, 0);
                for chunk in own.chunks(2) {
                    let [[first_query, queries, key, keys], [visible, ..]] = [chunk[0], chunk[1]];
                    prop_assert!((first_query..first_query + queries).contains(&(row as i32)));
                    prop_assert_eq!((row as i32 - first_query, key), (query, next));
                    next += keys;
                    seen += (visible + query).clamp(0, keys);
                }
                prop_assert_eq!(seen as usize, expected[row].1);
                prop_assert!(count as usize <= DECODE_CHUNKS + 1);
            }
        }
    }
}
