//! Updates in pages against updates without: the same bits, whatever the pages, the budget and the policy.

use crate::{AdamW, AdamWConfig, Gradients, PagedState, StateBits, Update};
use nibble_kernels::norm::PIECE;
use nibble_runtime::{
    DType, Device, Error, GradSink, ParamId, Result, Tag, Tensor,
    cuda::{Gpu, PinnedPages, UnifiedPages, device_for_tests},
    pager::{Faults, HostPages, PageStore, Pager, Policy, Refusal, What},
    rng::{Philox, Stream},
};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};

/// A small page holds one piece of the norm with its state.
const PAGE: usize = 256 << 10;

fn random(shape: &[usize], seed: u64, device: Device) -> Tensor {
    let rng = Philox::new(seed, Stream { purpose: 99, step: 0, layer: 0 });
    let values: Vec<f32> = (0..shape.iter().product::<usize>() as u64).map(|i| rng.normal(i)).collect();
    let tensor = Tensor::from_slice(&values, shape, Tag::Workspace).unwrap();
    tensor.into_device(device, Tag::Workspace).unwrap()
}

/// What is trained, and how it is paged.
#[derive(Clone, Debug)]
struct Case {
    sizes: Vec<usize>,
    bits: StateBits,
    /// Micro-batches of each step.
    window: u32,
    grads: bool,
    page_bytes: usize,
    policy: Policy,
    /// Pages that may be resident, of 8: what it is before each step.
    budgets: Vec<usize>,
    /// Memory runs short now and then between a backward pass and the update.
    short: bool,
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = prop::collection::vec(prop_oneof![1usize..300, 4000usize..50_000, 60_000usize..90_000], 1..7);
    let policy = prop::sample::select(Policy::ALL.to_vec());
    let bits = prop::sample::select(vec![StateBits::F32, StateBits::Bits8]);
    let budgets = prop::collection::vec(0usize..10, 1..5);
    (sizes, bits, 1u32..3, any::<bool>(), 1usize..4, policy, budgets, any::<bool>()).prop_map(
        |(sizes, bits, window, grads, pages, policy, budgets, short)| Case {
            sizes,
            bits,
            window,
            grads,
            page_bytes: pages * PAGE,
            policy,
            budgets,
            short,
        },
    )
}

type Make<'a> = &'a dyn Fn(usize, usize) -> Result<Box<dyn PageStore>>;

/// An optimizer with its gradients.
struct Trainer {
    optimizer: AdamW,
    grads: Gradients,
    state: Option<Arc<PagedState>>,
}

impl Trainer {
    fn new(case: &Case, make: Option<Make>) -> Result<Self> {
        let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
        let Some(make) = make else {
            return Ok(Trainer { optimizer: AdamW::new(config, case.bits)?, grads: Gradients::new(), state: None });
        };
        let shapes: Vec<[usize; 1]> = case.sizes.iter().map(|&size| [size]).collect();
        let params = shapes.iter().enumerate().map(|(id, shape)| (ParamId(id), &shape[..]));
        let state = Arc::new(PagedState::new(params, case.bits, case.grads, case.page_bytes, |pages| {
            Pager::new(make(pages, case.page_bytes)?, 0, case.policy)
        })?);
        let optimizer = AdamW::paged(config, case.bits, Arc::clone(&state))?;
        let grads = if case.grads { Gradients::paged(Arc::clone(&state))? } else { Gradients::new() };
        Ok(Trainer { optimizer, grads, state: Some(state) })
    }

