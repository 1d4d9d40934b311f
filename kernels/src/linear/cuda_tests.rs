//! Products on the GPU against those on the CPU, on the same 16-bit operands.

use super::{
    codes_hopper::{Shares, tests::SHARES},
    cuda::tests::TILE,
    hopper::tests::COLUMNS,
    *,
};
use crate::{
    quantize::{QuantType, ScaleRounding, dequantize, quantize},
    swiglu,
    testing::{gpu, random, random_as, same},
};
use proptest::prelude::*;

const TAG: Tag = Tag::Workspace;

/// `tensor` on `device`.
fn moved(tensor: &Tensor, device: Device) -> Tensor {
    tensor.to_device(device, TAG).unwrap()
}

fn moved_weight(weight: &Weight, device: Device) -> Weight {
    match weight {
        Weight::Dense(tensor) => Weight::Dense(moved(tensor, device)),
        Weight::Quantized(quantized) => Weight::Quantized(quantized.to_device(device, Tag::Weights).unwrap()),
    }
}

/// Ways that [`force`] knows.
const TILES: usize = 11;

/// Makes this thread's products take a tile of gemm.cuh (0 to 2), of Hopper's kernel (3, 4), or of the one for few rows of 4-bit
/// weights, in so many shares (where the GPU or the shape does not allow that, what they would take anyway).
fn force(tile: Option<usize>) {
    let shares = [(256, 1), (128, 1), (64, 1), (256, 4), (128, 3), (64, 2)];
    TILE.set(tile.filter(|&tile| tile < 3));
    COLUMNS.set(tile.and_then(|tile| [256, 128].get(tile.checked_sub(3)?).copied()));
    SHARES.set(tile.and_then(|tile| shares.get(tile.checked_sub(5)?).map(|&(rows, blocks)| Shares { rows, blocks })));
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Dense,
    Quantized { quant_type: QuantType, double: bool, block_size: usize },
}

fn weight(kind: Kind, shape: [usize; 2], dtype: DType, seed: u64) -> Weight {
    match kind {
        Kind::Dense => Weight::Dense(random_as(&shape, dtype, seed)),
        Kind::Quantized { quant_type, double, block_size } => {
            let dense = random(&shape, seed);
            Weight::Quantized(
                quantize(&dense, quant_type, block_size, double.then_some(ScaleRounding::Exact), dtype, TAG).unwrap(),
            )
        }
    }
}

fn kinds() -> impl Strategy<Value = Kind> {
    let quantized = (prop_oneof![Just(QuantType::Nf4), Just(QuantType::Fp4)], any::<bool>(), 5u32..13);
    let quantized = quantized.prop_map(|(quant_type, double, shift)| Kind::Quantized {
        quant_type,
        double,
        block_size: 1 << shift,
    });
    prop_oneof![1 => Just(Kind::Dense), 2 => quantized]
}

/// Whole chunks, which tiles take, and any number, which they may not.
fn sizes() -> impl Strategy<Value = usize> {
    prop_oneof![2 => (1usize..11).prop_map(|n| 32 * n), 1 => (1usize..40).prop_map(|n| 8 * n), 1 => 1usize..300]
}

#[derive(Clone, Copy, Debug)]
struct Case {
    t: usize,
    n: usize,
    k: usize,
    rank: usize,
    kind: Kind,
    dtype: DType,
    out: DType,
    tile: Option<usize>,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let rank = prop_oneof![1 => Just(0), 1 => Just(16), 1 => 1usize..257];
    let tile = prop_oneof![Just(None), (0..TILES).prop_map(Some)];
    let dtype = prop_oneof![Just(DType::BF16), Just(DType::F16)];
    ((1usize..300, sizes(), sizes()), rank, kinds(), dtype, any::<bool>(), tile, any::<u64>()).prop_map(
        |((t, n, k), rank, kind, dtype, wide, tile, seed)| {
            let out = if wide { DType::F32 } else { dtype };
            Case { t, n, k, rank, kind, dtype, out, tile, seed }
        },
    )
}

