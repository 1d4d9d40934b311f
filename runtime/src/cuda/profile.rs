//! Where time goes: the launches of a part of a run with the device's time for each, and what an outside profiler records.

use super::{Event, Gpu, Stream, Work, driver::check, gpu::lock};
use crate::Result;
use cudarc::driver::sys;
use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering::Relaxed},
};

/// A launch whose time was taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The kernel.
    pub kernel: String,
    /// Milliseconds from when recording began to when the device came to it.
    pub start: f64,
    /// Milliseconds that it took.
    pub milliseconds: f64,
    /// Whether it ran beside the compute stream.
    pub beside: bool,
    /// What it had to do.
    pub work: Work,
}

/// The launches that are being recorded.
#[derive(Debug, Default)]
pub(super) struct Recording {
    on: AtomicBool,
    marks: Mutex<Marks>,
}

#[derive(Debug, Default)]
struct Marks {
    /// When recording began.
    begin: Option<Event>,
    launches: Vec<Marked>,
}

/// A launch between two marks.
#[derive(Debug)]
struct Marked {
    kernel: String,
    beside: bool,
    work: Work,
    start: Event,
    end: Event,
}

impl Gpu {
    /// From now on takes the time of every launch, by marks in its stream before and behind it. They cost the device about a
    /// microsecond each; while nothing is recorded a launch costs nothing more.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn record_launches(&'static self) -> Result<()> {
        let begin = Event::new(self, true)?;
        begin.record(self.stream())?;
        *lock(&self.recording.marks) = Marks { begin: Some(begin), launches: Vec::new() };
        self.recording.on.store(true, Relaxed);
        Ok(())
    }

    /// Ends recording and waits for the device; the launches since [`Gpu::record_launches`], in the order of their giving.
    ///
    /// # Errors
    /// A kernel failed.
    pub fn recorded_launches(&self) -> Result<Vec<Launch>> {
        self.recording.on.store(false, Relaxed);
        let Marks { begin, launches } = std::mem::take(&mut *lock(&self.recording.marks));
        self.synchronize_all()?;
        self.report()?;
        let Some(begin) = begin else { return Ok(Vec::new()) };
        let times = |Marked { kernel, beside, work, start, end }| {
            let (start, milliseconds) = (start.milliseconds_since(&begin)?, end.milliseconds_since(&start)?);
            Ok(Launch { kernel, start, milliseconds, beside, work })
        };
        launches.into_iter().map(times).collect()
    }

    /// Whether the times of launches are taken.
    pub(super) fn is_recording(&self) -> bool {
        self.recording.on.load(Relaxed)
    }

    /// A mark in `stream`, if launches are recorded.
    pub(super) fn mark_if_recording(&self, stream: Stream) -> Result<Option<Event>> {
        if !self.is_recording() {
            return Ok(None);
        }
        let mark = Event::new(Gpu::of(self.device())?, true)?;
        mark.record(stream)?;
        Ok(Some(mark))
    }

    /// Records the launch that `stream` has been given since `start`.
    pub(super) fn record(&self, start: Event, stream: Stream, kernel: &str, work: Work) -> Result<()> {
        let end = Event::new(Gpu::of(self.device())?, true)?;
        end.record(stream)?;
        let marked = Marked { kernel: kernel.to_string(), beside: stream != self.stream(), work, start, end };
        lock(&self.recording.marks).launches.push(marked);
        Ok(())
    }
}

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
