//! Lanes: some device memory and a stream each, through which chunks of pages go in turn, so that one is copied in while
//! another is used and a third copied out.
//!
//! The chunks that the lanes have last in a sweep stay there, *held*, and the next sweep begins with them: the lanes'
//! memory, which counts into the budget, then saves as many transfers as resident pages would. Until then the lane has the
//! only valid bytes of such pages. What is stored into it goes there; whoever else wants it, or the lane's memory,
//! has the lane put its chunk back first.

use super::{Policy, Table, Ticket, What};
use crate::{Error, Result, Tensor, cuda::Stream};
use std::ops::Range;

/// Lanes, if the store has as many.
pub(super) const LANES: usize = 4;
/// A lane takes at most this many bytes: every copy takes the bus some microseconds more than its bytes, but until a lane's
/// first has left, none comes in.
const LANE_BYTES: usize = 6 << 20;
/// Lanes take at most this part of the budget. What they hold from sweep to sweep saves as much as what is resident.
const LANE_SHARE: usize = 2;

/// Pages in a lane's memory.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    pub(super) pages: Range<usize>,
    /// Of the first of them.
    address: u64,
    /// Bytes at the start of each that are as they are at home.
    clean: usize,
}

impl Table {
    /// Pages that the lanes take.
    pub(super) fn lane_pages(&self) -> usize {
        self.lanes.map_or(0, |(lanes, pages)| lanes * pages)
    }

    /// Lanes, and pages of each, that the policy and the budget give.
    pub(super) fn lane_plan(&self) -> Option<(usize, usize)> {
        let lanes = self.store.lanes().min(LANES);
        if self.policy != Policy::Stream || lanes == 0 || self.allowed >= self.pages.len() {
            return None;
        }
        let most = (LANE_BYTES / self.store.page_bytes()).max(1);
        let pages = (self.allowed / (LANE_SHARE * lanes)).clamp(1, most);
        (lanes * pages <= self.allowed).then_some((lanes, pages))
    }

    /// Closes lanes that are not those of the plan.
    pub(super) fn fit_lanes(&mut self) -> Result<()> {
        match self.sweeping || self.lanes == self.lane_plan() {
            true => Ok(()),
            false => self.close_lanes().map(drop),
        }
    }

    /// See [`crate::pager::Pager::open_lanes`].
    pub(in crate::pager) fn open_lanes(&mut self) -> Result<Option<(usize, usize)>> {
        self.join_lanes()?;
        (self.sweeping, self.following) = (false, [false; LANES]);
        self.fit_lanes()?;
        let plan = self.lane_plan();
        let Some((lanes, pages)) = plan else { return Ok(None) };
        self.shrink(self.allowed - lanes * pages)?;
        if self.resident + lanes * pages > self.allowed {
            self.close_lanes()?;
            return Ok(None);
        }
        if self.lanes.is_none() {
            if let Err(refusal) = self.store.open_lanes(pages) {
                return self.refused(refusal).map(|_| None);
            }
            self.lanes = plan;
            self.count_peak();
        }
        self.sweeping = true;
        Ok(self.lanes)
    }

    /// Lets a lane come behind what the compute stream has done with pages, and what it was given before the sweep.
    fn follow(&mut self, lane: usize) -> Result<()> {
        self.ahead = true;
        if !self.following[lane] {
            self.store.follow(lane)?;
            self.following[lane] = true;
        }
        Ok(())
    }

    pub(in crate::pager) fn leave_lanes(&mut self) {
        (self.sweeping, self.following) = (false, [false; LANES]);
    }

    /// See [`crate::pager::Pager::join_lanes`].
    pub(in crate::pager) fn join_lanes(&mut self) -> Result<()> {
        let lanes = self.lanes.filter(|_| self.ahead).map_or(0, |(lanes, _)| lanes);
        for lane in 0..lanes {
            let ticket = self.store.unstage(0..0, 0, 0, lane)?;
            self.store.join(ticket)?;
        }
        self.ahead = false;
        self.keeping.clear();
        Ok(())
    }

    /// Gives the lanes' memory back, after what they hold is home; returns the tickets of that.
    pub(super) fn close_lanes(&mut self) -> Result<Vec<Ticket>> {
        let leaving = (0..LANES).filter_map(|lane| self.put_back(lane).transpose()).collect::<Result<_>>()?;
        self.sweeping = false;
        if self.lanes.take().is_some() {
            self.chunks = Default::default();
            self.store.close_lanes()?;
            self.keeping.clear();
        }
        Ok(leaving)
    }

    /// See [`crate::pager::Pager::stage`]; returns the address of the first page, and their bytes.
    pub(in crate::pager) fn stage(&mut self, pages: Range<usize>, lane: usize) -> Result<(u64, usize)> {
        self.free_to_use(pages.clone())?;
        let fits = self.lanes.is_some_and(|(lanes, most)| lane < lanes && pages.len() <= most);
        let busy = fits && self.chunks[lane].is_some() && self.held(lane).is_none();
        if !fits || busy || pages.clone().any(|page| self.pages[page].resident) {
            return Err(Error::invalid("pager", format!("pages {pages:?} cannot be streamed on lane {lane}")));
        }
        let held = self.holder(&pages) == Some(lane);
        if !held {
            self.put_back(lane)?;
            pages.clone().try_for_each(|page| self.put_back_page(page))?;
        }
        self.follow(lane)?;
        for page in pages.clone() {
            if let Some(ticket) = self.pages[page].moving {
                self.store.hold(ticket, lane)?;
                self.pages[page].moving = None;
            }
        }
        let (missing, filled) = if held { (0..0, 0) } else { (pages.clone(), self.last_filled(&pages)) };
        let address = self.store.stage(missing, filled, lane)?;
        if !held {
            self.counters.inward += self.chunk_bytes(&pages, 0) as u64;
            let clean = self.store.page_bytes();
            self.chunks[lane] = Some(Chunk { pages: pages.clone(), address, clean });
        }
        self.pages[pages.clone()].iter_mut().for_each(|page| (page.pinned, page.staged) = (true, true));
        *(if held { &mut self.counters.hits } else { &mut self.counters.streamed }) += pages.len() as u64;
        self.note(pages.clone(), if held { What::Resident } else { What::Stage });
        Ok((address, self.chunk_bytes(&pages, 0)))
    }

