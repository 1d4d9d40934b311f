//! The command line.

use crate::{data::DataSpec, input::ReadArgs, paging::Bytes, settings::TrainArgs};
use anyhow::ensure;
use clap::{Args, Parser, Subcommand};
use nibble_kernels::{cuda::Target, quantize::QuantType};
use nibble_models::{merge::Rule, sampling::Sampling};
use nibble_runtime::{DType, Device, DeviceRequest};
use std::path::PathBuf;

/// QLoRA fine-tuning of Llama models on one GPU, or on the CPU.
///
/// Without arguments it fine-tunes the embedded model on the embedded task, as a demonstration.
#[derive(Debug, Parser)]
#[command(name = "train-llama", version, args_conflicts_with_subcommands = true, max_term_width = 110)]
#[command(after_help = "Examples:
  train-llama
  train-llama --model SmolLM2-135M-Instruct.Q4_1.gguf --data train.jsonl --eval-data test.jsonl --out runs/trec
  train-llama --resume runs/trec
  train-llama plan --model Llama-3.1-8B --seq-len 4096 --memory 24GiB
  train-llama generate --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter runs/trec/adapter --prompt 'Question: ...'
  train-llama chat --model Llama-3.2-1B-Instruct --adapter runs/trec/adapter
  train-llama merge --model Llama-3.2-1B --adapter runs/mine/adapter --out Llama-3.2-1B-mine
  train-llama export-gguf --model Llama-3.2-1B --adapter runs/mine/adapter --type q8_0 --out mine.gguf
  train-llama quantize --model Llama-3.2-1B --out Llama-3.2-1B-nf4")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Say nothing but errors and warnings
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Kernels that a GPU gets: native (those made for it, where there are any) or sm_80 (those that run on all)
    #[arg(long, global = true, value_name = "TARGET", default_value_t, hide_default_value = true)]
    pub target: Target,
    #[command(flatten)]
    pub train: TrainArgs,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fine-tune a model (the default command)
    #[command(after_help = "Examples:
  train-llama train --model meta-llama/Llama-3.2-1B-Instruct --data org/dialogues --epochs 2
  train-llama train --model Llama-3.2-1B --data chats.jsonl:2,more/ --eval-data held-out.csv --eval-every 50 --pack
  train-llama train --model Llama-3.2-1B --data chats.jsonl --show-batch
  train-llama train --config runs/mine/settings.toml --out runs/again")]
    Train(Box<TrainArgs>),
    /// Continue a prompt
    Generate(GenerateArgs),
    /// Talk with a model
    Chat(ChatArgs),
    /// Mean NLL, perplexity, exact match and, of multiple choice, accuracy
    #[command(after_help = "Examples:
  train-llama eval --model Llama-3.2-1B-Instruct --data test.jsonl
  train-llama eval --model Llama-3.2-1B --adapter none --adapter runs/mine/adapter --data questions.csv --json")]
    Eval(EvalArgs),
    /// Write the logits of token ids to a safetensors file, for comparing with other programs
    #[command(after_help = "Example:
  train-llama logits --model Llama-3.2-1B --ids 128000,9906,1917 --out logits.safetensors")]
    Logits(LogitsArgs),
    /// Write a 4-bit checkpoint that transformers loads as pre-quantized
    #[command(after_help = "Example:
  train-llama quantize --model Llama-3.2-1B --out Llama-3.2-1B-nf4")]
    Quantize(QuantizeArgs),
    /// Write a model with adapters merged into its weights as a Hugging Face folder
    Merge(MergeArgs),
    /// Write a model, with adapters or without, as a GGUF file for llama.cpp
    ExportGguf(ExportGgufArgs),
    /// Say what training would take in memory and time, before anything is loaded
    Plan(Box<PlanArgs>),
    /// Time warm training steps of a model on random tokens, or on the first micro-batch of --data, and say what memory they take
    #[command(after_help = "Example:
  train-llama bench-step --model random:llama-3.1-8b --batch-size 4 --seq-len 2048 --activations attention@host")]
    BenchStep(Box<BenchStepArgs>),
    /// Show the figures of runs, the settings in which they differ, and their curves
    Compare(CompareArgs),
    /// Print a script that completes commands and options in a shell
    #[command(after_help = "Examples:
  train-llama completions bash > ~/.local/share/bash-completion/completions/train-llama
  train-llama completions zsh > ~/.zfunc/_train-llama
  train-llama completions fish > ~/.config/fish/completions/train-llama.fish")]
    Completions { shell: clap_complete::Shell },
    /// Say what a checkpoint, GGUF, adapter or data file holds
    #[command(after_help = "Examples:
  train-llama inspect Llama-3.2-1B
  train-llama inspect train.parquet")]
    Inspect {
        /// Folder or file
        path: PathBuf,
    },
}

