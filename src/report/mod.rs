//! What a run shows and leaves behind: the progress bar and `metrics.jsonl` here, TensorBoard's events ([`tensorboard`]),
//! pictures ([`curves`]) and a page ([`html`]).

pub mod curves;
pub mod html;
pub mod tensorboard;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use nibble_kernels::cuda::{Target, target};
pub use nibble_runtime::memory::readable as bytes;
use nibble_runtime::{
    Device,
    cuda::Gpu,
    memory::{self, Usage},
};
use serde::{Deserialize, Serialize, Serializer};
use std::{
    fs::{File, TryLockError},
    io::{BufRead, BufReader, IsTerminal, Read, Seek, SeekFrom, Write},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

/// One optimizer step, as a line of `metrics.jsonl`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// From 1.
    pub step: u32,
    /// Mean loss of the labelled tokens of the step.
    pub loss: f64,
    /// Global norm of the gradient, before clipping.
    #[serde(deserialize_with = "number_or_null")]
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Tokens read in the step.
    pub tokens: usize,
    /// Tokens a second in the step.
    pub tok_s: f64,
    /// Of the held-out examples, if they were evaluated after the step: mean negative log-likelihood,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_nll: Option<f64>,
    /// its exponential,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_perplexity: Option<f64>,
    /// and the share that greedy decoding gets right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_exact_match: Option<f64>,
    /// Of questions with a choice of answers: the share whose right answer is the most likely one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_choice_accuracy: Option<f64>,
}

/// JSON has no infinity, which the gradient of a step in f16 may have: it is null there.
fn number_or_null<'de, D: serde::Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::INFINITY))
}

/// Whether only errors and warnings are said.
static QUIET: AtomicBool = AtomicBool::new(false);

/// Says nothing about the work from now on.
pub fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Whether nothing is to be said about the work.
pub fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// A bar over `total` units on a terminal; elsewhere nothing.
pub fn bar(what: &str, total: usize) -> ProgressBar {
    if is_quiet() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total as u64);
    let style = ProgressStyle::with_template("{prefix:>10} {bar:28.cyan/dim} {pos}/{len}  {msg}  eta {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─"));
    bar.set_prefix(what.to_string());
    bar
}

/// A bar over `total` bytes on a terminal; elsewhere nothing.
pub fn bytes_bar(what: &str, total: u64) -> ProgressBar {
    let bar = bar(what, 0);
    bar.set_length(total);
    let style = ProgressStyle::with_template(
        "{prefix:>10} {bar:28.cyan/dim} {bytes}/{total_bytes}  {bytes_per_sec}  eta {eta}",
    );
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─"));
    bar
}

/// The next value of a running mean.
fn smooth(mean: Option<f64>, value: f64) -> f64 {
    mean.map_or(value, |mean| 0.9 * mean + 0.1 * value)
}

/// Keeps other processes from writing the metrics in `dir`, for as long as the file is open. Where files cannot be locked, as
/// on some network disks, nothing does.
fn claim(file: &File, dir: &Path) -> Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => bail!("another process is training in {}", dir.display()),
        _ => Ok(()),
    }
}

/// File of the steps.
const METRICS: &str = "metrics.jsonl";

/// The steps up to `last` in the lines of a file, and the bytes that these lines take.
fn lines(file: impl Read, last: u32) -> std::io::Result<(Vec<StepMetrics>, u64)> {
    let (mut steps, mut kept): (Vec<StepMetrics>, _) = (Vec::new(), 0);
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        // The last line may be torn.
        let metrics = serde_json::from_slice::<StepMetrics>(&line).ok().filter(|_| line.ends_with(b"\n"));
        let Some(metrics) = metrics.filter(|metrics| metrics.step <= last) else { break };
        steps.push(metrics);
        kept += line.len() as u64;
        line.clear();
    }
    Ok((steps, kept))
}

/// The steps so far of the run in `dir`.
///
/// # Errors
/// Its metrics cannot be read.
pub fn read_metrics(dir: &Path) -> Result<Vec<StepMetrics>> {
    let path = dir.join(METRICS);
    let read = File::open(&path).and_then(|file| lines(file, u32::MAX));
    Ok(read.with_context(|| format!("reading {}", path.display()))?.0)
}

/// Steps of a run, as they happen.
pub struct StepLog {
    bar: ProgressBar,
    file: File,
    steps: Vec<StepMetrics>,
    total: u32,
    smoothed: Option<f64>,
    last_line: Instant,
    device: Device,
    events: tensorboard::Events,
}

/// Without a terminal, a line is printed this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

impl StepLog {
    /// Starts `metrics.jsonl` in `dir`, for a model on `device`.
    pub fn create(dir: &Path, total: u32, device: Device) -> Result<Self> {
        let path = dir.join(METRICS);
        let file = File::create_new(&path).with_context(|| format!("creating {}", path.display()))?;
        claim(&file, dir)?;
        StepLog::new(dir, file, Vec::new(), total, device)
    }

    /// Goes on with `metrics.jsonl` in `dir` after step `done`: what follows in the file is cut off.
    ///
    /// # Errors
    /// The file cannot be used, or another process is writing it.
    pub fn resume(dir: &Path, done: u32, total: u32, device: Device) -> Result<Self> {
        let path = dir.join(METRICS);
        let context = || format!("going on with {}", path.display());
        let open = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.with_context(context)?;
        claim(&file, dir)?;
        let (steps, kept) = lines(&file, done).with_context(context)?;
        file.set_len(kept).and_then(|()| file.seek(SeekFrom::End(0))).with_context(context)?;
        if steps.len() != done as usize {
            eprintln!("warning: {} has {} lines of the {done} steps so far", path.display(), steps.len());
        }
        StepLog::new(dir, file, steps, total, device)
    }

