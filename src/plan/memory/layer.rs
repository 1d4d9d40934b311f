//! A layer of the walk: `models/src/llama/layer.rs` and `linear.rs`.

use super::{Held, Walk};
use nibble_kernels::{
    attention::{self, Heads},
    linear::{self, lora},
    rms_norm,
};
use nibble_models::llama::Extent;
use nibble_runtime::{Tag, cuda::Chip};

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

/// `linear::Back`: `scaled` and `u`, as far as they are there.
type Back = Vec<Held>;

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
        let _casts = self.casts(layer);
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
        self.low_ranks(layer, &[Q, K, V], t);
        let [q, k, v] = [Q, K, V].map(|linear| self.output([layer, linear], &mut t[linear]));
        drop(n1);
        let (o, lse) = (self.activation(self.shapes[Q][0]), self.each_row(self.job.config.num_heads));
        let h = self.output([layer, O], &mut t[O]);
        Attended([rstd, q, k, v, o, lse], h)
    }

    /// `Layer::gate_up`.
    fn gate_up(&self, layer: usize, t: &mut LowRank) -> Gated {
        let (_n2, rstd) = (self.flow(self.job.config.hidden_size), self.each_row(1));
        self.low_ranks(layer, &[GATE, UP], t);
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
        let _casts = self.casts(layer);
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
        let f = self.job.config.intermediate_size;
        let back = self.back([layer, DOWN], grads);
        let mut a = self.input_grad(layer, &[DOWN]);
        // In place on a GPU, where the gradients go on counting as activations.
        let mut dgate_up = Vec::from(gate_up);
        if self.on_cpu() {
            let made = [self.flow(f), self.flow(f), self.flow(f)];
            let [output, dgate, dup] = made;
            (a, dgate_up) = (output, vec![dgate, dup]);
        }
        self.parameter_grads(layer, &[DOWN], grads);
        drop((a, back));

        self.normed_backward(layer, &[GATE, UP], true, grads);
        drop(dgate_up);
    }

    /// `Layer::attend_backward`.
    fn attend_backward(&self, layer: usize, attended: Attended, want: bool, lengths: &[usize], grads: &mut Grads) {
        let (c, [q, kv]) = (&self.job.config, [self.shapes[Q][0], self.shapes[K][0]]);
        let Attended([_rstd, q_, k_, v_, o, _lse], h) = attended;
        drop(h);
        let back = self.back([layer, O], grads);
        self.parameter_grads(layer, &[O], grads);
        let d_o = self.input_grad(layer, &[O]);
        drop(back);
        let _dqkv = [self.flow(q), self.flow(kv), self.flow(kv)];
        if let Some(chip) = self.job.chip.filter(|_| self.w == 2) {
            let heads = Heads { query: c.num_heads, kv: c.num_kv_heads, dim: c.head_dim };
            drop(attention::backward_workspace(chip, heads, lengths).map(|bytes| self.workspace(bytes)));
        }
        drop((d_o, [q_, k_, v_, o]));

        self.normed_backward(layer, &[Q, K, V], want, grads);
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
    fn product(&self, layer: usize, n: usize, k: usize, rank: usize) -> Held {
        let bytes = match self.job.chip {
            Some(chip) if self.w == 2 && self.job.quantized.is_some() => {
                linear::product_workspace(chip, self.t.get(), n, k, rank, self.job.holds_dequantized(layer))
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
        self.gains(at);
        let _weight = self.weight(at);
        let z = (rank > 0 && self.trains.dora).then(|| self.flow(n));
        let y = if z.is_none() { Some(self.activation(n)) } else { None };
        drop(self.product(at[0], n, k, rank));
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

    /// `Pass::cast_adapters`.
    fn casts(&self, layer: usize) -> Vec<Held> {
        let linears = (0..7).map(|which| self.linear([layer, which]));
        linears.flat_map(|([n, k], rank)| [self.cast(rank * k), self.cast(n * rank)]).flatten().collect()
    }

    /// `linear::low_ranks`.
    fn low_ranks(&self, layer: usize, linears: &[usize], t: &mut LowRank) {
        if self.trains.dropout {
            return;
        }
        let missing = linears.iter().copied().filter(|&which| t[which].is_none());
        let missing: Vec<usize> = missing.filter(|&which| self.trains.ranks[layer][which] > 0).collect();
        let ranks: Vec<usize> = missing.iter().map(|&which| self.trains.ranks[layer][which]).collect();
        for &which in &missing {
            t[which] = Some(self.activation(self.trains.ranks[layer][which]));
        }
        let k = self.shapes[linears[0]][1];
        drop(self.on_gpu(|chip| lora::down_workspace(chip, self.t.get(), k, &ranks)));
    }

    /// Workspace of an operation on 16-bit rows on a GPU.
    fn on_gpu(&self, bytes: impl FnOnce(Chip) -> usize) -> Option<Held> {
        let chip = self.job.chip.filter(|_| self.w == 2)?;
        Some(self.workspace(bytes(chip)))
    }

    fn low_rank(&self, at: Place) -> Option<Held> {
        let ([_, k], rank) = self.linear(at);
        (rank > 0).then(|| {
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

    /// `layer::Normed::backward`.
    fn normed_backward(&self, layer: usize, linears: &[usize], want: bool, grads: &mut Grads) {
        let _backs: Vec<Back> = linears.iter().map(|&which| self.back([layer, which], grads)).collect();
        let grad = (want || self.trains.all).then(|| self.input_grad(layer, linears));
        grads.put(self.norm_weight_grad());
        // The norm's output: in the place of the gradient on a GPU.
        let _normed = match grad {
            Some(grad) if !self.on_cpu() => grad,
            grad => {
                drop(grad);
                self.flow(self.shapes[linears[0]][1])
            }
        };
        self.parameter_grads(layer, linears, grads);
    }

    /// `Linear::back`.
    fn back(&self, at: Place, grads: &mut Grads) -> Back {
        let ([n, _], rank) = self.linear(at);
        let scaled = (rank > 0 && self.trains.dora).then(|| self.flow(n));
        let u = (rank > 0).then(|| {
            let u = self.flow(rank);
            let of_b = self.hold(Tag::Gradients, 4 * n * rank);
            drop(self.on_gpu(|chip| lora::grad_down_and_up_workspace(chip, self.t.get(), n, rank)));
            grads.put(Some(of_b));
            u
        });
        scaled.into_iter().chain(u).collect()
    }

    /// `linear::parameter_grads`.
    fn parameter_grads(&self, layer: usize, linears: &[usize], grads: &mut Grads) {
        let t = self.t.get();
        let mut shared = Vec::new();
        let k = self.shapes[linears[0]][1];
        for &which in linears {
            let ([n, _], rank) = self.linear([layer, which]);
            if self.trains.all {
                grads.put(Some(self.weight_grad(t, n, k, false)));
            }
            if rank > 0 && self.trains.dora {
                let z = self.flow(n);
                drop(self.product(layer, n, k, rank));
                let partial = (!self.on_cpu()).then(|| self.workspace(rms_norm::weight_grad_workspace(t, n)));
                grads.put(Some(self.hold(Tag::Gradients, 4 * n)));
                drop((z, partial));
            }
            match (rank, self.trains.dropout) {
                (0, _) => {}
                (_, true) => grads.put(Some(self.weight_grad(t, rank, k, true))),
                (_, false) => shared.push(rank),
            }
        }
        let made: Vec<Held> = shared.iter().map(|rank| self.hold(Tag::Gradients, 4 * rank * k)).collect();
        drop(self.on_gpu(|chip| lora::weight_grads_workspace(chip, t, k, &shared)));
        made.into_iter().for_each(|grad| grads.put(Some(grad)));
    }

    /// `linear::input_grad`.
    fn input_grad(&self, layer: usize, linears: &[usize]) -> Held {
        let (t, k, dropout) = (self.t.get(), self.shapes[linears[0]][1], self.trains.dropout);
        let _weights: Vec<Option<Held>> = linears.iter().map(|&which| self.weight([layer, which])).collect();
        let dx = self.flow(k);
        let parts: Vec<[usize; 2]> = linears
            .iter()
            .map(|&which| [self.shapes[which][0], if dropout { 0 } else { self.trains.ranks[layer][which] }])
            .collect();
        match self.job.quantized {
            Some(_) if !self.on_cpu() => {
                let held = self.job.holds_dequantized(layer);
                drop(self.on_gpu(|chip| linear::input_grads_bytes(chip, t, k, &parts, held)));
            }
            _ => parts.iter().for_each(|&[n, rank]| drop(self.product(layer, k, n, rank))),
        }
        if dropout && !self.fused() && linears.iter().any(|&which| self.trains.ranks[layer][which] > 0) {
            drop([self.flow(k), self.flow(k)]);
        }
        dx
    }
}
