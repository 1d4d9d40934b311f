//! A layer of the walk: `models/src/llama/layer.rs` and `linear.rs`.

use super::{Held, Walk};
use nibble_kernels::{
    attention::{self, Heads},
    linear, rms_norm,
};
use nibble_models::llama::Extent;
use nibble_runtime::Tag;

/// `keep::Kept`.
pub(super) struct Kept {
    x: Held,
    t: LowRank,
    attended: Option<Attended>,
    gated: Option<Gated>,
}

type LowRank = [Option<Held>; 7];

/// `keep::Attended`: `rstd q k v o lse`, and `h`.
struct Attended([Held; 6], Held);

/// `keep::Gated`: `rstd`, and `gate up`.
struct Gated(Held, [Held; 2]);

/// The gradients of a layer's parameters.
#[derive(Default)]
struct Grads {
    held: Vec<Held>,
    /// Whether those to come are added to those that are there.
    again: bool,
}

impl Grads {
    /// `linear::put`.
    fn put(&mut self, grad: Option<Held>) {
        if !self.again {
            self.held.extend(grad);
        }
    }
}

/// A linear: its layer, and which of the layer's it is.
type Place = [usize; 2];

// In the order of [`nibble_models::LlamaConfig::linear_shapes`].
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

impl Walk<'_> {
    /// `Layer::forward` and `Keeping::keep`: the output, and what is kept.
    pub(super) fn layer_forward(&self, layer: usize, x: Held) -> (Held, Kept) {
        let extent = self.job.settings.activations.of(layer).extent;
        let mut t = LowRank::default();
        let attended = self.attend(layer, &mut t);
        let (y, gated) = match self.parts(extent) {
            None => {
                let (y, gated) = self.feed_forward(layer, &mut t);
                (y, (extent == Extent::All).then_some(gated))
            }
            Some(parts) => {
                let y = self.activation(self.job.config.hidden_size);
                for rows in parts {
                    let mut of_part = LowRank::default();
                    let _y = self.taking(rows, || self.feed_forward(layer, &mut of_part).0);
                    for (which, of_part) in of_part.into_iter().enumerate() {
                        if of_part.is_some() {
                            t[which].get_or_insert_with(|| self.activation(self.trains.ranks[layer][which]));
                        }
                    }
                }
                (y, None)
            }
        };
        (y, Kept { x, t, attended: (extent >= Extent::Attention).then_some(attended), gated })
    }

    /// What a layer has kept, back from host memory.
    pub(super) fn kept(&self, layer: usize) -> Kept {
        let (c, extent) = (&self.job.config, self.job.settings.activations.of(layer).extent);
        let x = self.activation(c.hidden_size);
        let t = self.trains.ranks[layer].map(|rank| (rank > 0).then(|| self.activation(rank)));
        let attended = (extent >= Extent::Attention).then(|| {
            let (rstd, [q, k]) = (self.each_row(1), [self.shapes[Q][0], self.shapes[K][0]]);
            let [q, k, v, o] = [q, k, k, q].map(|columns| self.activation(columns));
            Attended([rstd, q, k, v, o, self.each_row(c.num_heads)], self.activation(c.hidden_size))
        });
        let gated = (extent == Extent::All)
            .then(|| Gated(self.each_row(1), [GATE, UP].map(|linear| self.activation(self.shapes[linear][0]))));
        Kept { x, t, attended, gated }
    }

    /// So many f32 numbers for each row.
    fn each_row(&self, count: usize) -> Held {
        self.hold(Tag::Activations, 4 * count * self.t.get())
    }

    /// The rows of the first two parts of a feed-forward block; the others are no larger. `None` if it is not in parts.
    fn parts(&self, extent: Extent) -> Option<Vec<usize>> {
        let (t, rows) = (self.t.get(), self.job.settings.feed_forward_rows.unwrap_or(usize::MAX));
        (extent < Extent::All && rows < t).then(|| vec![rows, rows.min(t - rows)])
    }

    /// As `f` does with so many rows.
    fn taking<R>(&self, rows: usize, f: impl FnOnce() -> R) -> R {
        let all = self.t.replace(rows);
        let result = f();
        self.t.set(all);
        result
    }

    /// `Layer::attend`.
    fn attend(&self, layer: usize, t: &mut LowRank) -> Attended {
        let (n1, rstd) = (self.flow(self.job.config.hidden_size), self.each_row(1));
        let [q, k, v] = [Q, K, V].map(|linear| self.output([layer, linear], &mut t[linear]));
        drop(n1);
        let (o, lse) = (self.activation(self.shapes[Q][0]), self.each_row(self.job.config.num_heads));
        let h = self.output([layer, O], &mut t[O]);
        Attended([rstd, q, k, v, o, lse], h)
    }

    /// `Layer::gate_up`.
    fn gate_up(&self, layer: usize, t: &mut LowRank) -> Gated {
        let (_n2, rstd) = (self.flow(self.job.config.hidden_size), self.each_row(1));
        Gated(rstd, [GATE, UP].map(|linear| self.output([layer, linear], &mut t[linear])))
    }

    /// `Layer::feed_forward`.
    fn feed_forward(&self, layer: usize, t: &mut LowRank) -> (Held, Gated) {
        let gated = self.gate_up(layer, t);
        let _a = self.flow(self.shapes[DOWN][1]);
        (self.output([layer, DOWN], &mut t[DOWN]), gated)
    }

    /// `Layer::backward`: the input's gradient if it is wanted, and the parameters'.
    pub(super) fn layer_backward(
        &self,
        layer: usize,
        kept: Kept,
        dy: Held,
        want: bool,
        lengths: &[usize],
    ) -> (Option<Held>, Vec<Held>) {
        let Kept { x: _x, mut t, attended, gated } = kept;
        let extent = if gated.is_some() { Extent::All } else { Extent::Inputs };
        let attended = attended.unwrap_or_else(|| self.attend(layer, &mut t));
        let mut grads = Grads::default();
        match self.parts(extent) {
            None => {
                let gated = gated.unwrap_or_else(|| self.gate_up(layer, &mut t));
                self.feed_forward_backward(layer, gated, &mut grads);
            }
            Some(parts) => {
                for rows in parts {
                    self.taking(rows, || {
                        let gated = self.gate_up(layer, &mut t);
                        let _dy = self.flow(self.job.config.hidden_size);
                        self.feed_forward_backward(layer, gated, &mut grads);
                    });
                    grads.again = true;
                }
                grads.again = false;
            }
        }
        self.attend_backward(layer, attended, want, lengths, &mut grads);
        (want.then_some(dy), grads.held)
    }

    /// `Layer::feed_forward_backward`.
    fn feed_forward_backward(&self, layer: usize, Gated(_rstd, gate_up): Gated, grads: &mut Grads) {
        let (d, f) = (self.job.config.hidden_size, self.job.config.intermediate_size);
        let a = self.flow(f);
        let da = self.linear_backward([layer, DOWN], None, true, grads);
        drop(a);
        // In place on a GPU, where the gradients go on counting as activations.
        let (mut dgate_up, mut kept) = (Vec::from(gate_up), Vec::new());
        if self.on_cpu() {
            kept = std::mem::replace(&mut dgate_up, vec![self.flow(f), self.flow(f)]);
        }
        drop((da, kept));

        let n2 = self.flow(d);
        let dn2 = self.linear_backward([layer, GATE], None, true, grads);
        let _dn2 = self.linear_backward([layer, UP], dn2, true, grads);
        drop((n2, dgate_up));
        grads.put(self.norm_weight_grad());
    }

    /// `Layer::attend_backward`.
    fn attend_backward(&self, layer: usize, attended: Attended, want: bool, lengths: &[usize], grads: &mut Grads) {
        let (c, [q, kv]) = (&self.job.config, [self.shapes[Q][0], self.shapes[K][0]]);
        let Attended([_rstd, q_, k_, v_, o, _lse], h) = attended;
        drop(h);
        let d_o = self.linear_backward([layer, O], None, true, grads);
        let _dqkv = [self.flow(q), self.flow(kv), self.flow(kv)];
        if let Some(chip) = self.job.chip.filter(|_| self.w == 2) {
            let heads = Heads { query: c.num_heads, kv: c.num_kv_heads, dim: c.head_dim };
            drop(attention::backward_workspace(chip, heads, lengths).map(|bytes| self.workspace(bytes)));
        }
        drop((d_o, [q_, k_, v_, o]));

        let _n1 = self.flow(c.hidden_size);
        let mut dn1 = None;
        for linear in [Q, K, V] {
            dn1 = self.linear_backward([layer, linear], dn1, want, grads);
        }
        grads.put(self.norm_weight_grad());
    }

    /// The gradient of a norm's weight, if it trains.
    pub(super) fn norm_weight_grad(&self) -> Option<Held> {
        let d = self.job.config.hidden_size;
        self.trains.all.then(|| {
            let _partial = (!self.on_cpu()).then(|| self.workspace(rms_norm::weight_grad_workspace(self.t.get(), d)));
            self.hold(Tag::Gradients, 4 * d)
        })
    }

    /// A parameter of so many numbers in the type of the computation.
    pub(super) fn cast(&self, numel: usize) -> Option<Held> {
        (self.w < 4).then(|| self.workspace(numel * self.w))
    }

    /// The weight as a product takes it, if that is another tensor.
    fn weight(&self, at: Place) -> Option<Held> {
        let [n, k] = self.shapes[at[1]];
        if self.trains.all { self.cast(n * k) } else { None }
    }

    /// Workspace of a product of rows `[T, k]` with a layer's weight into `[T, n]`.
    fn product(&self, n: usize, k: usize, rank: usize) -> Held {
        let bytes = match self.job.chip {
            Some(chip) if self.w == 2 && self.job.quantized.is_some() => {
                linear::dequantized_bytes(chip, self.t.get(), n, k, rank)
            }
            // An f32 weight alone is multiplied as it is.
            None if !self.trains.all => linear::panel_bytes(n, k),
            _ => 0,
        };
        self.workspace(bytes)
    }

    /// `layer::product`: the output, and the adapter's `t` if it is not there.
    fn output(&self, at: Place, t: &mut Option<Held>) -> Held {
        let ([n, k], rank) = self.linear(at);
        if t.is_none() {
            *t = self.low_rank(at);
        }
        let _b = t.as_ref().and_then(|_| self.cast(n * rank));
        self.gains(at);
        let _weight = self.weight(at);
        let z = (rank > 0 && self.trains.dora).then(|| self.flow(n));
        let y = if z.is_none() { Some(self.activation(n)) } else { None };
        drop(self.product(n, k, rank));
        y.unwrap_or_else(|| self.activation(n))
    }

    /// `Linear::gains`: made once a step, from the weight in f32 and, for a moment, another tensor like it.
    fn gains(&self, at: Place) {
        let ([n, k], rank) = self.linear(at);
        if rank == 0 || !self.trains.dora || !self.gains.borrow_mut().insert(at) {
            return;
        }
        let narrow = if self.job.quantized.is_some() { self.cast(n * k) } else { None };
        let v = self.workspace(4 * n * k);
        drop(narrow);
        let of_norms = self.workspace(4 * n * k);
        drop((v, of_norms));
        self.sums.borrow_mut().extend([self.hold(Tag::Adapters, 4 * n), self.hold(Tag::Adapters, 4 * n)]);
    }

    /// The rank of the adapter on a linear, 0 for none, after the linear's shape.
    fn linear(&self, [layer, which]: Place) -> ([usize; 2], usize) {
        (self.shapes[which], self.trains.ranks[layer][which])
    }

    fn low_rank(&self, at: Place) -> Option<Held> {
        let ([_, k], rank) = self.linear(at);
        (rank > 0).then(|| {
            let _a = self.cast(rank * k);
            let _dropped = (self.trains.dropout && !self.fused()).then(|| self.flow(k));
            self.activation(rank)
        })
    }

    /// A weight's gradient `[n, k]` from `rows` rows.
    pub(super) fn weight_grad(&self, rows: usize, n: usize, k: usize, dropped: bool) -> Held {
        let workspace = match self.job.chip {
            Some(chip) if self.w == 2 => linear::weight_grad_workspace(chip, rows, n, k, dropped),
            _ if dropped => rows * k * self.w,
            _ => 0,
        };
        let _workspace = self.workspace(workspace);
        self.hold(Tag::Gradients, 4 * n * k)
    }

    /// `Linear::backward`: the input's gradient if it is wanted, which adds to `dx`.
    fn linear_backward(&self, at: Place, dx: Option<Held>, want: bool, grads: &mut Grads) -> Option<Held> {
        let ([n, k], rank) = self.linear(at);
        if self.trains.all {
            grads.put(Some(self.weight_grad(self.t.get(), n, k, false)));
        }
        let (mut _b, mut _scaled) = (None, None);
        if rank > 0 && self.trains.dora {
            _b = self.cast(n * rank);
            let z = self.flow(n);
            drop(self.product(n, k, rank));
            let partial = (!self.on_cpu()).then(|| self.workspace(rms_norm::weight_grad_workspace(self.t.get(), n)));
            grads.put(Some(self.hold(Tag::Gradients, 4 * n)));
            drop((z, partial));
            _scaled = Some(self.flow(n));
        }
        let mut _branch = None;
        if rank > 0 {
            let b = self.cast(n * rank);
            let u = self.flow(rank);
            drop(b);
            grads.put(Some(self.weight_grad(self.t.get(), n, rank, false)));
            grads.put(Some(self.weight_grad(self.t.get(), rank, k, self.trains.dropout)));
            _branch = Some((u, self.cast(rank * k)));
        }
        if !want {
            return None;
        }
        let weight = self.weight(at);
        let dx = dx.unwrap_or_else(|| self.flow(k));
        drop(self.product(k, n, if self.trains.dropout { 0 } else { rank }));
        if rank > 0 && self.trains.dropout && !self.fused() {
            drop([self.flow(k), self.flow(k)]);
        }
        drop(weight);
        Some(dx)
    }
}
