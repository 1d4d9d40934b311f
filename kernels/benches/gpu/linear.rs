//! The products of an 8B model's linear layers, bf16. `NIBBLE_GEMM_TILE=256|128|64` forces a tile of gemm.cuh.

use crate::Bench;
use nibble_kernels::{
    linear::{Weight, forward_lora, input_grad_lora},
    quantize::{QuantType, ScaleRounding, quantize},
};
use nibble_runtime::{DType, Result, Tag};

const LAYERS: [(&str, usize, usize); 4] =
    [("q o", 4096, 4096), ("k v", 1024, 4096), ("gate up", 14336, 4096), ("down", 4096, 14336)];
const RANK: usize = 16;

pub fn run(bench: &Bench) -> Result<()> {
    for (layer, n, k) in LAYERS {
        let dense = bench.random(&[n, k], DType::BF16, 1)?;
        let rounding = Some(ScaleRounding::Exact);
        let nf4 = quantize(&dense, QuantType::Nf4, 64, rounding, DType::BF16, Tag::Workspace)?;
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
