//! The optimizer's pages from end to end: where pages are, how large they are and how they move changes no bit of what is
//! trained; saved states go from any pages to any others; and a run that is short of memory takes it from the pages.

use nibble::{
    data::Batch,
    model::Model,
    paging::{Bytes, PageMemory, PagedBudget},
    settings::{Method, Settings},
    step::Stepper,
    train::{attach, source},
};
use nibble_optim::{Saved, StateBits};
use nibble_runtime::{
    Device, DeviceRequest, Tag, Tensor,
    cuda::{Gpu, device_for_tests},
    memory,
    pager::{Counters, Policy},
};
use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

const SMALL: Bytes = Bytes(256 << 10);
const LARGE: Bytes = Bytes(1 << 20);

/// The GPU, for one test at a time: limits and peaks are the whole program's.
fn gpu() -> Option<(Device, MutexGuard<'static, ()>)> {
    static ONE: Mutex<()> = Mutex::new(());
    Some((device_for_tests()?, ONE.lock().unwrap_or_else(PoisonError::into_inner)))
}

/// The golden model without pages. The rank is so large that there are some.
fn settings(method: Method, bits: StateBits, device: Device) -> Settings {
    Settings {
        model: Some("tests/golden/gqa_llama3rope/model".into()),
        method,
        rank: 64,
        lr: 1e-2,
        optimizer_bits: bits,
        device: DeviceRequest::Exactly(device),
        paged_budget: Some(PagedBudget::Off),
        page_size: SMALL,
        ..Settings::default()
    }
}

/// As `settings`, with a budget of `bytes`.
fn paged(settings: &Settings, bytes: usize, page_size: Bytes, policy: Option<Policy>, memory: PageMemory) -> Settings {
    Settings {
        paged_budget: Some(PagedBudget::Bytes(Bytes(bytes))),
        page_size,
        page_policy: policy,
        page_memory: memory,
        ..settings.clone()
    }
}

/// `rows` sequences of `length` ids each, others for each `number`.
fn batch(number: usize, rows: usize, length: usize) -> Batch {
    let ids: Vec<i32> = (0..rows * length).map(|i| 3 + ((i * i * 11 + 37 * i + 101 * number) % 500) as i32).collect();
    let labels = (0..ids.len()).map(|i| if (i + 1) % length == 0 { -100 } else { ids[i + 1] }).collect();
    Batch { ids, labels, lengths: vec![length; rows] }
}

/// Training, step by step.
struct Run {
    stepper: Stepper,
    model: Model,
    lr: f64,
    /// The budget; `None` without pages.
    budget: Option<usize>,
    steps: u32,
}

impl Run {
    fn new(settings: &Settings) -> Run {
        Run::from(settings, None)
    }

    /// Goes on from what [`Run::save`] gave.
    fn from(settings: &Settings, saved: Option<SavedRun>) -> Run {
        let mut model = Model::load(&source(settings)).unwrap();
        attach(&mut model, settings).unwrap();
        if let Some(saved) = &saved {
            for ((_, value), saved) in model.llama.parameters_mut().into_iter().zip(&saved.parameters) {
                value.copy_from(0, &saved.to_device(value.device(), Tag::Workspace).unwrap()).unwrap();
            }
        }
        let mut stepper = Stepper::new(&model.llama, settings).unwrap();
        let budget = stepper.paging().map(|paging| match settings.paged_budget {
            Some(PagedBudget::Bytes(Bytes(bytes))) => bytes,
            _ => paging.state.pager().pages() * paging.state.pager().page_bytes(),
        });
        let steps = saved.as_ref().map_or(0, |saved| saved.steps);
        if let Some(saved) = saved {
            stepper.optimizer_mut().restore(saved.steps, saved.state).unwrap();
        }
        Run { stepper, model, lr: settings.lr, budget, steps }
    }

    /// One step of these batches; checks that no more than the budget was ever in device memory.
    fn step_of(&mut self, batches: &[Batch]) -> anyhow::Result<()> {
        let step = self.stepper.step(&mut self.model.llama, batches, 2 * self.steps, self.lr)?;
        assert_eq!(step.fault, None);
        self.steps += 1;
        if let (Some(paging), Some(budget)) = (self.stepper.paging(), self.budget) {
            let peak = paging.state.pager().counters().resident_peak as usize * paging.state.pager().page_bytes();
            assert!(peak <= budget, "{peak} bytes of pages were on the device; the budget is {budget}");
        }
        Ok(())
    }

