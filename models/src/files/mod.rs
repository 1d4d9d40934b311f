//! Checkpoint, adapter and GGUF files.

pub mod gguf;
pub mod mapped;
