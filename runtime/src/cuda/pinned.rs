//! Pages whose home is pinned host memory, and which get blocks of the allocator while they are in device memory.
//!
//! The copy engines move them at the full speed of the bus, both ways at once, beside the compute stream; the GPU can
//! also use them at home, in place. Home memory is pinned when a page first needs it: pages that never leave the device
//! take none.

use super::{
    Gpu, Stream,
    driver::check,
    space::stream_id,
    transfer::{Transfers, check_page_bytes},
};
use crate::{
    Device, Error, Result, Tag,
    allocator::Block,
    memory::readable,
    pager::{PageStore, Refusal, Ticket},
};
use cudarc::driver::sys;
use std::{collections::BTreeMap, fmt, ops::Range};

/// Bytes that are pinned at a time: pinning has a cost a call, and more than is needed would be taken from others.
const SLAB: usize = 64 << 20;
/// Lanes to stream pages on.
const LANES: usize = 4;

struct Lane {
    /// For kernels. Copies follow one another on two streams for all lanes: changing streams costs a copy engine time.
    stream: Stream,
    block: Option<Block>,
    /// What a copy to its memory has to wait for: its last chunk's copy home, or those who had the memory before.
    free: Option<Ticket>,
}

/// See the [module](self).
pub struct PinnedPages {
    transfers: Transfers,
    page_bytes: usize,
    pages: usize,
    /// Pinned memory of [`PinnedPages::slab_pages`] pages each, made when first needed, filled with zeros.
    slabs: BTreeMap<usize, u64>,
    frames: BTreeMap<usize, Block>,
    inward: Stream,
    outward: Stream,
    lanes: Vec<Lane>,
}

impl fmt::Debug for PinnedPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedPages({} of {} bytes on {:?})", self.pages, self.page_bytes, self.transfers.gpu)
    }
}

fn transfer(error: Error) -> Refusal {
    match error {
        Error::OutOfMemory(_) => Refusal::NoMemory,
        error => Refusal::Lost(error),
    }
}

impl PinnedPages {
    /// Pages of zeros.
    ///
    /// # Errors
    /// `page_bytes` is not a multiple of 64 KiB, or the driver refuses.
    pub fn new(gpu: &'static Gpu, pages: usize, page_bytes: usize) -> Result<Self> {
        check_page_bytes(page_bytes)?;
        let lane = || Ok(Lane { stream: Stream::beside(gpu)?, block: None, free: None });
        Ok(PinnedPages {
            transfers: Transfers::new(gpu),
            page_bytes,
            pages,
            slabs: BTreeMap::new(),
            frames: BTreeMap::new(),
            inward: Stream::beside(gpu)?,
            outward: Stream::beside(gpu)?,
            lanes: (0..LANES).map(|_| lane()).collect::<Result<_>>()?,
        })
    }

    fn gpu(&self) -> &'static Gpu {
        self.transfers.gpu
    }

    fn slab_pages(&self) -> usize {
        (SLAB / self.page_bytes).max(1)
    }

    /// Whether the page has ever had a home; if not, it is zeros.
    fn has_home(&self, page: usize) -> bool {
        self.slabs.contains_key(&(page / self.slab_pages()))
    }

    /// Address of the page's home, in host memory and for the GPU alike.
    fn home(&mut self, page: usize) -> Result<u64> {
        let (slab, within) = (page / self.slab_pages(), page % self.slab_pages() * self.page_bytes);
        if let Some(&base) = self.slabs.get(&slab) {
            return Ok(base + within as u64);
        }
        self.gpu().bind()?;
        let pages = self.slab_pages().min(self.pages - slab * self.slab_pages());
        let bytes = pages * self.page_bytes;
        let mut host = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the context is current; the call writes one pointer.
        check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&mut host, bytes, flags) }).map_err(|error| {
            Error::Cuda {
                op: "pager",
                what: format!(
                    "{} of host memory cannot be pinned for the optimizer's pages, which take {} in all ({error}); \
                     --optimizer-bits 8 needs a quarter of the states, a larger --paged-budget less host memory",
                    readable(bytes),
                    readable(self.pages * self.page_bytes)
                ),
            }
        })?;
        // SAFETY: the allocation has `bytes` bytes, which nobody else has seen.
        unsafe { host.cast::<u8>().write_bytes(0, bytes) };
        // Under unified addressing (every GPU that is supported) the GPU's address is the host's.
        let base = host.expose_provenance() as u64;
        self.slabs.insert(slab, base);
        Ok(base + within as u64)
    }

    /// Device memory for `pages` pages, used first by `stream`. The reclaim hook is not asked: it would ask the pager.
    fn block(&self, pages: usize, stream: Stream) -> Result<Block> {
        self.gpu().memory()?.lock().allocate_quietly(pages * self.page_bytes, Tag::Optimizer, stream_id(stream))
    }

    /// Lets a stream come behind what the memory of a lane is still used for.
    fn hold_until_free(&self, stream: Stream, lane: usize) -> Result<()> {
        self.lanes[lane].free.map_or(Ok(()), |ticket| self.transfers.hold(stream, ticket))
    }

    /// Runs of pages that lie side by side at home: in one slab.
    fn runs(&self, pages: Range<usize>) -> Vec<Range<usize>> {
        let slab = self.slab_pages();
        let mut runs = Vec::new();
        let mut start = pages.start;
        while start < pages.end {
            let end = ((start / slab + 1) * slab).min(pages.end);
            runs.push(start..end);
            start = end;
        }
        runs
    }

    /// Bytes of a run of a chunk's pages, the last of which has `filled`.
    fn run_bytes(&self, run: &Range<usize>, pages: &Range<usize>, filled: usize) -> usize {
        let empty = if run.end == pages.end { self.page_bytes - filled } else { 0 };
        run.len() * self.page_bytes - empty
    }
}

