//! Llama for nibble: the model with its hand-written backward pass, LoRA, checkpoints, tokenizer and generation.

pub mod batch;
pub mod chat;
pub mod config;
mod error;
pub mod export;
pub mod files;
pub mod generate;
pub mod llama;
pub mod lora_gguf;
pub mod merge;
pub mod sampling;
pub mod stream;
pub mod tokenizer;

pub use config::LlamaConfig;
pub use error::{Error, Result};
pub use llama::Llama;
