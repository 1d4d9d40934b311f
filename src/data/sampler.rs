//! Which examples a step trains on.

use nibble_runtime::rng::{Philox, Stream};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::error::{DataError, Result};

/// Random numbers for the order of examples, for the share of a place's rows, and for the order of packed batches; no other
/// use may have these numbers.
const SHUFFLE: u32 = 0x5348;
const SHARE: u32 = 0x5349;
const BATCHES: u32 = 0x534a;

/// Examples that are packed among each other: enough to fill batches, few enough to keep the order random.
const WINDOW: usize = 4096;

/// A stretch of examples that come from one place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    pub count: usize,
    /// How many times an epoch has each of them; of a fraction, that share of them, chosen anew each epoch.
    pub weight: f64,
}

impl Part {
    /// Examples of it in an epoch, which is the whole number of times and the share of one more.
    fn in_epoch(&self) -> usize {
        // A count and weight that make no sense saturate, and are refused.
        self.count.saturating_mul(self.weight as usize).saturating_add(self.share())
    }

    fn share(&self) -> usize {
        (self.count as f64 * self.weight.fract()).round() as usize
    }
}

/// What a batch is.
#[derive(Clone, Debug)]
pub enum Batching {
    /// So many examples.
    Examples(usize),
    /// As many examples as fit into so many tokens.
    Packed {
        /// Tokens of each example.
        lengths: Vec<u32>,
        /// Tokens of a batch at most. A longer example is a batch alone.
        tokens: usize,
    },
}

/// Deals out examples in batches, epoch after epoch without end. What a step gets is a function of the settings and the
/// step's number alone, so a resumed run goes on exactly where it stopped.
#[derive(Debug)]
pub struct Sampler {
    parts: Vec<Part>,
    batching: Batching,
    seed: u64,
    shuffle: bool,
    plans: Mutex<Plans>,
}

/// What has been worked out already.
#[derive(Debug, Default)]
struct Plans {
    /// Number of batches before each epoch.
    before: Vec<usize>,
    /// The epoch that was asked for last.
    last: Option<(usize, Arc<Epoch>)>,
}

/// The examples of an epoch in order, cut into batches.
#[derive(Debug)]
struct Epoch {
    order: Vec<u32>,
    /// Where each batch ends in `order`.
    ends: Vec<u32>,
}

impl Sampler {
    /// Deals the examples of `parts`, which are numbered through. `shuffle` gives each epoch its own order, otherwise it is
    /// the files'.
    ///
    /// # Errors
    /// [`DataError::Options`] if an epoch has no examples (or more than 2³²), or a batch none.
    pub fn new(parts: &[Part], batching: Batching, seed: u64, shuffle: bool) -> Result<Self> {
        let examples = parts.iter().fold(0usize, |sum, part| sum.saturating_add(part.in_epoch()));
        if examples == 0 || u32::try_from(examples).is_err() {
            return Err(DataError::Options(format!("{examples} examples in an epoch; expected 1 to 2^32")));
        }
        if let Batching::Examples(0) | Batching::Packed { tokens: 0, .. } = batching {
            return Err(DataError::Options("--batch-size is 0; expected at least 1".to_owned()));
        }
        let plans = Mutex::new(Plans { before: vec![0], last: None });
        Ok(Sampler { parts: parts.to_vec(), batching, seed, shuffle, plans })
    }

    /// Batches of the first `epochs` epochs.
    pub fn batches_of(&self, epochs: usize) -> usize {
        if let Batching::Examples(size) = self.batching {
            let examples: usize = self.parts.iter().map(Part::in_epoch).sum();
            return epochs * examples.div_ceil(size);
        }
        let mut plans = self.plans();
        while plans.before.len() <= epochs {
            let epoch = plans.before.len() - 1;
            let batches = self.plan(&mut plans, epoch).ends.len();
            let before = plans.before[epoch] + batches;
            plans.before.push(before);
        }
        plans.before[epochs]
    }

    /// The examples of batch number `batch`, counted from 0 across epochs.
    pub fn batch_indices(&self, batch: usize) -> Vec<usize> {
        let epoch = match &self.batching {
            Batching::Examples(_) => batch / self.batches_of(1),
            Batching::Packed { .. } => (0..).find(|epoch| batch < self.batches_of(epoch + 1)).unwrap_or(0),
        };
        let within = batch - self.batches_of(epoch);
        let plan = self.plan(&mut self.plans(), epoch);
        let start = within.checked_sub(1).map_or(0, |previous| plan.ends[previous]);
        plan.order[start as usize..plan.ends[within] as usize].iter().map(|&index| index as usize).collect()
    }

