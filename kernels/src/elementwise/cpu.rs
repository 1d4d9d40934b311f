//! CPU kernels of element-wise sums.

use half::{bf16, f16};
use nibble_runtime::{DType, Error, Float, Result, Tensor};
use rayon::prelude::*;

/// Elements that a task handles at a time.
const PIECE: usize = 1 << 15;

/// See [`super::add_assign`]; the shapes have been checked.
pub(super) fn add_assign(into: &mut Tensor, x: &Tensor) -> Result<()> {
    match into.dtype() {
        DType::F32 => add_to::<f32>(into, x),
        DType::F16 => add_to::<f16>(into, x),
        DType::BF16 => add_to::<bf16>(into, x),
        found => Err(Error::DType { op: "add_assign", expected: "float".into(), found }),
    }
}

fn add_to<T: Float>(into: &mut Tensor, x: &Tensor) -> Result<()> {
    match x.dtype() {
        DType::F32 => add(into.as_mut_slice::<T>()?, x.as_slice::<f32>()?),
        DType::F16 => add(into.as_mut_slice::<T>()?, x.as_slice::<f16>()?),
        DType::BF16 => add(into.as_mut_slice::<T>()?, x.as_slice::<bf16>()?),
        found => return Err(Error::DType { op: "add_assign", expected: "float".into(), found }),
    }
    Ok(())
}

fn add<T: Float, X: Float>(into: &mut [T], x: &[X]) {
    let piece = |(into, x): (&mut [T], &[X])| {
        for (into, x) in into.iter_mut().zip(x) {
            *into = T::from_f32(into.to_f32() + x.to_f32());
        }
    };
    if into.len() < 2 * PIECE {
        piece((into, x));
    } else {
        into.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(piece);
    }
}
