//! Which examples a step trains on.

use nibble_runtime::rng::{Philox, Stream};

use super::error::{DataError, Result};

/// Random numbers for the order of examples; no other use may have this number.
const SHUFFLE: u32 = 0x5348;

/// Deals out examples in batches, epoch after epoch without end. What a step gets is a function of the settings and the
/// step's number alone, so a resumed run goes on exactly where it stopped.
#[derive(Clone, Debug)]
pub struct Sampler {
    examples: usize,
    batch_size: usize,
    seed: u64,
    shuffle: bool,
}

impl Sampler {
    /// Batches of `batch_size` out of `examples`; `shuffle` gives each epoch its own order, otherwise it is the file's.
    /// [`DataError::Options`] if there are no examples (or more than 2³²) or the batch size is 0.
    pub fn new(examples: usize, batch_size: usize, seed: u64, shuffle: bool) -> Result<Self> {
        if examples == 0 || u32::try_from(examples).is_err() {
            return Err(DataError::Options(format!("{examples} examples; expected 1 to 2^32")));
        }
        if batch_size == 0 {
            return Err(DataError::Options("--batch-size is 0; expected at least 1".to_owned()));
        }
        Ok(Sampler { examples, batch_size, seed, shuffle })
    }

    /// Batches of one epoch; the last holds what is left over.
    pub fn steps_per_epoch(&self) -> usize {
        self.examples.div_ceil(self.batch_size)
    }

    /// The examples of batch number `step`, counted from 0 across epochs.
    pub fn batch_indices(&self, step: usize) -> Vec<usize> {
        let (epoch, within) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let first = within * self.batch_size;
        let range = first..first.saturating_add(self.batch_size).min(self.examples);
        if !self.shuffle {
            return range.collect();
        }
        let stream = Stream { purpose: SHUFFLE, step: epoch as u32, layer: 0 };
        Philox::new(self.seed, stream).permutation(self.examples)[range].to_vec()
    }
}
