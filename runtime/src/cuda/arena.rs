//! Pinned host memory that tensors are copied to and from, beside the compute stream.

use super::{Event, Gpu, Stream, driver::check, transfer::Transfers};
use crate::{Device, Error, Result, Tensor, memory::readable};
use cudarc::driver::sys;
use std::{fmt, sync::Arc};

/// Bytes that are pinned at a time.
const SLAB: usize = 64 << 20;

/// Pinned memory in slabs, addressed as one, and the streams that copy.
pub(crate) struct PinnedArena {
    transfers: Transfers,
    outward: Stream,
    inward: Stream,
    /// Addresses, the same for host and GPU under unified addressing (every GPU that is supported).
    slabs: Vec<u64>,
}

impl PinnedArena {
    /// Without memory yet.
    ///
    /// # Errors
    /// The device is no GPU, or the driver refuses.
    pub(crate) fn new(device: Device) -> Result<Self> {
        let gpu = Gpu::of(device)?;
        let (outward, inward) = (Stream::beside(gpu)?, Stream::beside(gpu)?);
        Ok(PinnedArena { transfers: Transfers::new(gpu), outward, inward, slabs: Vec::new() })
    }

    pub(crate) fn device(&self) -> Device {
        self.transfers.gpu.device()
    }

    /// Pins memory up to `end`.
    fn reserve(&mut self, end: usize) -> Result<()> {
        let gpu = self.transfers.gpu;
        while self.slabs.len() * SLAB < end {
            gpu.bind()?;
            let mut host = std::ptr::null_mut();
            let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
            // SAFETY: the context is current; the call writes one pointer.
            check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&mut host, SLAB, flags) }).map_err(|error| {
                Error::Cuda {
                    op: "stash",
                    what: format!(
                        "{} of host memory are pinned for activations and no more can be ({error}); --activations without \
                         @host, or with it for fewer layers, needs less",
                        readable(self.slabs.len() * SLAB)
                    ),
                }
            })?;
            self.slabs.push(host.expose_provenance() as u64);
        }
        Ok(())
    }

    /// The pieces of `at..at + bytes`: address, offset from `at` and bytes of each.
    fn pieces(&self, at: usize, bytes: usize) -> impl Iterator<Item = (u64, usize, usize)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let (slab, within) = ((at + done) / SLAB, (at + done) % SLAB);
            let count = (bytes - done).min(SLAB - within);
            let piece = (count > 0).then(|| (self.slabs[slab] + within as u64, done, count))?;
            done += count;
            Some(piece)
        })
    }

    /// Copies tensors of this GPU to their places, behind what the compute stream has been given. What the compute stream
    /// does with them from now on waits for it, freeing them included.
    ///
    /// # Errors
    /// No more memory can be pinned, or the driver refuses.
    pub(crate) fn store(&mut self, tensors: &[(usize, &Tensor)]) -> Result<()> {
        self.reserve(tensors.iter().map(|(at, tensor)| at + tensor.size_bytes()).max().unwrap_or(0))?;
        let stream = self.outward;
        self.transfers.behind_compute(stream)?;
        let done = Arc::new(Event::new(self.transfers.gpu, false)?);
        let copied = self.copy(stream, tensors, true);
        // Also of those that were copied before one failed.
        done.record(stream)?;
        tensors.iter().for_each(|(_, tensor)| tensor.use_after(&done));
        copied
    }

    /// Copies from their places into tensors of this GPU, which nobody has used yet: behind what the compute stream has been
    /// given, as their memory may have been others' until then, and behind all that was stored.
    ///
    /// # Errors
    /// The driver refuses.
    pub(crate) fn load(&mut self, tensors: &[(usize, &Tensor)]) -> Result<()> {
        let (gpu, stream) = (self.transfers.gpu, self.inward);
        self.transfers.behind_compute(stream)?;
        let stored = Event::new(gpu, false)?;
        stored.record(self.outward)?;
        stored.hold(stream)?;
        let done = Arc::new(Event::new(gpu, false)?);
        let copied = self.copy(stream, tensors, false);
        done.record(stream)?;
        tensors.iter().for_each(|(_, tensor)| tensor.use_after(&done));
        copied
    }

    fn copy(&self, stream: Stream, tensors: &[(usize, &Tensor)], out: bool) -> Result<()> {
        for (at, tensor) in tensors {
            let device = tensor.device_pointer_on(Some(stream))?;
            for (host, offset, bytes) in self.pieces(*at, tensor.size_bytes()) {
                let device = device + offset as u64;
                let (to, from) = if out { (host, device) } else { (device, host) };
                // SAFETY: the slab and the tensor have the bytes. Slabs live until the arena has waited for the device. The
                // tensor's memory is nobody else's before the stream is done: it waits for what the compute stream did with
                // it, and the compute stream for the mark that the caller leaves. A place in host memory is written only
                // after the compute stream has waited for all that was read from it.
                unsafe { self.transfers.copy(stream, to, from, bytes)? };
            }
        }
        Ok(())
    }
}

impl fmt::Debug for PinnedArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedArena({} on {:?})", readable(self.slabs.len() * SLAB), self.transfers.gpu)
    }
}

impl Drop for PinnedArena {
    fn drop(&mut self) {
        let gpu = self.transfers.gpu;
        let mut freed = gpu.synchronize_all();
        for slab in &self.slabs {
            // SAFETY: the memory came from `cuMemHostAlloc`; the whole device was waited for, so nothing uses it.
            let status = unsafe { sys::cuMemFreeHost(std::ptr::with_exposed_provenance_mut(*slab as usize)) };
            freed = freed.and(check("cuMemFreeHost", status));
        }
        [self.outward, self.inward].into_iter().for_each(|stream| stream.retire(gpu));
        gpu.record_error(freed);
    }
}
