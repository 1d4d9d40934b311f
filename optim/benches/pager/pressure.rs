//! Memory runs short while all pages are resident: how long it takes to give three quarters of it back, and what the sweep
//! costs in which the pages return.

use crate::{
    case::{Case, PAGE, Paging, Store},
    median,
    workload::Workload,
};
use nibble_optim::StateBits;
use nibble_runtime::{Error, Result, cuda::Gpu, pager::Policy};
use std::time::Instant;

/// Steps before memory runs short.
const STEPS: usize = 5;
/// Pages that have not returned after as many steps will not.
const PATIENCE: usize = 200;

pub const HEADER: &str = "pressure                                 usual ms  give back MiB      ms    GB/s  until return: \
                          steps, ms each  return ms   wall ms";

/// The name, and what to run.
pub fn all() -> Vec<(String, Store, StateBits)> {
    let cases = [StateBits::F32, StateBits::Bits8].into_iter().flat_map(|bits| {
        [Store::Pinned, Store::Unified].map(|store| (format!("pressure/{store}/{bits}-bit"), store, bits))
    });
    cases.collect()
}

/// Twice: the first time pinned pages are given their place in host memory, which they have the second time.
pub fn run(gpu: &'static Gpu, name: &str, store: Store, bits: StateBits) -> Result<()> {
    let paging = Paging { store, policy: Policy::Stream, budget: 100, page_bytes: PAGE, grads: false };
    let mut work = Workload::new(gpu, &Case { bits, paging: Some(paging) })?;
    let Some(state) = work.state.clone() else { return Ok(()) };
    let pager = state.pager();
    for time in ["first", "again"] {
        let mut usual = Vec::new();
        for _ in 0..STEPS {
            usual.push(work.step()?.device);
        }
        let all = pager.resident_bytes();
        let begun = Instant::now();
        let given = pager.give_back(all / 4 * 3);
        let gave = begun.elapsed().as_secs_f64() * 1e3;

        let mut short = Vec::new();
        let returned = loop {
            let took = work.step()?;
            if pager.resident_bytes() >= all {
                break took;
            }
            short.push(took.device);
            if short.len() == PATIENCE {
                return Err(Error::invalid("pressure", format!("no return after {PATIENCE} steps")));
            }
        };
        println!(
            "{:<40} {:8.3} {:14} {gave:7.1} {:7.1} {:21} {:8.3} {:10.3} {:9.3}",
            format!("{name}, {time}"),
            median(&mut usual),
            given >> 20,
            given as f64 / gave / 1e6,
            short.len(),
            if short.is_empty() { 0.0 } else { median(&mut short) },
            returned.device,
            returned.wall
        );
    }
    Ok(())
}
