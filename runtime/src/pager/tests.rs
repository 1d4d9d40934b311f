//! The pager against a model that knows only bytes, on random traces, with and without faults.

use super::*;
use crate::{DType, Tag, rng};
use proptest::prelude::*;

const PAGE: usize = 256;

/// Something that a user of the pager does.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// Lease pages at once, read them and write some of their bytes.
    Use(Vec<usize>, u8),
    /// While pages are leased, memory is short and the budget changes.
    Squeeze(Vec<usize>, usize, u8),
    Budget(usize),
    /// Eighths of a page.
    GiveBack(usize),
    Settle,
    /// All pages in order, those in host memory streamed if they can be.
    Sweep(u8),
    Store(usize, u8),
    Write(usize, u8),
    Read(usize),
}

fn act(pages: usize) -> impl Strategy<Value = Act> {
    let some = || prop::collection::btree_set(0..pages, 1..=pages.min(4)).prop_map(|set| set.into_iter().collect());
    prop_oneof![
        4 => (some(), any::<u8>()).prop_map(|(pages, byte)| Act::Use(pages, byte)),
        1 => (some(), 0..pages + 2, any::<u8>()).prop_map(|(pages, budget, byte)| Act::Squeeze(pages, budget, byte)),
        1 => (0..pages + 2).prop_map(Act::Budget),
        1 => (0usize..24).prop_map(Act::GiveBack),
        2 => Just(Act::Settle),
        2 => any::<u8>().prop_map(Act::Sweep),
        1 => (0..pages, any::<u8>()).prop_map(|(page, byte)| Act::Store(page, byte)),
        1 => (0..pages, any::<u8>()).prop_map(|(page, byte)| Act::Write(page, byte)),
        1 => (0..pages).prop_map(Act::Read),
    ]
}

/// The pager, and what its pages must hold.
pub(crate) struct Checked {
    pager: Pager,
    model: Vec<Vec<u8>>,
    page_bytes: usize,
    faulty: bool,
}

impl Checked {
    pub(crate) fn new(store: Box<dyn PageStore>, policy: Policy, faulty: bool) -> Self {
        let page_bytes = store.page_bytes();
        // Not every page is full.
        let model: Vec<_> = (0..store.pages()).map(|page| vec![0; page_bytes - page % 3 * (page_bytes / 8)]).collect();
        let pager = Pager::new(store, 0, policy).unwrap();
        model.iter().enumerate().for_each(|(page, bytes)| pager.fill(page, bytes.len()).unwrap());
        Checked { pager, model, page_bytes, faulty }
    }

    /// A tensor of one byte again and again, where the pages are computed on.
    fn filled(&self, byte: u8, bytes: usize) -> Tensor {
        let tensor = Tensor::from_slice(&vec![byte; bytes], &[bytes], Tag::Workspace).unwrap();
        tensor.into_device(self.pager.device(), Tag::Workspace).unwrap()
    }

    /// Waits for all streams.
    fn wait(&self) {
        if let Ok(gpu) = crate::cuda::Gpu::of(self.pager.device()) {
            gpu.synchronize_all().unwrap();
        }
    }

    /// Checks a view of a page, then writes it from the middle of a full one on.
    fn touch(&mut self, page: usize, mut view: Tensor, byte: u8) {
        let found = view.to_device(Device::Cpu, Tag::Workspace).unwrap();
        assert_eq!(found.bytes().unwrap(), self.model[page], "page {page}");
        let (fresh, half) = (byte.wrapping_mul(31).wrapping_add(page as u8), self.page_bytes / 2);
        view.copy_from(half, &self.filled(fresh, self.model[page].len() - half)).unwrap();
        self.model[page][half..].fill(fresh);
    }

