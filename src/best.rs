//! The best evaluation of a run, and when there is no more hope of a better one.

use serde::{Deserialize, Serialize};

/// The best evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// After which step it was.
    pub step: u32,
    /// Mean negative log-likelihood of the labelled tokens.
    pub nll: f64,
}

/// Evaluations so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Evaluations {
    /// Evaluations in a row, up to now, that were no better than the best.
    worse: u32,
    best: Option<Best>,
}

impl Evaluations {
    /// Takes note of an evaluation; returns whether it is the best so far. One that is not a number never is.
    pub fn record(&mut self, step: u32, nll: f64) -> bool {
        let better = self.best.map_or(!nll.is_nan(), |best| nll < best.nll);
        if better {
            self.best = Some(Best { step, nll });
        }
        self.worse = if better { 0 } else { self.worse + 1 };
        better
    }

    /// The best of them.
    pub fn best(&self) -> Option<Best> {
        self.best
    }

    /// Whether `patience` evaluations in a row were no better.
    pub fn exhausted(&self, patience: Option<u32>) -> bool {
        patience.is_some_and(|patience| self.worse >= patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_counts_evaluations_in_a_row() {
        let mut seen = Evaluations::default();
        let better: Vec<bool> = [f64::NAN, 2.0, 2.0, 1.5, 1.6, f64::NAN]
            .iter()
            .zip(1..)
            .map(|(&nll, step)| seen.record(step, nll))
            .collect();
        assert_eq!(better, [false, true, false, true, false, false]);
        assert_eq!(seen.best(), Some(Best { step: 4, nll: 1.5 }));
        assert!(seen.exhausted(Some(2)) && !seen.exhausted(Some(3)) && !seen.exhausted(None));
    }
}