    fn new(dir: &Path, file: File, steps: Vec<StepMetrics>, total: u32, device: Device) -> Result<Self> {
        let events = tensorboard::Events::create(dir, &steps).context("writing events for TensorBoard")?;
        let bar = bar("train", total as usize);
        bar.set_position(steps.last().map_or(0, |last| u64::from(last.step)));
        bar.reset_eta();
        let smoothed = steps.iter().fold(None, |mean, step| Some(smooth(mean, step.loss)));
        Ok(StepLog { bar, file, steps, total, smoothed, last_line: Instant::now(), device, events })
    }

    /// Makes the lines so far durable: a checkpoint is not to know of more steps than the file.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().with_context(|| format!("writing {METRICS}"))
    }

    /// Says something beside the bar.
    pub fn say(&self, text: &str) {
        self.bar.suspend(|| crate::note!("{text}"));
    }

    /// Records a step.
    pub fn push(&mut self, metrics: StepMetrics) -> Result<()> {
        let line = serde_json::to_string(&metrics)?;
        // In one piece: a reader sees whole lines, and so does a run that goes on after a full disk.
        self.file.write_all(format!("{line}\n").as_bytes()).with_context(|| format!("writing {METRICS}"))?;
        self.events.push(&metrics).context("writing events for TensorBoard")?;
        let smoothed = smooth(self.smoothed, metrics.loss);
        self.smoothed = Some(smoothed);
        let held = bytes(memory::usage_of(self.device).total);
        let text = format!("loss {smoothed:.4}  {:.0} tok/s  mem {held}", metrics.tok_s);
        self.bar.set_position(u64::from(metrics.step));
        self.bar.set_message(text.clone());
        let last = metrics.step == self.total;
        let due = last || metrics.step == 1 || self.last_line.elapsed() >= LINE_EVERY;
        if due && !std::io::stderr().is_terminal() {
            self.last_line = Instant::now();
            let left = self.bar.eta().as_secs();
            crate::note!("step {}/{}  {text}  {left} s left", metrics.step, self.total);
        }
        self.steps.push(metrics);
        Ok(())
    }

    /// Ends the bar and hands out the steps.
    pub fn finish(self) -> Vec<StepMetrics> {
        self.bar.finish();
        self.steps
    }
}

/// What a run computes on: the GPU's name, or the CPU's threads and, where a GPU was looked for, why there is none.
pub fn device(device: Device, why_cpu: Option<&str>) -> Result<String> {
    if device != Device::Cpu {
        let gpu = Gpu::of(device)?;
        let target = match target() {
            Target::Native => "",
            Target::Sm80 => ", kernels of sm_80",
        };
        return Ok(format!("{device}: {}, {}{target}", gpu.name(), bytes(gpu.total_memory())));
    }
    let why = why_cpu.map_or(String::new(), |reason| format!(" ({reason})"));
    Ok(format!("cpu{why}, {} threads", rayon::current_num_threads()))
}

/// Peak memory by tag and in all, in bytes, for JSON.
pub fn peaks<S: Serializer>(usage: &Usage, serializer: S) -> Result<S::Ok, S::Error> {
    let tags = memory::Tag::ALL.iter().zip(usage.peak).map(|(tag, peak)| (tag.to_string(), peak));
    serializer.collect_map(tags.chain([("total".to_string(), usage.total_peak)]))
}

/// Peak memory by tag, largest first, as one line.
pub fn memory_line(device: Device) -> String {
    let usage = memory::usage_of(device);
    let mut tags: Vec<_> = memory::Tag::ALL.iter().zip(usage.peak).filter(|(_, peak)| *peak > 0).collect();
    tags.sort_by_key(|(_, peak)| std::cmp::Reverse(*peak));
    let parts: Vec<String> = tags.iter().map(|(tag, peak)| format!("{tag} {}", bytes(*peak))).collect();
    let process = memory::process_peak().map_or(String::new(), |peak| format!("; whole process {}", bytes(peak)));
    format!("peak memory {} ({}){process}", bytes(usage.total_peak), parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(step: u32) -> StepMetrics {
        StepMetrics {
            step,
            loss: 2.0,
            grad_norm: 1.0,
            lr: 1e-3,
            tokens: 8,
            tok_s: 4.0,
            eval_nll: None,
            eval_perplexity: None,
            eval_exact_match: None,
            eval_choice_accuracy: None,
        }
    }

    #[test]
    fn steps_go_on_where_they_were_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS);
        let steps =
            [metrics(1), StepMetrics { grad_norm: f64::INFINITY, eval_nll: Some(0.5), ..metrics(2) }, metrics(3)];
        let mut log = StepLog::create(dir.path(), 4, Device::Cpu).unwrap();
        steps.iter().for_each(|&step| log.push(step).unwrap());
        let busy = StepLog::resume(dir.path(), 2, 4, Device::Cpu).err().unwrap();
        assert!(busy.to_string().contains("another process"), "{busy}");
        drop(log);
        let whole = std::fs::read(&path).unwrap();
        // A torn line follows.
        std::fs::write(&path, [&whole[..], br#"{"step":4,"lo"#].concat()).unwrap();
        drop(StepLog::resume(dir.path(), 4, 4, Device::Cpu).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        let mut log = StepLog::resume(dir.path(), 2, 4, Device::Cpu).unwrap();
        assert_eq!(log.steps, steps[..2]);
        log.push(steps[2]).unwrap();
        assert_eq!((log.finish(), std::fs::read(&path).unwrap()), (steps.to_vec(), whole));
    }
}
