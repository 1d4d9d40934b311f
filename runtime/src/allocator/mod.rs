//! The allocator of device memory: caching, stream-ordered, coalescing, over one range of addresses.
//!
//! Addresses are reserved once and backed when needed ([`AddressSpace`]), so all memory is one range: free neighbours
//! always merge, and memory that is free in the wrong place is moved, not copied, to where it is needed. A request takes
//! the smallest free block that fits (`blocks.rs`). If there is none, in this order:
//!
//! 1. blocks that another stream freed and is known to be done with,
//! 2. more memory from the device, behind a free block where that saves some,
//! 3. blocks that another stream freed, behind a mark in that stream,
//! 4. free memory moved from elsewhere in the range, once the device is done with it,
//! 5. memory that the reclaim hook gives back ([`Memory`]),
//!
//! and then [`OutOfMemory`] says who holds what. Work of one stream that repeats itself is served from free blocks after
//! its first round. A request served from free blocks looks through these, some dozens; the rest is rare.
//!
//! **Streams.** A freed block belongs to the stream that it was freed on, which may have it again at once: what that
//! stream does with it comes after everything that it did before. Another stream gets it only behind a mark in the
//! owner's stream: reached already, or waited for on the device. Marks are made when another stream is short of memory
//! and not at every free, so a program with one stream makes none. Who uses a block on several streams orders them
//! before freeing it on one.

mod blocks;
mod out_of_memory;
mod shared;
#[cfg(test)]
pub(crate) mod simulated;
mod space;
#[cfg(test)]
pub(crate) mod tests;

pub use out_of_memory::OutOfMemory;
pub use shared::{Memory, Reclaim};
pub use space::{AddressSpace, Events, MapError, StreamId};

use crate::{Device, Error, Result, Tag, memory::Usage};
use blocks::Blocks;
use std::{collections::BTreeMap, ops::ControlFlow};

/// Blocks start at and are multiples of this many bytes: enough for every vector load, bulk copy and tensor map.
pub const ALIGN: usize = 512;

/// Granules backed by one call while there is plenty. A call costs 50 to 75 µs whatever its size, so 32 MiB at a time
/// (granules of 2 MiB) back a GiB in 2 ms; and since a piece can be given back or moved only as a whole, a small block
/// that stays holds up to 32 MiB in place.
const GRANULES_PER_PIECE: usize = 16;
/// But no more than this part of the limit: where that is low, a few small blocks must not hold much of it in place.
const PIECE_SHARE: usize = 128;

/// Memory handed out by an [`Allocator`], which wants it back by [`Allocator::free`].
#[derive(Debug)]
#[must_use = "a block that is dropped is lost"]
pub struct Block {
    offset: usize,
    address: u64,
    bytes: usize,
    tag: Tag,
}

impl Block {
    /// Address of the first byte, a multiple of [`ALIGN`].
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes of the block, a multiple of [`ALIGN`].
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What it is counted under.
    pub fn tag(&self) -> Tag {
        self.tag
    }
}

struct Stream<M> {
    /// Blocks freed on the stream so far.
    frees: u64,
    /// The latest mark that was made, and how many frees it comes after.
    mark: Option<(u64, M)>,
}

impl<M> Default for Stream<M> {
    fn default() -> Self {
        Stream { frees: 0, mark: None }
    }
}

/// Carves the memory of one device; see the [module](self).
pub struct Allocator<S: AddressSpace, E: Events> {
    device: Device,
    space: S,
    events: E,
    blocks: Blocks,
    streams: BTreeMap<StreamId, Stream<E::Mark>>,
    usage: Usage,
    limit: Option<usize>,
    /// Bytes of the device that this program took from elsewhere.
    outside: usize,
    /// How many more allocations succeed before one is made to fail.
    fail_after: Option<u64>,
}

