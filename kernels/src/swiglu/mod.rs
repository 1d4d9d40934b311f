//! SwiGLU: `y = silu(gate) · up` with `silu(x) = x · σ(x)`.
//!
//! Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
//!
//! Backward, with `σ = sigmoid(gate)`: `dup = dy · gate · σ`, `dgate = dy · up · σ · (1 + gate · (1 − σ))`.

pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;

pub(crate) use cuda::own;

use crate::math::{sigmoid, vectorized};
use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};
use rayon::prelude::*;

/// Elements that one task takes.
const CHUNK: usize = 1 << 14;

fn check(op: &'static str, tensors: &[&Tensor]) -> Result<()> {
    if tensors.iter().any(|tensor| tensor.shape() != tensors[0].shape()) {
        let shapes: Vec<_> = tensors.iter().map(|tensor| tensor.shape()).collect();
        return Err(Error::shape(op, format!("operands differ in shape: {shapes:?}")));
    }
    Ok(())
}

/// `silu(gate) · up`, in the type of `gate`.
pub fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check("swiglu", &[gate, up])?;
    if gate.device() != Device::Cpu {
        return cuda::forward(gate, up);
    }
    let mut out = Tensor::empty(gate.shape(), DType::F32, Device::Cpu, Tag::Workspace)?;
    let (gates, ups) = (gate.to_f32()?, up.to_f32()?);
    out.as_mut_slice::<f32>()?.par_chunks_mut(CHUNK).zip(gates.par_chunks(CHUNK)).zip(ups.par_chunks(CHUNK)).for_each(
        |((out, gate), up)| {
            vectorized(
                #[inline(always)]
                || {
                    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                        *out = gate * sigmoid(gate) * up;
                    }
                },
            );
        },
    );
    out.into_dtype(gate.dtype(), Tag::Workspace)
}

/// What [`backward`] makes.
#[derive(Debug)]
pub struct Backward {
    /// `silu(gate) · up` once more.
    pub output: Tensor,
    /// Gradient of `gate`.
    pub gate: Tensor,
    /// Gradient of `up`.
    pub up: Tensor,
}

/// Gradients of `gate` and `up` from that of the output, and the output. On a GPU they take the places of `gate`, `up` and
/// `grad` where nothing else refers to those.
pub fn backward(gate: Tensor, up: Tensor, grad: Tensor) -> Result<Backward> {
    check("swiglu backward", &[&gate, &up, &grad])?;
    if gate.device() != Device::Cpu {
        return cuda::backward(gate, up, grad);
    }
    let output = forward(&gate, &up)?;
    let mut dgate = Tensor::empty(gate.shape(), DType::F32, Device::Cpu, Tag::Workspace)?;
    let mut dup = Tensor::empty(gate.shape(), DType::F32, Device::Cpu, Tag::Workspace)?;
    let (gates, ups, grads) = (gate.to_f32()?, up.to_f32()?, grad.to_f32()?);
    let out = dgate.as_mut_slice::<f32>()?.par_chunks_mut(CHUNK).zip(dup.as_mut_slice::<f32>()?.par_chunks_mut(CHUNK));
    let inputs = gates.par_chunks(CHUNK).zip(ups.par_chunks(CHUNK)).zip(grads.par_chunks(CHUNK));
    out.zip(inputs).for_each(|((dgate, dup), ((gate, up), grad))| {
        vectorized(
            #[inline(always)]
            || {
                for (i, (dgate, dup)) in dgate.iter_mut().zip(dup.iter_mut()).enumerate() {
                    let (gate, up, grad) = (gate[i], up[i], grad[i]);
                    let sigma = sigmoid(gate);
                    *dup = grad * gate * sigma;
                    *dgate = grad * up * sigma * (1.0 + gate * (1.0 - sigma));
                }
            },
        );
    });
    let dtype = gate.dtype();
    Ok(Backward { output, gate: dgate.into_dtype(dtype, Tag::Workspace)?, up: dup.into_dtype(dtype, Tag::Workspace)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, numeric_gradient, random, wide};

    fn reference(gate: &[f64], up: &[f64]) -> Vec<f64> {
        gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
    }

    #[test]
    fn matches_f64_and_finite_differences() {
        for (n, seed) in [(1, 1), (37, 2), (CHUNK + 5, 3)] {
            let (gate, up, grad) = (random(&[1, n], seed), random(&[1, n], seed + 10), random(&[1, n], seed + 20));
            let (gates, ups, grads) = (wide(&gate), wide(&up), wide(&grad));
            close(&forward(&gate, &up).unwrap(), &reference(&gates, &ups), 1e-6);
            let Backward { output, gate: dgate, up: dup } = backward(gate, up, grad).unwrap();
            close(&output, &reference(&gates, &ups), 1e-6);
            let head = n.min(50); // every element depends on its own inputs alone
            let loss = |g: &[f64], u: &[f64]| reference(g, u).iter().zip(&grads).map(|(y, d)| y * d).sum::<f64>();
            let of_gate = numeric_gradient(&gates[..head], |g| loss(g, &ups[..head]));
            let of_up = numeric_gradient(&ups[..head], |u| loss(&gates[..head], u));
            close(&dgate.reshape(&[n]).unwrap().rows(0, head).unwrap(), &of_gate, 1e-5);
            close(&dup.reshape(&[n]).unwrap().rows(0, head).unwrap(), &of_up, 1e-5);
        }
    }

    #[test]
    fn extreme_gates_stay_finite() {
        let gate = Tensor::from_slice(&[-1e4f32, -90.0, 90.0, 1e4], &[1, 4], Tag::Workspace).unwrap();
        let one = Tensor::from_slice(&[1f32; 4], &[1, 4], Tag::Workspace).unwrap();
        assert_eq!(forward(&gate, &one).unwrap().as_slice::<f32>().unwrap()[2..], [90.0, 1e4]);
        let Backward { gate: dgate, up: dup, .. } = backward(gate, one.clone(), one).unwrap();
        let values: Vec<f32> = [wide(&dgate), wide(&dup)].concat().iter().map(|&x| x as f32).collect();
        assert!(values.iter().all(|x| x.is_finite()));
        assert!(values[0].abs() < 1e-6 && (values[3] - 1.0).abs() < 1e-6);
    }
}
