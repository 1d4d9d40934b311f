//! Batches: examples laid end to end, without padding.

use super::IGNORE;
use super::examples::Example;

/// The examples of one forward pass, concatenated. T is their total length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[T]`.
    pub ids: Vec<i32>,
    /// The token to predict at each position, `[T]`: the label of the next token of the same example, or -100.
    /// The last position of an example is always -100.
    pub labels: Vec<i32>,
    /// Tokens of each example, in order; they sum to T.
    pub lengths: Vec<usize>,
}

impl Batch {
    /// Positions that a loss is taken of.
    pub fn unmasked(&self) -> usize {
        self.labels.iter().filter(|&&label| i64::from(label) != IGNORE).count()
    }

    /// Total number of tokens, T.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }
}

/// Joins examples into a batch and shifts their labels by one.
pub fn collate(examples: &[&Example]) -> Batch {
    let tokens = examples.iter().map(|example| example.ids.len()).sum();
    let mut batch = Batch {
        ids: Vec::with_capacity(tokens),
        labels: Vec::with_capacity(tokens),
        lengths: examples.iter().map(|example| example.ids.len()).collect(),
    };
    for example in examples {
        // Loading checked ids and labels against a vocabulary far below i32's range.
        batch.ids.extend(example.ids.iter().map(|&id| id as i32));
        let next = example.labels.iter().skip(1).map(|&label| label as i32);
        batch.labels.extend(next.chain([IGNORE as i32]).take(example.ids.len()));
    }
    batch
}
