//! Device memory of tensors.

use super::{
    Gpu,
    driver::check,
    space::{GpuEvents, GpuSpace, stream_id},
};
use crate::{
    Result, Tag,
    allocator::{Allocator, Block, Memory, StreamId},
};
use cudarc::driver::sys;
use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
};

/// Whether fresh device memory is filled with 0xFF bytes (a NaN in every float type).
static POISON: AtomicBool = AtomicBool::new(false);

/// Fills device memory with NaN before it is handed out, from now on: for tests, so that an output that a kernel forgets
/// to write is seen.
pub fn poison(on: bool) {
    POISON.store(on, Ordering::Relaxed);
}

/// The memory of one GPU.
pub type DeviceMemory = Memory<GpuSpace, GpuEvents>;

impl Gpu {
    /// The GPU's memory: its use, its limit, and the hook that gives memory back.
    ///
    /// # Errors
    /// The driver has no virtual memory management.
    pub fn memory(&'static self) -> Result<&'static DeviceMemory> {
        if let Some(memory) = self.memory.get() {
            return Ok(memory);
        }
        // Where two threads come first, one of them gives its addresses back.
        let allocator = Allocator::new(self.device(), GpuSpace::new(self)?, GpuEvents(self));
        Ok(self.memory.get_or_init(|| Memory::new(allocator)))
    }

    fn stream_id(&self) -> StreamId {
        stream_id(self.stream())
    }
}

/// A block of device memory. Freed in the order of the compute stream: what that stream was given before may still use
/// it, and what uses it on another stream must be waited for by the compute stream first.
pub(crate) struct DeviceBuffer {
    gpu: &'static Gpu,
    memory: &'static DeviceMemory,
    /// None if it has no bytes.
    block: Option<Block>,
    bytes: usize,
}

impl fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceBuffer({} bytes on {:?})", self.bytes, self.gpu)
    }
}

impl DeviceBuffer {
    /// `bytes` of memory with unspecified contents.
    pub(crate) fn new(gpu: &'static Gpu, bytes: usize, tag: Tag) -> Result<Self> {
        let memory = gpu.memory()?;
        let block = if bytes > 0 { Some(memory.allocate(bytes, tag, gpu.stream_id())?) } else { None };
        let mut buffer = DeviceBuffer { gpu, memory, block, bytes };
        if POISON.load(Ordering::Relaxed) {
            buffer.fill(0xFF)?;
        }
        Ok(buffer)
    }

    pub(crate) fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    /// Address of the first byte; null if there are none.
    pub(crate) fn pointer(&self) -> u64 {
        self.block.as_ref().map_or(0, Block::address)
    }

    /// Counts the block under another tag from now on.
    pub(crate) fn set_tag(&mut self, tag: Tag) {
        if let Some(block) = &mut self.block {
            self.memory.lock().set_tag(block, tag);
        }
    }

    /// Sets every byte.
    pub(crate) fn fill(&mut self, byte: u8) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        self.gpu.bind()?;
        // SAFETY: the block has `bytes` bytes and is borrowed exclusively.
        let status = unsafe { sys::cuMemsetD8Async(self.pointer(), byte, self.bytes, self.gpu.stream().0) };
        check("cuMemsetD8Async", status)
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.memory.free(block, self.gpu.stream_id());
        }
    }
}
