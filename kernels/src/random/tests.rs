use super::*;
use crate::testing::{gpu, same};

#[test]
fn has_the_moments_and_differs_by_seed_and_number() {
    let make = |seed, number| normal(&[100, 301], DType::F32, Device::Cpu, 0.5, seed, number, Tag::Workspace).unwrap();
    let values = make(3, 1);
    let values = values.as_slice::<f32>().unwrap();
    let n = values.len() as f64;
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let variance = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n;
    assert!(mean.abs() < 0.01 && (variance - 0.25).abs() < 0.01, "{mean} {variance}");
    for other in [make(3, 2), make(4, 1)] {
        assert_ne!(other.as_slice::<f32>().unwrap(), values);
    }
}

#[test]
fn gpu_random_numbers_are_those_of_the_cpu() {
    let Some(device) = gpu() else { return };
    for shape in [[1, 1], [7, 33], [64, 1024]] {
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 1e-3), (DType::BF16, 1e-3)] {
            let make = |device| normal(&shape, dtype, device, 0.02, 9, 5, Tag::Workspace).unwrap();
            same(&make(device), &make(Device::Cpu), tolerance);
        }
    }
}
