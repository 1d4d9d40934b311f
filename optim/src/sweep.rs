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
use nibble_runtime::{
    DType, Error, ParamId, Result, Tensor,
    pager::{Pager, Policy},
};
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

/// One sweep over the pages: lane by lane those to be streamed, and where they are the others. Of the latter, `clip` says
/// whether their parameters are finite; of the former, what is returned says it later. `params` are put in order.
pub(crate) fn step(
    state: &Arc<PagedState>,
    params: &mut [Update],
    grads: &Gradients,
    config: &AdamWConfig,
    step: u32,
    clip: &mut Clip,
) -> Result<Option<Clip>> {
    params.sort_unstable_by_key(|update| update.id);
    let pager = state.pager();
    pager.settle()?;
    let lanes = pager.open_lanes()?;
    let most = lanes.map(|(_, most)| most);
    let (stay, streamed): (Vec<_>, Vec<_>) =
        chunks(state, most).into_iter().partition(|pages| lanes.is_none() || pager.is_resident(pages.start));
    // The lanes first: their copies need not wait for the update of what is resident.
    let late = lanes.map(|(count, _)| stream(state, streamed, count, params, grads, config, step, clip)).transpose()?;
    for pages in stay {
        let held = state.lease(pages.clone())?;
        update(state, &held, pages, params, grads, config, step, clip, None)?;
    }
    Ok(late)
}

/// Updates pages lane by lane. What is returned says later whether their parameters are finite.
#[expect(clippy::too_many_arguments, reason = "those of a step, and which pages")]
fn stream(
    state: &Arc<PagedState>,
    chunks: Vec<Range<usize>>,
    lanes: usize,
    params: &mut [Update],
    grads: &Gradients,
    config: &AdamWConfig,
    step: u32,
    clip: &Clip,
) -> Result<Clip> {
    let pager = state.pager();
    // First what the lanes hold since the last sweep, then the others in turn.
    let with_lanes = chunks.into_iter().map(|pages| (pager.holder(&pages), pages));
    let (mut chunks, others): (Vec<_>, Vec<_>) = with_lanes.partition(|(lane, _)| lane.is_some());
    chunks.sort_unstable_by_key(|(lane, _)| *lane);
    chunks.extend(others);
    // The lanes' last chunks stay where they are.
    let last = chunks.len().saturating_sub(lanes);
    // Nothing waits for the lanes: neither who reads the norm, nor a forward pass that starts with the first parameters.
    let mut beside = clip.beside()?;
    for (i, (lane, pages)) in chunks.into_iter().enumerate() {
        let lane = lane.unwrap_or(i % lanes);
        let held = Held::Staged(pager.stage(pages.clone(), lane)?);
        let kept = update(state, &held, pages.clone(), params, grads, config, step, &mut beside, Some(lane))?;
        kept.into_iter().for_each(|tensor| pager.keep(tensor));
        if let Held::Staged(staged) = held {
            let leave = if i < last { Pager::unstage } else { Pager::hold };
            leave(pager, staged, state.clean(pages))?;
        }
    }
    pager.leave_lanes();
    Ok(beside)
}

/// Runs after which a launch for pages where they are takes no further page: the host makes the table of the next launch
/// while the device is busy with one.
const RUNS_AT_ONCE: usize = 64;

/// The pages in groups that are updated together. With lanes, the groups of pages in host memory have at most `most` pages.
fn chunks(state: &PagedState, most: Option<usize>) -> Vec<Range<usize>> {
    let pager = state.pager();
    let in_place = match pager.policy() {
        // Brought one group after another, no more than there is room for.
        Policy::Lru => (pager.budget() / pager.page_bytes()).max(1),
        _ => usize::MAX,
    };
    let stays = |page| most.is_none() || pager.is_resident(page);
    let (mut chunks, mut runs): (Vec<Range<usize>>, _) = (Vec::new(), 0);
    for page in 0..pager.pages() {
        let limit = if stays(page) { in_place } else { most.unwrap_or(1) };
        match chunks.last_mut() {
            Some(last)
                if stays(last.start) == stays(page) && last.len() < limit && (runs < RUNS_AT_ONCE || !stays(page)) =>
            {
                last.end = page + 1;
            }
            _ => {
                chunks.push(page..page + 1);
                runs = 0;
            }
        }
        runs += state.page(page).len();
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
    // Of the parameters, which are in order, only those between the first and the last of the pages.
    let from = views.first_key_value().map_or(0, |(first, _)| params.partition_point(|update| update.id < *first));
    let to = views.last_key_value().map_or(0, |(last, _)| params.partition_point(|update| update.id <= *last));
    for Update { id, value, decay, rate, previous } in &mut params[from..to] {
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
