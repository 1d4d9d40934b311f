//! CPU kernel of the sum of squares.

use half::{bf16, f16};
use nibble_runtime::{DType, Error, Float, Result, Tensor};
use rayon::prelude::*;

/// Elements summed by one task: fixed, so that the order of additions does not depend on the number of threads.
const PIECE: usize = 1 << 14;

/// Running sums in a piece, which the processor adds side by side.
const LANES: usize = 16;

/// See [`super::sum_of_squares`].
pub(super) fn sum_of_squares(x: &Tensor) -> Result<f64> {
    Ok(match x.dtype() {
        DType::F32 => sum(x.as_slice::<f32>()?),
        DType::F16 => sum(x.as_slice::<f16>()?),
        DType::BF16 => sum(x.as_slice::<bf16>()?),
        found => return Err(Error::DType { op: "sum_of_squares", expected: "float".into(), found }),
    })
}

fn sum<T: Float>(values: &[T]) -> f64 {
    if values.len() <= PIECE {
        return sum_piece(values);
    }
    let pieces: Vec<f64> = values.par_chunks(PIECE).map(sum_piece).collect();
    pieces.iter().sum()
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
