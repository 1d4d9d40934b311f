//! Llama: embedding, layers, final norm and head, with forward and backward written by hand.

mod adapter;
mod adapters;
mod decoder;
mod init;
mod keep;
mod layer;
mod linear;
mod load;
mod mixture;
mod pass;
mod random;
mod save;
mod svd;
mod tables;

#[cfg(test)]
mod composed;
#[cfg(test)]
mod tests;

pub use adapter::TARGETS;
pub use adapters::Adapters;
pub(crate) use decoder::{Decoder, Row};
pub use init::Init;
pub use keep::{Activations, Extent, Keeping};
pub use layer::{Layer, LayerCache};
pub use linear::{Linear, Lora, Magnitude, Param};
pub use load::{Footprint, LoadOptions, Quantization};
pub use mixture::Mixture;
pub use pass::{Angles, DropoutKey, Pass};
pub use random::SHAPES;

use crate::{Error, LlamaConfig, Result};
use layer::LayerNode;
use nibble_kernels::{
    cross_entropy::{self, Wanted},
    embedding, rms_norm,
    table::{self, Table},
};
use nibble_runtime::{DType, Device, Function, GradSink, ParamId, Stash, Tag, Tape, Tensor, Var};
use std::path::PathBuf;

/// A Llama on a device.
#[derive(Debug)]
pub struct Llama {
    /// Shape and settings.
    pub config: LlamaConfig,
    /// Where the weights were read from.
    pub source: PathBuf,
    /// Token embedding `[V, D]`.
    pub embedding: Param<Table>,
    /// The layers in order.
    pub layers: Vec<Layer>,
    /// Final norm, `[D]`.
    pub norm: Param,
    /// The head `[V, D]`; `None` if it is the embedding.
    pub head: Option<Param<Table>>,
    /// Type of activations.
    pub dtype: DType,
    /// What each layer keeps for the backward pass. (The last are the first to be done with it.)
    pub activations: Activations,
    /// Rows that a feed-forward block takes at a time, see [`Pass::feed_forward_rows`]; the head then takes fewer, too.
    pub feed_forward_rows: usize,
    /// Host memory for what layers keep there.
    pub stash: Stash,
    /// Adapters by name; that of one is on the layers.
    pub adapters: Adapters,
    /// Rotary angles.
    pub angles: Angles,
}

/// Sequences packed one after another, with the token that follows each.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// Token ids of all sequences.
    pub ids: &'a [i32],
    /// The token to predict at each position, or [`cross_entropy::IGNORE`].
    pub labels: &'a [i32],
    /// Tokens of each sequence.
    pub lengths: &'a [usize],
}

