//! Accumulated gradients: a sink of the backward pass.

use crate::paged::{PagedState, Run};
use nibble_kernels::{
    cast::{cast, cast_into},
    elementwise::add_assign,
    norm::{Clip, PIECE, Squares},
};
use nibble_runtime::{DType, Error, GradSink, ParamId, Result, Tag, Tensor};
use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::Arc,
};

/// The f32 gradients of the trainable parameters, summed over the backward passes since the last [`Gradients::clear`].
/// Memory is counted as [`Tag::Gradients`], or is the pager's.
#[derive(Debug, Default)]
pub struct Gradients {
    sums: Sums,
}

#[derive(Debug)]
enum Sums {
    /// A tensor each.
    Whole(BTreeMap<ParamId, Tensor>),
    Paged(Paged),
}

impl Default for Sums {
    fn default() -> Self {
        Sums::Whole(BTreeMap::new())
    }
}

/// Sums in pages.
#[derive(Debug)]
struct Paged {
    state: Arc<PagedState>,
    /// Parameters that have a gradient.
    present: BTreeSet<ParamId>,
    /// Squares of what was at hand when it was on its way to a page in host memory, which need not be read again.
    squares: Option<Squares>,
    /// Gradients and sums whose squares are yet to be put there, by piece of the norm.
    at_hand: Vec<(usize, Tensor)>,
    /// Runs whose squares are not among them, by page and by piece of the norm.
    unread: BTreeMap<(usize, usize), Run>,
}

/// Gradients that are kept at hand at most: about a layer's.
const AT_HAND: usize = 16;

impl Paged {
    fn parameters(&mut self, grads: impl IntoIterator<Item = (ParamId, Tensor)>) -> Result<()> {
        let mut firsts = Vec::new();
        for (id, grad) in grads {
            self.parameter(id, &wide(grad)?, &mut firsts)?;
        }
        self.store(&mut firsts)
    }

    /// Takes one gradient; what is the first of its sum and belongs on the device is left in `firsts`.
    fn parameter(&mut self, id: ParamId, grad: &Tensor, firsts: &mut Vec<(Run, Tensor)>) -> Result<()> {
        let (op, first) = ("gradients", !self.present.contains(&id));
        if !first {
            // What is at hand may be of the same pieces, and the sums come after it; so do those of one id.
            self.put_squares()?;
            self.store(firsts)?;
        }
        let entry = self.state.entry(id);
        let entry = entry.ok_or_else(|| Error::invalid(op, format!("parameter {} is not in the pages", id.0)))?;
        if grad.shape() != entry.shape {
            let what = format!("parameter {} has shape {:?}, its gradient {:?}", id.0, entry.shape, grad.shape());
            return Err(Error::shape(op, what));
        }
        let pager = self.state.pager();
        if self.squares.is_none() {
            self.squares = Some(Squares::new(self.state.pieces(), grad.device())?);
        }
        let flat = grad.reshape(&[grad.numel()])?;
        // A view of a page keeps it where it is: none is left behind by a run that fails.
        let mut at_hand = Vec::new();
        for &run in &entry.runs {
            let piece = entry.first_piece + run.start / PIECE;
            let part = flat.rows(run.start, run.count)?;
            let resident = pager.is_resident(run.page);
            let sum = if first && resident {
                firsts.push((run, part.clone()));
                part
            } else if first {
                self.state.store_grad(run, &part)?;
                part
            } else {
                let mut sum = self.state.grad(&self.state.lease(run.page..run.page + 1)?, run)?;
                add_assign(&mut sum, &part)?;
                sum
            };
            // What is in device memory is read at the end, all of it by one kernel.
            if resident {
                self.unread.insert((run.page, piece), run);
            } else {
                at_hand.push((piece, sum));
            }
        }
        self.at_hand.extend(at_hand);
        // The next micro-batch may come for the pages.
        if self.at_hand.len() >= AT_HAND || !first {
            self.put_squares()?;
        }
        self.present.insert(id);
        Ok(())
    }

    /// Stores gradients in pages of the device, those of several pages together: one by one they would take longer to begin
    /// than to copy.
    fn store(&self, firsts: &mut Vec<(Run, Tensor)>) -> Result<()> {
        let (mut sums, mut held) = (Vec::with_capacity(firsts.len()), BTreeMap::new());
        for (run, _) in firsts.iter() {
            if let Entry::Vacant(place) = held.entry(run.page) {
                place.insert(self.state.lease(run.page..run.page + 1)?);
            }
        }
        for (run, _) in firsts.iter() {
            sums.push(self.state.grad(&held[&run.page], *run)?);
        }
        cast_into(&firsts.iter().map(|(_, grad)| grad).collect::<Vec<_>>(), &mut sums)?;
        firsts.clear();
        Ok(())
    }

