use super::{
    simulated::{Space, Streams, World},
    *,
};
use proptest::prelude::*;
use std::{
    cell::RefCell,
    ops::Range,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Simulated pages of 4 KiB, so that a piece is 64 KiB.
const GRANULE: usize = 4096;
const PIECE: usize = GRANULE * GRANULES_PER_PIECE;
const STREAMS: usize = 3;

/// One line of a trace. Indices are taken modulo the live blocks.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Allocate {
        bytes: usize,
        tag: Tag,
        stream: usize,
    },
    /// On the stream that it was allocated for, or another one that waits for that.
    Free {
        index: usize,
        stream: Option<usize>,
    },
    SetTag {
        index: usize,
        tag: Tag,
    },
    Advance {
        stream: usize,
        count: u64,
    },
    Limit(Option<usize>),
    ResetPeak,
    Trim,
}

/// Traces over blocks of up to `largest` bytes, most of them small.
pub(crate) fn traces(largest: usize, streams: usize, length: usize) -> impl Strategy<Value = Vec<Op>> {
    let bytes = prop_oneof![4 => 0..largest / 64, 3 => 0..largest / 8, 1 => 0..largest];
    let tag = || prop::sample::select(&Tag::ALL[..]);
    let op = prop_oneof![
        12 => (bytes, tag(), 0..streams).prop_map(|(bytes, tag, stream)| Op::Allocate { bytes, tag, stream }),
        9 => (any::<usize>(), prop::option::weighted(0.2, 0..streams))
            .prop_map(|(index, stream)| Op::Free { index, stream }),
        1 => (any::<usize>(), tag()).prop_map(|(index, tag)| Op::SetTag { index, tag }),
        4 => (0..streams, 1..8u64).prop_map(|(stream, count)| Op::Advance { stream, count }),
        1 => prop::option::of(0..2 * largest).prop_map(Op::Limit),
        1 => Just(Op::ResetPeak),
        1 => Just(Op::Trim),
    ];
    prop::collection::vec(op, 1..length)
}

/// An allocator on a simulated device, and what it should be like.
struct Model {
    world: Rc<RefCell<World>>,
    allocator: Allocator<Space, Streams>,
    live: Vec<(Block, usize)>,
    current: [usize; 6],
    peak: [usize; 6],
    total_peak: usize,
    limit: Option<usize>,
}

fn allocator(world: &Rc<RefCell<World>>) -> Allocator<Space, Streams> {
    Allocator::new(Device::Cuda(0), Space(world.clone()), Streams(world.clone()))
}

fn range(block: &Block) -> Range<usize> {
    block.offset..block.offset + block.bytes
}

impl Model {
    fn new(capacity: usize, streams: usize) -> Self {
        let world = World::new(GRANULE, capacity, 64 * capacity, streams);
        let allocator = allocator(&world);
        Model { world, allocator, live: vec![], current: [0; 6], peak: [0; 6], total_peak: 0, limit: None }
    }

    fn total(&self) -> usize {
        self.current.iter().sum()
    }

    fn hold(&mut self, tag: Tag, bytes: usize) {
        self.current[tag as usize] += bytes;
        self.peak[tag as usize] = self.peak[tag as usize].max(self.current[tag as usize]);
        self.total_peak = self.total_peak.max(self.total());
    }

    /// Bytes of pieces that hold live blocks, which cannot be moved.
    fn pinned(&self) -> usize {
        let used = |&(offset, bytes): &(usize, usize)| {
            self.live.iter().any(|(block, _)| block.offset < offset + bytes && offset < block.offset + block.bytes)
        };
        self.allocator.blocks.pieces().filter(used).map(|(_, bytes)| bytes).sum()
    }

    fn allocate(&mut self, bytes: usize, tag: Tag, stream: usize) -> Result<()> {
        let room = self.world.borrow().capacity.min(self.limit.unwrap_or(usize::MAX));
        let pinned = self.pinned();
        match self.allocator.allocate(bytes, tag, StreamId(stream)) {
            Ok(block) => {
                assert!(block.bytes >= bytes && block.bytes < bytes + 2 * ALIGN);
                assert!(block.address.is_multiple_of(ALIGN as u64));
                assert!(self.world.borrow().backs(&range(&block)));
                self.world.borrow_mut().kernel(stream, range(&block));
                self.hold(tag, block.bytes);
                self.live.push((block, stream));
                Ok(())
            }
            Err(error) => {
                // Only where memory that can be had does not suffice (or a map call failed without reason).
                let Error::OutOfMemory(report) = &error else { panic!("{error}") };
                assert_eq!((report.requested, report.tag, report.usage.current), (bytes, tag, self.current));
                if bytes <= self.allocator.space.reserved() {
                    assert_eq!(self.allocator.mapped(), pinned, "what is of no use was not given back");
                }
                if self.world.borrow().faults.is_none() {
                    let need = bytes.next_multiple_of(GRANULE);
                    assert!(pinned + need > room, "{bytes} bytes fail with {pinned} of {room} in use: {report:?}");
                }
                Err(error)
            }
        }
    }

