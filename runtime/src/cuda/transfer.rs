//! What the pages of a GPU share: streams beside the compute stream, and the tickets of what they do.

use super::{Event, Gpu, Stream, driver::check};
use crate::{Error, Result, pager::Ticket};
use cudarc::driver::sys;
use std::collections::VecDeque;

/// Tickets whose events are kept before those that are reached are let go.
const TICKETS: usize = 256;

/// Transfers beside the compute stream, each with a ticket.
pub(super) struct Transfers {
    pub(super) gpu: &'static Gpu,
    /// Events of tickets that may not have been reached, oldest first.
    events: VecDeque<(u64, Event)>,
    next: u64,
}

impl Transfers {
    pub(super) fn new(gpu: &'static Gpu) -> Self {
        Transfers { gpu, events: VecDeque::new(), next: 0 }
    }

    /// Lets `stream` wait for what the compute stream has been given.
    pub(super) fn behind_compute(&self, stream: Stream) -> Result<()> {
        let event = Event::new(self.gpu, false)?;
        event.record(self.gpu.stream())?;
        event.hold(stream)
    }

    /// The ticket of what `stream` has been given so far.
    pub(super) fn ticket(&mut self, stream: Stream) -> Result<Ticket> {
        let event = Event::new(self.gpu, false)?;
        event.record(stream)?;
        self.next += 1;
        self.events.push_back((self.next, event));
        while self.events.len() > TICKETS && self.events.front().map_or(Ok(false), |(_, event)| event.is_reached())? {
            self.events.pop_front();
        }
        Ok(Ticket(self.next))
    }

    /// The event of a ticket; `None` if it has been reached.
    fn event(&self, ticket: Ticket) -> Option<&Event> {
        let at = self.events.binary_search_by_key(&ticket.0, |(number, _)| *number).ok()?;
        self.events.get(at).map(|(_, event)| event)
    }

    /// Lets the compute stream wait for a ticket.
    pub(super) fn join(&self, ticket: Ticket) -> Result<()> {
        self.hold(self.gpu.stream(), ticket)
    }

    /// Lets `stream` wait for a ticket.
    pub(super) fn hold(&self, stream: Stream, ticket: Ticket) -> Result<()> {
        self.event(ticket).map_or(Ok(()), |event| event.hold(stream))
    }

    /// Lets streams wait for what the compute stream has been given, and returns them: see [`PageStore::beside`].
    ///
    /// [`PageStore::beside`]: crate::pager::PageStore::beside
    pub(super) fn beside(&self, streams: [Stream; 2]) -> Result<Option<[Stream; 2]>> {
        streams.iter().try_for_each(|&stream| self.behind_compute(stream))?;
        Ok(Some(streams))
    }

    /// Lets the compute stream wait for what those have been given since.
    pub(super) fn join_beside(&mut self, streams: [Stream; 2]) -> Result<()> {
        streams.into_iter().try_for_each(|stream| {
            let ticket = self.ticket(stream)?;
            self.join(ticket)
        })
    }

    /// Whether a ticket is reached.
    pub(super) fn reached(&self, ticket: Ticket) -> Result<bool> {
        self.event(ticket).map_or(Ok(true), Event::is_reached)
    }

    /// Blocks until a ticket is reached.
    pub(super) fn finish(&self, ticket: Ticket) -> Result<()> {
        self.event(ticket).map_or(Ok(()), Event::wait)
    }

    /// Queues a copy between any two addresses on `stream`.
    ///
    /// # Safety
    /// Both have the bytes until the stream has done it, and nothing else writes them meanwhile.
    pub(super) unsafe fn copy(&self, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: the caller's promise; the stream is live.
        check("cuMemcpyAsync", unsafe { sys::cuMemcpyAsync(to, from, bytes, stream.0) })
    }

    /// Copies `bytes` to an address in the order of the compute stream, and waits.
    ///
    /// # Safety
    /// The address has as many bytes, and what uses them does so in the order of the compute stream.
    pub(super) unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<()> {
        let from = bytes.as_ptr().expose_provenance() as u64;
        // SAFETY: the caller's promise; `bytes` is borrowed until the copy has been waited for.
        unsafe { self.copy(self.gpu.stream(), to, from, bytes.len())? };
        self.gpu.synchronize()
    }

    /// Copies from an address into `bytes` in the order of the compute stream, and waits.
    ///
    /// # Safety
    /// As [`Transfers::write`].
    pub(super) unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        let to = bytes.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: the caller's promise; `bytes` is borrowed until the copy has been waited for.
        unsafe { self.copy(self.gpu.stream(), to, from, bytes.len())? };
        self.gpu.synchronize()
    }
}

/// A GPU's memory is given for pages in whole numbers of these.
pub(super) const GRAIN: usize = 64 << 10;

/// Checks the size of pages of a GPU.
pub(super) fn check_page_bytes(page_bytes: usize) -> Result<()> {
    match page_bytes > 0 && page_bytes.is_multiple_of(GRAIN) {
        true => Ok(()),
        false => Err(Error::invalid("pager", format!("pages of {page_bytes} bytes; expected a multiple of 64 KiB"))),
    }
}
