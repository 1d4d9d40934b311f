//! A device for tests: memory that is only counted, streams whose work is done when the test says so, and a referee
//! that panics when memory is touched by what is not ordered.

use super::{AddressSpace, Events, MapError, StreamId};
use crate::{Error, Result};
use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    ops::Range,
    rc::Rc,
};

#[derive(Clone, Copy)]
enum Work {
    Kernel,
    /// Waits for a position in another stream.
    Wait(usize, u64),
}

#[derive(Default)]
struct Stream {
    issued: u64,
    completed: u64,
    /// What was issued and is not completed.
    queue: VecDeque<Work>,
    /// For each stream, the position that what is issued from now on comes after.
    after: BTreeMap<usize, u64>,
}

/// A use of memory by a stream.
struct Use {
    range: Range<usize>,
    stream: usize,
    position: u64,
}

/// The device behind a space and its events.
pub(crate) struct World {
    streams: Vec<Stream>,
    pieces: BTreeMap<usize, usize>,
    uses: Vec<Use>,
    granule: usize,
    reserved: usize,
    pub capacity: usize,
    /// Map calls that fail although there is memory: one in so many, by a counter-based coin.
    pub faults: Option<u64>,
    /// Map calls, failed ones with them.
    pub maps: u64,
    pub moves: u64,
    pub unmaps: u64,
    pub marks: u64,
    pub synchronized: u64,
}

impl World {
    pub(crate) fn new(granule: usize, capacity: usize, reserved: usize, streams: usize) -> Rc<RefCell<World>> {
        Rc::new(RefCell::new(World {
            streams: (0..streams).map(|_| Stream::default()).collect(),
            pieces: BTreeMap::new(),
            uses: Vec::new(),
            granule,
            reserved,
            capacity,
            faults: None,
            maps: 0,
            moves: 0,
            unmaps: 0,
            marks: 0,
            synchronized: 0,
        }))
    }

    pub(crate) fn mapped(&self) -> usize {
        self.pieces.values().sum()
    }

    /// Whether every byte of the range is backed.
    pub(crate) fn backs(&self, range: &Range<usize>) -> bool {
        let mut at = range.start;
        while at < range.end {
            match self.pieces.range(..=at).next_back() {
                Some((&offset, &bytes)) if at < offset + bytes => at = offset + bytes,
                _ => return false,
            }
        }
        true
    }

    /// A kernel on `stream` that uses the range. Panics if what used it before may still run.
    pub(crate) fn kernel(&mut self, stream: usize, range: Range<usize>) {
        for other in self.uses.iter().filter(|other| overlap(&other.range, &range)) {
            let after = self.streams[stream].after.get(&other.stream).copied().unwrap_or(0);
            let ordered = other.stream == stream || after >= other.position;
            assert!(
                ordered || self.streams[other.stream].completed >= other.position,
                "stream {stream} uses {range:?} that stream {} may still use",
                other.stream
            );
        }
        let state = &mut self.streams[stream];
        state.issued += 1;
        state.queue.push_back(Work::Kernel);
        self.uses.push(Use { range, stream, position: state.issued });
    }

    /// Completes at most `count` pieces of work of `stream`, as far as its waits allow.
    pub(crate) fn advance(&mut self, stream: usize, count: u64) {
        for _ in 0..count {
            match self.streams[stream].queue.front() {
                None => return,
                Some(&Work::Wait(other, position)) if self.streams[other].completed < position => return,
                Some(_) => {}
            }
            self.streams[stream].queue.pop_front();
            self.streams[stream].completed += 1;
        }
        let World { streams, uses, .. } = self;
        uses.retain(|used| streams[used.stream].completed < used.position);
    }

    fn finish(&mut self, stream: usize, position: u64) {
        while self.streams[stream].completed < position {
            if let Some(&Work::Wait(other, position)) = self.streams[stream].queue.front() {
                self.finish(other, position);
            }
            self.advance(stream, 1);
        }
    }

    /// Lets `stream` wait for all that `other` was given.
    pub(crate) fn join(&mut self, stream: usize, other: usize) {
        let mark = self.point(other);
        self.hold(stream, &mark);
    }

