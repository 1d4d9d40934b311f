//! Which examples each step gets, and how many steps there are: functions of data and settings.

use crate::{
    data::{Batch, Batching, Examples, Part, Sampler, collate},
    settings::Settings,
};
use anyhow::{Context, Result};

/// The micro-batches of a run.
pub struct Deal<'a> {
    examples: &'a Examples,
    sampler: Sampler,
    /// Micro-batches of a step.
    window: usize,
    /// Micro-batches of the run.
    batches: usize,
    /// Steps of the run.
    pub total: u32,
}

impl<'a> Deal<'a> {
    /// For the examples that the settings' data was read to.
    ///
    /// # Errors
    /// There are none in an epoch, or too many steps.
    pub fn new(examples: &'a Examples, settings: &Settings) -> Result<Self> {
        let weight = |place: usize| settings.data.as_ref().map_or(1.0, |data| data.0[place].weight);
        let counts = examples.known().counts.iter().enumerate();
        let parts: Vec<Part> = counts.map(|(place, &count)| Part { count, weight: weight(place) }).collect();
        let batching = match settings.pack {
            false => Batching::Examples(settings.batch_size),
            true => Batching::Packed {
                lengths: examples.lengths()?,
                tokens: settings.batch_size.saturating_mul(settings.seq_len),
            },
        };
        let sampler = Sampler::new(&parts, batching, settings.seed, !settings.no_shuffle)?;
        let window = settings.grad_accum;
        let (batches, total) = match settings.steps {
            Some(steps) => ((steps as usize).saturating_mul(window), steps),
            None => {
                let batches = sampler.batches_of(settings.epochs.unwrap_or(1) as usize);
                (batches, u32::try_from(batches.div_ceil(window)).context("too many steps")?)
            }
        };
        Ok(Deal { examples, sampler, window, batches, total })
    }

    /// How full packed batches are, as a line for people.
    pub fn packing(&self, settings: &Settings) -> Option<String> {
        let (full, batches) = (100.0 * self.sampler.efficiency()?, self.sampler.batches_of(1));
        let tokens = settings.batch_size * settings.seq_len;
        Some(format!("{batches} micro-batches an epoch of up to {tokens} tokens, {full:.1} % full"))
    }

    /// Number of the first micro-batch of `step`.
    pub fn first(&self, step: u32) -> usize {
        (step as usize).saturating_mul(self.window)
    }

    /// The examples of a micro-batch; `None` if the run has no more.
    pub fn chosen(&self, batch: usize) -> Option<Vec<usize>> {
        (batch < self.batches).then(|| self.sampler.batch_indices(batch))
    }

    /// The micro-batches of `step`. The last step of an epochs-long run may get fewer.
    ///
    /// # Errors
    /// The examples cannot be read.
    pub fn batches(&self, step: u32) -> Result<Vec<Batch>> {
        let first = self.first(step);
        let batch = |chosen: Vec<usize>| {
            let chosen = chosen.into_iter().map(|index| self.examples.get(index)).collect::<Result<Vec<_>, _>>()?;
            Ok(collate(&chosen.iter().collect::<Vec<_>>()))
        };
        (first..first.saturating_add(self.window)).map_while(|number| self.chosen(number)).map(batch).collect()
    }
}
