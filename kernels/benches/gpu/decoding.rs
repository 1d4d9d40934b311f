//! The launches of a decoding step at an 8B model's sizes, NF4 with adapters of rank 16, bf16: as a generation has them, from a
//! recording of one after another, on weights that no cache holds any more.

use crate::Bench;
use nibble_kernels::{
    decoding::{Factors, Part, add, gate, low_rank},
    quantize::{QuantTensor, QuantType, ScaleRounding, quantize},
};
use nibble_runtime::{DType, Result, Tag, Tensor, cuda::Graph};

const TAG: Tag = Tag::Workspace;
const RANK: usize = 16;
/// Weights in a recording.
const WEIGHTS: usize = 8;

pub fn run(bench: &Bench) -> Result<()> {
    for (n, k, gated) in [(14336, 4096, true), (14336, 4096, false), (4096, 14336, false), (4096, 4096, false)] {
        let dense = bench.random(&[n, k], DType::BF16, 1)?;
        let weight = quantize(&dense, QuantType::Nf4, 64, Some(ScaleRounding::Exact), DType::BF16, TAG)?;
        drop(dense);
        let copies: Vec<QuantTensor> = (0..2 * WEIGHTS)
            .map(|_| Ok(QuantTensor { packed: weight.packed.copy(TAG)?, ..weight.clone() }))
            .collect::<Result<_>>()?;
        for t in [1, 8, 16] {
            products(bench, &copies, (t, n, k), gated)?;
        }
    }
    Ok(())
}

/// Products without what comes before them, and with a launch of LoRA's A's before each, which they overlap on Hopper.
fn products(bench: &Bench, weights: &[QuantTensor], (t, n, k): (usize, usize, usize), gated: bool) -> Result<()> {
    let (x, b) = (bench.random(&[t, k], DType::BF16, 2)?, bench.random(&[n, RANK], DType::BF16, 3)?);
    let columns = if gated { 2 * RANK } else { RANK };
    let factors = Factors {
        a: bench.random(&[columns, k], DType::BF16, 4)?,
        owners: Tensor::zeros(&[columns], DType::I32, x.device(), TAG)?,
        scales: bench.random(&[columns], DType::F32, 5)?,
    };
    let tokens = Tensor::zeros(&[t, 4], DType::I32, x.device(), TAG)?;
    let mut low = Tensor::empty(&[t, columns], DType::BF16, x.device(), TAG)?;
    let mut y = Tensor::empty(&[t, n], DType::BF16, x.device(), TAG)?;
    let parts = if gated { 2 } else { 1 };
    let mut launch = |with_low: bool| {
        for pair in weights.chunks(parts).take(WEIGHTS) {
            if with_low {
                low_rank(&x, None, Some((&factors, &mut low)), &tokens)?;
            }
            let part = |i: usize| Part { weight: &pair[i], b: Some(&b), gains: None, column: i * RANK };
            match gated {
                true => gate(&x, [part(0), part(1)], Some(&low), &tokens, &mut y)?,
                false => add(&x, part(0), Some(&low), None, &tokens, &mut y)?,
            }
        }
        Ok(())
    };
    for with_low in [false, true] {
        launch(with_low)?;
        let graph = Graph::record(bench.gpu(), || launch(with_low))?;
        let bytes = WEIGHTS * parts * weights[0].size_bytes();
        let flops = (2 * WEIGHTS * parts * t * n * k) as f64;
        let name = if with_low { "step: 8 x A, product" } else { "step: 8 products" };
        bench.time(name, &format!("{t} x {parts}*{n} x {k}"), bytes, flops, || graph.launch())?;
    }
    Ok(())
}
