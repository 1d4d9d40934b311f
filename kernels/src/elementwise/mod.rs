//! Element-wise sums.

pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;

use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};
use rayon::prelude::*;

/// Elements that one task takes.
const CHUNK: usize = 1 << 15;

/// `into += x`, computed in f32 and rounded to the type of `into`.
///
/// # Errors
/// The shapes differ, or the storage of `into` is shared.
pub fn add_assign(into: &mut Tensor, x: &Tensor) -> Result<()> {
    if into.shape() != x.shape() {
        return Err(Error::shape("add", format!("{:?} += {:?}", into.shape(), x.shape())));
    }
    match into.device() {
        Device::Cpu if into.dtype() == DType::F32 => {
            let xs = x.to_f32()?;
            into.as_mut_slice::<f32>()?.par_chunks_mut(CHUNK).zip(xs.par_chunks(CHUNK)).for_each(|(into, x)| {
                into.iter_mut().zip(x).for_each(|(into, &x)| *into += x);
            });
            Ok(())
        }
        Device::Cpu => {
            let mut sum = into.cast(DType::F32, Tag::Workspace)?;
            add_assign(&mut sum, x)?;
            *into = sum.cast(into.dtype(), Tag::Workspace)?;
            Ok(())
        }
        Device::Cuda(_) => cuda::add_assign(into, x),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, random, wide};

    #[test]
    fn adds_in_every_float_type() {
        let (a, b) = (random(&[3, CHUNK], 1), random(&[3, CHUNK], 2));
        let expected: Vec<f64> = wide(&a).iter().zip(wide(&b)).map(|(a, b)| a + b).collect();
        for (dtype, tolerance) in [(DType::F32, 1e-7), (DType::F16, 1e-3), (DType::BF16, 8e-3)] {
            let mut sum = a.cast(dtype, Tag::Workspace).unwrap();
            add_assign(&mut sum, &b).unwrap();
            assert_eq!(sum.dtype(), dtype);
            close(&sum, &expected, tolerance);
        }
        assert!(add_assign(&mut random(&[2, 3], 1), &random(&[3, 2], 1)).is_err());
    }
}
