//! What is planned: a model, what trains of it, and on what.

use crate::{
    adapt,
    cli::EmbeddingBits,
    model::Outline,
    paging::{Bytes, PagedBudget},
    settings::{Method, Settings},
};
use anyhow::Result;
use nibble_kernels::cross_entropy;
use nibble_models::{
    LlamaConfig,
    files::peft::{self, AdapterConfig},
};
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
    /// The adapter to go on with, where the settings name one.
    given: Option<AdapterConfig>,
    /// `None` for the CPU.
    pub chip: Option<Chip>,
}

/// What trains.
#[derive(Clone, Debug)]
pub struct Trains {
    /// Every weight.
    pub all: bool,
    pub embedding: bool,
    /// The head, which may be the embedding.
    pub head: bool,
    /// Whether the head is a table of its own.
    pub own_head: bool,
    /// The rank of the adapter on each linear of each layer; 0 where there is none.
    pub ranks: Vec<[usize; 7]>,
    /// Whether adapters have lengths.
    pub dora: bool,
    /// Whether adapters drop elements of their inputs.
    pub dropout: bool,
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
    ///
    /// # Errors
    /// The adapter to start from cannot be read.
    pub fn new(outline: &Outline, settings: &Settings, chip: Option<Chip>) -> Result<Self> {
        let usual = if chip.is_some() { DType::BF16 } else { DType::F32 };
        let dtype = settings.dtype.0.unwrap_or(usual);
        let chosen = settings.quantization().0.map(|_| (settings.block_size, !settings.no_double_quant));
        let quantized = if settings.method == Method::Full { None } else { outline.quantized.or(chosen) };
        let stored = if dtype == DType::F32 { outline.stored } else { dtype };
        let given = settings.adapter_init.as_ref().map(|dir| peft::read_adapter(dir)).transpose()?;
        let mut config = outline.config.clone();
        // At most: some may be rows that the model has to spare.
        config.vocab_size += settings.new_tokens.len();
        let given = given.map(|adapter| adapter.config);
        Ok(Job { config, dtype, stored, quantized, settings: settings.clone(), given, chip })
    }

    /// Tokens of a micro-batch.
    pub fn tokens(&self) -> usize {
        self.settings.batch_size * self.settings.seq_len
    }

    /// Rows whose logits are held at a time.
    pub fn head_rows(&self) -> usize {
        let at_once = self.settings.feed_forward_rows.map_or(usize::MAX, |rows| rows.saturating_mul(2));
        cross_entropy::chunk_rows(self.config.vocab_size, at_once.min(self.tokens()), self.chip.is_none())
    }

    /// Whether a layer has its 4-bit weights in 16 bits, too.
    pub fn holds_dequantized(&self, layer: usize) -> bool {
        self.quantized.is_some() && layer < self.settings.dequantized_layers
    }

    pub fn tables_in_8_bits(&self) -> bool {
        self.settings.embedding_bits == EmbeddingBits::Bits8
    }

    /// What trains, by the rules that the run will attach it by.
    pub fn trains(&self) -> Trains {
        let (c, tied) = (&self.config, self.config.tie_word_embeddings);
        let none = vec![[0; 7]; c.num_layers];
        if self.settings.method == Method::Full {
            return Trains {
                all: true,
                embedding: true,
                head: true,
                own_head: !tied,
                ranks: none,
                dora: false,
                dropout: false,
            };
        }
        let wanted = || adapt::wanted(&self.settings, tied);
        let adapter = self.given.clone().unwrap_or_else(wanted);
        let names = c.weights().into_iter().filter(|(name, shape)| name.contains(".layers.") && shape.len() == 2);
        let rank = |(name, _): (String, Vec<usize>)| {
            let name = name.trim_end_matches(".weight");
            if adapter.adapts(name) { adapter.rank_of(name) } else { 0 }
        };
        let mut ranks = names.map(rank);
        let ranks = none.into_iter().map(|layer| layer.map(|_| ranks.next().unwrap_or(0))).collect();
        let [embedding, head] = adapter.saves();
        let own_head = !tied || head || (embedding && !adapter.ensure_weight_tying);
        Trains {
            all: false,
            embedding,
            head: if own_head { head } else { embedding },
            own_head,
            ranks,
            dora: adapter.use_dora,
            dropout: adapter.lora_dropout > 0.0,
        }
    }

    /// Shapes of what trains, in the order of their ids.
    pub fn parameters(&self) -> Vec<Vec<usize>> {
        let (c, trains) = (&self.config, self.trains());
        let linears = c.linear_shapes();
        let table = vec![c.vocab_size, c.hidden_size];
        let head = (trains.own_head && trains.head).then(|| table.clone());
        let mut all = Vec::new();
        if trains.all {
            all.push(table);
            all.extend(vec![vec![c.hidden_size]; 2 * c.num_layers + 1]);
            all.extend(head);
            all.extend(vec![linears.map(Vec::from); c.num_layers].concat());
            return all;
        }
        for (&[n, k], &rank) in trains.ranks.iter().flat_map(|ranks| linears.iter().zip(ranks)) {
            if rank > 0 {
                all.extend([vec![rank, k], vec![n, rank]]);
                all.extend(trains.dora.then(|| vec![n]));
            }
        }
        all.extend(trains.embedding.then_some(table));
        all.extend(head);
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