impl<S: AddressSpace, E: Events> Allocator<S, E> {
    /// An allocator over the whole of `space`, for memory of `device` (which reports name).
    pub fn new(device: Device, space: S, events: E) -> Self {
        let blocks = Blocks::new(space.reserved());
        let streams = BTreeMap::new();
        Allocator {
            device,
            space,
            events,
            blocks,
            streams,
            usage: Usage::default(),
            limit: None,
            outside: 0,
            fail_after: None,
        }
    }

    /// At least `bytes` of memory with unspecified contents, for use by `stream`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; or the device reports another failure.
    pub fn allocate(&mut self, bytes: usize, tag: Tag, stream: StreamId) -> Result<Block> {
        if let Some(left) = self.fail_after {
            self.fail_after = left.checked_sub(1);
            if left == 0 {
                return Err(self.out_of_memory(bytes, tag, true));
            }
        }
        self.allocate_quietly(bytes, tag, stream)
    }

    /// [`Allocator::allocate`] without [`Allocator::fail_at`]: for memory that is only taken where there is some.
    pub fn allocate_quietly(&mut self, bytes: usize, tag: Tag, stream: StreamId) -> Result<Block> {
        let size = bytes.max(1).checked_next_multiple_of(ALIGN).filter(|&size| size <= self.space.reserved());
        let Some(size) = size else { return Err(self.out_of_memory(bytes, tag, false)) };
        let Some(offset) = self.find(size, stream)? else {
            // What was gathered in vain goes back, so that the report tells it from what is in use.
            self.release(0)?;
            return Err(self.out_of_memory(bytes, tag, false));
        };
        self.usage.hold(tag, size);
        debug_assert_eq!(self.usage.total + self.blocks.free_bytes(), self.blocks.mapped());
        Ok(Block { offset, address: self.space.base() + offset as u64, bytes: size, tag })
    }

    /// Takes a block back. `stream` is the last that used it, or waits for all that did.
    pub fn free(&mut self, block: Block, stream: StreamId) {
        self.usage.release(block.tag, block.bytes);
        let state = self.streams.entry(stream).or_default();
        state.frees += 1;
        self.blocks.put(block.offset, block.bytes, Some(stream), state.frees);
    }

    /// Counts a block under another tag from now on.
    pub fn set_tag(&mut self, block: &mut Block, tag: Tag) {
        self.usage.retag(block.tag, tag, block.bytes);
        block.tag = tag;
    }

    /// Bytes in use by tag, and bytes that are kept free for reuse. Blocks count as what they take.
    pub fn usage(&self) -> Usage {
        Usage { cached: self.blocks.free_bytes(), ..self.usage }
    }

    /// Sets the peaks to what is in use now.
    pub fn reset_peak(&mut self) {
        self.usage.reset_peak();
    }

    /// Bytes that are backed by device memory: in use and kept free.
    pub fn mapped(&self) -> usize {
        self.blocks.mapped()
    }

    /// Lets at most `limit` bytes be backed from now on: a request beyond finds the device full. Gives free memory back
    /// that is over it.
    ///
    /// # Errors
    /// The device reports a failure.
    pub fn set_limit(&mut self, limit: Option<usize>) -> Result<()> {
        self.limit = limit;
        match limit {
            Some(limit) if limit < self.mapped() => self.release(limit),
            _ => Ok(()),
        }
    }

    /// Makes the `n`-th allocation from now on fail (1 is the next), or none: to test what follows from it.
    pub fn fail_at(&mut self, n: Option<u64>) {
        self.fail_after = n.map(|n| n.saturating_sub(1));
    }

    /// Gives all pieces that nobody uses back to the device, waiting until it is done with them.
    ///
    /// # Errors
    /// The device reports a failure.
    pub fn trim(&mut self) -> Result<()> {
        self.release(0)
    }

    /// Gives free pieces back, highest first, until at most `keep` bytes are backed.
    fn release(&mut self, keep: usize) -> Result<()> {
        self.settle_all()?;
        while self.blocks.mapped() > keep {
            let Some((offset, bytes)) = self.blocks.donor(&(0..0)) else { break };
            self.space.unmap(offset, bytes)?;
            self.blocks.remove_piece(offset);
        }
        Ok(())
    }

