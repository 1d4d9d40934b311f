//! The products of an 8B model's linear layers, bf16. `NIBBLE_GEMM_TILE=256|128|64` forces a tile of gemm.cuh. Those of few rows
//! also one after another, on weights that no cache holds any more: a product alone is timed with what a launch takes.

use crate::Bench;
use nibble_kernels::{
    linear::{Weight, forward, forward_lora, input_grad, input_grad_lora},
    quantize::{QuantTensor, QuantType, ScaleRounding, quantize},
};
use nibble_runtime::{DType, Result, Tag};

const LAYERS: [(&str, usize, usize); 4] =
    [("q o", 4096, 4096), ("k v", 1024, 4096), ("gate up", 14336, 4096), ("down", 4096, 14336)];
const RANK: usize = 16;
/// Bytes of weights that products in a row go through: more than the second-level cache holds.
const COLD: usize = 160 << 20;

pub fn run(bench: &Bench) -> Result<()> {
    for (layer, n, k) in LAYERS {
        let dense = bench.random(&[n, k], DType::BF16, 1)?;
        let rounding = Some(ScaleRounding::Exact);
        let nf4 = quantize(&dense, QuantType::Nf4, 64, rounding, DType::BF16, Tag::Workspace)?;
        in_a_row(bench, layer, &nf4, (n, k))?;
        let weights = [("dense", Weight::Dense(dense)), ("nf4", Weight::Quantized(nf4))];
        let b = bench.random(&[n, RANK], DType::BF16, 2)?;
        let a = bench.random(&[RANK, k], DType::BF16, 3)?;
        for t in [8192, 2048, 256] {
            let x = bench.random(&[t, k], DType::BF16, 4)?;
            let g = bench.random(&[t, n], DType::BF16, 5)?;
            let low = bench.random(&[t, RANK], DType::BF16, 6)?;
            let shape = format!("{layer} {t} x {n} x {k}");
            let flops = 2.0 * (t * n * k) as f64;
            for (name, weight) in &weights {
                let bytes = weight.size_bytes() + x.size_bytes() + g.size_bytes();
                for lora in [false, true] {
                    let (of_forward, of_backward) = (lora.then_some((&low, &b)), lora.then_some((&low, &a)));
                    let suffix = if lora { " lora" } else { "" };
                    bench.time(&format!("linear forward {name}{suffix}"), &shape, bytes, flops, || {
                        forward_lora(&x, weight, of_forward, None, DType::BF16, Tag::Workspace).map(drop)
                    })?;
                    bench.time(&format!("linear input grad {name}{suffix}"), &shape, bytes, flops, || {
                        input_grad_lora(&g, weight, of_backward, DType::BF16, Tag::Workspace).map(drop)
                    })?;
                }
            }
        }
    }
    Ok(())
}

/// Products of few rows on copies of a weight, one launch after another.
fn in_a_row(bench: &Bench, layer: &str, weight: &QuantTensor, (n, k): (usize, usize)) -> Result<()> {
    let copy = |_| Ok(Weight::Quantized(QuantTensor { packed: weight.packed.copy(Tag::Workspace)?, ..weight.clone() }));
    let copies = (0..COLD.div_ceil(weight.size_bytes())).map(copy).collect::<Result<Vec<_>>>()?;
    for t in [256, 128, 64, 32] {
        let x = bench.random(&[t, k], DType::BF16, 4)?;
        let g = bench.random(&[t, n], DType::BF16, 5)?;
        let shape = format!("{layer} {} of {t} x {n} x {k}", copies.len());
        let bytes = copies.len() * weight.size_bytes();
        let flops = 2.0 * (copies.len() * t * n * k) as f64;
        bench.time("linear forward nf4 in a row", &shape, bytes, flops, || {
            copies.iter().try_for_each(|weight| forward(&x, weight, Tag::Workspace).map(drop))
        })?;
        bench.time("linear input grad nf4 in a row", &shape, bytes, flops, || {
            copies.iter().try_for_each(|weight| input_grad(&g, weight, 1.0).map(drop))
        })?;
    }
    Ok(())
}
