//! Which parts of the address range are free, in use or not backed: the carving, without any device.
//!
//! ```text
//! 0                                                              reserved
//! | piece | piece |  hole  | piece | piece | piece |      hole       |
//! |  used | free  |        |  free |   used   |free|                 |
//! ```
//! Pieces and holes tile the range. Free blocks lie in pieces and may span several; what is mapped and not free is in
//! use. Neighbouring free blocks are one block where they are safe for the same streams.

use super::StreamId;
use std::{collections::BTreeMap, ops::Range};

/// Who may use a free block at once: everybody (`None`), or the stream that freed it last.
pub(super) type Owner = Option<StreamId>;

#[derive(Clone, Copy, Debug)]
struct Free {
    bytes: usize,
    owner: Owner,
    /// The owner's count of frees at the latest one in the block: a later mark of the owner makes it safe for all.
    ticket: u64,
}

/// Where to back more of the range for a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Where to begin.
    pub at: usize,
    /// Bytes to back from there on; a multiple of the granule.
    pub need: usize,
    /// The hole and the free blocks beside it that the request will use.
    pub span: Range<usize>,
}

#[derive(Debug)]
pub(super) struct Blocks {
    /// Free blocks by their offsets, in ascending order. There are some dozens, which are looked through faster than any tree.
    free: Vec<(usize, Free)>,
    /// Offset and bytes of what is not backed.
    holes: BTreeMap<usize, usize>,
    /// Offset and bytes of what each map call backed.
    pieces: BTreeMap<usize, usize>,
    mapped: usize,
    free_bytes: usize,
}

impl Blocks {
    pub(super) fn new(reserved: usize) -> Self {
        Blocks {
            free: Vec::new(),
            holes: BTreeMap::from([(0, reserved)]),
            pieces: BTreeMap::new(),
            mapped: 0,
            free_bytes: 0,
        }
    }

    /// Bytes that are backed.
    pub(super) fn mapped(&self) -> usize {
        self.mapped
    }

    /// Bytes in free blocks.
    pub(super) fn free_bytes(&self) -> usize {
        self.free_bytes
    }

    /// Bytes of the largest free block, whoever owns it.
    pub(super) fn largest(&self) -> usize {
        self.free.iter().map(|(_, free)| free.bytes).max().unwrap_or(0)
    }

    /// How many free blocks begin below `offset`.
    fn below(&self, offset: usize) -> usize {
        self.free.partition_point(|&(start, _)| start < offset)
    }

    fn insert(&mut self, offset: usize, free: Free) {
        self.free.insert(self.below(offset), (offset, free));
        self.free_bytes += free.bytes;
    }

    /// The free block that begins at `offset`.
    fn at(&self, offset: usize) -> Option<Free> {
        self.free.get(self.below(offset)).filter(|(start, _)| *start == offset).map(|&(_, free)| free)
    }

    fn remove(&mut self, offset: usize) -> Option<Free> {
        let place = self.below(offset);
        self.free.get(place).filter(|(start, _)| *start == offset)?;
        let (_, free) = self.free.remove(place);
        self.free_bytes -= free.bytes;
        Some(free)
    }

    /// The free block that begins last below `end`.
    fn last_below(&self, end: usize) -> Option<(usize, Free)> {
        self.below(end).checked_sub(1).map(|place| self.free[place])
    }

    /// The free block that ends at `end`.
    fn before(&self, end: usize) -> Option<(usize, Free)> {
        self.last_below(end).filter(|(offset, free)| offset + free.bytes == end)
    }

    /// Offset and size of `owner`'s blocks, lowest first.
    fn of(&self, owner: Owner) -> impl Iterator<Item = (usize, usize)> {
        self.free.iter().filter(move |(_, free)| free.owner == owner).map(|&(offset, free)| (offset, free.bytes))
    }

    /// Whether `owner` has a free block of at least `bytes`.
    pub(super) fn fits(&self, owner: Owner, bytes: usize) -> bool {
        self.of(owner).any(|(_, size)| size >= bytes)
    }

    /// Takes `bytes` from the start of the free block at `offset`.
    fn carve(&mut self, offset: usize, bytes: usize) {
        let place = self.below(offset);
        self.free_bytes -= bytes;
        let (start, free) = &mut self.free[place];
        debug_assert!(*start == offset && free.bytes >= bytes, "carving what is not free");
        (*start, free.bytes) = (*start + bytes, free.bytes - bytes);
        if free.bytes == 0 {
            self.free.remove(place);
        }
    }

    /// The free block at the upper end of what is backed, beyond which the range grows.
    fn top(&self) -> Option<usize> {
        let (&offset, &bytes) = self.pieces.last_key_value()?;
        self.before(offset + bytes).map(|(top, _)| top)
    }

