//! The memory to fit into, and the fastest step that does.

use super::{
    Job,
    memory::{on_host, peak},
    time::Rates,
};
use crate::{
    cli::EmbeddingBits,
    paging::{Bytes, PagedBudget},
    report::bytes,
    settings::Method,
};
use anyhow::Result;
use nibble_kernels::linear;
use nibble_models::llama::{Activations, Extent, Keeping};
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
    /// The GPU's, or cpu.
    pub name: String,
    /// Whether it is a GPU that is not here.
    pub imagined: bool,
    /// What a step may take.
    pub bytes: usize,
    /// Host memory that may be pinned.
    pub host: usize,
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
        let imagined = imagined && device == Device::Cpu && request == DeviceRequest::Auto;
        let (chip, name, free, besides) = match device {
            Device::Cuda(_) => {
                let gpu = Gpu::of(device)?;
                (Some(gpu.chip()), gpu.name(), gpu.free_memory()?, CONTEXT)
            }
            Device::Cpu if imagined => {
                let (name, chip, memory) = REFERENCE;
                (Some(chip), name, memory - CONTEXT, CONTEXT)
            }
            Device::Cpu => (None, "cpu", memory::available().unwrap_or(usize::MAX), 0),
        };
        let of = match given {
            Some(given) => format!("{} given", bytes(given)),
            None => format!("{} free", bytes(free)),
        };
        // Where no GPU is, another machine is planned for.
        let host =
            if matches!(device, Device::Cuda(_)) { memory::available().map(|bytes| bytes / 10 * 9) } else { None };
        let bytes = given.map_or(free, |given| given.saturating_sub(besides));
        Ok(Room { chip, name: name.into(), imagined, bytes, host: host.unwrap_or(usize::MAX), of })
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

    /// The fastest way to make the step within the memory: what layers keep and where, how many rows feed-forward blocks take
    /// at a time, and how many pages leave. `None` if there is none.
    ///
    /// # Errors
    /// As [`peak`].
    pub fn fastest(&self, job: &Job) -> Result<Option<Choice>> {
        // Which of two steps is faster hardly depends on the GPU.
        let rates = self.rates(job).map_or_else(Rates::reference, |(rates, _)| rates);
        let mut best: Option<(f64, Choice)> = None;
        for job in in_parts(job) {
            for (job, away) in with_pages_away(&job)? {
                for (first, rest) in pairs(&job) {
                    let Some(choice) = self.with_few(&job, first, rest)? else { continue };
                    let choice = if away { self.with_pages_back(choice)? } else { choice };
                    let choice = self.with_dequantized(choice)?;
                    let speed = rates.speed(&choice.job);
                    if best.as_ref().is_none_or(|(most, _)| speed > *most) {
                        best = Some((speed, choice));
                    }
                }
            }
        }
        Ok(best.map(|(_, choice)| choice))
    }

    /// The job with as few layers as will do, from the first on, that keep `first` where the others keep `rest`; `None` if it
    /// does not fit with all.
    fn with_few(&self, job: &Job, first: Keeping, rest: Keeping) -> Result<Option<Choice>> {
        let at = |layers| -> Result<Option<Choice>> {
            let layers = if layers == job.config.num_layers { usize::MAX } else { layers };
            let job = keeping(job, Activations::new(first, layers, rest));
            let usage = peak(&job)?;
            Ok(self.holds(&usage).then_some(Choice { job, usage }))
        };
        let all = job.config.num_layers;
        let Some(mut least) = at(all)? else { return Ok(None) };
        // The device holds less the more layers keep less.
        let (mut from, mut enough) = (0, all);
        while from < enough {
            let middle = (from + enough) / 2;
            match at(middle)? {
                Some(choice) => (least, enough) = (choice, middle),
                None => from = middle + 1,
            }
        }
        Ok((on_host(&least.job) <= self.host).then_some(least))
    }

    /// A choice with as many layers whose weights are held dequantized as there is room for, where steps dequantize them.
    fn with_dequantized(&self, choice: Choice) -> Result<Choice> {
        let mut job = choice.job.clone();
        let (c, tokens) = (&job.config, job.tokens().min(job.settings.feed_forward_rows.unwrap_or(usize::MAX)));
        let useful = job.quantized.is_some()
            && job.dtype != DType::F32
            && job.chip.is_some_and(|chip| linear::dequantizes(chip, tokens));
        if !useful {
            return Ok(choice);
        }
        let layer = c.linear_shapes().iter().map(|[n, k]| n * k).sum::<usize>() * job.dtype.size();
        let left = self.bytes.saturating_sub((choice.usage.total_peak as f64 * (1.0 + MARGIN)) as usize);
        let layers = (left as f64 / (layer as f64 * (1.0 + MARGIN))) as usize;
        job.settings.dequantized_layers = layers.min(c.num_layers);
        let usage = peak(&job)?;
        Ok(if self.holds(&usage) { Choice { job, usage } } else { choice })
    }

    /// A choice with as many of its pages on the device as there is room for.
    fn with_pages_back(&self, choice: Choice) -> Result<Choice> {
        let left = self.bytes.saturating_sub((choice.usage.total_peak as f64 * (1.0 + MARGIN)) as usize);
        let page = choice.job.settings.page_size.0;
        let left = (left as f64 / (1.0 + MARGIN)) as usize / page * page;
        let mut job = choice.job.clone();
        job.settings.paged_budget = Some(PagedBudget::Bytes(Bytes(left)));
        let usage = peak(&job)?;
        Ok(if self.holds(&usage) { Choice { job, usage } } else { choice })
    }
}

