//! Causal grouped-query attention over packed sequences, without an S×S buffer.
//!
//! Tokens of all sequences lie one after another; a [`Segment`] says where a sequence's queries and keys are, so there is
//! no padding, and with a KV cache a segment has more keys than queries. Query head `h` reads key/value head
//! `h / (heads / kv_heads)`. For each row: `P = softmax(scale · Q·Kᵀ)` over the keys up to its own, `O = P·V`, and the
//! log of the row's sum of exponentials (`lse`) is saved.
//!
//! Backward (Dao, "FlashAttention-2", arXiv 2307.08691): `P` again from `lse`; with `D = rowsum(dO ∘ O)`:
//! `dV = Pᵀ·dO`, `dS = P ∘ (dO·Vᵀ − D)`, `dQ = scale · dS·K`, `dK = scale · dSᵀ·Q`.

mod cpu;

use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};

/// One sequence of a packed batch. Its last query attends to all of its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First query row.
    pub query: usize,
    /// Number of queries.
    pub queries: usize,
    /// First key (and value) row.
    pub key: usize,
    /// Number of keys, at least as many as queries.
    pub keys: usize,
}

impl Segment {
    /// Segments of whole sequences of these lengths, packed one after another.
    pub fn packed(lengths: &[usize]) -> Vec<Segment> {
        let mut start = 0;
        let segment = |&length: &usize| {
            let segment = Segment { query: start, queries: length, key: start, keys: length };
            start += length;
            segment
        };
        lengths.iter().map(segment).collect()
    }
}

/// Head counts and the size of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, a multiple of `kv_heads`.
    pub query: usize,
    /// Key and value heads.
    pub kv: usize,
    /// Elements of a head.
    pub dim: usize,
}

impl Heads {
    /// 1/√dim.
    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, segments: &[Segment]) -> Result<usize> {
    let op = "attention";
    let ((queries, width), (keys, kv_width)) = (q.dims2(op)?, k.dims2(op)?);
    let fits = heads.kv > 0
        && heads.dim > 0
        && heads.query.is_multiple_of(heads.kv)
        && width == heads.query * heads.dim
        && kv_width == heads.kv * heads.dim
        && v.shape() == k.shape();
    if !fits {
        let what = format!("q {:?}, k {:?}, v {:?} do not fit {heads:?}", q.shape(), k.shape(), v.shape());
        return Err(Error::shape(op, what));
    }
    let mut next = 0;
    for segment in segments {
        let inside = segment.key.checked_add(segment.keys).is_some_and(|end| end <= keys);
        if segment.query != next || !inside || segment.keys < segment.queries {
            let what = format!("{segment:?} does not continue at query {next} inside of {keys} keys");
            return Err(Error::shape(op, what));
        }
        next += segment.queries;
    }
    if next != queries {
        return Err(Error::shape(op, format!("segments cover {next} of {queries} queries")));
    }
    Ok(queries)
}

/// Attention of `q` `[Tq, heads·dim]` over `k`, `v` `[Tk, kv_heads·dim]`. Returns `o` in the shape and type of `q`, and
/// `lse` f32 `[heads, Tq]`.
///
/// # Errors
/// Shapes do not fit, or the segments do not cover the queries in order.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, segments: &[Segment]) -> Result<(Tensor, Tensor)> {
    let rows = check(q, k, v, heads, segments)?;
    match q.device() {
        Device::Cpu => {
            let mut o = Tensor::empty(q.shape(), DType::F32, Device::Cpu, Tag::Activations)?;
            let mut lse = Tensor::empty(&[heads.query, rows], DType::F32, Device::Cpu, Tag::Activations)?;
            let inputs = cpu::Inputs { q: &q.to_f32()?, k: &k.to_f32()?, v: &v.to_f32()?, heads, segments };
            cpu::forward(&inputs, o.as_mut_slice()?, lse.as_mut_slice()?);
            Ok((o.into_dtype(q.dtype(), Tag::Activations)?, lse))
        }
        device => Err(Error::NoKernel { op: "attention", device }),
    }
}

/// What [`backward`] reads of the forward pass.
pub struct Saved<'a> {
    /// Queries, after rotary.
    pub q: &'a Tensor,
    /// Keys, after rotary.
    pub k: &'a Tensor,
    /// Values.
    pub v: &'a Tensor,
    /// Output.
    pub o: &'a Tensor,
    /// Log-sum-exp of each row, from [`forward`].
    pub lse: &'a Tensor,
}

/// Gradients of `q`, `k` and `v` from that of the output.
///
/// # Errors
/// As [`forward`]; also if a segment has more keys than queries (a KV cache has no gradient).
pub fn backward(saved: &Saved, grad: &Tensor, heads: Heads, segments: &[Segment]) -> Result<(Tensor, Tensor, Tensor)> {
    let Saved { q, k, v, o, lse } = saved;
    let rows = check(q, k, v, heads, segments)?;
    if grad.shape() != q.shape() || o.shape() != q.shape() || lse.shape() != [heads.query, rows] {
        let what = format!("gradient {:?}, output {:?}, lse {:?}", grad.shape(), o.shape(), lse.shape());
        return Err(Error::shape("attention backward", what));
    }
    if let Some(segment) = segments.iter().find(|s| s.keys != s.queries || s.key != s.query) {
        let what = format!("{segment:?} attends to keys of another pass, which have no gradient");
        return Err(Error::invalid("attention backward", what));
    }
    match q.device() {
        Device::Cpu => {
            let empty = |like: &Tensor| Tensor::empty(like.shape(), DType::F32, Device::Cpu, Tag::Workspace);
            let (mut dq, mut dk, mut dv) = (empty(q)?, empty(k)?, empty(v)?);
            let inputs = cpu::Inputs { q: &q.to_f32()?, k: &k.to_f32()?, v: &v.to_f32()?, heads, segments };
            let outputs = cpu::Outputs { o: &o.to_f32()?, lse: lse.as_slice()?, grad: &grad.to_f32()? };
            cpu::backward(&inputs, &outputs, dq.as_mut_slice()?, dk.as_mut_slice()?, dv.as_mut_slice()?);
            let narrow = |tensor: Tensor| tensor.into_dtype(q.dtype(), Tag::Workspace);
            Ok((narrow(dq)?, narrow(dk)?, narrow(dv)?))
        }
        device => Err(Error::NoKernel { op: "attention backward", device }),
    }
}

#[cfg(test)]
mod tests;
