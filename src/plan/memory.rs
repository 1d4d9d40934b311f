//! What a training step holds at its peak: the step's own allocations, made in the same order in a ledger of bytes.
//!
//! Nothing here is fitted. Each function follows the one that it is named after (`models/src/llama/layer.rs`, `linear.rs`,
//! `mod.rs`, `kernels/src/cross_entropy`, `optim/src/gradients.rs`), holding what that allocates until that lets go of it; how
//! much an operation takes besides its results, the operation itself says. Sizes under a few KiB are left out, and on a GPU
//! the workspace of f32 products, on a CPU that of 16-bit types.

use super::job::Job;
use anyhow::Result;
use nibble_kernels::{
    attention::{self, Heads},
    cross_entropy, linear, quantize, rms_norm, table,
};
use nibble_runtime::{DType, Tag, allocator, memory::Usage, pager::kept_bytes};
use std::{cell::RefCell, rc::Rc};

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

/// What a layer keeps; see `models/src/llama/layer.rs`.
struct Saved {
    norms: [Held; 2],
    qkv: [Held; 3],
    o: Held,
    lse: Held,
    h: Held,
    gate: Held,
    up: Held,
    t: [Option<Held>; 7],
}

struct Walk<'a> {
    job: &'a Job,
    usage: Rc<RefCell<Usage>>,
    /// Tokens.
    t: usize,
    /// Bytes of an element of the computation.
    w: usize,
    shapes: [[usize; 2]; 7],
    ranks: [usize; 7],
    /// Gradients that stay until the update.
    sums: RefCell<Vec<Held>>,
    /// Whether a parameter's gradient is let go of when it has been added to its sum: in pages, or of earlier micro-batches.
    added: bool,
}

/// Places of the linears in [`nibble_models::LlamaConfig::linear_shapes`].
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