    /// `count` steps of two micro-batches each.
    fn steps(&mut self, count: u32) {
        for _ in 0..count {
            let first = 2 * self.steps as usize;
            self.step_of(&[batch(first, 2, 9), batch(first + 1, 1, 17)]).unwrap();
        }
    }

    fn parameters(&self) -> Vec<Vec<u8>> {
        self.values().iter().map(|value| value.bytes().unwrap().to_vec()).collect()
    }

    /// Copies of the parameters in host memory.
    fn values(&self) -> Vec<Tensor> {
        let copy = |value: &Tensor| value.to_device(Device::Cpu, Tag::Workspace)?.copy(Tag::Workspace);
        self.model.llama.parameters().into_iter().map(|(_, _, value)| copy(value).unwrap()).collect()
    }

    fn counters(&self) -> Counters {
        self.stepper.paging().unwrap().state.pager().counters()
    }

    /// What a file would hold.
    fn save(self) -> SavedRun {
        let state = self.stepper.optimizer().state().unwrap();
        let state = state.map(|saved| {
            let (id, part, tensor) = saved.unwrap();
            (id, part, tensor.to_device(Device::Cpu, Tag::Workspace).unwrap())
        });
        SavedRun { state: state.collect(), parameters: self.values(), steps: self.steps }
    }
}

struct SavedRun {
    state: Vec<Saved>,
    parameters: Vec<Tensor>,
    steps: u32,
}

/// Every kind of trained parameters and moments.
const KINDS: [(Method, StateBits); 4] = [
    (Method::Qlora, StateBits::F32),
    (Method::Qlora, StateBits::Bits8),
    (Method::Full, StateBits::F32),
    (Method::Full, StateBits::Bits8),
];

/// Budgets for `pages` pages: nothing, a page, a quarter, and all.
fn budgets(pages: usize) -> [usize; 4] {
    [0, 1, (pages / 4).max(1), pages]
}

/// That the pages were used as the policy and the budget say.
fn assert_used(c: Counters, policy: Policy, budget: usize, pages: usize, memory: PageMemory) {
    let what = format!("{policy}, {budget} of {pages} pages in {memory} memory: {c:?}");
    assert_eq!((c.refused, c.given_back), (0, 0), "{what}");
    assert_eq!(c.resident_peak, budget.min(pages) as u64, "{what}");
    // Lanes may take all of a small budget, and what they hold may be used there again.
    assert!(if c.hits > 0 { c.brought + c.streamed > 0 } else { c.brought == 0 }, "{what}");
    match policy {
        // One page after another goes through the room that there is. Unified memory has in place for it.
        Policy::Lru if memory != PageMemory::Unified => {
            assert_eq!((c.brought > 0, c.evicted > 0), (budget > 0, (1..pages).contains(&budget)), "{what}")
        }
        Policy::InPlace | Policy::Lru => {
            assert!(c.streamed == 0 && c.evicted == 0 && (c.in_place > 0) == (budget < pages), "{what}")
        }
        // The lanes alone take four pages; unified memory has none.
        Policy::Stream => {
            assert_eq!(c.streamed > 0, (4..pages).contains(&budget) && memory != PageMemory::Unified, "{what}");
        }
    }
}

