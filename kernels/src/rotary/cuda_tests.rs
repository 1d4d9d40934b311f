//! The rotary embedding on the GPU against that on the CPU.

use super::*;
use crate::testing::{FLOATS, gpu, random_as, same};
use proptest::prelude::*;

const PLAIN: RopeConfig = RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default };

proptest! {
    #![proptest_config(crate::testing::cases(48))]

    /// Odd head dimensions' halves and whole runs, numbers of heads that leave a thread's group short, both directions,
    /// and views at odd addresses.
    #[test]
    fn gpu_matches_the_cpu(
        tokens in 0usize..70, heads in 1usize..10, half in prop_oneof![1usize..40, Just(32), Just(48), Just(64)],
        others in 0usize..6, first in 0usize..2, dtype in 0usize..3, back: bool, shared: bool, seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let (dtype, shape) = (FLOATS[dtype], [first + tokens, heads * 2 * half]);
        let direction = if back { Direction::Backward } else { Direction::Forward };
        let table = PLAIN.table(2 * half, 100).unwrap();
        let at: Vec<i32> = (0..tokens as i32).map(|i| (i * 37 + 99) % 100).collect();
        let at = Tensor::from_slice(&at, &[tokens], Tag::Workspace).unwrap();
        let host = random_as(&shape, dtype, seed).rows(first, tokens).unwrap();
        let x = random_as(&shape, dtype, seed).to_device(gpu, Tag::Workspace).unwrap().rows(first, tokens).unwrap();
        let seen = shared.then(|| x.clone());
        let (on_gpu, positions) = (table.to_device(gpu).unwrap(), at.to_device(gpu, Tag::Workspace).unwrap());
        let found = apply(x, &positions, &on_gpu, direction).unwrap();
        let expected = apply(host.clone(), &at, &table, direction).unwrap();
        same(&found, &expected, if dtype == DType::F32 { 1e-6 } else { 1e-2 });
        if let Some(seen) = seen {
            same(&seen, &host, 0.0);
        }
        // With another of the same tokens: the same bits.
        let make = |heads: usize| {
            let x = random_as(&[first + tokens, heads * 2 * half], dtype, seed);
            x.to_device(gpu, Tag::Workspace).unwrap().rows(first, tokens).unwrap()
        };
        let both = apply_both([make(heads), make(others)], &positions, &on_gpu, direction).unwrap();
        same(&both[0], &found, 0.0);
        same(&both[1], &apply(make(others), &positions, &on_gpu, direction).unwrap(), 0.0);
    }
}

/// Positions that the host let slip stay inside of the table.
#[test]
fn gpu_takes_positions_outside_for_the_nearest() {
    let Some(gpu) = gpu() else { return };
    let turn = |positions: [i32; 3]| {
        let positions = Tensor::from_slice(&positions, &[3], Tag::Workspace).unwrap();
        let table = PLAIN.table(16, 8).unwrap().to_device(gpu).unwrap();
        let x = random_as(&[3, 32], DType::F32, 1).to_device(gpu, Tag::Workspace).unwrap();
        apply(x, &positions.to_device(gpu, Tag::Workspace).unwrap(), &table, Direction::Forward).unwrap()
    };
    same(&turn([-5, 8, i32::MAX]), &turn([0, 7, 7]), 0.0);
}
