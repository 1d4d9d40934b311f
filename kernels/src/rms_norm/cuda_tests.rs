//! RMSNorm on the GPU against that on the CPU.

use super::*;
use crate::testing::{FLOATS, gpu, random_as, same};
use proptest::prelude::*;

const EPS: f32 = 1e-5;

/// Forward, apply and backward with gradients of the weight, on both devices. `first` rows are cut off, so that rows
/// may start at odd addresses.
fn check_against_cpu(gpu: Device, rows: usize, width: usize, first: usize, dtype: DType, weight: DType, seed: u64) {
    let host = |seed| random_as(&[first + rows, width], dtype, seed).rows(first, rows).unwrap();
    let device = |seed| {
        let all = random_as(&[first + rows, width], dtype, seed);
        all.to_device(gpu, Tag::Workspace).unwrap().rows(first, rows).unwrap()
    };
    let w = random_as(&[width], weight, seed ^ 1);
    let on_gpu = w.to_device(gpu, Tag::Workspace).unwrap();
    let tolerance = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
    let what = format!("[{rows}, {width}] from row {first} in {dtype}, weight in {weight}");
    println!("{what}");

    let (y, rstd) = forward(&host(seed), &w, EPS).unwrap();
    let (found, found_rstd) = forward(&device(seed), &on_gpu, EPS).unwrap();
    same(&found_rstd, &rstd, 5e-6);
    same(&found, &y, tolerance);
    let again = apply(&device(seed), &on_gpu, &found_rstd).unwrap();
    let bytes = |x: &Tensor| x.to_device(Device::Cpu, Tag::Workspace).unwrap().bytes().unwrap().to_vec();
    assert!(bytes(&again) == bytes(&found), "apply differs from forward: {what}");

    let (mut dx, mut found) = (host(seed ^ 3), device(seed ^ 3));
    let dw = backward_add(&host(seed), &w, &rstd, &host(seed ^ 2), &mut dx, true).unwrap().unwrap();
    let mut add =
        |want| backward_add(&device(seed), &on_gpu, &found_rstd, &device(seed ^ 2), &mut found, want).unwrap();
    let found_dw = add(true).unwrap();
    same(&found, &dx, tolerance);
    same(&found_dw, &dw, 1e-5);
    // And the output in the gradient's place: the same bits as by two passes.
    let mut both = device(seed ^ 3);
    let grad = device(seed ^ 2).copy(Tag::Workspace).unwrap();
    let (y, dw) = backward_and_apply(&device(seed), &on_gpu, &found_rstd, grad, &mut both, true).unwrap();
    assert!(bytes(&y) == bytes(&again) && bytes(&both) == bytes(&found), "{what}");
    assert!(bytes(&dw.unwrap()) == bytes(&found_dw), "{what}");
}

proptest! {
    #![proptest_config(crate::testing::cases(24))]

    #[test]
    fn gpu_matches_the_cpu(
        rows in 1usize..70, width in 1usize..2500, first in 0usize..2, dtype in 0usize..3, weight in 0usize..3, seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        check_against_cpu(gpu, rows, width, first, FLOATS[dtype], FLOATS[weight], seed);
    }

    /// Widths of whole runs, which take the fast path.
    #[test]
    fn gpu_matches_the_cpu_at_round_widths(
        rows in 1usize..70, runs in 1usize..300, dtype in 0usize..3, weight in 0usize..3, seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        check_against_cpu(gpu, rows, 8 * runs, 0, FLOATS[dtype], FLOATS[weight], seed);
    }
}

/// More rows than blocks, rows that fill their threads exactly or by one run more, and rows too wide to be held.
#[test]
fn gpu_matches_the_cpu_at_the_limits() {
    let Some(gpu) = gpu() else { return };
    for dtype in FLOATS {
        for (rows, width) in [(1, 8192), (3, 8200), (2, 16_384), (2, 16_392), (1, 20_001), (9000, 8), (3000, 520)] {
            check_against_cpu(gpu, rows, width, 0, dtype, dtype, 7);
        }
    }
}

#[test]
fn gpu_takes_no_rows() {
    let Some(gpu) = gpu() else { return };
    let empty = || Tensor::empty(&[0, 24], DType::BF16, gpu, Tag::Workspace).unwrap();
    let weight = Tensor::zeros(&[24], DType::F32, gpu, Tag::Workspace).unwrap();
    let (y, rstd) = forward(&empty(), &weight, EPS).unwrap();
    assert_eq!((y.shape(), rstd.shape()), (&[0, 24][..], &[0][..]));
    let dw = backward_add(&empty(), &weight, &rstd, &empty(), &mut empty(), true).unwrap().unwrap();
    same(&dw, &weight, 0.0);
}

#[test]
fn gpu_gives_the_same_bits_each_time() {
    let Some(gpu) = gpu() else { return };
    let make = |seed| random_as(&[1000, 200], DType::BF16, seed).to_device(gpu, Tag::Workspace).unwrap();
    let weight = random_as(&[200], DType::F32, 5).to_device(gpu, Tag::Workspace).unwrap();
    let run = || {
        let (_, rstd) = forward(&make(1), &weight, EPS).unwrap();
        let mut dx = make(2);
        let dw = backward_add(&make(1), &weight, &rstd, &make(3), &mut dx, true).unwrap().unwrap();
        [dx, dw].map(|x| x.to_device(Device::Cpu, Tag::Workspace).unwrap().bytes().unwrap().to_vec())
    };
    assert!(run() == run());
}
