//! Settings of a training run: defaults, a TOML file, and the command line, each over the one before.

use crate::cli::{DTypeChoice, EmbeddingBits, QuantChoice};
use crate::data::{DataOptions, DataSpec, Format};
use crate::input::ReadArgs;
use crate::paging::{Bytes, PageMemory, PagedBudget};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use nibble_models::{
    files::peft::ALL_LINEAR,
    llama::{Init, TARGETS},
};
use nibble_optim::{Schedule, StateBits};
use nibble_runtime::{DeviceRequest, pager::Policy};
use serde::{Deserialize, Serialize, de};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    path::{Path, PathBuf},
    str::FromStr,
};

/// The largest whole number that TOML, in which settings are written, can hold.
const MAX_SEED: u64 = i64::MAX as u64;

/// Settings that change no result, so that a continued run may have others. Another device computes the same, but rounds
/// otherwise.
const FREE: [&str; 11] = [
    "cache",
    "out",
    "save-every",
    "save-minutes",
    "keep",
    "device",
    "recompute",
    "paged-budget",
    "page-memory",
    "page-policy",
    "page-size",
];

/// What a user gives on the command line or in a file; everything may be left out.
#[derive(Clone, Debug, Default, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrainArgs {
    /// TOML file with the same keys as these options
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Hugging Face folder, bitsandbytes 4-bit folder or .gguf file [default: the embedded model]
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Data to train on: files (JSONL, JSON, CSV, Parquet, text; also .gz, .zst) and folders of them, several with commas
    /// between, each with a weight if it is not 1: a.jsonl:2,b.csv,folder:0.5 [default: the embedded task]
    #[arg(long, value_name = "PATH[:WEIGHT],…")]
    #[serde(with = "as_optional_text", skip_serializing_if = "Option::is_none")]
    pub data: Option<DataSpec>,
    /// Data to evaluate on, before and after
    #[arg(long, value_name = "PATH,…")]
    #[serde(with = "as_optional_text", skip_serializing_if = "Option::is_none")]
    pub eval_data: Option<DataSpec>,
    #[command(flatten)]
    #[serde(flatten)]
    pub read: ReadArgs,
    /// Show the first N micro-batches, learned and unlearned text apart, and train nothing
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "1", conflicts_with = "resume")]
    #[serde(skip)]
    pub show_batch: Option<usize>,
    /// Print the outcome as one JSON object on standard output at the end
    #[arg(long)]
    #[serde(skip)]
    pub json: bool,
    /// Start from this PEFT adapter instead of a new one
    #[arg(long, value_name = "DIR")]
    pub adapter_init: Option<PathBuf>,
    /// Folder for the results; must not hold a run [default: runs/<model>-<method>-<number>]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Continue the run in this folder, or the latest one in runs/, from its last checkpoint. Its settings are the run's; only
    /// those that change no result may be given again (checkpoints, device, pages, --recompute)
    #[arg(long, value_name = "RUN_DIR", num_args = 0..=1, conflicts_with_all = ["config", "out"])]
    #[serde(skip)]
    pub resume: Option<Option<PathBuf>>,
    /// Make a checkpoint every N steps
    #[arg(long, value_name = "N")]
    pub save_every: Option<u32>,
    /// Make a checkpoint when the last one is this old; 0 turns that off [default: 30]
    #[arg(long, value_name = "MINUTES", allow_negative_numbers = true)]
    pub save_minutes: Option<f64>,
    /// Checkpoints to keep [default: 2]
    #[arg(long, value_name = "K")]
    pub keep: Option<usize>,
    /// Evaluate on the --eval-data every N steps, and keep the best in best/
    #[arg(long, value_name = "N")]
    pub eval_every: Option<u32>,
    /// Stop when this many evaluations in a row were no better than the best [default: never]
    #[arg(long, value_name = "P")]
    pub patience: Option<u32>,
    /// qlora, lora or full [default: qlora]
    #[arg(long, value_name = "METHOD")]
    pub method: Option<String>,
    /// Passes over the data [default: 1]
    #[arg(long, value_name = "N")]
    pub epochs: Option<u32>,
    /// Optimizer steps, instead of epochs
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    pub steps: Option<u32>,
    /// Examples in a micro-batch [default: 4]
    #[arg(long, value_name = "N")]
    pub batch_size: Option<usize>,
    /// Micro-batches in an optimizer step [default: 4]
    #[arg(long, value_name = "N")]
    pub grad_accum: Option<usize>,
    /// Tokens of an example at most [default: 512]
    #[arg(long, value_name = "N")]
    pub seq_len: Option<usize>,
    /// Fill each micro-batch with as many examples as fit into batch-size times seq-len tokens; they stay apart
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    pub pack: bool,
    /// Learning rate [default: 2e-4]
    #[arg(long, value_name = "RATE", allow_negative_numbers = true)]
    pub lr: Option<f64>,
    /// constant, linear or cosine [default: constant]
    #[arg(long, value_name = "NAME")]
    pub schedule: Option<String>,
    /// Steps of linear warm-up [default: 0]
    #[arg(long, value_name = "N")]
    pub warmup: Option<u32>,
    /// Decoupled weight decay [default: 0]
    #[arg(long, value_name = "RATE", allow_negative_numbers = true)]
    pub weight_decay: Option<f64>,
    /// β₁ and β₂ of AdamW [default: 0.9,0.999]
    #[arg(long, value_name = "B1,B2", value_delimiter = ',', num_args = 1, allow_negative_numbers = true)]
    pub betas: Option<Vec<f64>>,
    /// ε of AdamW [default: 1e-8]
    #[arg(long, value_name = "EPS", allow_negative_numbers = true)]
    pub eps: Option<f64>,
    /// Precision of the optimizer's moments: 32 or 8 bits [default: 32]
    #[arg(long, value_name = "BITS")]
    pub optimizer_bits: Option<String>,
    /// Clip the gradient's global norm to this; 0 turns clipping off [default: 0.3]
    #[arg(long, value_name = "NORM", allow_negative_numbers = true)]
    pub max_grad_norm: Option<f64>,
    /// Seed of adapters, dropout and data order [default: 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=MAX_SEED))]
    pub seed: Option<u64>,
    /// Quantization of the base: nf4, fp4 or none [default: nf4, or as a 4-bit folder has it; none unless --method qlora]
    #[arg(long, value_name = "TYPE")]
    pub quant: Option<String>,
    /// Keep the quantization scales in f32
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    pub no_double_quant: bool,
    /// Weights that share a scale (a power of two, 32 to 4096) [default: 64]
    #[arg(long, value_name = "N")]
    pub block_size: Option<usize>,
    /// Precision of embedding and head: 16 (or as the checkpoint has them) or 8 bits [default: 16]
    #[arg(long, value_name = "BITS")]
    pub embedding_bits: Option<String>,
    /// LoRA rank r [default: 16]
    #[arg(long, value_name = "R")]
    pub rank: Option<usize>,
    /// LoRA α; the adapter is scaled by α/r [default: 16]
    #[arg(long, value_name = "ALPHA", allow_negative_numbers = true)]
    pub alpha: Option<f64>,
    /// Dropout on the adapters' inputs [default: 0.1]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub dropout: Option<f32>,
    /// Linear layers to adapt, by the ends of their paths and separated by commas; or all-linear [default: all seven]
    #[arg(long, value_name = "NAMES", value_delimiter = ',', conflicts_with = "target_pattern")]
    pub targets: Option<Vec<String>>,
    /// The same, as a regular expression that matches whole paths such as model.layers.0.self_attn.q_proj
    #[arg(long, value_name = "REGEX")]
    pub target_pattern: Option<String>,
    /// Scale by α/√r
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    pub rslora: bool,
    /// Another rank for layers whose path ends with NAME (a regular expression); may be given many times
    #[arg(long, value_name = "NAME=R", value_parser = entry::<usize>)]
    #[serde(serialize_with = "as_table", skip_serializing_if = "Vec::is_empty")]
    pub rank_pattern: Vec<(String, usize)>,
    /// Another α, likewise
    #[arg(long, value_name = "NAME=ALPHA", value_parser = entry::<f64>)]
    #[serde(serialize_with = "as_table", skip_serializing_if = "Vec::is_empty")]
    pub alpha_pattern: Vec<(String, f64)>,
    /// Train the lengths of the weights' rows too (DoRA): slower, and often better at low rank
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    pub dora: bool,
    /// What adapters start from: lora, pissa, olora or loftq[:ITERATIONS] [default: lora]
    #[arg(long, value_name = "INIT")]
    pub init: Option<String>,
    /// Learning rate of B (and of DoRA's lengths) over that of A (LoRA+) [default: 1]
    #[arg(long, value_name = "RATIO", allow_negative_numbers = true)]
    pub lora_plus_ratio: Option<f64>,
    /// Train these whole and save them beside the adapter: embed_tokens, lm_head. In a tied model embed_tokens stays the
    /// head too, unless lm_head is named as well
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub modules_to_save: Option<Vec<String>>,
    /// Add these tokens to the vocabulary, separated by commas; embedding and head train whole then
    #[arg(long, value_name = "TOKENS", value_delimiter = ',')]
    pub new_tokens: Option<Vec<String>>,
    /// Type of activations: auto, f32, bf16 or f16 [default: auto, which is f32 on the CPU]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<String>,
    /// auto, cpu, cuda or cuda:N [default: auto]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Keep the order of the file
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    pub no_shuffle: bool,
    /// Run the forward pass of all layers, or of the first N, again in the backward pass: less memory, a third more time
    /// [default: none]
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "all")]
    pub recompute: Option<String>,
    /// Device memory for the optimizer's pages (states and gradients): auto (what can be spared, given back when memory is
    /// short), a size such as 512MiB, 0 (all in host memory) or off (no pages) [default: auto on a GPU from 256 MiB on]
    #[arg(long, value_name = "BYTES")]
    pub paged_budget: Option<String>,
    /// What pages are made of: pinned, unified or auto [default: auto]
    #[arg(long, value_name = "MEMORY")]
    pub page_memory: Option<String>,
    /// How pages beyond the budget are used: stream, in-place or lru [default: stream, or in-place in unified memory]
    #[arg(long, value_name = "POLICY")]
    pub page_policy: Option<String>,
    /// Size of a page: a multiple of 64KiB, at least 256KiB [default: 3MiB]
    #[arg(long, value_name = "BYTES")]
    pub page_size: Option<String>,
    /// Write a picture of where pages were during the last step to this file (SVG; or a Chrome trace where it ends in .json)
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub trace: Option<PathBuf>,
    /// Print the time of each operation during the last step, and write a Chrome trace of it to this file
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub profile: Option<PathBuf>,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// `NAME=VALUE`.
fn entry<T: FromStr>(text: &str) -> Result<(String, T), String> {
    let parsed = text.rsplit_once('=').and_then(|(name, value)| Some((name.to_string(), value.parse().ok()?)));
    parsed.filter(|(name, _)| !name.is_empty()).ok_or_else(|| format!("expected NAME=NUMBER, not {text}"))
}