    fn point(&self, stream: usize) -> Mark {
        let state = &self.streams[stream];
        let mut after = state.after.clone();
        after.insert(stream, state.issued);
        Mark { stream, position: state.issued, after }
    }

    fn hold(&mut self, stream: usize, mark: &Mark) {
        let state = &mut self.streams[stream];
        state.issued += 1;
        state.queue.push_back(Work::Wait(mark.stream, mark.position));
        for (&other, &position) in &mark.after {
            let after = state.after.entry(other).or_default();
            *after = position.max(*after);
        }
    }

    fn assert_idle(&self, range: Range<usize>) {
        let busy = self
            .uses
            .iter()
            .find(|used| overlap(&used.range, &range) && self.streams[used.stream].completed < used.position);
        assert!(busy.is_none(), "memory at {range:?} is taken away while the device may use it");
    }

    fn take_piece(&mut self, offset: usize, bytes: usize) {
        self.assert_idle(offset..offset + bytes);
        assert_eq!(self.pieces.remove(&offset), Some(bytes), "not a piece");
    }

    fn put_piece(&mut self, offset: usize, bytes: usize) {
        assert!(bytes > 0 && offset.is_multiple_of(self.granule) && bytes.is_multiple_of(self.granule));
        assert!(offset + bytes <= self.reserved, "beyond the range");
        let clash = self.pieces.iter().any(|(&o, &b)| overlap(&(o..o + b), &(offset..offset + bytes)));
        assert!(!clash, "backed twice");
        self.pieces.insert(offset, bytes);
    }

    fn map_fails(&mut self) -> bool {
        self.maps += 1;
        self.faults.is_some_and(|every| {
            let coin = (self.maps ^ 0x5bd1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
            coin.is_multiple_of(every)
        })
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

pub(crate) struct Space(pub Rc<RefCell<World>>);

impl AddressSpace for Space {
    fn granule(&self) -> usize {
        self.0.borrow().granule
    }

    fn reserved(&self) -> usize {
        self.0.borrow().reserved
    }

    fn base(&self) -> u64 {
        0x7_0000_0000
    }

    fn available(&self) -> usize {
        let world = self.0.borrow();
        world.capacity - world.mapped()
    }

    fn map(&mut self, offset: usize, bytes: usize) -> std::result::Result<(), MapError> {
        let mut world = self.0.borrow_mut();
        if world.map_fails() || world.mapped() + bytes > world.capacity {
            return Err(MapError::OutOfMemory);
        }
        world.put_piece(offset, bytes);
        Ok(())
    }

    fn unmap(&mut self, offset: usize, bytes: usize) -> Result<()> {
        let mut world = self.0.borrow_mut();
        world.take_piece(offset, bytes);
        world.unmaps += 1;
        Ok(())
    }

    fn remap(&mut self, from: usize, to: usize, bytes: usize) -> std::result::Result<(), MapError> {
        let mut world = self.0.borrow_mut();
        world.take_piece(from, bytes);
        if world.map_fails() {
            return Err(MapError::OutOfMemory);
        }
        world.moves += 1;
        world.put_piece(to, bytes);
        Ok(())
    }
}

pub(crate) struct Mark {
    stream: usize,
    position: u64,
    after: BTreeMap<usize, u64>,
}

pub(crate) struct Streams(pub Rc<RefCell<World>>);

impl Events for Streams {
    type Mark = Mark;

    fn mark(&mut self, StreamId(stream): StreamId) -> Result<Mark> {
        let mut world = self.0.borrow_mut();
        world.marks += 1;
        Ok(world.point(stream))
    }

    fn done(&self, mark: &Mark) -> Result<bool> {
        Ok(self.0.borrow().streams[mark.stream].completed >= mark.position)
    }

    fn wait(&mut self, StreamId(stream): StreamId, mark: &Mark) -> Result<()> {
        if stream == mark.stream {
            return Err(Error::invalid("wait", "a stream for itself"));
        }
        self.0.borrow_mut().hold(stream, mark);
        Ok(())
    }

    fn synchronize(&mut self, mark: &Mark) -> Result<()> {
        let mut world = self.0.borrow_mut();
        world.synchronized += 1;
        world.finish(mark.stream, mark.position);
        Ok(())
    }
}
