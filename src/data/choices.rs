//! Questions with a choice of answers, of which one is right.

use serde::{Deserialize, Serialize};

/// A question among examples: each of its answers is one of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// Number of the example that the first answer is.
    pub first: usize,
    /// Which of the answers is right, from 0.
    pub right: usize,
    /// Bytes of each answer's text.
    pub bytes: Vec<usize>,
    /// The token that ends each answer, which is the same for all and says nothing about them.
    pub end: Option<u32>,
}

/// How often the most likely answer was right.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChoiceResult {
    pub questions: usize,
    /// Share of the questions whose right answer is the most likely one.
    pub accuracy: f64,
    /// The same by likelihood over bytes, which does not favour short answers.
    pub accuracy_by_length: f64,
}

impl Question {
    /// Whether the right answer is the most likely one: as it is, and by its length. `nll` has the negative
    /// log-likelihood of each example; of equal ones the first counts.
    fn answered(&self, nll: &[f64]) -> [bool; 2] {
        let nll = &nll[self.first..self.first + self.bytes.len()];
        let best = |of: &dyn Fn(usize) -> f64| {
            let chosen = (0..nll.len()).min_by(|&a, &b| of(a).total_cmp(&of(b)));
            chosen == Some(self.right)
        };
        [best(&|answer| nll[answer]), best(&|answer| nll[answer] / self.bytes[answer].max(1) as f64)]
    }
}

/// The result of all questions, from the negative log-likelihood of each example; `None` without questions.
pub fn score(questions: &[Question], nll: &[f64]) -> Option<ChoiceResult> {
    let answered: Vec<[bool; 2]> = questions.iter().map(|question| question.answered(nll)).collect();
    let share = |which: usize| answered.iter().filter(|right| right[which]).count() as f64 / answered.len() as f64;
    (!answered.is_empty()).then(|| ChoiceResult {
        questions: answered.len(),
        accuracy: share(0),
        accuracy_by_length: share(1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_likely_answer_counts() {
        let question = |first, right, bytes: &[usize]| Question { first, right, bytes: bytes.to_vec(), end: None };
        // The second is less likely as a whole and more likely by the byte.
        let questions = [question(0, 1, &[2, 10]), question(2, 0, &[4, 4, 4])];
        let result = score(&questions, &[4.0, 5.0, 1.0, 1.0, f64::NAN]).unwrap();
        assert_eq!(result, ChoiceResult { questions: 2, accuracy: 0.5, accuracy_by_length: 1.0 });
        assert_eq!(score(&[], &[1.0]), None);
    }
}
