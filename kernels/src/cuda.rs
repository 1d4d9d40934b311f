//! What the CUDA sides of the operations share.

use nibble_runtime::{
    DType, Error, Result, Tensor,
    cuda::{Chip, Module},
};
use std::sync::LazyLock;

/// Every module of kernels, in the order of their names: one `.cu` file each, built to `kernels/ptx/<name>.ptx`.
/// Those named `_sm90a` load on Hopper only.
pub static MODULES: &[&Module] = &[
    &crate::adamw::cuda::MODULE,
    &crate::attention::cuda::D128,
    &crate::attention::cuda::D64,
    &crate::attention::cuda::D96,
    &crate::attention::hopper::D128,
    &crate::attention::cuda::SIMPLE,
    &crate::cast::cuda::MODULE,
    &nibble_runtime::cuda::COPY,
    &crate::cross_entropy::cuda::MODULE,
    &crate::linear::DECODE,
    &crate::quantize::cuda::DEQUANTIZE,
    &crate::dropout::cuda::MODULE,
    &crate::elementwise::cuda::MODULE,
    &crate::embedding::cuda::MODULE,
    &crate::linear::GEMM_DENSE_BF16,
    &crate::linear::GEMM_DENSE_F16,
    &crate::linear::GEMM_GENERAL,
    &crate::linear::GEMM_HOPPER,
    &crate::linear::GEMM_QUANT_BF16,
    &crate::linear::GEMM_QUANT_F16,
    &crate::linear::LORA,
    &crate::mixed::cuda::MODULE,
    &crate::linear::NARROW_HOPPER,
    &crate::norm::cuda::MODULE,
    &crate::quantize::cuda::QUANTIZE,
    &crate::random::cuda::MODULE,
    &crate::rms_norm::cuda::MODULE,
    &crate::rotary::cuda::MODULE,
    &crate::linear::SIMT,
    &crate::swiglu::cuda::MODULE,
    &crate::table::cuda::MODULE,
    &crate::linear::WEIGHT_GRAD,
];

/// Whether this kind of GPU is Hopper, and its kernels are wanted: `NIBBLE_HOPPER=0` turns them off, for measurements.
pub(crate) fn hopper(chip: Chip) -> bool {
    static WANTED: LazyLock<bool> =
        LazyLock::new(|| std::env::var_os("NIBBLE_HOPPER").is_none_or(|value| value != "0"));
    chip.capability == (9, 0) && *WANTED
}

/// The name of a kernel for `dtype`: `swiglu_forward_bf16`.
///
/// # Errors
/// There are no kernels for that type.
pub(crate) fn entry(name: &str, dtype: DType) -> Result<String> {
    match dtype.is_float() {
        true => Ok(format!("{name}_{dtype}")),
        false => Err(Error::DType { op: "launch", expected: "float".into(), found: dtype }),
    }
}

/// A size or number of blocks as kernels take it.
///
/// # Errors
/// It is 2³¹ or more, which no grid is.
pub(crate) fn size(op: &'static str, n: usize) -> Result<u32> {
    let fits = i32::try_from(n).ok();
    fits.map(i32::unsigned_abs).ok_or_else(|| Error::shape(op, format!("{n} is more than a GPU kernel takes")))
}

/// Checks that all tensors have one type.
pub(crate) fn check_dtype(op: &'static str, dtype: DType, tensors: &[&Tensor]) -> Result<()> {
    match tensors.iter().find(|tensor| tensor.dtype() != dtype) {
        Some(tensor) => Err(Error::DType { op, expected: dtype.to_string(), found: tensor.dtype() }),
        None => Ok(()),
    }
}