    fn free(&mut self, index: usize, stream: Option<usize>) {
        if self.live.is_empty() {
            return;
        }
        let (block, user) = self.live.swap_remove(index % self.live.len());
        let mut world = self.world.borrow_mut();
        world.kernel(user, range(&block));
        let stream = stream.unwrap_or(user);
        if stream != user {
            world.join(stream, user);
            world.kernel(stream, range(&block));
        }
        drop(world);
        self.current[block.tag as usize] -= block.bytes;
        self.allocator.free(block, StreamId(stream));
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Allocate { bytes, tag, stream } => drop(self.allocate(bytes, tag, stream)),
            Op::Free { index, stream } => self.free(index, stream),
            Op::SetTag { index, tag } if !self.live.is_empty() => {
                let index = index % self.live.len();
                let block = &mut self.live[index].0;
                let (from, bytes) = (block.tag, block.bytes);
                self.allocator.set_tag(block, tag);
                self.current[from as usize] -= bytes;
                self.hold(tag, bytes);
            }
            Op::SetTag { .. } => {}
            Op::Advance { stream, count } => self.world.borrow_mut().advance(stream, count),
            Op::Limit(limit) => {
                self.limit = limit;
                self.allocator.set_limit(limit).unwrap();
                let allowed = limit.unwrap_or(usize::MAX).max(self.pinned());
                assert!(self.allocator.mapped() <= allowed, "{} > {allowed}", self.allocator.mapped());
            }
            Op::ResetPeak => {
                self.allocator.reset_peak();
                (self.peak, self.total_peak) = (self.current, self.total());
            }
            Op::Trim => {
                self.allocator.trim().unwrap();
                assert_eq!(self.allocator.mapped(), self.pinned());
            }
        }
    }

    fn check(&self) {
        self.allocator.check(self.live.iter().map(|(block, _)| block));
        let world = self.world.borrow();
        assert_eq!(self.allocator.mapped(), world.mapped());
        assert!(self.allocator.mapped() <= world.capacity);
        let usage = self.allocator.usage();
        assert_eq!((usage.current, usage.total), (self.current, self.total()));
        assert_eq!((usage.peak, usage.total_peak), (self.peak, self.total_peak));
        assert_eq!(usage.cached, world.mapped() - usage.total);
    }

    fn run(&mut self, trace: Vec<Op>) {
        for op in trace {
            self.step(op);
            self.check();
        }
        // Nothing leaks, and nothing stays cut.
        while !self.live.is_empty() {
            self.free(0, None);
        }
        self.check();
        self.allocator.settle_all().unwrap();
        let neighbours = self.allocator.blocks.count();
        let mut pieces: Vec<_> = self.allocator.blocks.pieces().collect();
        pieces.dedup_by(|next, last| {
            let joins = last.0 + last.1 == next.0;
            last.1 += if joins { next.1 } else { 0 };
            joins
        });
        assert_eq!(neighbours, pieces.len(), "one free block for each stretch of backed addresses");
        self.allocator.trim().unwrap();
        assert_eq!((self.allocator.mapped(), self.world.borrow().mapped()), (0, 0));
        self.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn traces_with_room(trace in traces(40 * PIECE, STREAMS, 150)) {
        Model::new(1000 * PIECE, STREAMS).run(trace);
    }

    #[test]
    fn traces_at_the_edge(trace in traces(24 * PIECE, STREAMS, 250), granules in 1..500usize) {
        Model::new(granules * GRANULE, STREAMS).run(trace);
    }

    #[test]
    fn traces_of_one_stream(trace in traces(24 * PIECE, 1, 250), granules in 1..400usize) {
        Model::new(granules * GRANULE, 1).run(trace);
    }

    #[test]
    fn traces_where_map_calls_fail(trace in traces(24 * PIECE, STREAMS, 200), every in 1..6u64) {
        let mut model = Model::new(300 * GRANULE, STREAMS);
        model.world.borrow_mut().faults = Some(every);
        model.run(trace);
    }

    /// A loop that repeats itself asks the device for nothing after its first round, and with one stream makes no marks.
    #[test]
    fn repeated_work_is_served_from_what_is_kept(sizes in prop::collection::vec(1..6 * PIECE, 1..60), seed: u64) {
        let mut model = Model::new(1 << 30, 1);
        let mut after_first = 0;
        for round in 0..4 {
            // The same allocations and frees each round, interleaved by the seed.
            let mut coin = seed | 1;
            for &bytes in &sizes {
                model.allocate(bytes, Tag::Activations, 0).unwrap();
                coin = coin.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17);
                if coin % 3 == 0 {
                    model.free(coin as usize, None);
                }
            }
            while !model.live.is_empty() {
                model.free(model.live.len() - 1, None);
            }
            let world = model.world.borrow();
            prop_assert_eq!((world.marks, world.synchronized, world.unmaps, world.moves), (0, 0, 0, 0));
            if round > 0 {
                prop_assert_eq!(world.maps, after_first, "round {}", round);
            }
            after_first = world.maps;
        }
        prop_assert_eq!(model.allocator.blocks.count(), 1);
    }
}

