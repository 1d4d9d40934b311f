//! Where the time of a step goes: a table by operation, and a trace for Chrome's viewer (Perfetto).
//!
//! An operation is a kernel. Its floating-point operations are those of its products and its bytes those of the tensors that
//! it reads and writes, once each; both are set against what this GPU reaches in a large product and in a large copy,
//! measured beside.

use crate::report::bytes;
use anyhow::{Result, ensure};
use nibble_kernels::{
    linear::{Weight, forward},
    random::normal,
};
use nibble_models::files::atomic::atomic_write;
use nibble_runtime::{
    DType, Device, Tag, Tensor,
    cuda::{Gpu, Launch, Timer, Work},
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fmt::Write as _, path::Path};

/// Whether there can be a profile, if there is to be one: to be asked before a run begins.
///
/// # Errors
/// The device is not a GPU.
pub fn check(path: Option<&Path>, device: Device) -> Result<()> {
    ensure!(
        path.is_none() || device != Device::Cpu,
        "--profile takes the time of a GPU's kernels; this run is on the CPU"
    );
    Ok(())
}

/// Begins to record, if there is to be a profile.
///
/// # Errors
/// The driver refuses.
pub fn begin(path: Option<&Path>, device: Device) -> Result<()> {
    match path {
        Some(_) => Ok(Gpu::of(device)?.record_launches()?),
        None => Ok(()),
    }
}

/// Ends recording, prints the table on standard error, beside what `--json` prints, and writes the trace. A trace that cannot
/// be written is said to be missing.
///
/// # Errors
/// A kernel of the step failed.
pub fn finish(path: Option<&Path>, device: Device, dtype: DType) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let launches = Gpu::of(device)?.recorded_launches()?;
    let ceilings = Ceilings::measure(device, dtype).map_err(|error| eprintln!("no ceilings: {error:#}")).ok();
    eprintln!("{}", table(&launches, ceilings));
    match atomic_write(path, |out| out.write_all(chrome(&launches).to_string().as_bytes())) {
        Ok(()) => eprintln!("trace of the step: {}", path.display()),
        Err(error) => eprintln!("the trace was not written: {error:#}"),
    }
    Ok(())
}

/// What the GPU can do in a second.
#[derive(Clone, Copy, Debug)]
struct Ceilings {
    flops: f64,
    bytes: f64,
}

impl Ceilings {
    /// Elements of a side of the matrices that are multiplied, and bytes that are copied.
    const SIDE: usize = 4096;
    const COPIED: usize = 256 << 20;
    /// The best of so many counts.
    const RUNS: usize = 5;

    fn measure(device: Device, dtype: DType) -> Result<Self> {
        let gpu = Gpu::of(device)?;
        let fastest = |run: &mut dyn FnMut() -> nibble_runtime::Result<()>| -> Result<f64> {
            let mut best = f64::INFINITY;
            for _ in 0..=Self::RUNS {
                let timer = Timer::start(gpu)?;
                run()?;
                best = best.min(timer.milliseconds()? / 1e3);
            }
            Ok(best)
        };
        let matrix = |number| normal(&[Self::SIDE; 2], dtype, device, 1.0, 0, number, Tag::Workspace);
        let (x, weight) = (matrix(0)?, Weight::Dense(matrix(1)?));
        let product = fastest(&mut || forward(&x, &weight, Tag::Workspace).map(drop))?;
        let source = Tensor::zeros(&[Self::COPIED], DType::U8, device, Tag::Workspace)?;
        let mut target = Tensor::empty(&[Self::COPIED], DType::U8, device, Tag::Workspace)?;
        let copy = fastest(&mut || target.copy_from(0, &source))?;
        Ok(Ceilings { flops: 2.0 * (Self::SIDE as f64).powi(3) / product, bytes: 2.0 * Self::COPIED as f64 / copy })
    }

    /// Which part of the time its work would take at the ceilings.
    fn share(&self, work: Work, seconds: f64) -> f64 {
        (work.flops / self.flops).max(work.bytes / self.bytes) / seconds
    }
}

/// The launches of one kernel.
#[derive(Clone, Copy, Default)]
struct Sum {
    calls: usize,
    milliseconds: f64,
    work: Work,
}

impl Sum {
    fn add(&mut self, launch: &Launch) {
        self.calls += 1;
        self.milliseconds += launch.milliseconds;
        self.work.flops += launch.work.flops;
        self.work.bytes += launch.work.bytes;
    }

    /// The columns after the name; `whole` is the sum of all in milliseconds.
    fn row(&self, name: &str, whole: f64, ceilings: Option<Ceilings>) -> String {
        let seconds = (self.milliseconds / 1e3).max(1e-12);
        let rate = |work: f64, unit: f64| match work > 0.0 {
            true => format!("{:.0}", work / seconds / unit),
            false => "-".into(),
        };
        let share = ceilings.map_or("-".into(), |c| format!("{:.0} %", 100.0 * c.share(self.work, seconds)));
        let (tflops, gigabytes) = (rate(self.work.flops, 1e12), rate(self.work.bytes, 1e9));
        let of_all = 100.0 * self.milliseconds / whole.max(1e-12);
        let Sum { calls, milliseconds, .. } = self;
        format!("{name:<36} {calls:>6} {milliseconds:>10.3} {of_all:>6.1} % {tflops:>8} {gigabytes:>8} {share:>11}\n")
    }
}

