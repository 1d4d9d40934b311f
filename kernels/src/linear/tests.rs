use super::*;
use crate::quantize::{QuantType, ScaleRounding, dequantize, quantize};
use crate::testing::{close, random};
use proptest::prelude::*;

/// `a [m, k] · b [k, n]` in f64.
fn reference(a: &[f32], b: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
    let at = |i: usize, j: usize| (0..k).map(|l| f64::from(a[i * k + l]) * f64::from(b[l * n + j])).sum();
    (0..m * n).map(|index| at(index / n, index % n)).collect()
}

fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect()
}

fn weights(n: usize, k: usize, seed: u64) -> Vec<Weight> {
    let dense = random(&[n, k], seed);
    let bf16 = dense.cast(DType::BF16, Tag::Weights).unwrap();
    let nf4 = quantize(&dense, QuantType::Nf4, 64, Some(ScaleRounding::Stepped), DType::F32, Tag::Weights).unwrap();
    let fp4 = quantize(&dense, QuantType::Fp4, 32, None, DType::BF16, Tag::Weights).unwrap();
    vec![Weight::Dense(dense), Weight::Dense(bf16), Weight::Quantized(nf4), Weight::Quantized(fp4)]
}

fn as_f32(weight: &Weight) -> Vec<f32> {
    match weight {
        Weight::Dense(tensor) => tensor.to_f32().unwrap().into_owned(),
        Weight::Quantized(quantized) => dequantize(quantized, Tag::Workspace).unwrap().to_f32().unwrap().into_owned(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn products_match_f64(t in 1usize..70, n in 1usize..90, k in 1usize..90, seed: u64) {
        let (x, g) = (random(&[t, k], seed), random(&[t, n], seed ^ 1));
        let (xs, gs) = (x.as_slice::<f32>().unwrap(), g.as_slice::<f32>().unwrap());
        for weight in weights(n, k, seed ^ 2) {
            let dense = as_f32(&weight);
            let y = reference(xs, &transposed(&dense, n, k), (t, n, k));
            let dx = reference(gs, &dense, (t, k, n));
            close(&forward(&x, &weight, Tag::Activations).unwrap(), &y, 2e-6);
            close(&input_grad(&g, &weight, 1.0).unwrap(), &dx, 2e-6);
            let (mut twice, mut thrice) = (g.copy(Tag::Workspace).unwrap(), x.copy(Tag::Workspace).unwrap());
            forward_add(&x, &weight, 2.0, &mut twice).unwrap();
            input_grad_add(&g, &weight, -3.0, &mut thrice).unwrap();
            let y: Vec<f64> = y.iter().zip(gs).map(|(y, &g)| 2.0 * y + f64::from(g)).collect();
            let dx: Vec<f64> = dx.iter().zip(xs).map(|(dx, &x)| -3.0 * dx + f64::from(x)).collect();
            close(&twice, &y, 2e-6);
            close(&thrice, &dx, 2e-6);
        }
        let dw = reference(&transposed(gs, t, n), xs, (n, k, t));
        close(&weight_grad(&g, &x, 1.0).unwrap(), &dw, 2e-6);
    }
}

#[test]
fn panels_join_without_a_seam() {
    let (t, n, k) = (3, 2 * cpu::DEPTH + 7, cpu::DEPTH + cpu::STRIP + 5); // the last panel odd both ways
    let (x, g) = (random(&[t, k], 1), random(&[t, n], 2));
    for weight in weights(n, k, 3) {
        let dense = as_f32(&weight);
        let y = reference(x.as_slice().unwrap(), &transposed(&dense, n, k), (t, n, k));
        close(&forward(&x, &weight, Tag::Activations).unwrap(), &y, 2e-6);
        close(&input_grad(&g, &weight, 1.0).unwrap(), &reference(g.as_slice().unwrap(), &dense, (t, k, n)), 2e-6);
    }
}

#[test]
fn half_operands_round_once() {
    let (x, weight) = (random(&[5, 64], 1).cast(DType::BF16, Tag::Workspace).unwrap(), &weights(7, 64, 2)[0]);
    let y = forward(&x, weight, Tag::Activations).unwrap();
    let exact = reference(&x.to_f32().unwrap(), &transposed(&as_f32(weight), 7, 64), (5, 7, 64));
    assert_eq!(y.dtype(), DType::BF16);
    for (&y, exact) in y.to_f32().unwrap().iter().zip(exact) {
        assert!((f64::from(y) - exact).abs() <= exact.abs() / 256.0 + 1e-6);
    }
}

#[test]
fn misfits_are_errors() {
    let weight = &weights(4, 6, 1)[0];
    assert!(forward(&random(&[2, 5], 1), weight, Tag::Activations).is_err());
    assert!(input_grad(&random(&[2, 6], 1), weight, 1.0).is_err());
    assert!(forward_add(&random(&[2, 6], 1), weight, 1.0, &mut random(&[3, 4], 1)).is_err());
    assert!(weight_grad(&random(&[2, 4], 1), &random(&[3, 6], 1), 1.0).is_err());
}

#[test]
fn low_rank_branches_join_the_sum() {
    let (t, n, k, rank) = (5, 7, 11, 3);
    let (x, g, left) = (random(&[t, k], 1), random(&[t, n], 2), random(&[t, rank], 3));
    let (a, b, residual) = (random(&[rank, k], 4), random(&[n, rank], 5), random(&[t, n], 6));
    let slice = |tensor: &Tensor| tensor.as_slice::<f32>().unwrap().to_vec();
    for weight in weights(n, k, 7) {
        let dense = as_f32(&weight);
        let y = forward_lora(&x, &weight, Some((&left, &b)), Some(&residual), DType::F32, Tag::Activations).unwrap();
        let main = reference(&slice(&x), &transposed(&dense, n, k), (t, n, k));
        let branch = reference(&slice(&left), &transposed(&slice(&b), n, rank), (t, n, rank));
        let expected: Vec<f64> = (0..t * n).map(|i| main[i] + branch[i] + f64::from(slice(&residual)[i])).collect();
        close(&y, &expected, 2e-6);
        let main = reference(&slice(&g), &dense, (t, k, n));
        let branch = reference(&slice(&left), &slice(&a), (t, k, rank));
        let expected: Vec<f64> = main.iter().zip(branch).map(|(x, y)| x + y).collect();
        let mut dx = input_grad_lora(&g, &weight, Some((&left, &a)), DType::F32, Tag::Workspace).unwrap();
        close(&dx, &expected, 2e-6);
        input_grad_lora_add(&g, &weight, Some((&left, &a)), &mut dx).unwrap();
        close(&dx, &expected.iter().map(|x| 2.0 * x).collect::<Vec<_>>(), 2e-6);
        assert!(forward_lora(&x, &weight, Some((&left, &a)), None, DType::F32, Tag::Activations).is_err());
        assert!(forward_lora(&x, &weight, None, Some(&residual), DType::BF16, Tag::Activations).is_err());
    }
}

/// Each element is summed in an order of its own, whoever computes it.
#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let (t, n, k) = (70, 200, 333);
    let (x, g) = (random(&[t, k], 1), random(&[t, n], 2));
    for weight in weights(n, k, 3) {
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let both = || (forward(&x, &weight, Tag::Activations).unwrap(), input_grad(&g, &weight, 1.0).unwrap());
            let (y, dx) = pool.install(both);
            (y.as_slice::<f32>().unwrap().to_vec(), dx.as_slice::<f32>().unwrap().to_vec())
        };
        let one = with(1);
        assert!(one == with(2) && one == with(5));
    }
}