    fn use_all(&mut self, pages: &[usize], byte: u8, while_held: impl FnOnce(&Pager) -> Result<()>) -> Result<()> {
        let leases: Vec<_> = pages.iter().map(|&page| Ok((page, self.pager.lease(page)?))).collect::<Result<_>>()?;
        while_held(&self.pager)?;
        for (page, lease) in leases {
            assert!(
                self.pager.lease(page).is_err() && self.pager.read(page, 0, &mut [0]).is_err(),
                "pins are respected"
            );
            let filled = self.model[page].len();
            let view = lease.tensor(0, DType::U8, &[filled])?;
            assert!(lease.tensor(filled - 1, DType::U8, &[1]).is_err(), "views never overlap");
            assert!(lease.tensor(filled, DType::U8, &[1]).is_err(), "what holds nothing is not used");
            drop(lease);
            self.touch(page, view, byte);
        }
        Ok(())
    }

    fn sweep(&mut self, byte: u8) -> Result<()> {
        self.pager.settle()?;
        let Some((lanes, most)) = self.pager.open_lanes()? else {
            return (0..self.model.len()).try_for_each(|page| self.use_all(&[page], byte, |_| Ok(())));
        };
        let (mut chunks, mut page, mut turn) = (Vec::new(), 0, 0);
        while page < self.model.len() {
            let host = (page..self.model.len()).take_while(|&page| !self.pager.is_resident(page)).take(most).count();
            chunks.push((page..page + host.max(1), host > 0));
            page += host.max(1);
        }
        if byte & 8 > 0 {
            chunks.reverse();
        }
        for (chunk, stream) in chunks {
            if !stream {
                self.use_all(&[chunk.start], byte, |_| Ok(()))?;
                continue;
            }
            // Mostly where it is held, if it is.
            let holder = self.pager.holder(&chunk).filter(|_| !byte.is_multiple_of(5));
            let lane = holder.unwrap_or(turn % lanes);
            let staged = self.pager.stage(chunk.clone(), lane)?;
            assert!(self.pager.stage(chunk.clone(), lane).is_err(), "a lane has one chunk");
            assert!(self.pager.lease(chunk.start).is_err(), "staged pages are in use");
            for page in chunk {
                let view = staged.tensor(page, 0, DType::U8, &[self.model[page].len()])?;
                // The lane's copies, and then the compute stream's, on which this works.
                self.wait();
                self.touch(page, view, byte);
                self.wait();
            }
            // The first half of a full page was not written.
            let clean = if byte.is_multiple_of(2) { self.page_bytes / 2 } else { 0 };
            // Some stay where they are, until they are used again or the lane is.
            let leave = if usize::from(byte / 2) % 3 == turn % 3 { Pager::unstage } else { Pager::hold };
            leave(&self.pager, staged, clean)?;
            turn += 1;
        }
        self.pager.leave_lanes();
        if byte.is_multiple_of(4) { self.pager.join_lanes() } else { Ok(()) }
    }

    fn act(&mut self, act: &Act) -> Result<()> {
        match act {
            Act::Use(pages, byte) => self.use_all(pages, *byte, |_| Ok(())),
            Act::Squeeze(pages, budget, byte) => self.use_all(pages, *byte, |pager| {
                pager.give_back(usize::from(*byte));
                pager.set_budget(budget * pager.page_bytes())?;
                pager.settle()
            }),
            Act::Budget(pages) => self.pager.set_budget(pages * self.page_bytes),
            Act::GiveBack(parts) => {
                let bytes = parts * (self.page_bytes / 8);
                let before = self.pager.resident_bytes();
                let given = self.pager.give_back(bytes);
                if !self.faulty {
                    assert_eq!(before - given, self.pager.resident_bytes());
                    assert!(given >= bytes.min(before));
                }
                Ok(())
            }
            Act::Settle => self.pager.settle(),
            Act::Sweep(byte) => self.sweep(*byte),
            Act::Store(page, byte) => {
                let source = self.filled(*byte, 100);
                self.pager.store(*page, 64, &source)?;
                self.model[*page][64..164].fill(*byte);
                Ok(())
            }
            Act::Write(page, byte) => {
                self.pager.write(*page, 3, &[*byte; 7])?;
                self.model[*page][3..10].fill(*byte);
                Ok(())
            }
            Act::Read(page) => {
                let mut bytes = vec![0; self.model[*page].len()];
                self.pager.read(*page, 0, &mut bytes)?;
                assert_eq!(bytes, self.model[*page]);
                Ok(())
            }
        }
    }

