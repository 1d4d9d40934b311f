//! One Llama layer: forward and backward by hand, one node on the tape.
//!
//! ```text
//! n₁ = rmsnorm(x)    q, k, v = n₁·W    q, k = rotary    o = attention(q, k, v)    h = x + o·W_o
//! n₂ = rmsnorm(h)    gate, up = n₂·W   a = silu(gate)·up                          y = h + a·W_down
//! ```
//! Between forward and backward it keeps at most what a matrix product or attention made (`q k v o h gate up` and the
//! adapters' `t`), and one number a row for each norm. Norms and SwiGLU are made again: they cost a pass over memory. What
//! else is made again [`super::keep`] says. The backward pass below walks the same lines in reverse order.
//!
//! Where `gate` and `up` are not kept the second line may be taken some rows at a time ([`Pass::feed_forward_rows`]).

use super::{
    Pass,
    keep::{Attended, Extent, Gated, Keeping, Kept, Saved},
    linear::{Back, Linear, Param, ParamGrads, input_grad, low_ranks, parameter_grads, put, swiglu_grads},
};
use nibble_kernels::{
    attention::{self, Segment},
    rms_norm,
    rotary::{self, Direction},
    swiglu,
};
use nibble_runtime::{Error, Function, ParamId, Result, Stash, Tag, Tensor};
use std::ops::Range;

/// A transformer layer.
#[derive(Debug)]
pub struct Layer {
    /// Norm before attention, `[D]`.
    pub input_norm: Param,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    /// Norm before the feed-forward block, `[D]`.
    pub post_norm: Param,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
    /// ε of both norms.
    pub eps: f32,
}

/// Keys and values of the tokens that a sequence already has, for one layer.
#[derive(Debug)]
pub struct LayerCache {
    /// `[capacity, kv_heads · head_dim]`, after rotary.
    pub keys: Tensor,
    /// `[capacity, kv_heads · head_dim]`.
    pub values: Tensor,
}

/// The adapters' `t` of q, k, v, o, gate, up, down; made where they are not there.
type LowRank = [Option<Tensor>; 7];

