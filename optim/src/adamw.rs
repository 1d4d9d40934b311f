//! The AdamW optimizer: moments for every parameter, and their update.

use crate::{Gradients, PagedState, sweep};
use nibble_kernels::{
    adamw::{self, AdamWConfig, BLOCK, Job, MomentsMut, State8},
    norm::Clip,
};
use nibble_runtime::{DType, Device, Error, ParamId, Result, Tag, Tensor};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
    sync::Arc,
};

/// Parameters with fewer elements keep 32-bit moments in any case, as with bitsandbytes.
pub const EIGHT_BIT_FROM: usize = 4096;

/// Precision of the moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum StateBits {
    /// 8 bytes an element.
    #[default]
    F32,
    /// Block-wise 8-bit codes: 2.03 bytes an element. Parameters under [`EIGHT_BIT_FROM`] elements keep f32.
    Bits8,
}

impl StateBits {
    /// Bytes of the tensors of a parameter's two moments.
    pub fn moments(self, numel: usize) -> Vec<usize> {
        match self {
            StateBits::Bits8 if numel >= EIGHT_BIT_FROM => [numel, numel.div_ceil(BLOCK) * size_of::<f32>()].repeat(2),
            _ => vec![numel * size_of::<f32>(); 2],
        }
    }
}

impl fmt::Display for StateBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StateBits::F32 => "32",
            StateBits::Bits8 => "8",
        })
    }
}

impl FromStr for StateBits {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "32" => Ok(StateBits::F32),
            "8" => Ok(StateBits::Bits8),
            _ => Err(Error::invalid("adamw", format!("unknown precision of states \"{text}\"; expected 32 or 8"))),
        }
    }
}

/// A parameter to update.
pub struct Update<'a> {
    /// Names its gradient and its moments.
    pub id: ParamId,
    /// The f32 values, overwritten. Nothing else may refer to their storage.
    pub value: &'a mut Tensor,
    /// Whether weight decay applies.
    pub decay: bool,
    /// What the step's learning rate is multiplied by for this parameter.
    pub rate: f64,
    /// Gets the values from before the update, if given: f32, of the same shape.
    pub previous: Option<&'a mut Tensor>,
}

/// A tensor of the optimizer's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// First moment: f32, or u8 codes.
    M,
    /// Scales of the first moment's codes, f32.
    MAbsmax,
    /// Second moment: f32, or u8 codes.
    V,
    /// Scales of the second moment's codes, f32.
    VAbsmax,
}

impl Part {
    /// All parts.
    pub const ALL: [Part; 4] = [Part::M, Part::MAbsmax, Part::V, Part::VAbsmax];
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::M => "m",
            Part::MAbsmax => "m.absmax",
            Part::V => "v",
            Part::VAbsmax => "v.absmax",
        })
    }
}

impl FromStr for Part {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Part::ALL.into_iter().find(|part| part.to_string() == text);
        found.ok_or_else(|| Error::invalid("adamw", format!("unknown part of the state \"{text}\"")))
    }
}

/// A tensor of the state, and whose it is.
pub type Saved = (ParamId, Part, Tensor);

/// What a tensor of the state is, without its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub id: ParamId,
    pub part: Part,
    pub dtype: DType,
    pub shape: Vec<usize>,
}

/// The moments of one parameter, or of a part of it.
#[derive(Debug)]
pub(crate) enum Moments {
    F32 { m: Tensor, v: Tensor },
    Bits8 { m: State8, v: State8 },
}

impl Moments {
    fn zeros(param: &Tensor, bits: StateBits) -> Result<Self> {
        let (device, tag) = (param.device(), Tag::Optimizer);
        if bits == StateBits::Bits8 && param.numel() >= EIGHT_BIT_FROM {
            let zeros = || State8::zeros(param.numel(), device, tag);
            return Ok(Moments::Bits8 { m: zeros()?, v: zeros()? });
        }
        let zeros = || Tensor::zeros(param.shape(), DType::F32, device, tag);
        Ok(Moments::F32 { m: zeros()?, v: zeros()? })
    }

