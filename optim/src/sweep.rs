//! One update of parameters whose gradients or moments lie in pages: a sweep over the pages.

use crate::{
    Gradients, PagedState, Update,
    adamw::{Moments, named, no_gradient},
    paged::{Held, Run},
};
use nibble_kernels::{
    adamw::{self, AdamWConfig, Job},
    norm::Clip,
};
use nibble_runtime::{
    DType, Error, ParamId, Result, Tensor,
    cuda::{Event, Gpu, Stream},
    pager::{Pager, Policy, Staged},
};
use std::{ops::Range, sync::Arc};

/// What could make an update in pages fail half way, before any of it. Puts `params` in order. The device has nothing to do
/// meanwhile, so parameters and pages are gone through side by side.
pub(crate) fn check(state: &Arc<PagedState>, params: &mut [Update], grads: &Gradients) -> Result<()> {
    params.sort_unstable_by_key(|update| update.id);
    if let Some(twice) = params.windows(2).find(|pair| pair[0].id == pair[1].id) {
        return Err(named(twice[0].id, "is to be updated twice"));
    }
    let mut entries = state.entries().peekable();
    for Update { id, value, previous, .. } in &*params {
        while entries.next_if(|(entry, _)| *entry < *id).is_some() {}
        let entry = entries.next_if(|(entry, _)| entry == id);
        let (_, entry) = entry.ok_or_else(|| named(*id, "is not in the optimizer's pages"))?;
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
        match grads.whole(*id) {
            Some(grad) if grad.shape() != value.shape() => {
                return Err(named(*id, format!("has shape {:?}, its gradient {:?}", value.shape(), grad.shape())));
            }
            None if !grads.are_in(state) => return Err(no_gradient(*id)),
            _ => {}
        }
    }
    match params.len() == state.len() {
        true => Ok(()),
        false => Err(Error::invalid("adamw", format!("{} of {} parameters in pages", params.len(), state.len()))),
    }
}

/// One sweep over the pages: lane by lane those to be streamed, and where they are the others. Of the latter, `clip` says
/// whether their parameters are finite; of the former, what is returned says it later. [`check`] has put `params` in order.
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
    let most = lanes.map(|(_, most)| most);
    let (stay, streamed): (Vec<_>, Vec<_>) =
        chunks(state, most).into_iter().partition(|pages| lanes.is_none() || pager.is_resident(pages.start));
    // The lanes first: their copies need not wait for the update of what is resident.
    let late = lanes.map(|lanes| stream(state, streamed, lanes, params, grads, config, step, clip)).transpose()?;
    // Across the bus, each launch is beside the one before it, whose end would leave the bus idle.
    let away: Vec<bool> = stay.iter().map(|pages| !pager.is_resident(pages.start)).collect();
    let beside = if away.contains(&true) { pager.beside()? } else { None };
    let mut kept = Vec::new();
    let updated = stay.into_iter().zip(away).enumerate().try_for_each(|(turn, (pages, away))| {
        let on = beside.filter(|_| away).map_or(On::Compute, |streams| On::Beside(streams[turn % 2]));
        let held = state.lease(pages.clone())?;
        kept.extend(update(state, &held, pages, params, grads, config, step, clip, on)?);
        Ok(())
    });
    let joined = beside.map_or(Ok(()), |_| pager.join_beside());
    updated.and(joined).map(|()| late)
}

/// Where an update runs.
#[derive(Clone, Copy)]
enum On {
    Compute,
    /// A stream beside that, which waits for it before it goes on.
    Beside(Stream),
    /// A lane, which nobody waits for but who uses what it has updated.
    Lane(usize),
}

/// Updates pages lane by lane. What is returned says later whether their parameters are finite.
#[expect(clippy::too_many_arguments, reason = "those of a step, and which pages")]
fn stream(
    state: &Arc<PagedState>,
    chunks: Vec<Range<usize>>,
    (lanes, most): (usize, usize),
    params: &mut [Update],
    grads: &Gradients,
    config: &AdamWConfig,
    step: u32,
    clip: &Clip,
) -> Result<Clip> {
    let pager = state.pager();
    // First what the lanes hold since the last sweep. The others go in turn to the lanes, those first that hold nothing:
    // they copy in while what was held is used and copied out.
    let with_lanes = chunks.into_iter().map(|pages| (pager.holder(&pages), pages));
    let (mut chunks, others): (Vec<_>, Vec<_>) = with_lanes.partition(|(lane, _)| lane.is_some());
    chunks.sort_unstable_by_key(|(lane, _)| *lane);
    let mut chunks: Vec<_> = chunks.into_iter().filter_map(|(lane, pages)| Some((lane?, pages))).collect();
    let mut turns: Vec<usize> = (0..lanes).filter(|lane| chunks.iter().all(|(held, _)| held != lane)).collect();
    let idle = turns.len();
    turns.extend(chunks.iter().map(|(lane, _)| *lane));
    let mut others = others.into_iter().map(|(_, pages)| pages).peekable();
    // A short one goes early, so that it is not among the last.
    if let Some((lane, _)) = chunks.first().cloned() {
        chunks.splice(1..1, others.next_if(|pages| pages.len() < most).map(|short| (lane, short)));
    }
    let before = chunks.len();
    chunks.extend(others.zip(turns.iter().cycle()).map(|(pages, lane)| (*lane, pages)));
    // The lanes' last chunks stay where they are.
    let last = chunks.len().saturating_sub(lanes);
    // Nothing waits for the lanes: neither who reads the norm, nor a forward pass that starts with the first parameters.
    let mut beside = clip.beside()?;
    // Copies in are given as soon as a lane is free, before the host goes on with what other lanes have.
    let mut staged: Vec<Option<Staged>> = chunks.iter().map(|_| None).collect();
    for i in before..chunks.len().min(before + idle) {
        staged[i] = Some(pager.stage(chunks[i].1.clone(), chunks[i].0)?);
    }
    for (i, (lane, pages)) in chunks.iter().enumerate() {
        let chunk = staged[i].take().map_or_else(|| pager.stage(pages.clone(), *lane), Ok)?;
        let held = Held::Staged(chunk);
        let kept = update(state, &held, pages.clone(), params, grads, config, step, &mut beside, On::Lane(*lane))?;
        kept.into_iter().for_each(|tensor| pager.keep(tensor));
        if let Held::Staged(chunk) = held {
            let leave = if i < last { Pager::unstage } else { Pager::hold };
            leave(pager, chunk, state.clean(pages.clone()))?;
        }
        if let Some(next) = (i + 1..chunks.len()).find(|&next| chunks[next].0 == *lane) {
            staged[next] = Some(pager.stage(chunks[next].1.clone(), *lane)?);
        }
    }
    pager.leave_lanes();
    Ok(beside)
}