impl Llama {
    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.embedding.value.device()
    }

    /// Every trainable parameter with its name, by id.
    pub fn parameters(&self) -> Vec<(ParamId, String, &Tensor)> {
        let mut all = Vec::new();
        let mut push = |id, name, value| all.push((id, name, value));
        if let Some(id) = self.norm.id {
            push(id, self.norm.name.clone(), &self.norm.value);
        }
        for param in [Some(&self.embedding), self.head.as_ref()].into_iter().flatten() {
            if let (Some(id), Table::Dense(value)) = (param.id, &param.value) {
                push(id, param.name.clone(), value);
            }
        }
        self.layers.iter().for_each(|layer| layer.visit(&mut push));
        all.sort_by_key(|(id, ..)| *id);
        all
    }

    /// As [`Llama::parameters`], to write.
    pub fn parameters_mut(&mut self) -> Vec<(ParamId, &mut Tensor)> {
        let mut all = Vec::new();
        let Llama { embedding, norm, head, layers, .. } = self;
        if let Some(id) = norm.id {
            all.push((id, &mut norm.value));
        }
        for param in [Some(embedding), head.as_mut()].into_iter().flatten() {
            if let (Some(id), Table::Dense(value)) = (param.id, &mut param.value) {
                all.push((id, value));
            }
        }
        layers.iter_mut().for_each(|layer| layer.visit_mut(&mut |id, value| all.push((id, value))));
        all.sort_by_key(|(id, _)| *id);
        all
    }

    /// The head, or the embedding that takes its place.
    fn head_param(&self) -> &Param<Table> {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Hidden states `[T, D]` after the last layer, on the tape.
    fn run<'a>(&'a self, tape: &mut Tape<'a>, ids: &'a [i32], pass: &'a Pass) -> Result<Var> {
        let mut x = match (self.embedding.id, &self.embedding.value) {
            (Some(id), Table::Dense(value)) => {
                let table = tape.parameter(id, value);
                tape.apply(EmbeddingNode { ids, dtype: self.dtype }, &[&table])?
            }
            (_, table) => Var::constant(table::gather(ids, table, self.dtype)?),
        };
        for (i, layer) in self.layers.iter().enumerate() {
            let (keeping, stash) = (self.activations.of(i), &self.stash);
            let mut inputs = vec![x];
            layer.visit(&mut |id, _, value| inputs.push(tape.parameter(id, value)));
            let inputs: Vec<&Var> = inputs.iter().collect();
            x = tape.apply(LayerNode { layer, pass, keeping, stash }, &inputs)?;
        }
        let weight = match self.norm.id {
            Some(id) => tape.parameter(id, &self.norm.value),
            None => Var::constant(self.norm.value.clone()),
        };
        Ok(tape.apply(NormNode { eps: self.config.rms_norm_eps }, &[&x, &weight])?)
    }

    /// A pass over whole sequences of these lengths.
    fn pass(&self, lengths: &[usize], dropout: Option<DropoutKey>) -> Result<Pass> {
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let rope = self.angles.of(&self.config, longest, self.device())?;
        let pass = Pass::packed(&self.config, lengths, rope, dropout)?.to_device(self.device())?;
        Ok(Pass { feed_forward_rows: self.feed_forward_rows, ..pass })
    }

    /// Loss of a batch without gradients.
    pub fn evaluate(&self, batch: Packed) -> Result<cross_entropy::Output> {
        let pass = self.pass(batch.lengths, None)?;
        let hidden = self.run(&mut Tape::inference(), batch.ids, &pass)?.value;
        Ok(cross_entropy::head_loss(&hidden, &self.head_param().value, batch.labels, 1.0, Wanted::default())?)
    }

    /// Loss of a batch; the gradients of `scale · Σ nll` by every trainable parameter go to `sink`.
    pub fn train(
        &self,
        batch: Packed,
        scale: f32,
        dropout: Option<DropoutKey>,
        sink: &mut impl GradSink,
    ) -> Result<cross_entropy::Output> {
        let pass = self.pass(batch.lengths, dropout)?;
        let mut tape = Tape::new();
        // Of a step that failed.
        self.stash.clear();
        let hidden = self.run(&mut tape, batch.ids, &pass)?;
        let head = self.head_param();
        let wanted = {
            // Logits of so many tokens take what a part of a feed-forward block does.
            let at_once = Some(self.feed_forward_rows.saturating_mul(2));
            Wanted { hidden: true, head: head.id.is_some(), at_once }
        };
        let mut output = cross_entropy::head_loss(&hidden.value, &head.value, batch.labels, scale, wanted)?;
        if let (Some(id), Some(grad)) = (head.id, output.dhead.take()) {
            sink.parameter(id, grad)?;
        }
        if let Some(grad) = output.dhidden.take() {
            tape.backward(&hidden, grad, sink)?;
        }
        Ok(output)
    }

    /// Logits f32 `[T, V]` of packed sequences.
    pub fn logits(&self, ids: &[i32], lengths: &[usize]) -> Result<Tensor> {
        let pass = self.pass(lengths, None)?;
        let hidden = self.run(&mut Tape::inference(), ids, &pass)?.value;
        self.project(&hidden)
    }

    /// Logits f32 of final hidden states.
    fn project(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(table::project(hidden, &self.head_param().value)?)
    }

    /// An empty KV cache for up to `capacity` tokens of one sequence.
    pub fn cache(&self, capacity: usize) -> Result<Vec<LayerCache>> {
        let shape = [capacity, self.config.num_kv_heads * self.config.head_dim];
        let rows = || Tensor::zeros(&shape, self.dtype, self.device(), Tag::Activations);
        self.layers.iter().map(|_| Ok(LayerCache { keys: rows()?, values: rows()? })).collect()
    }

    /// Logits f32 `[1, V]` after the last of `ids`, which follow the `past` tokens that the cache holds.
    pub fn next_logits(
        &self,
        ids: &[i32],
        past: usize,
        rope: &nibble_kernels::rotary::RotaryTable,
        cache: &mut [LayerCache],
    ) -> Result<Tensor> {
        if ids.is_empty() || cache.len() != self.layers.len() {
            return Err(Error::Invalid("decoding needs a token and the cache that this model made".into()));
        }
        let pass = Pass::continued(&self.config, past, ids.len(), rope)?.to_device(self.device())?;
        self.last_logits(ids, &pass, &[ids.len() - 1], cache)
    }

    /// Logits f32 `[rows, V]` after the rows `last` of `ids`, which `pass` lays out over the cache: each of its segments
    /// continues what the cache holds of it.
    pub(crate) fn last_logits(
        &self,
        ids: &[i32],
        pass: &Pass,
        last: &[usize],
        cache: &mut [LayerCache],
    ) -> Result<Tensor> {
        let mut x = table::gather(ids, &self.embedding.value, self.dtype)?;
        for (layer, cache) in self.layers.iter().zip(cache) {
            x = layer.forward(&x, pass, Some(cache), Extent::Inputs)?.0;
        }
        if last.len() < ids.len() {
            let width = x.dims2("hidden states")?.1;
            let mut chosen = Tensor::empty(&[last.len(), width], x.dtype(), x.device(), Tag::Workspace)?;
            for (i, &row) in last.iter().enumerate() {
                chosen.copy_from(i * width, &x.rows(row, 1)?)?;
            }
            x = chosen;
        }
        let (hidden, _) = rms_norm::forward(&x, &self.norm.value, self.config.rms_norm_eps)?;
        self.project(&hidden)
    }
}

