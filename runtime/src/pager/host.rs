//! Pages for a device that computes in host memory: the CPU. Its "device memory" is other host memory, so nothing is
//! gained by it; it is the reference for the stores of a GPU, and the ground on which the pager is tested.
//!
//! A transfer happens as late as it may, when it is joined or its page is used by another call, and what it leaves behind
//! is filled with 0xFF (a NaN in every float type), as is what it has not filled yet. Whoever uses a page in the wrong
//! place or too early sees it.

use super::store::{PageStore, Refusal, Ticket};
use crate::{Device, Error, Result, Tag, memory::Buffer};
use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

/// Which call of the store is made to fail: for tests of what follows.
pub type Faults = Arc<Mutex<dyn FnMut(&'static str) -> Option<Refusal> + Send>>;

/// A transfer that has not happened yet.
struct Pending {
    from: u64,
    to: u64,
    bytes: usize,
    /// Memory to give up when it has happened.
    frame: Option<Buffer>,
}

/// See the [module](self).
pub struct HostPages {
    page_bytes: usize,
    homes: Vec<Buffer>,
    frames: BTreeMap<usize, Buffer>,
    lanes: Vec<Buffer>,
    pending: BTreeMap<u64, Pending>,
    next: u64,
    /// Pages that may have device memory at once, for tests of running out.
    most: usize,
    faults: Option<Faults>,
}

impl fmt::Debug for HostPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostPages({} of {} bytes)", self.homes.len(), self.page_bytes)
    }
}

/// Lanes to stream pages on.
const LANES: usize = 4;

fn address(buffer: &mut Buffer) -> u64 {
    buffer.bytes_mut().as_mut_ptr().expose_provenance() as u64
}

/// Copies between two of the store's buffers, or a buffer and a tensor.
fn copy(from: u64, to: u64, bytes: usize) {
    let at = |address: u64| std::ptr::with_exposed_provenance_mut::<u8>(address as usize);
    // SAFETY: callers pass addresses of live buffers with at least `bytes` bytes, which do not overlap; no slice of them
    // is held: pages move only while nobody leases them, and a stored tensor is borrowed by the caller.
    unsafe { at(to).copy_from_nonoverlapping(at(from), bytes) };
}

/// Fills memory as [`copy`] would.
fn poison(to: u64, bytes: usize) {
    // SAFETY: as in `copy`.
    unsafe { std::ptr::with_exposed_provenance_mut::<u8>(to as usize).write_bytes(0xFF, bytes) };
}

impl HostPages {
    /// Pages of zeros.
    ///
    /// # Errors
    /// `page_bytes` is not a multiple of 64.
    pub fn new(pages: usize, page_bytes: usize) -> Result<Self> {
        if page_bytes == 0 || !page_bytes.is_multiple_of(64) {
            return Err(Error::invalid("pager", format!("pages of {page_bytes} bytes; expected a multiple of 64")));
        }
        let home = || {
            let mut home = Buffer::new(page_bytes, Tag::Optimizer);
            home.bytes_mut().fill(0);
            home
        };
        let homes = (0..pages).map(|_| home()).collect();
        let (frames, lanes, pending) = (BTreeMap::new(), Vec::new(), BTreeMap::new());
        Ok(HostPages { page_bytes, homes, frames, lanes, pending, next: 0, most: usize::MAX, faults: None })
    }

    /// As if device memory ended at `most` pages.
    pub fn with_memory_for(self, most: usize) -> Self {
        HostPages { most, ..self }
    }

    /// Asks `faults` before every call, by its name, whether it fails.
    pub fn with_faults(self, faults: Faults) -> Self {
        HostPages { faults: Some(faults), ..self }
    }

    fn call(&mut self, name: &'static str) -> std::result::Result<(), Refusal> {
        let Some(faults) = &self.faults else { return Ok(()) };
        (faults.lock().unwrap_or_else(PoisonError::into_inner))(name).map_or(Ok(()), Err)
    }

    /// As [`HostPages::call`], where every failure is final.
    fn must(&mut self, name: &'static str) -> Result<()> {
        self.call(name).map_err(|refusal| match refusal {
            Refusal::NoMemory => Error::invalid("pager", format!("{name}: no memory")),
            Refusal::Transfer(error) | Refusal::Lost(error) => error,
        })
    }

    fn begin(&mut self, pending: Pending) -> Ticket {
        self.next += 1;
        self.pending.insert(self.next, pending);
        Ticket(self.next)
    }

    /// Does the transfers up to a ticket's.
    fn catch_up(&mut self, ticket: u64) {
        while let Some(first) = self.pending.first_entry().filter(|first| *first.key() <= ticket) {
            let Pending { from, to, bytes, frame } = first.remove();
            copy(from, to, bytes);
            poison(from, bytes);
            drop(frame);
        }
    }
}