fn as_table<T: Serialize, S: serde::Serializer>(entries: &[(String, T)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(entries.iter().map(|(name, value)| (name, value)))
}

/// What trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Adapters on a 4-bit base.
    Qlora,
    /// Adapters on the base as it is.
    Lora,
    /// Every weight.
    Full,
}

impl Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Method::Qlora => "qlora",
            Method::Lora => "lora",
            Method::Full => "full",
        })
    }
}

/// The exact settings of a run; written beside its results, and accepted by `--config`.
///
/// The defaults are the QLoRA paper's recipe for small models (arXiv 2305.14314, appendix B): all linear layers, lr 2e-4
/// constant, AdamW with β₂ 0.999, dropout 0.1, batches of 16, and clipping at 0.3 rather than the usual 1.0: the gradient
/// of a fresh adapter (B = 0) is far below either, so the tighter bound costs nothing and takes the edge off outliers.
/// The rank is 16 (the paper finds no effect of it), with α = 16 as there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Settings {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    #[serde(with = "as_optional_text", skip_serializing_if = "Option::is_none")]
    pub data: Option<DataSpec>,
    #[serde(with = "as_optional_text", skip_serializing_if = "Option::is_none")]
    pub eval_data: Option<DataSpec>,
    #[serde(with = "as_optional_text", skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    pub skip_bad_rows: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter_init: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub out: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_every: Option<u32>,
    pub save_minutes: f64,
    pub keep: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_every: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<u32>,
    pub method: Method,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u32>,
    pub batch_size: usize,
    pub grad_accum: usize,
    pub seq_len: usize,
    pub pack: bool,
    pub lr: f64,
    #[serde(with = "as_text")]
    pub schedule: Schedule,
    pub warmup: u32,
    pub weight_decay: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    #[serde(with = "as_text")]
    pub optimizer_bits: StateBits,
    pub max_grad_norm: f64,
    pub seed: u64,
    #[serde(with = "as_optional_text", skip_serializing_if = "Option::is_none")]
    pub quant: Option<QuantChoice>,
    pub no_double_quant: bool,
    pub block_size: usize,
    #[serde(with = "as_text")]
    pub embedding_bits: EmbeddingBits,
    pub rank: usize,
    pub alpha: f64,
    pub dropout: f32,
    pub targets: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_pattern: Option<String>,
    pub rslora: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
    pub dora: bool,
    #[serde(with = "as_text")]
    pub init: Init,
    pub lora_plus_ratio: f64,
    pub modules_to_save: Vec<String>,
    pub new_tokens: Vec<String>,
    #[serde(with = "as_text")]
    pub dtype: DTypeChoice,
    #[serde(with = "as_text")]
    pub device: DeviceRequest,
    pub no_shuffle: bool,
    #[serde(with = "as_text")]
    pub recompute: Recompute,
    #[serde(with = "as_optional_text", skip_serializing_if = "Option::is_none")]
    pub paged_budget: Option<PagedBudget>,
    #[serde(with = "as_text")]
    pub page_memory: PageMemory,
    #[serde(with = "as_optional_text", skip_serializing_if = "Option::is_none")]
    pub page_policy: Option<Policy>,
    #[serde(with = "as_text")]
    pub page_size: Bytes,
    #[serde(skip)]
    pub trace: Option<PathBuf>,
    #[serde(skip)]
    pub profile: Option<PathBuf>,
}

