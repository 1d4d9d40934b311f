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

/// Many tensors at once, some of them empty, some at odd addresses: the same bits as one by one.
#[test]
fn gpu_casts_many_to_the_same_bits() {
    let Some(gpu) = gpu() else { return };
    let sizes =
        [5, 4096, 0, 12_345, 1, 8192, 100_000, 3, 4096, 4097, 0, 77, 16, 9000, 31, 50_001, 2, 64, 8191, 1, 300, 12];
    let (f32, f16, bf16) = (DType::F32, DType::F16, DType::BF16);
    for (from, to) in [(f32, bf16), (f32, f16), (bf16, f32), (f32, f32)] {
        let host: Vec<Tensor> = sizes.iter().zip(1..).map(|(&n, seed)| random_as(&[n + 1], from, seed)).collect();
        let moved = |x: &Tensor, first| x.to_device(gpu, Tag::Workspace).unwrap().rows(first, x.numel() - 1).unwrap();
        let on_gpu: Vec<Tensor> = host.iter().zip(0..).map(|(x, i)| moved(x, i % 2)).collect();
        let all: Vec<&Tensor> = on_gpu.iter().collect();
        let mut into: Vec<Tensor> =
            host.iter().zip(1..).map(|(x, i)| moved(&x.cast(to, Tag::Workspace).unwrap(), i % 2)).collect();
        cast_into(&all, &mut into).unwrap();
        let found = into_dtypes(&all, to, Tag::Workspace).unwrap();
        assert_eq!(found.len(), sizes.len());
        for ((found, into), x) in found.iter().zip(&into).zip(&on_gpu) {
            assert_eq!((found.dtype(), found.shape()), (to, x.shape()));
            let expected = bits(&cast(x, to, Tag::Workspace).unwrap());
            assert!(bits(found) == expected && bits(into) == expected);
        }
        assert!(cast_into(&all[1..], &mut into[..all.len() - 1]).is_err(), "sizes that do not fit");
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