    pub(crate) fn run(&mut self, acts: &[Act]) -> Result<()> {
        for act in acts {
            self.act(act)?;
            self.pager.lock().check(self.faulty);
        }
        (0..self.model.len()).try_for_each(|page| self.act(&Act::Read(page)))
    }
}

pub(crate) fn policy() -> impl Strategy<Value = Policy> {
    prop::sample::select(Policy::ALL.to_vec())
}

/// A number of pages and what is done with them.
pub(crate) fn trace() -> impl Strategy<Value = (usize, Vec<Act>)> {
    (1usize..20).prop_flat_map(|pages| (Just(pages), prop::collection::vec(act(pages), 1..60)))
}

/// Refuses calls of these names by a seeded coin.
fn refusing(names: &'static [&'static str], seed: u64) -> Faults {
    let mut number = 0;
    Arc::new(Mutex::new(move |name: &str| {
        number += 1;
        let stream = rng::Stream { purpose: 7, step: 0, layer: 0 };
        let refuses = names.contains(&name) && rng::Philox::new(seed, stream).below(number, 3) == 0;
        refuses.then(|| match number % 2 {
            0 => Refusal::NoMemory,
            _ => Refusal::Transfer(Error::invalid("test", "refused")),
        })
    }))
}

proptest! {
    #[test]
    fn bytes_are_where_they_should_be_and_never_more_than_the_budget_on_the_device((pages, acts) in trace(), policy in policy()) {
        let mut checked = Checked::new(Box::new(HostPages::new(pages, PAGE).unwrap()), policy, false);
        checked.run(&acts).unwrap();
        prop_assert_eq!(checked.pager.counters().refused, 0);
    }

    #[test]
    fn refused_transfers_and_missing_memory_change_only_where_pages_are(
        (pages, acts) in trace(), policy in policy(), seed: u64, most in 0usize..8,
    ) {
        let store = HostPages::new(pages, PAGE).unwrap().with_memory_for(most);
        let store = store.with_faults(refusing(&["bring", "evict", "open_lanes"], seed));
        Checked::new(Box::new(store), policy, true).run(&acts).unwrap();
    }

    #[test]
    fn a_lost_device_is_an_error_and_never_a_wrong_byte((pages, acts) in trace(), policy in policy(), after in 0u32..60) {
        let mut calls = 0;
        let faults: Faults = Arc::new(Mutex::new(move |_: &str| {
            calls += 1;
            (calls > after).then(|| Refusal::Lost(Error::invalid("test", "the device is lost")))
        }));
        let mut checked = Checked::new(Box::new(HostPages::new(pages, PAGE).unwrap().with_faults(faults)), policy, true);
        // Either nothing reached the loss, or the error says it; a wrong byte would have panicked.
        if let Err(error) = checked.run(&acts) {
            prop_assert!(error.to_string().contains("the device is lost"), "{error}");
        }
    }
}

/// A pager of `pages` pages with a budget.
fn pager(pages: usize, budget: usize, policy: Policy) -> Pager {
    Pager::new(Box::new(HostPages::new(pages, PAGE).unwrap()), budget * PAGE, policy).unwrap()
}

fn sweep(pager: &Pager) {
    pager.settle().unwrap();
    (0..pager.pages()).for_each(|page| drop(pager.lease(page).unwrap()));
}