/// Every variant of the two products, on the CPU or on a GPU.
fn products(case: Case, device: Device) -> Vec<Tensor> {
    let Case { t, n, k, rank, kind, dtype, out, tile, seed } = case;
    let make = |shape: [usize; 2], dtype, salt| moved(&random_as(&shape, dtype, seed ^ salt), device);
    let weight = moved_weight(&weight(kind, [n, k], dtype, seed ^ 1), device);
    let (x, g) = (make([t, k], dtype, 2), make([t, n], dtype, 3));
    let r = rank.max(1);
    let (left, b, a) = (make([t, r], dtype, 4), make([n, r], dtype, 5), make([r, k], dtype, 6));
    let (forward_lora_of, backward_lora_of) = match rank {
        0 => (None, None),
        _ => (Some((&left, &b)), Some((&left, &a))),
    };
    let residual = make([t, n], out, 7);
    force(tile);
    let mut sum = make([t, n], out, 8);
    forward_add(&x, &weight, -2.0, &mut sum).unwrap();
    let mut grad_sum = make([t, k], out, 9);
    input_grad_lora_add(&g, &weight, backward_lora_of, &mut grad_sum).unwrap();
    let results = vec![
        forward(&x, &weight, TAG).unwrap(),
        sum,
        forward_lora(&x, &weight, forward_lora_of, None, out, TAG).unwrap(),
        forward_lora(&x, &weight, forward_lora_of, Some(&residual), out, TAG).unwrap(),
        input_grad(&g, &weight, 0.5).unwrap(),
        input_grad_lora(&g, &weight, backward_lora_of, out, TAG).unwrap(),
        grad_sum,
    ];
    force(None);
    results
}

fn check(case: Case, device: Device) {
    for (found, expected) in products(case, device).iter().zip(&products(case, Device::Cpu)) {
        // A few rows go to the decoding kernels, which do not round 4-bit weights to a type.
        let decoded = case.t <= 16 && case.tile.is_none();
        same(found, expected, if found.dtype() == DType::F32 && !decoded { 1e-4 } else { 1e-2 });
    }
}

proptest! {
    #![proptest_config(crate::testing::cases(32))]

    #[test]
    fn gpu_products_match_the_cpu(case in cases()) {
        if let Some(device) = gpu() {
            check(case, device);
        }
    }
}

/// More tiles along the contraction than any ring has, several tiles each way, more than one strip of rows.
#[test]
fn gpu_large_products_match_the_cpu() {
    let Some(device) = gpu() else { return };
    let nf4 = Kind::Quantized { quant_type: QuantType::Nf4, double: true, block_size: 64 };
    for (kind, tile) in [(Kind::Dense, 0), (Kind::Dense, 1), (Kind::Dense, 2), (nf4, 0), (nf4, 1), (nf4, 2), (nf4, 3)] {
        let (dtype, tile) = (DType::BF16, Some(tile));
        check(Case { t: 300, n: 544, k: 1120, rank: 16, kind, dtype, out: dtype, tile, seed: 1 }, device);
        check(Case { t: 4500, n: 288, k: 96, rank: 8, kind, dtype, out: DType::F32, tile, seed: 2 }, device);
    }
}

/// Hopper's kernel: more tiles than SMs, so that blocks go from one to the next with the ring at any stage, tails each
/// way, and exact sums.
#[test]
fn gpu_hopper_products_match_the_cpu() {
    let Some(device) = gpu() else { return };
    for (tile, dtype) in [(3, DType::BF16), (4, DType::BF16), (3, DType::F16), (4, DType::F16)] {
        let of = |t, n, k, rank, out| Case { t, n, k, rank, kind: Kind::Dense, dtype, out, tile: Some(tile), seed: 5 };
        check(of(2100, 2312, 328, 72, dtype), device);
        check(of(1, 8, 8, 8, dtype), device);
        check(of(600, 1032, 64, 0, DType::F32), device);
        check(of(129, 264, 1096, 16, DType::F32), device);
    }
}

/// The kernel for few rows on Hopper: several tiles each way, ragged or not, and shares of a contraction that are not even.
#[test]
fn gpu_few_rows_of_codes_match_the_cpu() {
    let Some(device) = gpu() else { return };
    let kind = Kind::Quantized { quant_type: QuantType::Nf4, double: true, block_size: 64 };
    for (tile, dtype) in (5..TILES).zip([DType::BF16, DType::F16].into_iter().cycle()) {
        let of = |t, n, k, rank, out| Case { t, n, k, rank, kind, dtype, out, tile: Some(tile), seed: 6 };
        check(of(256, 1024, 1152, 16, dtype), device);
        check(of(300, 320, 448, 72, DType::F32), device);
        check(of(17, 64, 64, 0, DType::F32), device);
    }
    let of = |t, n, k, rank| Case { t, n, k, rank, kind, dtype: DType::BF16, out: DType::BF16, tile: None, seed: 7 };
    check(of(17, 1024, 4096, 16), device);
    check(of(256, 4096, 1024, 16), device);
}

