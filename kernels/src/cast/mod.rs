//! Conversion between float types, rounded to nearest even.

pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;

use nibble_runtime::{DType, Device, Result, Tag, Tensor};

/// A copy of `x` in another float type, counted under `tag`.
///
/// # Errors
/// Either type is not a float.
pub fn cast(x: &Tensor, dtype: DType, tag: Tag) -> Result<Tensor> {
    match x.device() {
        Device::Cpu => x.cast(dtype, tag),
        Device::Cuda(_) => cuda::cast(x, dtype, tag),
    }
}

/// `x` in `dtype`: itself if it has that type, a [`cast`] otherwise.
pub fn into_dtype(x: Tensor, dtype: DType, tag: Tag) -> Result<Tensor> {
    if x.dtype() == dtype { Ok(x) } else { cast(&x, dtype, tag) }
}

/// [`into_dtype`] of tensors on one device; on a GPU those of one type are converted together.
///
/// # Errors
/// A type is not a float.
pub fn into_dtypes(tensors: &[&Tensor], dtype: DType, tag: Tag) -> Result<Vec<Tensor>> {
    match tensors.first() {
        Some(first)
            if first.device() != Device::Cpu
                && first.dtype() != dtype
                && tensors.iter().all(|x| x.dtype() == first.dtype() && x.device() == first.device()) =>
        {
            cuda::cast_all(tensors, dtype, tag)
        }
        _ => tensors.iter().map(|x| into_dtype((*x).clone(), dtype, tag)).collect(),
    }
}
