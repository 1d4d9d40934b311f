//! SwiGLU on the GPU against that on the CPU.

use super::*;
use crate::testing::{FLOATS, gpu, random_as, same};
use proptest::prelude::*;

fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F32 { 1e-5 } else { 1e-2 }
}

proptest! {
    #![proptest_config(crate::testing::cases(24))]

    /// Any shape; `first` rows are cut off so that views start at odd addresses.
    #[test]
    fn gpu_matches_the_cpu(
        rows in 0usize..70, width in 1usize..900, first in 0usize..2, dtype in 0usize..3, shared: bool, seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let dtype = FLOATS[dtype];
        let host = [0, 1, 2].map(|i| random_as(&[first + rows, width], dtype, seed ^ i).rows(first, rows).unwrap());
        let [gate, up, grad] = [0, 1, 2].map(|i| {
            let all = random_as(&[first + rows, width], dtype, seed ^ i);
            all.to_device(gpu, Tag::Workspace).unwrap().rows(first, rows).unwrap()
        });
        same(&forward(&gate, &up).unwrap(), &forward(&host[0], &host[1]).unwrap(), tolerance(dtype));
        // A tensor that another refers to must be left as it is.
        let seen = shared.then(|| gate.clone());
        let found = backward(gate, up, grad).unwrap();
        let expected = backward(host[0].clone(), host[1].clone(), host[2].clone()).unwrap();
        same(&found.output, &expected.output, tolerance(dtype));
        same(&found.gate, &expected.gate, tolerance(dtype));
        same(&found.up, &expected.up, tolerance(dtype));
        if let Some(seen) = seen {
            same(&seen, &host[0], 0.0);
        }
    }
}

#[test]
fn gpu_extreme_gates_stay_finite() {
    let Some(gpu) = gpu() else { return };
    for dtype in FLOATS {
        let on_gpu = |values: &[f32]| {
            let host = Tensor::from_slice(values, &[1, values.len()], Tag::Workspace).unwrap();
            host.into_dtype(dtype, Tag::Workspace).unwrap().to_device(gpu, Tag::Workspace).unwrap()
        };
        let (gate, one) = (on_gpu(&[-1e4, -90.0, 90.0, 1e4]), on_gpu(&[1.0; 4]));
        let values = |x: &Tensor| x.to_device(Device::Cpu, Tag::Workspace).unwrap().to_f32().unwrap().into_owned();
        let inputs = values(&gate);
        let out = values(&forward(&gate, &one).unwrap());
        assert!(out[..2].iter().all(|x| x.abs() < 1e-6) && out[2..] == inputs[2..], "{out:?}");
        let Backward { gate: dgate, up: dup, .. } = backward(gate, one.clone(), one).unwrap();
        let (dgate, dup) = (values(&dgate), values(&dup));
        assert!(dgate.iter().chain(&dup).all(|x| x.is_finite()), "{dgate:?} {dup:?}");
        assert!(dgate[0].abs() < 1e-6 && (dgate[3] - 1.0).abs() < 1e-6, "{dgate:?}");
    }
}
