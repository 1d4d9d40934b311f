//! Several adapters' changes of one weight as one change.
//!
//! With `δᵢ` what adapter `i` adds to a weight and `wᵢ` how much of it is wanted:
//!
//! | rule | computes |
//! |---|---|
//! | linear | `Σ wᵢ·δᵢ` |
//! | TIES | of each `δᵢ` its largest elements, a share `density`; then, element by element, the mean of `wᵢ·δᵢ` over those whose sign is that of `Σ δᵢ` |
//! | DARE | each element of `δᵢ` with probability `density`, divided by it; then linear, or TIES's choice of signs |
//!
//! The definitions are those of peft's `add_weighted_adapter` (its `ties_svd`, `dare_linear_svd` and `dare_ties_svd`, before
//! it makes the result low-rank again). Sources: Yadav et al., "TIES-Merging", arXiv 2306.01708; Yu et al., "Language Models
//! are Super Mario", arXiv 2311.03099.

use nibble_runtime::rng::{Philox, Stream};
use rayon::prelude::*;
use std::{fmt, str::FromStr};

/// [`Stream::purpose`] of what DARE drops.
const DROP_PURPOSE: u32 = 22;

/// How the changes of several adapters become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rule {
    /// Their sum.
    #[default]
    Linear,
    /// The largest elements of each, where signs agree.
    Ties,
    /// Random elements of each, added.
    DareLinear,
    /// Random elements of each, where signs agree.
    DareTies,
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Rule::Linear, Rule::Ties, Rule::DareLinear, Rule::DareTies];
        let found = all.into_iter().find(|rule| rule.to_string() == text);
        found.ok_or_else(|| format!("expected linear, ties, dare_linear or dare_ties, not {text}"))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rule::Linear => "linear",
            Rule::Ties => "ties",
            Rule::DareLinear => "dare_linear",
            Rule::DareTies => "dare_ties",
        })
    }
}

/// A rule and its settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Combination {
    pub rule: Rule,
    /// Share of each change's elements that TIES and DARE keep, in (0, 1].
    pub density: f32,
    /// Of what DARE drops.
    pub seed: u64,
}

impl Default for Combination {
    fn default() -> Self {
        Combination { rule: Rule::Linear, density: 0.5, seed: 0 }
    }
}

impl Combination {
    /// The change that `deltas` (with the weight of each) make together. `number` is that of the weight in the model.
    pub(super) fn of(&self, mut deltas: Vec<(f32, Vec<f32>)>, number: u32) -> Vec<f32> {
        let length = deltas.first().map_or(0, |(_, delta)| delta.len());
        for (adapter, (_, delta)) in (0..).zip(&mut deltas) {
            match self.rule {
                Rule::Linear => {}
                Rule::Ties => keep_largest(delta, self.density),
                Rule::DareLinear | Rule::DareTies => {
                    let stream = Stream { purpose: DROP_PURPOSE, step: adapter, layer: number };
                    drop_random(delta, self.density, &Philox::new(self.seed, stream));
                }
            }
        }
        let elects = matches!(self.rule, Rule::Ties | Rule::DareTies);
        let element = |i: usize| {
            if !elects {
                return deltas.iter().map(|(weight, delta)| weight * delta[i]).sum();
            }
            let positive = deltas.iter().map(|(_, delta)| delta[i]).sum::<f32>() >= 0.0;
            let (mut sum, mut count) = (0.0, 0.0f32);
            for (weight, delta) in &deltas {
                let x = delta[i];
                if x != 0.0 && (x > 0.0) == positive {
                    sum += weight * x;
                    count += 1.0;
                }
            }
            sum / count.max(1.0)
        };
        (0..length).into_par_iter().map(element).collect()
    }
}

