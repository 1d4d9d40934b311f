//! Times every operation on the GPU at the sizes of an 8B model, beside the ceilings of the same run.
//!
//! `cargo bench -p nibble-kernels --bench gpu [-- NAME…]`. Prints for each case the median time, bytes and floating-point
//! operations a second, and the share of the copy rate; with `NIBBLE_PEAK_TFLOPS` (what the GPU's best matrix product
//! reaches, measured by you) the share of that too. A NAME is an operation of [`OPERATIONS`], or part of a case's name and
//! shape as printed, with one space between them: `linear "nf4 lora gate up 8192"`. With `NIBBLE_BENCH_PROFILE=1` every case
//! runs once to warm up and once for a profiler to record, and only its name is printed:
//! `ncu --profile-from-start off PROGRAM NAME…`. `NIBBLE_TARGET=sm_80` keeps Hopper from its own kernels. `NIBBLE_BENCH_WARM`
//! is the milliseconds that a case runs for before it counts: some hundred, as the other library's cases do, where large
//! products are compared, whose rate falls as the GPU gets warm.

mod attention;
mod decoding;
mod linear;
mod pointwise;
mod quantize;
mod skinny;

use nibble_kernels::cuda::set_target;
use nibble_runtime::{
    DType, Device, Error, Result, Tag, Tensor,
    cuda::{Gpu, Profiled, Timer},
    rng::{Philox, Stream},
};

/// A copy of this size is far larger than any cache.
const COPIED: usize = 1 << 30;
/// Milliseconds that a case runs for.
const BUDGET: f64 = 120.0;

pub struct Bench {
    gpu: &'static Gpu,
    device: Device,
    /// Bytes a second of a device-to-device copy, read and written.
    copy_rate: f64,
    peak_tflops: Option<f64>,
    /// Each case is shown to a profiler instead of being timed.
    profile: bool,
    /// Milliseconds that a case runs for before it counts.
    warm: f64,
    /// Parts of the cases that run; all do if there are none.
    cases: Vec<String>,
}

impl Bench {
    fn new(cases: Vec<String>) -> Result<Self> {
        let device = Device::Cuda(0);
        let gpu = Gpu::of(device)?;
        let peak_tflops = std::env::var("NIBBLE_PEAK_TFLOPS").ok().and_then(|text| text.parse().ok());
        let profile = std::env::var_os("NIBBLE_BENCH_PROFILE").is_some_and(|value| value != "0");
        let warm = std::env::var("NIBBLE_BENCH_WARM").ok().and_then(|text| text.parse().ok()).unwrap_or(0.0);
        let mut bench = Bench { gpu, device, copy_rate: f64::INFINITY, peak_tflops, profile, warm, cases };
        let source = Tensor::zeros(&[COPIED], DType::U8, device, Tag::Workspace)?;
        let mut target = Tensor::empty(&[COPIED], DType::U8, device, Tag::Workspace)?;
        let milliseconds = bench.median(&mut || target.copy_from(0, &source))?;
        bench.copy_rate = 2.0 * COPIED as f64 / (milliseconds / 1e3);
        println!("{}: copy {:.0} GB/s", gpu.name(), bench.copy_rate / 1e9);
        Ok(bench)
    }

    /// The GPU under test.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The GPU.
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    /// Standard normals on the device.
    pub fn random(&self, shape: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
        // One block of numbers over and over: making billions on the host would take longer than the benchmark.
        let rng = Philox::new(seed, Stream { purpose: 99, step: 0, layer: 0 });
        let block: Vec<f32> = (0..65_537).map(|i| rng.normal(i)).collect();
        let values: Vec<f32> = block.iter().copied().cycle().take(shape.iter().product()).collect();
        Tensor::from_slice(&values, shape, Tag::Workspace)?
            .into_dtype(dtype, Tag::Workspace)?
            .to_device(self.device, Tag::Workspace)
    }

    fn median(&self, run: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        run()?;
        let timer = Timer::start(self.gpu)?;
        run()?;
        let first = timer.milliseconds()?;
        for _ in 0..(self.warm / first.max(1e-3)) as usize {
            run()?;
        }
        // Short ones several at a time: between two events there is the host's time for a launch, too.
        let together = (1.0 / first.max(1e-3)).ceil().clamp(1.0, 50.0);
        let runs = (BUDGET / (together * first.max(1e-3))).clamp(5.0, 50.0) as usize;
        let mut times = Vec::with_capacity(runs);
        for _ in 0..runs {
            let timer = Timer::start(self.gpu)?;
            for _ in 0..together as usize {
                run()?;
            }
            times.push(timer.milliseconds()? / together);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[runs / 2])
    }

    /// Times `run`, which moves at least `bytes` through device memory and does `flops` operations, and prints a line.
    pub fn time(
        &self,
        name: &str,
        shape: &str,
        bytes: usize,
        flops: f64,
        mut run: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let case = format!("{name} {shape}");
        if !self.cases.is_empty() && !self.cases.iter().any(|part| case.contains(part.as_str())) {
            return Ok(());
        }
        if self.profile {
            run()?;
            let _recorded = Profiled::start(self.gpu)?;
            run()?;
            println!("{name:<34} {shape}");
            return Ok(());
        }
        let milliseconds = self.median(&mut run)?;
        let (rate, tflops) = (bytes as f64 / (milliseconds / 1e3), flops / (milliseconds / 1e3) / 1e12);
        let of_peak =
            self.peak_tflops.map_or(String::new(), |peak| format!(" {:4.0} % of peak", 100.0 * tflops / peak));
        println!(
            "{name:<34} {shape:<28} {milliseconds:9.4} ms {:7.0} GB/s {:4.0} % of copy {tflops:7.1} TFLOP/s{of_peak}",
            rate / 1e9,
            100.0 * rate / self.copy_rate
        );
        Ok(())
    }
}

fn main() {
    let names = std::env::args().skip(1).filter(|arg| !arg.starts_with("--"));
    if let Some(target) = std::env::var("NIBBLE_TARGET").ok().and_then(|text| text.parse().ok()) {
        set_target(target);
    }
    let (operations, cases): (Vec<_>, Vec<_>) = names.partition(|name| OPERATIONS.iter().any(|(one, _)| one == name));
    match Bench::new(cases) {
        Ok(bench) => run(&bench, &operations),
        Err(error) => println!("skipped: {error}"),
    }
}

/// The benchmarks of each operation.
type Operation = (&'static str, fn(&Bench) -> Result<()>);

const OPERATIONS: &[Operation] = &[
    ("pointwise", pointwise::run),
    ("linear", linear::run),
    ("attention", attention::run),
    ("quantize", quantize::run),
    ("skinny", skinny::run),
    ("decoding", decoding::run),
];

/// Runs the operations that are named, or all.
fn run(bench: &Bench, named: &[String]) {
    for (name, operation) in OPERATIONS.iter().filter(|(name, _)| named.is_empty() || named.iter().any(|n| n == name)) {
        if let Err::<(), Error>(error) = operation(bench) {
            println!("{name}: {error}");
        }
    }
}
