//! A layer for one more token of up to 16 sequences, on a GPU: what generating text does again and again.
//!
//! Few launches do what the operations of a layer do one by one, as far as nothing but rounding tells them apart; each names
//! here the operations that it stands for, and their CPU versions are its reference. With `n = rmsnorm(x)`:
//!
//! | launch | stands for |
//! |---|---|
//! | [`low_rank`] | RMSNorm; each row's own `t = s·n·Aᵀ` ([`crate::mixed`]), of several weights at once |
//! | [`turn`] | `q, k, v = n·Wᵀ + t·Bᵀ`; rotary of q and k; k and v to the cache |
//! | [`attend`] | attention to the cache |
//! | [`add`] | `y = gains ∘ (x·Wᵀ + t·Bᵀ) + residual` |
//! | [`gate`] | `a = silu(gate)·up` of both products |
//!
//! Nothing is allocated, and what changes from token to token is read from `tokens` in device memory, i32 `[T, 4]`: position,
//! first row of the sequence in the cache, adapter (−1 for none), 0. So a recording of the launches
//! ([`nibble_runtime::cuda::Graph`]) runs for every token.
//!
//! Activations are of one 16-bit type, weights 4-bit codes as [`fits`] wants them.

mod cuda;
#[cfg(test)]
mod cuda_tests;

pub(crate) use cuda::{ATTENTION, LINEAR, LINEAR_HOPPER, RING_HOPPER};
pub use cuda::{Scratch, add, attend, gate, low_rank, turn};

use crate::{
    attention::Heads,
    linear::Weight,
    quantize::{Absmax, QuantTensor},
};
use nibble_runtime::Tensor;

/// Most rows.
pub const MOST_ROWS: usize = 16;

/// A weight `[N, K]` and what adapters add to its product.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// As [`fits`] wants it.
    pub weight: &'a QuantTensor,
    /// B of all adapters side by side, `[N, R]`.
    pub b: Option<&'a Tensor>,
    /// Of each adapter's outputs, f32 `[adapters, N]`, where one is a DoRA.
    pub gains: Option<&'a Tensor>,
    /// The first of its R columns in `t`.
    pub column: usize,
}

/// A's of all adapters for weights with one input.
#[derive(Debug)]
pub struct Factors {
    /// `[R, K]`.
    pub a: Tensor,
    /// Whose each row is, i32 `[R]`.
    pub owners: Tensor,
    /// f32 `[R]`.
    pub scales: Tensor,
}

/// The weight, if it is one for these kernels: codes in blocks of 64, whose scales are 8-bit codes in blocks of 256, the inner
/// dimension a multiple of 64.
pub fn fits(weight: &Weight) -> Option<&QuantTensor> {
    let Weight::Quantized(quantized) = weight else { return None };
    let (n, k) = weight.dims().ok()?;
    let nested = matches!(quantized.absmax, Absmax::Double { block_size: 256, .. });
    let sizes = k > 0 && k.is_multiple_of(64) && n > 0 && u32::try_from(n * k).is_ok();
    (nested && quantized.block_size == 64 && sizes).then_some(quantized)
}

/// Whether there are kernels for these heads.
pub fn fits_heads(heads: Heads) -> bool {
    let group = heads.query / heads.kv.max(1);
    heads.dim.is_multiple_of(16) && (16..=128).contains(&heads.dim) && (1..=16).contains(&group)
}
