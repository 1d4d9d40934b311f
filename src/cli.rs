//! The command line.

use crate::settings::TrainArgs;
use clap::{Args, Parser, Subcommand};
use nibble_kernels::quantize::QuantType;
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
  train-llama generate --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter runs/trec/adapter --prompt 'Question: ...'
  train-llama quantize --model Llama-3.2-1B --out Llama-3.2-1B-nf4")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub train: TrainArgs,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fine-tune a model (the default command)
    Train(Box<TrainArgs>),
    /// Continue a prompt
    Generate(GenerateArgs),
    /// Mean NLL, perplexity and exact match on a data file
    Eval(EvalArgs),
    /// Write the logits of token ids to a safetensors file, for comparing with other programs
    Logits(LogitsArgs),
    /// Write a 4-bit checkpoint that transformers loads as pre-quantized
    Quantize(QuantizeArgs),
    /// Time warm training steps of a model on random tokens, and say what memory they take
    BenchStep(Box<BenchStepArgs>),
    /// Say what a checkpoint, GGUF, adapter or data file holds
    Inspect {
        /// Folder or file
        path: PathBuf,
    },
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
}

/// The model to run, and how to hold it.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// Hugging Face folder, bitsandbytes 4-bit folder, .gguf file or random:SHAPE [default: the embedded model]
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// PEFT adapter folder
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
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
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// Send the prompt as a user's message, by the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_new_tokens: usize,
    /// 0 takes the most likely token each time
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Draw from the K most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Draw from the smallest set of tokens that reaches this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f32,
    /// The same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// JSONL or text file
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
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
