//! What the allocator stands on: a range of addresses that can be backed, and marks in streams.

use crate::{Error, Result};

/// A queue of device work. Streams outlive the allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub(crate) usize);

/// Why a range could not be backed.
#[derive(Debug)]
pub enum MapError {
    /// The device has not enough memory left. Nothing has changed.
    OutOfMemory,
    /// Anything else.
    Other(Error),
}

impl From<Error> for MapError {
    fn from(error: Error) -> Self {
        MapError::Other(error)
    }
}

/// A reserved range of addresses, backed piece by piece. Offsets and lengths are multiples of the granule. What one
/// call of [`AddressSpace::map`] backed is a *piece*: it is moved and given back as a whole.
pub trait AddressSpace {
    /// Bytes of the smallest piece.
    fn granule(&self) -> usize;

    /// Bytes of the whole range.
    fn reserved(&self) -> usize;

    /// Address of its first byte.
    fn base(&self) -> u64;

    /// Bytes that the device could still back, as far as one can tell: for reports.
    fn available(&self) -> usize;

    /// Backs `offset..offset + bytes`, of which nothing is backed.
    ///
    /// # Errors
    /// Nothing is backed then.
    fn map(&mut self, offset: usize, bytes: usize) -> std::result::Result<(), MapError>;

    /// Gives the memory behind a piece back to the system. The device must be done with it.
    ///
    /// # Errors
    /// The piece stays.
    fn unmap(&mut self, offset: usize, bytes: usize) -> Result<()>;

    /// Puts the memory behind the piece at `from` behind `to..to + bytes` instead, of which nothing is backed. The
    /// device must be done with it; the contents are lost.
    ///
    /// # Errors
    /// The memory is given back to the system: neither range is backed then.
    fn remap(&mut self, from: usize, to: usize, bytes: usize) -> std::result::Result<(), MapError>;
}

/// Marks in streams, by which work of one stream is ordered behind that of another.
pub trait Events {
    /// A point in a stream.
    type Mark;

    /// Marks what `stream` has been given so far.
    fn mark(&mut self, stream: StreamId) -> Result<Self::Mark>;

    /// Whether the device has passed the mark.
    fn done(&self, mark: &Self::Mark) -> Result<bool>;

    /// Lets everything that `stream` is given from now on wait for the mark. Returns at once.
    fn wait(&mut self, stream: StreamId, mark: &Self::Mark) -> Result<()>;

    /// Blocks the calling thread until the device has passed the mark.
    fn synchronize(&mut self, mark: &Self::Mark) -> Result<()>;
}
