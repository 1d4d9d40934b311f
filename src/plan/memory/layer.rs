//! A layer of the walk: `models/src/llama/layer.rs` and `linear.rs`.

use super::{Held, Walk};
use nibble_kernels::{
    attention::{self, Heads},
    linear, rms_norm,
};
use nibble_runtime::Tag;

/// What a layer keeps; see `models/src/llama/layer.rs`.
pub(super) struct Saved {
    norms: [Held; 2],
    qkv: [Held; 3],
    o: Held,
    lse: Held,
    h: Held,
    gate: Held,
    up: Held,
    t: [Option<Held>; 7],
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
    /// `Layer::forward`.
    pub(super) fn layer_forward(&self, layer: usize) -> (Held, Saved) {
        let mut saved = self.up_to_feed_forward(layer);
        let _a = self.flow(self.shapes[DOWN][1]);
        let (y, t) = self.linear_forward([layer, DOWN]);
        saved.t[DOWN] = t;
        (y, saved)
    }

    /// `LayerNode::saved`.
    pub(super) fn saved(&self, layer: usize) -> Saved {
        let mut saved = self.up_to_feed_forward(layer);
        let _a = self.flow(self.shapes[DOWN][1]);
        saved.t[DOWN] = self.low_rank([layer, DOWN]);
        saved
    }

    fn up_to_feed_forward(&self, layer: usize) -> Saved {
        let (c, rows) = (&self.job.config, || self.hold(Tag::Activations, 4 * self.t));
        let (_n1, rstd1) = (self.flow(c.hidden_size), rows());
        let [(q, t_q), (k, t_k), (v, t_v)] = [Q, K, V].map(|linear| self.linear_forward([layer, linear]));
        let o = self.activation(self.shapes[Q][0]);
        let lse = self.hold(Tag::Activations, 4 * c.num_heads * self.t);
        let (h, t_o) = self.linear_forward([layer, O]);
        let (_n2, rstd2) = (self.flow(c.hidden_size), rows());
        let [(gate, t_gate), (up, t_up)] = [GATE, UP].map(|linear| self.linear_forward([layer, linear]));
        let t = [t_q, t_k, t_v, t_o, t_gate, t_up, None];
        Saved { norms: [rstd1, rstd2], qkv: [q, k, v], o, lse, h, gate, up, t }
    }

    /// `Layer::backward`: the input's gradient if it is wanted, and the parameters'.
    pub(super) fn layer_backward(
        &self,
        layer: usize,
        saved: Saved,
        dy: Held,
        want: bool,
        lengths: &[usize],
    ) -> (Option<Held>, Vec<Held>) {
        let c = &self.job.config;
        let (d, f, [q, kv]) = (c.hidden_size, c.intermediate_size, [self.shapes[Q][0], self.shapes[K][0]]);
        let Saved { norms: _norms, qkv, o, lse: _lse, h, gate, up, t: _t } = saved;
        let mut grads = Vec::new();

        let a = self.flow(f);
        let da = self.linear_backward([layer, DOWN], None, true, &mut grads);
        drop(a);
        // In place on a GPU, where the gradients go on counting as activations.
        let (mut dgate_up, mut kept) = (vec![gate, up], Vec::new());
        if self.on_cpu() {
            kept = std::mem::replace(&mut dgate_up, vec![self.flow(f), self.flow(f)]);
        }
        drop((da, kept));

        let n2 = self.flow(d);
        let dn2 = self.linear_backward([layer, GATE], None, true, &mut grads);
        let dn2 = self.linear_backward([layer, UP], dn2, true, &mut grads);
        drop((n2, dgate_up));
        grads.extend(self.norm_weight_grad());
        drop((dn2, h));

        let d_o = self.linear_backward([layer, O], None, true, &mut grads);
        let _dqkv = [self.flow(q), self.flow(kv), self.flow(kv)];
        if let Some(chip) = self.job.chip.filter(|_| self.w == 2) {
            let heads = Heads { query: c.num_heads, kv: c.num_kv_heads, dim: c.head_dim };
            drop(attention::backward_workspace(chip, heads, lengths).map(|bytes| self.workspace(bytes)));
        }
        drop((d_o, qkv, o));

        let _n1 = self.flow(d);
        let mut dn1 = None;
        for linear in [Q, K, V] {
            dn1 = self.linear_backward([layer, linear], dn1, want, &mut grads);
        }
        grads.extend(self.norm_weight_grad());
        (want.then_some(dy), grads)
    }

    /// The gradient of a norm's weight, if it trains.
    pub(super) fn norm_weight_grad(&self) -> Option<Held> {
        let d = self.job.config.hidden_size;
        self.trains.all.then(|| {
            let _partial = (!self.on_cpu()).then(|| self.workspace(rms_norm::weight_grad_workspace(self.t, d)));
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
                linear::dequantized_bytes(chip, self.t, n, k, rank)
            }
            // An f32 weight alone is multiplied as it is.
            None if !self.trains.all => linear::panel_bytes(n, k),
            _ => 0,
        };
        self.workspace(bytes)
    }

    /// `Linear::forward`: the output and the adapter's `t`.
    fn linear_forward(&self, at: Place) -> (Held, Option<Held>) {
        let ([n, k], rank) = self.linear(at);
        let t = self.low_rank(at);
        let _b = t.as_ref().and_then(|_| self.cast(n * rank));
        self.gains(at);
        let _weight = self.weight(at);
        let z = (rank > 0 && self.trains.dora).then(|| self.flow(n));
        let y = if z.is_none() { Some(self.activation(n)) } else { None };
        drop(self.product(n, k, rank));
        (y.unwrap_or_else(|| self.activation(n)), t)
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
    fn linear_backward(&self, at: Place, dx: Option<Held>, want: bool, grads: &mut Vec<Held>) -> Option<Held> {
        let ([n, k], rank) = self.linear(at);
        if self.trains.all {
            grads.push(self.weight_grad(self.t, n, k, false));
        }
        let (mut _b, mut _scaled) = (None, None);
        if rank > 0 && self.trains.dora {
            _b = self.cast(n * rank);
            let z = self.flow(n);
            drop(self.product(n, k, rank));
            let partial = (!self.on_cpu()).then(|| self.workspace(rms_norm::weight_grad_workspace(self.t, n)));
            grads.push(self.hold(Tag::Gradients, 4 * n));
            drop((z, partial));
            _scaled = Some(self.flow(n));
        }
        let mut _branch = None;
        if rank > 0 {
            let b = self.cast(n * rank);
            let u = self.flow(rank);
            drop(b);
            grads.push(self.weight_grad(self.t, n, rank, false));
            grads.push(self.weight_grad(self.t, rank, k, self.trains.dropout));
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
