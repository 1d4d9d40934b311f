//! Marks in a stream: to wait for, and to take the time between.

use super::{Gpu, Stream, driver::check};
use crate::Result;
use cudarc::driver::sys;
use std::sync::atomic::{AtomicBool, Ordering};

/// A mark in a stream of a GPU.
#[derive(Debug)]
pub struct Event {
    gpu: &'static Gpu,
    event: sys::CUevent,
    /// Whether it was found to be reached since it was recorded.
    reached: AtomicBool,
}

// SAFETY: an event handle may be used from any thread; every call binds the context first.
unsafe impl Send for Event {}
// SAFETY: as above; the driver serializes access to an event.
unsafe impl Sync for Event {}

impl Event {
    /// An event that has not been recorded (and so counts as reached).
    ///
    /// # Errors
    /// The driver refuses.
    pub fn new(gpu: &'static Gpu, timing: bool) -> Result<Self> {
        gpu.bind()?;
        let flags =
            if timing { sys::CUevent_flags::CU_EVENT_DEFAULT } else { sys::CUevent_flags::CU_EVENT_DISABLE_TIMING };
        let mut event = std::ptr::null_mut();
        // SAFETY: the context is current and `event` receives the handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, flags as u32) })?;
        Ok(Event { gpu, event, reached: AtomicBool::new(false) })
    }

    /// Puts the mark behind everything that `stream` has been given so far.
    pub fn record(&self, stream: Stream) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: event and stream are live handles of the current context.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.event, stream.0) })?;
        self.reached.store(false, Ordering::Release);
        Ok(())
    }

    /// Whether the stream has passed the mark.
    pub fn is_reached(&self) -> Result<bool> {
        if self.reached.load(Ordering::Acquire) {
            return Ok(true);
        }
        self.gpu.bind()?;
        // SAFETY: the event is a live handle of the current context.
        match unsafe { sys::cuEventQuery(self.event) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            status => {
                check("cuEventQuery", status)?;
                self.reached.store(true, Ordering::Release);
                Ok(true)
            }
        }
    }

    /// Blocks the calling thread until the stream has passed the mark.
    pub fn wait(&self) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: the event is a live handle of the current context.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.event) })
    }

    /// Milliseconds between two marks that are reached, both made with timing.
    pub(super) fn milliseconds_since(&self, earlier: &Event) -> Result<f64> {
        self.gpu.bind()?;
        let mut milliseconds = 0f32;
        // SAFETY: both events are live handles of the current context; the call writes one number, and refuses events
        // that are not reached or have no timing.
        let status = unsafe { sys::cuEventElapsedTime(&mut milliseconds, earlier.event, self.event) };
        check("cuEventElapsedTime", status)?;
        Ok(f64::from(milliseconds))
    }

    /// Makes everything given to `stream` from now on wait for the mark.
    pub fn hold(&self, stream: Stream) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: event and stream are live handles of the current context.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream.0, self.event, 0) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let destroyed = self.gpu.bind().and_then(|()| {
            // SAFETY: the handle is live and not used again.
            check("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(self.event) })
        });
        self.gpu.record_error(destroyed);
    }
}

/// Takes the device's time between two points of the compute stream.
#[derive(Debug)]
pub struct Timer {
    start: Event,
    end: Event,
}

impl Timer {
    /// Starts at what the compute stream has been given so far.
    pub fn start(gpu: &'static Gpu) -> Result<Self> {
        let timer = Timer { start: Event::new(gpu, true)?, end: Event::new(gpu, true)? };
        timer.start.record(gpu.stream())?;
        Ok(timer)
    }

    /// Waits for what the compute stream has been given since [`Timer::start`]; the milliseconds that it took.
    pub fn milliseconds(self) -> Result<f64> {
        self.end.record(self.end.gpu.stream())?;
        self.end.wait()?;
        self.end.milliseconds_since(&self.start)
    }
}
