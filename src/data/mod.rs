//! Training data: files, rows, masks and batches.
//!
//! A file becomes examples in three stages: [`rows`] reads and checks its rows, [`examples`] turns each into token ids
//! with labels, [`batch`] joins examples for a step and [`sampler`] says which ones. Where a row has a completion or
//! assistant turns, only those are learned; every other token's label is [`IGNORE`].

mod batch;
mod describe;
mod error;
mod examples;
mod messages;
mod rows;
mod sampler;

pub use batch::{Batch, collate};
pub use describe::describe;
pub use error::{DataError, Result};
pub use examples::{DataOptions, Example, Span, instruction_prompt, load_examples, preview};
pub use rows::{Format, Row, Rows};
pub use sampler::Sampler;

/// The label of a token that is not learned, as in PyTorch and transformers.
pub const IGNORE: i64 = -100;
