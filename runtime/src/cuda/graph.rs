//! Work that is given to the device again and again, as one piece: launches cost the host microseconds each, a graph of
//! hundreds of them not much more than one.

use super::{Gpu, driver::check, launch::waits};
use crate::{Error, Result};
use cudarc::driver::sys;

/// Launches that were recorded once, with their arguments, to be run in the order they were made.
///
/// It holds addresses: whoever records sees to it that the tensors live, and lie where they lay, for as long as it runs.
#[derive(Debug)]
pub struct Graph {
    gpu: &'static Gpu,
    handle: sys::CUgraphExec,
}

// SAFETY: the handle may be used from any thread whose current context is the GPU's; every call binds it.
unsafe impl Send for Graph {}

impl Gpu {
    /// Whether launches can be recorded now. Not while their times are taken ([`Gpu::record_launches`]) or every one of them
    /// is waited for.
    pub fn can_record(&self) -> bool {
        !waits() && !self.is_recording()
    }
}

impl Graph {
    /// Records what `work` gives the compute stream, which runs none of it. It may not allocate, copy from or to the host,
    /// or wait; its kernels have been launched before, so that they are loaded.
    ///
    /// # Errors
    /// That of `work`, or the driver cannot record it.
    pub fn record(gpu: &'static Gpu, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        gpu.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the context is current and the stream is live.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(gpu.stream().0, mode) })?;
        let done = work();
        let mut graph = std::ptr::null_mut();
        // SAFETY: as above; the call writes one handle, null if the capture failed.
        let ended = check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(gpu.stream().0, &mut graph) });
        let mut handle = std::ptr::null_mut();
        let made = done.and(ended).and_then(|()| {
            // SAFETY: the graph was made above; the call writes one handle.
            check("cuGraphInstantiate", unsafe { sys::cuGraphInstantiateWithFlags(&mut handle, graph, 0) })
        });
        if !graph.is_null() {
            // SAFETY: the graph is live, and what was instantiated from it does not need it.
            gpu.record_error(check("cuGraphDestroy", unsafe { sys::cuGraphDestroy(graph) }));
        }
        made.map(|()| Graph { gpu, handle })
    }

    /// Gives the compute stream all of it.
    ///
    /// # Errors
    /// The driver refuses, or an earlier call failed that could not report.
    pub fn launch(&self) -> Result<()> {
        self.gpu.report()?;
        self.gpu.bind()?;
        // SAFETY: the handle lives as long as `self`, and the stream as long as the process.
        let status = unsafe { sys::cuGraphLaunch(self.handle, self.gpu.stream().0) };
        check("cuGraphLaunch", status)
            .map_err(|error| Error::Cuda { op: "launch", what: format!("recorded work: {error}") })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let destroyed = self.gpu.bind().and_then(|()| {
            // SAFETY: nobody uses the handle any more; what runs of it goes on to its end.
            check("cuGraphExecDestroy", unsafe { sys::cuGraphExecDestroy(self.handle) })
        });
        self.gpu.record_error(destroyed);
    }
}
