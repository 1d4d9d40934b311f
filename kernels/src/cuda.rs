//! What the CUDA sides of the operations share.

use nibble_runtime::{
    DType, Error, Result, Tensor,
    cuda::{Chip, Entry, Module},
};
use std::{
    fmt,
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
};

/// Every module of kernels, in the order of their names: one `.cu` file each, built to `kernels/ptx/<name>.ptx`.
/// Those named `_sm90a` load on Hopper only.
pub static MODULES: &[&Module] = &[
    &crate::adamw::cuda::MODULE,
    &crate::argmax::cuda::MODULE,
    &crate::attention::cuda::D128,
    &crate::attention::cuda::D64,
    &crate::attention::cuda::D96,
    &crate::attention::hopper::D128,
    &crate::attention::cuda::SIMPLE,
    &crate::cast::cuda::MODULE,
    &crate::linear::CODES_HOPPER,
    &nibble_runtime::cuda::COPY,
    &crate::cross_entropy::cuda::MODULE,
    &crate::cross_entropy::cuda::HOPPER,
    &crate::linear::DECODE,
    &crate::decoding::ATTENTION,
    &crate::decoding::LINEAR,
    &crate::decoding::LINEAR_HOPPER,
    &crate::decoding::RING_HOPPER,
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

/// Which kernels a GPU gets, where there are several for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Target {
    /// Those made for its architecture, and those of sm_80 for all else.
    #[default]
    Native,
    /// Those of sm_80 alone, which every GPU that is supported has.
    Sm80,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Target::Native => "native",
            Target::Sm80 => "sm_80",
        })
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = [Target::Native, Target::Sm80].into_iter().find(|target| target.to_string() == text);
        found.ok_or_else(|| format!("unknown target {text:?}; expected native or sm_80"))
    }
}

static ONLY_SM_80: AtomicBool = AtomicBool::new(false);

/// From here on, which kernels the process gives to its GPU.
pub fn set_target(target: Target) {
    ONLY_SM_80.store(target == Target::Sm80, Ordering::Relaxed);
}

/// Which kernels the process gives to its GPU.
pub fn target() -> Target {
    if ONLY_SM_80.load(Ordering::Relaxed) { Target::Sm80 } else { Target::Native }
}

/// Whether this kind of GPU is Hopper, and its own kernels are wanted.
pub(crate) fn hopper(chip: Chip) -> bool {
    chip.capability == (9, 0) && target() == Target::Native
}

/// A kernel that is one by this name, with the sizes of its parameters.
pub(crate) const fn one(name: &'static str, params: &'static [usize]) -> Entry {
    Entry { name, floats: false, params }
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

/// A size or number of blocks as kernels take it, and what they count in 32 bits. Elements of whole tensors they count in 64,
/// so that no product of sizes has to be one, unless it says so.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_that_kernels_count() {
        assert_eq!(size("test", i32::MAX as usize).unwrap(), (1 << 31) - 1);
        for above in [1 << 31, 1 << 32, (1 << 32) + 1, usize::MAX] {
            assert!(size("test", above).unwrap_err().to_string().contains(&above.to_string()));
        }
    }

    #[test]
    fn targets_have_names() {
        assert!([Target::Native, Target::Sm80].iter().all(|target| target.to_string().parse() == Ok(*target)));
        assert!("sm_90".parse::<Target>().unwrap_err().contains("sm_80"));
    }
}