/// What to plan.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  train-llama plan --model Llama-3.1-8B --rank 64 --seq-len 4096
  train-llama plan --model random:llama-3.1-8b --batch-size 4 --seq-len 2048 --memory 24GiB
Without a GPU it plans for an H100, or for one with --memory BYTES.")]
pub struct PlanArgs {
    /// Everything that a training run takes; --model random:llama-3.1-8b (or another shape) needs no checkpoint
    #[command(flatten)]
    pub train: TrainArgs,
    /// Memory to fit into [default: what is free on the GPU]
    #[arg(long, value_name = "BYTES")]
    pub memory: Option<Bytes>,
}

/// Which runs to compare.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  train-llama compare runs/a runs/b
  train-llama compare runs/* --html compared.html")]
pub struct CompareArgs {
    /// Folders of runs
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
    /// Write a page with their curves
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Print one JSON list instead of columns
    #[arg(long)]
    pub json: bool,
}

/// What to time.
#[derive(Debug, Args)]
pub struct BenchStepArgs {
    /// Everything that a training run takes; --model random:llama-3.1-8b (or another shape) needs no checkpoint
    #[command(flatten)]
    pub train: TrainArgs,
    /// Steps before the timed ones
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub warm: u32,
    /// Timed steps
    #[arg(long, value_name = "N", default_value_t = 6)]
    pub timed: u32,
    /// Also time the generation of N tokens after a prompt of 128
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub decode: usize,
    /// Also time batches of N rows, all of one adapter and each of its own, and switching
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub rows: usize,
}

/// The model to run, and how to hold it.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// Hugging Face folder, bitsandbytes 4-bit folder, .gguf file or random:SHAPE [default: the embedded model]
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// PEFT adapter folder, with a name if there are several; or none, for the base alone. May be given many times
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<AdapterChoice>,
    /// Quantization of the linear layers: nf4, fp4 or none [default: nf4, or as a 4-bit folder has them]
    #[arg(long, value_name = "TYPE")]
    pub quant: Option<QuantChoice>,
    /// Keep the scales in f32
    #[arg(long)]
    pub no_double_quant: bool,
    /// Weights that share a scale (a power of two, 32 to 4096)
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub block_size: usize,
    /// Precision of embedding and head: 16 (or as the checkpoint has them) or 8 bits
    #[arg(long, value_name = "BITS", default_value = "16")]
    pub embedding_bits: EmbeddingBits,
    /// Type of activations: auto, f32, bf16 or f16
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    pub dtype: DTypeChoice,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceRequest,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  train-llama generate --model SmolLM2-135M-Instruct.Q4_1.gguf --prompt 'Once upon a time' --temperature 0.8 --top-p 0.95
  train-llama generate --model M --adapter none --adapter a=runs/a/adapter --adapter b=runs/b/adapter --chat --prompt 'Hi'
  train-llama generate --model M --adapter a=runs/a/adapter --adapter b=runs/b/adapter --prompts prompts.jsonl
With several adapters the text of each follows a line with its name.")]
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text to continue
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        required_unless_present = "prompts"
    )]
    pub prompt: String,
    /// JSONL file of texts to continue in one batch: {"prompt": TEXT, "adapter": NAME}, the first --adapter where none is
    /// named. Prints {"prompt", "adapter", "text"} lines in the same order
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompts: Option<PathBuf>,
    /// Send the prompt as a user's message, by the model's chat template
    #[arg(long)]
    pub chat: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  train-llama chat --model SmolLM2-135M-Instruct.Q4_1.gguf --temperature 0.7 --top-p 0.9
  train-llama chat --model Llama-3.2-1B-Instruct --adapter math=runs/math/adapter --adapter law=runs/law/adapter
  echo 'How far is the moon?' | train-llama chat --model Llama-3.2-1B-Instruct > answer.txt

While it runs:
  /reset          forget the conversation
  /adapter NAME   answer with this adapter from now on (none: the base alone); without a name: list them
  /quit           end, as Ctrl-D does")]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// How text is chosen, in the order in which it applies: penalty, temperature, top-k, top-p, min-p.
#[derive(Clone, Debug, Args)]
pub struct SamplingArgs {
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 128, alias = "max-new-tokens")]
    pub max_tokens: usize,
    /// Makes tokens that are in the text already less likely: above 1; 1 for none
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// 0 takes the most likely token each time
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Draw from the K most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Draw from the smallest set of tokens that reaches this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Draw from tokens at least this fraction as likely as the most likely one
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    pub min_p: f32,
    /// End the text before this string; may be given many times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// The same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// More than any model is trained for; a larger number would only ask for the memory of its KV cache.
const MAX_NEW_TOKENS: usize = 1 << 20;

impl SamplingArgs {
    /// The settings, once they make sense.
    pub fn sampling(&self) -> anyhow::Result<Sampling> {
        let &SamplingArgs { temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = self;
        ensure!(temperature >= 0.0 && temperature.is_finite(), "--temperature must not be negative");
        ensure!(top_p > 0.0 && top_p <= 1.0, "--top-p must be above 0 and at most 1");
        ensure!((0.0..=1.0).contains(&min_p), "--min-p must be from 0 to 1");
        ensure!(
            repetition_penalty > 0.0 && repetition_penalty.is_finite(),
            "--repetition-penalty must be above 0 (1 for none)"
        );
        ensure!(self.max_tokens <= MAX_NEW_TOKENS, "--max-tokens must be at most {MAX_NEW_TOKENS}");
        ensure!(self.stop.iter().all(|stop| !stop.is_empty()), "--stop must not be empty");
        Ok(Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed })
    }
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Files (JSONL, JSON, CSV, Parquet, text; also .gz, .zst) and folders of them, with commas between
    #[arg(long, value_name = "PATH,…")]
    pub data: DataSpec,
    #[command(flatten)]
    pub read: ReadArgs,
    /// Tokens of an example at most
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub seq_len: usize,
    /// Print one JSON object instead of lines
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct LogitsArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Token ids, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
    pub ids: Vec<u32>,
    /// Safetensors file to write: tensor `logits` [1, T, vocab], f32
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

#[derive(Debug, Args)]
pub struct QuantizeArgs {
    /// Hugging Face folder or .gguf file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// nf4 or fp4 [default: nf4, or as a 4-bit folder has them]
    #[arg(long, value_name = "TYPE")]
    pub quant: Option<QuantType>,
    /// Keep the scales in f32
    #[arg(long)]
    pub no_double_quant: bool,
    /// Weights that share a scale (a power of two, 32 to 4096)
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub block_size: usize,
}

/// An adapter to load: `DIR` or `NAME=DIR`, or `none` for the base alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterChoice {
    /// The folder as it was written, where no name was given.
    pub name: String,
    /// `None` for the base.
    pub dir: Option<PathBuf>,
}

impl AdapterChoice {
    /// The name that stands for the base.
    pub const NONE: &str = "none";

    /// The name by which the model knows it.
    pub fn key(&self) -> Option<&str> {
        self.dir.as_ref().map(|_| &self.name[..])
    }
}

impl std::str::FromStr for AdapterChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A name holds no separator, so that a path with an equals sign can be written as ./a=b.
        let named = text.split_once('=').filter(|(name, _)| !name.contains(['/', '\\']));
        match named {
            None if text == Self::NONE => Ok(AdapterChoice { name: text.into(), dir: None }),
            None => Ok(AdapterChoice { name: text.into(), dir: Some(text.into()) }),
            Some((Self::NONE, _)) => Err("the name none is the base's".into()),
            Some(("", _)) | Some((_, "")) => Err(format!("expected DIR or NAME=DIR, not {text}")),
            Some((name, dir)) => Ok(AdapterChoice { name: name.into(), dir: Some(dir.into()) }),
        }
    }
}

/// What to merge, and how to write it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  train-llama merge --model Llama-3.2-1B --adapter runs/mine/adapter --out Llama-3.2-1B-mine
  train-llama merge --model Llama-3.2-1B --adapter runs/a/adapter:0.7 --adapter runs/b/adapter:0.3 --out both
  train-llama merge --model Llama-3.2-1B --adapter runs/mine/adapter --quant nf4 --out mine-nf4
  train-llama merge --model Llama-3.2-1B --adapter runs/a/adapter --adapter runs/b/adapter --combine ties --out both
The adapters' effects are added: W + w1*s1*B1*A1 + w2*s2*B2*A2 (what peft's add_weighted_adapter calls cat). ties keeps
the largest changes of each where signs agree; dare_linear and dare_ties keep random ones.")]
pub struct MergeArgs {
    /// Hugging Face folder, bitsandbytes 4-bit folder (whose weights are dequantized) or .gguf file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// PEFT adapter folder, and how much of it [default: 1]; may be given many times
    #[arg(long, value_name = "DIR[:WEIGHT]", required = true)]
    pub adapter: Vec<AdapterPart>,
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How several adapters become one: linear, ties, dare_linear or dare_ties
    #[arg(long, value_name = "RULE", default_value_t = Rule::Linear)]
    pub combine: Rule,
    /// Share of each adapter's changes that ties and dare keep
    #[arg(long, value_name = "SHARE", default_value_t = 0.5)]
    pub density: f32,
    /// Of what dare drops
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Largest file of the weights, such as 5GiB [default: one file]
    #[arg(long, value_name = "BYTES", conflicts_with = "quant")]
    pub max_shard: Option<Bytes>,
    /// f32, bf16 or f16 [default: as the model's]
    #[arg(long, value_name = "TYPE", default_value = "auto", hide_default_value = true)]
    pub dtype: DTypeChoice,
    /// Quantize the linear layers again: nf4 or fp4
    #[arg(long, value_name = "TYPE")]
    pub quant: Option<QuantType>,
    /// With --quant: keep the scales in f32
    #[arg(long, requires = "quant")]
    pub no_double_quant: bool,
    /// With --quant: weights that share a scale (a power of two, 32 to 4096)
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub block_size: usize,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  train-llama export-gguf --model Llama-3.2-1B-mine --type q8_0 --out mine.gguf
  train-llama export-gguf --model Llama-3.2-1B --adapter runs/mine/adapter --type f16 --out mine.gguf
  train-llama export-gguf --model Llama-3.2-1B --adapter runs/mine/adapter --lora --out mine-lora.gguf")]
pub struct ExportGgufArgs {
    /// Hugging Face folder, bitsandbytes 4-bit folder (whose weights are dequantized) or .gguf file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// PEFT adapter folder to merge, and how much of it [default: 1]; may be given many times
    #[arg(long, value_name = "DIR[:WEIGHT]")]
    pub adapter: Vec<AdapterPart>,
    /// File to make
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Type of the matrices: f32, f16, bf16, q8_0, q6_k, q5_0, q4_k or q4_0 (with embedding and head in more bits)
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    pub r#type: String,
    /// Write the adapter alone, for llama.cpp's --lora beside the model that it was made for, as f32, f16 or bf16
    #[arg(long)]
    pub lora: bool,
}

/// An adapter to merge: `DIR` or `DIR:WEIGHT`.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterPart {
    pub dir: PathBuf,
    pub weight: f32,
}

impl std::str::FromStr for AdapterPart {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let weighted = text.rsplit_once(':').and_then(|(dir, weight)| Some((dir, weight.parse::<f32>().ok()?)));
        let (dir, weight) = weighted.unwrap_or((text, 1.0));
        if dir.is_empty() || !weight.is_finite() {
            return Err(format!("expected DIR or DIR:WEIGHT, not {text}"));
        }
        Ok(AdapterPart { dir: dir.into(), weight })
    }
}

/// `none` or a code book.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantChoice(pub Option<QuantType>);

impl std::str::FromStr for QuantChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(QuantChoice(None)),
            _ => {
                text.parse().map(|q| QuantChoice(Some(q))).map_err(|_| format!("expected nf4, fp4 or none, not {text}"))
            }
        }
    }
}

impl std::fmt::Display for QuantChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            None => f.write_str("none"),
            Some(quant) => quant.fmt(f),
        }
    }
}

/// How embedding and head are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EmbeddingBits {
    /// As the checkpoint has them, in 16 bits where the computation is.
    #[default]
    Stored,
    /// In 8 bits.
    Bits8,
}

impl std::str::FromStr for EmbeddingBits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "16" => Ok(EmbeddingBits::Stored),
            "8" => Ok(EmbeddingBits::Bits8),
            _ => Err(format!("embedding bits: expected 16 or 8, not {text}")),
        }
    }
}

impl std::fmt::Display for EmbeddingBits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            EmbeddingBits::Stored => "16",
            EmbeddingBits::Bits8 => "8",
        })
    }
}

/// A float type, or the device's usual one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DTypeChoice(pub Option<DType>);

impl std::str::FromStr for DTypeChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(DTypeChoice(match text {
            "auto" => None,
            "f32" | "float32" => Some(DType::F32),
            "bf16" | "bfloat16" => Some(DType::BF16),
            "f16" | "float16" => Some(DType::F16),
            _ => return Err(format!("expected auto, f32, bf16 or f16, not {text}")),
        }))
    }
}

impl std::fmt::Display for DTypeChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            None => f.write_str("auto"),
            Some(dtype) => dtype.fmt(f),
        }
    }
}

impl DTypeChoice {
    /// The type to compute in: bf16 on a GPU, and f32 on a CPU, which has no faster one.
    pub fn resolve(self, device: Device) -> DType {
        self.0.unwrap_or(if device == Device::Cpu { DType::F32 } else { DType::BF16 })
    }
}
