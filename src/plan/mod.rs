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
    settings::{MemoryBudget, Method, Settings, TrainArgs},
    train::source,
};
use anyhow::{Context, Result, bail};
use job::Job;
use memory::peak;
use nibble_models::files::peft;
use nibble_runtime::{Tag, memory::Usage};
use room::{Choice, Room, recomputing, remedy};
use std::fmt::Write;

/// The job of these settings on the device of `room`.
fn job(settings: &Settings, room: &Room) -> Result<Job> {
    let outline = Outline::read(&source(settings))?;
    let mut settings = settings.clone();
    if let Some(dir) = settings.adapter_init.as_ref().filter(|_| settings.method != Method::Full) {
        let adapter = peft::read_adapter(dir)?;
        let ranks = adapter.tensors.values().filter_map(|(a, _)| a.shape().first().copied());
        settings.rank = ranks.max().context("the adapter has no layers")?;
        let of_adapter = |name: &String| adapter.tensors.keys().any(|module| module.ends_with(name.as_str()));
        settings.targets = nibble_models::llama::TARGETS.map(String::from).into_iter().filter(of_adapter).collect();
    }
    Ok(Job::new(&outline, &settings, room.chip))
}

/// The settings with what `--memory-budget` chooses, said on standard error; as they are where it was not given.
///
/// # Errors
/// Nothing fits.
pub fn within_budget(settings: &Settings) -> Result<Settings> {
    let mut settings = settings.clone();
    let Some(budget) = settings.memory_budget.take() else { return Ok(settings) };
    let given = match budget {
        MemoryBudget::Auto => None,
        MemoryBudget::Bytes(bytes) => Some(bytes),
    };
    let room = Room::find(settings.device, given, false)?;
    let job = job(&settings, &room)?;
    let Some(Choice { job: chosen, usage }) = room.fastest(&job)? else {
        let least = peak(&recomputing(&job, job.config.num_layers))?;
        bail!(
            "--memory-budget {budget}: nothing fits. With all layers recomputed a step takes {}, and there are {} for it \
             ({}). What would fit: {}",
            bytes(least.total_peak),
            bytes(room.bytes),
            room.of,
            remedy(&job, &room)?
        );
    };
    let pages = match (chosen.settings.paged_budget, settings.paged_budget) {
        (Some(now), before) if Some(now) != before => format!(", --paged-budget {now}"),
        _ => String::new(),
    };
    eprintln!(
        "plan     --recompute {}{pages}: {} of {} at the peak ({})",
        chosen.recomputed(),
        bytes(usage.total_peak),
        bytes(room.bytes),
        room.of
    );
    (settings.recompute, settings.paged_budget) = (chosen.settings.recompute, chosen.settings.paged_budget);
    Ok(settings)
}

/// The plan as text.
///
/// # Errors
/// The model cannot be read, or a setting makes no sense.
pub fn table(args: &PlanArgs) -> Result<String> {
    // No data is read.
    let train = TrainArgs { data: Some("any".into()), ..args.train.clone() };
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
    let mut counts = vec![0, layers / 4, layers / 2, 3 * layers / 4, layers, job.recomputed()];
    counts.extend(fastest.iter().map(|choice| choice.job.recomputed()));
    counts.sort_unstable();
    counts.dedup();
    let tags = Tag::ALL.map(|tag| format!("{:>12}", tag.to_string())).concat();
    writeln!(out, "{} x {} tokens a micro-batch, by layers recomputed:", settings.batch_size, settings.seq_len)?;
    writeln!(out, "  layers      total{tags}      tok/s  fits")?;
    for count in counts {
        let job = recomputing(&job, count);
        let usage = peak(&job)?;
        let tags = usage.peak.map(|peak| format!("{:>12}", bytes(peak))).concat();
        writeln!(out, "{count:>8} {:>10}{tags} {}", bytes(usage.total_peak), verdict(&room, &job, &usage))?;
    }

    writeln!(
        out,
        "\nOther shapes, each at its fastest that fits:\n   batch x seq   layers      total      tok/s  fits"
    )?;
    let (batch, length) = (settings.batch_size, settings.seq_len);
    let mut shapes = vec![(1, length), (batch / 2, length), (batch, length), (2 * batch, length), (4 * batch, length)];
    shapes.extend([(batch, length / 2), (batch, 2 * length), (batch, 4 * length)]);
    shapes.retain(|&(batch, length)| batch > 0 && length > 1);
    shapes.sort_unstable();
    shapes.dedup();
    for (batch, length) in shapes {
        let mut job = job.clone();
        (job.settings.batch_size, job.settings.seq_len) = (batch, length);
        let choice = match room.fastest(&job)? {
            Some(choice) => choice,
            None => {
                let job = recomputing(&job, layers);
                Choice { usage: peak(&job)?, job }
            }
        };
        let (shape, count, total) = (format!("{batch} x {length}"), choice.job.recomputed(), choice.usage.total_peak);
        writeln!(out, "{shape:>14} {count:>8} {:>10} {}", bytes(total), verdict(&room, &choice.job, &choice.usage))?;
    }
    writeln!(out, "\n{}", advice(&job, &room, fastest)?)?;
    writeln!(out, "{}", room.rates().map_or("tok/s: no rates are known for this device.", |(_, worth)| worth))?;
    Ok(out)
}

/// Speed, and whether it fits.
fn verdict(room: &Room, job: &Job, usage: &Usage) -> String {
    let speed =
        room.rates().map_or("unknown".into(), |(rates, _)| format!("{:.0}", job.tokens() as f64 / rates.seconds(job)));
    format!("{speed:>10}  {}", if room.holds(usage) { "yes" } else { "no" })
}

/// What to do, in a sentence.
fn advice(job: &Job, room: &Room, fastest: Option<Choice>) -> Result<String> {
    let Some(Choice { job: chosen, usage }) = fastest else {
        return Ok(format!("Nothing fits. What would: {}.", remedy(job, room)?));
    };
    let mut options = match chosen.recomputed() {
        0 => "everything kept (no --recompute)".to_string(),
        layers if layers == job.config.num_layers => "--recompute".into(),
        layers => format!("--recompute {layers}"),
    };
    if let Some(budget) =
        chosen.settings.paged_budget.filter(|_| chosen.settings.paged_budget != job.settings.paged_budget)
    {
        write!(options, " --paged-budget {budget}")?;
    }
    Ok(format!("Fastest that fits: {options}, {} at the peak.", bytes(usage.total_peak)))
}