    /// Puts the squares of what is at hand: many at a time, since each time is a launch.
    fn put_squares(&mut self) -> Result<()> {
        let at_hand = std::mem::take(&mut self.at_hand);
        let parts: Vec<_> = at_hand.iter().map(|(piece, values)| (*piece, values)).collect();
        match self.squares.as_mut().filter(|_| !parts.is_empty()) {
            Some(squares) => squares.put(&parts),
            None => Ok(()),
        }
    }

    /// The squares of all sums.
    fn squares(&mut self) -> Result<&Squares> {
        self.put_squares()?;
        let missing = self.state.len() - self.present.len();
        let squares = self.squares.as_mut().filter(|_| missing == 0);
        let squares = squares.ok_or_else(|| {
            Error::invalid("clip", format!("{missing} parameters have no gradient: they took no part in the loss"))
        })?;
        let (mut sums, mut held) = (Vec::new(), None);
        for ((page, piece), run) in std::mem::take(&mut self.unread) {
            let held = match &mut held {
                Some((of, held)) if *of == page => held,
                held => &mut held.insert((page, self.state.lease(page..page + 1)?)).1,
            };
            sums.push((piece, self.state.grad(held, run)?));
        }
        if !sums.is_empty() {
            squares.put(&sums.iter().map(|(piece, sum)| (*piece, sum)).collect::<Vec<_>>())?;
        }
        Ok(squares)
    }
}

impl Gradients {
    /// No gradients yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// No gradients yet, of the parameters that `state` has pages for.
    ///
    /// # Errors
    /// It has none for gradients.
    pub fn paged(state: Arc<PagedState>) -> Result<Self> {
        if !state.has_grads() {
            return Err(Error::invalid("gradients", "these pages have no room for gradients"));
        }
        let (present, unread) = (BTreeSet::new(), BTreeMap::new());
        let at_hand = Vec::new();
        Ok(Gradients { sums: Sums::Paged(Paged { state, present, squares: None, at_hand, unread }) })
    }

    /// The gradient of a parameter, f32, if it has one: where it is, or copied to host memory out of its pages.
    ///
    /// # Errors
    /// The device is lost.
    pub fn get(&self, id: ParamId) -> Result<Option<Tensor>> {
        match &self.sums {
            Sums::Whole(sums) => Ok(sums.get(&id).cloned()),
            Sums::Paged(Paged { state, present, .. }) => {
                let entry = state.entry(id).filter(|_| present.contains(&id));
                entry.map(|entry| state.read_grad(entry)).transpose()
            }
        }
    }

    /// A gradient that is a tensor of its own.
    pub(crate) fn whole(&self, id: ParamId) -> Option<&Tensor> {
        match &self.sums {
            Sums::Whole(sums) => sums.get(&id),
            Sums::Paged(_) => None,
        }
    }

    /// Whether all gradients are in the pages of `state`.
    pub(crate) fn are_in(&self, state: &Arc<PagedState>) -> bool {
        matches!(&self.sums, Sums::Paged(paged) if Arc::ptr_eq(&paged.state, state) && paged.present.len() == state.len())
    }

    /// The parameters that have a gradient, in order.
    pub fn ids(&self) -> Vec<ParamId> {
        match &self.sums {
            Sums::Whole(sums) => sums.keys().copied().collect(),
            Sums::Paged(paged) => paged.present.iter().copied().collect(),
        }
    }

    /// Drops all gradients.
    pub fn clear(&mut self) {
        match &mut self.sums {
            Sums::Whole(sums) => sums.clear(),
            Sums::Paged(Paged { present, squares, at_hand, unread, .. }) => {
                present.clear();
                at_hand.clear();
                unread.clear();
                *squares = None;
            }
        }
    }

    /// What the gradients, which carry `loss_scale`, say about the update: see [`Clip::new`].
    ///
    /// # Errors
    /// There are none; or, of gradients in pages, not all.
    pub fn clip(&mut self, max_norm: f64, loss_scale: f32) -> Result<Clip> {
        self.clip_after(max_norm, loss_scale, None)
    }

    /// As [`Gradients::clip`]; where the update `before` ([`crate::AdamW::late`]) has made a parameter infinite, the next one
    /// is left out.
    ///
    /// # Errors
    /// As [`Gradients::clip`].
    pub fn clip_after(&mut self, max_norm: f64, loss_scale: f32, before: Option<&Clip>) -> Result<Clip> {
        match &mut self.sums {
            Sums::Whole(sums) => Clip::new(&sums.values().collect::<Vec<_>>(), max_norm, loss_scale),
            Sums::Paged(paged) => paged.squares()?.clip(max_norm, loss_scale, before),
        }
    }
}

