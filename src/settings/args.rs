//! What a user may give: on the command line, or in a file with the same keys.

use super::*;
use clap::Args;

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
    /// those that change no result may be given again (checkpoints, device, pages, --activations, --memory-budget)
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
    /// What layers keep for the backward pass, which runs the rest of their forward pass again: inputs, attention (all but
    /// the feed-forward block) or all; @host keeps it in pinned host memory. For all layers, or for runs from the first on:
    /// attention@host:28,all [default: all]
    #[arg(long, value_name = "WHAT[@host][:LAYERS],…")]
    pub activations: Option<String>,
    /// Run all layers, or the first N, again in the backward pass: less memory, a quarter more time. Short for --activations
    /// inputs, or inputs:N,all
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "all", conflicts_with = "activations")]
    pub recompute: Option<String>,
    /// Let feed-forward blocks that run again take so many rows at a time: less memory, a little more time; needs --dropout 0
    /// [default: all rows]
    #[arg(long, value_name = "ROWS")]
    pub feed_forward_rows: Option<usize>,
    /// Hold the 4-bit weights of the first N layers in 16 bits too, instead of dequantizing them in every step: the same numbers
    /// in less time (a tenth at 2,048 tokens), more memory (0.4 GiB a layer of 8B). On Hopper GPUs [default: 0]
    #[arg(long, value_name = "N")]
    pub dequantized_layers: Option<usize>,
    /// Choose all of this by plan: the fastest step within this much memory of the device, or (auto) within what is free
    #[arg(long, value_name = "BYTES|auto", conflicts_with_all = ["recompute", "activations", "feed_forward_rows", "dequantized_layers"])]
    pub memory_budget: Option<String>,
    /// Device memory for the optimizer's pages (states and gradients): auto (what can be spared, given back when memory is
    /// short), a size such as 512MiB, 0 (all in host memory) or off (no pages) [default: auto on a GPU from 256 MiB on]
    #[arg(long, value_name = "BYTES")]
    pub paged_budget: Option<String>,
    /// What pages are made of: pinned, unified or auto [default: auto]
    #[arg(long, value_name = "MEMORY")]
    pub page_memory: Option<String>,
    /// How pages beyond the budget are used: stream, in-place or lru (of pinned pages) [default: stream, or in-place in
    /// unified memory]
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
