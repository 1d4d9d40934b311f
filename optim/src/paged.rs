//! What an optimizer keeps for its parameters, page by page: gradient sums and moments.
//!
//! A page holds all of it for some run of elements, part after part:
//!
//! ```text
//! 32-bit moments   | gradients f32 | m f32 | v f32 |
//!  8-bit moments   | gradients f32 | m codes | v codes | m absmax | v absmax |
//! ```
//! (gradients only where they are paged too), so that the update of a run needs one page, and a sweep over the parameters
//! is a sweep over the pages. A large parameter takes several pages, and small ones share one. Runs start at whole pieces
//! of the global norm ([`PIECE`]), or lie inside of one: neither the norm nor an update depends on where pages end.

use crate::{
    StateBits,
    adamw::{EIGHT_BIT_FROM, Layout, Moments, Part},
};
use nibble_kernels::{
    adamw::{BLOCK, State8},
    norm::PIECE,
};
use nibble_runtime::{
    DType, Device, Error, ParamId, Result, Tag, Tensor,
    pager::{Lease, Pager, Staged},
};
use std::{collections::BTreeMap, ops::Range, sync::Arc};

/// A run of a parameter's elements, which lies in one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub page: usize,
    /// The first element, counted in the page.
    slot: usize,
    /// The first element, counted in the parameter.
    pub start: usize,
    /// Elements.
    pub count: usize,
}

/// How a page is divided.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Form {
    bits: StateBits,
    grads: bool,
    /// Elements of a page. The last page of a precision has only as many as it needs.
    capacity: usize,
}

impl Form {
    fn new(bits: StateBits, grads: bool, page_bytes: usize) -> Result<Self> {
        let moments = match bits {
            StateBits::F32 => 8 * PIECE,
            StateBits::Bits8 => 2 * PIECE + 8 * PIECE / BLOCK,
        };
        let capacity = page_bytes / (moments + if grads { 4 * PIECE } else { 0 }) * PIECE;
        if capacity == 0 {
            let what = format!("pages of {page_bytes} bytes are too small; the least is 256 KiB");
            return Err(Error::invalid("paged state", what));
        }
        Ok(Form { bits, grads, capacity })
    }

    /// Bytes before the moments: those that an update only reads.
    fn clean(&self) -> usize {
        if self.grads { 4 * self.capacity } else { 0 }
    }

    /// Bytes of a page that hold anything.
    fn bytes(&self) -> usize {
        self.clean()
            + match self.bits {
                StateBits::F32 => 8 * self.capacity,
                StateBits::Bits8 => 2 * self.capacity + 8 * self.capacity.div_ceil(BLOCK),
            }
    }

    /// Where a part of `run` lies in its page: offset, type and number of elements.
    fn place(&self, part: Part, run: Run) -> (usize, DType, usize) {
        let (base, all) = (self.clean(), self.capacity);
        let block = |base: usize| (base + 4 * (run.slot / BLOCK), DType::F32, run.count.div_ceil(BLOCK));
        match (self.bits, part) {
            (StateBits::F32, Part::M | Part::MAbsmax) => (base + 4 * run.slot, DType::F32, run.count),
            (StateBits::F32, Part::V | Part::VAbsmax) => (base + 4 * (all + run.slot), DType::F32, run.count),
            (StateBits::Bits8, Part::M) => (base + run.slot, DType::U8, run.count),
            (StateBits::Bits8, Part::V) => (base + all + run.slot, DType::U8, run.count),
            (StateBits::Bits8, Part::MAbsmax) => block(base + 2 * all),
            (StateBits::Bits8, Part::VAbsmax) => block(base + 2 * all + 4 * (all / BLOCK)),
        }
    }
}

/// The parts of a parameter's state.
fn parts(bits: StateBits) -> &'static [Part] {
    match bits {
        StateBits::F32 => &[Part::M, Part::V],
        StateBits::Bits8 => &Part::ALL,
    }
}

/// What lies in a page.
#[derive(Debug)]
struct Page {
    form: Form,
    runs: Vec<(ParamId, Run)>,
}

/// What is kept for one parameter.
#[derive(Debug)]
pub(crate) struct Entry {
    bits: StateBits,
    pub shape: Vec<usize>,
    pub runs: Vec<Run>,
    /// Number of its first piece in the global norm.
    pub first_piece: usize,
}