    /// Room for a block of `bytes` that `stream` may use; `None` if there is none to be had.
    fn find(&mut self, bytes: usize, stream: StreamId) -> Result<Option<usize>> {
        self.streams.entry(stream).or_default();
        if let Some(offset) = self.blocks.take(stream, bytes) {
            return Ok(Some(offset));
        }
        self.settle_reached(bytes, stream)?;
        if let Some(offset) = self.blocks.take(stream, bytes) {
            return Ok(Some(offset));
        }
        if self.grow(bytes, stream, false)? {
            return Ok(self.blocks.take(stream, bytes));
        }
        if let Some(offset) = self.borrow(bytes, stream)? {
            return Ok(Some(offset));
        }
        self.settle_all()?;
        if let Some(offset) = self.blocks.take(stream, bytes) {
            return Ok(Some(offset));
        }
        if self.grow(bytes, stream, true)? {
            return Ok(self.blocks.take(stream, bytes));
        }
        // What was moved may have been free beside the very place, which this leaves out of account.
        self.release(0)?;
        if self.grow(bytes, stream, false)? {
            return Ok(self.blocks.take(stream, bytes));
        }
        Ok(None)
    }

    /// The streams other than `stream` that own free blocks.
    fn others(&self, stream: StreamId) -> Vec<StreamId> {
        self.streams.keys().copied().filter(|&other| other != stream && self.blocks.owns(other)).collect()
    }