/// What the rule chooses for any number of rows, and one way of sharing, for all kinds of codes.
#[test]
fn gpu_any_number_of_few_rows_matches_the_cpu() {
    let Some(device) = gpu() else { return };
    let rows = [17, 31, 33, 63, 64, 65, 100, 127, 129, 191, 200, 255, 256, 257, 300, 383, 449, 511];
    for (i, t) in rows.into_iter().enumerate() {
        for (quant_type, double) in
            [(QuantType::Nf4, true), (QuantType::Nf4, false), (QuantType::Fp4, true), (QuantType::Fp4, false)]
        {
            let kind = Kind::Quantized { quant_type, double, block_size: 64 << (i % 3) };
            let dtype = if i % 4 == 3 { DType::F16 } else { DType::BF16 };
            let of = |tile, n, k, out| Case { t, n, k, rank: [16, 0, 72][i % 3], kind, dtype, out, tile, seed: 8 };
            check(of(None, 320, 448, DType::F32), device);
            check(of(Some(5 + i % 6), 192, 576, dtype), device);
        }
    }
}

/// The input gradient of linears on one input, which Hopper sums in one launch; in f32, so that what is rounded on the way
/// does not hide terms.
#[test]
fn gpu_summed_input_gradients_match_the_cpu() {
    let Some(device) = gpu() else { return };
    let nf4 = Kind::Quantized { quant_type: QuantType::Nf4, double: true, block_size: 64 };
    let widths = [(264, 16), (72, 0), (128, 200)];
    for (case, tile, kind, dtype) in [
        (1, Some(3), Kind::Dense, DType::BF16),
        (2, Some(4), Kind::Dense, DType::F16),
        (3, Some(3), nf4, DType::BF16),
        (4, None, nf4, DType::BF16),
    ] {
        let (t, k) = (2100, 328);
        let run = |device: Device, out: DType| {
            let of = |shape: [usize; 2], salt: u64| moved(&random_as(&shape, dtype, 100 * case + salt), device);
            let parts: Vec<_> = (0..3)
                .map(|i| {
                    let (n, rank) = widths[i];
                    let (r, salt) = (rank.max(1), 10 * i as u64);
                    let weight = moved_weight(&weight(kind, [n, k], dtype, 100 * case + salt), device);
                    (of([t, n], salt + 1), weight, rank > 0, of([t, r], salt + 2), of([r, k], salt + 3))
                })
                .collect();
            let parts: Vec<InputGrad> = parts
                .iter()
                .map(|(grad, weight, has, u, a)| InputGrad { grad, weight, lora: has.then_some((u, a)) })
                .collect();
            force(tile);
            let sum = input_grads_lora(&parts, out, TAG).unwrap();
            let first = input_grads_lora(&parts[..1], out, TAG).unwrap();
            force(None);
            [sum, first]
        };
        for (out, tolerance) in [(DType::F32, 1e-4), (dtype, 1e-2)] {
            for (found, expected) in run(device, out).iter().zip(&run(Device::Cpu, out)) {
                same(found, expected, tolerance);
            }
        }
    }
}

/// SwiGLU within a product gives the bits that it gives after one, whether the operands are for the kernel that does so or not.
#[test]
fn gpu_gated_products_are_those_of_two_passes() {
    let Some(device) = gpu() else { return };
    let nf4 = Kind::Quantized { quant_type: QuantType::Nf4, double: true, block_size: 64 };
    for (t, n, k, rank, kind, dtype, tile) in [
        (2100, 2312, 328, 72, Kind::Dense, DType::BF16, Some(3)),
        (300, 520, 1096, 0, Kind::Dense, DType::F16, Some(3)),
        (129, 264, 64, 16, nf4, DType::BF16, Some(3)),
        (1, 8, 8, 8, Kind::Dense, DType::F16, Some(3)),
        (300, 264, 64, 16, nf4, DType::BF16, Some(4)),
        (600, 12288, 64, 16, nf4, DType::BF16, None),
        (40, 30, 20, 3, Kind::Dense, DType::F32, None),
    ] {
        let of = |shape: [usize; 2], salt| moved(&random_as(&shape, dtype, salt), device);
        let (r, weight) = (rank.max(1), |shape, salt| moved_weight(&weight(kind, shape, dtype, salt), device));
        let (x, up_weight, b) = (of([t, k], 1), weight([n, k], 2), of([n, r], 3));
        let (dy, down_weight, a) = (of([t, k], 4), weight([k, n], 5), of([r, n], 6));
        let (low, gate, up) = (of([t, r], 7), of([t, n], 8), of([t, n], 9));
        let (forward_pair, backward_pair) = ((rank > 0).then_some((&low, &b)), (rank > 0).then_some((&low, &a)));
        force(tile);
        let (found_up, found_output) = forward_gated(&x, &up_weight, forward_pair, &gate, TAG).unwrap();
        let expected_up = forward_lora(&x, &up_weight, forward_pair, None, dtype, TAG).unwrap();
        let part = InputGrad { grad: &dy, weight: &down_weight, lora: backward_pair };
        // `up` is referred to by both, and must be left as it is.
        let found = input_grad_gated(part, gate.copy(TAG).unwrap(), up.clone()).unwrap();
        let da = input_grad_lora(&dy, &down_weight, backward_pair, dtype, TAG).unwrap();
        force(None);
        let expected_output = swiglu::forward(&gate, &expected_up).unwrap();
        let expected = swiglu::backward(gate, up.clone(), da).unwrap();
        for (found, expected) in [
            (&found_up, &expected_up),
            (&found_output, &expected_output),
            (&found.output, &expected.output),
            (&found.gate, &expected.gate),
            (&found.up, &expected.up),
        ] {
            same(found, expected, 0.0);
        }
        same(&up, &random_as(&[t, n], dtype, 9), 0.0);
    }
}

