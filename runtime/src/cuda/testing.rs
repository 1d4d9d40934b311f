//! The device of tests that need one.

use super::Gpu;
use crate::Device;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The first GPU for a test to run on. Where there is none, says that the test is skipped and how many were, and returns
/// `None`: the test returns then.
///
/// # Panics
/// There is none and the environment says `NIBBLE_REQUIRE_CUDA=1`.
pub fn device_for_tests() -> Option<Device> {
    static SKIPPED: AtomicUsize = AtomicUsize::new(0);
    match Gpu::of(Device::Cuda(0)) {
        Ok(gpu) => Some(gpu.device()),
        Err(error) if std::env::var_os("NIBBLE_REQUIRE_CUDA").is_some_and(|value| value != "0") => {
            panic!("NIBBLE_REQUIRE_CUDA is set, but {error}")
        }
        Err(_) => {
            let skipped = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
            println!("skipped: no CUDA device ({skipped} so far in this program)");
            None
        }
    }
}