#[test]
fn memory_is_moved_to_where_it_is_needed() {
    let mut model = Model::new(4 * PIECE, 1);
    for _ in 0..4 {
        model.allocate(PIECE, Tag::Weights, 0).unwrap();
    }
    // Two pieces are free and apart; a block of two pieces takes both.
    model.free(2, None);
    model.free(0, None);
    model.allocate(2 * PIECE, Tag::Activations, 0).unwrap();
    model.check();
    assert_eq!((model.world.borrow().moves, model.world.borrow().unmaps), (2, 0));
    assert_eq!(model.allocator.mapped(), 4 * PIECE);
}

#[test]
fn near_the_end_no_more_is_mapped_than_needed() {
    let mut model = Model::new(PIECE + 3 * GRANULE, 1);
    model.allocate(100, Tag::Weights, 0).unwrap();
    assert_eq!(model.allocator.mapped(), PIECE);
    model.allocate(PIECE, Tag::Weights, 0).unwrap();
    assert_eq!(model.allocator.mapped(), PIECE + GRANULE, "100 bytes and a piece");
    model.allocate(2 * GRANULE, Tag::Weights, 0).unwrap();
    model.check();
}

#[test]
fn another_stream_waits_on_the_device_and_not_the_host() {
    let mut model = Model::new(PIECE, 2);
    model.allocate(PIECE, Tag::Workspace, 0).unwrap();
    model.free(0, None);
    model.allocate(GRANULE, Tag::Workspace, 1).unwrap();
    let world = model.world.borrow();
    assert_eq!((world.synchronized, world.maps), (0, 3), "a piece, and what is needed, cannot be had");
    assert!(world.marks > 0);
}

#[test]
fn another_stream_takes_over_what_is_known_to_be_done() {
    let mut model = Model::new(8 * PIECE, 2);
    model.allocate(PIECE, Tag::Workspace, 0).unwrap();
    model.free(0, None);
    // The first request finds it pending, and leaves a mark.
    model.allocate(PIECE, Tag::Workspace, 1).unwrap();
    model.world.borrow_mut().advance(0, 100);
    let maps = model.world.borrow().maps;
    model.allocate(PIECE, Tag::Workspace, 1).unwrap();
    assert_eq!((model.world.borrow().maps, model.world.borrow().marks), (maps, 1));
}

#[test]
fn a_mark_does_not_cover_what_its_stream_took_over_later() {
    let (owner, taker, third) = (0, 1, 2);
    let mut model = Model::new(5 * PIECE, 3);
    for stream in [taker, owner, owner, owner] {
        model.allocate(PIECE, Tag::Workspace, stream).unwrap();
    }
    // Addresses: free of the taker, free of the owner, in use, free of the owner.
    for index in [0, 0, 1] {
        model.free(index, None);
    }
    // Leaves marks in both streams; the taker's is reached, the owner is far behind.
    model.allocate(PIECE, Tag::Workspace, third).unwrap();
    model.world.borrow_mut().advance(taker, 100);
    model.allocate(2 * PIECE, Tag::Workspace, taker).unwrap();
    assert_eq!(model.world.borrow().synchronized, 0);
    // The referee of the simulated device sees whether this one waits for the owner.
    model.allocate(PIECE, Tag::Workspace, third).unwrap();
    model.check();
    assert_eq!(model.world.borrow().synchronized, 0);
}