/// A weight that is held dequantized gives the bits that it gives when products dequantize it; and is what they multiply.
#[test]
fn gpu_held_weights_give_the_same_bits() {
    let Some(device) = gpu() else { return };
    let chip = nibble_runtime::cuda::Gpu::of(device).unwrap().chip();
    let nf4 = Kind::Quantized { quant_type: QuantType::Nf4, double: true, block_size: 64 };
    for (t, n, k, dtype, tile) in [
        (600, 12288, 64, DType::BF16, None),
        (300, 520, 1096, DType::F16, Some(3)),
        (129, 264, 328, DType::BF16, Some(4)),
        (40, 264, 64, DType::BF16, None),
    ] {
        let of = |shape: [usize; 2], salt| moved(&random_as(&shape, dtype, salt), device);
        let Weight::Quantized(mut weight) = moved_weight(&weight(nf4, [n, k], dtype, 1), device) else { panic!() };
        let (x, g, gate, up) = (of([t, k], 2), of([t, n], 3), of([t, n], 4), of([t, k], 5));
        let run = |weight: &QuantTensor| {
            let weight = &Weight::Quantized(weight.clone());
            let part = InputGrad { grad: &g, weight, lora: None };
            let (gated_up, output) = forward_gated(&x, weight, None, &gate, TAG).unwrap();
            let gated = input_grad_gated(part, up.copy(TAG).unwrap(), up.clone()).unwrap();
            vec![
                forward_as(&x, weight, DType::F32, TAG).unwrap(),
                input_grad(&g, weight, 1.0).unwrap(),
                input_grads_lora(&[part, part], dtype, TAG).unwrap(),
                gated_up,
                output,
                gated.gate,
            ]
        };
        force(tile);
        let expected = run(&weight);
        weight.hold_dense(Some(dtype), TAG).unwrap();
        let found = run(&weight);
        // Of zeros nothing is left.
        weight.dense = Some(Tensor::zeros(&[n, k], dtype, device, TAG).unwrap());
        let of_zeros = run(&weight);
        force(None);
        found.iter().zip(&expected).for_each(|(found, expected)| same(found, expected, 0.0));
        let large = dequantizes(chip, usize::MAX) && (tile.is_some() || dequantizes(chip, t));
        let none = vec![0.0; t * n];
        assert_eq!(of_zeros[0].to_device(Device::Cpu, TAG).unwrap().to_f32().unwrap()[..] == none[..], large, "{t}");
    }
}

