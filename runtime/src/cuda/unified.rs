//! Pages in unified memory: one address each, wherever they are; the driver moves them when it is told to.
//!
//! Every page prefers host memory and is mapped for the GPU, which then uses it across the bus without a fault; a page
//! that is brought prefers the device. Evicting blocks the thread that asks (9 GB/s on an H100), so a thread of its own
//! does it. The driver keeps pages that it moves out of the allocator's sight: they count against its limit as memory
//! taken outside, and no page is brought that the device has no free memory for, since a device with more unified memory
//! in use than it has can hang.

use super::{
    Gpu, Stream,
    driver::check,
    transfer::{Transfers, check_page_bytes},
};
use crate::{
    Device, Error, Result,
    memory::readable,
    pager::{PageStore, Refusal, Ticket},
};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUmem_advise as Advice};
use rayon::prelude::*;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Condvar, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
};

/// Device memory that unified memory leaves free: for the driver, and other users of the GPU.
const LEFT_FREE: usize = 512 << 20;

/// Pages brought between two looks at how much memory is free.
const PAGES_A_LOOK: usize = 8;

/// A range of unified memory and where it is to go.
#[derive(Clone, Copy)]
struct Move {
    gpu: &'static Gpu,
    device: sys::CUdevice,
    address: u64,
    bytes: usize,
}

impl Move {
    fn advise(self, advice: Advice, device: sys::CUdevice) -> Result<()> {
        // SAFETY: the range lies in one managed allocation.
        check("cuMemAdvise", unsafe { sys::cuMemAdvise(self.address, self.bytes, advice, device) })
    }

    /// Queues the move to `place` on `stream`. To the host, the call blocks while the pages are copied.
    fn start(self, place: sys::CUdevice, stream: Stream) -> Result<()> {
        self.gpu.bind()?;
        self.advise(Advice::CU_MEM_ADVISE_SET_PREFERRED_LOCATION, place)?;
        // SAFETY: as in `advise`; the stream is live.
        let status = unsafe { sys::cuMemPrefetchAsync(self.address, self.bytes, place, stream.0) };
        check("cuMemPrefetchAsync", status)?;
        if place == CPU {
            // Without this the GPU would move a page that it touches.
            self.advise(Advice::CU_MEM_ADVISE_SET_ACCESSED_BY, self.device)?;
        }
        Ok(())
    }
}

/// The host's place among devices.
const CPU: sys::CUdevice = -1;

/// What the evicting thread has done.
#[derive(Default)]
struct Evictions {
    asked: u64,
    done: u64,
    failed: Option<Error>,
}

type Shared = Arc<(Mutex<Evictions>, Condvar)>;

/// See the [module](self).
pub struct UnifiedPages {
    transfers: Transfers,
    device: sys::CUdevice,
    page_bytes: usize,
    pages: usize,
    base: u64,
    inward: Stream,
    /// For pages that are used beside others.
    aside: Stream,
    /// Pages on the device.
    resident: usize,
    /// How many pages may be brought before the next look at the device's free memory.
    room: usize,
    to_evict: Option<mpsc::Sender<Move>>,
    evictions: Shared,
    thread: Option<JoinHandle<()>>,
    /// Number of the eviction behind a ticket that stands for one.
    tickets: BTreeMap<u64, u64>,
}

impl fmt::Debug for UnifiedPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UnifiedPages({} of {} bytes on {:?})", self.pages, self.page_bytes, self.transfers.gpu)
    }
}