    /// One step; returns the norm as its bits.
    fn step(&mut self, case: &Case, params: &mut [Tensor], previous: &mut [Tensor], number: usize) -> Result<u64> {
        let device = params[0].device();
        if let Some(state) = &self.state {
            let (pager, eighths) = (state.pager(), case.budgets[number % case.budgets.len()]);
            pager.set_budget(pager.pages() * eighths / 8 * case.page_bytes)?;
        }
        for batch in 0..case.window {
            // The last parameter's gradient comes first, as in a backward pass, and some come together.
            let mut grads = Vec::new();
            for (id, &size) in case.sizes.iter().enumerate().rev() {
                let seed = (number * 1000 + id) as u64 * 10 + u64::from(batch);
                grads.push((ParamId(id), random(&[size], seed, device)));
                if id % 3 == number % 3 || id == 0 {
                    self.grads.parameters(std::mem::take(&mut grads))?;
                }
            }
        }
        if let Some(state) = self.state.as_ref().filter(|_| case.short) {
            state.pager().give_back(number % 3 * case.page_bytes);
        }
        let mut clip = self.grads.clip(1.5, 1.0)?;
        let mut updates: Vec<Update> = params
            .iter_mut()
            .zip(previous)
            .enumerate()
            .map(|(id, (value, previous))| Update {
                id: ParamId(id),
                value,
                decay: id % 2 == 0,
                rate: [1.0, 16.0][usize::from(id % 4 == 1)],
                previous: (id % 3 != 0).then_some(previous),
            })
            .collect();
        self.optimizer.step(&mut updates, &self.grads, 1e-2, &mut clip)?;
        self.grads.clear();
        Ok(clip.read()?.norm.to_bits())
    }

    /// Steps done, and the state as bytes.
    fn state(&self) -> Result<Vec<u8>> {
        let mut all = self.optimizer.steps_done().to_le_bytes().to_vec();
        for saved in self.optimizer.state()? {
            let tensor = saved?.2.into_device(Device::Cpu, Tag::Workspace)?;
            all.extend(tensor.bytes()?);
        }
        Ok(all)
    }
}

fn start(case: &Case, device: Device) -> [Vec<Tensor>; 2] {
    let params = case.sizes.iter().enumerate().map(|(id, &size)| random(&[size], id as u64, device)).collect();
    let zeros = |&size: &usize| Tensor::zeros(&[size], DType::F32, device, Tag::Workspace).unwrap();
    [params, case.sizes.iter().map(zeros).collect()]
}

fn bytes(tensors: &[Tensor]) -> Vec<Vec<u8>> {
    let host = |tensor: &Tensor| tensor.to_device(Device::Cpu, Tag::Workspace).unwrap().bytes().unwrap().to_vec();
    tensors.iter().map(host).collect()
}

/// Five steps, with a restart before one of them: into `restarted`, if given. Everything that is left behind.
fn run(case: &Case, device: Device, make: Option<Make>, restarted: Option<(usize, Case)>) -> (Vec<Vec<u8>>, Vec<u64>) {
    let mut case = case.clone();
    let [mut params, mut previous] = start(&case, device);
    let mut trainer = Trainer::new(&case, make).unwrap();
    let mut norms = Vec::new();
    for number in 0..5 {
        if let Some((_, other)) = restarted.as_ref().filter(|(at, _)| *at == number) {
            let saved: Vec<_> = trainer.optimizer.state().unwrap().map(|saved| saved.unwrap()).collect();
            let done = trainer.optimizer.steps_done();
            case = other.clone();
            trainer = Trainer::new(&case, make).unwrap();
            trainer.optimizer.restore(done, saved).unwrap();
        }
        norms.push(trainer.step(&case, &mut params, &mut previous, number).unwrap());
    }
    let mut left = bytes(&params);
    left.extend(bytes(&previous));
    left.push(trainer.state().unwrap());
    (left, norms)
}

