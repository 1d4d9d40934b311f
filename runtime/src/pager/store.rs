//! What the pager stands on: pages that have a home in host memory and may be in device memory for a while.

use crate::{Device, Error, Result, cuda::Stream};
use std::ops::Range;

/// A transfer that has been started. Later ones have higher numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub(crate) u64);

/// Why a transfer did not start. The page is where it was, and all of its bytes are.
#[derive(Debug)]
pub enum Refusal {
    /// There is no device memory for the page.
    NoMemory,
    /// The transfer was refused.
    Transfer(Error),
    /// Nothing works any more.
    Lost(Error),
}

/// Pages in two kinds of memory. All work is in the order of the device's compute stream: what it was given before a
/// transfer started still finds the page where it was, and what it is given after [`PageStore::join`] finds it where
/// [`PageStore::address`] says.
///
/// On its home in host memory a page can be used by the device too, in place, across the bus.
pub trait PageStore: Send {
    /// What it is called in reports.
    fn name(&self) -> &'static str;

    /// Who computes on the pages.
    fn device(&self) -> Device;

    /// Bytes of a page.
    fn page_bytes(&self) -> usize;

    /// Number of pages. Fresh ones hold zeros and are in host memory.
    fn pages(&self) -> usize;

    /// Address of the page for the device, where it is now.
    ///
    /// # Errors
    /// It has no memory yet and there is none.
    fn address(&mut self, page: usize) -> Result<u64>;

    /// Starts copying a page to device memory, behind what the compute stream has been given.
    fn bring(&mut self, page: usize) -> std::result::Result<Ticket, Refusal>;

    /// Starts copying a page back and gives up its device memory, behind what the compute stream has been given.
    fn evict(&mut self, page: usize) -> std::result::Result<Ticket, Refusal>;

    /// Whether the device memory of a page that was evicted is free at once. If not, pages that come and go would take more
    /// than those that are resident, and [`super::Policy::Lru`] is not to be had.
    fn frees_evicted(&self) -> bool {
        true
    }

    /// Lets the compute stream wait for a transfer.
    ///
    /// # Errors
    /// The device is lost.
    fn join(&mut self, ticket: Ticket) -> Result<()>;

    /// Whether a transfer is done.
    ///
    /// # Errors
    /// The device is lost.
    fn reached(&mut self, ticket: Ticket) -> Result<bool>;

    /// Blocks until a transfer is done.
    ///
    /// # Errors
    /// The device is lost.
    fn finish(&mut self, ticket: Ticket) -> Result<()>;

    /// Copies `bytes` into a page where it is. They are the caller's again when the call returns.
    fn write(&mut self, page: usize, offset: usize, bytes: &[u8]) -> Result<()>;

    /// Copies out of a page where it is, behind what the compute stream has been given.
    fn read(&mut self, page: usize, offset: usize, bytes: &mut [u8]) -> Result<()>;

    /// Copies `bytes` bytes at a device address into a page in host memory, beside the compute stream and behind what it
    /// has been given and `after`, a transfer of the same page. The source must stay as it is until the transfer is done.
    fn store(&mut self, page: usize, offset: usize, source: u64, bytes: usize, after: Option<Ticket>)
    -> Result<Ticket>;

    /// Copies `bytes` bytes from a device address to another, in the order of the compute stream.
    fn copy(&mut self, _to: u64, _from: u64, _bytes: usize) -> Result<()> {
        Err(Error::invalid("pager", "these pages cannot be streamed"))
    }

    /// Two streams on which pages in host memory can be used, beside one another and behind what the compute stream has been
    /// given so far; `None` where work runs on the host.
    ///
    /// # Errors
    /// The device is lost.
    fn beside(&mut self) -> Result<Option<[Stream; 2]>> {
        Ok(None)
    }

    /// Lets the compute stream wait for what the streams of [`PageStore::beside`] have been given.
    ///
    /// # Errors
    /// The device is lost.
    fn join_beside(&mut self) -> Result<()> {
        Ok(())
    }

    /// Lanes on which pages can be streamed through device memory, side by side; 0 if they cannot.
    fn lanes(&self) -> usize {
        0
    }

    /// Takes `pages` pages of device memory for each lane.
    fn open_lanes(&mut self, _pages: usize) -> std::result::Result<(), Refusal> {
        Err(Refusal::Transfer(Error::invalid("pager", "these pages cannot be streamed")))
    }

    /// Gives the lanes' memory back, behind what the compute stream has been given and all that the lanes do.
    fn close_lanes(&mut self) -> Result<()> {
        Ok(())
    }

    /// Lets what a lane is given from now on come behind what the compute stream has been given.
    ///
    /// # Errors
    /// The device is lost.
    fn follow(&mut self, _lane: usize) -> Result<()> {
        Ok(())
    }

    /// Lets what a lane is given from now on come behind a transfer.
    ///
    /// # Errors
    /// The device is lost.
    fn hold(&mut self, _ticket: Ticket, _lane: usize) -> Result<()> {
        Ok(())
    }

    /// Copies pages, and of the last only `filled` bytes, from host memory to a lane's memory, behind what the lane has been
    /// given; returns the address there. There may be none to copy.
    fn stage(&mut self, _pages: Range<usize>, _filled: usize, _lane: usize) -> Result<u64> {
        Err(Error::invalid("pager", "these pages cannot be streamed"))
    }

    /// Copies the bytes from `clean` on of each staged page back, those of the last up to `filled`, in the order of the lane.
    /// There may be none to copy: then the ticket is that of what the lane has been given.
    fn unstage(&mut self, _pages: Range<usize>, _clean: usize, _filled: usize, _lane: usize) -> Result<Ticket> {
        Err(Error::invalid("pager", "these pages cannot be streamed"))
    }

    /// The lane's stream, on which work is launched between stage and unstage; `None` where work runs on the host.
    fn lane(&self, _lane: usize) -> Option<Stream> {
        None
    }
}
