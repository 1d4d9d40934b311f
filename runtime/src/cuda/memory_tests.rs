//! The allocator on a GPU: the traces of the simulated device, with patterns written and read.

use super::{Event, Gpu, GpuEvents, GpuSpace, Stream, device_for_tests, driver::check, space::stream_id};
use crate::{
    DType, Device, Error, Tag, Tensor,
    allocator::{
        Allocator, Block,
        tests::{Op, traces},
    },
    memory::usage_of,
};
use cudarc::driver::sys;
use proptest::{prelude::*, test_runner::TestRunner};

const STREAMS: usize = 2;

struct Held {
    block: Block,
    stream: usize,
    pattern: u32,
}

/// An allocator with addresses of its own, so that other tests are not in the way.
struct Rig {
    gpu: &'static Gpu,
    allocator: Allocator<GpuSpace, GpuEvents>,
    streams: Vec<Stream>,
    live: Vec<Held>,
    written: u32,
}

impl Rig {
    fn new(gpu: &'static Gpu, streams: &[Stream]) -> Self {
        let allocator = Allocator::new(gpu.device(), GpuSpace::new(gpu).unwrap(), GpuEvents(gpu));
        Rig { gpu, allocator, streams: streams.to_vec(), live: vec![], written: 0 }
    }

    fn fill(&self, block: &Block, stream: usize, pattern: u32) {
        let (words, stream) = (block.bytes() / 4, self.streams[stream]);
        // SAFETY: the block has these bytes and is used in the order of its stream.
        let status = unsafe { sys::cuMemsetD32Async(block.address(), pattern, words, stream.0) };
        check("cuMemsetD32Async", status).unwrap();
    }

    /// Reads a block behind what its stream was given.
    fn verify(&self, held: &Held) {
        let mut words = vec![0u32; held.block.bytes() / 4];
        let stream = self.streams[held.stream];
        // SAFETY: the block has these bytes, and the stream is waited for before the vector is looked at.
        let (copied, waited) = unsafe {
            (
                sys::cuMemcpyDtoHAsync_v2(
                    words.as_mut_ptr().cast(),
                    held.block.address(),
                    held.block.bytes(),
                    stream.0,
                ),
                sys::cuStreamSynchronize(stream.0),
            )
        };
        check("cuMemcpyDtoHAsync", copied).unwrap();
        check("cuStreamSynchronize", waited).unwrap();
        let wrong = words.iter().position(|&word| word != held.pattern);
        assert_eq!(wrong.map(|at| (at, words[at])), None, "block {:?} of {:#x}", held.block, held.pattern);
    }