impl PageStore for HostPages {
    fn name(&self) -> &'static str {
        "host memory"
    }

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    fn pages(&self) -> usize {
        self.homes.len()
    }

    fn address(&mut self, page: usize) -> Result<u64> {
        self.must("address")?;
        Ok(address(self.frames.get_mut(&page).unwrap_or(&mut self.homes[page])))
    }

    fn bring(&mut self, page: usize) -> std::result::Result<Ticket, Refusal> {
        self.call("bring")?;
        if self.frames.len() >= self.most {
            return Err(Refusal::NoMemory);
        }
        let mut frame = Buffer::new(self.page_bytes, Tag::Optimizer);
        let (from, to, bytes) = (address(&mut self.homes[page]), address(&mut frame), self.page_bytes);
        poison(to, bytes);
        self.frames.insert(page, frame);
        Ok(self.begin(Pending { from, to, bytes, frame: None }))
    }

    fn evict(&mut self, page: usize) -> std::result::Result<Ticket, Refusal> {
        self.call("evict")?;
        let Some(mut frame) = self.frames.remove(&page) else {
            return Err(Refusal::Transfer(Error::invalid("pager", format!("page {page} is not resident"))));
        };
        let (from, to, bytes) = (address(&mut frame), address(&mut self.homes[page]), self.page_bytes);
        Ok(self.begin(Pending { from, to, bytes, frame: Some(frame) }))
    }

    fn join(&mut self, ticket: Ticket) -> Result<()> {
        self.must("join")?;
        self.catch_up(ticket.0);
        Ok(())
    }

    fn reached(&mut self, ticket: Ticket) -> Result<bool> {
        self.must("reached")?;
        self.catch_up(ticket.0);
        Ok(true)
    }

    fn finish(&mut self, ticket: Ticket) -> Result<()> {
        self.must("finish")?;
        self.catch_up(ticket.0);
        Ok(())
    }

    fn write(&mut self, page: usize, offset: usize, bytes: &[u8]) -> Result<()> {
        self.must("write")?;
        let place = self.frames.get_mut(&page).unwrap_or(&mut self.homes[page]);
        place.bytes_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn read(&mut self, page: usize, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.must("read")?;
        let place = self.frames.get(&page).unwrap_or(&self.homes[page]);
        bytes.copy_from_slice(&place.bytes()[offset..offset + bytes.len()]);
        Ok(())
    }

    fn store(
        &mut self,
        page: usize,
        offset: usize,
        source: u64,
        bytes: usize,
        after: Option<Ticket>,
    ) -> Result<Ticket> {
        self.must("store")?;
        if let Some(ticket) = after {
            self.catch_up(ticket.0);
        }
        let to = address(self.frames.get_mut(&page).unwrap_or(&mut self.homes[page])) + offset as u64;
        copy(source, to, bytes);
        Ok(Ticket(self.next))
    }

    fn copy(&mut self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.must("copy")?;
        copy(from, to, bytes);
        Ok(())
    }

    fn lanes(&self) -> usize {
        LANES
    }

    fn open_lanes(&mut self, pages: usize) -> std::result::Result<(), Refusal> {
        self.call("open_lanes")?;
        if self.frames.len() + LANES * pages > self.most {
            return Err(Refusal::NoMemory);
        }
        self.lanes = (0..LANES).map(|_| Buffer::new(pages * self.page_bytes, Tag::Optimizer)).collect();
        Ok(())
    }

    fn close_lanes(&mut self) -> Result<()> {
        self.must("close_lanes")?;
        self.catch_up(self.next);
        self.lanes.clear();
        Ok(())
    }

    fn hold(&mut self, ticket: Ticket, _lane: usize) -> Result<()> {
        self.must("hold")?;
        self.catch_up(ticket.0);
        Ok(())
    }

    fn stage(&mut self, pages: Range<usize>, filled: usize, lane: usize) -> Result<u64> {
        self.must("stage")?;
        // The lane's last chunk leaves first: a lane works in order.
        self.catch_up(self.next);
        let base = address(&mut self.lanes[lane]);
        for page in pages.clone() {
            let (from, to) = (address(&mut self.homes[page]), base + ((page - pages.start) * self.page_bytes) as u64);
            poison(to, self.page_bytes);
            copy(from, to, if page + 1 == pages.end { filled } else { self.page_bytes });
        }
        Ok(base)
    }

    fn unstage(&mut self, pages: Range<usize>, clean: usize, filled: usize, lane: usize) -> Result<Ticket> {
        self.must("unstage")?;
        let base = address(&mut self.lanes[lane]);
        let mut ticket = Ticket(self.next);
        for page in pages.clone() {
            let from = base + ((page - pages.start) * self.page_bytes + clean) as u64;
            let to = address(&mut self.homes[page]) + clean as u64;
            let bytes = if page + 1 == pages.end { filled } else { self.page_bytes } - clean;
            poison(to, bytes);
            ticket = self.begin(Pending { from, to, bytes, frame: None });
        }
        Ok(ticket)
    }
}
