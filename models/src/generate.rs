//! Text generation: one sequence, a KV cache, greedy or sampled.

use crate::{Error, Llama, Result};
use nibble_runtime::{
    Device, Tag,
    rng::{Philox, Stream},
};

/// [`Stream::purpose`] of sampling.
const PURPOSE: u32 = 3;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; above, logits are divided by it before one is drawn.
    pub temperature: f32,
    /// Draw from the k most likely tokens alone; 0 for all.
    pub top_k: usize,
    /// Draw from the smallest set of tokens whose probabilities reach p; 1 for all.
    pub top_p: f32,
    /// Key of the draws: the same seed gives the same text.
    pub seed: u64,
}

impl Sampling {
    /// Always the most likely token.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };

    /// The token for `logits` at `step` of a generation; the first of equals when greedy.
    fn choose(&self, logits: &[f32], step: usize) -> u32 {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        if self.temperature <= 0.0 {
            return order.into_iter().reduce(|a, b| if logits[b] > logits[a] { b } else { a }).unwrap_or(0) as u32;
        }
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let top = logits[order[0]];
        let weights: Vec<f64> = order.iter().map(|&i| f64::from((logits[i] - top) / self.temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let limit = f64::from(self.top_p) * total;
        let before = weights.iter().scan(0.0, |sum, w| Some(std::mem::replace(sum, *sum + w)));
        let count = before.take_while(|&before| before < limit).count().max(1);
        let rng = Philox::new(self.seed, Stream { purpose: PURPOSE, step: step as u32, layer: 0 });
        let mut left = f64::from(rng.uniform(0)) * weights[..count].iter().sum::<f64>();
        let index = weights[..count].iter().position(|w| {
            left -= w;
            left < 0.0
        });
        order[index.unwrap_or(count - 1)] as u32
    }
}

/// Continues `prompt` by up to `max_new` tokens. Stops after a token of `stop` (which is part of the result), or when
/// `on_token` answers false.
///
/// # Errors
/// The prompt is empty or holds an id outside of the vocabulary.
pub fn generate(
    llama: &Llama,
    prompt: &[u32],
    max_new: usize,
    stop: &[u32],
    sampling: Sampling,
    mut on_token: impl FnMut(u32) -> bool,
) -> Result<Vec<u32>> {
    if prompt.is_empty() {
        return Err(Error::Invalid("the prompt holds no token; give a text".into()));
    }
    let ids: Vec<i32> = prompt.iter().map(|&id| i32::try_from(id).unwrap_or(i32::MAX)).collect();
    let rope = llama.config.rope.table(llama.config.head_dim, prompt.len() + max_new)?.to_device(llama.device())?;
    let mut cache = llama.cache(prompt.len() + max_new)?;
    let mut out = Vec::new();
    let mut next = ids;
    let mut past = 0;
    while out.len() < max_new {
        let logits = llama.next_logits(&next, past, &rope, &mut cache)?.into_device(Device::Cpu, Tag::Workspace)?;
        past += next.len();
        let logits = logits.into_device(Device::Cpu, Tag::Workspace)?;
        let token = sampling.choose(logits.as_slice::<f32>()?, out.len());
        out.push(token);
        if !on_token(token) || stop.contains(&token) {
            break;
        }
        next = vec![token as i32];
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.0, 3.0, 1.0, 3.0, -2.0];

    #[test]
    fn greedy_takes_the_first_maximum() {
        assert_eq!(Sampling::GREEDY.choose(&LOGITS, 0), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let sampling = Sampling { temperature: 2.0, seed: 5, ..Sampling::GREEDY };
        let mut counts = [0f64; 5];
        (0..20_000).for_each(|step| counts[sampling.choose(&LOGITS, step) as usize] += 1.0);
        let weights = LOGITS.map(|x| f64::from(x / 2.0).exp());
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(weights) {
            assert!((count / 20_000.0 - weight / total).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let all = |sampling: Sampling| {
            let mut seen: Vec<u32> = (0..2000).map(|step| sampling.choose(&LOGITS, step)).collect();
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        let hot = Sampling { temperature: 10.0, seed: 1, ..Sampling::GREEDY };
        assert_eq!(all(hot), [0, 1, 2, 3, 4]);
        assert_eq!(all(Sampling { top_k: 3, ..hot }), [1, 2, 3]);
        assert_eq!(all(Sampling { top_k: 1, ..hot }), [1]);
        // At temperature 1 the two threes hold 0.90 of the probability.
        assert_eq!(all(Sampling { temperature: 1.0, top_p: 0.8, ..hot }), [1, 3]);
        assert_eq!(all(Sampling { temperature: 1.0, top_p: 0.0, ..hot }), [1]);
    }
}
