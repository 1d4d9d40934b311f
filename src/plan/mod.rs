//! Will it fit? What a training step takes in memory and time, before anything is loaded: [`memory`] by the step's own
//! allocations, [`time`] by measured rates. [`room`] chooses.

mod job;
mod memory;
mod room;
mod table;
#[cfg(test)]
mod tests;
mod time;

use crate::{
    model::Outline,
    report::bytes,
    settings::{MemoryBudget, Settings},
    train::source,
};
use anyhow::{Result, bail};
pub use job::Job;
pub use memory::{on_host, peak};
use nibble_runtime::{Device, cuda::Gpu};
pub use room::Room;
use room::{least, remedy};
use table::Row;
pub use table::plan_command;

/// Advice where no option helps.
const SMALLER: &str = "a smaller model";

/// The job of these settings on the device of `room`.
fn job(settings: &Settings, room: &Room) -> Result<Job> {
    Job::new(&Outline::read(&source(settings))?, settings, room.chip)
}

/// The memory of `--memory-budget`, where it was given; to be found before anything is loaded. A number of bytes is the limit of a
/// GPU's allocator from then on.
///
/// # Errors
/// The device cannot be used.
pub fn budget(settings: &Settings) -> Result<Option<Room>> {
    let given = match settings.memory_budget {
        None => return Ok(None),
        Some(MemoryBudget::Auto) => None,
        Some(MemoryBudget::Bytes(bytes)) => Some(bytes),
    };
    let room = Room::find(settings.device, given, false)?;
    if let (Some(_), (device @ Device::Cuda(_), _)) = (given, settings.device.resolve()?) {
        // Free blocks that are kept for reuse are given back before it is exceeded.
        Gpu::of(device)?.memory()?.lock().set_limit(Some(room.bytes))?;
    }
    Ok(Some(room))
}

/// The settings with what is fastest within a [`budget`], said on standard error, for examples of at most `longest` tokens. As
/// they are where there is none.
///
/// # Errors
/// Nothing fits.
pub fn within(budget: Option<Room>, settings: &Settings, longest: usize) -> Result<Settings> {
    let mut settings = Settings { memory_budget: None, ..settings.clone() };
    let Some(room) = budget else { return Ok(settings) };
    let mut job = job(&settings, &room)?;
    job.settings.seq_len = longest.min(settings.seq_len).max(1);
    let Some(choice) = room.fastest(&job)? else {
        let least = peak(&least(&job))?;
        bail!(
            "--memory-budget: nothing fits. With as little kept as can be a step of {} x {} tokens takes {}, and there are {} \
             for it ({}). What would fit: {}",
            job.settings.batch_size,
            job.settings.seq_len,
            bytes(least.total_peak),
            bytes(room.bytes),
            room.of,
            remedy(&job, &room)?.unwrap_or_else(|| SMALLER.into())
        );
    };
    crate::note!(
        "plan     {}: {} of {} at the peak ({})",
        Row::new(&choice, &job, &room).options(),
        bytes(choice.usage.total_peak),
        bytes(room.bytes),
        room.of
    );
    settings.activations = choice.job.settings.activations;
    settings.feed_forward_rows = choice.job.settings.feed_forward_rows;
    settings.dequantized_layers = choice.job.settings.dequantized_layers;
    settings.paged_budget = choice.job.settings.paged_budget;
    Ok(settings)
}
