//! Matrix products and attention on the CPU, in FLOP/s.
//!
//! The ceiling to compare with is `dense f32`: the same product by the `gemm` crate on a weight that is f32 already.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use nibble_kernels::{
    attention::{self, Heads, Layout, Saved},
    linear::{Weight, forward, input_grad},
    quantize::{QuantType, ScaleRounding, quantize},
};
use nibble_runtime::{
    DType, Device, Tag, Tensor,
    rng::{Philox, Stream},
};
use std::hint::black_box;

fn random(shape: &[usize], seed: u64) -> Tensor {
    let rng = Philox::new(seed, Stream { purpose: 99, step: 0, layer: 0 });
    let values: Vec<f32> = (0..shape.iter().product::<usize>() as u64).map(|i| rng.normal(i)).collect();
    Tensor::from_slice(&values, shape, Tag::Workspace).expect("values fill the shape")
}

/// Shapes of SmolLM2-135M and of an 8B model's attention output.
const SHAPES: [(usize, usize, usize); 4] = [(1024, 576, 576), (1024, 1536, 576), (1024, 576, 1536), (256, 4096, 4096)];

fn products(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("linear");
    group.sample_size(20);
    for (t, n, k) in SHAPES {
        let (x, grad, dense) = (random(&[t, k], 1), random(&[t, n], 2), random(&[n, k], 3));
        let nf4 = quantize(&dense, QuantType::Nf4, 64, Some(ScaleRounding::Stepped), DType::F32, Tag::Weights)
            .expect("finite weights");
        let bf16 = dense.cast(DType::BF16, Tag::Weights).expect("floats");
        group.throughput(Throughput::Elements(2 * (t * n * k) as u64));
        for (name, weight) in
            [("dense f32", Weight::Dense(dense)), ("bf16", Weight::Dense(bf16)), ("nf4", Weight::Quantized(nf4))]
        {
            let shape = format!("{t}x{n}x{k}");
            group.bench_function(BenchmarkId::new(format!("{name} forward"), &shape), |bencher| {
                bencher.iter(|| black_box(forward(&x, &weight, Tag::Workspace)));
            });
            group.bench_function(BenchmarkId::new(format!("{name} input gradient"), &shape), |bencher| {
                bencher.iter(|| black_box(input_grad(&grad, &weight, 1.0)));
            });
        }
    }
    group.finish();
}

fn attentions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    group.sample_size(20);
    let heads = Heads { query: 9, kv: 3, dim: 64 };
    for (sequences, length) in [(4, 256), (1, 1024), (1, 4096)] {
        let tokens = sequences * length;
        let layout = Layout::packed(&vec![length; sequences], Device::Cpu).expect("sequences follow one another");
        let [q, grad] = [1, 2].map(|seed| random(&[tokens, heads.query * heads.dim], seed));
        let [k, v] = [3, 4].map(|seed| random(&[tokens, heads.kv * heads.dim], seed));
        let (o, lse) = attention::forward(&q, &k, &v, heads, &layout).expect("shapes fit");
        let shape = format!("{sequences}x{length}");
        // Two products over the lower triangle forward, five backward.
        let product = (heads.query * heads.dim * tokens * length) as u64;
        group.throughput(Throughput::Elements(2 * product));
        group.bench_function(BenchmarkId::new("forward", &shape), |bencher| {
            bencher.iter(|| black_box(attention::forward(&q, &k, &v, heads, &layout)));
        });
        group.throughput(Throughput::Elements(5 * product));
        let saved = Saved { q: &q, k: &k, v: &v, o: &o, lse: &lse };
        group.bench_function(BenchmarkId::new("backward", &shape), |bencher| {
            bencher.iter(|| black_box(attention::backward(&saved, &grad, heads, &layout, None)));
        });
    }
    group.finish();
}

criterion_group!(benches, products, attentions);
criterion_main!(benches);
