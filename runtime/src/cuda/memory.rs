//! Device memory of tensors.

use super::{
    Event, Gpu, Stream,
    driver::check,
    gpu::lock,
    space::{GpuEvents, GpuSpace, stream_id},
};
use crate::{
    Result, Tag,
    allocator::{Allocator, Block, Memory, StreamId},
    pager::Lease,
};
use cudarc::driver::sys;
use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
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
/// it. What uses it on another stream leaves a mark ([`DeviceBuffer::use_after`]), which the compute stream waits for
/// before it uses or frees the block.
pub(crate) struct DeviceBuffer {
    gpu: &'static Gpu,
    memory: &'static DeviceMemory,
    place: Place,
    bytes: usize,
    /// Marks in other streams that the compute stream has yet to wait for,
    after: Mutex<Vec<Arc<Event>>>,
    /// and whether there may be any: few blocks have some, and all are asked at every use.
    marked: AtomicBool,
}

/// Where a [`DeviceBuffer`] is.
enum Place {
    /// It has no bytes.
    Nowhere,
    Device(Block),
    /// Pinned host memory, which the GPU reads and writes across the bus at this address.
    Host(sys::CUdeviceptr),
    /// Memory of the pager, which the lease keeps at this address.
    Page {
        address: sys::CUdeviceptr,
        _lease: Arc<Lease>,
    },
}

impl fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceBuffer({} bytes on {:?})", self.bytes, self.gpu)
    }
}

impl DeviceBuffer {
    fn at(gpu: &'static Gpu, memory: &'static DeviceMemory, place: Place, bytes: usize) -> Self {
        DeviceBuffer { gpu, memory, place, bytes, after: Mutex::default(), marked: AtomicBool::new(false) }
    }

    /// `bytes` of memory with unspecified contents.
    pub(crate) fn new(gpu: &'static Gpu, bytes: usize, tag: Tag) -> Result<Self> {
        let memory = gpu.memory()?;
        let place = match bytes {
            0 => Place::Nowhere,
            _ => Place::Device(memory.allocate(bytes, tag, gpu.stream_id())?),
        };
        let mut buffer = DeviceBuffer::at(gpu, memory, place, bytes);
        if POISON.load(Ordering::Relaxed) {
            buffer.fill(0xFF)?;
        }
        Ok(buffer)
    }

    /// `bytes` of pinned host memory that the GPU uses in place, with unspecified contents: for what is read little of,
    /// and would take device memory from what is read often. It is not counted as device memory.
    pub(crate) fn in_host_memory(gpu: &'static Gpu, bytes: usize) -> Result<Self> {
        let memory = gpu.memory()?;
        if bytes == 0 {
            return Ok(DeviceBuffer::at(gpu, memory, Place::Nowhere, bytes));
        }
        gpu.bind()?;
        let (mut host, mut address) = (std::ptr::null_mut(), 0);
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the context is current; each call writes the one pointer that it is given.
        unsafe {
            check("cuMemHostAlloc", sys::cuMemHostAlloc(&mut host, bytes, flags))?;
            check("cuMemHostGetDevicePointer", sys::cuMemHostGetDevicePointer_v2(&mut address, host, 0))?;
        }
        Ok(DeviceBuffer::at(gpu, memory, Place::Host(address), bytes))
    }

    /// Memory of the pager at `address`, for as long as the lease keeps it there.
    pub(crate) fn in_pages(gpu: &'static Gpu, lease: Arc<Lease>, address: u64, bytes: usize) -> Result<Self> {
        let place = if bytes == 0 { Place::Nowhere } else { Place::Page { address, _lease: lease } };
        Ok(DeviceBuffer::at(gpu, gpu.memory()?, place, bytes))
    }

    /// Whether the memory belongs to the pager.
    pub(crate) fn is_paged(&self) -> bool {
        matches!(self.place, Place::Page { .. })
    }

    pub(crate) fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    /// Lets nobody use the block before `mark`, which comes behind all marks that it had.
    pub(crate) fn use_after(&self, mark: &Arc<Event>) {
        *lock(&self.after) = vec![Arc::clone(mark)];
        self.marked.store(true, Ordering::Release);
    }

    /// Lets `stream` wait until the block may be used.
    pub(crate) fn ready(&self, stream: Stream) -> Result<()> {
        if !self.marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut after = lock(&self.after);
        // Most marks are shared by many blocks, and reached by now: nobody needs to be told to wait for them.
        while let Some(mark) = after.last() {
            if !mark.is_reached()? {
                break;
            }
            after.pop();
        }
        after.iter().try_for_each(|mark| mark.hold(stream))?;
        if stream == self.gpu.stream() {
            after.clear();
        }
        self.marked.store(!after.is_empty(), Ordering::Release);
        Ok(())
    }

    /// Address of the first byte, as the GPU sees it; null if there are none. Whoever uses it sees that it is
    /// [`DeviceBuffer::ready`].
    pub(crate) fn pointer(&self) -> u64 {
        match &self.place {
            Place::Nowhere => 0,
            Place::Device(block) => block.address(),
            Place::Host(address) | Place::Page { address, .. } => *address,
        }
    }

    /// Counts the block under another tag from now on.
    pub(crate) fn set_tag(&mut self, tag: Tag) {
        if let Place::Device(block) = &mut self.place {
            self.memory.lock().set_tag(block, tag);
        }
    }

    /// Sets every byte.
    pub(crate) fn fill(&mut self, byte: u8) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        self.gpu.bind()?;
        self.ready(self.gpu.stream())?;
        // SAFETY: the block has `bytes` bytes and is borrowed exclusively.
        let status = unsafe { sys::cuMemsetD8Async(self.pointer(), byte, self.bytes, self.gpu.stream().0) };
        check("cuMemsetD8Async", status)
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // Pages are not freed: whoever has them next waits for their ticket.
        if !self.is_paged() {
            self.gpu.record_error(self.ready(self.gpu.stream()));
        }
        match std::mem::replace(&mut self.place, Place::Nowhere) {
            Place::Nowhere | Place::Page { .. } => {}
            Place::Device(block) => self.memory.free(block, self.gpu.stream_id()),
            Place::Host(address) => {
                let freed = self.gpu.synchronize().and_then(|()| {
                    // SAFETY: the memory came from `cuMemHostAlloc`, whose address is the same for the host under unified
                    // addressing (every GPU since 2010 on 64-bit systems); nothing uses it any more.
                    check("cuMemFreeHost", unsafe {
                        sys::cuMemFreeHost(std::ptr::with_exposed_provenance_mut(address as usize))
                    })
                });
                self.gpu.record_error(freed);
            }
        }
    }
}
