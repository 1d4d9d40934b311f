//! The next token from logits: the repetition penalty, then temperature, top-k, top-p and min-p, then a draw.
//!
//! Order and definitions are those of transformers' logits processors, so that a setting means here what it means there.

use crate::{Error, Result};
use nibble_kernels::argmax;
use nibble_runtime::{
    Device, Tag, Tensor,
    rng::{Philox, Stream},
};
use rayon::prelude::*;

/// [`Stream::purpose`] of draws.
const PURPOSE: u32 = 3;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; above, logits are divided by it before one is drawn.
    pub temperature: f32,
    /// Draw from the k most likely tokens alone (and from those as likely as the last of them); 0 for all.
    pub top_k: usize,
    /// Draw from the smallest set of tokens whose probabilities reach p; 1 for all.
    pub top_p: f32,
    /// Draw from the tokens that are at least this fraction as likely as the most likely one; 0 for all.
    pub min_p: f32,
    /// Makes tokens that the text already holds less likely: their logits are divided by it where positive and multiplied
    /// where negative (Keskar et al., "CTRL", arXiv 1909.05858); 1 for none. Counts when greedy, too.
    pub repetition_penalty: f32,
    /// Key of the draws: the same seed gives the same text.
    pub seed: u64,
}

impl Sampling {
    /// Always the most likely token.
    pub const GREEDY: Sampling =
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 };

    /// The token that follows `text` given the `logits` after its last token. Draws depend on the seed and on the length
    /// of the text; the first of equals is taken when greedy.
    pub fn choose(&self, logits: &mut [f32], text: &[u32]) -> u32 {
        self.penalize(logits, text);
        if self.temperature <= 0.0 {
            return argmax::of(logits);
        }
        let mut candidates = self.candidates(logits);
        let rng = Philox::new(self.seed, Stream { purpose: PURPOSE, step: text.len() as u32, layer: 0 });
        let drawn = f64::from(rng.uniform(0)) * total(&candidates);
        let count = head(&mut candidates, |weight| weight > drawn);
        candidates[..count].last().map_or(0, Candidate::token)
    }

    /// As [`Sampling::choose`] for rows of `logits` f32 `[T, V]`, which follow one text each. Where the most likely token is all
    /// that is wanted it is found where the logits are.
    ///
    /// # Errors
    /// There are not as many texts as rows; the device has failed.
    pub fn choose_each(&self, logits: Tensor, texts: &[&[u32]]) -> Result<Vec<u32>> {
        let (rows, vocab) = logits.dims2("logits")?;
        if rows != texts.len() {
            return Err(Error::Invalid(format!("logits of {rows} rows for {} texts", texts.len())));
        }
        if self.temperature <= 0.0 && self.repetition_penalty == 1.0 {
            return Ok(argmax::rows(&logits)?);
        }
        let mut logits = logits.into_device(Device::Cpu, Tag::Workspace)?;
        let rows = logits.as_mut_slice::<f32>()?.par_chunks_mut(vocab.max(1));
        Ok(rows.zip(texts).map(|(row, text)| self.choose(row, text)).collect())
    }

    fn penalize(&self, logits: &mut [f32], text: &[u32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let mut seen = text.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 { *logit / self.repetition_penalty } else { *logit * self.repetition_penalty };
            }
        }
    }

    /// The tokens that may be drawn, in any order.
    fn candidates(&self, logits: &[f32]) -> Vec<Candidate> {
        let mut ranks: Vec<u64> = logits.iter().enumerate().map(|(token, &logit)| rank(logit, token as u32)).collect();
        let logit = |rank: u64| logits[rank as u32 as usize];
        if self.top_k > 0 && self.top_k < ranks.len() {
            let (_, &mut last, _) = ranks.select_nth_unstable(self.top_k - 1);
            ranks.retain(|&rank| logit(rank) >= logit(last));
        }
        let Some(&best) = ranks.iter().min() else { return Vec::new() };
        if !logit(best).is_finite() {
            return vec![Candidate { rank: best, weight: 1.0 }]; // beside it no other has a weight that is a number
        }
        let weight = |rank: u64| f64::from((logit(rank) - logit(best)) / self.temperature).exp();
        let candidate = |&rank: &u64| Candidate { rank, weight: weight(rank) };
        // What takes longest.
        let mut kept: Vec<Candidate> = ranks.par_iter().with_min_len(4096).map(candidate).collect();

        // 1 takes all, whatever the sum loses to rounding.
        if self.top_p < 1.0 {
            let limit = f64::from(self.top_p) * total(&kept);
            let count = head(&mut kept, |weight| weight >= limit);
            kept.truncate(count);
        }
        // The most likely token's weight is 1, so that it always stays.
        let least = f64::from(self.min_p.min(1.0));
        kept.retain(|candidate| candidate.weight >= least);
        kept
    }
}