    /// Takes `bytes` for `stream` from the smallest block that it may use and that has them; the offset. The top block
    /// comes last, whatever its size: then where blocks lie does not depend on how much is backed, and work that repeats
    /// itself fits where it fitted before.
    pub(super) fn take(&mut self, stream: StreamId, bytes: usize) -> Option<usize> {
        let top = self.top();
        let mut best = None;
        for &(offset, free) in &self.free {
            let own = free.owner == Some(stream);
            if free.bytes < bytes || !(own || free.owner.is_none()) {
                continue;
            }
            let worth = (Some(offset) == top, free.bytes, !own);
            if best.is_none_or(|(least, _)| worth < least) {
                best = Some((worth, offset));
            }
            // Nothing is better than the first that fits exactly.
            if worth == (false, bytes, false) {
                break;
            }
        }
        let (_, offset) = best?;
        self.carve(offset, bytes);
        Some(offset)
    }

    /// Takes `bytes` from the smallest block of `owner` that has them; the offset.
    pub(super) fn take_from(&mut self, owner: StreamId, bytes: usize) -> Option<usize> {
        let fits = self.of(Some(owner)).filter(|&(_, size)| size >= bytes);
        let (offset, _) = fits.min_by_key(|&(_, size)| size)?;
        self.carve(offset, bytes);
        Some(offset)
    }

    /// Makes a range free, merged with neighbours of the same owner. What is anyone's goes with a stream's block beside
    /// it, so that a single stream always sees whole blocks.
    pub(super) fn put(&mut self, offset: usize, bytes: usize, owner: Owner, ticket: u64) {
        let joins = |free: &Free| free.owner == owner || free.owner.is_none();
        let (mut start, mut end, mut ticket) = (offset, offset + bytes, ticket);
        while let Some((offset, free)) = self.before(start).filter(|(_, free)| joins(free)) {
            self.remove(offset);
            (start, ticket) = (offset, ticket.max(free.ticket));
        }
        while let Some(free) = self.at(end).filter(|free| joins(free)) {
            self.remove(end);
            (end, ticket) = (end + free.bytes, ticket.max(free.ticket));
        }
        self.insert(start, Free { bytes: end - start, owner, ticket });
    }

    /// Whether `owner` has any free block.
    pub(super) fn owns(&self, owner: StreamId) -> bool {
        self.fits(Some(owner), 0)
    }

    /// Makes the blocks of `owner` anyone's whose frees a mark with `ticket` covers.
    pub(super) fn settle(&mut self, owner: StreamId, ticket: u64) {
        let owned = |&&(_, free): &&(usize, Free)| free.owner == Some(owner) && free.ticket <= ticket;
        let done: Vec<(usize, Free)> = self.free.iter().filter(owned).copied().collect();
        for (offset, free) in done {
            self.remove(offset);
            self.put(offset, free.bytes, None, 0);
        }
    }

    /// Gives the blocks of `from` to `to`, as if `to` had freed them with `ticket`.
    pub(super) fn adopt(&mut self, from: StreamId, to: StreamId, ticket: u64) {
        let blocks: Vec<(usize, usize)> = self.of(Some(from)).collect();
        for (offset, bytes) in blocks {
            self.remove(offset);
            self.put(offset, bytes, Some(to), ticket);
        }
    }

    /// Bytes that are not backed from `at` on.
    pub(super) fn room(&self, at: usize) -> usize {
        match self.holes.range(..=at).next_back() {
            Some((&offset, &bytes)) => (offset + bytes).saturating_sub(at),
            None => 0,
        }
    }

    /// Where backing the fewest bytes gives `stream` a block of `bytes`: in a hole, behind a free block if there is one.
    /// Looks at every hole; there are few, since only giving memory back makes them.
    pub(super) fn place(&self, stream: StreamId, bytes: usize, granule: usize) -> Option<Place> {
        let usable = |free: &Free| free.owner.is_none() || free.owner == Some(stream);
        let candidates = self.holes.iter().filter_map(|(&at, &hole)| {
            let before = self.before(at).filter(|(_, free)| usable(free)).map_or(0, |(_, free)| free.bytes);
            let after = self.at(at + hole).filter(usable).map_or(0, |free| free.bytes);
            let need = bytes.checked_sub(before)?.checked_next_multiple_of(granule)?;
            if need <= hole {
                Some(Place { at, need, span: at - before..at + need })
            } else if before + hole + after >= bytes {
                Some(Place { at, need: hole, span: at - before..at + hole + after })
            } else {
                None
            }
        });
        candidates.min_by_key(|place| place.need)
    }