/// No budget, page size, policy or memory changes a bit of what is trained.
fn pages_change_nothing(device: Device, memories: &[PageMemory]) {
    for (method, bits) in KINDS {
        let plain = settings(method, bits, device);
        let mut run = Run::new(&plain);
        assert!(run.stepper.paging().is_none());
        let before = run.parameters();
        run.steps(3);
        let expected = run.parameters();
        assert!(expected.iter().zip(&before).all(|(after, before)| after != before), "everything was trained");
        for &memory in memories {
            for page_size in [SMALL, LARGE] {
                let auto =
                    Settings { paged_budget: Some(PagedBudget::Auto), page_size, page_memory: memory, ..plain.clone() };
                let mut run = Run::new(&auto);
                run.steps(3);
                let what = format!("{method}, {bits} bits, {memory} pages of {page_size}");
                assert!(run.parameters() == expected, "{what}, budget auto");
                let pager = run.stepper.paging().unwrap().state.pager();
                let pages = pager.pages();
                assert_eq!(pager.resident_bytes(), pages * page_size.0, "auto takes what there is");
                assert!(pages >= if page_size == SMALL { 8 } else { 2 }, "only {pages} pages");
                for (budget, policy) in budgets(pages).into_iter().flat_map(|b| Policy::ALL.map(|policy| (b, policy))) {
                    let mut run = Run::new(&paged(&plain, budget * page_size.0, page_size, Some(policy), memory));
                    run.steps(3);
                    assert!(run.parameters() == expected, "{what}, {policy}, budget {budget} of {pages}");
                    assert_used(run.counters(), policy, budget, pages, memory);
                }
            }
        }
    }
}

#[test]
fn pages_change_nothing_on_the_cpu() {
    pages_change_nothing(Device::Cpu, &[PageMemory::Auto]);
}

#[test]
fn pages_change_nothing_on_a_gpu() {
    let Some((device, _alone)) = gpu() else { return };
    pages_change_nothing(device, &[PageMemory::Pinned, PageMemory::Unified]);
}

/// Steps, a restart with other pages or none, and more steps are as many steps without a restart.
fn a_saved_state_goes_on_in_other_pages(device: Device, memories: [PageMemory; 2]) {
    for (method, bits) in KINDS {
        let plain = settings(method, bits, device);
        let mut whole = Run::new(&plain);
        whole.steps(5);
        let expected = whole.parameters();
        let ways = [
            plain.clone(),
            paged(&plain, 5 * SMALL.0, SMALL, Some(Policy::Stream), memories[0]),
            paged(&plain, LARGE.0, LARGE, Some(Policy::Lru), memories[1]),
            paged(&plain, 0, SMALL, Some(Policy::InPlace), memories[1]),
        ];
        for (i, first) in ways.iter().enumerate() {
            let second = &ways[(i + 1) % ways.len()];
            let mut run = Run::new(first);
            run.steps(2);
            let mut run = Run::from(second, Some(run.save()));
            let pages = |settings: &Settings| settings.paged_budget != Some(PagedBudget::Off);
            run.steps(3);
            assert!(run.parameters() == expected, "{method}, {bits} bits, way {i}");
            assert_eq!(run.stepper.optimizer().steps_done(), 5);
            assert_eq!(run.stepper.paging().is_some(), pages(second));
            if let Some(paging) = run.stepper.paging() {
                // Still in pages, and used there by each of the three updates.
                let (pages, c) = (paging.state.pager().pages(), run.counters());
                assert!(c.hits + c.in_place + c.streamed >= 3 * pages as u64, "{c:?}");
                assert_eq!(run.stepper.optimizer().state_bytes(), pages * second.page_size.0);
            }
        }
    }
}

#[test]
fn a_saved_state_goes_on_in_other_pages_on_the_cpu() {
    a_saved_state_goes_on_in_other_pages(Device::Cpu, [PageMemory::Auto; 2]);
}

#[test]
fn a_saved_state_goes_on_in_other_pages_on_a_gpu() {
    let Some((device, _alone)) = gpu() else { return };
    a_saved_state_goes_on_in_other_pages(device, [PageMemory::Pinned, PageMemory::Unified]);
}

/// Sequences of the batch of the test below that is long, and of the others.
const ROWS: [usize; 2] = [32, 8];
/// Their tokens.
const LENGTH: usize = 256;