impl UnifiedPages {
    /// Pages of zeros.
    ///
    /// # Errors
    /// `page_bytes` is not a multiple of 64 KiB; the GPU or its driver cannot use unified memory from both sides at once,
    /// or refuses to move it (WSL and Windows), which the message says; or there is not enough host memory.
    pub fn new(gpu: &'static Gpu, pages: usize, page_bytes: usize) -> Result<Self> {
        check_page_bytes(page_bytes)?;
        gpu.bind()?;
        let refuse = |what: String| Error::Cuda { op: "unified memory", what };
        let mut device = 0;
        // SAFETY: the context is current; the call writes one number.
        check("cuCtxGetDevice", unsafe { sys::cuCtxGetDevice(&mut device) })?;
        let mut concurrent = 0;
        let attribute = Attribute::CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS;
        // SAFETY: the call writes one number.
        check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut concurrent, attribute, device) })?;
        if concurrent == 0 {
            return Err(refuse("this system does not let the GPU and the host use it at the same time".into()));
        }
        let bytes = (pages * page_bytes).max(page_bytes);
        let free = gpu.free_memory()?.saturating_sub(LEFT_FREE);
        if bytes > free {
            // Whoever touched all of it from the device by mistake would fill it up.
            let (bytes, free) = (readable(bytes), readable(free));
            return Err(refuse(format!("{bytes} of it would be more than the {free} that the GPU has free")));
        }
        let (mut base, flags) = (0, sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL as u32);
        // SAFETY: the context is current; the call writes one address.
        check("cuMemAllocManaged", unsafe { sys::cuMemAllocManaged(&mut base, bytes, flags) })
            .map_err(|error| refuse(format!("{} cannot be had: {error}", readable(bytes))))?;
        let evictions = Shared::default();
        let mut store = UnifiedPages {
            transfers: Transfers::new(gpu),
            device,
            page_bytes,
            pages,
            base,
            inward: Stream::beside(gpu)?,
            aside: Stream::beside(gpu)?,
            resident: 0,
            room: 0,
            to_evict: None,
            evictions: Arc::clone(&evictions),
            thread: None,
            tickets: BTreeMap::new(),
        };
        let all = store.whole(bytes);
        all.advise(Advice::CU_MEM_ADVISE_SET_PREFERRED_LOCATION, CPU)?;
        all.advise(Advice::CU_MEM_ADVISE_SET_ACCESSED_BY, device)?;
        store.fill_with_zeros(bytes);
        // Some systems only say here that they cannot move pages.
        store
            .page(0)
            .start(CPU, store.inward)
            .map_err(|error| refuse(format!("its pages cannot be moved: {error}")))?;
        let (sender, receiver) = mpsc::channel::<Move>();
        let outward = Stream::beside(gpu)?;
        store.to_evict = Some(sender);
        store.thread = Some(std::thread::spawn(move || {
            for page in receiver {
                // In order behind the compute stream: the event was recorded when the eviction was asked for.
                let moved = page.start(CPU, outward).and_then(|()| {
                    let mark = super::Event::new(gpu, false)?;
                    mark.record(outward)?;
                    mark.wait()
                });
                let (state, changed) = &*evictions;
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                state.done += 1;
                if let Err(error) = moved {
                    state.failed.get_or_insert(error);
                }
                changed.notify_all();
            }
            outward.retire(gpu);
        }));
        Ok(store)
    }

    fn whole(&self, bytes: usize) -> Move {
        Move { gpu: self.transfers.gpu, device: self.device, address: self.base, bytes }
    }

    fn page(&self, page: usize) -> Move {
        let address = self.base + (page * self.page_bytes) as u64;
        Move { address, ..self.whole(self.page_bytes) }
    }

    /// The first touch gives every page its memory on the host.
    fn fill_with_zeros(&mut self, bytes: usize) {
        let base = std::ptr::with_exposed_provenance_mut::<u8>(self.base as usize);
        // SAFETY: the allocation has `bytes` bytes, which nobody else has seen, and this borrows the store exclusively.
        let memory = unsafe { std::slice::from_raw_parts_mut(base.cast::<std::mem::MaybeUninit<u8>>(), bytes) };
        memory.par_chunks_mut(8 << 20).for_each(|chunk| chunk.fill(std::mem::MaybeUninit::new(0)));
    }

    /// Blocks until the thread has done eviction `number`.
    fn wait_for_eviction(&self, number: u64) -> Result<()> {
        let (state, changed) = &*self.evictions;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.done < number {
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.failed.take().map_or(Ok(()), Err)
    }

    fn asked(&self) -> u64 {
        self.evictions.0.lock().unwrap_or_else(PoisonError::into_inner).asked
    }
}

