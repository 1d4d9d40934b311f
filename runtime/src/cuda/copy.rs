//! Copies between host and device, on the compute stream.
//!
//! Host bytes go through pinned staging memory in pieces, so that the caller's memory is free when the call returns and
//! the device is never waited for unless all pieces are under way. Under unified addressing one call copies from and to
//! anywhere.
//!
//! What is small is copied by a kernel, which reads or writes the staging memory across the bus. The copy engine would do
//! it behind all copies that any stream has been given, though they wait for something else; and the compute stream, or the
//! host, would wait with it.

use super::{Args, DeviceBuffer, Entry, Event, Gpu, Module, Stream, driver::check, gpu::lock};
use crate::Result;
use cudarc::driver::sys;
use rayon::prelude::*;
use std::ptr::NonNull;

/// The kernel of small copies, which is built with all others.
pub static COPY: Module = Module {
    name: "copy",
    ptx: include_str!("../../../kernels/ptx/copy.ptx"),
    entries: &[Entry { name: "copy_bytes", floats: false, params: &[8, 8, 4] }],
};

/// Bytes that a kernel copies rather than the copy engine.
const SMALL: usize = 256 << 10;
const THREADS: usize = 256;

/// Queues a copy of at most [`SMALL`] bytes on `stream`. False, and nothing queued, if the addresses are not aligned.
///
/// # Safety
/// Both addresses are the device's to use and have the bytes until the stream has done it, and nothing else writes them
/// meanwhile.
unsafe fn copy_small(gpu: &Gpu, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<bool> {
    if bytes > SMALL || !(to | from).is_multiple_of(4) {
        return Ok(false);
    }
    let blocks = (bytes / 4 + bytes % 4).div_ceil(THREADS) as u32;
    let args = Args::new().on(stream).u64(to).u64(from).u32(bytes as u32);
    gpu.launch(&COPY, "copy_bytes", [blocks, 1, 1], [THREADS as u32, 1, 1], 0, args)?;
    Ok(true)
}

/// Bytes of a piece of staging memory.
const PIECE: usize = 16 << 20;
/// Pieces: while the device reads some, the host fills others.
const PIECES: usize = 4;
/// Uploads start at multiples of this.
const ALIGN: usize = 64;
/// Copies into staging memory run in parallel in chunks of this many bytes.
const CHUNK: usize = 1 << 20;

/// Pinned host memory through which uploads go, made at the first one.
#[derive(Debug, Default)]
pub(super) struct Staging {
    pieces: Vec<Piece>,
    /// The piece being filled, and how far.
    current: usize,
    filled: usize,
    /// [`SMALL`] bytes that downloads come through.
    readback: Option<Pinned>,
}

/// Pinned host memory, filled with zeros, for the life of the process.
#[derive(Clone, Copy, Debug)]
struct Pinned(NonNull<u8>);

// SAFETY: pinned memory may be used from any thread; it is only touched under the lock of `Gpu::staging`.
unsafe impl Send for Pinned {}

fn pinned(bytes: usize) -> Result<Pinned> {
    let mut memory = std::ptr::null_mut();
    // SAFETY: the context is current (the callers'); the call writes one pointer.
    check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&mut memory, bytes, sys::CU_MEMHOSTALLOC_DEVICEMAP) })?;
    let memory: NonNull<u8> = NonNull::new(memory.cast())
        .ok_or_else(|| crate::Error::Cuda { op: "cuMemHostAlloc", what: "gave no memory".into() })?;
    // The driver hands out zeroed pages, but does not promise it.
    // SAFETY: the allocation has the bytes.
    unsafe { memory.as_ptr().write_bytes(0, bytes) };
    Ok(Pinned(memory))
}

#[derive(Debug)]
struct Piece {
    memory: Pinned,
    /// Streams that read the piece, each with a mark that is reached when it has.
    read: Vec<(Stream, Event)>,
}

impl Piece {
    /// Notes that what `stream` has been given so far reads the piece.
    fn read_by(&mut self, gpu: &'static Gpu, stream: Stream) -> Result<()> {
        if let Some((_, mark)) = self.read.iter().find(|(by, _)| *by == stream) {
            return mark.record(stream);
        }
        let mark = Event::new(gpu, false)?;
        mark.record(stream)?;
        self.read.push((stream, mark));
        Ok(())
    }
}

impl Staging {
    /// The rest of the current piece, moving on to the next one if less than `wanted` (at most [`PIECE`]) is left.
    fn room(&mut self, wanted: usize) -> Result<&mut [u8]> {
        if self.pieces.is_empty() {
            for _ in 0..PIECES {
                self.pieces.push(Piece { memory: pinned(PIECE)?, read: Vec::new() });
            }
        }
        if self.filled + wanted.min(PIECE) > PIECE {
            self.current = (self.current + 1) % PIECES;
            self.filled = 0;
            self.pieces[self.current].read.drain(..).try_for_each(|(_, mark)| mark.wait())?;
        }
        let piece = &self.pieces[self.current];
        // SAFETY: the piece has PIECE initialized bytes, lives as long as the process, is only reached through this
        // exclusive borrow, and the device has finished reading what was in it (waited for above).
        Ok(unsafe { std::slice::from_raw_parts_mut(piece.memory.0.as_ptr().add(self.filled), PIECE - self.filled) })
    }
}

