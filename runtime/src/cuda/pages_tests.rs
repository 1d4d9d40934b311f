//! The pages of a GPU by the traces of the pager's own tests.

use super::{Gpu, PinnedPages, UnifiedPages, device_for_tests};
use crate::pager::{
    PageStore, Pager, Policy,
    tests::{Checked, policy, trace},
};
use proptest::prelude::*;

/// The smallest page that a GPU has.
const PAGE: usize = 64 << 10;

fn gpu() -> Option<&'static Gpu> {
    Some(Gpu::of(device_for_tests()?).unwrap())
}

type Make = fn(&'static Gpu, usize, usize) -> Box<dyn PageStore>;

/// Unified memory where the system has it, and pinned memory.
const STORES: [Make; 2] = [
    |gpu, pages, bytes| Box::new(PinnedPages::new(gpu, pages, bytes).unwrap()),
    |gpu, pages, bytes| Box::new(UnifiedPages::new(gpu, pages, bytes).unwrap()),
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn gpu_pages_hold_their_bytes_wherever_they_are((pages, acts) in trace(), policy in policy(), store in 0usize..2) {
        let Some(gpu) = gpu() else { return Ok(()) };
        Checked::new(STORES[store](gpu, pages, PAGE), policy, false).run(&acts).unwrap();
        gpu.synchronize().unwrap();
    }
}

#[test]
fn gpu_pages_give_memory_back_when_it_is_short() {
    let Some(gpu) = gpu() else { return };
    for store in STORES {
        let pager = Pager::new(store(gpu, 8, PAGE), 8 * PAGE, Policy::InPlace).unwrap();
        pager.settle().unwrap();
        assert_eq!(pager.give_back(3 * PAGE), 3 * PAGE);
        assert_eq!(pager.resident_bytes(), 5 * PAGE, "{}", pager.store_name());
    }
}

#[test]
fn gpu_pages_that_no_host_has_memory_for_say_so() {
    let Some(gpu) = gpu() else { return };
    // More than any host has: the driver refuses at once.
    let pager = Pager::new(Box::new(PinnedPages::new(gpu, 1, 1 << 46).unwrap()), 0, Policy::InPlace).unwrap();
    let error = pager.write(0, 0, &[1]).unwrap_err().to_string();
    assert!(error.contains("of host memory cannot be pinned") && error.contains("--optimizer-bits 8"), "{error}");
}

#[test]
fn gpu_pages_are_multiples_of_64_kib() {
    let Some(gpu) = gpu() else { return };
    assert!(PinnedPages::new(gpu, 1, 1000).is_err() && UnifiedPages::new(gpu, 1, 0).is_err());
}
