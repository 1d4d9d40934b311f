//! Adapters as part of the weights: `W + Σ wᵢ·sᵢ·Bᵢ·Aᵢ`, one weight at a time, straight from the checkpoint.
//!
//! The sum is that of the adapters' effects, each with its own scale `s` (peft's `add_weighted_adapter` calls this "cat";
//! its "linear" mixes the A's and the B's instead). It is made in f32 and rounded once.

use crate::{
    Error, Result,
    files::{
        checkpoint::{Checkpoint, CheckpointTensor},
        peft::Adapter,
    },
};
use nibble_kernels::{
    linear::{Weight, input_grad, input_grad_add},
    quantize::dequantize,
};
use nibble_runtime::{DType, Tag, Tensor};
use std::path::PathBuf;

/// An adapter and how much of it goes into the weights.
#[derive(Clone, Debug)]
pub struct Part {
    /// Where it was read from.
    pub path: PathBuf,
    pub adapter: Adapter,
    pub weight: f32,
}

/// A checkpoint with adapters merged into it.
#[derive(Debug)]
pub struct Merged<'a> {
    checkpoint: &'a Checkpoint,
    parts: Vec<Part>,
}

/// A weight of a merged model before it is rounded.
pub struct Exact {
    /// As the checkpoint has it, or in f32 where something was added.
    pub value: Tensor,
    /// Sum of the squares of what the adapters added.
    change: f64,
}

impl<'a> Merged<'a> {
    /// The checkpoint with these adapters, which may be none.
    ///
    /// # Errors
    /// An adapter names a layer that the model lacks, or its shapes do not fit: it was made for another model.
    pub fn new(checkpoint: &'a Checkpoint, parts: Vec<Part>) -> Result<Self> {
        let weights = checkpoint.config().weights();
        for Part { path, adapter, .. } in &parts {
            for (module, (a, b)) in &adapter.tensors {
                let name = format!("{module}.weight");
                let shape =
                    weights.iter().find(|(known, shape)| *known == name && shape.len() == 2).map(|(_, s)| &s[..]);
                let fits = matches!((shape, b.shape(), a.shape()), (Some(&[n, k]), &[rows, r], &[rank, columns])
                    if module.ends_with("_proj") && (n, k) == (rows, columns) && r == rank);
                if !fits {
                    let model = checkpoint.path().display();
                    let what = format!(
                        "{module}: A {:?} and B {:?} do not fit the model's layer {:?}; is the adapter for another model \
                         than {model}?",
                        a.shape(),
                        b.shape(),
                        shape.unwrap_or_default()
                    );
                    return Err(Error::mismatch(path, what));
                }
            }
        }
        Ok(Merged { checkpoint, parts })
    }

    /// The checkpoint below.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// Names and shapes of all weights, in the order of the forward pass.
    pub fn weights(&self) -> Vec<(String, Vec<usize>)> {
        self.checkpoint.config().weights()
    }

    /// One weight. 4-bit ones are dequantized.
    ///
    /// # Errors
    /// The checkpoint lacks it or has it in another shape.
    pub fn weight(&self, name: &str, shape: &[usize]) -> Result<Exact> {
        let tag = Tag::Workspace;
        let value = match self.checkpoint.weight(name, shape, tag)? {
            CheckpointTensor::Dense(tensor) => tensor,
            CheckpointTensor::Quantized(quantized) => dequantize(&quantized, tag)?,
        };
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let mut delta: Option<Tensor> = None;
        for Part { adapter, weight, .. } in &self.parts {
            let Some((a, b)) = adapter.tensors.get(module) else { continue };
            let (a, scale) = (Weight::Dense(a.clone()), weight * adapter.scale(module));
            match &mut delta {
                None => delta = Some(input_grad(b, &a, scale)?),
                Some(delta) => input_grad_add(b, &a, scale, delta)?,
            }
        }
        let Some(delta) = delta else { return Ok(Exact { value, change: 0.0 }) };
        let mut value = value.into_dtype(DType::F32, tag)?;
        let mut change = 0.0;
        for (x, d) in value.as_mut_slice::<f32>()?.iter_mut().zip(delta.as_slice::<f32>()?) {
            *x += d;
            change += f64::from(*d) * f64::from(*d);
        }
        Ok(Exact { value, change })
    }
}

/// Weights that are compared at a time: a whole number of blocks, and little beside a layer.
const CHUNK: usize = 1 << 20;

/// How far the weights that were written are from the exact ones.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Largest difference of one weight.
    pub largest: f32,
    difference: f64,
    total: f64,
    change: f64,
}

impl Loss {
    /// Takes `written`, which stands for all of `exact`, into account.
    ///
    /// # Errors
    /// They differ in length.
    pub fn add(&mut self, exact: &Exact, written: &Tensor) -> Result<()> {
        self.add_parts(exact, |start, exact| {
            let mut values = vec![0.0; exact.len()];
            written.read_f32(start, &mut values)?;
            Ok(values)
        })
    }

    /// As [`Loss::add`], in parts: `write` is given where a part starts and its exact values, and answers with those
    /// that were written. Parts are whole blocks of any type.
    ///
    /// # Errors
    /// Those of `write`, or an answer of another length.
    pub fn add_parts(&mut self, exact: &Exact, mut write: impl FnMut(usize, &[f32]) -> Result<Vec<f32>>) -> Result<()> {
        self.change += exact.change;
        let total = exact.value.numel();
        let mut values = vec![0.0; CHUNK.min(total)];
        for start in (0..total).step_by(CHUNK) {
            let count = CHUNK.min(total - start);
            exact.value.read_f32(start, &mut values[..count])?;
            let written = write(start, &values[..count])?;
            if written.len() != count {
                return Err(Error::Invalid(format!("{count} weights were written as {}", written.len())));
            }
            for (x, y) in values.iter().zip(&written) {
                let difference = (x - y).abs();
                self.largest = self.largest.max(difference);
                self.difference += f64::from(difference) * f64::from(difference);
                self.total += f64::from(*x) * f64::from(*x);
            }
        }
        Ok(())
    }

    /// Norm of the difference over that of the weights.
    pub fn relative(&self) -> f64 {
        (self.difference / self.total.max(f64::MIN_POSITIVE)).sqrt()
    }

    /// Norm of the difference over that of what the adapters changed; `None` where they changed nothing. Near 1, rounding
    /// is as large as what was learned.
    pub fn of_change(&self) -> Option<f64> {
        (self.change > 0.0).then(|| (self.difference / self.change).sqrt())
    }
}
