//! Gathered rows and their gradients on the GPU against those on the CPU.

use super::*;
use crate::testing::{FLOATS, gpu, random_as, same};
use proptest::prelude::*;

proptest! {
    #![proptest_config(crate::testing::cases(24))]

    /// Any shape and every pair of types; sums are in the same order, so both directions agree to the bit.
    #[test]
    fn gpu_matches_the_cpu(
        ids in prop::collection::vec(0i32..23, 0..70), width in prop_oneof![1usize..1100, (1usize..300).prop_map(|n| 8 * n)],
        from in 0usize..3, to in 0usize..3, seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let table = random_as(&[23, width], FLOATS[from], seed);
        let on_gpu = table.to_device(gpu, Tag::Workspace).unwrap();
        let out = forward(&ids, &table, FLOATS[to]).unwrap();
        same(&forward(&ids, &on_gpu, FLOATS[to]).unwrap(), &out, 0.0);
        let grad = random_as(&[ids.len(), width], FLOATS[to], seed ^ 1);
        let found = backward(&ids, &grad.to_device(gpu, Tag::Workspace).unwrap(), 23).unwrap();
        same(&found, &backward(&ids, &grad, 23).unwrap(), 0.0);
    }
}

#[test]
fn gpu_checks_ids_on_the_host() {
    let Some(gpu) = gpu() else { return };
    let table = Tensor::zeros(&[5, 3], DType::BF16, gpu, Tag::Workspace).unwrap();
    for bad in [5, -1, i32::MAX] {
        assert!(forward(&[0, bad], &table, DType::BF16).is_err());
        assert!(backward(&[0, bad, 1, 1, 1], &table, 5).is_err());
    }
    // What slips through all the same shows.
    let ids = cuda::upload(&[1, 5, -1], gpu).unwrap();
    let rows = cuda::gather(&ids, &table, DType::F32, Tag::Workspace).unwrap();
    let rows = rows.to_device(Device::Cpu, Tag::Workspace).unwrap();
    let nan: Vec<bool> = rows.as_slice::<f32>().unwrap().iter().map(|x| x.is_nan()).collect();
    assert_eq!(nan, [[false; 3], [true; 3], [true; 3]].concat());
}
