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

/// How often a request asks for memory back, for twice as much each time: a hook that promises too much does not hang it.
const MOST_ROUNDS: u32 = 16;

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

    /// Asks `hook` to give memory back from now on, before a request fails.
    pub fn set_reclaim(&self, hook: Reclaim) {
        *self.reclaim.lock().unwrap_or_else(PoisonError::into_inner) = Some(hook);
    }

    /// Asks `hook` no more. If another has been set since, that one stays.
    pub fn unset_reclaim(&self, hook: &Reclaim) {
        let mut set = self.reclaim.lock().unwrap_or_else(PoisonError::into_inner);
        set.take_if(|set| Arc::ptr_eq(set, hook));
    }

    /// [`Allocator::allocate`]; where that finds no memory, again after the hook gave some back. What it gives may lie
    /// apart, so it is asked for more until that is enough or it has no more.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; or the device reports another failure.
    pub fn allocate(&self, bytes: usize, tag: Tag, stream: StreamId) -> Result<Block> {
        let full = |found: &Result<Block>| matches!(found, Err(Error::OutOfMemory(report)) if !report.injected);
        let mut found = self.lock().allocate(bytes, tag, stream);
        if !full(&found) {
            return found;
        }
        // The hook runs without the locks, so that it can free blocks.
        let hook = self.reclaim.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(hook) = hook else { return found };
        for round in 0..MOST_ROUNDS {
            if hook(bytes.saturating_mul(1 << round)) == 0 {
                break;
            }
            found = self.lock().allocate_quietly(bytes, tag, stream);
            if !full(&found) {
                break;
            }
        }
        found
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