/// Gradient sums and moments of parameters, in pages. Shared by [`crate::Gradients`] and [`crate::AdamW`].
#[derive(Debug)]
pub struct PagedState {
    pager: Pager,
    entries: BTreeMap<ParamId, Entry>,
    pages: Vec<Page>,
    grads: bool,
    pieces: usize,
}

/// Where pages are while they are used.
pub(crate) enum Held {
    Leased(Vec<Arc<Lease>>, usize),
    Staged(Staged),
}

impl Held {
    fn tensor(&self, page: usize, offset: usize, dtype: DType, count: usize) -> Result<Tensor> {
        match self {
            Held::Leased(leases, first) => leases[page - first].tensor(offset, dtype, &[count]),
            Held::Staged(staged) => staged.tensor(page, offset, dtype, &[count]),
        }
    }
}

/// A place for the next run, by form.
#[derive(Default)]
struct Cursor {
    page: Option<usize>,
    slot: usize,
}

/// Where everything lies.
struct Places {
    entries: BTreeMap<ParamId, Entry>,
    pages: Vec<Page>,
    pieces: usize,
}

impl Places {
    fn new<'a>(
        params: impl IntoIterator<Item = (ParamId, &'a [usize])>,
        bits: StateBits,
        grads: bool,
        page_bytes: usize,
    ) -> Result<Self> {
        let mut entries = BTreeMap::new();
        let mut pages: Vec<Page> = Vec::new();
        let (mut pieces, mut cursors) = (0, [Cursor::default(), Cursor::default()]);
        for (id, shape) in params {
            let numel: usize = shape.iter().product();
            let bits = if numel >= EIGHT_BIT_FROM { bits } else { StateBits::F32 };
            let form = Form::new(bits, grads, page_bytes)?;
            let cursor = &mut cursors[usize::from(bits == StateBits::Bits8)];
            // Whole pieces from a piece's start on, or less than one inside of one.
            let room = PIECE - cursor.slot % PIECE;
            cursor.slot = cursor.slot.next_multiple_of(if numel >= PIECE || numel > room { PIECE } else { BLOCK });
            let (mut runs, mut start) = (Vec::new(), 0);
            while start < numel {
                let page = match cursor.page {
                    Some(page) if cursor.slot < form.capacity => page,
                    _ => {
                        pages.push(Page { form, runs: Vec::new() });
                        *cursor = Cursor { page: Some(pages.len() - 1), slot: 0 };
                        pages.len() - 1
                    }
                };
                let count = (numel - start).min(form.capacity - cursor.slot);
                let run = Run { page, slot: cursor.slot, start, count };
                runs.push(run);
                pages[page].runs.push((id, run));
                (start, cursor.slot) = (start + count, (cursor.slot + count).next_multiple_of(BLOCK));
            }
            let entry = Entry { bits, shape: shape.to_vec(), runs, first_piece: pieces };
            pieces += numel.div_ceil(PIECE);
            if entries.insert(id, entry).is_some() {
                return Err(Error::invalid("paged state", format!("parameter {} is there twice", id.0)));
            }
        }
        for Cursor { page, slot } in cursors {
            if let Some(page) = page {
                // So that no more of it crosses the bus.
                pages[page].form.capacity = slot.next_multiple_of(PIECE);
            }
        }
        Ok(Places { entries, pages, pieces })
    }
}

impl PagedState {
    /// Pages that parameters of these shapes take; see [`PagedState::new`].
    ///
    /// # Errors
    /// As there.
    pub fn count_pages<'a>(
        params: impl IntoIterator<Item = (ParamId, &'a [usize])>,
        bits: StateBits,
        grads: bool,
        page_bytes: usize,
    ) -> Result<usize> {
        Ok(Places::new(params, bits, grads, page_bytes)?.pages.len())
    }