    /// Makes anyone's what other streams are done with. Marks those that could have helped, to be looked at next time.
    fn settle_reached(&mut self, bytes: usize, stream: StreamId) -> Result<()> {
        for other in self.others(stream) {
            let helps = self.blocks.fits(Some(other), bytes);
            let Some(state) = self.streams.get_mut(&other) else { continue };
            match &state.mark {
                Some((frees, mark)) if self.events.done(mark)? => {
                    self.blocks.settle(other, *frees);
                    state.mark = None;
                }
                None if helps => state.mark = Some((state.frees, self.events.mark(other)?)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits until the device is done with all free blocks, and makes them anyone's.
    fn settle_all(&mut self) -> Result<()> {
        for (&stream, state) in &mut self.streams {
            if self.blocks.owns(stream) {
                let mark = self.events.mark(stream)?;
                self.events.synchronize(&mark)?;
                self.blocks.settle(stream, u64::MAX);
                state.mark = None;
            }
        }
        Ok(())
    }

    /// Takes a block that another stream freed, after letting `stream` wait for it on the device.
    fn borrow(&mut self, bytes: usize, stream: StreamId) -> Result<Option<usize>> {
        let others = self.others(stream);
        for &other in &others {
            if self.blocks.fits(Some(other), bytes) {
                let mark = self.events.mark(other)?;
                self.events.wait(stream, &mark)?;
                return Ok(self.blocks.take_from(other, bytes));
            }
        }
        // No stream has one, but together they may.
        for other in others {
            let mark = self.events.mark(other)?;
            self.events.wait(stream, &mark)?;
            // Counted as a free, so that marks of `stream` from before the wait do not cover these blocks.
            let state = self.streams.entry(stream).or_default();
            state.frees += 1;
            self.blocks.adopt(other, stream, state.frees);
        }
        Ok(self.blocks.take(stream, bytes))
    }

    /// Backs more of the range until `stream` has a free block of `bytes`: by new memory, and where `moving`, by that of
    /// free pieces elsewhere. False if that is not enough.
    fn grow(&mut self, bytes: usize, stream: StreamId, moving: bool) -> Result<bool> {
        let Some(place) = self.blocks.place(stream, bytes, self.space.granule()) else { return Ok(false) };
        let (mut at, mut need) = (place.at, place.need);
        if !moving && need > self.allowed() {
            return Ok(false);
        }
        loop {
            if let ControlFlow::Break(()) = self.fill(&mut at, &mut need, stream)? {
                return Ok(true);
            }
            // The device has no more. Pieces that fit are moved; one that is too large makes room for a new one.
            loop {
                let donor = if moving { self.blocks.donor(&place.span) } else { None };
                let Some((from, piece)) = donor else { return Ok(false) };
                if piece > self.blocks.room(at) {
                    self.space.unmap(from, piece)?;
                    self.blocks.remove_piece(from);
                    break;
                }
                let moved = self.space.remap(from, at, piece);
                self.blocks.remove_piece(from);
                match moved {
                    Ok(()) => self.blocks.add_piece(at, piece, stream),
                    Err(MapError::OutOfMemory) => break,
                    Err(MapError::Other(error)) => return Err(error),
                }
                (at, need) = (at + piece, need.saturating_sub(piece));
                if need == 0 {
                    return Ok(true);
                }
            }
        }
    }

    /// Bytes that the limit lets be backed yet.
    fn allowed(&self) -> usize {
        self.limit.map_or(usize::MAX, |limit| limit.saturating_sub(self.blocks.mapped() + self.outside))
    }

    /// Counts `bytes` of the device's memory that were taken from elsewhere against the limit, and gives back free memory
    /// that is over it. False, with nothing changed, where the limit does not allow it.
    ///
    /// # Errors
    /// The device reports a failure.
    pub fn take_outside(&mut self, bytes: usize) -> Result<bool> {
        if let Some(limit) = self.limit {
            let Some(rest) = limit.checked_sub(self.outside + bytes) else { return Ok(false) };
            if self.blocks.mapped() > rest {
                self.release(rest)?;
            }
            if self.blocks.mapped() > rest {
                return Ok(false);
            }
        }
        self.outside += bytes;
        Ok(true)
    }

    /// Takes back what [`Allocator::take_outside`] counted.
    pub fn return_outside(&mut self, bytes: usize) {
        self.outside = self.outside.saturating_sub(bytes);
    }

    /// Backs `need` bytes or somewhat more from `at` on by new memory, advancing both. Breaks when all are backed.
    fn fill(&mut self, at: &mut usize, need: &mut usize, stream: StreamId) -> Result<ControlFlow<()>> {
        let granule = self.space.granule();
        let share = self.limit.map_or(usize::MAX, |limit| (limit / PIECE_SHARE / granule).max(1));
        let mut size = granule * GRANULES_PER_PIECE.min(share);
        while *need > 0 {
            let size_now = size.min(self.blocks.room(*at)).min(self.allowed() / granule * granule);
            if size_now == 0 {
                return Ok(ControlFlow::Continue(()));
            }
            match self.space.map(*at, size_now) {
                Ok(()) => {
                    self.blocks.add_piece(*at, size_now, stream);
                    (*at, *need) = (*at + size_now, need.saturating_sub(size_now));
                }
                // Near the end: no more than needed, then what can be had.
                Err(MapError::OutOfMemory) if size_now > *need => size = *need,
                Err(MapError::OutOfMemory) => size = size_now / 2 / granule * granule,
                Err(MapError::Other(error)) => return Err(error),
            }
        }
        Ok(ControlFlow::Break(()))
    }

    /// Panics unless the books are in order, with `live` all the blocks that are handed out.
    #[cfg(test)]
    pub(crate) fn check<'a>(&self, live: impl Iterator<Item = &'a Block>) {
        let used: Vec<_> = live.map(|block| block.offset..block.offset + block.bytes).collect();
        self.blocks.check(self.space.reserved(), &used);
        assert_eq!(self.usage.total + self.blocks.free_bytes(), self.blocks.mapped());
    }

    fn out_of_memory(&self, requested: usize, tag: Tag, injected: bool) -> Error {
        Error::OutOfMemory(Box::new(OutOfMemory {
            device: self.device,
            requested,
            tag,
            usage: self.usage(),
            largest_free: self.blocks.largest(),
            available: self.space.available(),
            limit: self.limit,
            injected,
        }))
    }
}