/// The part of the time from the first launch to the last one's end in which no kernel ran, and all of it; milliseconds.
fn idle(launches: &[Launch]) -> (f64, f64) {
    let mut spans: Vec<(f64, f64)> = launches.iter().map(|l| (l.start, l.start + l.milliseconds)).collect();
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let begin = spans.first().map_or(0.0, |span| span.0);
    let (mut end, mut idle) = (begin, 0.0);
    for (start, stop) in spans {
        idle += (start - end).max(0.0);
        end = stop.max(end);
    }
    (idle, end - begin)
}

/// Kernels by their time, the longest first.
fn table(launches: &[Launch], ceilings: Option<Ceilings>) -> String {
    let (mut kernels, mut all) = (BTreeMap::<&str, Sum>::new(), Sum::default());
    for launch in launches {
        kernels.entry(&launch.kernel).or_default().add(launch);
        all.add(launch);
    }
    let mut kernels: Vec<_> = kernels.into_iter().collect();
    kernels.sort_by(|a, b| b.1.milliseconds.total_cmp(&a.1.milliseconds));
    let mut text = String::new();
    if let Some(Ceilings { flops, bytes }) = ceilings {
        let (tflops, gigabytes) = (flops / 1e12, bytes / 1e9);
        text += &format!("ceilings measured here: {tflops:.0} TFLOP/s in a product, {gigabytes:.0} GB/s in a copy\n");
    }
    let head = ["operation", "calls", "ms", "share", "TFLOP/s", "GB/s", "of ceiling"];
    let [name, calls, ms, share, tflops, gigabytes, ceiling] = head;
    text += &format!("{name:<36} {calls:>6} {ms:>10} {share:>8} {tflops:>8} {gigabytes:>8} {ceiling:>11}\n");
    for (name, sum) in kernels {
        text += &sum.row(name, all.milliseconds, ceilings);
    }
    text += &all.row("all", all.milliseconds, ceilings);
    let (idle, span) = idle(launches);
    // Writing to a string does not fail.
    let _ =
        write!(text, "from the first kernel to the end of the last {span:.3} ms, of which none ran for {idle:.3} ms");
    text
}

/// Launches as events of Chrome's trace viewer: a row a stream. Times are in µs.
fn chrome(launches: &[Launch]) -> Value {
    let rows = ["compute stream", "beside it"].into_iter().enumerate();
    let mut events: Vec<Value> = rows
        .map(|(row, name)| json!({"ph": "M", "pid": 1, "tid": row, "name": "thread_name", "args": {"name": name}}))
        .collect();
    events.extend(launches.iter().map(|launch| {
        let Launch { kernel, start, milliseconds, beside, work } = launch;
        let args = json!({"GFLOP": work.flops / 1e9, "read and written": bytes(work.bytes as usize)});
        json!({
            "ph": "X", "pid": 1, "tid": usize::from(*beside), "name": kernel, "ts": 1e3 * start,
            "dur": 1e3 * milliseconds, "args": args
        })
    }));
    json!({"displayTimeUnit": "ms", "otherData": {"times": "of the device"}, "traceEvents": events})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(kernel: &str, start: f64, milliseconds: f64, flops: f64, bytes: f64) -> Launch {
        let work = Work { flops, bytes };
        Launch { kernel: kernel.into(), start, milliseconds, beside: kernel == "copy", work }
    }

    fn launches() -> Vec<Launch> {
        vec![
            launch("product", 1.0, 2.0, 1e12, 1e9),
            launch("norm", 3.5, 1.0, 0.0, 2e9),
            launch("product", 5.0, 2.0, 1e12, 1e9),
            // Beside the second product.
            launch("copy", 5.5, 1.0, 0.0, 0.0),
        ]
    }

    #[test]
    fn the_table_sums_by_kernel() {
        let text = table(&launches(), Some(Ceilings { flops: 1e15, bytes: 4e12 }));
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[0][3..5], ["1000", "TFLOP/s"]);
        // 2 TFLOP in 4 ms are half of a PFLOP/s; 2 GB in 4 ms are 500 GB/s, an eighth.
        assert_eq!(rows[2], ["product", "2", "4.000", "66.7", "%", "500", "500", "50", "%"]);
        assert_eq!(rows[3][..5], ["copy", "1", "1.000", "16.7", "%"]);
        assert_eq!(rows[4], ["norm", "1", "1.000", "16.7", "%", "-", "2000", "50", "%"]);
        assert_eq!(rows[5][..3], ["all", "4", "6.000"]);
        assert!(text.ends_with("6.000 ms, of which none ran for 1.000 ms"), "{text}");
        assert!(table(&[], None).ends_with("0.000 ms, of which none ran for 0.000 ms"));
    }

    #[test]
    fn the_trace_has_every_launch() {
        let trace = chrome(&launches());
        let events = trace["traceEvents"].as_array().unwrap();
        let spans: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
        assert_eq!(spans.len(), 4);
        assert_eq!((&spans[2]["ts"], &spans[2]["dur"], &spans[2]["tid"]), (&json!(5e3), &json!(2e3), &json!(0)));
        assert_eq!((&spans[3]["name"], &spans[3]["tid"]), (&json!("copy"), &json!(1)));
    }
}
