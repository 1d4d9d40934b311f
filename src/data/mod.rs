//! Training data: files, rows, masks and batches.
//!
//! What a user names ([`spec`]) becomes examples in stages: [`records`] reads a file piece by piece, [`rows`] says what a
//! record is, [`examples`] turns it into token ids with labels, and [`load`] does that for all of them, in parallel, into
//! a [`store`]; [`cache`] finds it again. [`batch`] joins examples for a step and [`sampler`] says which ones. Where a row
//! has a completion or assistant turns, only those are learned; every other token's label is [`IGNORE`].

mod batch;
mod builder;
mod cache;
mod choices;
mod describe;
mod error;
mod examples;
mod load;
mod messages;
mod parquet;
mod records;
mod rows;
mod sampler;
mod spec;
mod store;

pub use batch::{Batch, collate};
pub use choices::{ChoiceResult, Question, score};
pub use describe::describe;
pub use error::{DataError, Result};
pub use examples::{Encoder, Example, Notes, Span, instruction_prompt, preview};
pub use load::{DataOptions, load_examples};
pub use records::names_data;
pub use rows::{Format, Row, Rows};
pub use sampler::{Batching, Part, Sampler};
pub use spec::{DataSpec, Place};
pub use store::{Examples, Known};

/// The label of a token that is not learned, as in PyTorch and transformers.
pub const IGNORE: i64 = -100;
