//! nibble: QLoRA fine-tuning of Llama models.
//!
//! [`train::train`] is a whole run, in the order in which data walks through it.

/// Says something about the work on standard error, unless the user wants it quiet. Errors and warnings are said anyway.
macro_rules! note {
    ($($words:tt)*) => {
        if !$crate::report::is_quiet() {
            eprintln!($($words)*);
        }
    };
}
pub(crate) use note;

mod adapt;
mod bench_step;
pub mod best;
pub mod checkpoint;
pub mod cli;
pub mod commands;
mod compare;
pub mod data;
pub mod deal;
pub mod default_task;
pub mod eval;
mod export;
mod hub;
pub mod input;
pub mod interrupt;
pub mod loss_scale;
pub mod model;
mod page_trace;
pub mod paging;
mod profile;
pub mod report;
pub mod run_dir;
pub mod settings;
mod show;
pub mod step;
pub mod text;
pub mod train;
