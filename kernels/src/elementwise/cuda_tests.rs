//! Sums on the GPU against those on the CPU.

use super::*;
use crate::testing::{FLOATS, gpu, random_as, same};
use proptest::prelude::*;

proptest! {
    #![proptest_config(crate::testing::cases(24))]

    /// Every pair of types, any length, and terms that start at odd elements. Both sides add in f32 and round once.
    #[test]
    fn gpu_adds_as_the_cpu(n in 1usize..9000, first in 0usize..9, to in 0usize..3, from in 0usize..3, seed: u64) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let mut sum = random_as(&[n], FLOATS[to], seed);
        let x = random_as(&[first + n], FLOATS[from], seed ^ 1);
        let mut on_gpu = sum.to_device(gpu, Tag::Workspace).unwrap();
        let term = x.to_device(gpu, Tag::Workspace).unwrap().rows(first, n).unwrap();
        add_assign(&mut on_gpu, &term).unwrap();
        add_assign(&mut sum, &x.rows(first, n).unwrap()).unwrap();
        same(&on_gpu, &sum, 0.0);
    }
}

#[test]
fn gpu_adds_nothing_and_refuses_shared_storage() {
    let Some(gpu) = gpu() else { return };
    let mut empty = Tensor::empty(&[0], DType::F32, gpu, Tag::Workspace).unwrap();
    let other = Tensor::empty(&[0], DType::F32, gpu, Tag::Workspace).unwrap();
    add_assign(&mut empty, &other).unwrap();
    let mut sum = Tensor::zeros(&[4], DType::F32, gpu, Tag::Workspace).unwrap();
    let seen = sum.clone();
    assert!(matches!(add_assign(&mut sum, &seen), Err(Error::Shared { .. })));
}