impl PageStore for UnifiedPages {
    fn name(&self) -> &'static str {
        "unified memory"
    }

    fn device(&self) -> Device {
        self.transfers.gpu.device()
    }

    fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    fn pages(&self) -> usize {
        self.pages
    }

    /// The driver keeps it until somebody needs it.
    fn frees_evicted(&self) -> bool {
        false
    }

    fn address(&mut self, page: usize) -> Result<u64> {
        Ok(self.page(page).address)
    }

    fn bring(&mut self, page: usize) -> std::result::Result<Ticket, Refusal> {
        let (gpu, stream) = (self.transfers.gpu, self.inward);
        // What leaves has left before others come: never more on the device than the table says.
        self.wait_for_eviction(self.asked()).map_err(Refusal::Lost)?;
        if self.room == 0 {
            // What was brought before may not have arrived yet.
            gpu.synchronize_stream(stream).map_err(Refusal::Lost)?;
            let free = gpu.free_memory().map_err(Refusal::Lost)?;
            self.room = (free.saturating_sub(LEFT_FREE) / self.page_bytes).min(PAGES_A_LOOK);
        }
        if self.room == 0 {
            return Err(Refusal::NoMemory);
        }
        let memory = gpu.memory().map_err(Refusal::Lost)?;
        if !memory.lock().take_outside(self.page_bytes).map_err(Refusal::Lost)? {
            return Err(Refusal::NoMemory);
        }
        let moved = self.transfers.behind_compute(stream).and_then(|()| self.page(page).start(self.device, stream));
        if let Err(error) = moved {
            memory.lock().return_outside(self.page_bytes);
            return Err(Refusal::Transfer(error));
        }
        self.room -= 1;
        self.resident += 1;
        self.transfers.ticket(stream).map_err(Refusal::Lost)
    }

    fn evict(&mut self, page: usize) -> std::result::Result<Ticket, Refusal> {
        // The thread's call blocks until pages are copied, so it must not start before the compute stream is done with it.
        let gpu = self.transfers.gpu;
        gpu.synchronize().map_err(Refusal::Lost)?;
        let ticket = self.transfers.ticket(gpu.stream()).map_err(Refusal::Lost)?;
        let sender = self.to_evict.as_ref().ok_or_else(|| Refusal::Lost(Error::invalid("pager", "no thread")))?;
        let number = {
            let mut state = self.evictions.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.asked += 1;
            state.asked
        };
        if sender.send(self.page(page)).is_err() {
            return Err(Refusal::Lost(Error::invalid("pager", "the evicting thread has ended")));
        }
        self.tickets.insert(ticket.0, number);
        self.resident -= 1;
        gpu.memory().map_err(Refusal::Lost)?.lock().return_outside(self.page_bytes);
        Ok(ticket)
    }

    fn join(&mut self, ticket: Ticket) -> Result<()> {
        // Where a page is does not matter to who uses it: its address is the same.
        self.transfers.join(ticket)
    }

    fn reached(&mut self, ticket: Ticket) -> Result<bool> {
        self.transfers.reached(ticket)
    }

    fn finish(&mut self, ticket: Ticket) -> Result<()> {
        self.transfers.finish(ticket)?;
        let later = self.tickets.split_off(&(ticket.0 + 1));
        let done = std::mem::replace(&mut self.tickets, later);
        done.into_values().max().map_or(Ok(()), |number| self.wait_for_eviction(number))
    }

    fn beside(&mut self) -> Result<Option<[Stream; 2]>> {
        self.transfers.beside([self.inward, self.aside])
    }

    fn join_beside(&mut self) -> Result<()> {
        self.transfers.join_beside([self.inward, self.aside])
    }

    fn write(&mut self, page: usize, offset: usize, bytes: &[u8]) -> Result<()> {
        let to = self.page(page).address + offset as u64;
        // SAFETY: the page has the bytes (checked by the pager), and is used in the order of the compute stream.
        unsafe { self.transfers.write(to, bytes) }
    }

    fn read(&mut self, page: usize, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let from = self.page(page).address + offset as u64;
        // SAFETY: as in `write`.
        unsafe { self.transfers.read(from, bytes) }
    }

    fn store(
        &mut self,
        page: usize,
        offset: usize,
        source: u64,
        bytes: usize,
        after: Option<Ticket>,
    ) -> Result<Ticket> {
        let (to, stream) = (self.page(page).address + offset as u64, self.transfers.gpu.stream());
        after.map_or(Ok(()), |ticket| self.transfers.hold(stream, ticket))?;
        // SAFETY: the page has the bytes and is used in the order of the compute stream; the caller keeps the source.
        unsafe { self.transfers.copy(stream, to, source, bytes)? };
        self.transfers.ticket(stream)
    }
}

impl Drop for UnifiedPages {
    fn drop(&mut self) {
        let gpu = self.transfers.gpu;
        self.to_evict = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let freed = gpu.synchronize_all().and_then(|()| {
            // SAFETY: the allocation is the store's own, and the whole device was waited for.
            check("cuMemFree", unsafe { sys::cuMemFree_v2(self.base) })
        });
        if let Ok(memory) = gpu.memory() {
            memory.lock().return_outside(self.resident * self.page_bytes);
        }
        [self.inward, self.aside].into_iter().for_each(|stream| stream.retire(gpu));
        gpu.record_error(freed);
    }
}
