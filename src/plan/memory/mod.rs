//! What a training step holds at its peak: the step's own allocations, made in the same order in a ledger of bytes.
//!
//! Nothing here is fitted. Each function follows the one that it is named after (`models/src/llama/layer.rs`, `linear.rs`,
//! `mod.rs`, `kernels/src/cross_entropy`, `optim/src/gradients.rs`), holding what that allocates until that lets go of it; how
//! much an operation takes besides its results, the operation itself says. Sizes under a few KiB are left out, and on a GPU
//! the workspace of f32 products, on a CPU that of 16-bit types.

mod layer;

use layer::Kept;

use super::job::{Job, Trains};
use anyhow::Result;
use nibble_kernels::{attention, linear, quantize, table};
use nibble_runtime::{DType, Tag, allocator, memory::Usage, pager::kept_bytes};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    rc::Rc,
};

/// Bytes held for as long as this lives.
struct Held {
    usage: Rc<RefCell<Usage>>,
    tag: Tag,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.usage.borrow_mut().release(self.tag, self.bytes);
    }
}

struct Walk<'a> {
    job: &'a Job,
    usage: Rc<RefCell<Usage>>,
    /// Rows at hand: all tokens, or those of a part.
    t: Cell<usize>,
    /// Bytes of an element of the computation.
    w: usize,
    shapes: [[usize; 2]; 7],
    trains: Trains,
    /// Gradients that stay until the update.
    sums: RefCell<Vec<Held>>,
    /// Linears whose gains have been made.
    gains: RefCell<BTreeSet<[usize; 2]>>,
    /// Whether a parameter's gradient is let go of when it has been added to its sum: in pages, or of earlier micro-batches.
    added: bool,
}

/// `nibble_runtime::Stash`: layers, and what they have kept while it is on the device.
#[derive(Default)]
struct Stash(Vec<(usize, Option<Kept>)>);

impl Stash {
    fn push(&mut self, layer: usize, kept: Kept) {
        if let Some((_, before)) = self.0.last_mut() {
            *before = None;
        }
        self.0.push((layer, Some(kept)));
    }

    fn pop(&mut self, walk: &Walk) -> Option<Kept> {
        for (layer, kept) in self.0.iter_mut().rev().take(2) {
            kept.get_or_insert_with(|| walk.kept(*layer));
        }
        self.0.pop()?.1
    }
}

/// Bytes of host memory that layers keep things in.
pub fn on_host(job: &Job) -> usize {
    if job.chip.is_none() {
        return 0;
    }
    let usage = Rc::new(RefCell::new(Usage::default()));
    let walk = Walk::new(job, Rc::clone(&usage));
    let away = (0..job.config.num_layers).filter(|&layer| job.settings.activations.of(layer).on_host);
    let kept: Vec<Kept> = away.map(|layer| walk.kept(layer)).collect();
    let bytes = usage.borrow().total;
    drop(kept);
    bytes
}

/// Bytes at the peak of a step, by tag and in all, on the device.
///
/// # Errors
/// The settings of pages make no sense.
pub fn peak(job: &Job) -> Result<Usage> {
    let pages = job.pages()?;
    let usage = Rc::new(RefCell::new(Usage::default()));
    let mut walk = Walk { added: pages.is_some(), ..Walk::new(job, Rc::clone(&usage)) };
    let mut base = walk.weights();
    base.extend(walk.trained());
    match pages {
        None => {
            let numels = job.parameters().into_iter().map(|shape| shape.iter().product::<usize>());
            let moments = numels.flat_map(|numel| job.settings.optimizer_bits.moments(numel));
            base.extend(moments.map(|bytes| walk.hold(Tag::Optimizer, bytes)));
            if job.settings.grad_accum > 1 {
                // At the peak of a later micro-batch all sums are there.
                base.push(walk.hold(Tag::Gradients, 4 * job.trained()));
                walk.added = true;
            }
        }
        Some(pages) => {
            base.push(walk.hold(Tag::Optimizer, pages.resident * pages.bytes));
            if pages.resident < pages.count {
                base.push(walk.hold(Tag::Gradients, kept_bytes(pages.count, pages.bytes)));
            }
        }
    }
    walk.step();
    drop(base);
    drop(walk);
    Ok(usage.take())
}

impl<'a> Walk<'a> {
    fn new(job: &'a Job, usage: Rc<RefCell<Usage>>) -> Self {
        Walk {
            job,
            usage,
            t: Cell::new(job.tokens()),
            w: job.dtype.size(),
            shapes: job.config.linear_shapes(),
            trains: job.trains(),
            sums: RefCell::default(),
            gains: RefCell::default(),
            added: false,
        }
    }
}