    pub(crate) fn borrow(&mut self) -> MomentsMut<'_> {
        match self {
            Moments::F32 { m, v } => MomentsMut::F32 { m, v },
            Moments::Bits8 { m, v } => MomentsMut::Bits8 { m, v },
        }
    }

    /// These moments on `device`: a saved state comes in host memory.
    fn into_device(self, device: Device) -> Result<Self> {
        let to = |tensor: Tensor| tensor.into_device(device, Tag::Optimizer);
        let state = |state: State8| Ok::<_, Error>(State8 { codes: to(state.codes)?, absmax: to(state.absmax)? });
        Ok(match self {
            Moments::F32 { m, v } => Moments::F32 { m: to(m)?, v: to(v)? },
            Moments::Bits8 { m, v } => Moments::Bits8 { m: state(m)?, v: state(v)? },
        })
    }

    fn parts(&self) -> Vec<(Part, &Tensor)> {
        match self {
            Moments::F32 { m, v } => vec![(Part::M, m), (Part::V, v)],
            Moments::Bits8 { m, v } => {
                vec![(Part::M, &m.codes), (Part::MAbsmax, &m.absmax), (Part::V, &v.codes), (Part::VAbsmax, &v.absmax)]
            }
        }
    }

    fn from_parts(id: ParamId, mut parts: BTreeMap<Part, Tensor>) -> Result<Self> {
        let mut take = |part| match parts.remove(&part) {
            // Updates write the state, so it must not share storage.
            Some(tensor) if !tensor.is_unique() => tensor.copy(Tag::Optimizer),
            Some(tensor) => Ok(tensor.retag(Tag::Optimizer)),
            None => Err(Error::invalid("adamw", format!("the state of parameter {} lacks {part}", id.0))),
        };
        let (m, v) = (take(Part::M)?, take(Part::V)?);
        let moments = match (m.dtype(), v.dtype()) {
            (DType::F32, DType::F32) => Moments::F32 { m, v },
            (DType::U8, DType::U8) => Moments::Bits8 {
                m: State8 { codes: m, absmax: take(Part::MAbsmax)? },
                v: State8 { codes: v, absmax: take(Part::VAbsmax)? },
            },
            (m, v) => {
                let what = format!("the state of parameter {} is {m} and {v}; expected f32 or u8 for both", id.0);
                return Err(Error::invalid("adamw", what));
            }
        };
        match parts.keys().next() {
            None => Ok(moments),
            Some(part) => {
                Err(Error::invalid("adamw", format!("the state of parameter {} has {part} beside f32 moments", id.0)))
            }
        }
    }
}

/// Where moments are.
#[derive(Debug)]
enum Kept {
    /// A tensor or two for each parameter, made at its first update.
    Whole(BTreeMap<ParamId, Moments>),
    Paged(Arc<PagedState>),
}

/// AdamW over any number of parameters. State is made at a parameter's first update and counted as [`Tag::Optimizer`], or
/// is in pages.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    bits: StateBits,
    /// Updates done.
    step: u32,
    kept: Kept,
    /// Whether an update failed half way: the state is neither that from before it nor that from after it.
    torn: bool,
    /// What the part of the last update that goes on beside other work says about its parameters.
    late: Option<Clip>,
}

impl AdamW {
    /// An optimizer with no state yet. The learning rate of `config` is not used: each step is given its own.
    ///
    /// # Errors
    /// A setting is out of range.
    pub fn new(config: AdamWConfig, bits: StateBits) -> Result<Self> {
        config.validate()?;
        Ok(AdamW { config, bits, step: 0, kept: Kept::Whole(BTreeMap::new()), torn: false, late: None })
    }

    /// An optimizer whose moments, zeros at first, are in the pages of `state`. Its updates are those of one without pages
    /// to the bit.
    ///
    /// # Errors
    /// A setting is out of range.
    pub fn paged(config: AdamWConfig, bits: StateBits, state: Arc<PagedState>) -> Result<Self> {
        Ok(AdamW { kept: Kept::Paged(state), ..AdamW::new(config, bits)? })
    }

    /// Updates done so far.
    pub fn steps_done(&self) -> u32 {
        self.step
    }

    /// Bytes of the moments, or of the pages that hold them.
    pub fn state_bytes(&self) -> usize {
        match &self.kept {
            Kept::Whole(moments) => {
                moments.values().flat_map(Moments::parts).map(|(_, tensor)| tensor.size_bytes()).sum()
            }
            Kept::Paged(state) => state.pager().pages() * state.pager().page_bytes(),
        }
    }

