//! Sums of squares, for the global norm of gradients.

mod cpu;

use nibble_runtime::{Device, Error, Result, Tensor};

/// The sum of the squares of a float tensor's elements, accumulated in f64. The same bits for any number of threads.
///
/// # Errors
/// `x` does not hold floats.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    match x.device() {
        Device::Cpu => cpu::sum_of_squares(x),
        device => Err(Error::NoKernel { op: "sum_of_squares", device }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nibble_runtime::{DType, Tag};
    use proptest::prelude::*;

    #[test]
    fn integers_are_refused_and_nothing_sums_to_zero() {
        assert!(sum_of_squares(&Tensor::from_slice(&[1i32], &[1], Tag::Workspace).unwrap()).is_err());
        assert_eq!(sum_of_squares(&Tensor::from_slice::<f32>(&[], &[0], Tag::Workspace).unwrap()).unwrap(), 0.0);
    }

    #[test]
    fn squares_beyond_f32_do_not_overflow() {
        let x = Tensor::from_slice(&[1e30f32, -1e-30], &[2], Tag::Workspace).unwrap();
        assert!((sum_of_squares(&x).unwrap() / 1e60 - 1.0).abs() < 1e-6);
    }

    proptest! {
        #[test]
        fn is_exact_and_independent_of_the_number_of_threads(
            seed in prop::collection::vec(-1e3f32..1e3, 1..100), repeat in 1usize..700, half in any::<bool>(),
        ) {
            let values = seed.repeat(repeat);
            let dtype = if half { DType::BF16 } else { DType::F32 };
            let x = Tensor::from_slice(&values, &[values.len()], Tag::Workspace).unwrap();
            let x = x.into_dtype(dtype, Tag::Workspace).unwrap();
            let exact: f64 = x.to_f32().unwrap().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let sum = sum_of_squares(&x).unwrap();
            prop_assert!((sum - exact).abs() <= 1e-12 * exact);
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                prop_assert_eq!(pool.install(|| sum_of_squares(&x)).unwrap().to_bits(), sum.to_bits());
            }
        }
    }
}