impl Layer {
    /// The linear layers in the order of the forward pass.
    pub fn linears(&self) -> [&Linear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    /// As [`Layer::linears`], to write.
    pub fn linears_mut(&mut self) -> [&mut Linear; 7] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o, &mut self.gate, &mut self.up, &mut self.down]
    }

    /// Every trainable parameter, in a fixed order.
    pub fn visit<'a>(&'a self, f: &mut impl FnMut(ParamId, String, &'a Tensor)) {
        for norm in [&self.input_norm, &self.post_norm] {
            if let Some(id) = norm.id {
                f(id, norm.name.clone(), &norm.value);
            }
        }
        self.linears().into_iter().for_each(|linear| linear.visit(f));
    }

    /// As [`Layer::visit`], to write.
    pub fn visit_mut<'a>(&'a mut self, f: &mut impl FnMut(ParamId, &'a mut Tensor)) {
        let Layer { input_norm, post_norm, q, k, v, o, gate, up, down, .. } = self;
        for norm in [input_norm, post_norm] {
            if let Some(id) = norm.id {
                f(id, &mut norm.value);
            }
        }
        [q, k, v, o, gate, up, down].into_iter().for_each(|linear| linear.visit_mut(f));
    }

    /// The layer's output for `x` `[T, D]`, and what it made, without `gate` and `up` where `extent` does not want them. With a
    /// cache, the new keys and values are written behind those it holds, and the queries attend to all of them.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        pass: &Pass,
        cache: Option<&mut LayerCache>,
        extent: Extent,
    ) -> Result<(Tensor, Kept)> {
        let _casts = pass.cast_adapters(self.linears(), x.dtype())?;
        let mut t = LowRank::default();
        let attended = self.attend(x, pass, cache, &mut t)?;
        let parts = if extent == Extent::All { Vec::new() } else { self.parts(x, pass)? };
        let (y, gated) = match parts.len() {
            0 => self.feed_forward(&attended.h, pass, &mut t).map(|(y, gated)| (y, Some(gated)))?,
            _ => (self.feed_forward_in_parts(parts, &attended.h, pass, &mut t)?, None),
        };
        Ok((y, Kept { x: x.clone(), t, attended: Some(attended), gated }))
    }

    /// The first line: all up to `h`.
    fn attend(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>, t: &mut LowRank) -> Result<Attended> {
        let [t_q, t_k, t_v, t_o, ..] = t;
        let (n1, rstd) = rms_norm::forward(x, &self.input_norm.value, self.eps)?;
        low_ranks(&n1, pass, &mut [(&self.q, &mut *t_q), (&self.k, &mut *t_k), (&self.v, &mut *t_v)])?;
        let q = product(&self.q, &n1, pass, None, t_q)?;
        let k = product(&self.k, &n1, pass, None, t_k)?;
        let v = product(&self.v, &n1, pass, None, t_v)?;
        drop(n1);
        let [q, k] = rotary::apply_both([q, k], &pass.positions, &pass.rope, Direction::Forward)?;
        let (o, lse) = match cache {
            None => attention::forward(&q, &k, &v, pass.heads, &pass.layout)?,
            Some(cache) => {
                for segment in pass.layout.segments() {
                    append(&mut cache.keys, &k, segment)?;
                    append(&mut cache.values, &v, segment)?;
                }
                attention::forward(&q, &cache.keys, &cache.values, pass.heads, &pass.layout)?
            }
        };
        let h = product(&self.o, &o, pass, Some(x), t_o)?;
        Ok(Attended { rstd, q, k, v, o, lse, h })
    }

    /// The norm of rows of `h`, its `rstd`, and `gate`.
    fn gate(&self, h: &Tensor, pass: &Pass, t: &mut LowRank) -> Result<[Tensor; 3]> {
        let [.., t_gate, t_up, _] = t;
        let (n2, rstd) = rms_norm::forward(h, &self.post_norm.value, self.eps)?;
        low_ranks(&n2, pass, &mut [(&self.gate, &mut *t_gate), (&self.up, &mut *t_up)])?;
        let gate = product(&self.gate, &n2, pass, None, t_gate)?;
        Ok([n2, rstd, gate])
    }

    /// `gate` and `up` of rows of `h`.
    fn gate_up(&self, h: &Tensor, pass: &Pass, t: &mut LowRank) -> Result<Gated> {
        let [n2, rstd, gate] = self.gate(h, pass, t)?;
        let [.., t_up, _] = t;
        let up = product(&self.up, &n2, pass, None, t_up)?;
        Ok(Gated { rstd, gate, up })
    }

    /// The second line.
    fn feed_forward(&self, h: &Tensor, pass: &Pass, t: &mut LowRank) -> Result<(Tensor, Gated)> {
        let [n2, rstd, gate] = self.gate(h, pass, t)?;
        let [.., t_up, t_down] = t;
        let (up, a) = gated_product(&self.up, &n2, pass, &gate, t_up)?;
        drop(n2);
        Ok((product(&self.down, &a, pass, Some(h), t_down)?, Gated { rstd, gate, up }))
    }

    /// The rows to take at a time, where they are not all.
    fn parts(&self, h: &Tensor, pass: &Pass) -> Result<Vec<Range<usize>>> {
        let (tokens, rows) = (h.dims2("feed-forward")?.0, pass.feed_forward_rows.max(1));
        if tokens <= rows {
            return Ok(Vec::new());
        }
        let dropout = |linear: &Linear| linear.lora.as_ref().is_some_and(|lora| pass.mask(lora.dropout, 0).is_some());
        if [&self.gate, &self.up, &self.down].into_iter().any(dropout) {
            // A mask is made for all rows.
            return Err(Error::invalid(
                "feed-forward",
                "dropout needs all rows at once: leave --feed-forward-rows out",
            ));
        }
        Ok((0..tokens).step_by(rows).map(|start| start..(start + rows).min(tokens)).collect())
    }

    /// [`Layer::feed_forward`], part by part.
    fn feed_forward_in_parts(
        &self,
        parts: Vec<Range<usize>>,
        h: &Tensor,
        pass: &Pass,
        t: &mut LowRank,
    ) -> Result<Tensor> {
        let (tokens, width) = h.dims2("feed-forward")?;
        let mut y = Tensor::empty(&[tokens, width], h.dtype(), h.device(), Tag::Activations)?;
        for part in parts {
            let mut of_part = LowRank::default();
            let rows = self.feed_forward(&h.rows(part.start, part.len())?, pass, &mut of_part)?.0;
            y.copy_from(part.start * width, &rows)?;
            for (t, of_part) in t.iter_mut().zip(of_part) {
                let Some(of_part) = of_part else { continue };
                let rank = of_part.dims2("adapter")?.1;
                let whole = match t.take() {
                    Some(whole) => whole,
                    None => Tensor::empty(&[tokens, rank], of_part.dtype(), of_part.device(), Tag::Activations)?,
                };
                t.insert(whole).copy_from(part.start * rank, &of_part)?;
            }
        }
        Ok(y)
    }

    /// Gradients of the input (if wanted) and of the parameters, from that of the output.
    fn backward(&self, kept: Kept, dy: Tensor, pass: &Pass, want_input: bool) -> Result<(Option<Tensor>, ParamGrads)> {
        let Kept { x, mut t, attended, gated } = kept;
        let _casts = pass.cast_adapters(self.linears(), x.dtype())?;
        let attended = attended.map_or_else(|| self.attend(&x, pass, None, &mut t), Ok)?;
        let mut grads = ParamGrads::new();
        let dy = if dy.is_unique() { dy } else { dy.copy(Tag::Workspace)? };
        let parts = if gated.is_some() { Vec::new() } else { self.parts(&attended.h, pass)? };
        let dh = match parts.len() {
            0 => {
                let gated = gated.map_or_else(|| self.gate_up(&attended.h, pass, &mut t), Ok)?;
                self.feed_forward_backward(&attended.h, gated, &t, dy, pass, &mut grads)?
            }
            _ => self.feed_forward_backward_in_parts(parts, &attended.h, &t, dy, pass, &mut grads)?,
        };
        let dx = self.attend_backward(&x, attended, &t, dh, pass, want_input, &mut grads)?;
        Ok((dx, grads))
    }

    /// Back over the second line: the gradient of `h`, in the place of that of `y`.
    fn feed_forward_backward(
        &self,
        h: &Tensor,
        gated: Gated,
        t: &LowRank,
        mut dy: Tensor,
        pass: &Pass,
        grads: &mut ParamGrads,
    ) -> Result<Tensor> {
        let Gated { rstd, gate, up } = gated;
        let [.., t_gate, t_up, t_down] = t;

        // y = h + a·W_down
        let back = self.down.back(t_down.as_ref(), &dy, pass, grads)?;
        let swiglu::Backward { output: a, gate: dgate, up: dup } = swiglu_grads(&self.down, &back, gate, up, pass)?;
        parameter_grads(&a, &[(&self.down, t_down.as_ref(), back)], pass, grads)?;
        drop(a);

        // gate, up = n₂·W
        let outputs = [(&self.gate, t_gate, &dgate), (&self.up, t_up, &dup)];
        Normed { norm: &self.post_norm, x: h, rstd: &rstd }.backward(outputs, pass, Some(&mut dy), grads)?;
        Ok(dy)
    }

    /// [`Layer::feed_forward_backward`], part by part; `gate` and `up` are made again.
    fn feed_forward_backward_in_parts(
        &self,
        parts: Vec<Range<usize>>,
        h: &Tensor,
        t: &LowRank,
        mut dy: Tensor,
        pass: &Pass,
        grads: &mut ParamGrads,
    ) -> Result<Tensor> {
        let width = h.dims2("feed-forward")?.1;
        for part in parts {
            let rows = |whole: &Tensor| whole.rows(part.start, part.len());
            let mut of_part = LowRank::default();
            for (of_part, t) in of_part.iter_mut().zip(t) {
                *of_part = t.as_ref().map(rows).transpose()?;
            }
            let h = rows(h)?;
            let gated = self.gate_up(&h, pass, &mut of_part)?;
            let dy_part = rows(&dy)?.copy(Tag::Workspace)?;
            let dh = self.feed_forward_backward(&h, gated, &of_part, dy_part, pass, grads)?;
            dy.copy_from(part.start * width, &dh)?;
        }
        Ok(dy)
    }

    /// Back over the first line: the gradient of `x`, if it is wanted, in the place of that of `h`.
    #[expect(clippy::too_many_arguments, reason = "what the forward pass had, and the gradients")]
    fn attend_backward(
        &self,
        x: &Tensor,
        attended: Attended,
        t: &LowRank,
        mut dh: Tensor,
        pass: &Pass,
        want_input: bool,
        grads: &mut ParamGrads,
    ) -> Result<Option<Tensor>> {
        let Attended { rstd, q, k, v, o, lse, h } = attended;
        let [t_q, t_k, t_v, t_o, ..] = t;
        drop(h);

        // h = x + o·W_o
        let parts = [back(&self.o, t_o, &dh, pass, grads)?];
        parameter_grads(&o, &parts, pass, grads)?;
        let d_o = input_grad(&backs(&parts), pass)?;
        drop(parts);
        let saved = attention::Saved { q: &q, k: &k, v: &v, o: &o, lse: &lse };
        let turn = rotary::Turn { positions: &pass.positions, table: &pass.rope };
        let (dq, dk, dv) = attention::backward(&saved, &d_o, pass.heads, &pass.layout, Some(turn))?;
        drop((d_o, q, k, v, o));

        // q, k, v = n₁·W
        let outputs = [(&self.q, t_q, &dq), (&self.k, t_k, &dk), (&self.v, t_v, &dv)];
        let wanted = want_input || self.input_norm.id.is_some();
        let dx = wanted.then_some(&mut dh);
        Normed { norm: &self.input_norm, x, rstd: &rstd }.backward(outputs, pass, dx, grads)?;
        Ok(wanted.then_some(dh))
    }
}

