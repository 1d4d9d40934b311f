//! An allocator that threads share, with a hook that gives memory back before a request fails.

use super::{AddressSpace, Allocator, Block, Events, StreamId};
use crate::{Error, Result, Tag, memory::Usage};
use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Gives device memory back: called with the bytes that are wanted, returns how many it could give back. It may free
/// blocks of the same [`Memory`], and may not allocate from it.
pub type Reclaim = Arc<dyn Fn(usize) -> usize + Send + Sync>;

/// An [`Allocator`] behind a lock, and who else can give memory back.
pub struct Memory<S: AddressSpace, E: Events> {
    allocator: Mutex<Allocator<S, E>>,
    reclaim: Mutex<Option<Reclaim>>,
}

impl<S: AddressSpace, E: Events> fmt::Debug for Memory<S, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({:?})", self.usage())
    }
}

impl<S: AddressSpace, E: Events> Memory<S, E> {
    /// Shares `allocator`.
    pub fn new(allocator: Allocator<S, E>) -> Self {
        Memory { allocator: Mutex::new(allocator), reclaim: Mutex::new(None) }
    }

    /// The allocator, for this thread alone as long as the guard lives.
    pub fn lock(&self) -> MutexGuard<'_, Allocator<S, E>> {
        // Nothing in the allocator panics between two halves of a change.
        self.allocator.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks `hook` to give memory back from now on, before a request fails; or nobody.
    pub fn set_reclaim(&self, hook: Option<Reclaim>) {
        *self.reclaim.lock().unwrap_or_else(PoisonError::into_inner) = hook;
    }

    /// [`Allocator::allocate`]; where that finds no memory, once more after the hook gave some back.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; or the device reports another failure.
    pub fn allocate(&self, bytes: usize, tag: Tag, stream: StreamId) -> Result<Block> {
        let first = self.lock().allocate(bytes, tag, stream);
        if !matches!(&first, Err(Error::OutOfMemory(report)) if !report.injected) {
            return first;
        }
        // The hook runs without the locks, so that it can free blocks.
        let hook = self.reclaim.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match hook {
            Some(hook) if hook(bytes) > 0 => self.lock().allocate_quietly(bytes, tag, stream),
            _ => first,
        }
    }

    /// [`Allocator::free`].
    pub fn free(&self, block: Block, stream: StreamId) {
        self.lock().free(block, stream);
    }

    /// [`Allocator::usage`].
    pub fn usage(&self) -> Usage {
        self.lock().usage()
    }
}
