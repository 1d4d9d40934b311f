//! What all layers share in one forward pass over a packed batch.

use super::{Linear, Mixture};
use crate::LlamaConfig;
use nibble_kernels::{
    attention::{Heads, Layout, Segment},
    cast::into_dtypes,
    dropout::Mask,
    rotary::{RopeScaling, RotaryTable},
};
use nibble_runtime::{DType, Device, Result, Tag, Tensor};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Layout of a batch, rotary angles and dropout of one pass.
#[derive(Clone, Debug)]
pub struct Pass {
    /// Position of each token in its sequence, i32 `[T]`.
    pub positions: Tensor,
    /// Which tokens attend to which.
    pub layout: Layout,
    /// Angles of the positions.
    pub rope: RotaryTable,
    /// Head counts.
    pub heads: Heads,
    /// Dropout of the adapters' inputs; `None` outside of training.
    pub dropout: Option<DropoutKey>,
    /// Rows that the feed-forward block takes at a time where it does not keep what it makes; the gradients of its parameters
    /// are summed over these parts.
    pub feed_forward_rows: usize,
    /// Adapters for rows of several, instead of those on the layers, and the owner of each row, i32 `[T]`.
    pub(crate) mixture: Option<(Arc<Mixture>, Tensor)>,
    /// The adapters of the layer that is at work.
    pub(crate) casts: Casts,
}

/// A and B of a layer's adapters in the type of the computation, by [`Linear::index`]: made in one launch, and there for
/// as long as the layer is at work.
#[derive(Clone, Debug, Default)]
pub(crate) struct Casts(Arc<Mutex<BTreeMap<u32, (Tensor, Tensor)>>>);

/// [`Casts`] that are there until this is dropped.
#[must_use]
pub(crate) struct CastsHeld<'a>(&'a Casts);

impl Casts {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, (Tensor, Tensor)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A and B of a linear, if they are there.
    pub(crate) fn of(&self, linear: u32) -> Option<(Tensor, Tensor)> {
        self.lock().get(&linear).cloned()
    }

    /// Makes those of a layer.
    fn make(&self, linears: [&Linear; 7], dtype: DType) -> Result<()> {
        let adapters = linears.iter().filter_map(|linear| linear.lora.as_ref().map(|lora| (linear.index, lora)));
        let (numbers, values): (Vec<u32>, Vec<_>) =
            adapters.map(|(number, lora)| (number, [&lora.a.value, &lora.b.value])).unzip();
        let mut made = into_dtypes(&values.concat(), dtype, Tag::Workspace)?.into_iter();
        let pairs = numbers.into_iter().zip(std::iter::from_fn(|| made.next().zip(made.next())));
        self.lock().extend(pairs);
        Ok(())
    }
}

impl Drop for CastsHeld<'_> {
    fn drop(&mut self) {
        self.0.lock().clear();
    }
}

/// What dropout masks of a pass depend on, besides probability and layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutKey {
    /// Seed of the run.
    pub seed: u64,
    /// Micro-batch, counted over the whole run.
    pub step: u32,
}

/// The rotary angles of the last pass, kept for the next: making them takes the host milliseconds.
#[derive(Debug, Default)]
pub struct Angles(Mutex<Option<RotaryTable>>);

impl Angles {
    /// The angles of positions `0..length` at least, on `device`.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn of(&self, config: &LlamaConfig, length: usize, device: Device) -> Result<RotaryTable> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // With dynamic scaling they depend on the length.
        let exact = matches!(config.rope.scaling, RopeScaling::Dynamic { .. });
        let suits = |table: &&RotaryTable| {
            table.device() == device && (table.len() == length || (!exact && table.len() > length))
        };
        if let Some(table) = kept.as_ref().filter(suits) {
            return Ok(table.clone());
        }
        let length = if exact { length } else { length.next_power_of_two() };
        Ok(kept.insert(config.rope.table(config.head_dim, length)?.to_device(device)?).clone())
    }
}

