//! Evaluation: how likely a model finds the right answers, and how often it would give exactly them.

use crate::{
    data::{Batch, ChoiceResult, Example, Examples, collate, score},
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
    /// Of questions with a choice of answers, if there are any. Their wrong answers count here alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choice: Option<ChoiceResult>,
}

impl std::fmt::Display for EvalResult {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let EvalResult { examples, nll, perplexity, exact_match, .. } = self;
        if let Some(ChoiceResult { questions, accuracy, accuracy_by_length }) = self.choice {
            let (plain, by_length) = (100.0 * accuracy, 100.0 * accuracy_by_length);
            write!(f, "choice {plain:.1} % of {questions} (by length {by_length:.1} %), ")?;
        }
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
    let questions = &examples.known().questions;
    // A wrong answer is to be less likely than the right one, and nothing else.
    let mut wrong = vec![false; examples.len()];
    let mut ends = vec![None; examples.len()];
    for question in questions {
        for answer in 0..question.bytes.len() {
            wrong[question.first + answer] = answer != question.right;
            ends[question.first + answer] = question.end.map(i64::from);
        }
    }
    let mut answers = vec![0.0; if questions.is_empty() { 0 } else { examples.len() }];
    let (mut nll, mut tokens, mut exact, mut count) = (0.0, 0, 0, 0);
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
        let (each, correct) = (out.nll()?, out.correct()?);
        let mut start = 0;
        for ((&index, example), &length) in chunk.iter().zip(&chosen).zip(&batch.lengths) {
            let place = start..start + length;
            let sum = |each: &[f32]| each.iter().map(|&nll| f64::from(nll)).sum::<f64>();
            if let Some(answer) = answers.get_mut(index) {
                // Position i is the prediction of token i + 1: the end token is predicted last but one.
                let ended = ends[index].is_some() && example.labels.last().copied() == ends[index];
                *answer = sum(&each[start..place.end - if ended { 2 } else { 0 }]);
            }
            if !wrong[index] {
                nll += sum(&each[place.clone()]);
                tokens += example.unmasked();
                exact += usize::from(correct[place].iter().all(|&correct| correct));
                count += 1;
            }
            start += length;
        }
        bar.inc(chunk.len() as u64);
        rest = left;
    }
    bar.finish_and_clear();
    let nll = nll / tokens.max(1) as f64;
    let exact_match = exact as f64 / count.max(1) as f64;
    let choice = score(questions, &answers);
    Ok(Some(EvalResult { examples: count, tokens, nll, perplexity: nll.exp(), exact_match, choice }))
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