#[test]
fn a_sweep_moves_nothing_where_lru_moves_every_page() {
    let counted = |policy| {
        let pager = pager(8, 4, policy);
        (0..5).for_each(|_| sweep(&pager));
        pager.counters()
    };
    let (lru, in_place) = (counted(Policy::Lru), counted(Policy::InPlace));
    assert_eq!((lru.hits, lru.brought, lru.evicted), (40, 40, 36));
    assert_eq!((in_place.hits, in_place.in_place, in_place.brought, in_place.evicted), (20, 20, 4, 0));
    assert_eq!((lru.resident_peak, in_place.resident_peak), (4, 4));
}

#[test]
fn what_was_given_back_returns_when_pressure_is_gone_and_later_when_it_returns() {
    let pager = pager(8, 8, Policy::InPlace);
    sweep(&pager);
    assert_eq!(pager.give_back(3 * PAGE - 1), 3 * PAGE);
    assert_eq!((pager.resident_bytes(), pager.budget()), (5 * PAGE, 5 * PAGE));
    assert!(pager.is_resident(4) && !pager.is_resident(5), "the last of the order leave first");
    // Pressure right after pages came back, twice: they wait for 2 sweeps, then for 4. A step's requests are
    // one pressure, however many they are.
    for wait in [2, 4] {
        for _ in 1..wait {
            sweep(&pager);
            assert_eq!(pager.resident_bytes(), 5 * PAGE);
        }
        sweep(&pager);
        assert_eq!(pager.resident_bytes(), 8 * PAGE);
        (0..3).for_each(|_| assert_eq!(pager.give_back(PAGE), PAGE));
    }
    // After a calm while they wait no longer than at first.
    (0..20).for_each(|_| sweep(&pager));
    pager.give_back(PAGE);
    sweep(&pager);
    assert_eq!(pager.resident_bytes(), 8 * PAGE);
}

#[test]
fn lanes_that_are_in_use_are_not_given_back_for_pages() {
    let pager = pager(80, 70, Policy::Stream);
    pager.settle().unwrap();
    let (lanes, pages) = pager.open_lanes().unwrap().unwrap();
    let before = pager.resident_bytes();
    assert_eq!(before, 70 * PAGE);
    assert_eq!(pager.give_back(2 * PAGE), 2 * PAGE, "pages leave");
    assert!(!pager.is_resident(70 - lanes * pages - 1) && pager.is_resident(70 - lanes * pages - 3));
    // When the sweep is over, the lanes go first.
    pager.leave_lanes();
    assert_eq!(pager.give_back(PAGE), lanes * pages * PAGE);
    assert_eq!(pager.resident_bytes(), before - (2 + lanes * pages) * PAGE);
}

#[test]
fn what_lanes_hold_is_used_there_and_put_back_for_whoever_else_wants_it() {
    let pager = pager(9, 6, Policy::Stream);
    let sweep = |order: [usize; 2]| {
        pager.settle().unwrap();
        assert_eq!(pager.open_lanes().unwrap(), Some((4, 1)));
        for page in order {
            let lane = pager.holder(&(page..page + 1)).unwrap_or(page % 4);
            let staged = pager.stage(page..page + 1, lane).unwrap();
            assert!(pager.holder(&(page..page + 1)).is_none(), "it is in use");
            let mut view = staged.tensor(page, PAGE / 2, DType::U8, &[PAGE / 2]).unwrap();
            let found = view.bytes().unwrap()[0];
            view.copy_from(0, &Tensor::from_slice(&[found + 1; PAGE / 2], &[PAGE / 2], Tag::Workspace).unwrap())
                .unwrap();
            drop(view);
            pager.hold(staged, PAGE / 2).unwrap();
        }
        pager.leave_lanes();
    };
    let read = |page, offset| {
        let mut byte = [0];
        pager.read(page, offset, &mut byte).unwrap();
        byte[0]
    };
    sweep([2, 3]);
    sweep([3, 2]);
    let counters = pager.counters();
    assert_eq!((counters.streamed, counters.hits), (2, 2), "copied in once");
    assert_eq!(pager.resident_bytes(), 6 * PAGE);
    // What is stored goes to the lane, and home with the rest though the next use leaves it as it is.
    pager.store(2, 7, &Tensor::from_slice(&[5u8], &[1], Tag::Workspace).unwrap()).unwrap();
    assert_eq!(pager.holder(&(2..3)), Some(2));
    sweep([2, 3]);
    assert_eq!((read(2, 7), read(2, PAGE - 1), pager.holder(&(2..3))), (5, 3, None));
    // A lease, another budget and a shortage of memory take it from the lane.
    assert_eq!(pager.holder(&(3..4)), Some(3));
    drop(pager.lease(3).unwrap());
    assert_eq!((pager.holder(&(3..4)), read(3, PAGE - 1)), (None, 3));
    sweep([2, 3]);
    pager.set_budget(3 * PAGE).unwrap();
    assert_eq!((pager.holder(&(3..4)), read(3, PAGE - 1), pager.resident_bytes()), (None, 4, 2 * PAGE));
    pager.set_budget(6 * PAGE).unwrap();
    sweep([2, 3]);
    assert_eq!(pager.give_back(1), 4 * PAGE);
    assert_eq!((pager.holder(&(2..3)), read(2, PAGE - 1), read(2, 7)), (None, 5, 5));
}

