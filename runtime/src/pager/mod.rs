//! The pager: memory in pages, some on the device, the rest in host memory, never more on the device than a budget.
//!
//! A page has its home in host memory. While it is *resident* it is in device memory instead; a page that is not can
//! still be used by the device, *in place*, across the bus, or be *streamed*: copied to a lane, used, and copied back. A
//! [`Policy`] says which. Whoever uses a page holds a [`Lease`] of it, and it does not move meanwhile.
//!
//! An optimizer sweeps over its pages in order, each once. What is best for that is known in advance: the first pages
//! that fit the budget stay resident, and the others are streamed or used in place. (Least recently used, the usual
//! policy, then evicts each page just before it is needed again.) Where memory runs short elsewhere,
//! [`Pager::give_back`] evicts pages from the end, and [`Pager::settle`] brings them back when there has been no such
//! request for a while.
//!
//! The table of pages ([`table`]) is plain code over a [`PageStore`]: unified memory or pinned memory of a GPU
//! ([`crate::cuda`]), or host memory that plays both parts ([`HostPages`]), on which everything is tested.

mod host;
mod lease;
mod store;
mod table;
#[cfg(test)]
pub(crate) mod tests;
mod trace;

pub use host::{Faults, HostPages};
pub use lease::Lease;
pub use store::{PageStore, Refusal, Ticket};
pub use table::{Counters, Policy, kept_bytes};
pub use trace::{Moment, Trace, What};

use crate::{Device, Error, Result, Tensor, cuda::Stream};
use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use table::Table;

/// A table of pages that its users share.
#[derive(Clone)]
pub struct Pager {
    table: Arc<Mutex<Table>>,
    page_bytes: usize,
    pages: usize,
    device: Device,
}

impl std::fmt::Debug for Pager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pager({} pages of {} bytes for {})", self.pages, self.page_bytes, self.device)
    }
}

/// A chunk of pages in a lane's memory, to be used by what is launched on the lane.
#[derive(Debug)]
pub struct Staged {
    /// Which pages.
    pub pages: Range<usize>,
    /// Where.
    pub lane: usize,
    address: u64,
    page_bytes: usize,
    device: Device,
    lease: Arc<Lease>,
}

impl Staged {
    /// A view of a staged page; see [`Lease::tensor`].
    pub fn tensor(&self, page: usize, offset: usize, dtype: crate::DType, shape: &[usize]) -> Result<Tensor> {
        if !self.pages.contains(&page) {
            return Err(Error::invalid("pager", format!("page {page} is not staged; {:?} are", self.pages)));
        }
        let start = (page - self.pages.start) * self.page_bytes + offset;
        Lease::view(&self.lease, self.device, self.address, start, dtype, shape)
    }
}

impl Pager {
    /// Manages the pages of `store`, of which at most `budget` bytes may be in device memory, by `policy` or what the store
    /// has for it: [`Pager::policy`].
    ///
    /// # Errors
    /// The budget is above 0 and below one page.
    pub fn new(store: Box<dyn PageStore>, budget: usize, policy: Policy) -> Result<Self> {
        let (page_bytes, pages, device) = (store.page_bytes(), store.pages(), store.device());
        let table = Table::new(store, policy);
        let pager = Pager { table: Arc::new(Mutex::new(table)), page_bytes, pages, device };
        pager.set_budget(budget)?;
        Ok(pager)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // The table is in order between any two statements that can panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who computes on the pages.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// What the pages are made of, for reports.
    pub fn store_name(&self) -> &'static str {
        self.lock().store_name()
    }

    /// Lets at most `bytes` of pages be in device memory from now on, and evicts what is over it.
    ///
    /// # Errors
    /// It is above 0 and below one page, or the device is lost.
    pub fn set_budget(&self, bytes: usize) -> Result<()> {
        if bytes > 0 && bytes < self.page_bytes {
            let (bytes, page) = (crate::memory::readable(bytes), crate::memory::readable(self.page_bytes));
            let what = format!("a budget of {bytes} is below one page of {page}: give 0, or {page} or more");
            return Err(Error::invalid("pager", what));
        }
        self.lock().set_cap(bytes / self.page_bytes)
    }

