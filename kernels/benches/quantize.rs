//! Throughput of the quantizers, in weights a second. `read_f32` runs on one thread; the others on all.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nibble_kernels::{
    dynamic8,
    quantize::{QuantType, ScaleRounding, quantize},
};
use nibble_runtime::{DType, Tag, Tensor, rng};
use std::hint::black_box;

/// A projection of a small Llama.
const SHAPE: [usize; 2] = [1536, 576];

fn weights(dtype: DType) -> Tensor {
    let rng = rng::Philox::new(1, rng::Stream { purpose: 0, step: 0, layer: 0 });
    let values: Vec<f32> = (0..(SHAPE[0] * SHAPE[1]) as u64).map(|i| 0.02 * rng.normal(i)).collect();
    Tensor::from_slice(&values, &SHAPE, Tag::Weights).unwrap().cast(dtype, Tag::Weights).unwrap()
}

fn bench(c: &mut Criterion) {
    let numel = SHAPE[0] * SHAPE[1];

    let mut group = c.benchmark_group("quantize");
    group.throughput(Throughput::Elements(numel as u64));
    for (quant_type, dtype) in
        [(QuantType::Nf4, DType::F32), (QuantType::Nf4, DType::BF16), (QuantType::Fp4, DType::BF16)]
    {
        let x = weights(dtype);
        group.bench_function(format!("{quant_type}/{dtype}"), |b| {
            b.iter(|| {
                quantize(black_box(&x), quant_type, 64, Some(ScaleRounding::Stepped), dtype, Tag::Weights).unwrap()
            })
        });
    }
    group.finish();

    // As the matrix product reads: a row at a time into a panel.
    let mut group = c.benchmark_group("read_f32");
    group.throughput(Throughput::Elements(numel as u64));
    let mut panel = vec![0.0; 64 * SHAPE[1]];
    let stepped = Some(ScaleRounding::Stepped);
    for (dtype, double) in [(DType::F32, None), (DType::F32, stepped), (DType::BF16, stepped), (DType::F16, stepped)] {
        let quantized = quantize(&weights(dtype), QuantType::Nf4, 64, double, dtype, Tag::Weights).unwrap();
        group.bench_function(format!("nf4/{dtype}{}", if double.is_some() { "/double" } else { "" }), |b| {
            b.iter(|| {
                for row in 0..SHAPE[0] {
                    let row_of_panel = row % 64 * SHAPE[1];
                    quantized.read_f32(row * SHAPE[1], &mut panel[row_of_panel..][..SHAPE[1]]).unwrap();
                }
                black_box(&mut panel);
            })
        });
    }
    group.finish();

    let values = weights(DType::F32).to_f32().unwrap().into_owned();
    let mut group = c.benchmark_group("dynamic8");
    group.throughput(Throughput::Elements(numel as u64));
    group.bench_function("quantize", |b| {
        b.iter(|| dynamic8::quantize_blockwise(black_box(&values), dynamic8::signed_map(), 256))
    });
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
