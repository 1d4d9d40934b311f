//! A case measured: how long a step takes, what crosses the bus, and how long it would take at the ceilings.

use crate::{
    case::Case,
    median,
    workload::{ELEMENTS, Workload},
};
use nibble_runtime::{
    DType, Result, Tag, Tensor,
    cuda::{BusRates, Gpu, Timer},
    pager::Counters,
};
use std::time::{Duration, Instant};

/// Steps before those that are timed: pages get their homes, and the first of them come to the device.
const WARM_UP: usize = 2;
/// A case is timed for this long, if that is enough for [`LEAST`] steps.
const LIMIT: Duration = Duration::from_millis(1500);
const LEAST: usize = 3;
const MOST: usize = 100;
/// Bytes of a copy that measures a ceiling: far larger than any cache, and some milliseconds on the bus.
const COPIED: usize = 256 << 20;

/// What nothing can be faster than, in bytes a second, as measured in this run.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    pub bus: BusRates,
    /// Read and written by a copy in device memory.
    pub device: f64,
}

impl Ceilings {
    pub fn measure(gpu: &'static Gpu) -> Result<Self> {
        let bus = BusRates::measure(gpu, COPIED)?;
        let source = Tensor::zeros(&[4 * COPIED], DType::U8, gpu.device(), Tag::Workspace)?;
        let mut target = source.copy(Tag::Workspace)?;
        let mut times = Vec::new();
        for _ in 0..9 {
            let timer = Timer::start(gpu)?;
            target.copy_from(0, &source)?;
            times.push(timer.milliseconds()?);
        }
        Ok(Ceilings { bus, device: 8.0 * COPIED as f64 / (median(&mut times) / 1e3) })
    }

    /// Milliseconds that a step of the case takes at least, if `away` of its pages (0 to 1) are not in device memory.
    fn bound(&self, case: &Case, away: f64) -> f64 {
        let elements = ELEMENTS as f64;
        let (read, written) = case.page_traffic();
        let inward = away * elements * read / self.bus.inward_of_both;
        let outward = away * elements * written / self.bus.outward_of_both;
        let device = elements * case.traffic() / self.device;
        1e3 * inward.max(outward).max(device)
    }
}

/// A line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    pub steps: usize,
    /// Medians, milliseconds.
    pub device: f64,
    pub wall: f64,
    /// Bytes across the bus a step.
    pub inward: f64,
    pub outward: f64,
    /// Milliseconds at the ceilings.
    pub bound: f64,
    /// Most bytes of pages in device memory at once.
    pub peak: usize,
    /// Pages a step: brought, evicted, streamed, used in place.
    pub pages: [f64; 4],
}

/// Pages of each kind since `before`.
fn since(before: Counters, after: Counters) -> [u64; 4] {
    [
        after.brought - before.brought,
        after.evicted - before.evicted,
        after.streamed - before.streamed,
        after.in_place - before.in_place,
    ]
}

pub fn measure(gpu: &'static Gpu, ceilings: &Ceilings, case: &Case) -> Result<Row> {
    let mut work = Workload::new(gpu, case)?;
    for _ in 0..WARM_UP {
        work.step()?;
    }
    let counters = |work: &Workload| work.state.as_ref().map(|state| state.pager().counters()).unwrap_or_default();
    let (before, begun) = (counters(&work), Instant::now());
    let (mut device, mut wall) = (Vec::new(), Vec::new());
    while device.len() < LEAST || (begun.elapsed() < LIMIT && device.len() < MOST) {
        let took = work.step()?;
        device.push(took.device);
        wall.push(took.wall);
    }
    let after = counters(&work);
    let pages = since(before, after).map(|pages| pages as f64 / device.len() as f64);

    let (mut inward, mut outward, mut away, mut peak) = (0.0, 0.0, 0.0, 0);
    if let Some(state) = &work.state {
        let (pager, count, [.., in_place]) = (state.pager(), state.pager().pages() as f64, pages);
        let (read, written) = case.page_traffic();
        let steps = device.len() as f64;
        // In place what is in a page counts.
        let elements = in_place * ELEMENTS as f64 / count;
        inward = (after.inward - before.inward) as f64 / steps + elements * read;
        outward = (after.outward - before.outward) as f64 / steps + elements * written;
        away = 1.0 - (pager.budget() / pager.page_bytes()) as f64 / count;
        peak = after.resident_peak as usize * pager.page_bytes();
    }
    Ok(Row {
        name: case.to_string(),
        steps: device.len(),
        device: median(&mut device),
        wall: median(&mut wall),
        inward,
        outward,
        bound: ceilings.bound(case, away),
        peak,
        pages,
    })
}

impl Row {
    pub const HEADER: &str = "case                                     device ms  wall ms   in MB  out MB   GB/s  bound ms \
                              bound/ms  peak MiB  brought evicted streamed in-place  steps";

    pub fn print(&self) {
        let Row { name, steps, device, wall, inward, outward, bound, peak, pages, .. } = self;
        let [brought, evicted, streamed, in_place] = pages;
        println!(
            "{name:<40} {device:9.3} {wall:8.3} {:7.1} {:7.1} {:6.1} {bound:9.3} {:6.0} %  {:8} {brought:8.1} \
             {evicted:7.1} {streamed:8.1} {in_place:8.1} {steps:6}",
            inward / 1e6,
            outward / 1e6,
            (inward + outward) / device / 1e6,
            100.0 * bound / device,
            peak >> 20
        );
    }
}
