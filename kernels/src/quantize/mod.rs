//! NF4 and FP4 block-wise quantization, with double quantization.
//!
//! Source: Dettmers et al., "QLoRA", arXiv 2305.14314; byte-compatible with bitsandbytes.

use nibble_runtime::{DType, Tensor};

/// Which 4-bit code book.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// 4-bit NormalFloat: quantiles of a normal distribution.
    Nf4,
    /// bitsandbytes' 4-bit float (not MX).
    Fp4,
}

/// Block-wise scales of a [`QuantTensor`].
#[derive(Clone, Debug)]
pub enum Absmax {
    /// One f32 a block: `[blocks]`.
    Single(Tensor),
    /// The scales themselves quantized to 8 bits: `absmax[i] = code[codes[i]] * absmax2[i / block_size] + offset`.
    Double {
        /// u8 `[blocks]`.
        codes: Tensor,
        /// f32 `[ceil(blocks / block_size)]`.
        absmax2: Tensor,
        /// The dynamic map, f32 `[256]`.
        code: Tensor,
        /// Mean of the scales, subtracted before quantization.
        offset: f32,
        /// 256 unless a file says otherwise.
        block_size: usize,
    },
}

/// A matrix quantized to 4 bits.
#[derive(Clone, Debug)]
pub struct QuantTensor {
    /// u8 `[ceil(N·K / 2)]`: flat row-major elements, the even one in the high nibble.
    pub packed: Tensor,
    /// Scales of the blocks.
    pub absmax: Absmax,
    /// Code book.
    pub quant_type: QuantType,
    /// Elements in a block: a power of two, 32 to 4096.
    pub block_size: usize,
    /// `[N, K]` (rows are outputs).
    pub shape: Vec<usize>,
    /// Type that dequantized values are rounded to.
    pub dtype: DType,
}
