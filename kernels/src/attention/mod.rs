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
pub(crate) mod cuda;
pub(crate) mod hopper;
mod layout;

use crate::rotary::Turn;
pub use layout::{Layout, Segment};
use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor, cuda::Chip};

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
    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

/// Returns the number of query rows.
fn check(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, layout: &Layout) -> Result<usize> {
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
    if layout.queries() != queries || layout.keys() > keys {
        let (rows, reached) = (layout.queries(), layout.keys());
        let what = format!("segments cover {rows} of {queries} queries and reach {reached} of {keys} keys");
        return Err(Error::shape(op, what));
    }
    if let Some(tensor) = [q, k, v].into_iter().find(|tensor| tensor.device() != layout.device()) {
        let what = format!("a tensor on {}, a layout made for {}", tensor.device(), layout.device());
        return Err(Error::invalid(op, what));
    }
    Ok(queries)
}

/// Attention of `q` `[Tq, heads·dim]` over `k`, `v` `[Tk, kv_heads·dim]`. Returns `o` in the shape and type of `q`, and
/// `lse` f32 `[heads, Tq]`.
///
/// # Errors
/// Shapes do not fit, or tensors and layout are not on one device.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, layout: &Layout) -> Result<(Tensor, Tensor)> {
    let rows = check(q, k, v, heads, layout)?;
    match q.device() {
        Device::Cpu => {
            let mut o = Tensor::empty(q.shape(), DType::F32, Device::Cpu, Tag::Activations)?;
            let mut lse = Tensor::empty(&[heads.query, rows], DType::F32, Device::Cpu, Tag::Activations)?;
            let inputs =
                cpu::Inputs { q: &q.to_f32()?, k: &k.to_f32()?, v: &v.to_f32()?, heads, segments: layout.segments() };
            cpu::forward(&inputs, o.as_mut_slice()?, lse.as_mut_slice()?);
            Ok((o.into_dtype(q.dtype(), Tag::Activations)?, lse))
        }
        Device::Cuda(_) => cuda::forward(q, k, v, heads, layout),
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

/// Gradients of `q`, `k` and `v` from that of the output. Those of q and k are of what they were before `turn`, where there is
/// one: on Hopper that takes no pass of its own.
///
/// # Errors
/// As [`forward`]; also if a segment has more keys than queries (a KV cache has no gradient), and as [`crate::rotary::apply`].
pub fn backward(
    saved: &Saved,
    grad: &Tensor,
    heads: Heads,
    layout: &Layout,
    turn: Option<Turn>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let Saved { q, k, v, o, lse } = saved;
    let rows = check(q, k, v, heads, layout)?;
    if grad.shape() != q.shape() || o.shape() != q.shape() || lse.shape() != [heads.query, rows] {
        let what = format!("gradient {:?}, output {:?}, lse {:?}", grad.shape(), o.shape(), lse.shape());
        return Err(Error::shape("attention backward", what));
    }
    if !layout.is_whole() {
        let what = "a sequence attends to keys of another pass, which have no gradient";
        return Err(Error::invalid("attention backward", what));
    }
    if let Some(turn) = turn {
        turn.check(rows, heads.dim)?;
    }
    match q.device() {
        Device::Cpu => {
            let empty = |like: &Tensor| Tensor::empty(like.shape(), DType::F32, Device::Cpu, Tag::Workspace);
            let (mut dq, mut dk, mut dv) = (empty(q)?, empty(k)?, empty(v)?);
            let inputs =
                cpu::Inputs { q: &q.to_f32()?, k: &k.to_f32()?, v: &v.to_f32()?, heads, segments: layout.segments() };
            let outputs = cpu::Outputs { o: &o.to_f32()?, lse: lse.as_slice()?, grad: &grad.to_f32()? };
            cpu::backward(&inputs, &outputs, dq.as_mut_slice()?, dk.as_mut_slice()?, dv.as_mut_slice()?);
            let narrow = |tensor: Tensor| tensor.into_dtype(q.dtype(), Tag::Workspace);
            Ok((narrow(Turn::back(turn, dq)?)?, narrow(Turn::back(turn, dk)?)?, narrow(dv)?))
        }
        Device::Cuda(_) => cuda::backward(saved, grad, heads, layout, turn),
    }
}

/// Bytes of the tables that the kernels of a GPU read for whole sequences of these lengths.
pub fn table_bytes(lengths: &[usize]) -> usize {
    cuda::table_bytes(lengths)
}

/// Bytes of the tensors that [`backward`] takes besides its results, for 16-bit heads and whole sequences of these lengths on
/// this kind of GPU.
pub fn backward_workspace(chip: Chip, heads: Heads, lengths: &[usize]) -> [usize; 3] {
    let rows = lengths.iter().sum();
    let delta = heads.query * rows * size_of::<f32>();
    let [sums, counters] = hopper::workspace(chip, heads, cuda::tiles_of(lengths), rows);
    [delta, sums, counters]
}

#[cfg(test)]
mod cuda_tests;
#[cfg(test)]
mod tests;