fn host(pages: usize, page_bytes: usize) -> Result<Box<dyn PageStore>> {
    Ok(Box::new(HostPages::new(pages, page_bytes)?))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn pages_budgets_policies_and_restarts_change_no_bit(case in case(), other in case(), at in 0usize..5) {
        let whole = run(&case, Device::Cpu, None, None);
        prop_assert!(run(&case, Device::Cpu, Some(&host), None) == whole);
        // Other pages, budget and policy after the restart.
        let other = Case { sizes: case.sizes.clone(), bits: case.bits, window: case.window, ..other };
        prop_assert!(run(&case, Device::Cpu, Some(&host), Some((at, other))) == whole);
    }

    #[test]
    fn a_step_that_faults_is_done_or_fails_and_no_state_between_is_given_out(
        case in case(), after in 0u32..400, kind in 0usize..3,
    ) {
        let calls = Arc::new(Mutex::new((0u32, u32::MAX)));
        let counted = Arc::clone(&calls);
        let make = move |pages, page_bytes| -> Result<Box<dyn PageStore>> {
            let counted = Arc::clone(&counted);
            let faults: Faults = Arc::new(Mutex::new(move |name: &str| {
                let mut calls = counted.lock().unwrap();
                calls.0 += 1;
                // The device is lost for good; memory and transfers are refused now and then.
                let due = if kind == 0 { calls.0 > calls.1 } else { calls.1 < u32::MAX && calls.0 % 3 == 0 };
                let transfers = matches!(name, "bring" | "evict" | "open_lanes");
                match kind {
                    0 if due => Some(Refusal::Lost(Error::invalid("test", "the device is lost"))),
                    1 if due && transfers => Some(Refusal::NoMemory),
                    2 if due && transfers => Some(Refusal::Transfer(Error::invalid("test", "refused"))),
                    _ => None,
                }
            }));
            Ok(Box::new(HostPages::new(pages, page_bytes)?.with_faults(faults)))
        };
        let (mut good, mut faulty) = (Trainer::new(&case, None).unwrap(), Trainer::new(&case, Some(&make)).unwrap());
        let ([mut params, mut previous], [mut of_faulty, mut other]) = (start(&case, Device::Cpu), start(&case, Device::Cpu));
        good.step(&case, &mut params, &mut previous, 0).unwrap();
        faulty.step(&case, &mut of_faulty, &mut other, 0).unwrap();
        let before = (good.state().unwrap(), bytes(&params));
        *calls.lock().unwrap() = (0, after);
        let outcome = faulty.step(&case, &mut of_faulty, &mut other, 1);
        good.step(&case, &mut params, &mut previous, 1).unwrap();
        let from = (good.state().unwrap(), bytes(&params));
        calls.lock().unwrap().1 = u32::MAX;
        match outcome {
            Ok(_) => prop_assert!((faulty.state().unwrap(), bytes(&of_faulty)) == from),
            Err(error) => {
                prop_assert!(kind == 0 && error.to_string().contains("the device is lost"), "{error}");
                match faulty.state() {
                    Ok(state) => prop_assert!(state == before.0 && bytes(&of_faulty) == before.1),
                    Err(error) => prop_assert!(error.to_string().contains("failed half way"), "{error}"),
                }
            }
        }
    }
}

#[test]
fn a_state_of_other_parameters_is_refused_and_changes_nothing() {
    let case = Case {
        sizes: vec![5000, 10],
        bits: StateBits::F32,
        window: 1,
        grads: true,
        page_bytes: PAGE,
        policy: Policy::Stream,
        budgets: vec![4],
        short: false,
    };
    let [mut params, mut previous] = start(&case, Device::Cpu);
    let mut trainer = Trainer::new(&case, Some(&host)).unwrap();
    trainer.step(&case, &mut params, &mut previous, 0).unwrap();
    let before = trainer.state().unwrap();
    let saved: Vec<_> = trainer.optimizer.state().unwrap().map(|saved| saved.unwrap()).collect();
    let mut eight = Trainer::new(&Case { bits: StateBits::Bits8, ..case.clone() }, Some(&host)).unwrap();
    assert!(eight.optimizer.restore(1, saved.clone()).is_err());
    let mut other = saved.clone();
    other[0].2 = random(&[7], 0, Device::Cpu);
    let mut fewer = saved.clone();
    fewer.pop();
    let mut more = saved.clone();
    more.push((ParamId(7), saved[0].1, saved[0].2.clone()));
    for wrong in [other, fewer, more] {
        assert!(trainer.optimizer.restore(9, wrong).is_err());
        assert_eq!(trainer.state().unwrap(), before);
    }
    // Nothing saved is a fresh start.
    trainer.optimizer.restore(0, []).unwrap();
    let fresh = Trainer::new(&case, Some(&host)).unwrap();
    assert_eq!(trainer.state().unwrap(), fresh.state().unwrap());
}

