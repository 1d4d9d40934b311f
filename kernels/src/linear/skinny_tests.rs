//! Products in f32, with a LoRA rank, of weight gradients and of a few tokens: on the GPU against the CPU, on the same
//! operands.

use super::{lora, narrow::tests::ALWAYS, *};
use crate::{
    dropout::{self, Mask},
    quantize::{QuantType, ScaleRounding, quantize},
    testing::{gpu, random, random_as, same},
};
use proptest::prelude::*;

const TAG: Tag = Tag::Workspace;
const MASK: Mask = Mask { probability: 0.25, seed: 0x0123_4567_89AB_CDEF, step: 3, layer: 70 };

fn weight_on(weight: &Weight, device: Device) -> Weight {
    match weight {
        Weight::Dense(tensor) => Weight::Dense(tensor.to_device(device, TAG).unwrap()),
        Weight::Quantized(quantized) => Weight::Quantized(quantized.to_device(device, TAG).unwrap()),
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Dense(DType),
    Codes { quant_type: QuantType, double: bool, block_size: usize, dtype: DType },
}

fn weight(kind: Kind, shape: [usize; 2], seed: u64) -> Weight {
    match kind {
        Kind::Dense(dtype) => Weight::Dense(random_as(&shape, dtype, seed)),
        Kind::Codes { quant_type, double, block_size, dtype } => {
            let rounding = double.then_some(ScaleRounding::Exact);
            Weight::Quantized(quantize(&random(&shape, seed), quant_type, block_size, rounding, dtype, TAG).unwrap())
        }
    }
}

fn floats() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)]
}

fn halves() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F16), Just(DType::BF16)]
}

fn codes() -> impl Strategy<Value = Kind> {
    let quant_type = prop_oneof![Just(QuantType::Nf4), Just(QuantType::Fp4)];
    (quant_type, any::<bool>(), 5u32..13, floats()).prop_map(|(quant_type, double, shift, dtype)| Kind::Codes {
        quant_type,
        double,
        block_size: 1 << shift,
        dtype,
    })
}

/// Widths that the fast kernels take, and any.
fn sizes() -> impl Strategy<Value = usize> {
    prop_oneof![2 => (1usize..40).prop_map(|n| 8 * n), 1 => (1usize..60).prop_map(|n| 4 * n), 1 => 1usize..200]
}

fn ranks() -> impl Strategy<Value = usize> {
    prop_oneof![3 => (1usize..5).prop_map(|r| 8 * r), 1 => (1usize..65).prop_map(|r| 2 * r), 1 => 1usize..100]
}

/// How far results of `dtype` may be from the CPU's.
fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F32 { 1e-5 } else { 1e-2 }
}

/// Runs `f` on both devices and compares what it returns.
#[track_caller]
fn agree(device: Device, tolerances: impl Fn(DType) -> f64, f: impl Fn(Device) -> Vec<Tensor>) {
    let (found, expected) = (f(device), f(Device::Cpu));
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        same(found, expected, tolerances(found.dtype()));
    }
}

/// Both products with all that may be added.
fn products(
    (t, n, k): (usize, usize, usize),
    kind: Kind,
    [rows, out]: [DType; 2],
    seed: u64,
) -> impl Fn(Device) -> Vec<Tensor> {
    move |device| {
        let of = |shape: [usize; 2], dtype, salt| random_as(&shape, dtype, seed ^ salt).to_device(device, TAG).unwrap();
        let weight = weight_on(&weight(kind, [n, k], seed), device);
        let (x, g, low) = (of([t, k], rows, 1), of([t, n], rows, 2), of([t, 6], rows, 3));
        let (b, a, residual) = (of([n, 6], rows, 4), of([6, k], rows, 5), of([t, n], out, 6));
        let (mut y, mut dx) = (of([t, n], out, 7), of([t, k], out, 8));
        forward_add(&x, &weight, -2.0, &mut y).unwrap();
        input_grad_add(&g, &weight, 0.5, &mut dx).unwrap();
        vec![
            y,
            dx,
            forward_as(&x, &weight, out, TAG).unwrap(),
            forward_lora(&x, &weight, Some((&low, &b)), Some(&residual), out, TAG).unwrap(),
            input_grad_lora(&g, &weight, Some((&low, &a)), out, TAG).unwrap(),
        ]
    }
}