impl Pass {
    /// A pass over whole sequences of these lengths, packed one after another; `rope` has the angles of the longest.
    pub fn packed(
        config: &LlamaConfig,
        lengths: &[usize],
        rope: RotaryTable,
        dropout: Option<DropoutKey>,
    ) -> Result<Self> {
        let positions: Vec<i32> = lengths.iter().flat_map(|&length| 0..length as i32).collect();
        Self::new(config, &positions, Segment::packed(lengths), rope, dropout)
    }

    /// A pass over `count` tokens that follow `past` cached ones in one sequence.
    pub fn continued(config: &LlamaConfig, past: usize, count: usize, rope: &RotaryTable) -> Result<Self> {
        let positions: Vec<i32> = (past as i32..(past + count) as i32).collect();
        let segments = vec![Segment { query: 0, queries: count, key: 0, keys: past + count }];
        Self::new(config, &positions, segments, rope.clone(), None)
    }

    /// A pass over several sequences in one cache: each `(first, past, count)` has its keys from row `first` on, of which
    /// `past` are there, and `count` tokens more to read.
    pub(crate) fn batched(config: &LlamaConfig, spans: &[(usize, usize, usize)], rope: &RotaryTable) -> Result<Self> {
        let positions: Vec<i32> =
            spans.iter().flat_map(|&(_, past, count)| past as i32..(past + count) as i32).collect();
        let mut query = 0;
        let segment = |&(key, past, queries): &(usize, usize, usize)| {
            query += queries;
            Segment { query: query - queries, queries, key, keys: past + queries }
        };
        Self::new(config, &positions, spans.iter().map(segment).collect(), rope.clone(), None)
    }

    /// The same pass, with these adapters; `owners` has a row's each.
    pub(crate) fn mixed(self, mixture: Arc<Mixture>, owners: &[i32]) -> Result<Self> {
        let owners = Tensor::from_slice(owners, &[owners.len()], Tag::Workspace)?;
        Ok(Pass { mixture: Some((mixture, owners)), ..self })
    }

    fn new(
        config: &LlamaConfig,
        positions: &[i32],
        segments: Vec<Segment>,
        rope: RotaryTable,
        dropout: Option<DropoutKey>,
    ) -> Result<Self> {
        let positions = Tensor::from_slice(positions, &[positions.len()], Tag::Workspace)?;
        let heads = Heads { query: config.num_heads, kv: config.num_kv_heads, dim: config.head_dim };
        let layout = Layout::new(segments, positions.device())?;
        Ok(Pass {
            positions,
            layout,
            rope,
            heads,
            dropout,
            feed_forward_rows: usize::MAX,
            mixture: None,
            casts: Casts::default(),
        })
    }

    /// With positions, angles and layout on `device`. Both were made together, so that each position is in the table.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn to_device(self, device: Device) -> Result<Self> {
        let positions = self.positions.into_device(device, Tag::Workspace)?;
        let (rope, layout) = (self.rope.to_device(device)?, self.layout.into_device(device)?);
        let on = |(mixture, owners): (_, Tensor)| {
            Ok::<_, nibble_runtime::Error>((mixture, owners.into_device(device, Tag::Workspace)?))
        };
        let mixture = self.mixture.map(on).transpose()?;
        Ok(Pass { positions, rope, layout, mixture, ..self })
    }

    /// Makes [`Casts`] of a layer's adapters, where the pass takes those.
    pub(crate) fn cast_adapters(&self, linears: [&Linear; 7], dtype: DType) -> Result<CastsHeld<'_>> {
        if self.mixture.is_none() {
            self.casts.make(linears, dtype)?;
        }
        Ok(CastsHeld(&self.casts))
    }

    /// The dropout mask of linear layer `layer`, where there is one.
    pub(crate) fn mask(&self, probability: f32, layer: u32) -> Option<Mask> {
        let DropoutKey { seed, step } = self.dropout.filter(|_| probability > 0.0)?;
        Some(Mask { probability, seed, step, layer })
    }
}
