//! nibble: QLoRA fine-tuning of Llama models.
//!
//! [`train::train`] is a whole run, in the order in which data walks through it.

mod adapt;
mod bench_step;
pub mod best;
pub mod checkpoint;
pub mod cli;
pub mod commands;
pub mod data;
pub mod default_task;
pub mod eval;
mod export;
pub mod interrupt;
pub mod loss_scale;
pub mod model;
mod page_trace;
pub mod paging;
mod profile;
pub mod report;
pub mod run_dir;
pub mod settings;
pub mod step;
pub mod text;
pub mod train;
