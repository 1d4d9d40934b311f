//! What is updated: 117M parameters in 448 tensors, with gradients and the optimizer's state.

use crate::case::{Case, Paging, Store};
use nibble_kernels::norm::Clip;
use nibble_optim::{AdamW, AdamWConfig, Gradients, PagedState, Update};
use nibble_runtime::{
    GradSink, ParamId, Result, Tag, Tensor,
    cuda::{Gpu, PinnedPages, Timer, UnifiedPages},
    pager::{PageStore, Pager},
    rng::{Philox, Stream},
};
use std::{sync::Arc, time::Instant};

pub const TENSORS: usize = 448;
pub const SHAPE: [usize; 2] = [4096, 64];
/// Elements in all.
pub const ELEMENTS: usize = TENSORS * SHAPE[0] * SHAPE[1];

const LR: f64 = 1e-4;

/// An optimizer in the middle of its work.
pub struct Workload {
    gpu: &'static Gpu,
    params: Vec<Tensor>,
    grads: Gradients,
    clip: Clip,
    optimizer: AdamW,
    /// If it is paged.
    pub state: Option<Arc<PagedState>>,
}

/// Milliseconds of a step.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// By the device, on the compute stream.
    pub device: f64,
    /// By the host's clock, from the call until the device is done.
    pub wall: f64,
}

fn paged(gpu: &'static Gpu, case: &Case, paging: Paging) -> Result<Arc<PagedState>> {
    let Paging { store, policy, budget, page_bytes, grads } = paging;
    let params = (0..TENSORS).map(|id| (ParamId(id), &SHAPE[..]));
    let state = PagedState::new(params, case.bits, grads, page_bytes, |pages| {
        let store: Box<dyn PageStore> = match store {
            Store::Pinned => Box::new(PinnedPages::new(gpu, pages, page_bytes)?),
            Store::Unified => Box::new(UnifiedPages::new(gpu, pages, page_bytes)?),
        };
        Pager::new(store, pages * budget / 100 * page_bytes, policy)
    })?;
    Ok(Arc::new(state))
}

impl Workload {
    pub fn new(gpu: &'static Gpu, case: &Case) -> Result<Self> {
        // The same numbers in every tensor: making others would take longer than the benchmark.
        let rng = Philox::new(7, Stream { purpose: 99, step: 0, layer: 0 });
        let values: Vec<f32> = (0..SHAPE[0] * SHAPE[1]).map(|i| rng.normal(i as u64)).collect();
        let values = Tensor::from_slice(&values, &SHAPE, Tag::Workspace)?.to_device(gpu.device(), Tag::Workspace)?;
        let params = (0..TENSORS).map(|_| values.copy(Tag::Adapters)).collect::<Result<_>>()?;

        let state = case.paging.map(|paging| paged(gpu, case, paging)).transpose()?;
        let config = AdamWConfig::default();
        let optimizer = match &state {
            Some(state) => AdamW::paged(config, case.bits, Arc::clone(state))?,
            None => AdamW::new(config, case.bits)?,
        };
        let mut grads = match &state {
            Some(state) if state.has_grads() => Gradients::paged(Arc::clone(state))?,
            _ => Gradients::new(),
        };
        for id in 0..TENSORS {
            grads.parameter(ParamId(id), values.clone())?;
        }
        let clip = grads.clip(0.0, 1.0)?;
        Ok(Workload { gpu, params, grads, clip, optimizer, state })
    }

    /// One [`AdamW::step`].
    pub fn step(&mut self) -> Result<Took> {
        let update = |(id, value)| Update { id: ParamId(id), value, decay: true, rate: 1.0, previous: None };
        let mut updates: Vec<Update> = self.params.iter_mut().enumerate().map(update).collect();
        self.gpu.synchronize()?;
        let begun = Instant::now();
        let timer = Timer::start(self.gpu)?;
        self.optimizer.step(&mut updates, &self.grads, LR, &mut self.clip)?;
        // All of it: also what would go on beside the next forward pass.
        self.state.iter().try_for_each(|state| state.pager().join_lanes())?;
        let device = timer.milliseconds()?;
        self.gpu.synchronize()?;
        Ok(Took { device, wall: begun.elapsed().as_secs_f64() * 1e3 })
    }
}
