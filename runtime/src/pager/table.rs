//! The table of pages: where each is, who uses it, and what moves when.
//!
//! ```text
//!            bring (a ticket)            lease, use, drop
//!   home  ────────────────────▶ resident ◀──────────────▶ pinned
//!    ▲ ▲                            │
//!    │ └────────────────────────────┘ evict (a ticket)
//!    └──▶ staged on a lane ──▶ home      stage, use, unstage (a ticket)
//!          ▲     │
//!          └─ held on it                 stage, use, hold until the next sweep
//! ```
//! A page that moves is already counted where it goes; its ticket is joined before it is used there.

mod lanes;

use super::{
    store::{PageStore, Refusal, Ticket},
    trace::{Trace, What},
};
use crate::{Error, Result, Tensor, cuda::Stream};
use lanes::{Chunk, LANES};
use std::{collections::VecDeque, fmt, ops::Range, str::FromStr};

/// How pages that are not resident are used, and which are resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Each page is brought when it is needed, and the least recently used one evicted for it. For comparison; in place
    /// where an evicted page's memory is not free at once ([`PageStore::frees_evicted`]).
    Lru,
    /// The first pages stay resident; the others are used across the bus.
    InPlace,
    /// The first pages stay resident; the others are streamed through lanes by copies in both directions at once.
    Stream,
}

impl Policy {
    /// All policies.
    pub const ALL: [Policy; 3] = [Policy::Lru, Policy::InPlace, Policy::Stream];
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Policy::Lru => "lru",
            Policy::InPlace => "in-place",
            Policy::Stream => "stream",
        })
    }
}

impl FromStr for Policy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Policy::ALL.into_iter().find(|policy| policy.to_string() == text);
        found.ok_or_else(|| Error::invalid("pager", format!("policy \"{text}\"; expected lru, in-place or stream")))
    }
}

/// What has happened since the pager was made, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Uses of pages that were in device memory: resident, or held by a lane.
    pub hits: u64,
    /// Uses across the bus.
    pub in_place: u64,
    /// Pages copied to a lane, to be used there.
    pub streamed: u64,
    /// Pages brought to device memory.
    pub brought: u64,
    /// Pages evicted.
    pub evicted: u64,
    /// Of those, pages evicted because memory was short elsewhere.
    pub given_back: u64,
    /// Transfers that were refused; the page stayed where it was.
    pub refused: u64,
    /// The most pages in device memory at once.
    pub resident_peak: u64,
    /// Bytes copied to device memory: of pages brought and streamed.
    pub inward: u64,
    /// Bytes copied to host memory.
    pub outward: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Page {
    resident: bool,
    pinned: bool,
    /// In use in a lane's memory.
    staged: bool,
    /// The transfer that brought it where it is, until it has been joined.
    moving: Option<Ticket>,
    /// Bytes at its start that hold anything.
    filled: usize,
    /// When it was last used, counted in uses of pages.
    used: u64,
}

/// Sweeps without pressure before pages come back, at most: the wait doubles while pressure returns.
const LONGEST_WAIT: u32 = 64;

pub(super) struct Table {
    store: Box<dyn PageStore>,
    policy: Policy,
    pages: Vec<Page>,
    /// Pages that may be resident, by the user.
    cap: usize,
    /// Pages that may be resident, after what was given back.
    allowed: usize,
    /// Pages that are resident, or on their way.
    resident: usize,
    /// Lanes, and pages of each, while they are open.
    lanes: Option<(usize, usize)>,
    /// What is in each lane's memory.
    chunks: [Option<Chunk>; LANES],
    /// Lanes that come behind all that the compute stream has been given to do with pages. Each call to the driver that a
    /// chunk does not need counts: small chunks cost the host more time than the bus.
    following: [bool; LANES],
    /// Whether a sweep uses the lanes: they are then not given back.
    sweeping: bool,
    /// Whether the lanes have been given something since the compute stream last came after them.
    ahead: bool,
    uses: u64,
    /// Sweeps since memory was last short or pages came back, and how many to wait for before pages come back.
    calm: u32,
    wait: u32,
    /// Whether memory was short since the last sweep began.
    short: bool,
    counters: Counters,
    /// Tensors that transfers read, each with the ticket after which it can go.
    kept: VecDeque<(Ticket, Tensor)>,
    /// Tensors to keep until what the lanes do now is done.
    keeping: Vec<Tensor>,
    trace: Option<Trace>,
}

