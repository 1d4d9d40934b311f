//! The memory to fit into, and the fastest step that does.

use super::{Job, memory::peak, time::Rates};
use crate::{
    cli::EmbeddingBits,
    paging::{Bytes, PagedBudget},
    report::bytes,
    settings::{Method, Recompute},
};
use anyhow::Result;
use nibble_runtime::{
    DType, Device, DeviceRequest,
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

    /// The rates to estimate time by, and what they are worth. `None` where nothing is known of the device, or of this type
    /// on it.
    pub fn rates(&self, job: &Job) -> Option<(Rates, &'static str)> {
        (job.dtype != DType::F32).then_some(())?;
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
        let rates = self.rates(job).map_or_else(Rates::reference, |(rates, _)| rates);
        let mut best: Option<(f64, Choice)> = None;
        let mut offer = |choice: Choice| {
            let speed = rates.speed(&choice.job);
            if best.as_ref().is_none_or(|(most, _)| speed > *most) {
                best = Some((speed, choice));
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

/// A change that makes a step take less, and the options that ask for it; `None` where it changes nothing.
type Change = fn(&mut Job) -> Option<String>;

/// Those that a user may make, what costs least first.
const CHANGES: [Change; 6] = [
    |job| {
        job.settings.recompute = Recompute(usize::MAX);
        Some("--recompute".into())
    },
    |job| {
        let pages = job.chip.is_some().then_some(PagedBudget::Bytes(Bytes(0)))?;
        (job.settings.paged_budget.replace(pages) != Some(pages)).then(|| "--paged-budget 0".into())
    },
    |job| {
        let batch = std::mem::replace(&mut job.settings.batch_size, 1);
        job.settings.grad_accum *= batch;
        (batch > 1).then(|| format!("--batch-size 1 --grad-accum {}", job.settings.grad_accum))
    },
    |job| {
        (job.settings.method, job.quantized) = match job.quantized {
            Some(_) => return None,
            None => (Method::Qlora, Some((job.settings.block_size, true))),
        };
        Some("--method qlora".into())
    },
    |job| {
        let before = std::mem::replace(&mut job.settings.embedding_bits, EmbeddingBits::Bits8);
        (before != EmbeddingBits::Bits8).then(|| "--embedding-bits 8".into())
    },
    |job| {
        let rank = std::mem::replace(&mut job.settings.rank, 8);
        (rank > 8).then(|| "--rank 8".into())
    },
];

/// The options with which a job fits that does not: as few of [`CHANGES`] as will do and then the longest sequences; `None` if
/// none will.
///
/// # Errors
/// As [`peak`].
pub fn remedy(job: &Job, room: &Room) -> Result<Option<String>> {
    let with = |changes: &[Change], seq_len: usize| -> Result<Option<String>> {
        let mut job = job.clone();
        let mut options: Vec<String> = changes.iter().filter_map(|change| change(&mut job)).collect();
        if seq_len != job.settings.seq_len {
            options.push(format!("--seq-len {seq_len}"));
        }
        job.settings.seq_len = seq_len;
        Ok(room.holds(&peak(&job)?).then(|| options.join(" ")))
    };
    let lengths =
        std::iter::successors(Some(job.settings.seq_len), |length| Some(length / 2).filter(|&half| half >= 128));
    for length in lengths {
        for count in 1..=CHANGES.len() {
            if with(&CHANGES[..count], length)?.is_none() {
                continue;
            }
            // Of those before the last some may not be needed.
            let mut needed = CHANGES[..count].to_vec();
            for place in (0..count).rev() {
                let change = needed.remove(place);
                if with(&needed, length)?.is_none() {
                    needed.insert(place, change);
                }
            }
            return with(&needed, length);
        }
    }
    Ok(None)
}
