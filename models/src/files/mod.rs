//! Checkpoint, adapter and GGUF files.
