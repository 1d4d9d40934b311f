//! Attention: an 8B model at its lengths, a small model on packed short rows, and decoding.

use crate::Bench;
use nibble_kernels::attention::{Heads, Layout, Saved, Segment, backward, forward};
use nibble_runtime::{DType, Result};

const LLAMA_8B: Heads = Heads { query: 32, kv: 8, dim: 128 };
const SMOLLM2: Heads = Heads { query: 9, kv: 3, dim: 64 };

pub fn run(bench: &Bench) -> Result<()> {
    for (sequences, length) in [(4, 2048), (1, 2048), (1, 8192), (1, 32_768)] {
        whole(bench, LLAMA_8B, &vec![length; sequences], DType::BF16, &format!("{sequences}x{length} 32/8 d128"))?;
    }
    whole(bench, LLAMA_8B, &[2048; 4], DType::F16, "4x2048 32/8 d128 f16")?;
    whole(bench, Heads { query: 32, kv: 8, dim: 64 }, &[2048; 4], DType::BF16, "4x2048 32/8 d64")?;
    let rows: Vec<usize> = (0..32).map(|i| 12 + i * 7 % 17).collect();
    whole(bench, SMOLLM2, &rows, DType::BF16, "32 rows of 12-28 9/3 d64")?;
    whole(bench, SMOLLM2, &rows, DType::F32, "32 rows of 12-28 9/3 d64 f32")?;
    whole(bench, SMOLLM2, &[1024], DType::F32, "1x1024 9/3 d64 f32")?;
    for (keys, queries) in [(2048, 1), (2048, 8), (32_768, 1)] {
        decode(bench, LLAMA_8B, queries, keys)?;
    }
    Ok(())
}

fn whole(bench: &Bench, heads: Heads, lengths: &[usize], dtype: DType, shape: &str) -> Result<()> {
    let tokens = lengths.iter().sum();
    let layout = Layout::packed(lengths, bench.device())?;
    let row = |count: usize, seed| bench.random(&[tokens, count * heads.dim], dtype, seed);
    let (q, k, v, grad) = (row(heads.query, 1)?, row(heads.kv, 2)?, row(heads.kv, 3)?, row(heads.query, 4)?);
    // A product of a triangle; two forward, five backward (where the kernels make seven).
    let product: f64 = lengths.iter().map(|&n| (n * n * heads.query * heads.dim) as f64).sum();
    let wide = |tensor: &nibble_runtime::Tensor| tensor.size_bytes();
    let bytes = 2 * (wide(&q) + wide(&k));
    bench.time("attention forward", shape, bytes, 2.0 * product, || forward(&q, &k, &v, heads, &layout).map(drop))?;
    let (o, lse) = forward(&q, &k, &v, heads, &layout)?;
    let saved = Saved { q: &q, k: &k, v: &v, o: &o, lse: &lse };
    let run = || backward(&saved, &grad, heads, &layout, None).map(drop);
    bench.time("attention backward", shape, 2 * bytes + wide(&q) - wide(&k), 5.0 * product, run)
}

fn decode(bench: &Bench, heads: Heads, queries: usize, keys: usize) -> Result<()> {
    let row = |rows: usize, count: usize, seed| bench.random(&[rows, count * heads.dim], DType::BF16, seed);
    let (q, k, v) = (row(queries, heads.query, 1)?, row(keys, heads.kv, 2)?, row(keys, heads.kv, 3)?);
    let layout = Layout::new(vec![Segment { query: 0, queries, key: 0, keys }], bench.device())?;
    let flops = (4 * queries * keys * heads.query * heads.dim) as f64;
    let shape = format!("{queries} of {keys} 32/8 d128");
    bench.time("attention decode", &shape, 2 * k.size_bytes(), flops, || forward(&q, &k, &v, heads, &layout).map(drop))
}
