//! Token embedding: row `ids[t]` of the table for each token.
//!
//! Backward: the gradient of a table row is the sum of the output gradients of the tokens that read it.
//!
//! Ids come from the host, where they are checked, whatever the device of the table.

pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;

use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};
use rayon::prelude::*;

/// Ids as table rows, checked against the size of the vocabulary.
pub(crate) fn indices(ids: &[i32], vocab: usize) -> Result<Vec<usize>> {
    let checked = |(position, &id): (usize, &i32)| {
        usize::try_from(id).ok().filter(|&id| id < vocab).ok_or_else(|| {
            let what = format!("token id {id} at position {position} is outside of the vocabulary of {vocab}");
            Error::invalid("embedding", what)
        })
    };
    ids.iter().enumerate().map(checked).collect()
}

/// Rows of `table` `[V, D]` for `ids` `[T]`: `[T, D]` in `dtype`.
///
/// # Errors
/// An id is negative or not below V.
pub fn forward(ids: &[i32], table: &Tensor, dtype: DType) -> Result<Tensor> {
    let (vocab, width) = table.dims2("embedding")?;
    let indices = indices(ids, vocab)?;
    match table.device() {
        Device::Cpu => {
            let mut out = Tensor::empty(&[indices.len(), width], DType::F32, Device::Cpu, Tag::Activations)?;
            let rows = out.as_mut_slice::<f32>()?.par_chunks_mut(width.max(1)).zip(indices);
            rows.try_for_each(|(row, index)| table.read_f32(index * width, row))?;
            out.into_dtype(dtype, Tag::Activations)
        }
        Device::Cuda(_) => cuda::gather(&cuda::upload(ids, table.device())?, table, dtype, Tag::Activations),
    }
}

/// Gradient of the table, f32 `[V, D]`, from that of the output `[T, D]`; tokens add up in their order.
pub fn backward(ids: &[i32], grad: &Tensor, vocab: usize) -> Result<Tensor> {
    let (tokens, width) = grad.dims2("embedding backward")?;
    if ids.len() != tokens {
        let what = format!("{} ids and gradient {:?} differ in length", ids.len(), grad.shape());
        return Err(Error::shape("embedding backward", what));
    }
    let indices = indices(ids, vocab)?;
    match grad.device() {
        Device::Cpu => {
            let grads = grad.to_f32()?;
            let mut table = Tensor::zeros(&[vocab, width], DType::F32, Device::Cpu, Tag::Gradients)?;
            let sums = table.as_mut_slice::<f32>()?;
            for (index, grad) in indices.into_iter().zip(grads.chunks_exact(width.max(1))) {
                sums[index * width..][..width].iter_mut().zip(grad).for_each(|(sum, &grad)| *sum += grad);
            }
            Ok(table)
        }
        Device::Cuda(_) => cuda::backward(ids, grad, vocab),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    #[test]
    fn gathers_and_scatters() {
        let table = random(&[5, 3], 1);
        let rows = table.as_slice::<f32>().unwrap();
        let out = forward(&[4, 0, 4], &table, DType::F32).unwrap();
        assert_eq!(out.as_slice::<f32>().unwrap(), [&rows[12..], &rows[..3], &rows[12..]].concat());
        let grad = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6., 7., 8., 9.], &[3, 3], Tag::Workspace).unwrap();
        let back = backward(&[4, 0, 4], &grad, 5).unwrap();
        let mut expected = [0f32; 15];
        expected[..3].copy_from_slice(&[4., 5., 6.]);
        expected[12..].copy_from_slice(&[8., 10., 12.]);
        assert_eq!(back.as_slice::<f32>().unwrap(), expected);
    }

    #[test]
    fn ids_outside_of_the_vocabulary_are_named() {
        for bad in [5, -1, i32::MAX] {
            let error = forward(&[1, bad], &random(&[5, 3], 1), DType::F32).unwrap_err().to_string();
            assert!(error.contains(&bad.to_string()) && error.contains("position 1"), "{error}");
        }
    }
}