#[test]
fn pages_are_streamed_as_far_as_they_are_filled() {
    let pager = pager(8, 4, Policy::Stream);
    pager.fill(7, 100).unwrap();
    assert!(pager.fill(7, PAGE + 1).is_err() && pager.fill(8, 0).is_err());
    assert!(pager.write(7, 99, &[1, 2]).is_err() && pager.read(7, 100, &mut [0]).is_err());
    pager.settle().unwrap();
    assert_eq!(pager.open_lanes().unwrap(), Some((4, 1)));
    for (page, lane) in [(6, 0), (7, 1)] {
        let staged = pager.stage(page..page + 1, lane).unwrap();
        assert!(pager.fill(page, 50).is_err(), "it is in use");
        pager.unstage(staged, 30).unwrap();
    }
    let Counters { inward, outward, .. } = pager.counters();
    assert_eq!((inward, outward), (PAGE as u64 + 100, PAGE as u64 - 30 + 70));
}

#[test]
fn budgets_below_a_page_and_bytes_outside_are_refused() {
    let pager = pager(2, 2, Policy::InPlace);
    assert!(pager.set_budget(PAGE - 1).unwrap_err().to_string().contains("give 0, or 256 B or more"));
    pager.set_budget(0).unwrap();
    let source = Tensor::from_slice(&[0u8; 16], &[16], Tag::Workspace).unwrap();
    for (page, offset) in [(2, 0), (0, PAGE - 15), (0, usize::MAX)] {
        assert!(pager.store(page, offset, &source).is_err());
        assert!(pager.write(page, offset, &[0; 16]).is_err() && pager.read(page, offset, &mut [0; 16]).is_err());
    }
    assert!(pager.lease(2).is_err() && pager.stage(0..1, 0).is_err());
    let lease = pager.lease(0).unwrap();
    assert!(lease.tensor(2, DType::F32, &[1]).is_err() && lease.tensor(0, DType::F32, &[PAGE]).is_err());
    let view = lease.tensor(0, DType::U8, &[16]).unwrap();
    assert!(pager.store(1, 0, &view).is_err(), "pages are not stored from pages");
}

#[test]
fn a_trace_says_what_happened_to_which_pages() {
    let pager = pager(4, 2, Policy::InPlace);
    pager.trace(true);
    sweep(&pager);
    let trace = pager.trace(false).unwrap();
    let seen: Vec<_> = trace.moments.iter().map(|moment| (moment.pages.clone(), moment.what)).collect();
    assert_eq!(seen, [(0..2, What::Bring), (0..2, What::Resident), (2..4, What::InPlace)]);
    assert!(trace.resident.is_empty() && trace.moments.is_sorted_by_key(|moment| moment.at));
    assert!(trace.sweeps.len() == 1 && trace.sweeps[0] <= trace.moments[0].at);
}