/// How many layers, from the first on, run their forward pass again instead of keeping what it made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recompute(pub usize);

impl std::str::FromStr for Recompute {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "all" => Ok(Recompute(usize::MAX)),
            "none" => Ok(Recompute(0)),
            _ => {
                text.parse().map(Recompute).map_err(|_| format!("expected all, none or a number of layers, not {text}"))
            }
        }
    }
}

impl std::fmt::Display for Recompute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            usize::MAX => f.write_str("all"),
            0 => f.write_str("none"),
            layers => layers.fmt(f),
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            model: None,
            data: None,
            eval_data: None,
            format: None,
            skip_bad_rows: false,
            cache: None,
            adapter_init: None,
            out: None,
            save_every: None,
            save_minutes: 30.0,
            keep: 2,
            eval_every: None,
            patience: None,
            method: Method::Qlora,
            epochs: None,
            steps: None,
            batch_size: 4,
            grad_accum: 4,
            seq_len: 512,
            pack: false,
            lr: 2e-4,
            schedule: Schedule::Constant,
            warmup: 0,
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            optimizer_bits: StateBits::F32,
            max_grad_norm: 0.3,
            seed: 0,
            quant: None,
            no_double_quant: false,
            block_size: 64,
            embedding_bits: EmbeddingBits::default(),
            rank: 16,
            alpha: 16.0,
            dropout: 0.1,
            targets: TARGETS.map(String::from).to_vec(),
            target_pattern: None,
            rslora: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            dora: false,
            init: Init::Lora,
            lora_plus_ratio: 1.0,
            modules_to_save: Vec::new(),
            new_tokens: Vec::new(),
            dtype: DTypeChoice(None),
            device: DeviceRequest::Auto,
            no_shuffle: false,
            recompute: Recompute::default(),
            paged_budget: None,
            page_memory: PageMemory::Auto,
            page_policy: None,
            page_size: Bytes(3 << 20),
            trace: None,
            profile: None,
        }
    }
}