/// Copies `bytes` into `target` from `offset` on. Does not wait for the device while staging memory is free.
pub(crate) fn upload(target: &mut DeviceBuffer, offset: usize, bytes: &[u8]) -> Result<()> {
    upload_on(target.gpu().stream(), target, offset, bytes)
}

/// As [`upload`], on another stream, which first waits for what the compute stream has been given: the target may have been
/// others' until then.
pub(crate) fn upload_on(stream: Stream, target: &mut DeviceBuffer, offset: usize, bytes: &[u8]) -> Result<()> {
    let gpu = target.gpu();
    gpu.bind()?;
    if stream != gpu.stream() {
        let given = Event::new(gpu, false)?;
        given.record(gpu.stream())?;
        given.hold(stream)?;
    }
    target.ready(stream)?;
    let mut staging = lock(&gpu.staging);
    let mut done = 0;
    while done < bytes.len() {
        let room = staging.room((bytes.len() - done).min(PIECE))?;
        let count = room.len().min(bytes.len() - done);
        let (room, part) = (&mut room[..count], &bytes[done..done + count]);
        if count <= CHUNK {
            room.copy_from_slice(part);
        } else {
            room.par_chunks_mut(CHUNK).zip(part.par_chunks(CHUNK)).for_each(|(room, part)| room.copy_from_slice(part));
        }
        let to = target.pointer() + (offset + done) as u64;
        let from = room.as_ptr().expose_provenance() as u64;
        // SAFETY: `room` is pinned memory that stays as it is until the event recorded behind this copy is reached; the
        // target has the bytes (the caller's offset and length are within its tensor).
        if !unsafe { copy_small(gpu, stream, to, from, count)? } {
            // SAFETY: as above.
            check("cuMemcpyAsync", unsafe { sys::cuMemcpyAsync(to, from, count, stream.0) })?;
        }
        let current = staging.current;
        staging.pieces[current].read_by(gpu, stream)?;
        staging.filled = (staging.filled + count).next_multiple_of(ALIGN).min(PIECE);
        done += count;
    }
    Ok(())
}

/// Copies from `source` at `offset` into `bytes`, waiting for the compute stream.
pub(crate) fn download(source: &DeviceBuffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
    let gpu = source.gpu();
    gpu.bind()?;
    if !bytes.is_empty() {
        source.ready(gpu.stream())?;
        let from = source.pointer() + offset as u64;
        if bytes.len() <= SMALL {
            let mut staging = lock(&gpu.staging);
            let through = match staging.readback {
                Some(through) => through,
                None => *staging.readback.insert(pinned(SMALL)?),
            };
            let to = through.0.as_ptr().expose_provenance() as u64;
            // SAFETY: the source has the bytes (the caller's offset and length are within its tensor); the target has SMALL,
            // and the lock is held until the copy has been waited for.
            if unsafe { copy_small(gpu, gpu.stream(), to, from, bytes.len())? } {
                gpu.synchronize()?;
                // SAFETY: as above; the device is done writing it.
                bytes.copy_from_slice(unsafe { std::slice::from_raw_parts(through.0.as_ptr(), bytes.len()) });
                return Ok(());
            }
        }
        // SAFETY: the source has the bytes (the caller's offset and length are within its tensor), the target is
        // borrowed exclusively, and the stream is waited for before the borrow ends.
        let to = bytes.as_mut_ptr().expose_provenance() as u64;
        let status = unsafe { sys::cuMemcpyAsync(to, from, bytes.len(), gpu.stream().0) };
        check("cuMemcpyAsync", status)?;
    }
    gpu.synchronize()
}

/// Copies `count` bytes from `source` at `from` into `target` at `to`, both on one GPU.
pub(crate) fn copy(
    target: &mut DeviceBuffer,
    to: usize,
    source: &DeviceBuffer,
    from: usize,
    count: usize,
) -> Result<()> {
    let gpu = target.gpu();
    gpu.bind()?;
    if count == 0 {
        return Ok(());
    }
    target.ready(gpu.stream())?;
    source.ready(gpu.stream())?;
    let (to, from) = (target.pointer() + to as u64, source.pointer() + from as u64);
    // SAFETY: both ranges lie within their tensors (the callers' offsets), and the target is borrowed exclusively.
    check("cuMemcpyAsync", unsafe { sys::cuMemcpyAsync(to, from, count, gpu.stream().0) })
}