impl Walk<'_> {
    fn hold(&self, tag: Tag, bytes: usize) -> Held {
        let bytes = if self.job.chip.is_some() { bytes.next_multiple_of(allocator::ALIGN) } else { bytes };
        self.usage.borrow_mut().hold(tag, bytes);
        Held { usage: Rc::clone(&self.usage), tag, bytes }
    }

    fn workspace(&self, bytes: usize) -> Held {
        self.hold(Tag::Workspace, bytes)
    }

    fn activation(&self, columns: usize) -> Held {
        self.hold(Tag::Activations, self.t.get() * columns * self.w)
    }

    /// A gradient of activations on its way.
    fn flow(&self, columns: usize) -> Held {
        self.workspace(self.t.get() * columns * self.w)
    }

    fn on_cpu(&self) -> bool {
        self.job.chip.is_none()
    }

    /// Whether the adapters' kernels take the operands: dropout is made on the way then.
    fn fused(&self) -> bool {
        !self.on_cpu() && self.w == 2
    }

    /// The weights of `models/src/llama/load.rs`.
    fn weights(&self) -> Vec<Held> {
        let (job, c) = (self.job, &self.job.config);
        let weights = |bytes: usize| self.hold(Tag::Weights, bytes);
        let dense = if self.trains.all { 4 } else { job.stored.size() };
        let mut all = Vec::new();
        let embedding = (self.trains.embedding, true);
        let head = self.trains.own_head.then_some((self.trains.head, false));
        for (trains, is_embedding) in [embedding].into_iter().chain(head) {
            // An embedding that does not train, of a model with a head of its own, is in pinned host memory; scales are not.
            let pinned = is_embedding && !trains && !self.on_cpu() && !c.tie_word_embeddings;
            let bytes = match (trains, job.tables_in_8_bits()) {
                (true, _) => 4,
                (false, true) => 1,
                (false, false) => job.stored.size(),
            };
            all.extend((!pinned).then(|| weights(c.vocab_size * c.hidden_size * bytes)));
            all.extend((bytes == 1).then(|| weights(4 * c.vocab_size)));
        }
        let norms = 2 * c.num_layers + 1;
        all.extend((0..norms).map(|_| weights(c.hidden_size * dense)));
        for [n, k] in self.shapes {
            let parts = match job.quantized {
                None => vec![n * k * dense],
                Some((block, double)) => quantize::tensor_bytes(n * k, block, double),
            };
            all.extend(parts.repeat(c.num_layers).into_iter().map(weights));
            let held = (0..c.num_layers).filter(|&layer| job.holds_dequantized(layer));
            all.extend(held.map(|_| weights(n * k * self.w)));
        }
        // The dynamic map of scales, and those of 8-bit moments.
        let maps = if job.quantized.is_some_and(|(_, double)| double) { 1 } else { 0 };
        all.push(weights(maps * 1024));
        all
    }

    /// Adapters, the copy of what trains from before the last update, and the rotary angles.
    fn trained(&self) -> Vec<Held> {
        let (job, c) = (self.job, &self.job.config);
        // What trains of the model itself counts as its weights.
        let of_model = |shape: &[usize]| self.trains.all || shape == [c.vocab_size, c.hidden_size];
        let copies =
            |shape: Vec<usize>| vec![4 * shape.iter().product::<usize>(); if of_model(&shape) { 1 } else { 2 }];
        let mut all: Vec<_> =
            job.parameters().into_iter().flat_map(copies).map(|bytes| self.hold(Tag::Adapters, bytes)).collect();
        let angles = job.settings.seq_len.next_power_of_two() * (c.head_dim / 2) * 4;
        all.extend([self.workspace(angles), self.workspace(angles)]);
        all
    }

    /// `Llama::train`, and the gradients up to the update.
    fn step(&self) {
        let (c, t) = (&self.job.config, self.t.get());
        let lengths = vec![self.job.settings.seq_len; self.job.settings.batch_size];
        let _positions = self.workspace(4 * t);
        let _tables = (!self.on_cpu()).then(|| self.workspace(attention::table_bytes(&lengths)));
        let (mut nodes, mut stash) = (Vec::new(), Stash::default());
        let mut x = self.activation(c.hidden_size);
        for layer in 0..c.num_layers {
            let (y, kept) = self.layer_forward(layer, x);
            nodes.push(match self.job.settings.activations.of(layer).on_host {
                false => Some(kept),
                true => {
                    stash.push(layer, kept);
                    None
                }
            });
            x = y;
        }
        let _hidden = self.flow(c.hidden_size);
        let rstd = self.hold(Tag::Activations, 4 * t);
        let (grad, dhead, _output) = self.head_loss();
        self.sink(dhead);

        // The final norm.
        let mut dy = self.flow(c.hidden_size);
        let dw = self.norm_weight_grad();
        drop((grad, x, rstd));
        self.sink(dw);
        for (layer, kept) in nodes.into_iter().enumerate().rev() {
            let Some(kept) = kept.or_else(|| stash.pop(self)) else { return };
            let (dx, grads) = self.layer_backward(layer, kept, dy, layer > 0 || self.trains.embedding, &lengths);
            self.sink(grads);
            match dx {
                Some(dx) => dy = dx,
                None => return,
            }
        }
        let table = self.hold(Tag::Gradients, 4 * c.vocab_size * c.hidden_size);
        drop(dy);
        match self.trains.head && !self.trains.own_head {
            // The head has made the sum.
            true => drop(table),
            false => self.sink([table]),
        }
    }

    /// `Gradients::parameter`.
    fn sink(&self, grads: impl IntoIterator<Item = Held>) {
        if self.added {
            return grads.into_iter().for_each(drop);
        }
        self.sums.borrow_mut().extend(grads);
    }

    /// Workspace of a product with the head into rows of `columns`.
    fn head_product(&self, columns: usize, inner: usize) -> Held {
        let is_f32 = self.trains.head || self.job.stored == DType::F32 || self.job.tables_in_8_bits();
        self.workspace(if self.on_cpu() && !is_f32 { linear::panel_bytes(columns, inner) } else { 0 })
    }

    /// `cross_entropy::head_loss` with all rows labelled: the gradients of hidden states and head, and what the output keeps.
    fn head_loss(&self) -> (Held, Option<Held>, Vec<Held>) {
        let (c, t, w) = (&self.job.config, self.t.get(), self.w);
        let (d, vocab, trains) = (c.hidden_size, c.vocab_size, self.trains.head);
        let whole_head = || self.hold(Tag::Gradients, 4 * vocab * d);
        let output = || vec![self.workspace(4 * t), self.workspace(t)];
        let mut output_now = if self.on_cpu() { Vec::new() } else { output() };
        let _labels = (!self.on_cpu()).then(|| [self.workspace(4 * t), self.workspace(4 * t)]);
        let dhidden = self.flow(d);
        let mut dhead = (trains && self.on_cpu()).then(whole_head);
        let is_f32 = trains || (self.job.stored == DType::F32 && !self.job.tables_in_8_bits());
        let _narrow_head = (is_f32 && self.fused()).then(|| self.workspace(vocab * d * w));
        let step = self.job.head_rows();
        // Chunks are alike, but that a gradient of the head is there from the second on.
        for rows in [step.min(t), step.min(t.saturating_sub(step))].into_iter().filter(|&rows| rows > 0) {
            let _part = self.workspace(rows * d * w);
            let logits = self.project(rows);
            let grad = (w < 4).then(|| self.workspace(rows * vocab * w));
            let _grad = match grad {
                Some(grad) => {
                    drop(logits);
                    grad
                }
                None => logits,
            };
            self.project_backward(rows);
            if trains {
                let grad = self.weight_grad(rows, vocab, d, false);
                dhead.get_or_insert(grad);
            }
        }
        if self.on_cpu() {
            output_now = output();
        }
        (dhidden, dhead, output_now)
    }

    /// `table::project`: the logits.
    fn project(&self, rows: usize) -> Held {
        let c = &self.job.config;
        let logits = self.workspace(4 * rows * c.vocab_size);
        drop(self.head_product(c.vocab_size, c.hidden_size));
        if self.job.tables_in_8_bits() {
            let slice = table::slice_rows(c.hidden_size, self.job.dtype, self.on_cpu()).min(c.vocab_size);
            drop([self.workspace(slice * c.hidden_size * self.w), self.workspace(4 * rows * slice)]);
        }
        logits
    }

    /// `table::input_grad`.
    fn project_backward(&self, rows: usize) {
        let (d, vocab, w) = (self.job.config.hidden_size, self.job.config.vocab_size, self.w);
        if self.job.tables_in_8_bits() {
            let slice = table::slice_rows(d, self.job.dtype, self.on_cpu()).min(vocab);
            let _sum = self.workspace(4 * rows * d);
            drop([self.workspace(slice * d * w), self.workspace(rows * slice * w)]);
            drop(self.cast(rows * d));
            return;
        }
        let _grad = self.workspace(rows * d * w);
        drop(self.head_product(d, vocab));
    }
}