/// Embedding by a table that trains, as a tape node. Input: the table.
struct EmbeddingNode<'a> {
    ids: &'a [i32],
    dtype: DType,
}

impl Function for EmbeddingNode<'_> {
    type Saved = ();

    fn forward(&self, inputs: &[Tensor]) -> nibble_runtime::Result<(Tensor, ())> {
        Ok((embedding::forward(self.ids, &inputs[0], self.dtype)?, ()))
    }

    fn backward(
        &self,
        inputs: &[Tensor],
        (): (),
        grad: Tensor,
        _: &[bool],
    ) -> nibble_runtime::Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(embedding::backward(self.ids, &grad, inputs[0].shape()[0])?)])
    }
}

/// RMSNorm as a tape node. Inputs: `x` and the weight.
pub(crate) struct NormNode {
    pub eps: f32,
}

impl Function for NormNode {
    type Saved = Tensor;

    fn forward(&self, inputs: &[Tensor]) -> nibble_runtime::Result<(Tensor, Tensor)> {
        rms_norm::forward(&inputs[0], &inputs[1], self.eps)
    }

    fn backward(
        &self,
        inputs: &[Tensor],
        rstd: Tensor,
        grad: Tensor,
        wanted: &[bool],
    ) -> nibble_runtime::Result<Vec<Option<Tensor>>> {
        let mut dx = Tensor::zeros(grad.shape(), grad.dtype(), grad.device(), Tag::Workspace)?;
        let dw = rms_norm::backward_add(&inputs[0], &inputs[1], &rstd, &grad, &mut dx, wanted[1])?;
        Ok(vec![Some(dx), dw])
    }
}
