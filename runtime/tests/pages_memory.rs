//! What pages take of a GPU's memory, as the driver sees it. A program of its own: nothing else allocates meanwhile.

use nibble_runtime::{
    cuda::{Gpu, PinnedPages, UnifiedPages, device_for_tests},
    pager::{PageStore, Pager, Policy},
};

const PAGE: usize = 4 << 20;
const PAGES: usize = 64;
const BUDGET: usize = 16 * PAGE;
/// The allocator backs this much at a time.
const SLACK: usize = 64 << 20;

type Make = fn(&'static Gpu) -> Box<dyn PageStore>;

#[test]
fn gpu_pages_take_no_more_than_their_budget() {
    let Some(device) = device_for_tests() else { return };
    let gpu = Gpu::of(device).unwrap();
    let stores: [Make; 2] = [
        |gpu| Box::new(PinnedPages::new(gpu, PAGES, PAGE).unwrap()),
        |gpu| Box::new(UnifiedPages::new(gpu, PAGES, PAGE).unwrap()),
    ];
    for store in stores {
        for policy in Policy::ALL {
            let pager = Pager::new(store(gpu), BUDGET, policy).unwrap();
            gpu.memory().unwrap().lock().trim().unwrap();
            let before = gpu.free_memory().unwrap();
            // What the driver says after each page, in MiB.
            let mut seen = Vec::new();
            for sweep in 0..3 {
                pager.settle().unwrap();
                for page in 0..PAGES {
                    drop(pager.lease(page).unwrap());
                    device.synchronize().unwrap();
                    let taken = before.saturating_sub(gpu.free_memory().unwrap());
                    seen.push(taken >> 20);
                    let which = (pager.store_name(), policy, sweep, page);
                    assert!(pager.resident_bytes() <= BUDGET, "{which:?}");
                    assert!(taken <= BUDGET + SLACK, "{which:?}: {seen:?}");
                }
            }
            assert!(pager.counters().resident_peak as usize * PAGE <= BUDGET);
        }
    }
}
