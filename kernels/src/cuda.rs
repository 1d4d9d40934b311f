//! What the CUDA sides of the operations share.

use crate::linear;
use nibble_runtime::{DType, Error, Result, cuda::Module};

/// Every module of kernels, in the order of their names: one `.cu` file each, built to `kernels/ptx/<name>.ptx`.
pub static MODULES: &[&Module] = &[&linear::DECODE, &linear::LORA, &linear::SIMT, &linear::WEIGHT_GRAD];

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