    /// How pages that are not resident are used.
    pub fn policy(&self) -> Policy {
        self.lock().policy()
    }

    /// Bytes that may be in device memory now: the budget, less what was given back.
    pub fn budget(&self) -> usize {
        self.lock().allowed() * self.page_bytes
    }

    /// Bytes of pages in device memory.
    pub fn resident_bytes(&self) -> usize {
        self.lock().resident() * self.page_bytes
    }

    /// Whether a page is resident. One in a lane's memory is not.
    pub fn is_resident(&self, page: usize) -> bool {
        self.lock().is_resident(page)
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        self.lock().counters()
    }

    /// Begins a sweep: brings pages, the first of the order first, until the budget is full. Does not wait.
    ///
    /// # Errors
    /// The device is lost.
    pub fn settle(&self) -> Result<()> {
        self.lock().settle()
    }

    /// Evicts pages that nobody uses, the last of the order first, until `bytes` are free or none is left, and lets fewer
    /// be resident from now on. Returns how many bytes became free. May be called by an allocator at any time, also while
    /// the pager itself is allocating: then nothing is given back.
    pub fn give_back(&self, bytes: usize) -> usize {
        let pages = bytes.div_ceil(self.page_bytes);
        match self.table.try_lock() {
            Ok(mut table) => table.give_back(pages) * self.page_bytes,
            Err(std::sync::TryLockError::Poisoned(table)) => table.into_inner().give_back(pages) * self.page_bytes,
            Err(std::sync::TryLockError::WouldBlock) => 0,
        }
    }

    /// The page, for use by the compute stream until the lease and all of its views are dropped. By the policy it is
    /// brought first or used where it is.
    ///
    /// # Errors
    /// It is leased already, or the device is lost.
    pub fn lease(&self, page: usize) -> Result<Arc<Lease>> {
        let (address, bytes) = self.lock().pin(page)?;
        Ok(Arc::new(Lease::new(self.clone(), page..page + 1, address, bytes, self.device)))
    }

    /// Lets only the first `bytes` bytes of a page hold anything from now on: the others are lost, cannot be used and are not
    /// streamed.
    ///
    /// # Errors
    /// A page has fewer, it is leased, or the device is lost.
    pub fn fill(&self, page: usize, bytes: usize) -> Result<()> {
        if bytes > self.page_bytes {
            return Err(Error::invalid("pager", format!("{bytes} bytes of a page of {}", self.page_bytes)));
        }
        self.lock().fill(page, bytes)
    }

    /// Copies a tensor's bytes into a page that nobody leases, at `offset`. On a GPU the host does not wait, and where
    /// the page is in host memory neither does the compute stream.
    ///
    /// # Errors
    /// The bytes do not fit, the tensor is elsewhere than the device, the page is leased, or the device is lost.
    pub fn store(&self, page: usize, offset: usize, source: &Tensor) -> Result<()> {
        self.check(page, offset, source.size_bytes())?;
        self.lock().store(page, offset, source)
    }

    /// Copies `bytes` into a page that nobody leases.
    ///
    /// # Errors
    /// The bytes do not fit, the page is leased, or the device is lost.
    pub fn write(&self, page: usize, offset: usize, bytes: &[u8]) -> Result<()> {
        self.check(page, offset, bytes.len())?;
        self.lock().write(page, offset, bytes)
    }

    /// Copies out of a page that nobody leases, waiting for the device.
    ///
    /// # Errors
    /// The bytes are not there, the page is leased, or the device is lost.
    pub fn read(&self, page: usize, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.check(page, offset, bytes.len())?;
        self.lock().read(page, offset, bytes)
    }