/// Bytes at the peak of a step, by tag and in all, on the device.
///
/// # Errors
/// The settings of pages make no sense.
pub fn peak(job: &Job) -> Result<Usage> {
    let pages = job.pages()?;
    let usage = Rc::new(RefCell::new(Usage::default()));
    let mut walk = Walk {
        job,
        t: job.tokens(),
        w: job.dtype.size(),
        usage: Rc::clone(&usage),
        shapes: job.config.linear_shapes(),
        ranks: job.ranks(),
        sums: RefCell::default(),
        added: pages.is_some(),
    };
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
        self.hold(Tag::Activations, self.t * columns * self.w)
    }

    /// A gradient of activations on its way.
    fn flow(&self, columns: usize) -> Held {
        self.workspace(self.t * columns * self.w)
    }

    fn on_cpu(&self) -> bool {
        self.job.chip.is_none()
    }

    /// Whether the adapters' kernels take the operands: dropout is made on the way then.
    fn fused(&self) -> bool {
        !self.on_cpu() && self.w == 2
    }

    fn dropout(&self) -> bool {
        self.job.settings.dropout > 0.0
    }

    /// The weights of `models/src/llama/load.rs`.
    fn weights(&self) -> Vec<Held> {
        let (job, c) = (self.job, &self.job.config);
        let weights = |bytes: usize| self.hold(Tag::Weights, bytes);
        let dense = if job.is_full() { 4 } else { job.stored.size() };
        let mut all = Vec::new();
        let mut tables = vec![c.vocab_size; 1 + usize::from(!c.tie_word_embeddings)];
        if !self.on_cpu() && !c.tie_word_embeddings && !job.is_full() {
            // The embedding is in pinned host memory; scales of its rows are not.
            all.extend(job.tables_in_8_bits().then(|| weights(4 * c.vocab_size)));
            tables.pop();
        }
        for rows in tables {
            match job.tables_in_8_bits() {
                true => all.extend([weights(rows * c.hidden_size), weights(4 * rows)]),
                false => all.push(weights(rows * c.hidden_size * dense)),
            }
        }
        let norms = 2 * c.num_layers + 1;
        all.extend((0..norms).map(|_| weights(c.hidden_size * dense)));
        for [n, k] in self.shapes {
            let parts = match job.quantized {
                None => vec![n * k * dense],
                Some((block, double)) => quantize::tensor_bytes(n * k, block, double),
            };
            all.extend(parts.repeat(c.num_layers).into_iter().map(weights));
        }
        // The dynamic map of scales, and those of 8-bit moments.
        let maps = if job.quantized.is_some_and(|(_, double)| double) { 1 } else { 0 };
        all.push(weights(maps * 1024));
        all
    }

    /// Adapters, the copy of what trains from before the last update, and the rotary angles.
    fn trained(&self) -> Vec<Held> {
        let (job, c) = (self.job, &self.job.config);
        let copies = if job.is_full() { 1 } else { 2 };
        let bytes = job.parameters().into_iter().map(|shape| 4 * shape.iter().product::<usize>());
        let mut all: Vec<_> =
            bytes.flat_map(|bytes| vec![bytes; copies]).map(|bytes| self.hold(Tag::Adapters, bytes)).collect();
        let angles = job.settings.seq_len.next_power_of_two() * (c.head_dim / 2) * 4;
        all.extend([self.workspace(angles), self.workspace(angles)]);
        all
    }

    /// `Llama::train`, and the gradients up to the update.
    fn step(&self) {
        let (c, t) = (&self.job.config, self.t);
        let lengths = vec![self.job.settings.seq_len; self.job.settings.batch_size];
        let _positions = self.workspace(4 * t);
        let _tables = (!self.on_cpu()).then(|| self.workspace(attention::table_bytes(&lengths)));
        let again = self.job.recomputed();
        let mut nodes = Vec::new();
        let mut x = self.activation(c.hidden_size);
        for layer in 0..c.num_layers {
            let (y, saved) = self.layer_forward();
            nodes.push((x, (layer >= again).then_some(saved)));
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
        for (layer, (x, saved)) in nodes.into_iter().enumerate().rev() {
            let saved = saved.unwrap_or_else(|| self.saved());
            let (dx, grads) = self.layer_backward(saved, dy, layer > 0 || self.job.is_full(), &lengths);
            drop(x);
            self.sink(grads);
            match dx {
                Some(dx) => dy = dx,
                None => return,
            }
        }
        let table = self.hold(Tag::Gradients, 4 * c.vocab_size * c.hidden_size);
        drop(dy);
        match c.tie_word_embeddings {
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

    /// `Layer::forward`.
    fn layer_forward(&self) -> (Held, Saved) {
        let mut saved = self.up_to_feed_forward();
        let _a = self.flow(self.shapes[DOWN][1]);
        let (y, t) = self.linear_forward(DOWN);
        saved.t[DOWN] = t;
        (y, saved)
    }

    /// `LayerNode::saved`.
    fn saved(&self) -> Saved {
        let mut saved = self.up_to_feed_forward();
        let _a = self.flow(self.shapes[DOWN][1]);
        saved.t[DOWN] = self.low_rank(DOWN);
        saved
    }

    fn up_to_feed_forward(&self) -> Saved {
        let (c, rows) = (&self.job.config, || self.hold(Tag::Activations, 4 * self.t));
        let (_n1, rstd1) = (self.flow(c.hidden_size), rows());
        let [(q, t_q), (k, t_k), (v, t_v)] = [Q, K, V].map(|linear| self.linear_forward(linear));
        let o = self.activation(self.shapes[Q][0]);
        let lse = self.hold(Tag::Activations, 4 * c.num_heads * self.t);
        let (h, t_o) = self.linear_forward(O);
        let (_n2, rstd2) = (self.flow(c.hidden_size), rows());
        let [(gate, t_gate), (up, t_up)] = [GATE, UP].map(|linear| self.linear_forward(linear));
        let t = [t_q, t_k, t_v, t_o, t_gate, t_up, None];
        Saved { norms: [rstd1, rstd2], qkv: [q, k, v], o, lse, h, gate, up, t }
    }

    /// `Layer::backward`: the input's gradient if it is wanted, and the parameters'.
    fn layer_backward(&self, saved: Saved, dy: Held, want: bool, lengths: &[usize]) -> (Option<Held>, Vec<Held>) {
        let c = &self.job.config;
        let (d, f, [q, kv]) = (c.hidden_size, c.intermediate_size, [self.shapes[Q][0], self.shapes[K][0]]);
        let Saved { norms: _norms, qkv, o, lse: _lse, h, gate, up, t: _t } = saved;
        let mut grads = Vec::new();

        let a = self.flow(f);
        let da = self.linear_backward(DOWN, None, true, &mut grads);
        drop(a);
        // In place on a GPU, where the gradients go on counting as activations.
        let (mut dgate_up, mut kept) = (vec![gate, up], Vec::new());
        if self.on_cpu() {
            kept = std::mem::replace(&mut dgate_up, vec![self.flow(f), self.flow(f)]);
        }
        drop((da, kept));

        let n2 = self.flow(d);
        let dn2 = self.linear_backward(GATE, None, true, &mut grads);
        let dn2 = self.linear_backward(UP, dn2, true, &mut grads);
        drop((n2, dgate_up));
        grads.extend(self.norm_weight_grad());
        drop((dn2, h));

        let d_o = self.linear_backward(O, None, true, &mut grads);
        let _dqkv = [self.flow(q), self.flow(kv), self.flow(kv)];
        if let Some(chip) = self.job.chip.filter(|_| self.w == 2) {
            let heads = Heads { query: c.num_heads, kv: c.num_kv_heads, dim: c.head_dim };
            drop(attention::backward_workspace(chip, heads, lengths).map(|bytes| self.workspace(bytes)));
        }
        drop((d_o, qkv, o));

        let _n1 = self.flow(d);
        let mut dn1 = None;
        for linear in [Q, K, V] {
            dn1 = self.linear_backward(linear, dn1, want, &mut grads);
        }
        grads.extend(self.norm_weight_grad());
        (want.then_some(dy), grads)
    }

    /// The gradient of a norm's weight, if it trains.
    fn norm_weight_grad(&self) -> Option<Held> {
        let d = self.job.config.hidden_size;
        self.job.is_full().then(|| {
            let _partial = (!self.on_cpu()).then(|| self.workspace(rms_norm::weight_grad_workspace(self.t, d)));
            self.hold(Tag::Gradients, 4 * d)
        })
    }

    /// A parameter of so many numbers in the type of the computation.
    fn cast(&self, numel: usize) -> Option<Held> {
        (self.w < 4).then(|| self.workspace(numel * self.w))
    }

    /// The weight as a product takes it, if that is another tensor.
    fn weight(&self, linear: usize) -> Option<Held> {
        let [n, k] = self.shapes[linear];
        if self.job.is_full() { self.cast(n * k) } else { None }
    }

    /// Workspace of a product of rows `[T, k]` with a layer's weight into `[T, n]`.
    fn product(&self, n: usize, k: usize, rank: usize) -> Held {
        let bytes = match self.job.chip {
            Some(chip) if self.w == 2 && self.job.quantized.is_some() => {
                linear::dequantized_bytes(chip, self.t, n, k, rank)
            }
            // An f32 weight alone is multiplied as it is.
            None if !self.job.is_full() => linear::panel_bytes(n, k),
            _ => 0,
        };
        self.workspace(bytes)
    }

    /// Workspace of a product with the head into rows of `columns`.
    fn head_product(&self, columns: usize, inner: usize) -> Held {
        let is_f32 = self.job.is_full() || self.job.stored == DType::F32 || self.job.tables_in_8_bits();
        self.workspace(if self.on_cpu() && !is_f32 { linear::panel_bytes(columns, inner) } else { 0 })
    }

    /// `Linear::forward`: the output and the adapter's `t`.
    fn linear_forward(&self, linear: usize) -> (Held, Option<Held>) {
        let ([n, k], rank) = (self.shapes[linear], self.ranks[linear]);
        let t = self.low_rank(linear);
        let _b = t.as_ref().and_then(|_| self.cast(n * rank));
        let _weight = self.weight(linear);
        let y = self.activation(n);
        let _product = self.product(n, k, rank);
        (y, t)
    }

    fn low_rank(&self, linear: usize) -> Option<Held> {
        let ([_, k], rank) = (self.shapes[linear], self.ranks[linear]);
        (rank > 0).then(|| {
            let _a = self.cast(rank * k);
            let _dropped = (self.dropout() && !self.fused()).then(|| self.flow(k));
            self.activation(rank)
        })
    }

    /// A weight's gradient `[n, k]` from `rows` rows.
    fn weight_grad(&self, rows: usize, n: usize, k: usize, dropped: bool) -> Held {
        let workspace = match self.job.chip {
            Some(chip) if self.w == 2 => linear::weight_grad_workspace(chip, rows, n, k, dropped),
            _ if dropped => rows * k * self.w,
            _ => 0,
        };
        let _workspace = self.workspace(workspace);
        self.hold(Tag::Gradients, 4 * n * k)
    }

    /// `Linear::backward`: the input's gradient if it is wanted, which adds to `dx`.
    fn linear_backward(&self, linear: usize, dx: Option<Held>, want: bool, grads: &mut Vec<Held>) -> Option<Held> {
        let ([n, k], rank) = (self.shapes[linear], self.ranks[linear]);
        if self.job.is_full() {
            grads.push(self.weight_grad(self.t, n, k, false));
        }
        let mut _branch = None;
        if rank > 0 {
            let b = self.cast(n * rank);
            let u = self.flow(rank);
            drop(b);
            grads.push(self.weight_grad(self.t, n, rank, false));
            grads.push(self.weight_grad(self.t, rank, k, self.dropout()));
            _branch = Some((u, self.cast(rank * k)));
        }
        if !want {
            return None;
        }
        let weight = self.weight(linear);
        let dx = dx.unwrap_or_else(|| self.flow(k));
        drop(self.product(k, n, if self.dropout() { 0 } else { rank }));
        if rank > 0 && self.dropout() && !self.fused() {
            drop([self.flow(k), self.flow(k)]);
        }
        drop(weight);
        Some(dx)
    }

    /// `cross_entropy::head_loss` with all rows labelled: the gradients of hidden states and head, and what the output keeps.
    fn head_loss(&self) -> (Held, Option<Held>, Vec<Held>) {
        let (c, t, w) = (&self.job.config, self.t, self.w);
        let (d, vocab, full) = (c.hidden_size, c.vocab_size, self.job.is_full());
        let whole_head = || self.hold(Tag::Gradients, 4 * vocab * d);
        let output = || vec![self.workspace(4 * t), self.workspace(t)];
        let mut output_now = if self.on_cpu() { Vec::new() } else { output() };
        let _labels = (!self.on_cpu()).then(|| [self.workspace(4 * t), self.workspace(4 * t)]);
        let dhidden = self.flow(d);
        let mut dhead = (full && self.on_cpu()).then(whole_head);
        let step = cross_entropy::chunk_rows(vocab, t, self.on_cpu());
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
            if full {
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
        // A head that trains is f32, and its product with 16-bit rows is summed in f32 first.
        let _sums = (self.job.is_full() && self.fused()).then(|| self.workspace(4 * rows * d));
    }
}
