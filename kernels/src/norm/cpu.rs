//! CPU kernel of the sum of squares.

use super::PIECE;
use half::{bf16, f16};
use nibble_runtime::{DType, Error, Float, Result, Tensor};
use rayon::prelude::*;

/// Running sums in a piece, which the processor adds side by side.
const LANES: usize = 16;

/// See [`super::sum_of_squares`].
pub(super) fn sum_of_squares(x: &Tensor) -> Result<f64> {
    Ok(pieces(x)?.iter().sum())
}

/// The sum of squares of each piece of a tensor.
pub(super) fn pieces(x: &Tensor) -> Result<Vec<f64>> {
    Ok(match x.dtype() {
        DType::F32 => sums(x.as_slice::<f32>()?),
        DType::F16 => sums(x.as_slice::<f16>()?),
        DType::BF16 => sums(x.as_slice::<bf16>()?),
        found => return Err(Error::DType { op: "sum_of_squares", expected: "float".into(), found }),
    })
}

fn sums<T: Float>(values: &[T]) -> Vec<f64> {
    match values.len() {
        0..=PIECE => values.chunks(PIECE).map(sum_piece).collect(),
        _ => values.par_chunks(PIECE).map(sum_piece).collect(),
    }
}

fn sum_piece<T: Float>(values: &[T]) -> f64 {
    let square = |x: &T| f64::from(x.to_f32()).powi(2);
    let mut lanes = [0.0; LANES];
    let (rows, rest) = values.as_chunks::<LANES>();
    for row in rows {
        for (lane, x) in lanes.iter_mut().zip(row) {
            *lane += square(x);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(square).sum::<f64>()
}