    fn check(&self, page: usize, offset: usize, bytes: usize) -> Result<()> {
        let filled = self.lock().filled(page);
        if page >= self.pages || offset.checked_add(bytes).is_none_or(|end| end > filled) {
            let what =
                format!("bytes {offset}..+{bytes} of page {page}, which has {filled}; there are {} pages", self.pages);
            return Err(Error::invalid("pager", what));
        }
        Ok(())
    }

    /// Pages that a chunk may have if those in host memory are to be streamed in this sweep, on how many lanes. `None` if
    /// they are used in place: by the policy, the budget or the store.
    ///
    /// # Errors
    /// The device is lost.
    pub fn open_lanes(&self) -> Result<Option<(usize, usize)>> {
        self.lock().open_lanes()
    }

    /// Ends a sweep. The lanes go on with what they were given; who uses a page afterwards waits for it, and what was
    /// launched on a lane says itself when its results may be used ([`Tensor::use_after`]).
    pub fn leave_lanes(&self) {
        self.lock().leave_lanes();
    }

    /// Lets everything given to the compute stream from now on come after what the lanes do.
    ///
    /// # Errors
    /// The device is lost.
    pub fn join_lanes(&self) -> Result<()> {
        self.lock().join_lanes()
    }

    /// Two streams on which pages in host memory can be used, beside one another: they come behind what the compute stream has
    /// been given so far, and all that has moved pages there. To be joined by [`Pager::join_beside`]. `None` where using
    /// pages moves them, and where work runs on the host.
    ///
    /// # Errors
    /// The device is lost.
    pub fn beside(&self) -> Result<Option<[Stream; 2]>> {
        self.lock().beside()
    }

    /// Lets everything given to the compute stream from now on come after what the streams of [`Pager::beside`] do.
    ///
    /// # Errors
    /// The device is lost.
    pub fn join_beside(&self) -> Result<()> {
        self.lock().join_beside()
    }

    /// The lane that holds just these pages since the last sweep. A sweep that begins with them need not move them.
    pub fn holder(&self, pages: &Range<usize>) -> Option<usize> {
        self.lock().holder(pages)
    }

    /// Copies pages, which are not resident and leased by nobody, to a lane, unless it holds them. What else it holds is put
    /// back.
    ///
    /// # Errors
    /// There is no such lane, its pages are in use, a page is resident or leased, or the device is lost.
    pub fn stage(&self, pages: Range<usize>, lane: usize) -> Result<Staged> {
        let (address, bytes) = self.lock().stage(pages.clone(), lane)?;
        let lease = Arc::new(Lease::new(self.clone(), pages.clone(), address, bytes, self.device));
        Ok(Staged { pages, lane, address, page_bytes: self.page_bytes, device: self.device, lease })
    }

    /// Copies staged pages back, behind what was launched on the lane, which has left the bytes before `clean` of each as
    /// they were.
    ///
    /// # Errors
    /// The device is lost.
    pub fn unstage(&self, staged: Staged, clean: usize) -> Result<()> {
        let Staged { pages, lane, lease, .. } = staged;
        drop(lease);
        self.lock().unstage(pages, clean, lane)
    }

    /// As [`Pager::unstage`], but the pages stay in the lane's memory until that, or one of them, is needed.
    ///
    /// # Errors
    /// The device is lost.
    pub fn hold(&self, staged: Staged, clean: usize) -> Result<()> {
        let Staged { pages, lane, lease, .. } = staged;
        drop(lease);
        self.lock().hold(pages, clean, lane)
    }

    /// The stream of a lane; `None` where work runs on the host.
    pub fn lane(&self, lane: usize) -> Option<Stream> {
        self.lock().lane(lane)
    }

    /// Keeps a tensor that the lanes use until they are joined: at the next sweep.
    pub fn keep(&self, tensor: Tensor) {
        self.lock().keep(tensor);
    }

    /// Records what happens to pages from now on, or stops and returns what was recorded.
    pub fn trace(&self, on: bool) -> Option<Trace> {
        self.lock().set_trace(on)
    }

    fn unpin(&self, pages: Range<usize>) {
        self.lock().unpin(pages);
    }
}
