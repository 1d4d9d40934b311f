//! DoRA's operations against f64, and on the GPU against the CPU.

use super::*;
use crate::testing::{FLOATS, close, gpu, random, random_as, wide};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn matches_f64(rows in 1usize..70, n in 1usize..40, k in 1usize..40, seed: u64) {
        let (v, m) = (random(&[n, k], seed), random(&[n], seed ^ 1));
        let (z, dy) = (random(&[rows, n], seed ^ 2), random(&[rows, n], seed ^ 3));
        let (vs, ms, zs, dys) = (wide(&v), wide(&m), wide(&z), wide(&dy));
        let inverse: Vec<f64> = vs.chunks(k).map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt().recip()).collect();
        let found = inverse_norms(&v).unwrap();
        close(&found, &inverse, 1e-6);
        let g = gains(&m, &found).unwrap();
        let expected: Vec<f64> = ms.iter().zip(&inverse).map(|(m, i)| m * i).collect();
        close(&g, &expected, 1e-6);
        let y: Vec<f64> = zs.iter().enumerate().map(|(i, z)| z * expected[i % n]).collect();
        close(&scale(&z, &g, Tag::Workspace).unwrap(), &y, 1e-6);
        // dm is how much Σ y·dy changes with m.
        let dm: Vec<f64> = (0..n).map(|j| {
            (0..rows).map(|i| zs[i * n + j] * dys[i * n + j]).sum::<f64>() * inverse[j]
        }).collect();
        close(&magnitude_grad(&z, &dy, &found).unwrap(), &dm, 1e-5);
    }
}

proptest! {
    #![proptest_config(crate::testing::cases(24))]

    #[test]
    fn gpu_dora_is_that_of_the_cpu(rows in 1usize..300, n in 1usize..600, k in 1usize..600, kind in 0usize..3, seed: u64) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let (v, m) = (random(&[n, k], seed), random(&[n], seed ^ 1));
        let (z, dy) = (random_as(&[rows, n], FLOATS[kind], seed ^ 2), random_as(&[rows, n], FLOATS[kind], seed ^ 3));
        let on = |tensor: &Tensor| tensor.to_device(gpu, Tag::Workspace).unwrap();
        let run = |v: &Tensor, m: &Tensor, z: &Tensor, dy: &Tensor| {
            let inverse = inverse_norms(v).unwrap();
            let g = gains(m, &inverse).unwrap();
            let (y, dm) = (scale(z, &g, Tag::Workspace).unwrap(), magnitude_grad(z, dy, &inverse).unwrap());
            [inverse, g, y, dm].map(|tensor| tensor.into_device(Device::Cpu, Tag::Workspace).unwrap())
        };
        let found = run(&on(&v), &on(&m), &on(&z), &on(&dy));
        let expected = run(&v, &m, &z, &dy);
        let rounding = [1e-5, 1e-3, 8e-3][kind];
        for ((found, expected), tolerance) in found.iter().zip(&expected).zip([1e-5, 1e-5, rounding, 1e-5]) {
            close(found, &wide(expected), tolerance);
        }
    }
}

#[test]
fn misfits_are_refused() {
    let (v, m) = (random(&[3, 4], 1), random(&[4], 2));
    let inverse = inverse_norms(&v).unwrap();
    assert!(gains(&m, &inverse).is_err());
    assert!(scale(&random(&[2, 4], 3), &inverse, Tag::Workspace).is_err());
    assert!(magnitude_grad(&random(&[2, 3], 3), &random(&[1, 3], 4), &inverse).is_err());
}