impl Settings {
    /// The settings of a run: `args` over its `--config` file over `recipe` (of the embedded task, where that is what
    /// will run) over the defaults.
    ///
    /// # Errors
    /// The file cannot be read, or a value or a combination of values makes no sense.
    pub fn resolve(args: &TrainArgs, recipe: &str) -> Result<Settings> {
        let given = toml::Table::try_from(args).context("reading the command line")?;
        let file = match &args.config {
            None => toml::Table::new(),
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
                let table: toml::Table = text.parse().with_context(|| format!("{} is not TOML", path.display()))?;
                // Checked alone first, so that a mistake in it is not blamed on the command line.
                Settings::deserialize(table.clone()).with_context(|| format!("settings in {}", path.display()))?;
                table
            }
        };
        let embedded = !["model", "data"].iter().any(|key| given.contains_key(*key) || file.contains_key(*key));
        let mut merged: toml::Table = if embedded { recipe.parse()? } else { toml::Table::new() };
        for table in [file, given] {
            // Steps and epochs exclude each other: the later source wins.
            for (key, other) in [("steps", "epochs"), ("epochs", "steps")] {
                if table.contains_key(key) {
                    merged.remove(other);
                }
            }
            merged.extend(table);
        }
        let mut settings = Settings::deserialize(merged).context("settings")?;
        settings.trace = args.trace.clone();
        settings.profile = args.profile.clone();
        settings.check()?;
        Ok(settings)
    }

    /// The settings of the run that wrote `written`, with those of `args` that a continued run may have otherwise.
    ///
    /// # Errors
    /// `written` cannot be read, a value makes no sense, or `args` change what the run computes.
    pub fn resume(args: &TrainArgs, written: &Path) -> Result<Settings> {
        let text = std::fs::read_to_string(written).with_context(|| format!("reading {}", written.display()))?;
        let table: toml::Table = text.parse().with_context(|| format!("{} is not TOML", written.display()))?;
        let run = Settings::deserialize(table.clone()).with_context(|| format!("settings in {}", written.display()))?;
        let mut merged = table;
        merged.extend(toml::Table::try_from(args).context("reading the command line")?);
        let mut settings = Settings::deserialize(merged).context("settings")?;
        settings.trace = args.trace.clone();
        settings.profile = args.profile.clone();
        settings.refuse_changes(&run)?;
        settings.check()?;
        Ok(settings)
    }

    /// Refuses to continue a run of the settings `run` with these.
    ///
    /// # Errors
    /// They differ in more than what changes no result; the error names it.
    pub fn refuse_changes(&self, run: &Settings) -> Result<()> {
        let (now, then) = (toml::Table::try_from(self)?, toml::Table::try_from(run)?);
        let text = |value: Option<&toml::Value>| value.map_or("not given".into(), |value| value.to_string());
        let keys: BTreeSet<&String> = now.keys().chain(then.keys()).collect();
        let changed: Vec<String> = keys
            .into_iter()
            .filter(|key| !FREE.contains(&key.as_str()) && now.get(*key) != then.get(*key))
            .map(|key| format!("{key} is {} and was {}", text(now.get(key)), text(then.get(key))))
            .collect();
        ensure!(
            changed.is_empty(),
            "a run cannot be continued with other settings: {}. Leave them as they were, or start a new run (--adapter-init \
             trains an adapter on)",
            changed.join("; ")
        );
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let positive = |name, value: usize| {
            ensure!(value > 0, "--{name} must be at least 1");
            Ok(())
        };
        positive("batch-size", self.batch_size)?;
        positive("grad-accum", self.grad_accum)?;
        positive("rank", self.rank)?;
        // The width of the largest Llama: more only asks for memory.
        ensure!(self.rank <= 16_384, "--rank must be at most 16384");
        ensure!(self.seq_len > 1, "--seq-len must be at least 2: one token to read and one to predict");
        ensure!(self.steps != Some(0) && self.epochs != Some(0), "--steps and --epochs must be at least 1");
        ensure!(self.steps.is_none() || self.epochs.is_none(), "give --steps or --epochs, not both");
        ensure!(self.lr.is_finite() && self.lr > 0.0, "--lr must be above 0");
        ensure!(self.max_grad_norm >= 0.0, "--max-grad-norm must not be negative (0 turns clipping off)");
        ensure!((0.0..1.0).contains(&self.dropout), "--dropout must be at least 0 and below 1");
        ensure!(self.alpha.is_finite() && self.alpha > 0.0, "--alpha must be above 0");
        ensure!(self.betas.iter().all(|b| (0.0..1.0).contains(b)), "--betas must be at least 0 and below 1");
        ensure!(self.eps.is_finite() && self.eps > 0.0, "--eps must be above 0");
        ensure!(self.weight_decay.is_finite() && self.weight_decay >= 0.0, "--weight-decay must not be negative");
        let block = self.block_size;
        ensure!(
            block.is_power_of_two() && (32..=4096).contains(&block),
            "--block-size must be a power of two from 32 to 4096"
        );
        match (self.method, self.quant) {
            (Method::Qlora, Some(QuantChoice(None))) => {
                bail!("--method qlora needs --quant nf4 or fp4 (or use --method lora)")
            }
            (Method::Full, Some(QuantChoice(Some(_)))) => {
                bail!("--method full trains the weights themselves: --quant none")
            }
            _ => {}
        }
        ensure!(
            self.method != Method::Full || self.embedding_bits == EmbeddingBits::Stored,
            "--method full trains embedding and head: leave --embedding-bits 8 out"
        );
        ensure!(
            self.method != Method::Full || self.adapter_init.is_none(),
            "--method full trains no adapter: leave --adapter-init out"
        );
        self.check_adapter()?;
        let page = self.page_size.0;
        ensure!(
            page >= 256 << 10 && page.is_multiple_of(64 << 10),
            "--page-size must be a multiple of 64KiB from 256KiB on, not {}",
            self.page_size
        );
        if let Some(PagedBudget::Bytes(budget)) = self.paged_budget {
            ensure!(
                budget.0 == 0 || budget.0 >= page,
                "--paged-budget {budget} is below one page of {}: give 0 (all pages in host memory), at least {0}, or auto",
                self.page_size
            );
        }
        ensure!(self.save_every != Some(0), "--save-every must be at least 1");
        // A year, which is as good as never and far from what a clock can count.
        ensure!((0.0..=525_600.0).contains(&self.save_minutes), "--save-minutes must be 0 to 525600");
        positive("keep", self.keep)?;
        ensure!(self.eval_every != Some(0), "--eval-every must be at least 1");
        ensure!(self.patience != Some(0), "--patience must be at least 1");
        ensure!(self.patience.is_none() || self.eval_every.is_some(), "--patience needs --eval-every");
        ensure!(
            self.eval_every.is_none() || self.eval_data.is_some() || self.data.is_none(),
            "--eval-every needs --eval-data: data to evaluate on"
        );
        ensure!(self.model.is_none() || self.data.is_some(), "--model needs --data: data to train on");
        Ok(())
    }

    /// How the data is read, for a model of this vocabulary.
    pub fn data_options(&self, vocab_size: usize) -> DataOptions {
        DataOptions {
            seq_len: self.seq_len,
            vocab_size,
            format: self.format,
            all_choices: false,
            skip_bad_rows: self.skip_bad_rows,
            cache: self.cache.clone(),
        }
    }

    /// What is special about the adapter.
    fn check_adapter(&self) -> Result<()> {
        ensure!(
            self.lora_plus_ratio.is_finite() && self.lora_plus_ratio > 0.0,
            "--lora-plus-ratio must be above 0 (1 for one learning rate)"
        );
        ensure!(
            !self.targets.iter().any(|name| name == ALL_LINEAR) || self.targets.len() == 1,
            "--targets {ALL_LINEAR} stands alone"
        );
        let whole = !self.modules_to_save.is_empty() || !self.new_tokens.is_empty();
        if let Some(name) = self.modules_to_save.iter().find(|name| !["embed_tokens", "lm_head"].contains(&&name[..])) {
            bail!("--modules-to-save: {name} is none of embed_tokens and lm_head");
        }
        ensure!(
            !whole || self.embedding_bits == EmbeddingBits::Stored,
            "--modules-to-save and --new-tokens train embedding and head: leave --embedding-bits 8 out"
        );
        let special = self.dora || self.init != Init::Lora || whole;
        ensure!(
            !special || self.method != Method::Full,
            "--method full trains no adapter: leave --dora, --init, --modules-to-save and --new-tokens out"
        );
        ensure!(
            !special || self.adapter_init.is_none(),
            "--adapter-init goes on with an adapter as it is: leave --dora, --init, --modules-to-save and --new-tokens out"
        );
        ensure!(!self.dora || self.init == Init::Lora, "--dora starts from plain adapters: leave --init out");
        ensure!(
            !matches!(self.init, Init::Loftq { .. }) || self.method == Method::Qlora,
            "--init loftq makes up for quantization: it needs --method qlora"
        );
        ensure!(
            self.init == Init::Lora || self.embedding_bits == EmbeddingBits::Stored,
            "--init {} writes the changed base, embedding too: leave --embedding-bits 8 out",
            self.init
        );
        Ok(())
    }

    /// The quantization of a base that is not quantized yet: NF4 for QLoRA and none otherwise, unless chosen.
    pub fn quantization(&self) -> QuantChoice {
        let usual = (self.method == Method::Qlora).then_some(nibble_kernels::quantize::QuantType::Nf4);
        self.quant.unwrap_or(QuantChoice(usual))
    }
}