    fn free(&mut self, index: usize, stream: Option<usize>, verify: bool) {
        if self.live.is_empty() {
            return;
        }
        let held = self.live.swap_remove(index % self.live.len());
        if verify {
            self.verify(&held);
        }
        let stream = stream.filter(|&stream| stream != held.stream);
        if let Some(stream) = stream {
            let event = Event::new(self.gpu, false).unwrap();
            event.record(self.streams[held.stream]).unwrap();
            event.hold(self.streams[stream]).unwrap();
        }
        // Late writes: whoever gets the block too early has them in it.
        let last = stream.unwrap_or(held.stream);
        for _ in 0..4 {
            self.fill(&held.block, last, 0xDEAD_0000);
        }
        self.allocator.free(held.block, stream_id(self.streams[last]));
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Allocate { bytes, tag, stream } => {
                match self.allocator.allocate(bytes, tag, stream_id(self.streams[stream])) {
                    Ok(block) => {
                        self.written += 1;
                        let pattern = self.written;
                        self.fill(&block, stream, pattern);
                        self.live.push(Held { block, stream, pattern });
                    }
                    Err(Error::OutOfMemory(_)) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            Op::Free { index, stream } => self.free(index, stream, index % 3 == 0),
            Op::SetTag { index, tag } if !self.live.is_empty() => {
                let index = index % self.live.len();
                self.allocator.set_tag(&mut self.live[index].block, tag);
            }
            Op::Limit(limit) => self.allocator.set_limit(Some(limit.unwrap_or(usize::MAX).min(512 << 20))).unwrap(),
            Op::Trim => self.allocator.trim().unwrap(),
            Op::ResetPeak => self.allocator.reset_peak(),
            Op::SetTag { .. } | Op::Advance { .. } => {}
        }
        self.allocator.check(self.live.iter().map(|held| &held.block));
    }
}

#[test]
fn gpu_blocks_keep_what_was_written() {
    let Some(device) = device_for_tests() else { return };
    let gpu = Gpu::of(device).unwrap();
    gpu.bind().unwrap();
    let mut other = std::ptr::null_mut();
    // SAFETY: the context is current; the call writes one handle.
    let status = unsafe { sys::cuStreamCreate(&mut other, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32) };
    check("cuStreamCreate", status).unwrap();
    let streams = [gpu.stream(), Stream(other)];
    let config = ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() };
    let result = TestRunner::new(config).run(&traces(192 << 20, STREAMS, 120), |trace| {
        let mut rig = Rig::new(gpu, &streams);
        rig.allocator.set_limit(Some(512 << 20)).unwrap();
        for op in trace {
            rig.step(op);
        }
        while !rig.live.is_empty() {
            rig.free(0, None, true);
        }
        rig.allocator.trim().unwrap();
        prop_assert_eq!((rig.allocator.mapped(), rig.allocator.usage().total), (0, 0));
        Ok(())
    });
    gpu.synchronize().unwrap();
    if let Err(error) = result {
        panic!("{error}");
    }
}

/// Memory that was free in pieces serves as one block after it moved, and the device reads and writes it there.
#[test]
fn gpu_memory_moves() {
    let Some(device) = device_for_tests() else { return };
    let gpu = Gpu::of(device).unwrap();
    gpu.bind().unwrap();
    let mut rig = Rig::new(gpu, &[gpu.stream()]);
    let piece = 32 << 20;
    rig.allocator.set_limit(Some(8 * piece)).unwrap();
    for _ in 0..8 {
        rig.step(Op::Allocate { bytes: piece, tag: Tag::Weights, stream: 0 });
    }
    assert_eq!((rig.live.len(), rig.allocator.mapped()), (8, 8 * piece));
    // No two of these lie side by side.
    for index in [6, 4, 2] {
        rig.free(index, None, true);
    }
    rig.step(Op::Allocate { bytes: 3 * piece, tag: Tag::Activations, stream: 0 });
    assert_eq!((rig.live.len(), rig.allocator.mapped()), (6, 8 * piece));
    while !rig.live.is_empty() {
        rig.free(0, None, true);
    }
}

/// Tensors are counted by tag, and one that is larger than the card is an error with a table, after which the GPU works.
#[test]
fn gpu_tensors_are_counted_and_can_be_refused() {
    let Some(device) = device_for_tests() else { return };
    // No other test of this program holds memory under this tag.
    let held = || usage_of(device).current[Tag::Gradients as usize];
    let before = held();
    let tensor = Tensor::zeros(&[1000], DType::F32, device, Tag::Gradients).unwrap();
    assert_eq!(held(), before + 4096);
    let tensor = tensor.retag(Tag::Adapters);
    assert_eq!(held(), before);
    let error = Tensor::empty(&[1 << 44], DType::F32, device, Tag::Gradients).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory(_)), "{error}");
    assert!(error.to_string().contains("What helps"), "{error}");
    assert_eq!(held(), before);
    let host = tensor.to_device(Device::Cpu, Tag::Workspace).unwrap();
    assert!(host.as_slice::<f32>().unwrap().iter().all(|&x| x == 0.0));
    let empty = Tensor::zeros(&[0, 7], DType::F32, device, Tag::Workspace).unwrap();
    assert_eq!(empty.to_device(Device::Cpu, Tag::Workspace).unwrap().numel(), 0);
}
