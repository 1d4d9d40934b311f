//! The largest element of each row, and of equals the first: the most likely token. A NaN is larger than nothing, but at the
//! start of a row nothing is larger than it.

pub(crate) mod cuda;

use nibble_runtime::{DType, Device, Error, Result, Tensor};

/// Where the largest of `row` is; 0 of an empty one.
pub fn of(row: &[f32]) -> u32 {
    let largest = (0..row.len()).reduce(|a, b| if row[b] > row[a] { b } else { a });
    largest.unwrap_or(0) as u32
}

/// Where the largest of each row of `x` is, f32 `[T, V]`. On a GPU its stream is waited for.
///
/// # Errors
/// `x` is of another type, or the device has failed.
pub fn rows(x: &Tensor) -> Result<Vec<u32>> {
    let (rows, width) = x.dims2("argmax")?;
    if x.dtype() != DType::F32 {
        return Err(Error::DType { op: "argmax", expected: DType::F32.to_string(), found: x.dtype() });
    }
    if rows == 0 || width == 0 {
        return Ok(vec![0; rows]);
    }
    match x.device() {
        Device::Cpu => Ok(x.as_slice::<f32>()?.chunks(width).map(of).collect()),
        Device::Cuda(_) => cuda::rows(x),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::gpu;
    use nibble_runtime::Tag;
    use proptest::prelude::*;

    #[test]
    fn the_first_of_equals() {
        assert_eq!(of(&[]), 0);
        assert_eq!(of(&[1.0, 3.0, 3.0, f32::NAN, 2.0]), 1);
        assert_eq!(of(&[f32::NAN, 3.0]), 0);
        assert_eq!(of(&[f32::NEG_INFINITY; 3]), 0);
    }

    proptest! {
        #![proptest_config(crate::testing::cases(48))]

        #[test]
        fn gpu_finds_what_the_cpu_finds(rows in 1usize..6, width in 1usize..5000, kinds in 1u32..7, seed: u64) {
            let Some(gpu) = gpu() else { return Ok(()) };
            // Few kinds of values, so that the largest is there more than once; some of them odd.
            let kind = [0.5, f32::NEG_INFINITY, -2.0, f32::NAN, 7.5, f32::INFINITY];
            let rng = nibble_runtime::rng::Philox::new(seed, nibble_runtime::rng::Stream { purpose: 99, step: 0, layer: 0 });
            let values: Vec<f32> = (0..(rows * width) as u64).map(|i| kind[rng.below(i, kinds.min(6)) as usize]).collect();
            let x = Tensor::from_slice(&values, &[rows, width], Tag::Workspace).unwrap();
            let found = super::rows(&x.to_device(gpu, Tag::Workspace).unwrap()).unwrap();
            prop_assert_eq!(found, super::rows(&x).unwrap());
        }
    }
}