/// Serde for types that parse and print.
pub(crate) mod as_text {
    use super::*;

    pub fn serialize<T: Display, S: serde::Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T: FromStr<Err: Display>, D: de::Deserializer<'de>>(from: D) -> Result<T, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

/// The same, for optional values.
pub(crate) mod as_optional_text {
    use super::*;

    pub fn serialize<T: Display, S: serde::Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            None => serializer.serialize_none(),
            Some(value) => serializer.collect_str(value),
        }
    }

    pub fn deserialize<'de, T: FromStr<Err: Display>, D: de::Deserializer<'de>>(
        from: D,
    ) -> Result<Option<T>, D::Error> {
        super::as_text::deserialize(from).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::Parser;

    fn resolve(args: &[&str]) -> Result<Settings> {
        let cli = Cli::try_parse_from([&["train-llama"], args].concat())?;
        Settings::resolve(&cli.train, "lr = 0.5\nsteps = 7\n")
    }

    #[test]
    fn later_sources_win() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("run.toml");
        std::fs::write(&file, "lr = 1e-3\nrank = 4\nschedule = \"cosine\"\nepochs = 3\nmodel = \"m\"\ndata = \"d\"\n")
            .unwrap();
        let file = file.to_str().unwrap();
        let settings = resolve(&["--config", file, "--rank", "8"]).unwrap();
        assert_eq!((settings.lr, settings.rank, settings.schedule), (1e-3, 8, Schedule::Cosine));
        assert_eq!((settings.epochs, settings.steps), (Some(3), None));
        let settings = resolve(&["--config", file, "--steps", "5"]).unwrap();
        assert_eq!((settings.epochs, settings.steps), (None, Some(5)));
    }

    #[test]
    fn the_recipe_is_for_the_embedded_task_alone() {
        assert_eq!(resolve(&[]).unwrap().lr, 0.5);
        assert_eq!(resolve(&["--lr", "0.25"]).unwrap().lr, 0.25);
        assert_eq!(resolve(&["--epochs", "2"]).unwrap().steps, None);
        assert_eq!(resolve(&["--data", "x.jsonl"]).unwrap().lr, Settings::default().lr);
    }

    #[test]
    fn written_settings_read_back() {
        let settings = resolve(&[
            "--quant",
            "fp4",
            "--embedding-bits",
            "8",
            "--targets",
            "q_proj,v_proj",
            "--betas",
            "0.8,0.99",
            "--rslora",
        ]);
        let settings = settings.unwrap();
        let text = toml::to_string(&settings).unwrap();
        assert_eq!(toml::from_str::<Settings>(&text).unwrap(), settings, "{text}");
    }

    #[test]
    fn mistakes_are_named() {
        for (args, word) in [
            (&["--lr", "-1"][..], "lr"),
            (&["--block-size", "48"], "block-size"),
            (&["--method", "dora"], "dora"),
            (&["--quant", "int8"], "int8"),
            (&["--method", "full", "--quant", "nf4"], "quant"),
            (&["--method", "qlora", "--quant", "none"], "quant"),
            (&["--method", "full", "--embedding-bits", "8"], "embedding-bits"),
            (&["--embedding-bits", "4"], "expected 16 or 8"),
            (&["--model", "m"], "data"),
            (&["--betas", "0.9"], "betas"),
            (&["--dropout", "1"], "dropout"),
        ] {
            let error = format!("{:#}", resolve(args).unwrap_err());
            assert!(error.contains(word), "{args:?}: {error}");
        }
    }
}