/// A linear, its adapter's `t`, and what gradients are made from.
type Part<'a> = (&'a Linear, Option<&'a Tensor>, Back<'a>);

fn back<'a>(
    linear: &'a Linear,
    t: &'a Option<Tensor>,
    grad: &'a Tensor,
    pass: &Pass,
    grads: &mut ParamGrads,
) -> Result<Part<'a>> {
    Ok((linear, t.as_ref(), linear.back(t.as_ref(), grad, pass, grads)?))
}

fn backs<'a>(parts: &'a [Part]) -> Vec<(&'a Linear, &'a Back<'a>)> {
    parts.iter().map(|(linear, _, back)| (*linear, back)).collect()
}

/// A norm's output, by what makes it again.
struct Normed<'a> {
    norm: &'a Param,
    x: &'a Tensor,
    rstd: &'a Tensor,
}

impl Normed<'_> {
    /// Back over linears on it, each with its adapter's `t` and the gradient of its output: adds the gradient of `x` to `dx`, if
    /// it is wanted.
    fn backward<const N: usize>(
        self,
        outputs: [(&Linear, &Option<Tensor>, &Tensor); N],
        pass: &Pass,
        dx: Option<&mut Tensor>,
        grads: &mut ParamGrads,
    ) -> Result<()> {
        let Normed { norm, x, rstd } = self;
        let mut parts = Vec::with_capacity(N);
        for (linear, t, grad) in outputs {
            parts.push(back(linear, t, grad, pass, grads)?);
        }
        let normed = match dx {
            None => rms_norm::apply(x, &norm.value, rstd)?,
            Some(dx) => {
                let grad = input_grad(&backs(&parts), pass)?;
                let (normed, dw) = rms_norm::backward_and_apply(x, &norm.value, rstd, grad, dx, norm.id.is_some())?;
                norm.id.zip(dw).map_or(Ok(()), |(id, dw)| put(grads, id, dw))?;
                normed
            }
        };
        parameter_grads(&normed, &parts, pass, grads)
    }
}

