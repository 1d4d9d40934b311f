//! Quantizers, and the update of all adapter parameters; each byte is counted once.

use crate::Bench;
use nibble_kernels::{
    adamw::{AdamWConfig, Job, MomentsMut, State8, step_all},
    norm::Clip,
    quantize::{QuantTensor, QuantType, ScaleRounding, dequantize, quantize},
};
use nibble_runtime::{DType, Result, Tag, Tensor};

pub fn run(bench: &Bench) -> Result<()> {
    quantizers(bench)?;
    optimizer(bench)
}

/// Bytes of a quantized matrix.
fn held(quantized: &QuantTensor) -> usize {
    quantized.size_bytes()
}

fn quantizers(bench: &Bench) -> Result<()> {
    let stepped = Some(ScaleRounding::Stepped);
    for (shape, dtype) in [([14_336, 4096], DType::BF16), ([14_336, 4096], DType::F32), ([1024, 4096], DType::BF16)] {
        let x = bench.random(&shape, dtype, 1)?;
        for (kind, quant_type, scales) in [
            ("nf4 double", QuantType::Nf4, stepped),
            ("nf4", QuantType::Nf4, None),
            ("fp4 double", QuantType::Fp4, stepped),
        ] {
            let run = || quantize(&x, quant_type, 64, scales, dtype, Tag::Workspace);
            let quantized = run()?;
            let (bytes, what) = (x.size_bytes() + held(&quantized), format!("{shape:?} {dtype}"));
            bench.time(&format!("quantize {kind}"), &what, bytes, 0.0, || run().map(drop))?;
            bench.time(&format!("dequantize {kind}"), &what, bytes, 0.0, || {
                dequantize(&quantized, Tag::Workspace).map(drop)
            })?;
        }
    }
    Ok(())
}

/// The adapters of an 8B model at rank 64: A and B of 7 linears in 32 layers, 168M parameters in 448 tensors; and 117M
/// in as many tensors of one size.
fn optimizer(bench: &Bench) -> Result<()> {
    let linears =
        [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14_336, 4096), (14_336, 4096), (4096, 14_336)];
    let adapters: Vec<usize> = (0..32).flat_map(|_| linears.iter().flat_map(|&(n, k)| [64 * k, n * 64])).collect();
    for sizes in [vec![117_440_512 / 448; 448], adapters] {
        for eight in [false, true] {
            update(bench, &sizes, eight)?;
        }
    }
    Ok(())
}

fn update(bench: &Bench, sizes: &[usize], eight: bool) -> Result<()> {
    let (device, tag) = (bench.device(), Tag::Optimizer);
    let make = |scale: f64| -> Result<Vec<Tensor>> {
        let block: Vec<f32> = (0..4096).map(|i| (f64::from(i).sin() * scale) as f32).collect();
        let of_size = |&size: &usize| {
            let values: Vec<f32> = block.iter().copied().cycle().take(size).collect();
            Tensor::from_slice(&values, &[size], tag)?.to_device(device, tag)
        };
        sizes.iter().map(of_size).collect()
    };
    let (mut params, grads) = (make(0.1)?, make(1e-3)?);
    let zeros = |size: usize| Tensor::zeros(&[size], DType::F32, device, tag);
    let (mut wide, mut narrow) = (Vec::new(), Vec::new());
    for &size in sizes {
        match eight {
            false => wide.push([zeros(size)?, zeros(size)?]),
            true => narrow.push([State8::zeros(size, device, tag)?, State8::zeros(size, device, tag)?]),
        }
    }
    let numel: usize = sizes.iter().sum();
    let (bits, state) = if eight { ("8-bit", 4 * numel + 16 * numel / 256) } else { ("32-bit", 16 * numel) };
    let what = format!("{:.0}M in {} tensors", numel as f64 / 1e6, sizes.len());
    let all: Vec<&Tensor> = grads.iter().collect();
    bench.time("norm and clip", &what, 4 * numel, 2.0 * numel as f64, || Clip::new(&all, 0.3, 1.0).map(drop))?;
    let mut clip = Clip::new(&all, 0.3, 1.0)?;
    let config = AdamWConfig::default();
    let moments: Vec<MomentsMut> = match eight {
        false => wide.iter_mut().map(|[m, v]| MomentsMut::F32 { m, v }).collect(),
        true => narrow.iter_mut().map(|[m, v]| MomentsMut::Bits8 { m, v }).collect(),
    };
    let mut jobs: Vec<Job> = (params.iter_mut().zip(&grads).zip(moments))
        .map(|((param, grad), moments)| Job::whole(param, grad, moments, true))
        .collect();
    let mut step = 0;
    bench.time(&format!("adamw {bits}"), &what, 12 * numel + state, 0.0, || {
        step += 1;
        step_all(&mut jobs, &config, step, &mut clip)
    })
}
