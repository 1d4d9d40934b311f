//! What happened to pages when, for pictures.

use std::{ops::Range, time::Instant};

/// What happens to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Its transfer to device memory starts.
    Bring,
    /// Its transfer back starts.
    Evict,
    /// It is used where it is, in device memory.
    Resident,
    /// It is used where it is, in host memory.
    InPlace,
    /// It is streamed: its transfer to a lane starts.
    Stage,
    /// Its transfer back from a lane starts.
    Unstage,
    /// Bytes are stored into it.
    Store,
}

/// Something that happened to pages.
#[derive(Clone, Debug, PartialEq)]
pub struct Moment {
    /// Seconds since the trace began, when the host gave the order.
    pub at: f64,
    /// To which pages.
    pub pages: Range<usize>,
    /// What.
    pub what: What,
}

/// A record of moments.
#[derive(Clone, Debug)]
pub struct Trace {
    begun: Instant,
    /// Pages that were resident at the beginning.
    pub resident: Vec<usize>,
    /// Everything since, in order.
    pub moments: Vec<Moment>,
    /// When sweeps began, in seconds as for moments.
    pub sweeps: Vec<f64>,
}

impl Trace {
    /// A record that begins now, when these pages are resident.
    pub fn new(resident: Vec<usize>) -> Self {
        Trace { begun: Instant::now(), resident, moments: Vec::new(), sweeps: Vec::new() }
    }

    fn now(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    pub(super) fn sweep(&mut self) {
        self.sweeps.push(self.now());
    }

    pub(super) fn push(&mut self, pages: Range<usize>, what: What) {
        let at = self.now();
        // Pages that follow one another and share their fate are one moment.
        if let Some(last) = self.moments.last_mut().filter(|last| last.what == what && last.pages.end == pages.start) {
            last.pages.end = pages.end;
            return;
        }
        self.moments.push(Moment { at, pages, what });
    }
}