/// Runs of the first launch for pages where they are: the device has nothing to do until the host has made its table.
const RUNS_AT_FIRST: usize = 8;
/// Runs of later launches across the bus: their table is among the parameters, and the device takes longer for them than the
/// host.
const RUNS_AWAY: usize = 32;
/// Runs of later launches for resident pages: the device takes little longer for them than the host for its table.
const RUNS_AT_ONCE: usize = 64;

/// The pages in groups that are updated together. With lanes, the groups of pages in host memory have at most `most` pages.
fn chunks(state: &PagedState, most: Option<usize>) -> Vec<Range<usize>> {
    let pager = state.pager();
    let in_place = match pager.policy() {
        // Brought one group after another, no more than there is room for.
        Policy::Lru => (pager.budget() / pager.page_bytes()).max(1),
        _ => usize::MAX,
    };
    let (mut chunks, mut runs, mut before): (Vec<Range<usize>>, _, _) = (Vec::new(), 0, false);
    // With lanes the device is busy with those.
    let mut at_once = if most.is_none() { RUNS_AT_FIRST } else { RUNS_AT_ONCE };
    let resident: Vec<bool> = (0..pager.pages()).map(|page| pager.is_resident(page)).collect();
    // Pages in host memory from here on.
    let mut away = resident.iter().filter(|&&resident| !resident).count();
    for (page, resident) in resident.into_iter().enumerate() {
        let more = state.page(page).len();
        let joins = |last: &Range<usize>| match most {
            // The first has what is left over: the lanes hold the last, which are to fill them.
            Some(most) if !resident => away % most != 0,
            _ => last.len() < in_place && runs + more <= at_once,
        };
        match chunks.last_mut().filter(|last| resident == before && joins(last)) {
            Some(last) => {
                last.end = page + 1;
                runs += more;
            }
            None => {
                if !chunks.is_empty() {
                    at_once = if resident { RUNS_AT_ONCE } else { RUNS_AWAY };
                }
                chunks.push(page..page + 1);
                runs = more;
            }
        }
        (before, away) = (resident, away - usize::from(!resident));
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
    on: On,
) -> Result<Vec<Tensor>> {
    // Those of two precisions may lie in pages that alternate.
    let mut runs: Vec<(ParamId, Run)> = pages.flat_map(|page| state.page(page)).copied().collect();
    runs.sort_by_key(|(id, _)| *id);
    let moments = runs.iter().map(|(_, run)| state.moments(held, *run)).collect::<Result<Vec<Moments>>>();
    let mut moments = moments?;
    let mut borrowed = moments.iter_mut().map(Moments::borrow);
    let mut jobs = Vec::new();
    let from = runs.first().map_or(0, |(first, _)| params.partition_point(|update| update.id < *first));
    let mut params = params[from..].iter_mut();
    for runs in runs.chunk_by(|a, b| a.0 == b.0) {
        let Some(Update { id, value, decay, rate, previous }) = params.find(|update| update.id == runs[0].0) else {
            break;
        };
        let whole = grads.whole(*id);
        let part = |((_, run), moments): (&(_, Run), _)| {
            let grad = whole.map_or_else(|| state.grad(held, *run), |grad| grad.elements(run.start, run.count))?;
            Ok(adamw::Part { start: run.start, grad, moments })
        };
        // The runs first: they end, and no moments are taken then.
        let parts = runs.iter().zip(&mut borrowed).map(part).collect::<Result<_>>()?;
        jobs.push(Job { param: value, decay: *decay, rate: *rate, previous: previous.as_deref_mut(), parts });
    }
    let stream = match on {
        On::Compute => None,
        On::Beside(stream) => Some(stream),
        On::Lane(lane) => state.pager().lane(lane),
    };
    let kept = adamw::step_on(&mut jobs, config, step, clip, stream)?;
    if let (On::Lane(_), Some(stream)) = (on, stream) {
        let done = Event::new(Gpu::of(state.pager().device())?, false)?;
        done.record(stream)?;
        adamw::use_after(&mut jobs, clip, &Arc::new(done));
    }
    Ok(kept)
}
