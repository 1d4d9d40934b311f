//! Settings of a training run: defaults, a TOML file, and the command line, each over the one before.

mod args;
mod check;
mod choices;
mod text;

pub use args::TrainArgs;
use choices::recomputing;
pub use choices::{MemoryBudget, Method};
pub(crate) use text::{as_optional_text, as_text};

use crate::cli::{DTypeChoice, EmbeddingBits, QuantChoice};
use crate::data::{DataOptions, DataSpec, Format};
use crate::input::ReadArgs;
use crate::paging::{Bytes, PageMemory, PagedBudget};
use anyhow::{Context, Result, bail, ensure};
use nibble_models::{
    files::peft::ALL_LINEAR,
    llama::{Activations, Init, TARGETS},
};
use nibble_optim::{Schedule, StateBits};
use nibble_runtime::{DeviceRequest, pager::Policy};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    str::FromStr,
};

/// The largest whole number that TOML, in which settings are written, can hold.
const MAX_SEED: u64 = i64::MAX as u64;

/// Settings that change no result, so that a continued run may have others. Another device computes the same, but rounds
/// otherwise.
const FREE: [&str; 14] = [
    "cache",
    "out",
    "save-every",
    "save-minutes",
    "keep",
    "device",
    "activations",
    "feed-forward-rows",
    "dequantized-layers",
    "memory-budget",
    "paged-budget",
    "page-memory",
    "page-policy",
    "page-size",
];

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
    pub activations: Activations,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feed_forward_rows: Option<usize>,
    pub dequantized_layers: usize,
    #[serde(with = "as_optional_text", skip_serializing_if = "Option::is_none")]
    pub memory_budget: Option<MemoryBudget>,
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
            activations: Activations::default(),
            feed_forward_rows: None,
            dequantized_layers: 0,
            memory_budget: None,
            paged_budget: None,
            page_memory: PageMemory::Auto,
            page_policy: None,
            page_size: Bytes(3 << 20),
            trace: None,
            profile: None,
        }
    }
}

/// The settings of a source, `recompute` written out as what layers keep.
fn without_shorthand(mut table: toml::Table) -> Result<toml::Table> {
    if let Some(layers) = table.remove("recompute") {
        ensure!(!table.contains_key("activations"), "give --activations or --recompute, not both");
        let text = layers.as_str().map_or_else(|| layers.to_string(), String::from);
        let activations = recomputing(&text).map_err(anyhow::Error::msg)?;
        table.insert("activations".into(), activations.to_string().into());
    }
    Ok(table)
}

impl Settings {
    /// The settings of a run: `args` over its `--config` file over `recipe` (of the embedded task, where that is what
    /// will run) over the defaults.
    ///
    /// # Errors
    /// The file cannot be read, or a value or a combination of values makes no sense.
    pub fn resolve(args: &TrainArgs, recipe: &str) -> Result<Settings> {
        let given = without_shorthand(toml::Table::try_from(args).context("reading the command line")?)?;
        let file = match &args.config {
            None => toml::Table::new(),
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
                let table: toml::Table = text.parse().with_context(|| format!("{} is not TOML", path.display()))?;
                let table = without_shorthand(table).with_context(|| format!("settings in {}", path.display()))?;
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
        let table = without_shorthand(table)?;
        let run = Settings::deserialize(table.clone()).with_context(|| format!("settings in {}", written.display()))?;
        let mut merged = table;
        if args.memory_budget.is_some() {
            // It chooses anew.
            merged.remove("activations");
            merged.remove("feed-forward-rows");
            merged.remove("dequantized-layers");
        }
        merged.extend(without_shorthand(toml::Table::try_from(args).context("reading the command line")?)?);
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

    /// How the data is read, for a model of this vocabulary.
    pub fn data_options(&self, vocab_size: usize) -> DataOptions {
        let read = ReadArgs { format: self.format, skip_bad_rows: self.skip_bad_rows, cache: self.cache.clone() };
        read.options(self.seq_len, vocab_size)
    }

    /// The quantization of a base that is not quantized yet: NF4 for QLoRA and none otherwise, unless chosen.
    pub fn quantization(&self) -> QuantChoice {
        let usual = (self.method == Method::Qlora).then_some(nibble_kernels::quantize::QuantType::Nf4);
        self.quant.unwrap_or(QuantChoice(usual))
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
            "--activations",
            "attention@host:3,inputs",
        ]);
        let settings = settings.unwrap();
        let text = toml::to_string(&settings).unwrap();
        assert_eq!(toml::from_str::<Settings>(&text).unwrap(), settings, "{text}");
    }

    #[test]
    fn recompute_stands_for_what_layers_keep() {
        for (args, kept) in [
            (&["--recompute"][..], "inputs"),
            (&["--recompute", "3"], "inputs:3,all"),
            (&["--recompute", "none"], "all"),
            (&["--activations", "all@host:2,inputs"], "all@host:2,inputs"),
        ] {
            assert_eq!(resolve(args).unwrap().activations.to_string(), kept);
        }
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
            (&["--activations", "everything"], "expected inputs, attention or all"),
            (&["--activations", "all", "--recompute"], "--recompute"),
            (&["--recompute", "some"], "--recompute"),
            (&["--memory-budget", "auto", "--activations", "inputs"], "--activations"),
            (&["--memory-budget", "auto", "--dequantized-layers", "1"], "--dequantized-layers"),
            (&["--feed-forward-rows", "512"], "--dropout 0"),
            (&["--feed-forward-rows", "0", "--dropout", "0"], "feed-forward-rows"),
        ] {
            let error = format!("{:#}", resolve(args).unwrap_err());
            assert!(error.contains(word), "{args:?}: {error}");
        }
    }
}
