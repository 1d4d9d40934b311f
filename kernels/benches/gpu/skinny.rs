//! Products with a LoRA rank, for a few tokens, in f32, and of weight gradients, at the sizes of an 8B model.

use crate::Bench;
use nibble_kernels::{
    dropout::Mask,
    linear::{Weight, forward, input_grad, lora, weight_grad},
    quantize::{QuantType, ScaleRounding, quantize},
};
use nibble_runtime::{DType, Result, Tag};

const HIDDEN: usize = 4096;
const INNER: usize = 14_336;
const VOCABULARY: usize = 128_256;
const TAG: Tag = Tag::Workspace;
const MASK: Mask = Mask { probability: 0.05, seed: 1, step: 2, layer: 3 };

pub fn run(bench: &Bench) -> Result<()> {
    low_rank(bench)?;
    decoding(bench)?;
    single(bench)?;
    weights(bench)
}

fn low_rank(bench: &Bench) -> Result<()> {
    for (t, k, r) in [
        (8192, HIDDEN, 16),
        (8192, INNER, 16),
        (2048, HIDDEN, 16),
        (8192, 1024, 16),
        (8192, HIDDEN, 64),
        (8192, INNER, 64),
    ] {
        let x = bench.random(&[t, k], DType::BF16, 1)?;
        let u = bench.random(&[t, r], DType::BF16, 2)?;
        let (a, b) = (bench.random(&[r, k], DType::BF16, 3)?, bench.random(&[k, r], DType::BF16, 4)?);
        let mut dx = bench.random(&[t, k], DType::BF16, 5)?;
        let shape = format!("{t} x {k} r {r}");
        let (bytes, flops) = (x.size_bytes() + u.size_bytes() + a.size_bytes(), 2.0 * (t * k * r) as f64);
        for (name, mask) in [("", None), (" dropped", Some(MASK))] {
            bench.time(&format!("lora down{name}"), &shape, bytes, flops, || {
                lora::down(&x, &a, 1.0, mask, TAG).map(drop)
            })?;
            bench.time(&format!("lora dA{name}"), &shape, bytes, flops, || {
                lora::weight_grad(&u, &x, 1.0, mask).map(drop)
            })?;
        }
        bench.time("lora gradient down", &shape, bytes, flops, || lora::grad_down(&x, &b, 1.0, TAG).map(drop))?;
        bench.time("lora gradient down and dB", &shape, bytes + u.size_bytes(), 2.0 * flops, || {
            lora::grad_down_and_up(&x, &u, &b, 1.0, TAG).map(drop)
        })?;
        bench.time("lora dB", &shape, bytes, flops, || lora::weight_grad(&x, &u, 1.0, None).map(drop))?;
        // Of q, k and v, whose input is one.
        let (adapters, us) = ([(&a, 1.0); 3], [&u; 3]);
        let shared = bytes + 2 * (u.size_bytes() + a.size_bytes());
        bench.time("lora down, three", &shape, shared, 3.0 * flops, || lora::down_all(&x, &adapters, TAG).map(drop))?;
        bench.time("lora dA, three", &shape, shared, 3.0 * flops, || lora::weight_grads(&us, &x).map(drop))?;
        let both = bytes + dx.size_bytes();
        bench.time("lora dropped add", &shape, both, flops, || lora::dropped_add(&u, &a, MASK, &mut dx))?;
    }
    Ok(())
}

fn decoding(bench: &Bench) -> Result<()> {
    for (n, k, coded) in
        [(HIDDEN, HIDDEN, true), (INNER, HIDDEN, true), (HIDDEN, INNER, true), (VOCABULARY, HIDDEN, false)]
    {
        let dense = bench.random(&[n, k], DType::BF16, 1)?;
        let weight = match coded {
            true => {
                let rounding = Some(ScaleRounding::Exact);
                Weight::Quantized(quantize(&dense, QuantType::Nf4, 64, rounding, DType::BF16, TAG)?)
            }
            false => Weight::Dense(dense),
        };
        let name = if coded { "decode nf4" } else { "decode dense" };
        for t in [1, 8, 16] {
            let x = bench.random(&[t, k], DType::BF16, 2)?;
            let shape = format!("{t} x {n} x {k}");
            bench.time(name, &shape, weight.size_bytes(), 2.0 * (t * n * k) as f64, || {
                forward(&x, &weight, TAG).map(drop)
            })?;
        }
    }
    Ok(())
}

fn single(bench: &Bench) -> Result<()> {
    for (t, n, k) in [(4096, HIDDEN, HIDDEN), (2048, INNER, HIDDEN), (512, 1024, 1024)] {
        let dense = bench.random(&[n, k], DType::F32, 1)?;
        let rounding = Some(ScaleRounding::Exact);
        let nf4 = Weight::Quantized(quantize(&dense, QuantType::Nf4, 64, rounding, DType::F32, TAG)?);
        let (x, g) = (bench.random(&[t, k], DType::F32, 2)?, bench.random(&[t, n], DType::F32, 3)?);
        let (shape, flops) = (format!("{t} x {n} x {k}"), 2.0 * (t * n * k) as f64);
        bench.time("f32 weight gradient", &shape, x.size_bytes() + g.size_bytes(), flops, || {
            weight_grad(&g, &x, 1.0).map(drop)
        })?;
        for (name, weight) in [("dense", Weight::Dense(dense)), ("nf4", nf4)] {
            let bytes = weight.size_bytes() + x.size_bytes() + g.size_bytes();
            bench.time(&format!("f32 forward {name}"), &shape, bytes, flops, || forward(&x, &weight, TAG).map(drop))?;
            bench.time(&format!("f32 input gradient {name}"), &shape, bytes, flops, || {
                input_grad(&g, &weight, 1.0).map(drop)
            })?;
        }
    }
    Ok(())
}

fn weights(bench: &Bench) -> Result<()> {
    for (t, n, k) in [(8192, HIDDEN, HIDDEN), (2048, INNER, HIDDEN), (2048, 1024, HIDDEN)] {
        let (x, g) = (bench.random(&[t, k], DType::BF16, 1)?, bench.random(&[t, n], DType::BF16, 2)?);
        let bytes = x.size_bytes() + g.size_bytes() + 4 * n * k;
        bench.time("weight gradient", &format!("{t} x {n} x {k}"), bytes, 2.0 * (t * n * k) as f64, || {
            weight_grad(&g, &x, 1.0).map(drop)
        })?;
    }
    Ok(())
}