proptest! {
    #![proptest_config(crate::testing::cases(24))]

    #[test]
    fn gpu_products_of_f32_match_the_cpu(
        shape in (1usize..200, sizes(), sizes()),
        kind in prop_oneof![floats().prop_map(Kind::Dense), codes()],
        out in floats(),
        seed: u64,
    ) {
        if let Some(device) = gpu() {
            agree(device, tolerance, products(shape, kind, [DType::F32, out], seed));
        }
    }

    #[test]
    fn gpu_products_of_mixed_types_match_the_cpu(
        shape in (1usize..100, sizes(), sizes()),
        rows in halves(),
        dtype in floats(),
        seed: u64,
    ) {
        if let Some(device) = gpu() {
            // Rows of one 16-bit type and a weight of it are the large products' own.
            let dtype = if dtype == rows { DType::F32 } else { dtype };
            agree(device, |_| 1e-2, products(shape, Kind::Dense(dtype), [rows, rows], seed));
        }
    }

    #[test]
    fn gpu_lora_products_match_the_cpu(
        (t, n, k, r) in (1usize..300, sizes(), sizes(), ranks()),
        dtype in floats(),
        dropped: bool,
        seed: u64,
    ) {
        if let Some(device) = gpu() {
            agree(device, tolerance, lora_products((t, n, k, r), dtype, dropped, seed));
        }
    }

    #[test]
    fn gpu_shared_lora_products_match_the_cpu(
        (t, n, k) in (1usize..700, sizes(), sizes()),
        ranks in prop::collection::vec(prop_oneof![3 => (1usize..9).prop_map(|r| 8 * r), 1 => (1usize..26).prop_map(|r| 8 * r)], 1..5),
        dtype in halves(),
        seed: u64,
    ) {
        if let Some(device) = gpu() {
            agree(device, |dtype| if dtype == DType::F32 { 1e-4 } else { 1e-2 }, shared_lora_products((t, n, k), ranks, dtype, seed));
        }
    }

    #[test]
    fn gpu_weight_gradients_match_the_cpu(
        (t, n, k) in (1usize..400, sizes(), sizes()),
        [left, right] in [floats(), floats()],
        seed: u64,
    ) {
        if let Some(device) = gpu() {
            agree(device, tolerance, weight_gradients((t, n, k), [left, right], seed));
        }
    }

    #[test]
    fn gpu_few_tokens_match_the_cpu(
        t in 1usize..17,
        (n, k) in (1usize..300, prop_oneof![3 => (1usize..40).prop_map(|k| 64 * k), 1 => sizes()]),
        rows in halves(),
        coded in prop::option::of(codes()),
        wide: bool,
        seed: u64,
    ) {
        if let Some(device) = gpu() {
            let out = if wide { DType::F32 } else { rows };
            // Codes are not rounded to a type on the way.
            agree(device, |_| 1e-2, products((t, n, k), coded.unwrap_or(Kind::Dense(rows)), [rows, out], seed));
        }
    }
}

/// The products of adapters on one input, with any ranks, by the kernels that Hopper has for many rows.
fn shared_lora_products(
    (t, n, k): (usize, usize, usize),
    ranks: Vec<usize>,
    dtype: DType,
    seed: u64,
) -> impl Fn(Device) -> Vec<Tensor> {
    move |device| {
        let of = |shape: [usize; 2], salt| random_as(&shape, dtype, seed ^ salt).to_device(device, TAG).unwrap();
        let (x, g) = (of([t, k], 1), of([t, n], 2));
        let each = |f: &dyn Fn(usize, u64) -> Tensor| -> Vec<Tensor> {
            ranks.iter().zip(10..).map(|(&r, salt)| f(r, salt)).collect()
        };
        let (downs, us, ups) = (
            each(&|r, salt| of([r, k], salt)),
            each(&|r, salt| of([t, r], 2 * salt)),
            each(&|r, salt| of([n, r], 3 * salt)),
        );
        let scaled: Vec<(&Tensor, f32)> = downs.iter().zip([0.5, -2.0, 1.0, 3.0]).collect();
        ALWAYS.set(true);
        let mut results = lora::down_all(&x, &scaled, TAG).unwrap();
        results.extend(lora::weight_grads(&us.iter().collect::<Vec<_>>(), &x).unwrap());
        results.extend(ups.iter().map(|b| lora::grad_down(&g, b, -2.0, TAG).unwrap()));
        results.extend(us.iter().map(|t| lora::weight_grad(&g, t, 0.5, None).unwrap()));
        for (b, t) in ups.iter().zip(&us) {
            let (u, of_b) = lora::grad_down_and_up(&g, t, b, -2.0, TAG).unwrap();
            results.extend([u, of_b]);
        }
        ALWAYS.set(false);
        results
    }
}