/// Makes all but the largest elements zero, of which it keeps a share `density`, rounded down.
fn keep_largest(delta: &mut [f32], density: f32) {
    let kept = (f64::from(density) * delta.len() as f64) as usize;
    if kept >= delta.len() {
        return;
    }
    let mut sizes: Vec<f32> = delta.iter().map(|x| x.abs()).collect();
    if kept == 0 {
        return delta.fill(0.0);
    }
    let (larger, &mut least, _) = sizes.select_nth_unstable_by(kept - 1, |a, b| b.total_cmp(a));
    // Of those that are as large as the least, as many as there is room for.
    let mut room = kept - larger.iter().filter(|&&x| x > least).count();
    for x in delta {
        let size = x.abs();
        if size < least || (size == least && room == 0) {
            *x = 0.0;
        } else if size == least {
            room -= 1;
        }
    }
}

fn drop_random(delta: &mut [f32], density: f32, random: &Philox) {
    for (i, x) in (0..).zip(delta) {
        *x = if random.uniform(i) < density { *x / density } else { 0.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(rule: Rule, density: f32, deltas: &[(f32, &[f32])]) -> Vec<f32> {
        let deltas = deltas.iter().map(|(weight, delta)| (*weight, delta.to_vec())).collect();
        Combination { rule, density, seed: 1 }.of(deltas, 3)
    }

    #[test]
    fn by_hand() {
        let deltas: [(f32, &[f32]); 2] = [(1.0, &[4.0, -1.0, 0.5, 3.0]), (2.0, &[1.0, 2.0, -5.0, -3.0])];
        assert_eq!(of(Rule::Linear, 0.5, &deltas), [6.0, 3.0, -9.5, -3.0]);
        // Kept: 4, 3 and −5, −3. In the last place they sum to zero, which counts as positive.
        assert_eq!(of(Rule::Ties, 0.5, &deltas), [4.0, 0.0, -10.0, 3.0]);
        // Nothing is pruned: signs + + − +.
        assert_eq!(of(Rule::Ties, 1.0, &deltas), [(4.0 + 2.0) / 2.0, 4.0, -10.0, 3.0]);
        assert_eq!(of(Rule::DareTies, 1.0, &deltas), of(Rule::Ties, 1.0, &deltas));
        assert_eq!(of(Rule::DareLinear, 1.0, &deltas), of(Rule::Linear, 1.0, &deltas));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// As many elements as asked for, and none smaller than one that went.
        #[test]
        fn the_largest_stay(values in prop::collection::vec(-4i8..4, 1..200), density in 0f32..1.0) {
            let values: Vec<f32> = values.into_iter().map(f32::from).collect();
            let mut pruned = values.clone();
            keep_largest(&mut pruned, density);
            let kept = (f64::from(density) * values.len() as f64) as usize;
            let (mut stayed, mut gone) = (Vec::new(), Vec::new());
            for (&x, &y) in values.iter().zip(&pruned) {
                prop_assert!(y == 0.0 || y == x);
                if y != 0.0 { stayed.push(x.abs()) } else { gone.push(x.abs()) }
            }
            let zeros = values.iter().filter(|x| **x == 0.0).count();
            prop_assert!(stayed.len() <= kept && stayed.len() + zeros >= kept);
            let least = stayed.iter().copied().fold(f32::INFINITY, f32::min);
            prop_assert!(stayed.is_empty() || gone.iter().all(|&x| x <= least));
        }
    }

    #[test]
    fn dare_keeps_the_expected_value_and_its_seed() {
        let ones = vec![1.0; 40_000];
        let sum = of(Rule::DareLinear, 0.25, &[(1.0, &ones)]);
        assert!(sum.iter().all(|&x| x == 0.0 || x == 4.0));
        // Three standard deviations of the mean: 3·√(3/40000).
        assert!((sum.iter().sum::<f32>() / 40_000.0 - 1.0).abs() < 0.026);
        assert_eq!(sum, of(Rule::DareLinear, 0.25, &[(1.0, &ones)]));
        let two = of(Rule::DareLinear, 0.25, &[(1.0, &ones), (-1.0, &ones)]);
        assert!(two.iter().any(|&x| x != 0.0), "each adapter has a mask of its own");
    }
}
