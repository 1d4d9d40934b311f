//! The part of a run that a profiler records.

use super::{Gpu, driver::check};
use crate::Result;
use cudarc::driver::sys;

/// While it lives, a profiler that was told to wait (`ncu --profile-from-start off`) records what is launched; without a
/// profiler it does nothing.
#[derive(Debug)]
pub struct Profiled {
    gpu: &'static Gpu,
}

impl Profiled {
    /// Starts recording, once the compute stream has done what it was given so far.
    pub fn start(gpu: &'static Gpu) -> Result<Self> {
        gpu.synchronize()?;
        // SAFETY: the context is current; the call only turns recording on.
        check("cuProfilerStart", unsafe { sys::cuProfilerStart() })?;
        Ok(Profiled { gpu })
    }
}

impl Drop for Profiled {
    fn drop(&mut self) {
        let stopped = self.gpu.synchronize().and_then(|()| {
            // SAFETY: the context is current; the call only turns recording off.
            check("cuProfilerStop", unsafe { sys::cuProfilerStop() })
        });
        self.gpu.record_error(stopped);
    }
}