/// A unit matrix picks single weights: they must be those of the dequantized matrix, bit for bit.
#[test]
fn gpu_decodes_exactly() {
    let Some(device) = gpu() else { return };
    for tile in 0..TILES {
        for (quant_type, double, block_size) in
            [(QuantType::Nf4, true, 64), (QuantType::Nf4, false, 32), (QuantType::Fp4, true, 128)]
        {
            for dtype in [DType::BF16, DType::F16] {
                let (n, k) = (256, 192);
                let kind = Kind::Quantized { quant_type, double, block_size };
                let host = weight(kind, [n, k], dtype, 3);
                let Weight::Quantized(quantized) = &host else { unreachable!() };
                let dense = dequantize(quantized, TAG).unwrap();
                let unit = |size: usize| {
                    let values: Vec<f32> =
                        (0..size * size).map(|i| if i / size == i % size { 1.0 } else { 0.0 }).collect();
                    let unit = Tensor::from_slice(&values, &[size, size], TAG).unwrap();
                    moved(&unit.into_dtype(dtype, TAG).unwrap(), device)
                };
                let weight = moved_weight(&host, device);
                force(Some(tile));
                let rows = input_grad(&unit(n), &weight, 1.0).unwrap(); // [N, K]
                let columns = forward(&unit(k), &weight, TAG).unwrap(); // [K, N]
                force(None);
                let (rows, columns) = (moved(&rows, Device::Cpu), moved(&columns, Device::Cpu));
                let (rows, columns, dense) =
                    (rows.to_f32().unwrap(), columns.to_f32().unwrap(), dense.to_f32().unwrap());
                assert!(rows == dense, "{kind:?} {dtype}");
                for (i, &x) in dense.iter().enumerate() {
                    assert!(columns[i % k * n + i / k] == x, "{kind:?} {dtype}: weight {i}");
                }
            }
        }
    }
}

/// Sums of small integers are exact in any order.
#[test]
fn gpu_products_of_integers_are_exact() {
    let Some(device) = gpu() else { return };
    let integers = |shape: [usize; 2], seed| {
        let values: Vec<f32> = random(&shape, seed).as_slice::<f32>().unwrap().iter().map(|x| x.round()).collect();
        Tensor::from_slice(&values, &shape, TAG).unwrap().into_dtype(DType::BF16, TAG).unwrap()
    };
    for (tile, (t, n, k, rank)) in [
        (0, (300, 136, 520, 8)),
        (1, (131, 264, 72, 5)),
        (2, (70, 40, 200, 70)),
        (3, (300, 136, 520, 8)),
        (4, (131, 264, 72, 72)),
    ] {
        let run = |device: Device| {
            let of = |shape, seed| moved(&integers(shape, seed), device);
            let (x, g, weight) = (of([t, k], 1), of([t, n], 2), Weight::Dense(of([n, k], 3)));
            let (left, b, a) = (of([t, rank], 4), of([n, rank], 5), of([rank, k], 6));
            force(Some(tile));
            let y = forward_lora(&x, &weight, Some((&left, &b)), None, DType::F32, TAG).unwrap();
            let dx = input_grad_lora(&g, &weight, Some((&left, &a)), DType::F32, TAG).unwrap();
            force(None);
            [moved(&y, Device::Cpu), moved(&dx, Device::Cpu)]
        };
        for (found, expected) in run(device).iter().zip(&run(Device::Cpu)) {
            assert!(found.to_f32().unwrap() == expected.to_f32().unwrap(), "tile {tile}");
        }
    }
}

/// The same bits each time, and an empty result is no launch.
#[test]
fn gpu_products_repeat_and_may_be_empty() {
    let Some(device) = gpu() else { return };
    let nf4 = Kind::Quantized { quant_type: QuantType::Nf4, double: true, block_size: 64 };
    for (kind, t, k) in [(Kind::Dense, 700, 1032), (nf4, 700, 1024), (nf4, 256, 4096)] {
        let weight = moved_weight(&weight(kind, [576, k], DType::BF16, 1), device);
        let x = moved(&random_as(&[t, k], DType::BF16, 2), device);
        let run = || moved(&forward(&x, &weight, TAG).unwrap(), Device::Cpu);
        let first = run();
        for _ in 0..5 {
            assert!(run().bytes().unwrap() == first.bytes().unwrap());
        }
        assert_eq!(forward(&x.rows(0, 0).unwrap(), &weight, TAG).unwrap().shape(), [0, 576]);
    }
}

#[test]
fn gpu_misfits_are_errors() {
    let Some(device) = gpu() else { return };
    let of = |shape: [usize; 2], dtype| moved(&random_as(&shape, dtype, 1), device);
    let x = of([32, 64], DType::BF16);
    let host = Weight::Dense(random_as(&[24, 64], DType::BF16, 1));
    assert!(forward(&x, &host, TAG).is_err(), "devices differ");
    let Weight::Quantized(mut short) =
        weight(Kind::Quantized { quant_type: QuantType::Nf4, double: false, block_size: 64 }, [24, 64], DType::BF16, 1)
    else {
        unreachable!()
    };
    short.packed = short.packed.rows(0, 100).unwrap();
    let short = moved_weight(&Weight::Quantized(short), device);
    assert!(forward(&x, &short, TAG).is_err(), "codes are missing");
}