    /// One update of `params` with learning rate `lr`, by gradients times the factor of `clip`, which was made of them.
    /// Where their norm is not finite nothing is updated, though the update counts: see [`AdamW::revoke`]. The result does
    /// not depend on the number of threads. On a GPU nothing is waited for, and an update of pages that are streamed goes on
    /// beside what the compute stream is given next: parameters are waited for when they are used.
    ///
    /// # Errors
    /// A parameter has no gradient or is named twice, types or shapes do not fit, a parameter's storage is shared, or a
    /// number is out of range. Nothing has been updated then. Or the device failed while pages were under way: the state is
    /// of no use then, and no call gives it out.
    pub fn step(&mut self, params: &mut [Update], grads: &Gradients, lr: f64, clip: &mut Clip) -> Result<()> {
        self.check_whole()?;
        let config = AdamWConfig { lr, ..self.config };
        config.validate()?;
        let step = self.step.checked_add(1).ok_or_else(|| Error::invalid("adamw", "too many updates"))?;
        match &mut self.kept {
            Kept::Whole(moments) => step_whole(moments, self.bits, params, grads, &config, step, clip)?,
            Kept::Paged(state) => {
                let state = Arc::clone(state);
                sweep::check(&state, params, grads)?;
                self.torn = true;
                self.late = sweep::step(&state, params, grads, &config, step, clip)?;
                self.torn = false;
            }
        }
        self.step = step;
        Ok(())
    }

    /// Whether the last update left every parameter finite, as far as the `clip` that it was given does not say: `None` if
    /// that says all of it. An update of which a part goes on beside other work is known here first.
    pub fn late(&self) -> Option<&Clip> {
        self.late.as_ref()
    }

    fn check_whole(&self) -> Result<()> {
        match self.torn {
            false => Ok(()),
            true => Err(Error::invalid(
                "adamw",
                format!(
                    "update {} failed half way, so the state is neither that from before it nor that from after it; go on \
                     from what was saved last",
                    self.step + 1
                ),
            )),
        }
    }

    /// Takes the last update off the count: its gradients were not finite, and it changed nothing.
    pub fn revoke(&mut self) {
        self.step = self.step.saturating_sub(1);
    }

    /// The tensors of the state, to be saved along with [`AdamW::steps_done`], in the order of the parameters. Those in
    /// pages are put together in host memory, each when the iterator comes to it.
    ///
    /// # Errors
    /// The last update failed half way, or the device is lost.
    pub fn state(&self) -> Result<Box<dyn Iterator<Item = Result<Saved>> + '_>> {
        self.check_whole()?;
        Ok(match &self.kept {
            Kept::Whole(moments) => Box::new(moments.iter().flat_map(|(&id, moments)| {
                moments.parts().into_iter().map(move |(part, tensor)| Ok((id, part, tensor.clone())))
            })),
            Kept::Paged(state) => Box::new(state.state()),
        })
    }

    /// What [`AdamW::state`] gives, in the same order, without reading it.
    pub fn layout(&self) -> Vec<Layout> {
        match &self.kept {
            Kept::Whole(moments) => {
                let parts = moments.iter().flat_map(|(&id, moments)| moments.parts().into_iter().map(move |p| (id, p)));
                let layout = |(id, (part, tensor)): (_, (_, &Tensor))| Layout {
                    id,
                    part,
                    dtype: tensor.dtype(),
                    shape: tensor.shape().to_vec(),
                };
                parts.map(layout).collect()
            }
            Kept::Paged(state) => state.layout(),
        }
    }

    /// Replaces the state by a saved one, in any memory. State in pages stays in pages. Whether a state that is not fits
    /// the parameters is checked by the next step.
    ///
    /// # Errors
    /// A parameter lacks a part, has one twice or has one that does not go with the others. The state is as before then.
    pub fn restore(&mut self, steps_done: u32, state: impl IntoIterator<Item = Saved>) -> Result<()> {
        let state: Vec<Saved> = state.into_iter().collect();
        if let (Kept::Paged(pages), true) = (&self.kept, state.is_empty()) {
            self.torn = true;
            pages.clear()?;
            (self.step, self.torn) = (steps_done, false);
            return Ok(());
        }
        let layout = |(id, part, tensor): &Saved| Layout {
            id: *id,
            part: *part,
            dtype: tensor.dtype(),
            shape: tensor.shape().to_vec(),
        };
        let layout: Vec<Layout> = state.iter().map(layout).collect();
        self.restore_streamed(steps_done, &layout, state.into_iter().map(Ok))
    }

    /// As [`AdamW::restore`], of a state that comes tensor by tensor and is as `layout` says: what goes into pages is never
    /// in memory beside them as a whole.
    ///
    /// # Errors
    /// As [`AdamW::restore`]; or `state` fails or is not as `layout` says. What was in pages is lost then, and no call gives
    /// it out.
    pub fn restore_streamed(
        &mut self,
        steps_done: u32,
        layout: &[Layout],
        state: impl IntoIterator<Item = Result<Saved>>,
    ) -> Result<()> {
        match &mut self.kept {
            Kept::Whole(moments) => {
                let mut parts: BTreeMap<ParamId, BTreeMap<Part, Tensor>> = BTreeMap::new();
                for saved in state {
                    let (id, part, tensor) = saved?;
                    if parts.entry(id).or_default().insert(part, tensor).is_some() {
                        return Err(named(id, format!("has {part} twice in its saved state")));
                    }
                }
                let restored = parts.into_iter().map(|(id, parts)| Ok((id, Moments::from_parts(id, parts)?)));
                *moments = restored.collect::<Result<_>>()?;
            }
            Kept::Paged(pages) => {
                pages.check(layout)?;
                self.torn = true;
                let mut left: BTreeSet<(ParamId, Part)> = layout.iter().map(|saved| (saved.id, saved.part)).collect();
                for saved in state {
                    let (id, part, tensor) = saved?;
                    pages.write(id, part, &tensor)?;
                    left.remove(&(id, part));
                }
                if let Some((id, part)) = left.first() {
                    return Err(named(*id, format!("lacks {part} in its saved state")));
                }
            }
        }
        (self.step, self.torn) = (steps_done, false);
        Ok(())
    }
}

