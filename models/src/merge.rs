//! Adapters as part of the weights, one weight at a time, straight from the checkpoint.
//!
//! What an adapter adds to a weight is `s·B·A`, or with DoRA `diag(m/‖V‖)·V − W` for `V = W + s·B·A`, or for a whole
//! embedding or head its difference to the base's. Those of several adapters are combined by [`Combination`] (the linear
//! one is what peft's `add_weighted_adapter` calls "cat"; its "linear" mixes the A's and the B's instead). All of it is in
//! f32 and rounded once.

mod combine;

pub use combine::{Combination, Rule};

use crate::{
    Error, LlamaConfig, Result,
    files::{
        checkpoint::{Checkpoint, CheckpointTensor},
        peft::{Adapter, Factors},
    },
};
use nibble_kernels::{
    dora,
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

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// A checkpoint with adapters merged into it.
#[derive(Debug)]
pub struct Merged<'a> {
    checkpoint: &'a Checkpoint,
    config: LlamaConfig,
    parts: Vec<Part>,
    combination: Combination,
}

/// A weight of a merged model before it is rounded.
pub struct Exact {
    /// As the checkpoint has it, or in f32 where something was added.
    pub value: Tensor,
    /// Sum of the squares of what the adapters added.
    change: f64,
}

impl Exact {
    /// A weight to which nothing was added.
    pub(crate) fn unchanged(value: Tensor) -> Exact {
        Exact { value, change: 0.0 }
    }
}

impl Part {
    /// Checks that every matrix has a weight to go to.
    fn check(&self, checkpoint: &Checkpoint) -> Result<()> {
        let weights = checkpoint.config().weights();
        let model = checkpoint.path().display();
        let other = |what: String| {
            Error::mismatch(&self.path, format!("{what}; is the adapter for another model than {model}?"))
        };
        for (module, Factors { a, b, magnitude }) in &self.adapter.factors {
            let name = format!("{module}.weight");
            let shape = weights.iter().find(|(known, shape)| *known == name && shape.len() == 2).map(|(_, s)| &s[..]);
            let fits = matches!((shape, b.shape(), a.shape()), (Some(&[n, k]), &[rows, r], &[rank, columns])
                if module.ends_with("_proj") && (n, k) == (rows, columns) && r == rank
                    && magnitude.as_ref().is_none_or(|magnitude| magnitude.shape() == [n]));
            if !fits {
                let (a, b, layer) = (a.shape(), b.shape(), shape.unwrap_or_default());
                return Err(other(format!("{module}: A {a:?} and B {b:?} do not fit the model's layer {layer:?}")));
            }
        }
        let width = checkpoint.config().hidden_size;
        let tables = [&self.adapter.embedding, &self.adapter.head];
        match tables.into_iter().flatten().find(|table| !matches!(table.shape(), &[_, found] if found == width)) {
            Some(table) => {
                Err(other(format!("its embedding or head is {:?} and the model's are {width} wide", table.shape())))
            }
            None => Ok(()),
        }
    }

    /// Tokens of its embedding and head, where it has any.
    fn vocab(&self) -> Option<usize> {
        [&self.adapter.embedding, &self.adapter.head].into_iter().flatten().map(|table| table.shape()[0]).next()
    }

    /// What it adds to a weight that is `base`.
    fn delta(&self, name: &str, base: &Tensor) -> Result<Option<Tensor>> {
        let table = match name {
            EMBEDDING => self.adapter.embedding.as_ref(),
            HEAD => self.adapter.head.as_ref(),
            _ => None,
        };
        let wide = |tensor: &Tensor| tensor.cast(DType::F32, Tag::Workspace);
        if let Some(table) = table {
            let mut delta = table.copy(Tag::Workspace)?;
            let base = wide(base)?;
            delta.as_mut_slice::<f32>()?.iter_mut().zip(base.as_slice::<f32>()?).for_each(|(x, y)| *x -= y);
            return Ok(Some(delta));
        }
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let Some(Factors { a, b, magnitude }) = self.adapter.factors.get(module) else { return Ok(None) };
        let (a, scale) = (Weight::Dense(a.clone()), self.adapter.scale(module));
        let Some(magnitude) = magnitude else { return Ok(Some(input_grad(b, &a, scale)?)) };
        let mut v = wide(base)?;
        input_grad_add(b, &a, scale, &mut v)?;
        let gains = dora::gains(magnitude, &dora::inverse_norms(&v)?)?;
        let (base, width) = (wide(base)?, v.shape()[1]);
        let rows = v.as_mut_slice::<f32>()?.chunks_mut(width).zip(base.as_slice::<f32>()?.chunks(width));
        for ((v, w), gain) in rows.zip(gains.as_slice::<f32>()?) {
            v.iter_mut().zip(w).for_each(|(v, w)| *v = gain * *v - w);
        }
        Ok(Some(v))
    }
}