    /// Room for parameters of these shapes in pages of `page_bytes`, with moments of `bits` and, if `grads`, gradient sums.
    /// `make` gets the number of pages.
    ///
    /// # Errors
    /// Pages are too small, a parameter is named twice, or `make` fails.
    pub fn new<'a>(
        params: impl IntoIterator<Item = (ParamId, &'a [usize])>,
        bits: StateBits,
        grads: bool,
        page_bytes: usize,
        make: impl FnOnce(usize) -> Result<Pager>,
    ) -> Result<Self> {
        let Places { entries, pages, pieces } = Places::new(params, bits, grads, page_bytes)?;
        let pager = make(pages.len())?;
        if pager.pages() != pages.len() || pager.page_bytes() != page_bytes {
            let what = format!("{pager:?} for {} pages of {page_bytes} bytes", pages.len());
            return Err(Error::invalid("paged state", what));
        }
        pages.iter().enumerate().try_for_each(|(number, page)| pager.fill(number, page.form.bytes()))?;
        Ok(PagedState { pager, entries, pages, grads, pieces })
    }

    /// Who moves the pages.
    pub fn pager(&self) -> &Pager {
        &self.pager
    }

    /// Whether gradient sums are in the pages too.
    pub fn has_grads(&self) -> bool {
        self.grads
    }

    /// Pieces of the global norm over all parameters.
    pub(crate) fn pieces(&self) -> usize {
        self.pieces
    }

