//! Memory: who holds how much, and host blocks that are used again.
//!
//! Every host tensor's storage comes from here; a GPU has its own [allocator](crate::allocator). Bytes in use and their peak are counted by [`Tag`]. Freed blocks of some
//! size are kept and handed out again, because giving them back to the system and faulting them in anew costs a
//! training step more than a tenth of its time.

use crate::{
    Device, Result,
    cuda::{DeviceMemory, Gpu},
    pager::Lease,
};
use bytemuck::{Pod, Zeroable};
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

/// What memory is held for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tag {
    /// Frozen base weights.
    Weights,
    /// Trainable parameters.
    Adapters,
    /// Accumulated gradients of trainable parameters.
    Gradients,
    /// Optimizer state.
    Optimizer,
    /// What the forward pass keeps for the backward pass, and the residual stream.
    Activations,
    /// Scratch that an operation frees before it returns, and gradients on their way.
    Workspace,
}

impl Tag {
    /// All tags, in the order of reports.
    pub const ALL: [Tag; 6] =
        [Tag::Weights, Tag::Adapters, Tag::Gradients, Tag::Optimizer, Tag::Activations, Tag::Workspace];
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tag::Weights => "weights",
            Tag::Adapters => "adapters",
            Tag::Gradients => "gradients",
            Tag::Optimizer => "optimizer",
            Tag::Activations => "activations",
            Tag::Workspace => "workspace",
        })
    }
}

/// Bytes held, by tag and in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes now in use, indexed as [`Tag::ALL`].
    pub current: [usize; 6],
    /// The most bytes each tag ever held at once.
    pub peak: [usize; 6],
    /// Bytes now in use by all tags together.
    pub total: usize,
    /// The most bytes ever in use at once.
    pub total_peak: usize,
    /// Bytes of freed blocks that are kept for reuse.
    pub cached: usize,
}

impl Usage {
    /// Counts `bytes` more under `tag`.
    pub fn hold(&mut self, tag: Tag, bytes: usize) {
        let slot = tag as usize;
        self.current[slot] += bytes;
        self.peak[slot] = self.peak[slot].max(self.current[slot]);
        self.total += bytes;
        self.total_peak = self.total_peak.max(self.total);
    }

    /// Counts `bytes` less under `tag`.
    pub fn release(&mut self, tag: Tag, bytes: usize) {
        self.current[tag as usize] -= bytes;
        self.total -= bytes;
    }

    /// Counts `bytes` under `to` that were counted under `from`.
    pub(crate) fn retag(&mut self, from: Tag, to: Tag, bytes: usize) {
        self.release(from, bytes);
        self.hold(to, bytes);
    }

    /// Sets the peaks to what is in use now.
    pub(crate) fn reset_peak(&mut self) {
        self.peak = self.current;
        self.total_peak = self.total;
    }
}

/// Bytes as text, in powers of 1024.
pub fn readable(bytes: usize) -> String {
    let scaled = |shift: u32, unit| format!("{:.1} {unit}", bytes as f64 / f64::from(1u32 << shift));
    match bytes {
        0..0x400 => format!("{bytes} B"),
        0x400..0x10_0000 => scaled(10, "KiB"),
        0x10_0000..0x4000_0000 => scaled(20, "MiB"),
        _ => scaled(30, "GiB"),
    }
}

/// Blocks smaller than this go straight back to the system allocator, which is good at them.
const REUSED_FROM: usize = 64 << 10;

/// The unit of allocation: a cache line, so that every tensor starts aligned for vector loads.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

struct Pool {
    usage: Usage,
    /// Freed blocks by length in lines.
    free: BTreeMap<usize, Vec<Vec<Line>>>,
}

static POOL: Mutex<Pool> = Mutex::new(Pool {
    usage: Usage { current: [0; 6], peak: [0; 6], total: 0, total_peak: 0, cached: 0 },
    free: BTreeMap::new(),
});

fn pool() -> std::sync::MutexGuard<'static, Pool> {
    // The counters are consistent between statements, so a panic elsewhere leaves nothing half-changed.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A kept block of at least `lines` that wastes at most a quarter.
    fn take(&mut self, lines: usize) -> Option<Vec<Line>> {
        let (&size, blocks) = self.free.range_mut(lines..=lines + lines / 4).next()?;
        let block = blocks.pop();
        if blocks.is_empty() {
            self.free.remove(&size);
        }
        self.usage.cached -= size * size_of::<Line>();
        block
    }

    /// Drops kept blocks, largest first, until at most `keep` bytes of them are left.
    fn trim(&mut self, keep: usize) {
        while self.usage.cached > keep {
            let Some(mut entry) = self.free.last_entry() else { return };
            self.usage.cached -= entry.key() * size_of::<Line>();
            entry.get_mut().pop();
            if entry.get().is_empty() {
                entry.remove();
            }
        }
    }
}

/// What is held now, and at most so far.
pub fn usage() -> Usage {
    pool().usage
}