impl<'a> Merged<'a> {
    /// The checkpoint with these adapters, which may be none.
    ///
    /// # Errors
    /// An adapter names a layer that the model lacks, or its shapes do not fit: it was made for another model. An adapter
    /// with tokens of its own is not alone, or not wanted whole. The density is not in (0, 1].
    pub fn new(checkpoint: &'a Checkpoint, parts: Vec<Part>, combination: Combination) -> Result<Self> {
        if !(combination.density > 0.0 && combination.density <= 1.0) {
            return Err(Error::Invalid(format!(
                "a density of {}; expected above 0 and at most 1",
                combination.density
            )));
        }
        parts.iter().try_for_each(|part| part.check(checkpoint))?;
        let mut config = checkpoint.config().clone();
        for part in &parts {
            let Some(vocab) = part.vocab() else { continue };
            let Adapter { config: settings, embedding, head, .. } = &part.adapter;
            let stays_tied = settings.ensure_weight_tying && embedding.is_some();
            config.tie_word_embeddings &= stays_tied;
            if vocab != checkpoint.config().vocab_size {
                let whole = parts.len() == 1 && part.weight == 1.0;
                let both = [embedding, head].into_iter().flatten().filter(|table| table.shape()[0] == vocab).count();
                if !whole || (both < 2 && !config.tie_word_embeddings) {
                    let what = format!(
                        "the adapter has {vocab} tokens and the model {}; such an adapter is merged alone, with weight 1, \
                         embedding and head together",
                        config.vocab_size
                    );
                    return Err(Error::mismatch(&part.path, what));
                }
                config.vocab_size = vocab;
            }
        }
        Ok(Merged { checkpoint, config, parts, combination })
    }

    /// The checkpoint below.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// Shape and settings of the merged model: adapters may bring tokens, and untie embedding and head.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The folder whose adapter has tokens that the model lacks, and so the tokenizer too.
    pub fn tokenizer_folder(&self) -> Option<&std::path::Path> {
        let base = self.checkpoint.config().vocab_size;
        self.parts.iter().find(|part| part.vocab().is_some_and(|vocab| vocab != base)).map(|part| part.path.as_path())
    }

    /// Names and shapes of all weights, in the order of the forward pass.
    pub fn weights(&self) -> Vec<(String, Vec<usize>)> {
        self.config.weights()
    }

    /// One weight. 4-bit ones are dequantized.
    ///
    /// # Errors
    /// The checkpoint lacks it or has it in another shape.
    pub fn weight(&self, name: &str, shape: &[usize]) -> Result<Exact> {
        let tag = Tag::Workspace;
        let base = self.checkpoint.config();
        if (name == EMBEDDING || name == HEAD) && shape[0] != base.vocab_size {
            // Tokens of its own: there is nothing to compare with.
            let adapter = &self.parts[0].adapter;
            let tables = [&adapter.embedding, &adapter.head];
            let own = tables[usize::from(name == HEAD)].as_ref().or(tables[0].as_ref()).cloned();
            let value = own.ok_or_else(|| Error::Invalid(format!("the adapter lacks {name}")))?;
            return Ok(Exact::unchanged(value));
        }
        let of_base = if name == HEAD && base.tie_word_embeddings { EMBEDDING } else { name };
        let value = match self.checkpoint.weight(of_base, shape, tag)? {
            CheckpointTensor::Dense(tensor) => tensor,
            CheckpointTensor::Quantized(quantized) => dequantize(&quantized, tag)?,
        };
        let mut deltas = Vec::new();
        for part in &self.parts {
            if let Some(delta) = part.delta(name, &value)? {
                deltas.push((part.weight, delta.as_slice::<f32>()?.to_vec()));
            }
        }
        if deltas.is_empty() {
            return Ok(Exact::unchanged(value));
        }
        let number = self.weights().iter().position(|(known, _)| known == name).unwrap_or_default();
        let delta = self.combination.of(deltas, number as u32);
        let mut value = value.into_dtype(DType::F32, tag)?;
        let mut change = 0.0;
        for (x, d) in value.as_mut_slice::<f32>()?.iter_mut().zip(&delta) {
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