impl PageStore for PinnedPages {
    fn name(&self) -> &'static str {
        "pinned host memory"
    }

    fn device(&self) -> Device {
        self.gpu().device()
    }

    fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    fn pages(&self) -> usize {
        self.pages
    }

    fn address(&mut self, page: usize) -> Result<u64> {
        match self.frames.get(&page) {
            Some(block) => Ok(block.address()),
            None => self.home(page),
        }
    }

    fn bring(&mut self, page: usize) -> std::result::Result<Ticket, Refusal> {
        let stream = self.inward;
        let block = self.block(1, stream).map_err(transfer)?;
        let (to, bytes) = (block.address(), self.page_bytes);
        let fresh = !self.has_home(page);
        self.frames.insert(page, block);
        let copied = self.transfers.behind_compute(stream).and_then(|()| {
            if fresh {
                // SAFETY: the block has the bytes, and the compute stream is given them when this is joined.
                return check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(to, 0, bytes, stream.0) });
            }
            let from = self.home(page)?;
            // SAFETY: home and block have the bytes; nobody uses the page while it moves (the table's ticket).
            unsafe { self.transfers.copy(stream, to, from, bytes) }
        });
        copied.and_then(|()| self.transfers.ticket(stream)).map_err(Refusal::Lost)
    }

    fn evict(&mut self, page: usize) -> std::result::Result<Ticket, Refusal> {
        // Where no more can be pinned the page stays.
        let to = self.home(page).map_err(Refusal::Transfer)?;
        // On the stream that brings pages: the next one gets this one's block, and no more memory is taken.
        let (stream, memory) = (self.inward, self.gpu().memory().map_err(Refusal::Lost)?);
        let Some(block) = self.frames.remove(&page) else {
            return Err(Refusal::Transfer(Error::invalid("pager", format!("page {page} is not resident"))));
        };
        let copied = self.transfers.behind_compute(stream).and_then(|()| {
            // SAFETY: as in `bring`; the block is free for others only behind this stream.
            unsafe { self.transfers.copy(stream, to, block.address(), self.page_bytes) }
        });
        memory.free(block, stream_id(stream));
        copied.and_then(|()| self.transfers.ticket(stream)).map_err(Refusal::Lost)
    }

    fn join(&mut self, ticket: Ticket) -> Result<()> {
        self.transfers.join(ticket)
    }

    fn reached(&mut self, ticket: Ticket) -> Result<bool> {
        self.transfers.reached(ticket)
    }

    fn finish(&mut self, ticket: Ticket) -> Result<()> {
        self.transfers.finish(ticket)
    }

    fn beside(&mut self) -> Result<Option<[Stream; 2]>> {
        self.transfers.beside([self.inward, self.outward])
    }

    fn join_beside(&mut self) -> Result<()> {
        self.transfers.join_beside([self.inward, self.outward])
    }

    fn write(&mut self, page: usize, offset: usize, bytes: &[u8]) -> Result<()> {
        let to = self.address(page)? + offset as u64;
        // SAFETY: the page has the bytes (checked by the pager), and is used in the order of the compute stream.
        unsafe { self.transfers.write(to, bytes) }
    }

    fn read(&mut self, page: usize, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let from = self.address(page)? + offset as u64;
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
        let resident = self.frames.contains_key(&page);
        let to = self.address(page)? + offset as u64;
        let stream = if resident { self.gpu().stream() } else { self.outward };
        if !resident {
            self.transfers.behind_compute(stream)?;
        }
        after.map_or(Ok(()), |ticket| self.transfers.hold(stream, ticket))?;
        // SAFETY: the page has the bytes and nobody uses it while it changes (the table's ticket); the caller keeps the
        // source until then.
        unsafe { self.transfers.copy(stream, to, source, bytes)? };
        self.transfers.ticket(stream)
    }

    fn copy(&mut self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the table gives places in a lane's memory that nobody else uses, and live tensors.
        unsafe { self.transfers.copy(self.gpu().stream(), to, from, bytes) }
    }

    fn lanes(&self) -> usize {
        LANES
    }

    fn open_lanes(&mut self, pages: usize) -> std::result::Result<(), Refusal> {
        for lane in 0..LANES {
            let stream = self.lanes[lane].stream;
            match self.block(pages, stream) {
                Ok(block) => {
                    self.lanes[lane].block = Some(block);
                    self.lanes[lane].free = Some(self.transfers.ticket(stream).map_err(Refusal::Lost)?);
                }
                Err(error) => {
                    self.close_lanes().map_err(Refusal::Lost)?;
                    return Err(transfer(error));
                }
            }
        }
        Ok(())
    }

    fn close_lanes(&mut self) -> Result<()> {
        let memory = self.gpu().memory()?;
        for lane in 0..LANES {
            let stream = self.lanes[lane].stream;
            if let Some(block) = self.lanes[lane].block.take() {
                self.hold_until_free(stream, lane)?;
                memory.free(block, stream_id(stream));
                let ticket = self.transfers.ticket(stream)?;
                self.transfers.join(ticket)?;
            }
        }
        Ok(())
    }

    fn follow(&mut self, lane: usize) -> Result<()> {
        self.transfers.behind_compute(self.lanes[lane].stream)?;
        self.transfers.behind_compute(self.inward)
    }

    fn hold(&mut self, ticket: Ticket, lane: usize) -> Result<()> {
        self.transfers.hold(self.lanes[lane].stream, ticket)?;
        self.transfers.hold(self.inward, ticket)
    }

    fn stage(&mut self, pages: Range<usize>, filled: usize, lane: usize) -> Result<u64> {
        let base = self.lanes[lane].block.as_ref().map(Block::address);
        let base = base.ok_or_else(|| Error::invalid("pager", format!("lane {lane} is closed")))?;
        if pages.is_empty() {
            return Ok(base);
        }
        let stream = self.inward;
        self.hold_until_free(stream, lane)?;
        for run in self.runs(pages.clone()) {
            let to = base + ((run.start - pages.start) * self.page_bytes) as u64;
            let from = self.home(run.start)?;
            let bytes = self.run_bytes(&run, &pages, filled);
            // SAFETY: the run lies in one slab, the lane has room for the chunk (`open_lanes`, checked by the table), and
            // the pages are in use by the lane alone.
            unsafe { self.transfers.copy(stream, to, from, bytes)? };
        }
        let there = self.transfers.ticket(stream)?;
        self.transfers.hold(self.lanes[lane].stream, there)?;
        Ok(base)
    }

    fn unstage(&mut self, pages: Range<usize>, clean: usize, filled: usize, lane: usize) -> Result<Ticket> {
        if pages.is_empty() {
            let stream = self.lanes[lane].stream;
            self.hold_until_free(stream, lane)?;
            return self.transfers.ticket(stream);
        }
        let base = self.lanes[lane].block.as_ref().map(Block::address);
        let base = base.ok_or_else(|| Error::invalid("pager", format!("lane {lane} is closed")))?;
        let stream = self.outward;
        let used = self.transfers.ticket(self.lanes[lane].stream)?;
        self.transfers.hold(stream, used)?;
        // Where all of a page is copied, that of the next follows.
        let runs =
            if clean == 0 { self.runs(pages.clone()) } else { pages.clone().map(|page| page..page + 1).collect() };
        for run in runs {
            let from = base + ((run.start - pages.start) * self.page_bytes + clean) as u64;
            let to = self.home(run.start)? + clean as u64;
            let bytes = self.run_bytes(&run, &pages, filled) - clean;
            // SAFETY: the bytes lie within the run's pages on both sides, which are in use by the lane alone until the
            // ticket below is joined.
            unsafe { self.transfers.copy(stream, to, from, bytes)? };
        }
        let ticket = self.transfers.ticket(stream)?;
        self.lanes[lane].free = Some(ticket);
        Ok(ticket)
    }

    fn lane(&self, lane: usize) -> Option<Stream> {
        self.lanes.get(lane).map(|lane| lane.stream)
    }
}

impl Drop for PinnedPages {
    fn drop(&mut self) {
        let gpu = self.gpu();
        let mut freed = self.close_lanes().and_then(|()| gpu.synchronize_all());
        if let Ok(memory) = gpu.memory() {
            for block in std::mem::take(&mut self.frames).into_values() {
                memory.free(block, stream_id(gpu.stream()));
            }
        }
        for base in self.slabs.values() {
            // SAFETY: the memory came from `cuMemHostAlloc`; the whole device was waited for, so nothing uses it.
            let status = unsafe { sys::cuMemFreeHost(std::ptr::with_exposed_provenance_mut(*base as usize)) };
            freed = freed.and(check("cuMemFreeHost", status));
        }
        let streams = [self.inward, self.outward].into_iter().chain(self.lanes.iter().map(|lane| lane.stream));
        streams.for_each(|stream| stream.retire(gpu));
        gpu.record_error(freed);
    }
}