/// [`usage`] of a device's memory.
pub fn usage_of(device: Device) -> Usage {
    match device {
        Device::Cpu => usage(),
        Device::Cuda(_) => on_gpu(device).map_or_else(Usage::default, DeviceMemory::usage),
    }
}

/// [`reset_peak`] of a device's memory.
pub fn reset_peak_of(device: Device) {
    match device {
        Device::Cpu => reset_peak(),
        Device::Cuda(_) => on_gpu(device).into_iter().for_each(|memory| memory.lock().reset_peak()),
    }
}

/// [`trim`] of a device's memory.
///
/// # Errors
/// A kernel that ran before has failed, or the driver refuses.
pub fn trim_of(device: Device) -> Result<()> {
    match device {
        Device::Cpu => {
            trim();
            Ok(())
        }
        Device::Cuda(_) => on_gpu(device).map_or(Ok(()), |memory| memory.lock().trim()),
    }
}

/// The memory of a GPU, if that can be used.
fn on_gpu(device: Device) -> Option<&'static DeviceMemory> {
    Gpu::of(device).ok()?.memory().ok()
}

/// Sets the peaks to what is in use now.
pub fn reset_peak() {
    pool().usage.reset_peak();
}

/// Gives all kept blocks back to the system.
pub fn trim() {
    pool().trim(0);
}

/// A block of host memory, counted under a tag.
pub(crate) struct Buffer {
    lines: Vec<Line>,
    bytes: usize,
    tag: Tag,
}

impl Buffer {
    /// `bytes` of memory with unspecified (but initialized) contents.
    pub(crate) fn new(bytes: usize, tag: Tag) -> Self {
        let lines = bytes.div_ceil(size_of::<Line>());
        let mut pool = pool();
        pool.usage.hold(tag, bytes);
        let block = if bytes >= REUSED_FROM { pool.take(lines) } else { None };
        let block = block.unwrap_or_else(|| {
            // Nothing kept fits: a fresh block. What is kept takes up no more than once was in use besides: a training
            // step finds all of the last one's blocks, and the process does not grow beyond its peak.
            let keep = pool.usage.total_peak - pool.usage.total;
            pool.trim(keep);
            drop(pool);
            bytemuck::allocation::zeroed_vec(lines)
        });
        Buffer { lines: block, bytes, tag }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.bytes]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.bytes]
    }

    /// Counts the block under another tag from now on.
    pub(crate) fn set_tag(&mut self, tag: Tag) {
        pool().usage.retag(self.tag, tag, self.bytes);
        self.tag = tag;
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let block = std::mem::take(&mut self.lines);
        let mut pool = pool();
        pool.usage.release(self.tag, self.bytes);
        if self.bytes >= REUSED_FROM {
            pool.usage.cached += block.len() * size_of::<Line>();
            pool.free.entry(block.len()).or_default().push(block);
        }
    }
}

/// Host memory of the pager in use by a tensor.
pub(crate) struct HostPage {
    _lease: Arc<Lease>,
    address: u64,
    bytes: usize,
}

impl HostPage {
    /// # Safety
    /// As long as the lease lives, `address` is that of `bytes` initialized bytes that nobody else uses.
    pub(crate) unsafe fn new(lease: Arc<Lease>, address: u64, bytes: usize) -> Self {
        HostPage { _lease: lease, address, bytes }
    }

    fn pointer(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.address as usize)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the promise of `new`; the lease is held, and writers need `&mut self`.
        unsafe { std::slice::from_raw_parts(self.pointer(), self.bytes) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(), self.bytes) }
    }
}

/// Peak resident memory of this process in bytes, as the system counts it; `None` where it cannot be read.
pub fn process_peak() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok().map(|kib| kib << 10)
}

/// Host memory in bytes that new work can have, as the system estimates it; `None` where it does not.
pub fn available() -> Option<usize> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Other tests allocate at the same time, so these look only at what nobody else can change.

    #[test]
    fn a_freed_block_serves_the_next_request_of_its_size() {
        let bytes = (37 << 20) + 192;
        let first = Buffer::new(bytes, Tag::Optimizer);
        let address = first.bytes().as_ptr();
        assert_eq!(address as usize % 64, 0);
        drop(first);
        let second = Buffer::new(bytes - 4096, Tag::Optimizer);
        assert_eq!((second.bytes().as_ptr(), second.bytes().len()), (address, bytes - 4096));
    }

    #[test]
    fn bytes_as_people_write_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (3 << 20, "3.0 MiB"),
            (1 << 30, "1.0 GiB"),
            (5 << 40, "5120.0 GiB"),
        ] {
            assert_eq!(readable(bytes), text);
        }
    }

    #[test]
    fn counts_by_tag() {
        let slot = Tag::ALL.iter().position(|&tag| tag == Tag::Gradients).unwrap();
        assert_eq!(slot, Tag::Gradients as usize);
        let before = usage().current[slot];
        let mut buffer = Buffer::new(1000, Tag::Gradients);
        assert_eq!(usage().current[slot], before + 1000);
        assert!(usage().peak[slot] >= before + 1000);
        buffer.set_tag(Tag::Workspace);
        assert_eq!(usage().current[slot], before);
    }
}
