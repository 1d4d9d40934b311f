//! What is planned: a model, what trains of it, and on what.

use crate::{
    cli::EmbeddingBits,
    model::Outline,
    paging::{Bytes, PagedBudget},
    settings::{Method, Settings},
};
use anyhow::Result;
use nibble_models::{LlamaConfig, llama::TARGETS};
use nibble_optim::PagedState;
use nibble_runtime::{DType, ParamId, cuda::Chip};

/// A training step, by its sizes alone.
#[derive(Clone, Debug)]
pub struct Job {
    pub config: LlamaConfig,
    /// Type of the computation.
    pub dtype: DType,
    /// Type of weights that are not quantized.
    pub stored: DType,
    /// Weights that share a scale, and whether the scales are quantized too; `None` for a base that is not quantized.
    pub quantized: Option<(usize, bool)>,
    /// What the run was asked to do.
    pub settings: Settings,
    /// `None` for the CPU.
    pub chip: Option<Chip>,
}

/// Pages of the optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    pub count: usize,
    /// That may be in device memory.
    pub resident: usize,
    pub bytes: usize,
}

impl Job {
    /// The job of a run with these settings, of the model that `outline` describes.
    pub fn new(outline: &Outline, settings: &Settings, chip: Option<Chip>) -> Self {
        let usual = if chip.is_some() { DType::BF16 } else { DType::F32 };
        let dtype = settings.dtype.0.unwrap_or(usual);
        let double = !settings.no_double_quant;
        let chosen = settings.quantization().0.map(|_| (settings.block_size, double));
        let quantized = if settings.method == Method::Full { None } else { outline.quantized.or(chosen) };
        let stored = if dtype == DType::F32 { outline.stored } else { dtype };
        Job { config: outline.config.clone(), dtype, stored, quantized, settings: settings.clone(), chip }
    }

    /// Tokens of a micro-batch.
    pub fn tokens(&self) -> usize {
        self.settings.batch_size * self.settings.seq_len
    }

    pub fn is_full(&self) -> bool {
        self.settings.method == Method::Full
    }

    pub fn tables_in_8_bits(&self) -> bool {
        self.settings.embedding_bits == EmbeddingBits::Bits8
    }

    /// Layers that run again in the backward pass.
    pub fn recomputed(&self) -> usize {
        self.settings.recompute.0.min(self.config.num_layers)
    }

    /// The rank of the adapter on each linear of a layer; 0 where there is none.
    pub fn ranks(&self) -> [usize; 7] {
        let on = |name: &str| !self.is_full() && self.settings.targets.iter().any(|target| target == name);
        TARGETS.map(|name| if on(name) { self.settings.rank } else { 0 })
    }

    /// Shapes of what trains, in the order of their ids.
    pub fn parameters(&self) -> Vec<Vec<usize>> {
        let c = &self.config;
        let linears = c.linear_shapes();
        if !self.is_full() {
            let layer = linears.iter().zip(self.ranks()).filter(|(_, rank)| *rank > 0);
            let layer: Vec<_> = layer.flat_map(|(&[n, k], r)| [vec![r, k], vec![n, r]]).collect();
            return vec![layer; c.num_layers].concat();
        }
        let table = vec![c.vocab_size, c.hidden_size];
        let mut all = vec![table.clone()];
        all.extend(vec![vec![c.hidden_size]; 2 * c.num_layers + 1]);
        all.extend((!c.tie_word_embeddings).then_some(table));
        all.extend(vec![linears.map(Vec::from); c.num_layers].concat());
        all
    }

    /// Numbers that train.
    pub fn trained(&self) -> usize {
        self.parameters().iter().map(|shape| shape.iter().product::<usize>()).sum()
    }

    /// The optimizer's pages, where it has any.
    ///
    /// # Errors
    /// Pages are too small.
    pub fn pages(&self) -> Result<Option<Pages>> {
        let s = &self.settings;
        let budget = match PagedBudget::of(s, self.trained(), self.chip.is_none()) {
            PagedBudget::Off => return Ok(None),
            PagedBudget::Auto => usize::MAX,
            PagedBudget::Bytes(Bytes(bytes)) => bytes,
        };
        let shapes = self.parameters();
        let params = shapes.iter().enumerate().map(|(id, shape)| (ParamId(id), &shape[..]));
        let bytes = s.page_size.0;
        let count = PagedState::count_pages(params, s.optimizer_bits, true, bytes)?;
        Ok(Some(Pages { count, resident: count.min(budget / bytes), bytes }))
    }
}