/// A token that may be drawn.
#[derive(Clone, Copy)]
struct Candidate {
    /// [`rank`] of the token.
    rank: u64,
    /// How likely the token is, as a multiple of the most likely one's probability.
    weight: f64,
}

impl Candidate {
    fn token(&self) -> u32 {
        self.rank as u32
    }
}

/// A number for a token that puts likely ones first, in the order of [`f32::total_cmp`], then those of small ids. The token is
/// the low half.
fn rank(logit: f32, token: u32) -> u64 {
    // The bits of a float without its sign grow with its magnitude; the sign bit puts negative ones last.
    let bits = logit.to_bits();
    let falling = if logit.is_sign_negative() { bits } else { bits ^ (u32::MAX >> 1) };
    u64::from(falling) << 32 | u64::from(token)
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.weight).sum()
}

/// The smallest number of candidates, likely ones first, whose weight together is `enough`, which from some weight on is true:
/// at least one, all if they are not enough. Brings them to the front, the least likely of them last.
///
/// A search over the number that puts in order only what it must: a select of a part of the candidates each time.
fn head(candidates: &mut [Candidate], enough: impl Fn(f64) -> bool) -> usize {
    // More than `few` are needed, which weigh `before`; `many` suffice.
    let (mut few, mut before, mut many) = (0, 0.0, candidates.len());
    while many - few > 1 {
        // Most of the weight is in few tokens as a rule.
        let middle = few + (many - few).div_ceil(4);
        candidates[few..many].select_nth_unstable_by_key(middle - few, |candidate| candidate.rank);
        let weight = before + total(&candidates[few..middle]);
        if enough(weight) {
            many = middle;
        } else {
            (few, before) = (middle, weight);
        }
    }
    many
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Probabilities 1/2, 1/4, 1/8, 1/16, 1/16 at temperature 1, in another order.
    fn halves() -> [f32; 5] {
        [0.25f32, 0.0625, 0.5, 0.125, 0.0625].map(f32::ln)
    }

    const HOT: Sampling = Sampling { temperature: 1.0, ..Sampling::GREEDY };

    /// The tokens that may be drawn with their probabilities, which add up to 1; likely ones first, then by id.
    fn distribution(sampling: Sampling, logits: &[f32]) -> Vec<(u32, f64)> {
        let mut candidates = sampling.candidates(logits);
        let total = total(&candidates);
        candidates.sort_unstable_by_key(|candidate| candidate.rank);
        candidates.iter().map(|candidate| (candidate.token(), candidate.weight / total)).collect()
    }

    /// [`distribution`] by its definition: all tokens in order, and each filter cuts off its end.
    fn defined(sampling: Sampling, logits: &[f32]) -> Vec<(u32, f64)> {
        let mut tokens: Vec<usize> = (0..logits.len()).collect();
        tokens.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if sampling.top_k > 0 && sampling.top_k < tokens.len() {
            let last = logits[tokens[sampling.top_k - 1]];
            tokens.retain(|&token| logits[token] >= last);
        }
        let best = logits[tokens[0]];
        let weight = |token: usize| f64::from((logits[token] - best) / sampling.temperature).exp();
        let mut kept: Vec<(u32, f64)> = tokens.iter().map(|&token| (token as u32, weight(token))).collect();
        let sum = |kept: &[(u32, f64)]| kept.iter().map(|(_, weight)| weight).sum::<f64>();
        if sampling.top_p < 1.0 {
            let limit = f64::from(sampling.top_p) * sum(&kept);
            let count = (1..kept.len()).find(|&count| sum(&kept[..count]) >= limit);
            kept.truncate(count.unwrap_or(kept.len()));
        }
        let count = kept.iter().take_while(|(_, weight)| *weight >= f64::from(sampling.min_p)).count();
        kept.truncate(count.max(1));
        let total = sum(&kept);
        kept.iter().map(|(token, weight)| (*token, weight / total)).collect()
    }

    /// Logits on few values, so that many are equal, or on many; some minus or plus infinity, or of both zeros.
    fn logits() -> impl Strategy<Value = Vec<f32>> {
        let usual = prop_oneof![(-4i8..4).prop_map(|x| f32::from(x) / 2.0), -8f32..8.0];
        let rare = prop_oneof![Just(f32::NEG_INFINITY), Just(-0.0), Just(-1e30)];
        let with_infinite = |finite: Vec<f32>, infinite: Option<prop::sample::Index>| {
            let mut logits = finite;
            if let Some(place) = infinite {
                let place = place.index(logits.len());
                logits[place..].iter_mut().step_by(3).for_each(|logit| *logit = f32::INFINITY);
            }
            logits
        };
        let finite = prop::collection::vec(prop_oneof![9 => usual, 1 => rare], 1..300);
        (finite, prop::option::weighted(0.1, any::<prop::sample::Index>())).prop_map(move |(a, b)| with_infinite(a, b))
    }

    fn assert_distribution(sampling: Sampling, expected: &[(u32, f64)]) {
        let found = distribution(sampling, &halves());
        assert_eq!(found.len(), expected.len(), "{sampling:?}: {found:?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.0 == expected.0 && (found.1 - expected.1).abs() < 1e-6, "{sampling:?}: {found:?}");
        }
    }

    #[test]
    fn greedy_takes_the_first_maximum() {
        assert_eq!(Sampling::GREEDY.choose(&mut [0.0, 3.0, 1.0, 3.0, -2.0], &[]), 1);
    }

    #[test]
    fn distributions_computed_by_hand() {
        let sixteenth = 1.0 / 16.0;
        assert_distribution(HOT, &[(2, 0.5), (0, 0.25), (3, 0.125), (1, sixteenth), (4, sixteenth)]);
        // Half the temperature squares the weights: 64, 16, 4, 1, 1 out of 86.
        let cold = Sampling { temperature: 0.5, ..HOT };
        let of_86 = [(2, 64.0 / 86.0), (0, 16.0 / 86.0), (3, 4.0 / 86.0), (1, 1.0 / 86.0), (4, 1.0 / 86.0)];
        assert_distribution(cold, &of_86);
        assert_distribution(Sampling { top_k: 2, ..HOT }, &[(2, 2.0 / 3.0), (0, 1.0 / 3.0)]);
        // Those as likely as the fourth are as good as the fourth.
        assert_eq!(Sampling { top_k: 4, ..HOT }.candidates(&halves()).len(), 5);
        let sevenths = [(2, 4.0 / 7.0), (0, 2.0 / 7.0), (3, 1.0 / 7.0)];
        assert_distribution(Sampling { top_p: 0.76, ..HOT }, &sevenths);
        assert_distribution(
            Sampling { top_p: 0.74, ..HOT },
            &sevenths[..2].iter().map(|x| (x.0, x.1 * 7.0 / 6.0)).collect::<Vec<_>>(),
        );
        assert_distribution(Sampling { top_p: 1e-9, ..HOT }, &[(2, 1.0)]);
        assert_distribution(Sampling { min_p: 0.24, ..HOT }, &sevenths);
        assert_distribution(Sampling { min_p: 1.0, ..HOT }, &[(2, 1.0)]);
        // The temperature comes first: 64 : 16 : 4 leaves only the first two above a tenth.
        assert_distribution(Sampling { min_p: 0.1, ..cold }, &[(2, 0.8), (0, 0.2)]);
        // top-p counts what top-k left: of 2/3 and 1/3, the first reaches 0.6.
        assert_distribution(Sampling { top_k: 2, top_p: 0.6, ..HOT }, &[(2, 1.0)]);
    }

    #[test]
    fn repeated_tokens_become_less_likely_on_both_sides_of_zero() {
        let penalty = Sampling { repetition_penalty: 2.0, ..Sampling::GREEDY };
        let mut logits = [3.0, 2.0, -1.0, -1.0];
        // Once, however often the text holds a token; ids beyond the vocabulary are nobody's.
        assert_eq!(penalty.choose(&mut logits, &[0, 2, 0, 99]), 1);
        assert_eq!(logits, [1.5, 2.0, -2.0, -1.0]);
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_seed() {
        let mut counts = [0f64; 5];
        let mut text = Vec::new();
        for _ in 0..20_000 {
            text.push(0);
            counts[Sampling { seed: 5, ..HOT }.choose(&mut halves(), &text) as usize] += 1.0;
        }
        for (count, logit) in counts.iter().zip(halves()) {
            assert!((count / 20_000.0 - f64::from(logit.exp())).abs() < 0.015, "{counts:?}");
        }
        let draw =
            |seed| (0..50).map(|n| Sampling { seed, ..HOT }.choose(&mut halves(), &text[..n])).collect::<Vec<_>>();
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn selection_is_the_definition_by_a_sort(
            logits in logits(),
            top_k in prop_oneof![Just(0), 1usize..320],
            top_p in prop_oneof![Just(1f32), 0f32..1.0],
            min_p in prop_oneof![Just(0f32), 0f32..=1.0],
            temperature in 0.2f32..3.0,
            seed: u64,
        ) {
            let sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..HOT };
            let (found, expected) = (distribution(sampling, &logits), defined(sampling, &logits));
            prop_assert_eq!(found.len(), expected.len());
            // By the definition an infinite logit has no probability.
            let same = |a: f64, b: f64| (a - b).abs() <= 1e-12 || b.is_nan();
            prop_assert!(found.iter().zip(&expected).all(|(a, b)| a.0 == b.0 && same(a.1, b.1)), "{:?}", found);
            for length in 0..20 {
                let text = vec![0; length];
                let rng = Philox::new(seed, Stream { purpose: PURPOSE, step: length as u32, layer: 0 });
                let mut left = f64::from(rng.uniform(0));
                let drawn = expected.iter().find(|(_, probability)| {
                    left -= probability;
                    left < 0.0
                });
                let token = drawn.or(expected.last()).unwrap().0;
                prop_assert_eq!(sampling.choose(&mut logits.clone(), &text), token);
            }
        }

        #[test]
        fn top_p_keeps_the_smallest_set_that_reaches_p(
            logits in prop::collection::vec(-8f32..8.0, 1..60),
            top_p in 0.01f32..1.0,
            temperature in 0.2f32..3.0,
        ) {
            let sampling = Sampling { temperature, ..HOT };
            let all = distribution(sampling, &logits);
            let kept = distribution(Sampling { top_p, ..sampling }, &logits);
            let mass = |count: usize| all[..count].iter().map(|(_, p)| p).sum::<f64>();
            let p = f64::from(top_p);
            prop_assert!(mass(kept.len()) >= p - 1e-9);
            prop_assert!(mass(kept.len() - 1) < p + 1e-9);
            prop_assert!(kept.iter().zip(&all).all(|(a, b)| a.0 == b.0), "the likely ones");
        }

        #[test]
        fn every_filter_keeps_what_it_says(
            logits in prop::collection::vec(-8f32..8.0, 1..60),
            top_k in 1usize..70,
            min_p in 0f32..=1.0,
        ) {
            let k = distribution(Sampling { top_k, ..HOT }, &logits);
            let worst = k.iter().map(|(token, _)| logits[*token as usize]).fold(f32::INFINITY, f32::min);
            prop_assert!(k.len() >= top_k.min(logits.len()));
            prop_assert!(logits.iter().filter(|&&logit| logit > worst).count() < top_k);
            let m = distribution(Sampling { min_p, ..HOT }, &logits);
            let all = distribution(HOT, &logits);
            let wanted = all.iter().filter(|(_, p)| *p >= f64::from(min_p) * all[0].1 * (1.0 + 1e-12)).count();
            prop_assert!(m.len().abs_diff(wanted.max(1)) <= 1);
            for kept in [k, m] {
                prop_assert!((kept.iter().map(|(_, p)| p).sum::<f64>() - 1.0).abs() < 1e-9);
            }
        }
    }
}
