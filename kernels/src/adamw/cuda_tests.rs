//! AdamW on the GPU against the CPU: equal to the bit.

use super::*;
use crate::{
    norm::{Clip, Verdict},
    testing::{gpu, random},
};
use proptest::prelude::*;

/// Everything that steps on `device` leave behind, as bytes, and what their clips said. Step `i` has gradients of size
/// `scales[i]`.
fn run(device: Device, sizes: &[usize], eight: bool, dtype: DType, scales: &[f32]) -> (Vec<Vec<u8>>, Vec<Verdict>) {
    let at = |tensor: &Tensor| tensor.to_device(device, Tag::Workspace).unwrap();
    let zeros = |&size: &usize| Tensor::zeros(&[size], DType::F32, device, Tag::Optimizer).unwrap();
    let state = |&size: &usize| State8::zeros(size, device, Tag::Optimizer).unwrap();
    let mut params: Vec<Tensor> = sizes.iter().map(|&size| at(&random(&[size], size as u64))).collect();
    let mut previous: Vec<Tensor> = sizes.iter().map(zeros).collect();
    let mut wide: Vec<[Tensor; 2]> = sizes.iter().map(|size| [zeros(size), zeros(size)]).collect();
    let mut narrow: Vec<[State8; 2]> = sizes.iter().map(|size| [state(size), state(size)]).collect();
    let mut verdicts = Vec::new();
    for (step, &scale) in (1..).zip(scales) {
        let gradient = |&size: &usize| {
            let mut grad = random(&[size], (1000 * step + size) as u64);
            grad.as_mut_slice::<f32>().unwrap().iter_mut().for_each(|x| *x *= scale);
            at(&grad.into_dtype(dtype, Tag::Workspace).unwrap())
        };
        let grads: Vec<Tensor> = sizes.iter().map(gradient).collect();
        let mut clip = Clip::new(&grads.iter().collect::<Vec<_>>(), 0.0, 2.0).unwrap();
        let states = wide.iter_mut().zip(&mut narrow);
        let mut jobs: Vec<Job> = params
            .iter_mut()
            .zip(&grads)
            .zip(states)
            .zip(&mut previous)
            .enumerate()
            .map(|(i, (((param, grad), ([m, v], [m8, v8])), previous))| {
                let moments = if eight { MomentsMut::Bits8 { m: m8, v: v8 } } else { MomentsMut::F32 { m, v } };
                let previous = (i % 3 != 0).then_some(previous);
                let rate = [1.0, 16.0, 0.5][i % 3];
                Job { previous, rate, ..Job::whole(param, grad, moments, i % 2 == 0) }
            })
            .collect();
        step_all(&mut jobs, &AdamWConfig { lr: 1e-2, ..AdamWConfig::default() }, step as u32, &mut clip).unwrap();
        verdicts.push(clip.read().unwrap());
    }
    let states = narrow.iter().flatten().flat_map(|state| [&state.codes, &state.absmax]);
    let tensors = params.iter().chain(&previous).chain(wide.iter().flatten()).chain(states);
    let bytes = tensors.map(|tensor| tensor.to_device(Device::Cpu, Tag::Workspace).unwrap().bytes().unwrap().to_vec());
    (bytes.collect(), verdicts)
}

proptest! {
    #![proptest_config(crate::testing::cases(16))]

    #[test]
    fn gpu_adamw_is_that_of_the_cpu_to_the_bit(
        // A few, or so many that the tables of the three rates are no longer among a launch's parameters.
        sizes in prop_oneof![
            prop::collection::vec(1usize..20_000, 1..6), prop::collection::vec(1usize..600, 90..110),
        ],
        eight in any::<bool>(), kind in 0usize..3,
        skipped in any::<bool>(),
    ) {
        let Some(device) = gpu() else { return Ok(()) };
        let dtype = [DType::F32, DType::F16, DType::BF16][kind];
        // An infinite gradient leaves a step out.
        let scales = [1.0, 1e-3, if skipped { f32::INFINITY } else { 0.5 }, 0.1];
        let (ours, verdicts) = run(device, &sizes, eight, dtype, &scales);
        let (expected, of_cpu) = run(Device::Cpu, &sizes, eight, dtype, &scales);
        prop_assert!(ours == expected);
        for (step, (a, b)) in verdicts.iter().zip(&of_cpu).enumerate() {
            prop_assert_eq!((a.gradients_finite, a.parameters_finite), (b.gradients_finite, b.parameters_finite));
            prop_assert_eq!(a.gradients_finite, !(skipped && step == 2));
            prop_assert!(!a.gradients_finite || (a.norm - b.norm).abs() <= 1e-6 * b.norm, "{} {}", a.norm, b.norm);
        }
    }
}

#[test]
fn gpu_adamw_finds_parameters_that_become_infinite() {
    for device in [Some(Device::Cpu), gpu()].into_iter().flatten() {
        let make = |values: &[f32]| {
            Tensor::from_slice(values, &[4], Tag::Workspace).unwrap().to_device(device, Tag::Workspace)
        };
        let (mut param, grad) = (make(&[f32::MAX, 1.0, 2.0, 3.0]).unwrap(), make(&[-1.0, 1.0, 1.0, 1.0]).unwrap());
        let (mut m, mut v) = (make(&[0.0; 4]).unwrap(), make(&[0.0; 4]).unwrap());
        let mut clip = Clip::new(&[&grad], 1.0, 1.0).unwrap();
        let config = AdamWConfig { lr: 1e38, weight_decay: 0.0, ..AdamWConfig::default() };
        let moments = MomentsMut::F32 { m: &mut m, v: &mut v };
        let job = Job::whole(&mut param, &grad, moments, false);
        step_all(&mut [job], &config, 1, &mut clip).unwrap();
        let verdict = clip.read().unwrap();
        assert_eq!((verdict.gradients_finite, verdict.parameters_finite), (true, false), "{device}");
        assert!((verdict.norm - 2.0).abs() < 1e-6);
    }
}