impl Table {
    pub(super) fn new(store: Box<dyn PageStore>, policy: Policy) -> Self {
        let pages = vec![Page { filled: store.page_bytes(), ..Page::default() }; store.pages()];
        let policy = if policy == Policy::Lru && !store.frees_evicted() { Policy::InPlace } else { policy };
        Table {
            store,
            policy,
            pages,
            cap: 0,
            allowed: 0,
            resident: 0,
            lanes: None,
            chunks: Default::default(),
            following: [false; LANES],
            sweeping: false,
            ahead: false,
            uses: 0,
            calm: 0,
            wait: 1,
            short: false,
            counters: Counters::default(),
            kept: VecDeque::new(),
            keeping: Vec::new(),
            trace: None,
        }
    }

    pub(super) fn store_name(&self) -> &'static str {
        self.store.name()
    }

    pub(super) fn policy(&self) -> Policy {
        self.policy
    }

    pub(super) fn allowed(&self) -> usize {
        self.allowed
    }

    pub(super) fn resident(&self) -> usize {
        self.resident + self.lane_pages()
    }

    /// Pages that may be resident beside the lanes that are open.
    fn room(&self) -> usize {
        self.allowed.saturating_sub(self.lane_pages())
    }

    pub(super) fn is_resident(&self, page: usize) -> bool {
        self.pages.get(page).is_some_and(|page| page.resident)
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    fn note(&mut self, pages: Range<usize>, what: What) {
        if let Some(trace) = &mut self.trace {
            trace.push(pages, what);
        }
    }

    pub(super) fn set_trace(&mut self, on: bool) -> Option<Trace> {
        let resident = (0..self.pages.len()).filter(|&page| self.pages[page].resident).collect();
        std::mem::replace(&mut self.trace, on.then(|| Trace::new(resident)))
    }

    pub(super) fn set_cap(&mut self, pages: usize) -> Result<()> {
        self.cap = pages.min(self.pages.len());
        self.allowed = self.cap;
        self.fit_lanes()?;
        self.shrink(self.room())
    }

    /// Evicts pages that nobody uses, the last first, until at most `pages` are resident.
    fn shrink(&mut self, pages: usize) -> Result<()> {
        let mut at = self.pages.len();
        while self.resident > pages && at > 0 {
            at -= 1;
            if self.pages[at].resident && !self.pages[at].pinned {
                self.evict(at)?;
            }
        }
        Ok(())
    }

    /// Whether the page is in host memory now.
    fn evict(&mut self, page: usize) -> Result<bool> {
        // What brought it must be done before it is copied out again.
        self.join(page)?;
        match self.store.evict(page) {
            Ok(ticket) => {
                self.pages[page].resident = false;
                self.pages[page].moving = Some(ticket);
                self.resident -= 1;
                self.counters.evicted += 1;
                self.counters.outward += self.store.page_bytes() as u64;
                self.note(page..page + 1, What::Evict);
                Ok(true)
            }
            Err(refusal) => self.refused(refusal),
        }
    }

    /// Whether the page is in device memory now.
    fn bring(&mut self, page: usize) -> Result<bool> {
        self.put_back_page(page)?;
        self.join(page)?;
        match self.store.bring(page) {
            Ok(ticket) => {
                self.pages[page].resident = true;
                self.pages[page].moving = Some(ticket);
                self.resident += 1;
                self.counters.brought += 1;
                self.counters.inward += self.store.page_bytes() as u64;
                self.note(page..page + 1, What::Bring);
                self.count_peak();
                Ok(true)
            }
            Err(refusal) => self.refused(refusal),
        }
    }

    fn count_peak(&mut self) {
        self.counters.resident_peak = self.counters.resident_peak.max(self.resident() as u64);
    }

    fn refused(&mut self, refusal: Refusal) -> Result<bool> {
        match refusal {
            Refusal::NoMemory | Refusal::Transfer(_) => {
                self.counters.refused += 1;
                Ok(false)
            }
            Refusal::Lost(error) => Err(error),
        }
    }

    fn join(&mut self, page: usize) -> Result<()> {
        if let Some(ticket) = self.pages[page].moving {
            self.store.join(ticket)?;
            self.pages[page].moving = None;
        }
        Ok(())
    }

    /// See [`super::Pager::settle`].
    pub(super) fn settle(&mut self) -> Result<()> {
        self.calm = self.calm.saturating_add(1);
        self.short = false;
        if let Some(trace) = &mut self.trace {
            trace.sweep();
        }
        if self.allowed < self.cap && self.calm >= self.wait {
            (self.allowed, self.calm) = (self.cap, 0);
        }
        if self.policy == Policy::Lru {
            return self.shrink(self.allowed);
        }
        self.fit_lanes()?;
        let (lanes, lane_pages) = self.lane_plan().unwrap_or((0, 0));
        let room = self.allowed - lanes * lane_pages;
        self.shrink(room)?;
        let mut page = 0;
        while self.resident < room && page < self.pages.len() {
            let Page { resident, pinned, staged, .. } = self.pages[page];
            // One refusal is enough: there is no memory for another either.
            if !resident && !pinned && !staged && !self.bring(page)? {
                break;
            }
            page += 1;
        }
        Ok(())
    }

    /// See [`super::Pager::give_back`]. A lost device has nothing to give.
    pub(super) fn give_back(&mut self, pages: usize) -> usize {
        let before = self.resident();
        let mut leaving = Vec::new();
        // Lanes first, which nobody needs until the next sweep.
        if pages > 0 && !self.sweeping {
            match self.close_lanes() {
                Ok(tickets) => leaving = tickets,
                Err(_) => return 0,
            }
        }
        let (evicted_before, closed) = (self.resident, before - self.resident());
        let target = evicted_before.saturating_sub(pages.saturating_sub(closed));
        let mut at = self.pages.len();
        let mut last = None;
        while self.resident > target && at > 0 {
            at -= 1;
            if self.pages[at].resident && !self.pages[at].pinned {
                match self.evict(at) {
                    Ok(true) => last = self.pages[at].moving,
                    Ok(false) => {}
                    Err(_) => break,
                }
            }
        }
        let given = before - self.resident();
        if given > 0 {
            // The memory must be free when the allocator looks again.
            if leaving.into_iter().chain(last).any(|ticket| self.store.finish(ticket).is_err()) {
                return 0;
            }
            // Pressure right after pages came back: they wait longer next time. All of a step's requests are one.
            if !self.short {
                self.wait = if self.calm <= 1 { (self.wait * 2).min(LONGEST_WAIT) } else { 1 };
            }
            (self.short, self.calm) = (true, 0);
            self.allowed = self.resident().min(self.cap);
            self.counters.given_back += (evicted_before - self.resident) as u64;
        }
        given
    }

    fn free_to_use(&self, pages: Range<usize>) -> Result<()> {
        match pages.clone().find(|&page| self.pages.get(page).is_none_or(|page| page.pinned || page.staged)) {
            None => Ok(()),
            Some(page) if page >= self.pages.len() => {
                Err(Error::invalid("pager", format!("page {page} of {}", self.pages.len())))
            }
            Some(page) => Err(Error::invalid("pager", format!("page {page} is in use"))),
        }
    }

    /// See [`super::Pager::lease`]; returns the page's address, and its bytes.
    pub(super) fn pin(&mut self, page: usize) -> Result<(u64, usize)> {
        self.free_to_use(page..page + 1)?;
        if self.policy == Policy::Lru && !self.pages[page].resident && self.allowed > 0 {
            if self.resident >= self.allowed {
                let candidates = (0..self.pages.len()).filter(|&page| self.pages[page].resident);
                let oldest =
                    candidates.filter(|&page| !self.pages[page].pinned).min_by_key(|&page| self.pages[page].used);
                if let Some(oldest) = oldest {
                    self.evict(oldest)?;
                }
            }
            if self.resident < self.allowed {
                self.bring(page)?;
            }
        }
        self.put_back_page(page)?;
        self.join(page)?;
        let address = self.store.address(page)?;
        self.uses += 1;
        let entry = &mut self.pages[page];
        (entry.pinned, entry.used) = (true, self.uses);
        let resident = entry.resident;
        *(if resident { &mut self.counters.hits } else { &mut self.counters.in_place }) += 1;
        self.note(page..page + 1, if resident { What::Resident } else { What::InPlace });
        Ok((address, self.pages[page].filled))
    }

    /// See [`super::Pager::beside`].
    pub(super) fn beside(&mut self) -> Result<Option<[Stream; 2]>> {
        if self.policy == Policy::Lru {
            return Ok(None);
        }
        // Whoever pins a page later has the compute stream alone wait for what moves it.
        for page in 0..self.pages.len() {
            if !self.pages[page].resident {
                self.join(page)?;
            }
        }
        self.store.beside()
    }

    /// See [`super::Pager::join_beside`].
    pub(super) fn join_beside(&mut self) -> Result<()> {
        self.store.join_beside()
    }

    pub(super) fn unpin(&mut self, pages: Range<usize>) {
        if pages.clone().any(|page| !self.pages[page].staged) {
            self.following = [false; LANES];
        }
        self.pages[pages].iter_mut().for_each(|page| page.pinned = false);
        // A budget that was lowered meanwhile. A lost device is found by the next call.
        let _ = self.shrink(self.room());
    }

    /// See [`super::Pager::fill`].
    pub(super) fn fill(&mut self, page: usize, bytes: usize) -> Result<()> {
        self.free_to_use(page..page + 1)?;
        self.put_back_page(page)?;
        self.pages[page].filled = bytes;
        Ok(())
    }

    /// Bytes of a page that hold anything.
    pub(super) fn filled(&self, page: usize) -> usize {
        self.pages.get(page).map_or(0, |page| page.filled)
    }

    /// See [`super::Pager::store`].
    pub(super) fn store(&mut self, page: usize, offset: usize, source: &Tensor) -> Result<()> {
        self.free_to_use(page..page + 1)?;
        if source.device() != self.store.device() {
            let what = format!("a tensor on {} for pages on {}", source.device(), self.store.device());
            return Err(Error::invalid("pager", what));
        }
        if source.is_paged() {
            return Err(Error::invalid("pager", "the tensor to store is itself in pages"));
        }
        self.note(page..page + 1, What::Store);
        let address = source.address()?;
        if let Some(to) = self.held_address(page, offset) {
            self.join(page)?;
            self.following = [false; LANES];
            return self.store.copy(to, address, source.size_bytes());
        }
        if self.pages[page].resident {
            self.join(page)?;
        }
        // The compute stream need not wait: pages hold the gradients of several parameters, which come one after another.
        let after = self.pages[page].moving;
        let ticket = self.store.store(page, offset, address, source.size_bytes(), after)?;
        if !self.pages[page].resident {
            self.pages[page].moving = Some(ticket);
            self.kept.push_back((ticket, source.clone()));
            self.drop_kept()?;
        }
        Ok(())
    }

    /// Drops kept tensors whose transfer is done, and more while there are too many.
    fn drop_kept(&mut self) -> Result<()> {
        let most = kept_bytes(self.pages.len(), self.store.page_bytes());
        let mut bytes: usize = self.kept.iter().map(|(_, tensor)| tensor.size_bytes()).sum();
        while let Some((ticket, tensor)) = self.kept.front() {
            if !self.store.reached(*ticket)? {
                if bytes <= most {
                    break;
                }
                // Freed in the order of the compute stream, which then comes after the transfer.
                self.store.join(*ticket)?;
            }
            bytes -= tensor.size_bytes();
            self.kept.pop_front();
        }
        Ok(())
    }

    pub(super) fn write(&mut self, page: usize, offset: usize, bytes: &[u8]) -> Result<()> {
        self.free_to_use(page..page + 1)?;
        self.put_back_page(page)?;
        self.join(page)?;
        self.store.write(page, offset, bytes)
    }

    pub(super) fn read(&mut self, page: usize, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.free_to_use(page..page + 1)?;
        self.put_back_page(page)?;
        self.join(page)?;
        self.store.read(page, offset, bytes)
    }

    /// Panics unless the books are in order.
    #[cfg(test)]
    pub(super) fn check(&self, faulty: bool) {
        let held = self.pages.iter().filter(|page| page.resident && page.pinned).count();
        assert_eq!(self.resident, self.pages.iter().filter(|page| page.resident).count());
        // What is in use cannot leave, nor can what the store refuses to evict.
        let (resident, most) = (self.resident(), self.allowed.max(held));
        assert!(resident <= most || faulty, "{resident} pages are resident, {most} may be");
        assert!(self.allowed <= self.cap && self.cap <= self.pages.len());
        for (i, pages) in self.chunks.iter().flatten().map(|chunk| chunk.pages.clone()).enumerate() {
            assert!(self.lanes.is_some_and(|(_, most)| pages.len() <= most));
            assert!(pages.clone().all(|page| !self.pages[page].resident));
            let others = self.chunks.iter().flatten().skip(i + 1);
            assert!(others.into_iter().all(|other| other.pages.start >= pages.end || other.pages.end <= pages.start));
        }
        assert!(self.counters.given_back <= self.counters.evicted);
        assert_eq!(self.counters.brought - self.counters.evicted, self.resident as u64);
    }
}

/// Tensors that wait for their transfer may take this part of all pages: enough for a layer's gradients, which come all at
/// once, to be on their way while the next layer's are made.
const KEPT_SHARE: usize = 32;

/// Bytes of tensors that wait for their transfer, at most.
pub fn kept_bytes(pages: usize, page_bytes: usize) -> usize {
    pages * page_bytes / KEPT_SHARE
}

impl Drop for Table {
    fn drop(&mut self) {
        // Transfers that are under way must not outlive what they read and write.
        if let Some(&(ticket, _)) = self.kept.back() {
            let _ = self.store.finish(ticket);
        }
        let moving = self.pages.iter().filter_map(|page| page.moving).max();
        if let Some(ticket) = moving {
            let _ = self.store.finish(ticket);
        }
    }
}