/// The product of a linear layer, from the adapter's `t` if it is there.
fn product(
    linear: &Linear,
    x: &Tensor,
    pass: &Pass,
    residual: Option<&Tensor>,
    t: &mut Option<Tensor>,
) -> Result<Tensor> {
    if t.is_some() {
        return linear.output(x, pass, t.as_ref(), residual);
    }
    let y;
    (y, *t) = linear.forward(x, pass, residual)?;
    Ok(y)
}

/// The same, and `silu(gate)` times it.
fn gated_product(
    linear: &Linear,
    x: &Tensor,
    pass: &Pass,
    gate: &Tensor,
    t: &mut Option<Tensor>,
) -> Result<(Tensor, Tensor)> {
    if pass.mixture.is_some() || linear.gains()?.is_some() {
        let up = product(linear, x, pass, None, t)?;
        let output = swiglu::forward(gate, &up)?;
        return Ok((up, output));
    }
    if t.is_none() {
        *t = linear.low_rank(x, pass)?;
    }
    linear.gated_output(x, pass, t.as_ref(), gate)
}

/// Writes a segment's new rows behind those that `cache` holds of it.
fn append(cache: &mut Tensor, rows: &Tensor, segment: &Segment) -> Result<()> {
    let (capacity, width) = cache.dims2("cache")?;
    let Segment { query, queries, key, keys } = *segment;
    if key + keys > capacity {
        let what = format!("{queries} tokens up to row {} do not fit a cache of {capacity}", key + keys);
        return Err(Error::invalid("cache", what));
    }
    cache.copy_from((key + keys - queries) * width, &rows.rows(query, queries)?)
}

/// The layer as a tape node. Inputs: `x`, then the trainable parameters in [`Layer::visit`]'s order.
pub(crate) struct LayerNode<'a> {
    pub layer: &'a Layer,
    pub pass: &'a Pass,
    pub keeping: Keeping,
    /// Where what is kept in host memory goes.
    pub stash: &'a Stash,
}

impl Function for LayerNode<'_> {
    type Saved = Saved;
    const HOLDS_INPUTS: bool = false;

    fn forward(&self, inputs: &[Tensor]) -> Result<(Tensor, Saved)> {
        let (y, made) = self.layer.forward(&inputs[0], self.pass, None, self.keeping.extent)?;
        Ok((y, self.keeping.keep(made, self.stash)?))
    }

    fn output(&self, inputs: &[Tensor]) -> Result<Tensor> {
        Ok(self.layer.forward(&inputs[0], self.pass, None, Extent::Inputs)?.0)
    }

    fn backward(&self, _: &[Tensor], saved: Saved, grad: Tensor, wanted: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let kept = saved.back(self.stash)?;
        let (dx, mut grads) = self.layer.backward(kept, grad, self.pass, wanted[0])?;
        let mut out = vec![dx];
        self.layer.visit(&mut |id, _, _| out.push(grads.remove(&id)));
        Ok(out)
    }
}
