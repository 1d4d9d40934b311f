//! What the tests of several operations share.

use nibble_runtime::{
    DType, Device, Tag, Tensor, cuda,
    rng::{Philox, Stream},
};
use std::sync::Once;

/// The types that kernels come in.
pub(crate) const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// The GPU to test on, with its fresh memory poisoned; `None`, saying so, where there is none.
///
/// # Panics
/// There is none and the environment says `NIBBLE_REQUIRE_CUDA=1`.
pub(crate) fn gpu() -> Option<Device> {
    static ONE_PIECE: Once = Once::new();
    cuda::poison(true);
    let gpu = cuda::device_for_tests()?;
    // From here on memory comes out of one piece. Addresses of pieces follow one another, but memcheck does not know that
    // and reports a bulk copy into two of them.
    ONE_PIECE.call_once(|| drop(Tensor::empty(&[512 << 20], DType::U8, gpu, Tag::Workspace).unwrap()));
    Some(gpu)
}

/// So many cases of a property, or as many as `PROPTEST_CASES` says: few under a checker that makes kernels slow.
pub(crate) fn cases(usual: u32) -> proptest::test_runner::Config {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(usual);
    proptest::test_runner::Config { cases, ..Default::default() }
}

/// As [`close`], against another tensor of the same type and shape on any device, which must hold numbers.
#[track_caller]
pub(crate) fn same(found: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!((found.shape(), found.dtype()), (expected.shape(), expected.dtype()));
    let host = |tensor: &Tensor| tensor.to_device(Device::Cpu, Tag::Workspace).unwrap();
    close(&host(found), &wide(&host(expected)), tolerance);
}

/// A tensor of standard normals, rounded to `dtype`.
pub(crate) fn random_as(shape: &[usize], dtype: DType, seed: u64) -> Tensor {
    random(shape, seed).into_dtype(dtype, Tag::Workspace).unwrap()
}

/// A f32 tensor of standard normals.
pub(crate) fn random(shape: &[usize], seed: u64) -> Tensor {
    let rng = Philox::new(seed, Stream { purpose: 99, step: 0, layer: 0 });
    let values: Vec<f32> = (0..shape.iter().product::<usize>() as u64).map(|i| rng.normal(i)).collect();
    Tensor::from_slice(&values, shape, Tag::Workspace).unwrap()
}

/// Asserts ‖found − expected‖ ≤ tolerance · ‖expected‖.
#[track_caller]
pub(crate) fn close(found: &Tensor, expected: &[f64], tolerance: f64) {
    close_beyond(found, expected, tolerance, 1e-30);
}

/// Asserts ‖found − expected‖ ≤ tolerance · ‖expected‖ + rounding: where terms cancel, what their own rounding leaves.
#[track_caller]
pub(crate) fn close_beyond(found: &Tensor, expected: &[f64], tolerance: f64, rounding: f64) {
    let found = found.to_f32().unwrap();
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut found.iter().zip(expected).map(|(&f, e)| f64::from(f) - e));
    let scale = norm(&mut expected.iter().copied());
    assert!(error <= tolerance * scale + rounding, "relative error {:.3e} > {tolerance:.1e}", error / scale);
}

/// Central differences of `f` at `x` in f64: the gradient that a backward pass must give.
pub(crate) fn numeric_gradient(x: &[f64], mut f: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    let mut at = x.to_vec();
    (0..x.len())
        .map(|i| {
            let step = 1e-5 * x[i].abs().max(1.0);
            at[i] = x[i] + step;
            let above = f(&at);
            at[i] = x[i] - step;
            let below = f(&at);
            at[i] = x[i];
            (above - below) / (2.0 * step)
        })
        .collect()
}

/// The values of a tensor in f64.
pub(crate) fn wide(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f32().unwrap().iter().map(|&x| f64::from(x)).collect()
}
