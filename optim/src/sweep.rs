//! One update of parameters whose gradients or moments lie in pages: a sweep over the pages.

use crate::{
    Gradients, PagedState, Update,
    adamw::{Moments, named, no_gradient},
    paged::Held,
};
use nibble_kernels::{
    adamw::{self, AdamWConfig, Job},
    norm::Clip,
};
use nibble_runtime::{DType, Error, ParamId, Result, Tensor, pager::Policy};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

/// What could make an update in pages fail half way, before any of it.
pub(crate) fn check(state: &Arc<PagedState>, params: &[Update], grads: &Gradients) -> Result<()> {
    let mut seen = BTreeSet::new();
    for Update { id, value, previous, .. } in params {
        let entry = state.entry(*id).ok_or_else(|| named(*id, "is not in the optimizer's pages"))?;
        if value.shape() != entry.shape || value.dtype() != DType::F32 {
            return Err(named(*id, format!("is {value:?}; its pages are for f32 of shape {:?}", entry.shape)));
        }
        if let Some(previous) = previous.as_ref().filter(|previous| previous.shape() != value.shape()) {
            return Err(named(*id, format!("is {value:?}; its values from before are to go to {previous:?}")));
        }
        if !value.is_unique() || previous.as_ref().is_some_and(|previous| !previous.is_unique()) {
            return Err(Error::Shared { op: "adamw" });
        }
        if value.device() != state.pager().device() {
            return Err(named(*id, format!("is on {}, its pages are for {}", value.device(), state.pager().device())));
        }
        if !seen.insert(*id) {
            return Err(named(*id, "is to be updated twice"));
        }
        match grads.whole(*id) {
            Some(grad) if grad.shape() != value.shape() => {
                return Err(named(*id, format!("has shape {:?}, its gradient {:?}", value.shape(), grad.shape())));
            }
            None if !grads.are_in(state) => return Err(no_gradient(*id)),
            _ => {}
        }
    }
    match seen.len() == state.len() {
        true => Ok(()),
        false => Err(Error::invalid("adamw", format!("{} of {} parameters in pages", seen.len(), state.len()))),
    }
}

/// One sweep over the pages: those in device memory and those used in place by one launch, the others lane by lane. What is
/// returned says later whether the parameters of the latter are finite; `clip` says it of the others.
pub(crate) fn step(
    state: &Arc<PagedState>,
    params: &mut [Update],
    grads: &Gradients,
    config: &AdamWConfig,
    step: u32,
    clip: &mut Clip,
) -> Result<Option<Clip>> {
    let pager = state.pager();
    pager.settle()?;
    let lanes = pager.open_lanes()?;
    let (mut streamed, mut lane) = (Vec::new(), 0);
    for pages in chunks(state, lanes.map(|(_, most)| most)) {
        let stays = lanes.is_none() || pager.is_resident(pages.start);
        if stays {
            let held = state.lease(pages.clone())?;
            update(state, &held, pages, params, grads, config, step, clip, None)?;
        } else {
            streamed.push(pages);
        }
    }
    let Some((count, _)) = lanes else { return Ok(None) };
    // Nothing waits for the lanes: neither who reads the norm, nor a forward pass that starts with the first parameters.
    let mut beside = clip.beside()?;
    for pages in streamed {
        let held = Held::Staged(pager.stage(pages.clone(), lane)?);
        let kept = update(state, &held, pages.clone(), params, grads, config, step, &mut beside, Some(lane))?;
        kept.into_iter().for_each(|tensor| pager.keep(tensor));
        if let Held::Staged(staged) = held {
            pager.unstage(staged, state.clean(pages))?;
        }
        lane = (lane + 1) % count;
    }
    pager.leave_lanes();
    Ok(Some(beside))
}

/// The pages in groups that are updated together. With lanes, the groups of pages in host memory have at most `most` pages.
fn chunks(state: &PagedState, most: Option<usize>) -> Vec<Range<usize>> {
    let pager = state.pager();
    let limit = match most {
        Some(most) => most,
        // Brought one group after another, no more than there is room for.
        None if pager.policy() == Policy::Lru => (pager.budget() / pager.page_bytes()).max(1),
        None => pager.pages(),
    };
    let mut chunks: Vec<Range<usize>> = Vec::new();
    for page in 0..pager.pages() {
        let resident = most.is_some() && pager.is_resident(page);
        match chunks.last_mut() {
            Some(last) if most.is_some() && pager.is_resident(last.start) != resident => chunks.push(page..page + 1),
            Some(last) if resident || last.len() < limit => last.end = page + 1,
            _ => chunks.push(page..page + 1),
        }
    }
    chunks
}

/// Updates what lies in pages that are held.
#[expect(clippy::too_many_arguments, reason = "those of a step, and which pages")]
fn update(
    state: &Arc<PagedState>,
    held: &Held,
    pages: Range<usize>,
    params: &mut [Update],
    grads: &Gradients,
    config: &AdamWConfig,
    step: u32,
    clip: &mut Clip,
    lane: Option<usize>,
) -> Result<Vec<Tensor>> {
    let mut views: BTreeMap<ParamId, Vec<(usize, Tensor, Moments)>> = BTreeMap::new();
    for &(id, run) in pages.flat_map(|page| state.page(page)) {
        let grad = match grads.whole(id) {
            Some(grad) => grad.reshape(&[grad.numel()])?.rows(run.start, run.count)?,
            None => state.grad(held, run)?,
        };
        views.entry(id).or_default().push((run.start, grad, state.moments(held, id, run)?));
    }
    let mut jobs = Vec::with_capacity(views.len());
    let mut views: BTreeMap<ParamId, &mut Vec<_>> = views.iter_mut().map(|(&id, views)| (id, views)).collect();
    for Update { id, value, decay, rate, previous } in params {
        let Some(views) = views.remove(id) else { continue };
        let part = views.iter_mut().map(|(start, grad, moments)| adamw::Part {
            start: *start,
            grad: grad.clone(),
            moments: moments.borrow(),
        });
        let parts = part.collect();
        jobs.push(Job { param: value, decay: *decay, rate: *rate, previous: previous.as_deref_mut(), parts });
    }
    let stream = lane.and_then(|lane| state.pager().lane(lane));
    adamw::step_on(&mut jobs, config, step, clip, stream)
}
