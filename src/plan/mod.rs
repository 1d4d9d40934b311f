//! Will it fit? What a training step takes in memory and time, before anything is loaded: [`memory`] by the step's own
//! allocations, [`time`] by measured rates. [`room`] chooses.

mod job;
mod memory;
mod room;
#[cfg(test)]
mod tests;
mod time;

use crate::{
    cli::PlanArgs,
    default_task,
    model::Outline,
    report::bytes,
    settings::{MemoryBudget, Settings, TrainArgs},
    train::source,
};
use anyhow::{Result, bail};
pub use job::Job;
pub use memory::{on_host, peak};
use nibble_models::llama::Activations;
use nibble_runtime::{Device, Tag, cuda::Gpu, memory::Usage};
pub use room::Room;
use room::{Choice, cheaper, keeping, least, remedy};
use std::fmt::Write;

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
    let Some(Choice { job: chosen, usage }) = room.fastest(&job)? else {
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
        options(&chosen, &job),
        bytes(usage.total_peak),
        bytes(room.bytes),
        room.of
    );
    settings.activations = chosen.settings.activations;
    settings.feed_forward_rows = chosen.settings.feed_forward_rows;
    settings.paged_budget = chosen.settings.paged_budget;
    Ok(settings)
}

/// The plan as text.
///
/// # Errors
/// The model cannot be read, or a setting makes no sense.
pub fn table(args: &PlanArgs) -> Result<String> {
    // No data is read.
    let train = TrainArgs { data: Some(std::path::PathBuf::from("any").into()), ..args.train.clone() };
    let mut settings = Settings::resolve(&train, default_task::RECIPE)?;
    let given = args.memory.or(match settings.memory_budget.take() {
        Some(MemoryBudget::Bytes(bytes)) => Some(bytes),
        _ => None,
    });
    let room = Room::find(settings.device, given, true)?;
    let job = job(&settings, &room)?;
    let (c, layers) = (&job.config, job.config.num_layers);
    let mut out = String::new();
    writeln!(
        out,
        "device   {}: {}, {} of it for a step\nmodel    {layers} layers, hidden {}, vocabulary {}, {}; computing in {}\n\
         trains   {:.2}M parameters by {}\n",
        room.name,
        room.of,
        bytes(room.bytes),
        c.hidden_size,
        c.vocab_size,
        if job.quantized.is_some() { "in 4 bits" } else { "not quantized" },
        job.dtype,
        job.trained() as f64 / 1e6,
        settings.method
    )?;

    let fastest = room.fastest(&job)?;
    let tags = Tag::ALL.map(|tag| format!("{:>12}", tag.to_string())).concat();
    writeln!(out, "{} x {} tokens a micro-batch, by what layers keep:", settings.batch_size, settings.seq_len)?;
    writeln!(out, "{:<36}      total{tags}        host      tok/s  fits", "--activations")?;
    for (total, kept, usage, choice) in rows(&job, &fastest)? {
        let tags = usage.peak.map(|peak| format!("{:>12}", bytes(peak))).concat();
        let host = bytes(on_host(&choice));
        writeln!(out, "{kept:<36} {:>10}{tags} {host:>11} {}", bytes(total), verdict(&room, &choice, &usage, &job))?;
    }

    writeln!(out, "\nOther shapes, each at its fastest that fits:\n   batch x seq      total      tok/s  fits")?;
    let (batch, length) = (settings.batch_size, settings.seq_len);
    let mut shapes = vec![(1, length), (batch / 2, length), (batch, length), (2 * batch, length), (4 * batch, length)];
    shapes.extend([(batch, length / 2), (batch, 2 * length), (batch, 4 * length)]);
    shapes.retain(|&(batch, length)| batch > 0 && length > 1);
    shapes.sort_unstable();
    shapes.dedup();
    for (batch, length) in shapes {
        let mut shaped = job.clone();
        (shaped.settings.batch_size, shaped.settings.seq_len) = (batch, length);
        let choice = match room.fastest(&shaped)? {
            Some(choice) => choice,
            None => {
                let job = least(&shaped);
                Choice { usage: peak(&job)?, job }
            }
        };
        let (shape, total) = (format!("{batch} x {length}"), bytes(choice.usage.total_peak));
        let verdict = verdict(&room, &choice.job, &choice.usage, &job);
        writeln!(out, "{shape:>14} {total:>10} {verdict}, {}", kept(&choice.job))?;
    }
    writeln!(out, "\n{}", advice(&job, &room, fastest)?)?;
    writeln!(
        out,
        "tok/s: {}.",
        room.rates(&job).map_or("no rates are known for this device and type", |(_, worth)| worth)
    )?;
    Ok(out)
}

/// Bytes at the peak, what is kept, the peak by tag, and the job.
type Row = (usize, String, Usage, Job);

/// Each thing that all layers may keep, what was asked for and what is fastest, from most memory to least.
fn rows(job: &Job, fastest: &Option<Choice>) -> Result<Vec<Row>> {
    let mut jobs = vec![keeping(job, Activations::default())];
    jobs.extend(cheaper(job).map(|keep| keeping(job, Activations::new(keep, usize::MAX, keep))));
    jobs.extend([least(job), job.clone()]);
    jobs.extend(fastest.iter().map(|choice| choice.job.clone()));
    let row = |job: Job| -> Result<Row> {
        let usage = peak(&job)?;
        Ok((usage.total_peak, kept(&job), usage, job))
    };
    let mut rows = jobs.into_iter().map(row).collect::<Result<Vec<_>>>()?;
    rows.sort_by(|a, b| (b.0, &a.1).cmp(&(a.0, &b.1)));
    rows.dedup_by(|a, b| (a.0, &a.1) == (b.0, &b.1));
    Ok(rows)
}

/// Speed, and whether it fits.
fn verdict(room: &Room, job: &Job, usage: &Usage, asked: &Job) -> String {
    let speed = room.rates(job).map_or("unknown".into(), |(rates, _)| format!("{:.0}", rates.speed(job)));
    let fits = if room.holds(usage) && on_host(job) <= room.host { "yes" } else { "no" };
    format!("{speed:>10}  {fits}{}", pages_away(job, asked).map_or(String::new(), |option| format!(", with {option}")))
}

/// The option for the pages that leave the device for it, where some do.
fn pages_away(job: &Job, asked: &Job) -> Option<String> {
    let budget = job.settings.paged_budget.filter(|_| job.settings.paged_budget != asked.settings.paged_budget)?;
    Some(format!("--paged-budget {budget}"))
}

/// What layers keep, and the rows that feed-forward blocks take at a time.
fn kept(job: &Job) -> String {
    let rows = job.settings.feed_forward_rows.map_or(String::new(), |rows| format!(" --feed-forward-rows {rows}"));
    format!("{}{rows}", job.settings.activations)
}

/// The options of a choice, where they are not those of `asked`.
fn options(chosen: &Job, asked: &Job) -> String {
    let options = [format!("--activations {}", kept(chosen))];
    options.into_iter().chain(pages_away(chosen, asked)).collect::<Vec<_>>().join(" ")
}

/// What to do, in a sentence.
fn advice(job: &Job, room: &Room, fastest: Option<Choice>) -> Result<String> {
    Ok(match fastest {
        Some(Choice { job: chosen, usage }) => {
            format!("Fastest that fits: {}, {} at the peak.", options(&chosen, job), bytes(usage.total_peak))
        }
        None => format!("Nothing fits. What would: {}.", remedy(job, room)?.unwrap_or_else(|| SMALLER.into())),
    })
}
