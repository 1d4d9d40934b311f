//! Conversions on the GPU against those on the CPU.

use super::*;
use crate::testing::{FLOATS, gpu, random_as};
use proptest::prelude::*;

fn bits(x: &Tensor) -> Vec<u8> {
    x.to_device(Device::Cpu, Tag::Workspace).unwrap().bytes().unwrap().to_vec()
}

proptest! {
    #![proptest_config(crate::testing::cases(24))]

    /// Every pair of types, any length, and views that start at odd elements: the same bits.
    #[test]
    fn gpu_casts_to_the_same_bits(n in 1usize..9000, first in 0usize..9, from in 0usize..3, to in 0usize..3, seed: u64) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let x = random_as(&[first + n], FLOATS[from], seed);
        let on_gpu = x.to_device(gpu, Tag::Workspace).unwrap().rows(first, n).unwrap();
        let found = cast(&on_gpu, FLOATS[to], Tag::Workspace).unwrap();
        let expected = cast(&x.rows(first, n).unwrap(), FLOATS[to], Tag::Workspace).unwrap();
        prop_assert_eq!((found.dtype(), found.shape()), (FLOATS[to], &[n][..]));
        prop_assert!(bits(&found) == bits(&expected));
    }
}

/// Ties, overflow to infinity, subnormals and signed zeros.
#[test]
fn gpu_casts_edges_to_the_same_bits() {
    let Some(gpu) = gpu() else { return };
    let mut values = vec![0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-45, 65_519.0];
    values.extend([65_520.0, -65_520.0, 6e-8, 2.98e-8, 2.99e-8, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]);
    values.extend((0..5000).map(|i| f32::from_bits(i * 0x0005_1C3B)).filter(|x| !x.is_nan()));
    let x = Tensor::from_slice(&values, &[values.len()], Tag::Workspace).unwrap();
    let on_gpu = x.to_device(gpu, Tag::Workspace).unwrap();
    for dtype in FLOATS {
        let (found, expected) =
            (cast(&on_gpu, dtype, Tag::Workspace).unwrap(), cast(&x, dtype, Tag::Workspace).unwrap());
        assert!(bits(&found) == bits(&expected), "to {dtype}");
        let back = cast(&found, DType::F32, Tag::Workspace).unwrap();
        assert!(bits(&back) == bits(&cast(&expected, DType::F32, Tag::Workspace).unwrap()), "from {dtype}");
    }
}

#[test]
fn gpu_casts_nothing_and_refuses_integers() {
    let Some(gpu) = gpu() else { return };
    let empty = Tensor::empty(&[0, 5], DType::F32, gpu, Tag::Workspace).unwrap();
    assert_eq!(cast(&empty, DType::BF16, Tag::Workspace).unwrap().shape(), [0, 5]);
    let whole = Tensor::zeros(&[3], DType::I32, gpu, Tag::Workspace).unwrap();
    assert!(cast(&whole, DType::F32, Tag::Workspace).is_err());
    assert!(cast(&empty, DType::I32, Tag::Workspace).is_err());
}