#[test]
fn saving_and_restarts_at_any_step_change_no_bit_of_what_lanes_hold() {
    for (bits, grads, window) in [(StateBits::F32, false, 1), (StateBits::F32, true, 2), (StateBits::Bits8, true, 1)] {
        let case = Case {
            sizes: vec![40_000; 8],
            bits,
            window,
            grads,
            page_bytes: PAGE,
            policy: Policy::Stream,
            budgets: vec![4],
            short: false,
        };
        let whole = run(&case, Device::Cpu, None, None);
        assert!((1..3).all(|at| run(&case, Device::Cpu, Some(&host), Some((at, case.clone()))) == whole));
        let (mut alone, mut paged) = (Trainer::new(&case, None).unwrap(), Trainer::new(&case, Some(&host)).unwrap());
        let ([mut a, mut before_a], [mut b, mut before_b]) = (start(&case, Device::Cpu), start(&case, Device::Cpu));
        for number in 0..4 {
            alone.step(&case, &mut a, &mut before_a, number).unwrap();
            paged.step(&case, &mut b, &mut before_b, number).unwrap();
            assert!(bytes(&a) == bytes(&b) && alone.state().unwrap() == paged.state().unwrap(), "step {number}");
        }
    }
}

/// Pages that the sweeps of a few steps copy in, copy out and use across the bus.
fn moved(pages: usize, budget: usize, grads: bool) -> Vec<[usize; 3]> {
    let case = Case {
        sizes: vec![PIECE; pages],
        bits: StateBits::F32,
        window: 1,
        grads,
        // One piece a page, with gradients or without.
        page_bytes: if grads { 12 } else { 8 } * PIECE,
        policy: Policy::Stream,
        budgets: vec![8],
        short: false,
    };
    let mut trainer = Trainer::new(&case, Some(&host)).unwrap();
    let pager = trainer.state.as_ref().unwrap().pager().clone();
    assert_eq!(pager.pages(), pages);
    pager.set_budget(budget * case.page_bytes).unwrap();
    let [mut params, _] = start(&case, Device::Cpu);
    let gradient = random(&[PIECE], 1, Device::Cpu);
    let step = |_| {
        pager.trace(true);
        (0..pages).for_each(|id| trainer.grads.parameter(ParamId(id), gradient.clone()).unwrap());
        let mut clip = trainer.grads.clip(1.0, 1.0).unwrap();
        let update = |(id, value)| Update { id: ParamId(id), value, decay: true, rate: 1.0, previous: None };
        let mut updates: Vec<Update> = params.iter_mut().enumerate().map(update).collect();
        trainer.optimizer.step(&mut updates, &trainer.grads, 1e-3, &mut clip).unwrap();
        trainer.grads.clear();
        assert!(pager.counters().resident_peak <= budget as u64);
        let moments = pager.trace(false).unwrap().moments;
        let pages = |kinds: &[What]| -> usize {
            let of_kind = moments.iter().filter(|moment| kinds.contains(&moment.what));
            of_kind.map(|moment| moment.pages.len()).sum()
        };
        [pages(&[What::Bring, What::Stage]), pages(&[What::Evict, What::Unstage]), pages(&[What::InPlace])]
    };
    // The first step fills the budget.
    (0..4).map(step).skip(1).collect()
}