    /// Records that `at..at + bytes`, part of a hole, was backed by one piece, and gives it to `stream`.
    pub(super) fn add_piece(&mut self, at: usize, bytes: usize, stream: StreamId) {
        let Some((&offset, &hole)) = self.holes.range(..=at).next_back() else { return debug_assert!(false) };
        debug_assert!(bytes > 0 && at + bytes <= offset + hole, "backing what is backed");
        self.holes.remove(&offset);
        if offset < at {
            self.holes.insert(offset, at - offset);
        }
        if at + bytes < offset + hole {
            self.holes.insert(at + bytes, offset + hole - at - bytes);
        }
        self.pieces.insert(at, bytes);
        self.mapped += bytes;
        self.put(at, bytes, Some(stream), 0);
    }

    /// The highest piece that is free, anyone's and outside of `keep`: its offset and bytes.
    pub(super) fn donor(&self, keep: &Range<usize>) -> Option<(usize, usize)> {
        let anyones = self.free.iter().rev().filter(|(_, free)| free.owner.is_none());
        for &(start, free) in anyones {
            let end = start + free.bytes;
            let mut inside = self.pieces.range(start..end).rev().map(|(&offset, &bytes)| (offset, bytes));
            let found = inside
                .find(|&(offset, bytes)| offset + bytes <= end && (offset + bytes <= keep.start || offset >= keep.end));
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// Records that the free piece at `offset` is no longer backed.
    pub(super) fn remove_piece(&mut self, offset: usize) {
        let Some(bytes) = self.pieces.remove(&offset) else { return debug_assert!(false, "no piece at {offset}") };
        self.mapped -= bytes;
        if let Some((start, free)) = self.last_below(offset + 1) {
            self.remove(start);
            debug_assert!(offset + bytes <= start + free.bytes, "the piece is in use");
            if start < offset {
                self.insert(start, Free { bytes: offset - start, ..free });
            }
            let (end, rest) = (offset + bytes, start + free.bytes - (offset + bytes));
            if rest > 0 {
                self.insert(end, Free { bytes: rest, ..free });
            }
        }
        let (mut start, mut end) = (offset, offset + bytes);
        if let Some((&before, &hole)) = self.holes.range(..offset).next_back()
            && before + hole == offset
        {
            self.holes.remove(&before);
            start = before;
        }
        if let Some(hole) = self.holes.remove(&end) {
            end += hole;
        }
        self.holes.insert(start, end - start);
    }

    /// Number of free blocks.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.free.len()
    }

    /// The pieces as offset and bytes.
    #[cfg(test)]
    pub(super) fn pieces(&self) -> impl Iterator<Item = (usize, usize)> {
        self.pieces.iter().map(|(&offset, &bytes)| (offset, bytes))
    }

    /// Panics unless everything above holds, with `used` the ranges in use.
    #[cfg(test)]
    pub(super) fn check(&self, reserved: usize, used: &[Range<usize>]) {
        let mut tiles: Vec<_> = self.pieces().chain(self.holes.iter().map(|(&o, &b)| (o, b))).collect();
        tiles.sort_unstable();
        let end = tiles.iter().fold(0, |end, &(offset, bytes)| {
            assert!(offset == end && bytes > 0, "pieces and holes do not tile the range at {end}");
            offset + bytes
        });
        assert_eq!(end, reserved);
        let holes: Vec<_> = self.holes.iter().collect();
        assert!(holes.windows(2).all(|pair| pair[0].0 + pair[0].1 < *pair[1].0), "neighbouring holes");

        // Free and used blocks tile the pieces: disjoint, none in a hole, and as many bytes in all.
        let mut blocks: Vec<Range<usize>> = self.free.iter().map(|&(o, free)| o..o + free.bytes).collect();
        assert_eq!(blocks.iter().map(|block| block.len()).sum::<usize>(), self.free_bytes);
        blocks.extend(used.iter().cloned());
        blocks.sort_unstable_by_key(|block| block.start);
        assert!(blocks.iter().all(|block| !block.is_empty()));
        assert!(blocks.windows(2).all(|pair| pair[0].end <= pair[1].start), "blocks overlap");
        for (&offset, &bytes) in &self.holes {
            let inside = |block: &&Range<usize>| block.start < offset + bytes && block.end > offset;
            assert_eq!(blocks.iter().find(inside), None, "a block in hole {offset}..+{bytes}");
        }
        assert_eq!(self.pieces().map(|(_, bytes)| bytes).sum::<usize>(), self.mapped);
        assert_eq!(blocks.iter().map(|block| block.len()).sum::<usize>(), self.mapped);

        assert!(self.free.is_sorted_by_key(|&(offset, _)| offset));
        for &(offset, free) in &self.free {
            let next = self.at(offset + free.bytes);
            assert!(next.is_none_or(|next| next.owner != free.owner), "neighbours that are not merged at {offset}");
        }
    }
}
