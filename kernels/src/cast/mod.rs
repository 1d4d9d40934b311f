//! Conversion between float types, rounded to nearest even.

pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;

use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};

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

/// Writes tensors of one type and device into others of one type, each as large as its own: on a GPU many in one launch.
///
/// # Errors
/// Sizes, types or devices do not fit, a type is not a float, or something else refers to the storage of one of `into`.
pub fn cast_into(tensors: &[&Tensor], into: &mut [Tensor]) -> Result<()> {
    let op = "cast";
    let (Some(from), Some(to)) = (tensors.first(), into.first()) else { return Ok(()) };
    let alike = |x: &Tensor, first: &Tensor| (x.dtype(), x.device()) == (first.dtype(), first.device());
    let fit = |(x, y): (&&Tensor, &Tensor)| alike(x, from) && alike(y, to) && x.numel() == y.numel();
    if tensors.len() != into.len() || from.device() != to.device() || !tensors.iter().zip(into.iter()).all(fit) {
        return Err(Error::shape(op, format!("{tensors:?} into {into:?}")));
    }
    match from.device() {
        Device::Cpu => {
            let mut pairs = tensors.iter().zip(into);
            pairs.try_for_each(|(x, y)| y.copy_from(0, &into_dtype((*x).clone(), y.dtype(), Tag::Workspace)?))
        }
        Device::Cuda(_) => cuda::cast_into(tensors, into),
    }
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