fn report(result: Result<Block>) -> OutOfMemory {
    match result {
        Err(Error::OutOfMemory(report)) => *report,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_reclaim_hook_is_called_when_nothing_else_is_left() {
    let world = World::new(GRANULE, 8 * PIECE, 64 * PIECE, 2);
    let memory = Memory::new(allocator(&world));
    // The simulated device stays on this thread, and so does the hook, which only promises that it need not.
    thread_local!(static DEVICE: RefCell<Option<Rc<RefCell<World>>>> = const { RefCell::new(None) });
    DEVICE.set(Some(world.clone()));
    let (called, gives, promises) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let state = Arc::new((called, gives, promises));
    let (called, gives, promises) = (&state.0, &state.1, &state.2);
    let shared = state.clone();
    memory.set_reclaim(Arc::new(move |wanted| {
        let (called, gives, promises) = &*shared;
        called.fetch_add(wanted, Ordering::Relaxed);
        let given = gives.load(Ordering::Relaxed);
        DEVICE.with_borrow(|device| device.iter().for_each(|world| world.borrow_mut().capacity += given));
        given + promises.load(Ordering::Relaxed)
    }));
    let one = memory.allocate(5 * PIECE, Tag::Weights, StreamId(0)).unwrap();
    memory.free(one, StreamId(0));
    // Kept memory of the other stream serves: no call.
    let one = memory.allocate(6 * PIECE, Tag::Weights, StreamId(1)).unwrap();
    assert_eq!(called.load(Ordering::Relaxed), 0);
    // Nothing is left and the hook has nothing.
    let failed = report(memory.allocate(3 * PIECE, Tag::Optimizer, StreamId(0)));
    assert_eq!((failed.requested, called.swap(0, Ordering::Relaxed)), (3 * PIECE, 3 * PIECE));
    // The hook gives what is missing.
    gives.store(PIECE, Ordering::Relaxed);
    let two = memory.allocate(3 * PIECE, Tag::Optimizer, StreamId(0)).unwrap();
    assert_eq!(called.swap(0, Ordering::Relaxed), 3 * PIECE);
    // A hook that promises too much does not hang.
    gives.store(0, Ordering::Relaxed);
    promises.store(PIECE, Ordering::Relaxed);
    report(memory.allocate(PIECE, Tag::Optimizer, StreamId(0)));
    assert!(called.swap(0, Ordering::Relaxed) > PIECE);
    // Nor is it asked when it has been taken back, by who set it and nobody else.
    let hook: Reclaim = Arc::new(|_| 0);
    memory.unset_reclaim(&hook);
    report(memory.allocate(PIECE, Tag::Optimizer, StreamId(0)));
    assert!(called.swap(0, Ordering::Relaxed) > 0);
    memory.set_reclaim(Arc::clone(&hook));
    memory.unset_reclaim(&hook);
    report(memory.allocate(PIECE, Tag::Optimizer, StreamId(0)));
    assert_eq!(called.load(Ordering::Relaxed), 0);
    // Nor about a failure that was asked for.
    memory.free(two, StreamId(0));
    memory.lock().fail_at(Some(1));
    assert!(report(memory.allocate(512, Tag::Optimizer, StreamId(0))).injected);
    assert_eq!(called.load(Ordering::Relaxed), 0);
    memory.free(one, StreamId(1));
    memory.lock().trim().unwrap();
    assert_eq!(world.borrow().mapped(), 0);
}

#[test]
fn a_hook_may_free_blocks() {
    let world = World::new(GRANULE, 8 * PIECE, 64 * PIECE, 1);
    // Blocks of the simulated device stay on this thread, so the hook hands them over by a scoped cell.
    type Held = Vec<(Rc<Memory<Space, Streams>>, Block)>;
    thread_local!(static HELD: RefCell<Held> = const { RefCell::new(Vec::new()) });
    let memory = Rc::new(Memory::new(allocator(&world)));
    let block = memory.allocate(8 * PIECE, Tag::Optimizer, StreamId(0)).unwrap();
    HELD.with_borrow_mut(|held| held.push((memory.clone(), block)));
    memory.set_reclaim(Arc::new(|_| {
        HELD.with_borrow_mut(|held| {
            held.drain(..)
                .map(|(memory, block)| {
                    let bytes = block.bytes();
                    memory.free(block, StreamId(0));
                    bytes
                })
                .sum()
        })
    }));
    let block = memory.allocate(2 * PIECE, Tag::Activations, StreamId(0)).unwrap();
    assert_eq!(memory.usage().total, 2 * PIECE);
    memory.free(block, StreamId(0));
}

#[test]
fn the_hook_is_asked_again_where_what_it_gave_lies_apart() {
    let world = World::new(GRANULE, 8 * PIECE, 64 * PIECE, 1);
    type Held = (Rc<Memory<Space, Streams>>, Vec<Block>);
    thread_local!(static HELD: RefCell<Option<Held>> = const { RefCell::new(None) });
    let memory = Rc::new(Memory::new(allocator(&world)));
    let halves = (0..16).map(|_| memory.allocate(PIECE / 2, Tag::Optimizer, StreamId(0)).unwrap());
    // Every other half first: no piece is free then, so none can be moved.
    let (first, last): (Vec<_>, Vec<_>) = halves.enumerate().partition(|(i, _)| i % 2 == 1);
    let blocks = first.into_iter().chain(last).map(|(_, block)| block).rev().collect();
    HELD.set(Some((memory.clone(), blocks)));
    memory.set_reclaim(Arc::new(|wanted| {
        HELD.with_borrow_mut(|held| {
            let (memory, blocks) = held.as_mut().unwrap();
            let mut given = 0;
            while let Some(block) = blocks.pop_if(|_| given < wanted) {
                given += block.bytes();
                memory.free(block, StreamId(0));
            }
            given
        })
    }));
    let block = memory.allocate(2 * PIECE, Tag::Activations, StreamId(0)).unwrap();
    // Two pieces in vain, and four more: the rest stays.
    assert_eq!(memory.usage().total, (8 - 6 + 2) * PIECE);
    memory.free(block, StreamId(0));
}

#[test]
fn the_nth_allocation_fails_on_request() {
    let mut model = Model::new(8 * PIECE, 1);
    model.allocator.fail_at(Some(3));
    let results: Vec<bool> = (0..5)
        .map(|_| {
            let block = model.allocator.allocate(512, Tag::Workspace, StreamId(0));
            block.map(|block| model.allocator.free(block, StreamId(0))).is_ok()
        })
        .collect();
    assert_eq!(results, [true, true, false, true, true]);
    model.allocator.fail_at(Some(1));
    model.allocator.fail_at(None);
    model.allocate(1, Tag::Workspace, 0).unwrap();
}

#[test]
fn sizes_beyond_the_range_fail_at_once() {
    let mut model = Model::new(8 * PIECE, 1);
    for bytes in [usize::MAX, usize::MAX - 511, 64 * 8 * PIECE + 1] {
        assert_eq!(report(model.allocator.allocate(bytes, Tag::Workspace, StreamId(0))).requested, bytes);
    }
    assert_eq!(model.world.borrow().maps, 0);
}

#[test]
fn the_report_is_a_table_with_advice() {
    let mut usage = Usage::default();
    usage.hold(Tag::Weights, 5 << 30);
    usage.hold(Tag::Activations, 2 << 30);
    usage.release(Tag::Activations, 1 << 30);
    usage.cached = 300 << 20;
    let mut report = OutOfMemory {
        device: Device::Cuda(0),
        requested: 8 << 30,
        tag: Tag::Activations,
        usage,
        largest_free: 100 << 20,
        available: 1 << 30,
        limit: None,
        injected: false,
    };
    let text = report.to_string();
    let table = "\
cuda:0 is out of memory: 8.0 GiB for activations cannot be had
                       now        peak
  weights          5.0 GiB     5.0 GiB
  activations      1.0 GiB     2.0 GiB
  in use           6.0 GiB     7.0 GiB
  kept free      300.0 MiB
  in one block   100.0 MiB
  nobody's         1.0 GiB
What helps:
  - a smaller --batch-size";
    assert!(text.starts_with(table), "{text}");
    // What holds most comes first, and a limit that is in the way before everything.
    report.requested = 1 << 20;
    assert!(report.advice()[0].contains("--quant"), "{report}");
    report.limit = Some(8 << 30);
    assert!(
        report.advice()[0].contains("limit") && report.to_string().contains("limit            8.0 GiB"),
        "{report}"
    );
    report.tag = Tag::Optimizer;
    report.requested = 20 << 30;
    assert!(report.advice()[0].contains("--optimizer-bits"), "{report}");
}

#[test]
fn a_low_limit_makes_small_pieces() {
    let world = World::new(GRANULE, 256 * GRANULE, 1024 * GRANULE, 1);
    for (limit, mapped) in [(None, PIECE), (Some(256 * GRANULE), 2 * GRANULE), (Some(5 * GRANULE), GRANULE)] {
        let mut allocator = allocator(&world);
        allocator.set_limit(limit).unwrap();
        let block = allocator.allocate(512, Tag::Weights, StreamId(0)).unwrap();
        assert_eq!(allocator.mapped(), mapped, "{limit:?}");
        allocator.free(block, StreamId(0));
        allocator.trim().unwrap();
    }
}
