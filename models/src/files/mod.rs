//! Checkpoint, adapter and GGUF files.
//!
//! [`Checkpoint`](checkpoint::Checkpoint) is what a model is loaded from; the rest are the formats behind it. Everything
//! that is written goes through [`atomic::atomic_write`].

pub mod atomic;
pub mod bnb;
pub mod checkpoint;
pub mod gguf;
pub mod inspect;
pub mod mapped;
pub mod peft;
pub mod safetensors;
pub mod shards;
