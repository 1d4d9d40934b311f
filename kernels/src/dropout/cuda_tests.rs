//! Dropout on the GPU against that on the CPU: the same mask and the same values.

use super::*;
use crate::testing::{FLOATS, gpu, random_as, same};
use proptest::prelude::*;

proptest! {
    #![proptest_config(crate::testing::cases(24))]

    /// Any length (the last block of words is cut), and views whose first element is at an odd address.
    #[test]
    fn gpu_drops_the_same_elements(
        n in 1usize..9000, first in 0usize..9, dtype in 0usize..3, probability in 0f32..0.99, seed: u64, step: u32,
        layer in 0u32..65_536,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let mask = Mask { probability, seed, step, layer };
        let x = random_as(&[first + n], FLOATS[dtype], seed);
        let on_gpu = x.to_device(gpu, Tag::Workspace).unwrap().rows(first, n).unwrap();
        let expected = apply(&x.rows(first, n).unwrap(), mask).unwrap();
        same(&apply(&on_gpu, mask).unwrap(), &expected, 0.0);
    }
}

#[test]
fn gpu_drops_from_nothing() {
    let Some(gpu) = gpu() else { return };
    let empty = Tensor::empty(&[0, 3], DType::BF16, gpu, Tag::Workspace).unwrap();
    let mask = Mask { probability: 0.5, seed: 1, step: 2, layer: 3 };
    assert_eq!(apply(&empty, mask).unwrap().shape(), [0, 3]);
}
