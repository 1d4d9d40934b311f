//! Device memory of tensors.

use super::{Gpu, driver::check};
use crate::{Result, Tag};
use cudarc::driver::sys;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether fresh device memory is filled with 0xFF bytes (a NaN in every float type).
static POISON: AtomicBool = AtomicBool::new(false);

/// Fills device memory with NaN before it is handed out, from now on: for tests, so that an output that a kernel forgets
/// to write is seen.
pub fn poison(on: bool) {
    POISON.store(on, Ordering::Relaxed);
}

/// A block of device memory. Freed in the order of the compute stream.
pub(crate) struct DeviceBuffer {
    gpu: &'static Gpu,
    pointer: sys::CUdeviceptr,
    bytes: usize,
}

impl DeviceBuffer {
    /// `bytes` of memory with unspecified contents.
    pub(crate) fn new(gpu: &'static Gpu, bytes: usize, _tag: Tag) -> Result<Self> {
        gpu.bind()?;
        let mut pointer = 0;
        if bytes > 0 {
            // SAFETY: the context is current and the call writes one pointer.
            check("cuMemAllocAsync", unsafe { sys::cuMemAllocAsync(&mut pointer, bytes, gpu.stream().0) })?;
        }
        let mut buffer = DeviceBuffer { gpu, pointer, bytes };
        if POISON.load(Ordering::Relaxed) {
            buffer.fill(0xFF)?;
        }
        Ok(buffer)
    }

    pub(crate) fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    /// Address of the first byte.
    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
    }

    pub(crate) fn set_tag(&mut self, _tag: Tag) {}

    /// Sets every byte.
    pub(crate) fn fill(&mut self, byte: u8) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        self.gpu.bind()?;
        // SAFETY: the block has `bytes` bytes and is borrowed exclusively.
        let status = unsafe { sys::cuMemsetD8Async(self.pointer, byte, self.bytes, self.gpu.stream().0) };
        check("cuMemsetD8Async", status)
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let freed = self.gpu.bind().and_then(|()| {
            // SAFETY: the block came from the same stream's allocator and is not used again.
            check("cuMemFreeAsync", unsafe { sys::cuMemFreeAsync(self.pointer, self.gpu.stream().0) })
        });
        self.gpu.record_error(freed);
    }
}
