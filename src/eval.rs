//! Evaluation: how likely a model finds the right answers, and how often it would give exactly them.

use crate::{
    data::{Batch, Example, Examples, collate},
    interrupt,
    model::Model,
    report,
};
use anyhow::Result;
use nibble_models::{generate::generate, llama::Packed, sampling::Sampling, tokenizer::Tokenizer};
use serde::{Deserialize, Serialize};

/// Tokens that are evaluated at a time (at least one example).
const TOKENS: usize = 2048;

/// Result of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalResult {
    /// Examples evaluated.
    pub examples: usize,
    /// Labelled tokens.
    pub tokens: usize,
    /// Mean negative log-likelihood of the labelled tokens, in nats.
    pub nll: f64,
    /// e^nll.
    pub perplexity: f64,
    /// Share of the examples whose every labelled token is the most likely one: those that greedy decoding gets exactly
    /// right, the end included.
    pub exact_match: f64,
}

impl std::fmt::Display for EvalResult {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let EvalResult { examples, nll, perplexity, exact_match, .. } = self;
        write!(f, "exact match {:.1} % of {examples}, nll {nll:.4}, perplexity {perplexity:.3}", 100.0 * exact_match)
    }
}

/// A batch as the model takes it.
pub fn packed(batch: &Batch) -> Packed<'_> {
    Packed { ids: &batch.ids, labels: &batch.labels, lengths: &batch.lengths }
}

/// Evaluates `examples`; `None` if the user interrupted.
pub fn evaluate(model: &Model, examples: &Examples) -> Result<Option<EvalResult>> {
    // Longest first, so that a batch holds examples of similar length and the worst memory comes at once.
    let lengths = examples.lengths()?;
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(lengths[index]));
    let bar = report::bar("eval", examples.len());
    let (mut nll, mut tokens, mut exact) = (0.0, 0, 0);
    let mut rest = &order[..];
    while !rest.is_empty() {
        if interrupt::requested() {
            bar.finish_and_clear();
            return Ok(None);
        }
        let longest = (lengths[rest[0]] as usize).max(1);
        let (chunk, left) = rest.split_at((TOKENS / longest).clamp(1, rest.len()));
        let chosen = chunk.iter().map(|&index| examples.get(index)).collect::<Result<Vec<_>, _>>()?;
        let batch = collate(&chosen.iter().collect::<Vec<_>>());
        let out = model.llama.evaluate(packed(&batch))?;
        nll += out.sum()?;
        let correct = out.correct()?;
        tokens += batch.unmasked();
        let mut start = 0;
        for &length in &batch.lengths {
            exact += usize::from(correct[start..start + length].iter().all(|&correct| correct));
            start += length;
        }
        bar.inc(chunk.len() as u64);
        rest = left;
    }
    bar.finish_and_clear();
    let nll = nll / tokens.max(1) as f64;
    let exact_match = exact as f64 / examples.len().max(1) as f64;
    Ok(Some(EvalResult { examples: examples.len(), tokens, nll, perplexity: nll.exp(), exact_match }))
}

/// A prompt of an example, with the right answer and the model's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Answer {
    pub prompt: String,
    pub expected: String,
    pub found: String,
}

/// Answers the first `count` examples that have a prompt, greedily.
pub fn answers(model: &Model, tokenizer: &Tokenizer, examples: &Examples, count: usize) -> Result<Vec<Answer>> {
    let stop = model.stop_ids(tokenizer);
    let with_prompt = |example: &Result<Example, _>| example.as_ref().map_or(true, |example| example.prompt_len() > 1);
    let answer = |example: Result<Example, _>| {
        let example = example?;
        let (prompt, expected) = example.ids.split_at(example.prompt_len());
        let found = generate(&model.llama, prompt, expected.len() + 16, &stop, Sampling::GREEDY, |_| true)?;
        Ok(Answer {
            prompt: tokenizer.decode(prompt, true)?,
            expected: tokenizer.decode(expected, true)?,
            found: tokenizer.decode(&found, true)?,
        })
    };
    examples.iter().filter(with_prompt).take(count).map(answer).collect()
}
