//! The memory to fit into, and the fastest step that does.

use super::{Job, memory::peak, time::Rates};
use crate::{
    paging::{Bytes, PagedBudget},
    report::bytes,
    settings::Recompute,
};
use anyhow::Result;
use nibble_runtime::{
    Device, DeviceRequest,
    cuda::{Chip, Gpu},
    memory::{self, Usage},
};

/// What a GPU holds besides what this program's allocator hands out, its context and kernels: measured on an H100, 0.55 to
/// 0.65 GiB.
const CONTEXT: usize = 600 << 20;
/// A plan is trusted to this part of what it says.
const MARGIN: f64 = 0.03;

/// A GPU to plan for where there is none.
const REFERENCE: (&str, Chip, usize) = ("NVIDIA H100 80GB HBM3", Chip { capability: (9, 0), sms: 132 }, 81_559 << 20);

/// A device and its memory.
#[derive(Clone, Debug)]
pub struct Room {
    /// `None` for the CPU.
    pub chip: Option<Chip>,
    pub name: String,
    /// What a step may take.
    pub bytes: usize,
    /// For messages: what the memory is.
    pub of: String,
}

impl Room {
    /// The device that was asked for, with `memory` in all or what is free. Where there is no GPU and none was asked for by
    /// name, an H100 if `imagined`.
    ///
    /// # Errors
    /// The device cannot be used.
    pub fn find(request: DeviceRequest, memory: Option<Bytes>, imagined: bool) -> Result<Room> {
        let given = memory.map(|Bytes(bytes)| bytes);
        let (device, _) = request.resolve()?;
        let (chip, name, free, besides) = match device {
            Device::Cuda(_) => {
                let gpu = Gpu::of(device)?;
                (Some(gpu.chip()), gpu.name().to_string(), gpu.free_memory()?, CONTEXT)
            }
            Device::Cpu if imagined && request == DeviceRequest::Auto => {
                let (name, chip, memory) = REFERENCE;
                (Some(chip), format!("no GPU is here; for one like an {name}"), memory - CONTEXT, CONTEXT)
            }
            Device::Cpu => (None, "cpu".to_string(), memory::available().unwrap_or(usize::MAX), 0),
        };
        let of = match given {
            Some(given) => format!("{} given", bytes(given)),
            None => format!("{} free", bytes(free)),
        };
        Ok(Room { chip, name, bytes: given.map_or(free, |given| given.saturating_sub(besides)), of })
    }

    /// Whether a peak fits, with a margin.
    pub fn holds(&self, usage: &Usage) -> bool {
        usage.total_peak as f64 * (1.0 + MARGIN) <= self.bytes as f64
    }

    /// The rates to estimate time by, and what they are worth. `None` where nothing is known of the device.
    pub fn rates(&self) -> Option<(Rates, &'static str)> {
        Rates::of(&self.name, self.chip.is_some_and(|chip| chip.capability == (9, 0)))
    }

    /// The job with as many of its pages on the device as there is room for, where it has pages that may leave; `None` if it
    /// does not fit even so.
    ///
    /// # Errors
    /// As [`peak`].
    fn with_pages_away(&self, job: &Job) -> Result<Option<Choice>> {
        if !matches!(job.settings.paged_budget, None | Some(PagedBudget::Auto)) || job.pages()?.is_none() {
            return Ok(None);
        }
        let mut job = job.clone();
        job.settings.paged_budget = Some(PagedBudget::Bytes(Bytes(0)));
        let Some(left) = self.bytes.checked_sub((peak(&job)?.total_peak as f64 * (1.0 + MARGIN)) as usize) else {
            return Ok(None);
        };
        let page = job.settings.page_size.0;
        let left = (left as f64 / (1.0 + MARGIN)) as usize / page * page;
        job.settings.paged_budget = Some(PagedBudget::Bytes(Bytes(left)));
        let usage = peak(&job)?;
        Ok(self.holds(&usage).then_some(Choice { job, usage }))
    }

    /// The fastest way to make the step within the memory: how many layers run again, and how many pages leave. `None` if there
    /// is none.
    ///
    /// # Errors
    /// As [`peak`].
    pub fn fastest(&self, job: &Job) -> Result<Option<Choice>> {
        // Which of two steps is faster hardly depends on the GPU.
        let rates = self.rates().map_or_else(Rates::reference, |(rates, _)| rates);
        let mut best: Option<(f64, Choice)> = None;
        let mut offer = |choice: Choice| {
            let seconds = rates.seconds(&choice.job);
            if best.as_ref().is_none_or(|(least, _)| seconds < *least) {
                best = Some((seconds, choice));
            }
        };
        for layers in 0..=job.config.num_layers {
            let job = recomputing(job, layers);
            let usage = peak(&job)?;
            if self.holds(&usage) {
                // More layers would only take longer.
                offer(Choice { job, usage });
                break;
            }
            self.with_pages_away(&job)?.into_iter().for_each(&mut offer);
        }
        Ok(best.map(|(_, choice)| choice))
    }
}

/// A way to make a step, and what it takes.
#[derive(Clone, Debug)]
pub struct Choice {
    pub job: Job,
    pub usage: Usage,
}

/// The job with the first `layers` layers run again.
pub fn recomputing(job: &Job, layers: usize) -> Job {
    let mut job = job.clone();
    job.settings.recompute = Recompute(layers);
    job
}

/// What would make a job fit that does not: the first of these changes, each on top of those before it.
///
/// # Errors
/// As [`peak`].
pub fn remedy(job: &Job, room: &Room) -> Result<String> {
    let mut job = recomputing(job, job.config.num_layers);
    let mut changes = vec!["--recompute".to_string()];
    type Change = fn(&mut Job) -> Option<String>;
    let smaller: [Change; 5] = [
        |job| {
            // Fits only if pages may leave at all.
            job.settings.paged_budget = Some(PagedBudget::Bytes(Bytes(0)));
            job.chip.map(|_| "--paged-budget 0".into())
        },
        |job| {
            let batch = std::mem::replace(&mut job.settings.batch_size, 1);
            job.settings.grad_accum *= batch;
            (batch > 1).then(|| format!("--batch-size 1 --grad-accum {}", job.settings.grad_accum))
        },
        |job| {
            (job.is_full() || job.quantized.is_none()).then(|| {
                job.settings.method = crate::settings::Method::Qlora;
                job.quantized = Some((job.settings.block_size, true));
                "--method qlora".into()
            })
        },
        |job| {
            job.settings.embedding_bits = crate::cli::EmbeddingBits::Bits8;
            (!job.is_full()).then(|| "--embedding-bits 8".into())
        },
        |job| {
            let rank = std::mem::replace(&mut job.settings.rank, 8);
            (rank > 8).then(|| "--rank 8".into())
        },
    ];
    if room.holds(&peak(&job)?) {
        return Ok(changes.join(" "));
    }
    for change in smaller {
        changes.extend(change(&mut job));
        if room.holds(&peak(&job)?) {
            return Ok(changes.join(" "));
        }
    }
    while job.settings.seq_len > 128 {
        job.settings.seq_len /= 2;
        if room.holds(&peak(&job)?) {
            changes.push(format!("--seq-len {}", job.settings.seq_len));
            return Ok(changes.join(" "));
        }
    }
    Ok("a smaller model".into())
}