/// Every product with a rank; the results of a step of training.
fn lora_products(
    (t, n, k, r): (usize, usize, usize, usize),
    dtype: DType,
    dropped: bool,
    seed: u64,
) -> impl Fn(Device) -> Vec<Tensor> {
    move |device| {
        let of = |shape: [usize; 2], salt| random_as(&shape, dtype, seed ^ salt).to_device(device, TAG).unwrap();
        let (x, g, u) = (of([t, k], 1), of([t, n], 2), of([t, r], 3));
        let (a, b) = (of([r, k], 4), of([n, r], 5));
        let mask = dropped.then_some(MASK);
        let mut dx = of([t, k], 6);
        lora::dropped_add(&u, &a, MASK, &mut dx).unwrap();
        vec![
            lora::down(&x, &a, 0.5, mask, TAG).unwrap(),
            lora::grad_down(&g, &b, -2.0, TAG).unwrap(),
            lora::weight_grad(&u, &x, 1.0, mask).unwrap(),
            lora::weight_grad(&g, &u, 0.25, mask).unwrap(),
            dx,
        ]
    }
}

fn weight_gradients(
    (t, n, k): (usize, usize, usize),
    [left, right]: [DType; 2],
    seed: u64,
) -> impl Fn(Device) -> Vec<Tensor> {
    move |device| {
        let of = |shape: [usize; 2], dtype, salt| random_as(&shape, dtype, seed ^ salt).to_device(device, TAG).unwrap();
        vec![
            weight_grad(&of([t, n], left, 1), &of([t, k], right, 2), 0.5).unwrap(),
            weight_grad(&of([t, n], left, 3), &of([t, k], left, 4), 1.0).unwrap(),
        ]
    }
}

// Large enough for the tiles, blocks and slices that small shapes do not reach on a GPU of 132 processors. One test an
// operation, since a checker makes them slow.

fn coded(block_size: usize, dtype: DType) -> Kind {
    Kind::Codes { quant_type: QuantType::Nf4, double: true, block_size, dtype }
}

#[test]
fn gpu_large_products_match_the_cpu() {
    let Some(device) = gpu() else { return };
    for kind in [Kind::Dense(DType::F32), Kind::Dense(DType::BF16), coded(64, DType::BF16)] {
        agree(device, tolerance, products((2100, 1028, 92), kind, [DType::F32; 2], 1));
    }
}

#[test]
fn gpu_large_weight_gradients_match_the_cpu() {
    let Some(device) = gpu() else { return };
    agree(device, tolerance, weight_gradients((100, 2052, 1028), [DType::F32; 2], 2));
    agree(device, tolerance, weight_gradients((300, 1544, 1544), [DType::BF16; 2], 3));
    agree(device, tolerance, weight_gradients((5000, 72, 136), [DType::BF16; 2], 4));
}

#[test]
fn gpu_long_lora_products_match_the_cpu() {
    let Some(device) = gpu() else { return };
    for r in [8, 16, 24, 70] {
        agree(device, tolerance, lora_products((8500, 72, 104, r), DType::BF16, r != 8, 5));
    }
}

#[test]
fn gpu_wide_lora_products_match_the_cpu() {
    let Some(device) = gpu() else { return };
    agree(device, tolerance, lora_products((90, 2088, 4104, 16), DType::F16, true, 6));
}

#[test]
fn gpu_large_decoding_products_match_the_cpu() {
    let Some(device) = gpu() else { return };
    for kind in [coded(64, DType::BF16), Kind::Dense(DType::BF16)] {
        for t in [1, 9] {
            agree(device, |_| 1e-2, products((t, 17_003, 128), kind, [DType::BF16; 2], 7));
            agree(device, |_| 1e-2, products((t, 70, 14_336), kind, [DType::BF16, DType::F32], 8));
        }
    }
}