/// A gradient as f32.
fn wide(grad: Tensor) -> Result<Tensor> {
    match grad.dtype() {
        DType::F32 => Ok(grad),
        DType::F16 | DType::BF16 => cast(&grad, DType::F32, Tag::Gradients),
        found => Err(Error::DType { op: "gradients", expected: "float".into(), found }),
    }
}

impl GradSink for Gradients {
    fn parameters(&mut self, grads: Vec<(ParamId, Tensor)>) -> Result<()> {
        match &mut self.sums {
            Sums::Paged(paged) => paged.parameters(grads),
            Sums::Whole(_) => grads.into_iter().try_for_each(|(id, grad)| self.parameter(id, grad)),
        }
    }

    fn parameter(&mut self, id: ParamId, grad: Tensor) -> Result<()> {
        let sums = match &mut self.sums {
            Sums::Paged(paged) => return paged.parameters([(id, grad)]),
            Sums::Whole(sums) => sums,
        };
        if let Some(sum) = sums.get_mut(&id) {
            return add_assign(sum, &grad);
        }
        let sum = match (grad.dtype(), grad.is_unique()) {
            (DType::F32, true) => grad.retag(Tag::Gradients),
            (DType::F32, false) => grad.copy(Tag::Gradients)?,
            _ => wide(grad)?,
        };
        sums.insert(id, sum);
        Ok(())
    }

    fn add(&mut self, mut into: Tensor, mut grad: Tensor) -> Result<Tensor> {
        if !into.is_unique() {
            if grad.is_unique() && grad.dtype() == into.dtype() {
                std::mem::swap(&mut into, &mut grad);
            } else {
                into = into.copy(Tag::Workspace)?;
            }
        }
        add_assign(&mut into, &grad)?;
        Ok(into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, &[values.len()], Tag::Workspace).unwrap()
    }

    fn values(tensor: &Tensor) -> &[f32] {
        tensor.as_slice().unwrap()
    }

    #[test]
    fn the_first_gradient_is_taken_over_and_the_next_are_added_in_place() {
        let mut grads = Gradients::new();
        let first = tensor(&[1.0, 2.0]);
        let address = first.bytes().unwrap().as_ptr();
        grads.parameter(ParamId(3), first).unwrap();
        let halves = tensor(&[0.5, -4.0]).cast(DType::BF16, Tag::Workspace).unwrap();
        grads.parameter(ParamId(3), halves).unwrap();
        let sum = grads.get(ParamId(3)).unwrap().unwrap();
        assert_eq!((values(&sum), sum.bytes().unwrap().as_ptr()), (&[1.5, -2.0][..], address));
        assert!(grads.parameter(ParamId(3), tensor(&[1.0])).is_err());
        assert!(grads.parameter(ParamId(4), Tensor::from_slice(&[1u8], &[1], Tag::Workspace).unwrap()).is_err());
        drop(sum);
        assert_eq!(grads.ids(), [ParamId(3)]);
        grads.clear();
        assert!(grads.ids().is_empty() && grads.get(ParamId(3)).unwrap().is_none());
    }

    #[test]
    fn a_tensor_that_others_see_is_never_written() {
        let mut grads = Gradients::new();
        let seen = tensor(&[1.0, 2.0]);
        grads.parameter(ParamId(0), seen.clone()).unwrap();
        grads.parameter(ParamId(0), tensor(&[1.0, 1.0])).unwrap();
        assert_eq!(values(&grads.get(ParamId(0)).unwrap().unwrap()), [2.0, 3.0]);
        for (a, b) in [(seen.clone(), tensor(&[5.0, 5.0])), (tensor(&[5.0, 5.0]), seen.clone())] {
            assert_eq!(values(&grads.add(a, b).unwrap()), [6.0, 7.0]);
        }
        assert_eq!(values(&grads.add(seen.clone(), seen.clone()).unwrap()), [2.0, 4.0]);
        assert_eq!(values(&seen), [1.0, 2.0]);
    }

    proptest! {
        #[test]
        fn the_norm_is_that_of_the_sums(
            passes in prop::collection::vec(prop::collection::vec(-2f32..2.0, 60), 1..4), max_norm in 0.01f64..10.0,
        ) {
            let mut grads = Gradients::new();
            let mut sums = vec![0.0; 60];
            for pass in &passes {
                for (id, part) in [(2, 0..7), (0, 7..10), (1, 10..60)] {
                    grads.parameter(ParamId(id), tensor(&pass[part])).unwrap();
                }
                sums.iter_mut().zip(pass).for_each(|(sum, x)| *sum += x);
            }
            let exact = sums.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
            let found = grads.clip(max_norm, 1.0).unwrap().read().unwrap();
            prop_assert!(found.gradients_finite && (found.norm - exact).abs() <= 1e-6 * exact);
            let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
            prop_assert_eq!(alone.install(|| grads.clip(max_norm, 1.0)).unwrap().read().unwrap(), found);
        }
    }
}
