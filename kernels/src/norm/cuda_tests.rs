//! The global norm on the GPU against the CPU.

use super::*;
use crate::testing::{gpu, random_as};
use nibble_runtime::DType;
use proptest::prelude::*;

proptest! {
    #![proptest_config(crate::testing::cases(16))]

    #[test]
    fn gpu_norms_are_those_of_the_cpu(
        sizes in prop::collection::vec((1usize..70_000, 0usize..3, 0usize..5), 1..9), max_norm in 0.0f64..200.0,
        loss_scale in 1f32..1000.0,
    ) {
        let Some(device) = gpu() else { return Ok(()) };
        let make = |device: Device| {
            let grads: Vec<Tensor> = sizes
                .iter()
                .map(|&(size, kind, start)| {
                    let dtype = [DType::F32, DType::F16, DType::BF16][kind];
                    // A view that starts anywhere.
                    let whole = random_as(&[size + start], dtype, size as u64).to_device(device, Tag::Workspace).unwrap();
                    whole.rows(start, size).unwrap()
                })
                .collect();
            let clip = Clip::new(&grads.iter().collect::<Vec<_>>(), max_norm, loss_scale).unwrap();
            let state = clip.state.to_device(Device::Cpu, Tag::Workspace).unwrap();
            state.as_slice::<f32>().unwrap().to_vec()
        };
        let (found, expected) = (make(device), make(Device::Cpu));
        prop_assert_eq!(&found[2..], &expected[2..]);
        for (found, expected) in found.iter().zip(&expected).take(2) {
            prop_assert!((found - expected).abs() <= 1e-6 * expected, "{found} {expected}");
        }
    }
}

#[test]
fn gpu_norms_that_are_not_finite_are_seen() {
    for device in [Some(Device::Cpu), gpu()].into_iter().flatten() {
        for bad in [f32::NAN, f32::INFINITY] {
            let grad = Tensor::from_slice(&[1.0, bad, 2.0], &[3], Tag::Workspace).unwrap();
            let verdict =
                Clip::new(&[&grad.to_device(device, Tag::Workspace).unwrap()], 1.0, 1.0).unwrap().read().unwrap();
            assert!(!verdict.gradients_finite && verdict.parameters_finite, "{device} {bad}");
        }
    }
}