#[test]
fn a_sweep_moves_no_page_for_which_there_is_room() {
    // The benchmark's parameters, in the trainer's pages.
    let count = |bits| {
        let params = (0..448).map(|id| (ParamId(id), &[4096usize, 64][..]));
        PagedState::count_pages(params, bits, false, 3 << 20).unwrap()
    };
    let (large, small) = (count(StateBits::F32), count(StateBits::Bits8));
    for percent in [25, 50, 75] {
        let away = [large, small].map(|pages| {
            let budget = pages * percent / 100;
            let away = pages - budget;
            assert_eq!(moved(pages, budget, false), [[away, away, 0]; 3], "{budget} of {pages} pages");
            away as f64
        });
        assert!(away[1] / away[0] < 0.267, "{percent} %: {away:?} pages");
    }
    // Gradients that are stored into what lanes hold do not bring it home.
    assert_eq!(moved(30, 10, true), [[20, 20, 0]; 3]);
    assert_eq!(moved(30, 0, true), [[0, 0, 30]; 3]);
}

#[test]
fn pages_too_small_for_a_piece_are_refused() {
    let new = |page_bytes| {
        let make = |pages| Pager::new(host(pages, page_bytes)?, 0, Policy::InPlace);
        PagedState::new([(ParamId(0), &[10][..])], StateBits::F32, true, page_bytes, make)
    };
    assert!(new(128 << 10).unwrap_err().to_string().contains("256 KiB"));
    assert_eq!(new(PAGE).unwrap().pager().pages(), 1);
}

#[test]
fn gpu_launches_on_two_streams_change_no_bit() {
    let Some(device) = device_for_tests() else { return };
    let gpu = Gpu::of(device).unwrap();
    let pinned =
        |pages, page_bytes| -> Result<Box<dyn PageStore>> { Ok(Box::new(PinnedPages::new(gpu, pages, page_bytes)?)) };
    let unified =
        |pages, page_bytes| -> Result<Box<dyn PageStore>> { Ok(Box::new(UnifiedPages::new(gpu, pages, page_bytes)?)) };
    let makes: [Make; 2] = [&pinned, &unified];
    // Enough runs for a few launches, and parameters of which a part is in each of two.
    let sizes: Vec<usize> = (0..90).map(|id| 4000 + id * 7919 % 60_000).collect();
    for (bits, grads, budgets) in
        [(StateBits::F32, false, vec![0]), (StateBits::Bits8, false, vec![0]), (StateBits::Bits8, true, vec![0, 4, 1])]
    {
        let case = Case {
            sizes: sizes.clone(),
            bits,
            window: 1,
            grads,
            page_bytes: PAGE,
            policy: Policy::InPlace,
            budgets,
            short: false,
        };
        let whole = run(&case, device, None, None);
        assert!(makes.iter().all(|make| run(&case, device, Some(make), None) == whole));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn gpu_pages_change_no_bit(case in case(), unified in any::<bool>(), at in 0usize..5) {
        let Some(device) = device_for_tests() else { return Ok(()) };
        let gpu = Gpu::of(device).unwrap();
        let make = move |pages, page_bytes| -> Result<Box<dyn PageStore>> {
            Ok(match unified {
                true => Box::new(UnifiedPages::new(gpu, pages, page_bytes)?),
                false => Box::new(PinnedPages::new(gpu, pages, page_bytes)?),
            })
        };
        let whole = run(&case, device, None, None);
        let (paged, norms) = run(&case, device, Some(&make), None);
        let other: Vec<_> = (0..paged.len()).filter(|&i| paged[i] != whole.0[i]).collect();
        prop_assert!(other.is_empty() && norms == whole.1, "of parameters, those from before and the state, {other:?} differ; \
            norms {norms:?}, {:?}", whole.1);
        prop_assert!(run(&case, device, Some(&make), Some((at, case.clone()))) == whole);
    }
}