    /// See [`crate::pager::Pager::unstage`].
    pub(in crate::pager) fn unstage(&mut self, pages: Range<usize>, clean: usize, lane: usize) -> Result<()> {
        self.let_go(&pages, clean, lane)?;
        self.write_back(lane).map(drop)
    }

    /// See [`crate::pager::Pager::hold`].
    pub(in crate::pager) fn hold(&mut self, pages: Range<usize>, clean: usize, lane: usize) -> Result<()> {
        self.let_go(&pages, clean, lane)?;
        let ticket = self.store.unstage(0..0, 0, 0, lane)?;
        self.pages[pages].iter_mut().for_each(|page| (page.staged, page.moving) = (false, Some(ticket)));
        Ok(())
    }

    /// The bytes from `clean` on of a chunk that was in use are no longer as they are at home.
    fn let_go(&mut self, pages: &Range<usize>, clean: usize, lane: usize) -> Result<()> {
        if let Some(page) = pages.clone().find(|&page| self.pages[page].pinned) {
            return Err(Error::invalid("pager", format!("page {page} is still in use")));
        }
        self.uses += 1;
        self.ahead = true;
        self.pages[pages.clone()].iter_mut().for_each(|page| page.used = self.uses);
        self.chunks[lane].iter_mut().for_each(|chunk| chunk.clean = chunk.clean.min(clean));
        Ok(())
    }

    /// Copies a lane's chunk back; returns the ticket.
    fn write_back(&mut self, lane: usize) -> Result<Option<Ticket>> {
        let Some(Chunk { pages, clean, .. }) = self.chunks[lane].clone() else { return Ok(None) };
        let filled = self.last_filled(&pages);
        let clean = clean.min(filled);
        let ticket = self.store.unstage(pages.clone(), clean, filled, lane)?;
        self.counters.outward += self.chunk_bytes(&pages, clean) as u64;
        self.chunks[lane] = None;
        self.pages[pages.clone()].iter_mut().for_each(|page| (page.staged, page.moving) = (false, Some(ticket)));
        self.note(pages, What::Unstage);
        Ok(Some(ticket))
    }

    /// Bytes of the last of a chunk's pages that hold anything.
    fn last_filled(&self, pages: &Range<usize>) -> usize {
        pages.clone().next_back().map_or(0, |page| self.filled(page))
    }

    /// Bytes that are copied of a chunk whose pages are as they were up to `clean`.
    fn chunk_bytes(&self, pages: &Range<usize>, clean: usize) -> usize {
        let whole = pages.len().saturating_sub(1) * (self.store.page_bytes() - clean);
        whole + self.last_filled(pages) - clean
    }

    /// What a lane holds.
    fn held(&self, lane: usize) -> Option<&Chunk> {
        self.chunks[lane].as_ref().filter(|chunk| !self.pages[chunk.pages.start].staged)
    }

    /// See [`crate::pager::Pager::holder`].
    pub(in crate::pager) fn holder(&self, pages: &Range<usize>) -> Option<usize> {
        (0..LANES).find(|&lane| self.held(lane).is_some_and(|chunk| chunk.pages == *pages))
    }

    /// The lane that holds a page.
    fn lane_of(&self, page: usize) -> Option<usize> {
        (0..LANES).find(|&lane| self.held(lane).is_some_and(|chunk| chunk.pages.contains(&page)))
    }

    /// Where byte `offset` of a page is that a lane holds, to be overwritten.
    pub(super) fn held_address(&mut self, page: usize, offset: usize) -> Option<u64> {
        let page_bytes = self.store.page_bytes();
        let chunk = self.lane_of(page).and_then(|lane| self.chunks[lane].as_mut())?;
        chunk.clean = chunk.clean.min(offset);
        Some(chunk.address + ((page - chunk.pages.start) * page_bytes + offset) as u64)
    }

    /// Copies what a lane holds back home.
    fn put_back(&mut self, lane: usize) -> Result<Option<Ticket>> {
        if self.held(lane).is_none() {
            return Ok(None);
        }
        // After what the compute stream has stored there.
        self.follow(lane)?;
        self.write_back(lane)
    }

    /// Copies a page back home if a lane holds it, with the rest of the chunk.
    pub(super) fn put_back_page(&mut self, page: usize) -> Result<()> {
        self.lane_of(page).map_or(Ok(()), |lane| self.put_back(lane).map(drop))
    }

    pub(in crate::pager) fn lane(&self, lane: usize) -> Option<Stream> {
        self.store.lane(lane)
    }

    pub(in crate::pager) fn keep(&mut self, tensor: Tensor) {
        self.keeping.push(tensor);
    }
}
