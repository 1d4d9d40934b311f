//! Times AdamW updates of 117M parameters in 448 tensors whose state is in pages, beside the ceilings of the same run.
//!
//! `cargo bench -p nibble-optim --bench pager [-- [FILTER] [--svg FILE]]`. FILTER selects cases whose names contain it:
//!
//! ```text
//! unpaged/32-bit                            a tensor or two for each parameter
//! pinned/stream/25%/8-bit                   pages / policy / budget, in percent of the pages / precision of the moments
//! pinned/stream/25%/32-bit/2MiB             other pages than those of 3 MiB
//! pinned/stream/25%/32-bit/gradients        gradients in the pages too; else they are tensors on the device
//! pressure/unified/32-bit                   the second table
//! ```
//! Columns of the first table:
//! - *device ms*, *wall ms*: medians of a whole `AdamW::step`, on the compute stream, and by the host's clock until the
//!   device is done.
//! - *in*, *out*: bytes across the bus a step: those that the pager has copied, and of a page used in place its elements'. *GB/s*: both
//!   directions together, over the device's time.
//! - *bound ms*: what a step takes at the ceilings. Of the state, the share of the pages that is not within the budget has
//!   to be read across the bus, and its moments written: read / in-rate and written / out-rate, by the rates of copies with
//!   both directions busy. Padding does not count, nor that lanes take some of the budget: a step of 25 % is held against
//!   75 % of the state. And an update reads and writes 28 bytes an element (8-bit: 16.1), by the rate of a copy in device
//!   memory. The bound is the largest of the three: the last one only where nothing crosses the bus. *bound/ms* is its
//!   share of the device's time.
//! - *peak*: most bytes of pages in device memory at once. *brought*, *evicted*, *streamed*, *in-place*: pages a step.
//!
//! The second table: *usual ms*, steps with all pages in device memory; *give back*, what `Pager::give_back` freed when asked
//! for three quarters of it, and the host's time until it was free; then how many steps the pages stayed away, and the
//! step in which they came back.
//!
//! Each store is dropped before the next is made: there is never more than 0.95 GB of unified memory.

mod case;
mod measure;
mod picture;
mod pressure;
mod workload;

use measure::{Ceilings, Row};
use nibble_runtime::{Device, Result, cuda::Gpu};
use std::path::PathBuf;

#[derive(Default)]
struct Settings {
    filter: Option<String>,
    svg: Option<PathBuf>,
}

impl Settings {
    fn read(mut args: impl Iterator<Item = String>) -> Self {
        let mut settings = Settings::default();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--svg" => settings.svg = args.next().map(PathBuf::from),
                // cargo passes --bench.
                arg if arg.starts_with("--") => {}
                arg => settings.filter = Some(arg.to_string()),
            }
        }
        settings
    }

    fn selects(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()))
    }
}

/// The median of at least one time.
fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let settings = Settings::read(std::env::args().skip(1));
    match Gpu::of(Device::Cuda(0)) {
        Err(error) => println!("skipped: no CUDA device: {error}"),
        Ok(gpu) => {
            if let Err(error) = run(gpu, &settings) {
                println!("{error}");
            }
        }
    }
}

fn run(gpu: &'static Gpu, settings: &Settings) -> Result<()> {
    let ceilings = Ceilings::measure(gpu)?;
    let Ceilings { bus, device } = ceilings;
    let rate = |rate: f64| format!("{:.1} GB/s", rate / 1e9);
    println!(
        "{}: {} elements in {} tensors of {:?}",
        gpu.name(),
        workload::ELEMENTS,
        workload::TENSORS,
        workload::SHAPE
    );
    println!("copy in device memory             {}, read and written", rate(device));
    println!(
        "pinned host memory to device      {}; with both directions busy {}",
        rate(bus.inward),
        rate(bus.inward_of_both)
    );
    println!(
        "device to pinned host memory      {}; with both directions busy {}",
        rate(bus.outward),
        rate(bus.outward_of_both)
    );

    let rows = table(gpu, &ceilings, settings);
    if let (Some(path), false) = (&settings.svg, rows.is_empty()) {
        let title = format!("AdamW on 117M parameters, state in pages: {}", gpu.name());
        match picture::draw(path, &rows, &title) {
            Ok(()) => println!("picture: {}", path.display()),
            Err(error) => println!("{}: {error}", path.display()),
        }
    }

    let pressure = pressure::all().into_iter().filter(|(name, ..)| settings.selects(name));
    for (i, (name, store, bits)) in pressure.enumerate() {
        if i == 0 {
            println!("\n{}", pressure::HEADER);
        }
        if let Err(error) = pressure::run(gpu, &name, store, bits) {
            println!("{name}: {error}");
        }
    }
    Ok(())
}

/// Measures the cases that are selected, and prints each when it is done.
fn table(gpu: &'static Gpu, ceilings: &Ceilings, settings: &Settings) -> Vec<Row> {
    let mut rows = Vec::new();
    for case in case::all().into_iter().filter(|case| settings.selects(&case.to_string())) {
        if rows.is_empty() {
            println!("\n{}", Row::HEADER);
        }
        match measure::measure(gpu, ceilings, &case) {
            Ok(row) => {
                row.print();
                rows.push(row);
            }
            Err(error) => println!("{case}: {error}"),
        }
    }
    if !rows.is_empty() {
        println!(
            "in, out, GB/s: bytes across the bus by the pager's counters, over the device's time. bound: the largest of what \
             is outside the budget,\nread at {:.1} GB/s, its moments written at {:.1} GB/s (the rates with both directions \
             busy), and all that an update touches at {:.0} GB/s.",
            ceilings.bus.inward_of_both / 1e9,
            ceilings.bus.outward_of_both / 1e9,
            ceilings.device / 1e9
        );
    }
    rows
}