/// A way to make a step, and what it takes.
#[derive(Clone, Debug)]
pub struct Choice {
    pub job: Job,
    pub usage: Usage,
}

/// A budget that leaves no page on the device.
const NO_PAGES: PagedBudget = PagedBudget::Bytes(Bytes(0));

/// Rows that feed-forward blocks may take at a time.
const PARTS: [usize; 2] = [8192, 2048];

/// The job, and with its feed-forward blocks in parts, where dropout does not forbid it.
fn in_parts(job: &Job) -> Vec<Job> {
    let parts = PARTS.into_iter().filter(|&rows| job.chip.is_some() && !job.trains().dropout && rows < job.tokens());
    let with = |rows| {
        let mut job = job.clone();
        job.settings.feed_forward_rows = rows;
        job
    };
    std::iter::once(job.settings.feed_forward_rows).chain(parts.map(Some)).map(with).collect()
}

/// The job, and with its pages in host memory (`true`), where it has pages that may leave.
fn with_pages_away(job: &Job) -> Result<Vec<(Job, bool)>> {
    let mut jobs = vec![(job.clone(), false)];
    if matches!(job.settings.paged_budget, None | Some(PagedBudget::Auto)) && job.pages()?.is_some() {
        let mut away = job.clone();
        away.settings.paged_budget = Some(NO_PAGES);
        jobs.push((away, true));
    }
    Ok(jobs)
}

/// What layers may keep instead of everything.
pub fn cheaper(job: &Job) -> impl Iterator<Item = Keeping> {
    let places: &[bool] = if job.chip.is_some() { &[false, true] } else { &[false] };
    let every = [Extent::Inputs, Extent::Attention, Extent::All].into_iter();
    let every = every.flat_map(|extent| places.iter().map(move |&on_host| Keeping { extent, on_host }));
    every.filter(|&keeping| keeping != Keeping::default())
}

/// What the first layers may keep, and the others.
fn pairs(job: &Job) -> Vec<(Keeping, Keeping)> {
    let inputs = |on_host| Keeping { extent: Extent::Inputs, on_host };
    let mut pairs: Vec<_> = cheaper(job).map(|first| (first, Keeping::default())).collect();
    // Where host memory is short.
    pairs.extend((job.chip.is_some()).then_some((inputs(true), inputs(false))));
    pairs
}

/// The job with layers that keep this.
pub fn keeping(job: &Job, activations: Activations) -> Job {
    let mut job = job.clone();
    job.settings.activations = activations;
    job
}

/// The job with as little in device memory as layers can do with.
pub fn least(job: &Job) -> Job {
    let inputs = Keeping { extent: Extent::Inputs, on_host: job.chip.is_some() };
    let mut job = keeping(job, Activations::new(inputs, usize::MAX, inputs));
    job.settings.feed_forward_rows = in_parts(&job).pop().and_then(|job| job.settings.feed_forward_rows);
    job
}

/// A change that makes a step take less, and the options that ask for it; `None` where it changes nothing.
type Change = fn(&mut Job) -> Option<String>;

/// Those that a user may make, what costs least first.
const CHANGES: [Change; 6] = [
    |job| {
        *job = least(job);
        let rows = job.settings.feed_forward_rows.map_or(String::new(), |rows| format!(" --feed-forward-rows {rows}"));
        Some(format!("--activations {}{rows}", job.settings.activations))
    },
    |job| {
        let pages = job.chip.is_some().then_some(NO_PAGES)?;
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