pub(crate) fn named(id: ParamId, what: impl fmt::Display) -> Error {
    Error::invalid("adamw", format!("parameter {} {what}", id.0))
}

pub(crate) fn no_gradient(id: ParamId) -> Error {
    named(id, "has no gradient: it took no part in the loss")
}

fn step_whole(
    all: &mut BTreeMap<ParamId, Moments>,
    bits: StateBits,
    params: &mut [Update],
    grads: &Gradients,
    config: &AdamWConfig,
    step: u32,
    clip: &mut Clip,
) -> Result<()> {
    for Update { id, value, .. } in params.iter() {
        let moments = match all.remove(id) {
            Some(moments) => moments.into_device(value.device())?,
            None => Moments::zeros(value, bits)?,
        };
        all.insert(*id, moments);
    }
    let mut moments: BTreeMap<ParamId, &mut Moments> = all.iter_mut().map(|(&id, m)| (id, m)).collect();
    let mut jobs = Vec::with_capacity(params.len());
    for Update { id, value, decay, rate, previous } in params {
        let grad = grads.whole(*id).ok_or_else(|| no_gradient(*id))?;
        if grad.shape() != value.shape() {
            return Err(named(*id, format!("has shape {:?}, its gradient {:?}", value.shape(), grad.shape())));
        }
        let moments = moments.remove(id).ok_or_else(|| named(*id, "is to be updated twice"))?;
        let whole = Job::whole(value, grad, moments.borrow(), *decay);
        jobs.push(Job { previous: previous.as_deref_mut(), rate: *rate, ..whole });
    }
    adamw::step_all(&mut jobs, config, step, clip)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nibble_runtime::GradSink;
    use proptest::prelude::*;

    /// Element counts of the parameters of a small model: one of them gets 8-bit moments.
    const SIZES: [usize; 4] = [3, 5000, 1, 700];

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, &[values.len()], Tag::Adapters).unwrap()
    }

    fn parameters() -> Vec<Tensor> {
        SIZES.iter().map(|&size| tensor(&(0..size).map(|i| (i as f32).sin()).collect::<Vec<_>>())).collect()
    }

    fn gradients(seed: u32) -> Gradients {
        let mut grads = Gradients::new();
        for (id, &size) in SIZES.iter().enumerate() {
            let values: Vec<f32> = (0..size).map(|i| ((i as u32 * 7 + 13 * seed) as f32).cos()).collect();
            grads.parameter(ParamId(id), tensor(&values)).unwrap();
        }
        grads
    }

    /// The parameters as updates, weight decay on every other one.
    fn updates(params: &mut [Tensor]) -> Vec<Update<'_>> {
        let update = |(id, value)| Update { id: ParamId(id), value, decay: id % 2 == 0, rate: 1.0, previous: None };
        params.iter_mut().enumerate().map(update).collect()
    }

    fn bytes(params: &[Tensor]) -> Vec<&[u8]> {
        params.iter().map(|param| param.bytes().unwrap()).collect()
    }

    /// A clip of `grads` that does no clipping; `scale` is what their loss was multiplied by.
    fn clip(grads: &mut Gradients, scale: f32) -> Clip {
        grads.clip(0.0, scale).unwrap()
    }

    fn saved(optimizer: &AdamW) -> Vec<Vec<u8>> {
        optimizer.state().unwrap().map(|saved| saved.unwrap().2.bytes().unwrap().to_vec()).collect()
    }

    fn optimizer(bits: StateBits) -> AdamW {
        AdamW::new(AdamWConfig::default(), bits).unwrap()
    }

    #[test]
    fn small_parameters_keep_32_bits() {
        let mut params = parameters();
        let numel: usize = SIZES.iter().sum();
        for (bits, expected) in
            [(StateBits::F32, 8 * numel), (StateBits::Bits8, 8 * (numel - 5000) + 2 * (5000 + 4 * 20))]
        {
            let mut optimizer = optimizer(bits);
            assert_eq!(optimizer.state_bytes(), 0);
            optimizer.step(&mut updates(&mut params), &gradients(0), 1e-3, &mut clip(&mut gradients(0), 1.0)).unwrap();
            assert_eq!((optimizer.state_bytes(), optimizer.steps_done()), (expected, 1));
            assert_eq!(bits.to_string().parse::<StateBits>().unwrap(), bits);
        }
    }

    #[test]
    fn weight_decay_spares_whom_it_should() {
        let mut params = parameters();
        let before = params.iter().map(|p| p.as_slice::<f32>().unwrap().to_vec()).collect::<Vec<_>>();
        let mut none = Gradients::new();
        for (id, &size) in SIZES.iter().enumerate() {
            none.parameter(ParamId(id), tensor(&vec![0.0; size])).unwrap();
        }
        let mut clip = clip(&mut none, 1.0);
        optimizer(StateBits::F32).step(&mut updates(&mut params), &none, 0.5, &mut clip).unwrap();
        for (id, (after, before)) in params.iter().zip(before).enumerate() {
            let factor = if id % 2 == 0 { 1.0 - 0.5 * 0.01 } else { 1.0 };
            assert!(after.as_slice::<f32>().unwrap().iter().zip(before).all(|(a, b)| *a == b * factor));
        }
    }

    #[test]
    fn each_parameter_has_its_own_learning_rate() {
        let run = |lr: f64, rates: [f64; 4]| {
            let (mut params, mut optimizer) = (parameters(), optimizer(StateBits::F32));
            let mut all = updates(&mut params);
            all.iter_mut().zip(rates).for_each(|(update, rate)| update.rate = rate);
            let mut clip = clip(&mut gradients(0), 1.0);
            optimizer.step(&mut all, &gradients(0), lr, &mut clip).unwrap();
            params
        };
        let mixed = run(1e-3, [1.0, 8.0, 8.0, 0.0]);
        let (slow, fast, still) = (run(1e-3, [1.0; 4]), run(8e-3, [1.0; 4]), parameters());
        let expected = [&slow[0], &fast[1], &fast[2], &still[3]].map(|tensor| tensor.bytes().unwrap());
        assert_eq!(bytes(&mixed), expected);
    }

    #[test]
    fn a_step_that_fails_changes_nothing() {
        let mut params = parameters();
        let mut optimizer = optimizer(StateBits::Bits8);
        optimizer.step(&mut updates(&mut params), &gradients(0), 1e-3, &mut clip(&mut gradients(0), 1.0)).unwrap();
        let before: Vec<Vec<u8>> = bytes(&params).into_iter().map(<[u8]>::to_vec).collect();
        let state = saved(&optimizer);

        let mut missing = Gradients::new();
        let mut wrong = Gradients::new();
        let good = gradients(1);
        for id in good.ids().into_iter().take(3) {
            let grad = good.get(id).unwrap().unwrap();
            missing.parameter(id, grad.clone()).unwrap();
            wrong.parameter(id, grad).unwrap();
        }
        wrong.parameter(ParamId(3), tensor(&[1.0; 699])).unwrap();
        for mut grads in [missing, wrong] {
            let mut clip = grads.clip(0.0, 1.0).unwrap();
            assert!(optimizer.step(&mut updates(&mut params), &grads, 1e-3, &mut clip).is_err());
        }
        let good = || clip(&mut gradients(1), 1.0);
        for lr in [f64::NAN, -1.0] {
            assert!(optimizer.step(&mut updates(&mut params), &gradients(1), lr, &mut good()).is_err());
        }
        let seen = params[3].clone();
        assert!(optimizer.step(&mut updates(&mut params), &gradients(1), 1e-3, &mut good()).is_err());
        drop(seen);
        let mut twice = updates(&mut params);
        twice[1].id = ParamId(0);
        assert!(optimizer.step(&mut twice, &gradients(1), 1e-3, &mut good()).is_err());

        assert_eq!(bytes(&params), before);
        assert_eq!(saved(&optimizer), state);
        assert_eq!(optimizer.steps_done(), 1);
    }

    #[test]
    fn gradients_that_are_not_finite_change_nothing_and_their_step_can_be_revoked() {
        let (mut params, mut optimizer) = (parameters(), optimizer(StateBits::F32));
        optimizer.step(&mut updates(&mut params), &gradients(0), 1e-3, &mut clip(&mut gradients(0), 1.0)).unwrap();
        let before = bytes(&params).concat();
        let mut grads = gradients(1);
        grads.parameter(ParamId(0), tensor(&[0.0, f32::NAN, 0.0])).unwrap();
        let mut clip = clip(&mut grads, 1.0);
        optimizer.step(&mut updates(&mut params), &grads, 1e-3, &mut clip).unwrap();
        assert!(!clip.read().unwrap().gradients_finite);
        assert_eq!((bytes(&params).concat(), optimizer.steps_done()), (before, 2));
        optimizer.revoke();
        assert_eq!(optimizer.steps_done(), 1);
    }

    #[test]
    fn the_values_from_before_are_kept_for_who_asks() {
        let (mut params, mut optimizer) = (parameters(), optimizer(StateBits::F32));
        let before = params[0].as_slice::<f32>().unwrap().to_vec();
        let mut previous = tensor(&[0.0; SIZES[0]]);
        let (mut grads, mut all) = (gradients(0), updates(&mut params));
        let mut clip = clip(&mut grads, 1.0);
        all[0].previous = Some(&mut previous);
        optimizer.step(&mut all, &grads, 1e-3, &mut clip).unwrap();
        assert_eq!(previous.as_slice::<f32>().unwrap(), before);
        assert_ne!(params[0].as_slice::<f32>().unwrap(), before);
    }

    #[test]
    fn a_state_with_parts_that_do_not_go_together_is_refused() {
        let f32s = || tensor(&[0.0; 4]);
        let u8s = || Tensor::from_slice(&[0u8; 4], &[4], Tag::Workspace).unwrap();
        let bad: [Vec<(Part, Tensor)>; 6] = [
            vec![(Part::M, f32s())],
            vec![(Part::M, f32s()), (Part::V, u8s())],
            vec![(Part::M, u8s()), (Part::V, u8s()), (Part::MAbsmax, f32s())],
            vec![(Part::M, f32s()), (Part::V, f32s()), (Part::VAbsmax, f32s())],
            vec![(Part::M, f32s()), (Part::V, f32s()), (Part::M, f32s())],
            vec![(Part::V, f32s())],
        ];
        let mut optimizer = optimizer(StateBits::F32);
        for parts in bad {
            let parts = parts.into_iter().map(|(part, tensor)| (ParamId(1), part, tensor));
            assert!(optimizer.restore(3, parts).is_err());
        }
        assert_eq!((optimizer.steps_done(), optimizer.state().unwrap().count()), (0, 0));
        assert!(Part::ALL.into_iter().all(|part| part.to_string().parse::<Part>().unwrap() == part));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn neither_threads_nor_a_restart_change_a_bit(eight in any::<bool>(), at in 0u32..6, threads in 1usize..4) {
            let bits = if eight { StateBits::Bits8 } else { StateBits::F32 };
            let run = |restart: Option<u32>| {
                let (mut params, mut optimizer) = (parameters(), optimizer(bits));
                for step in 0..6 {
                    if restart == Some(step) {
                        let saved: Vec<_> = optimizer.state().unwrap().map(|saved| saved.unwrap()).collect();
                        let done = optimizer.steps_done();
                        optimizer = self::optimizer(bits);
                        optimizer.restore(done, saved).unwrap();
                    }
                    let mut grads = gradients(step);
                    let mut clip = clip(&mut grads, 2.0);
                    optimizer.step(&mut updates(&mut params), &grads, 1e-2, &mut clip).unwrap();
                }
                bytes(&params).concat()
            };
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            prop_assert!(run(None) == pool.install(|| run(Some(at))));
        }
    }
}
