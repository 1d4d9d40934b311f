//! One Llama layer: forward and backward by hand, one node on the tape.
//!
//! ```text
//! n₁ = rmsnorm(x)    q, k, v = n₁·W    q, k = rotary    o = attention(q, k, v)    h = x + o·W_o
//! n₂ = rmsnorm(h)    gate, up = n₂·W   a = silu(gate)·up                          y = h + a·W_down
//! ```
//! Between forward and backward it keeps what a matrix product or attention made (`q k v o h gate up` and the adapters'
//! `t`), and one number a row for each norm. Norms and SwiGLU are made again: they cost a pass over memory.
//! The backward pass below walks the same lines in reverse order.

use super::{
    Pass,
    linear::{Linear, Param, ParamGrads},
};
use nibble_kernels::{
    attention::{self, Segment},
    rms_norm,
    rotary::{self, Direction},
    swiglu,
};
use nibble_runtime::{Error, Function, ParamId, Result, Tag, Tensor};

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

/// What a layer keeps for its backward pass. `T` tokens, `H` and `G` heads for queries and for keys, `d` elements a head.
pub struct Saved {
    rstd1: Tensor, // [T] f32
    q: Tensor,     // [T, H·d], after rotary
    k: Tensor,     // [T, G·d], after rotary
    v: Tensor,     // [T, G·d]
    o: Tensor,     // [T, H·d]
    lse: Tensor,   // [H, T] f32
    h: Tensor,     // [T, D]
    rstd2: Tensor, // [T] f32
    gate: Tensor,  // [T, F]
    up: Tensor,    // [T, F]
    /// `t` `[T, r]` of q, k, v, o, gate, up, down.
    t: [Option<Tensor>; 7],
}

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

    /// The layer's output for `x` `[T, D]`. With a cache, the new keys and values are written behind those it holds, and
    /// the queries attend to all of them.
    pub(crate) fn forward(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<(Tensor, Saved)> {
        let mut saved = self.up_to_feed_forward(x, pass, cache)?;
        let Saved { h, gate, up, t: [.., t_down], .. } = &mut saved;
        let (y, t) = self.down.forward(&swiglu::forward(gate, up)?, pass, Some(h))?;
        *t_down = t;
        Ok((y, saved))
    }

    /// Everything but the last product: what the backward pass needs, up to the `t` of `down`.
    fn up_to_feed_forward(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Saved> {
        let turn = |x: Tensor| rotary::apply(x, &pass.positions, &pass.rope, Direction::Forward);
        let (n1, rstd1) = rms_norm::forward(x, &self.input_norm.value, self.eps)?;
        let (q, t_q) = self.q.forward(&n1, pass, None)?;
        let (k, t_k) = self.k.forward(&n1, pass, None)?;
        let (v, t_v) = self.v.forward(&n1, pass, None)?;
        let (q, k) = (turn(q)?, turn(k)?);
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
        let (h, t_o) = self.o.forward(&o, pass, Some(x))?;
        let (n2, rstd2) = rms_norm::forward(&h, &self.post_norm.value, self.eps)?;
        let (gate, t_gate) = self.gate.forward(&n2, pass, None)?;
        let (up, t_up) = self.up.forward(&n2, pass, None)?;
        let t = [t_q, t_k, t_v, t_o, t_gate, t_up, None];
        Ok(Saved { rstd1, q, k, v, o, lse, h, rstd2, gate, up, t })
    }

    /// Gradients of the input (if wanted) and of the parameters, from that of the output.
    fn backward(
        &self,
        x: &Tensor,
        saved: Saved,
        dy: Tensor,
        pass: &Pass,
        want_input: bool,
    ) -> Result<(Option<Tensor>, ParamGrads)> {
        let Saved { rstd1, q, k, v, o, lse, h, rstd2, gate, up, t } = saved;
        let [t_q, t_k, t_v, t_o, t_gate, t_up, t_down] = &t;
        let mut grads = ParamGrads::new();

        // y = h + a·W_down
        let mut da = None;
        let a = swiglu::forward(&gate, &up)?;
        self.down.backward(&a, t_down.as_ref(), &dy, pass, Some(&mut da), &mut grads)?;
        drop(a);
        let (dgate, dup) = swiglu::backward(gate, up, made(&da)?)?;
        drop(da);

        // gate, up = n₂·W
        let n2 = rms_norm::apply(&h, &self.post_norm.value, &rstd2)?;
        let mut dn2 = None;
        self.gate.backward(&n2, t_gate.as_ref(), &dgate, pass, Some(&mut dn2), &mut grads)?;
        self.up.backward(&n2, t_up.as_ref(), &dup, pass, Some(&mut dn2), &mut grads)?;
        drop((n2, dgate, dup));
        let mut dh = if dy.is_unique() { dy } else { dy.copy(Tag::Workspace)? };
        norm_backward(&self.post_norm, &h, &rstd2, made(&dn2)?, &mut dh, &mut grads)?;
        drop((dn2, h));

        // h = x + o·W_o
        let mut d_o = None;
        self.o.backward(&o, t_o.as_ref(), &dh, pass, Some(&mut d_o), &mut grads)?;
        let saved = attention::Saved { q: &q, k: &k, v: &v, o: &o, lse: &lse };
        let (dq, dk, dv) = attention::backward(&saved, made(&d_o)?, pass.heads, &pass.layout)?;
        drop((d_o, q, k, v, o));
        let turn_back = |grad: Tensor| rotary::apply(grad, &pass.positions, &pass.rope, Direction::Backward);
        let (dq, dk) = (turn_back(dq)?, turn_back(dk)?);

        // q, k, v = n₁·W
        let n1 = rms_norm::apply(x, &self.input_norm.value, &rstd1)?;
        let wanted = want_input || self.input_norm.id.is_some();
        let mut dn1 = None;
        for (linear, t, grad) in [(&self.q, t_q, &dq), (&self.k, t_k, &dk), (&self.v, t_v, &dv)] {
            linear.backward(&n1, t.as_ref(), grad, pass, wanted.then_some(&mut dn1), &mut grads)?;
        }
        if !wanted {
            return Ok((None, grads));
        }
        norm_backward(&self.input_norm, x, &rstd1, made(&dn1)?, &mut dh, &mut grads)?;
        Ok((Some(dh), grads))
    }
}

/// A gradient that [`Linear::backward`] was asked for.
fn made(grad: &Option<Tensor>) -> Result<&Tensor> {
    grad.as_ref().ok_or_else(|| Error::invalid("layer backward", "an input gradient was not made"))
}

/// Adds a norm's input gradient to `dx`; its weight's goes to `grads` if it trains.
fn norm_backward(
    norm: &Param,
    x: &Tensor,
    rstd: &Tensor,
    grad: &Tensor,
    dx: &mut Tensor,
    grads: &mut ParamGrads,
) -> Result<()> {
    let dw = rms_norm::backward_add(x, &norm.value, rstd, grad, dx, norm.id.is_some())?;
    grads.extend(norm.id.zip(dw));
    Ok(())
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
}

impl Function for LayerNode<'_> {
    type Saved = Saved;

    fn forward(&self, inputs: &[Tensor]) -> Result<(Tensor, Saved)> {
        self.layer.forward(&inputs[0], self.pass, None)
    }

    fn saved(&self, inputs: &[Tensor]) -> Result<Saved> {
        let mut saved = self.layer.up_to_feed_forward(&inputs[0], self.pass, None)?;
        let Saved { gate, up, t: [.., t_down], .. } = &mut saved;
        *t_down = self.layer.down.low_rank(&swiglu::forward(gate, up)?, self.pass)?;
        Ok(saved)
    }

    fn backward(&self, inputs: &[Tensor], saved: Saved, grad: Tensor, wanted: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let (dx, mut grads) = self.layer.backward(&inputs[0], saved, grad, self.pass, wanted[0])?;
        let mut out = vec![dx];
        self.layer.visit(&mut |id, _, _| out.push(grads.remove(&id)));
        Ok(out)
    }
}