/// Long sums in f32 stay within its tolerance.
#[test]
fn gpu_long_sums_match_the_cpu() {
    let Some(device) = gpu() else { return };
    agree(device, tolerance, products((3, 20, 14_336), Kind::Dense(DType::F32), [DType::F32; 2], 1));
    agree(device, tolerance, weight_gradients((32_768, 16, 40), [DType::F32, DType::F32], 2));
    agree(device, tolerance, weight_gradients((32_768, 16, 64), [DType::BF16, DType::BF16], 3));
}

/// The same bits each time.
#[test]
fn gpu_sums_of_slices_repeat() {
    let Some(device) = gpu() else { return };
    let bits = |tensors: Vec<Tensor>| -> Vec<Vec<u8>> {
        tensors.iter().map(|tensor| tensor.to_device(Device::Cpu, TAG).unwrap().bytes().unwrap().to_vec()).collect()
    };
    let run = || {
        let mut all = bits(lora_products((3000, 264, 520, 16), DType::BF16, true, 1)(device));
        all.extend(bits(weight_gradients((3000, 64, 128), [DType::F32, DType::BF16], 2)(device)));
        all.extend(bits(products((5, 136, 1024), Kind::Dense(DType::F16), [DType::F16; 2], 3)(device)));
        all
    };
    let first = run();
    for _ in 0..4 {
        assert!(run() == first);
    }
}

#[test]
fn gpu_products_may_be_empty() {
    let Some(device) = gpu() else { return };
    for dtype in [DType::F32, DType::BF16] {
        agree(device, tolerance, lora_products((0, 24, 40, 8), dtype, true, 1));
        agree(device, tolerance, weight_gradients((0, 24, 40), [dtype; 2], 1));
        agree(device, tolerance, products((0, 24, 40), Kind::Dense(dtype), [dtype; 2], 1));
    }
}

/// On views that begin between the 16-byte pieces, which the fast kernels do not take.
#[test]
fn gpu_views_match_the_cpu() {
    let Some(device) = gpu() else { return };
    agree(device, tolerance, |device| {
        // Rows of 8 bytes.
        let of = |shape: [usize; 2], seed| {
            let tensor = random_as(&shape, DType::BF16, seed).to_device(device, TAG).unwrap();
            tensor.rows(1, shape[0] - 1).unwrap()
        };
        let (x, a, u) = (of([30, 4], 1), of([9, 4], 2), of([30, 8], 3));
        let mut dx = random_as(&[29, 4], DType::BF16, 4).to_device(device, TAG).unwrap();
        lora::dropped_add(&u, &a, MASK, &mut dx).unwrap();
        vec![lora::down(&x, &a, 1.0, Some(MASK), TAG).unwrap(), weight_grad(&u, &x, 1.0).unwrap(), dx]
    });
}

#[test]
fn lora_products_are_those_of_their_parts() {
    let (x, a, u) = (random(&[20, 12], 1), random(&[3, 12], 2), random(&[20, 3], 3));
    let m_x = dropout::apply(&x, MASK).unwrap();
    let expected = forward(&m_x, &Weight::Dense(a.clone()), TAG).unwrap();
    same(&lora::down(&x, &a, 1.0, Some(MASK), TAG).unwrap(), &expected, 0.0);
    let expected = weight_grad(&u, &m_x, 2.0).unwrap();
    same(&lora::weight_grad(&u, &x, 2.0, Some(MASK)).unwrap(), &expected, 0.0);
    let mut dx = Tensor::zeros(&[20, 12], DType::F32, Device::Cpu, TAG).unwrap();
    lora::dropped_add(&u, &a, MASK, &mut dx).unwrap();
    let through = input_grad(&u, &Weight::Dense(a.clone()), 1.0).unwrap();
    same(&dx, &dropout::apply(&through, MASK).unwrap(), 0.0);

    assert!(lora::down(&x, &u, 1.0, None, TAG).is_err());
    assert!(lora::grad_down(&x, &a, 1.0, TAG).is_err());
    assert!(lora::weight_grad(&a, &x, 1.0, None).is_err());
    assert!(lora::dropped_add(&u, &a, MASK, &mut random(&[20, 11], 1)).is_err());
    assert!(lora::down(&x, &a, 1.0, Some(Mask { probability: 1.0, ..MASK }), TAG).is_err());
}