    /// Tokens in the batches of the first epoch, over what would fit; `None` for batches that are not packed.
    pub fn efficiency(&self) -> Option<f64> {
        let Batching::Packed { lengths, tokens } = &self.batching else { return None };
        let plan = self.plan(&mut self.plans(), 0);
        let held: u64 = plan.order.iter().map(|&index| u64::from(lengths[index as usize])).sum();
        Some(held as f64 / (plan.ends.len() as f64 * *tokens as f64))
    }

    fn plans(&self) -> MutexGuard<'_, Plans> {
        // What is there is right, whoever panicked while more was being added.
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn plan(&self, plans: &mut Plans, epoch: usize) -> Arc<Epoch> {
        if let Some((last, plan)) = &plans.last
            && *last == epoch
        {
            return Arc::clone(plan);
        }
        let order = self.order(epoch);
        let plan = match &self.batching {
            Batching::Examples(size) => {
                let ends =
                    (0..order.len()).step_by(*size).map(|start| (start + size).min(order.len()) as u32).collect();
                Epoch { order, ends }
            }
            Batching::Packed { lengths, tokens } => match self.shuffle {
                true => pack(&order, lengths, *tokens, self.random(BATCHES, epoch, 0)),
                false => fill(order, lengths, *tokens),
            },
        };
        let plan = Arc::new(plan);
        plans.last = Some((epoch, Arc::clone(&plan)));
        plan
    }

    /// The examples of an epoch.
    fn order(&self, epoch: usize) -> Vec<u32> {
        let mut chosen: Vec<u32> = Vec::new();
        let mut first = 0;
        for (number, part) in self.parts.iter().enumerate() {
            for _ in 0..part.weight as usize {
                chosen.extend(first..first + part.count as u32);
            }
            let share = part.share();
            if share > 0 {
                let mut some = self.random(SHARE, epoch, number as u32).permutation(part.count);
                some.truncate(share);
                some.sort_unstable();
                chosen.extend(some.into_iter().map(|index| first + index as u32));
            }
            first += part.count as u32;
        }
        if !self.shuffle {
            return chosen;
        }
        let order = self.random(SHUFFLE, epoch, 0).permutation(chosen.len());
        order.into_iter().map(|place| chosen[place]).collect()
    }

    fn random(&self, purpose: u32, epoch: usize, layer: u32) -> Philox {
        Philox::new(self.seed, Stream { purpose, step: epoch as u32, layer })
    }
}

/// Packs an order window by window: the longest first, each into the fullest batch that has room (best-fit decreasing;
/// Ding et al., arXiv 2404.10830, pack examples so). The batches of a window are shuffled, for packing sorts them.
fn pack(order: &[u32], lengths: &[u32], tokens: usize, random: Philox) -> Epoch {
    let length = |index: u32| lengths[index as usize] as usize;
    let mut batches: Vec<Vec<u32>> = Vec::new();
    for window in order.chunks(WINDOW) {
        let mut longest: Vec<u32> = window.to_vec();
        longest.sort_by_key(|&index| std::cmp::Reverse(length(index)));
        // Room of each batch, with its number.
        let mut room: BTreeSet<(usize, usize)> = BTreeSet::new();
        for index in longest {
            let needed = length(index);
            match room.range((needed, 0)..).next().copied() {
                Some((left, batch)) => {
                    room.remove(&(left, batch));
                    batches[batch].push(index);
                    room.insert((left - needed, batch));
                }
                None => {
                    room.insert((tokens.saturating_sub(needed), batches.len()));
                    batches.push(vec![index]);
                }
            }
        }
    }
    // Windows are in random order already; among all batches is as random as within each window, and simpler.
    let shuffled = random.permutation(batches.len());
    let (mut order, mut ends) = (Vec::with_capacity(order.len()), Vec::with_capacity(batches.len()));
    for batch in shuffled {
        order.extend(&batches[batch]);
        ends.push(order.len() as u32);
    }
    Epoch { order, ends }
}

/// Cuts an order where the next example would not fit.
fn fill(order: Vec<u32>, lengths: &[u32], tokens: usize) -> Epoch {
    let (mut ends, mut held) = (Vec::new(), 0);
    for (place, &index) in order.iter().enumerate() {
        let length = lengths[index as usize] as usize;
        if place > 0 && held + length > tokens {
            ends.push(place as u32);
            held = 0;
        }
        held += length;
    }
    ends.push(order.len() as u32);
    Epoch { order, ends }
}