/// Four times more tokens than usual do not fit beside the states. Without pages that is the end of the run; with them the
/// step takes their memory, comes out the same, and they return.
#[test]
fn a_long_batch_takes_the_memory_of_pages_for_a_while() {
    let Some((device, _alone)) = gpu() else { return };
    let gpu_memory = Gpu::of(device).unwrap().memory().unwrap();
    let [long, short] = ROWS.map(|rows| [batch(rows, rows, LENGTH)]);
    let off = Settings { model: Some("random:tiny".into()), ..settings(Method::Full, StateBits::F32, device) };
    for page_memory in [PageMemory::Pinned, PageMemory::Unified] {
        let auto = Settings { paged_budget: Some(PagedBudget::Auto), page_memory, ..off.clone() };
        let host = paged(&off, 0, SMALL, None, page_memory);

        // What steps take where there is enough: nobody gives anything back.
        let peak = |settings: &Settings, batches: &[Batch]| {
            let mut run = Run::new(settings);
            run.step_of(batches).unwrap();
            memory::reset_peak_of(device);
            run.step_of(batches).unwrap();
            // Unified pages are not among what the allocator hands out, but count against its limit.
            let pages = run.stepper.paging().map_or(0, |paging| paging.state.pager().resident_bytes());
            let outside = if page_memory == PageMemory::Unified { pages } else { 0 };
            memory::usage_of(device).total_peak + outside
        };
        let all = peak(&auto, &short);
        let least = peak(&host, &long);
        let most = peak(&off, &long).min(peak(&auto, &long));
        let mut run = Run::new(&auto);
        let states = run.stepper.paging().unwrap().state.pager().pages() * SMALL.0;
        assert!(states >= 32 << 20, "{states} bytes of states are too few to tell");
        let script = |run: &mut Run, times: &mut Vec<f64>| {
            for batches in [&short, &long, &short] {
                let clock = Instant::now();
                run.step_of(batches)?;
                times.push(clock.elapsed().as_secs_f64());
            }
            anyhow::Ok(())
        };
        // Warm, so that the times can be compared.
        let mut times = Vec::new();
        script(&mut run, &mut times).unwrap();
        drop(run);
        let (mut run, mut free_times) = (Run::new(&auto), Vec::new());
        script(&mut run, &mut free_times).unwrap();
        assert_eq!(run.counters().given_back, 0);
        let expected = run.parameters();
        drop(run);

        // Between what the long step must have and what it would take; nearer to the latter, since some memory is free
        // where it is of no use.
        let limit = most - (most - least) / 8;
        let figures = format!("short {all}, long {least} to {most}, states {states}, limit {limit}");
        assert!(most > least + (16 << 20) && all + (8 << 20) < limit, "no room for a test: {figures}");
        memory::trim_of(device).unwrap();
        gpu_memory.lock().set_limit(Some(limit)).unwrap();
        let unlimited = Unlimit(device);

        let mut run = Run::new(&off);
        run.step_of(&short).unwrap();
        let error = format!("{:#}", run.step_of(&long).unwrap_err());
        assert!(error.contains("out of memory") && error.contains("peak"), "{figures}: {error}");
        drop(run);
        memory::trim_of(device).unwrap();

        let (mut run, mut limited_times) = (Run::new(&auto), Vec::new());
        script(&mut run, &mut limited_times).unwrap_or_else(|error| panic!("{figures}: {error:#}"));
        let c = run.counters();
        assert!(c.given_back > 0, "{figures}: {c:?}");
        assert!(run.parameters() == expected, "{page_memory}: memory that was short changed the result");
        // Pages return when there has been no pressure for a while.
        let resident = |run: &Run| run.stepper.paging().unwrap().state.pager().resident_bytes();
        let mut waited = 1;
        while resident(&run) < states {
            assert!(waited <= 8, "{} of {states} bytes are back: {:?}", resident(&run), run.counters());
            run.step_of(&short).unwrap();
            waited += 1;
        }
        eprintln!(
            "{page_memory}: {figures}; {} of {} pages given back; the long step took {:.2} ms, unlimited {:.2} ms; all pages \
             are back after {waited} steps",
            c.given_back,
            states / SMALL.0,
            1e3 * limited_times[1],
            1e3 * free_times[1]
        );
        drop((run, unlimited));
        memory::trim_of(device).unwrap();
    }
}

/// Lifts the limit of a device's memory, also when a test fails.
struct Unlimit(Device);

impl Drop for Unlimit {
    fn drop(&mut self) {
        let _ = Gpu::of(self.0).and_then(Gpu::memory).and_then(|memory| memory.lock().set_limit(None));
    }
}
