//! nibble: QLoRA fine-tuning of Llama models.

pub mod data;
pub mod default_task;