    /// Number of parameters.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// What is kept for each parameter, in order.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (ParamId, &Entry)> {
        self.entries.iter().map(|(&id, entry)| (id, entry))
    }

    pub(crate) fn entry(&self, id: ParamId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    /// What lies in a page, in the order of the parameters.
    pub(crate) fn page(&self, page: usize) -> &[(ParamId, Run)] {
        &self.pages[page].runs
    }

    /// Bytes that an update does not write at the start of each of the pages.
    ///
    /// # Panics
    /// There are no such pages.
    pub fn clean(&self, pages: Range<usize>) -> usize {
        self.pages[pages].iter().map(|page| page.form.clean()).min().unwrap_or(0)
    }

    /// Leases pages that follow one another.
    pub(crate) fn lease(&self, pages: Range<usize>) -> Result<Held> {
        let first = pages.start;
        Ok(Held::Leased(pages.map(|page| self.pager.lease(page)).collect::<Result<_>>()?, first))
    }

    /// The gradient sums of a run, f32.
    pub(crate) fn grad(&self, held: &Held, run: Run) -> Result<Tensor> {
        held.tensor(run.page, 4 * run.slot, DType::F32, run.count)
    }

    /// Stores the gradient of a run.
    pub(crate) fn store_grad(&self, run: Run, grad: &Tensor) -> Result<()> {
        self.pager.store(run.page, 4 * run.slot, grad)
    }

    /// The gradient sum of a parameter, in host memory.
    pub(crate) fn read_grad(&self, entry: &Entry) -> Result<Tensor> {
        self.gather(entry, DType::F32, entry.shape.clone(), |run| (4 * run.slot, run.start, run.count))
    }

    /// The moments of a run.
    pub(crate) fn moments(&self, held: &Held, run: Run) -> Result<Moments> {
        let form = self.pages[run.page].form;
        let tensor = |part| {
            let (offset, dtype, count) = form.place(part, run);
            held.tensor(run.page, offset, dtype, count)
        };
        Ok(match form.bits {
            StateBits::F32 => Moments::F32 { m: tensor(Part::M)?, v: tensor(Part::V)? },
            StateBits::Bits8 => Moments::Bits8 {
                m: State8 { codes: tensor(Part::M)?, absmax: tensor(Part::MAbsmax)? },
                v: State8 { codes: tensor(Part::V)?, absmax: tensor(Part::VAbsmax)? },
            },
        })
    }

    /// A part of a parameter's state, from its pages: for each run the offset in the page, and which elements it has.
    fn gather(
        &self,
        entry: &Entry,
        dtype: DType,
        shape: Vec<usize>,
        place: impl Fn(Run) -> (usize, usize, usize),
    ) -> Result<Tensor> {
        let mut all = Tensor::empty(&shape, dtype, Device::Cpu, Tag::Workspace)?;
        let bytes = all.bytes_mut()?;
        for &run in &entry.runs {
            let (offset, start, count) = place(run);
            let size = dtype.size();
            self.pager.read(run.page, offset, &mut bytes[start * size..(start + count) * size])?;
        }
        Ok(all)
    }

    /// Every tensor of the state, in host memory, one after another: a parameter's is put together when it is asked for.
    pub(crate) fn state(&self) -> impl Iterator<Item = Result<(ParamId, Part, Tensor)>> {
        self.entries.iter().flat_map(move |(&id, entry)| {
            parts(entry.bits).iter().map(move |&part| {
                let (dtype, shape) = self.whole(entry, part);
                let scaled = matches!(part, Part::MAbsmax | Part::VAbsmax);
                let tensor = self.gather(entry, dtype, shape, |run| {
                    let (offset, _, count) = self.pages[run.page].form.place(part, run);
                    (offset, if scaled { run.start / BLOCK } else { run.start }, count)
                })?;
                Ok((id, part, tensor))
            })
        })
    }

    /// Type and shape of a part of a parameter's state.
    fn whole(&self, entry: &Entry, part: Part) -> (DType, Vec<usize>) {
        let numel: usize = entry.shape.iter().product();
        match (entry.bits, part) {
            (StateBits::F32, _) => (DType::F32, entry.shape.clone()),
            (StateBits::Bits8, Part::M | Part::V) => (DType::U8, vec![numel]),
            (StateBits::Bits8, _) => (DType::F32, vec![numel.div_ceil(BLOCK)]),
        }
    }

    /// Names, types and shapes of the tensors that [`PagedState::state`] gives, in its order.
    pub(crate) fn layout(&self) -> Vec<Layout> {
        let entries = self.entries.iter();
        let parts = entries.flat_map(|(&id, entry)| parts(entry.bits).iter().map(move |&part| (id, entry, part)));
        let layout = parts.map(|(id, entry, part)| {
            let (dtype, shape) = self.whole(entry, part);
            Layout { id, part, dtype, shape }
        });
        layout.collect()
    }

    /// Whether a saved state of this `layout` can be written into the pages.
    ///
    /// # Errors
    /// A part is missing, is not of this state or does not fit.
    pub(crate) fn check(&self, layout: &[Layout]) -> Result<()> {
        let wrong = |id: ParamId, what: String| Error::invalid("paged state", format!("parameter {}: {what}", id.0));
        let saved: BTreeMap<(ParamId, Part), &Layout> =
            layout.iter().map(|saved| ((saved.id, saved.part), saved)).collect();
        let own = self.layout();
        for Layout { id, part, dtype, shape } in &own {
            let numel: usize = shape.iter().product();
            match saved.get(&(*id, *part)) {
                None => return Err(wrong(*id, format!("its saved state lacks {part}"))),
                Some(saved) if (saved.dtype, saved.shape.iter().product()) != (*dtype, numel) => {
                    let found =
                        format!("{part} is {} {:?}; expected {numel} elements of {dtype}", saved.dtype, saved.shape);
                    return Err(wrong(*id, found));
                }
                Some(_) => {}
            }
        }
        if own.len() != layout.len() {
            return Err(Error::invalid("paged state", "the saved state has parts of other parameters or precisions"));
        }
        Ok(())
    }

    /// Overwrites the state by zeros.
    ///
    /// # Errors
    /// A page cannot be written.
    pub(crate) fn clear(&self) -> Result<()> {
        self.layout().into_iter().try_for_each(|Layout { id, part, dtype, shape }| {
            self.write(id, part, &Tensor::zeros(&shape, dtype, Device::Cpu, Tag::Workspace)?)
        })
    }

    /// Overwrites a part of a parameter's state, which [`PagedState::check`] has found to fit.
    ///
    /// # Errors
    /// It does not fit after all, or a page cannot be written.
    pub(crate) fn write(&self, id: ParamId, part: Part, tensor: &Tensor) -> Result<()> {
        let entry = self.entries.get(&id).filter(|entry| {
            let (dtype, shape) = self.whole(entry, part);
            (tensor.dtype(), tensor.numel()) == (dtype, shape.iter().product())
        });
        let Some(entry) = entry else {
            return Err(Error::invalid("paged state", format!("parameter {}: {part} is {tensor:?}", id.0)));
        };
        let tensor = tensor.to_device(Device::Cpu, Tag::Workspace)?;
        let bytes = tensor.bytes()?;
        for &run in &entry.runs {
            let (offset, dtype, count) = self.pages[run.page].form.place(part, run);
            let scaled = matches!(part, Part::MAbsmax | Part::VAbsmax);
            let start = if scaled { run.start / BLOCK } else { run.start } * dtype.size();
            self.pager.write(run.page, offset, &bytes[start..start + count * dtype.size()])?;
        }
        Ok(())
    }
}
