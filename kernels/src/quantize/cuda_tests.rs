//! The GPU gives the CPU's bytes.

use super::*;
use crate::{golden::Golden, testing};
use half::{bf16, f16};
use nibble_runtime::Element;
use proptest::prelude::*;

const ANY_SCALES: [Option<ScaleRounding>; 3] = [None, Some(ScaleRounding::Exact), Some(ScaleRounding::Stepped)];
const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn on_host(quantized: &QuantTensor) -> QuantTensor {
    quantized.to_device(Device::Cpu, Tag::Workspace).unwrap()
}

/// Every byte of what a quantized matrix holds, part by part.
fn parts(quantized: &QuantTensor) -> Vec<(&'static str, Vec<u8>)> {
    let bytes = |tensor: &Tensor| tensor.bytes().unwrap().to_vec();
    let mut parts = vec![("packed", bytes(&quantized.packed))];
    match &quantized.absmax {
        Absmax::Single(absmax) => parts.push(("absmax", bytes(absmax))),
        Absmax::Double { codes, absmax2, code, offset, .. } => {
            parts.extend([("offset", bytes(offset)), ("absmax2", bytes(absmax2)), ("codes", bytes(codes))]);
            parts.push(("map", bytes(code)));
        }
    }
    parts
}

#[track_caller]
fn assert_same(found: &QuantTensor, expected: &QuantTensor, what: &str) {
    for ((name, found), (_, expected)) in parts(&on_host(found)).iter().zip(parts(expected)) {
        let differing = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
        let first = found.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(found.len(), expected.len(), "{what}: {name}");
        assert!(
            differing == 0,
            "{what}: {differing} of {} bytes of {name} differ, the first at {first:?}",
            found.len()
        );
    }
}

/// Values of many magnitudes: blocks that are zero, subnormal, ordinary or huge, and the decision points themselves.
fn values(numel: usize, seed: u64) -> Vec<f32> {
    let normals = testing::random(&[numel], seed).as_slice::<f32>().unwrap().to_vec();
    let scale_of = |i: usize| match (i / 160 + seed as usize) % 8 {
        0 => 0.0,
        1 => 1e-41,
        2 => 1e-30,
        3 => 1e4,
        _ => 0.02,
    };
    let point = |i: usize| match i % 3 {
        0 => NF4_MIDPOINTS[i / 3 % 15],
        1 => -FP4_MIDPOINTS[i / 3 % 7],
        _ => 1.0,
    };
    let value = |(i, x): (usize, &f32)| if i % 1000 < 96 { point(i) } else { x * scale_of(i) };
    normals.iter().enumerate().map(value).collect()
}

fn check(gpu: Device, x: &Tensor, quant_type: QuantType, block: usize, scales: Option<ScaleRounding>, dtype: DType) {
    let what = format!("{quant_type} {block} {scales:?} of {} {:?} to {dtype}", x.dtype(), x.shape());
    let expected = quantize(x, quant_type, block, scales, dtype, Tag::Workspace).unwrap();
    let on_gpu = x.to_device(gpu, Tag::Workspace).unwrap();
    let found = quantize(&on_gpu, quant_type, block, scales, dtype, Tag::Workspace).unwrap();
    assert_same(&found, &expected, &what);
    let values = dequantize(&found, Tag::Workspace).unwrap().to_device(Device::Cpu, Tag::Workspace).unwrap();
    let expected = dequantize(&expected, Tag::Workspace).unwrap();
    assert_eq!((values.dtype(), values.shape()), (expected.dtype(), expected.shape()));
    assert!(values.bytes().unwrap() == expected.bytes().unwrap(), "{what}: dequantized");
}

#[test]
fn gpu_every_kind_of_quantization_gives_the_cpus_bytes() {
    let Some(gpu) = testing::gpu() else { return };
    // More than one piece of the mean, and a tail in every unit.
    let x = values(4096 * 257 + 77, 3);
    let x = Tensor::from_slice(&x, &[1, x.len()], Tag::Workspace).unwrap();
    for (i, shift) in (5..=12).enumerate() {
        for (j, quant_type) in [QuantType::Nf4, QuantType::Fp4].into_iter().enumerate() {
            for (k, scales) in ANY_SCALES.into_iter().enumerate() {
                let dtype = FLOATS[(i + j + k) % 3];
                let x = x.clone().into_dtype(FLOATS[(i + 2 * j + k) % 3], Tag::Workspace).unwrap();
                check(gpu, &x, quant_type, 1 << shift, scales, dtype);
            }
        }
    }
}

#[test]
fn gpu_goldens() {
    let Some(gpu) = testing::gpu() else { return };
    let golden = Golden::open("quant.safetensors");
    for case in super::tests::CASES {
        let x = golden.tensor(&format!("{case}.input"));
        for quant_type in [QuantType::Nf4, QuantType::Fp4] {
            for block in [64, 128] {
                check(gpu, &x, quant_type, block, None, x.dtype());
            }
        }
        check(gpu, &x, QuantType::Nf4, 64, Some(ScaleRounding::Exact), x.dtype());
        let exact = Some(ScaleRounding::Exact);
        let on_gpu = x.to_device(gpu, Tag::Workspace).unwrap();
        let found = on_host(&quantize(&on_gpu, QuantType::Nf4, 64, exact, x.dtype(), Tag::Workspace).unwrap());
        let Absmax::Double { codes, .. } = &found.absmax else { panic!("double quantization was asked for") };
        assert!(codes.as_slice::<u8>().unwrap() == golden.u8(&format!("{case}.nf4dq.absmax_u8")), "{case}");
        assert!(found.packed.as_slice::<u8>().unwrap() == golden.u8(&format!("{case}.nf4dq.packed")), "{case}");
    }
    let model = Golden::open("gqa_llama3rope/model/model.safetensors");
    let reference = Golden::open("gqa_llama3rope/model-bnb4/model.safetensors");
    for name in model.names().iter().filter(|name| name.contains("_proj.")) {
        let stepped = Some(ScaleRounding::Stepped);
        let x = model.tensor(name).to_device(gpu, Tag::Workspace).unwrap();
        let found = on_host(&quantize(&x, QuantType::Nf4, 64, stepped, DType::F32, Tag::Workspace).unwrap());
        let Absmax::Double { codes, .. } = &found.absmax else { panic!("double quantization was asked for") };
        assert!(found.packed.as_slice::<u8>().unwrap() == reference.u8(name), "{name}");
        assert!(codes.as_slice::<u8>().unwrap() == reference.u8(&format!("{name}.absmax")), "{name}");
    }
}

/// Every 16-bit number but NaN and infinity, in blocks of its neighbours and in blocks of far-off ones.
#[test]
fn gpu_every_16_bit_number() {
    fn numbers<T: Element>(all: impl Iterator<Item = T>, stride: usize) -> Tensor {
        let values: Vec<T> = all.collect();
        let count = values.len();
        let strided: Vec<T> = (0..count).map(|i| values[i * stride % count]).collect();
        Tensor::from_slice(&strided, &[1, count], Tag::Workspace).unwrap()
    }
    let Some(gpu) = testing::gpu() else { return };
    for stride in [1, 10_007] {
        let f16s = numbers((0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite()), stride);
        let bf16s = numbers((0..=u16::MAX).map(bf16::from_bits).filter(|x| x.is_finite()), stride);
        for (x, quant_type) in [(&f16s, QuantType::Nf4), (&f16s, QuantType::Fp4), (&bf16s, QuantType::Nf4)] {
            check(gpu, x, quant_type, 32, None, DType::F32);
            check(gpu, x, quant_type, 64, Some(ScaleRounding::Stepped), x.dtype());
        }
    }
}

#[test]
fn gpu_what_is_not_finite_shows() {
    let Some(gpu) = testing::gpu() else { return };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = vec![0.5; 256];
        values[70] = bad;
        let x = Tensor::from_slice(&values, &[1, 256], Tag::Workspace).unwrap().to_device(gpu, Tag::Workspace).unwrap();
        let back = |scales| {
            let quantized = quantize(&x, QuantType::Nf4, 64, scales, DType::F32, Tag::Workspace).unwrap();
            let back = dequantize(&quantized, Tag::Workspace).unwrap().to_device(Device::Cpu, Tag::Workspace).unwrap();
            back.as_slice::<f32>().unwrap().to_vec()
        };
        let single = back(None);
        assert!(single.iter().enumerate().all(|(i, x)| if i / 64 == 1 { x.is_nan() } else { *x == 0.5 }), "{bad}");
        assert!(back(Some(ScaleRounding::Exact)).iter().all(|x| x.is_nan()), "{bad}");
    }
}

#[test]
fn gpu_parts_on_two_devices_are_refused() {
    let Some(gpu) = testing::gpu() else { return };
    let x = testing::random(&[4, 64], 1);
    let host = quantize(&x, QuantType::Nf4, 64, None, DType::F32, Tag::Workspace).unwrap();
    let device = host.to_device(gpu, Tag::Workspace).unwrap();
    let mixed = QuantTensor { packed: device.packed.clone(), ..host.clone() };
    assert!(dequantize(&mixed, Tag::Workspace).is_err());
    assert!(device.read_f32(0, &mut [0.0]).is_err());
}

proptest! {
    #![proptest_config(crate::testing::cases(24))]

    #[test]
    fn gpu_any_matrix_gives_the_cpus_bytes(
        (rows, columns) in (1usize..40, 1usize..900), seed: u64, shift in 5u32..=12, kind in 0usize..18, from in 0usize..3,
        cut in 0usize..2,
    ) {
        let Some(gpu) = testing::gpu() else { return Ok(()) };
        let x = Tensor::from_slice(&values((rows + 1) * columns, seed), &[rows + 1, columns], Tag::Workspace).unwrap();
        let x = x.into_dtype(FLOATS[from], Tag::Workspace).unwrap();
        let quant_type = [QuantType::Nf4, QuantType::Fp4][kind % 2];
        let (scales, dtype) = (ANY_SCALES[kind / 2 % 3], FLOATS[kind / 6]);
        // A view that does not begin at a multiple of 16 bytes.
        let expected = quantize(&x.rows(cut, rows).unwrap(), quant_type, 1 << shift, scales, dtype, Tag::Workspace);
        let on_gpu = x.to_device(gpu, Tag::Workspace).unwrap().rows(cut, rows).unwrap();
        let found = quantize(&on_gpu, quant_type, 1 << shift, scales, dtype, Tag::Workspace).unwrap();
        assert_same(&found, &expected.unwrap(), &format!("{quant_type} {shift} {scales:?} {dtype}"));
        check(gpu, &x, quant_type, 1 << shift, scales, dtype);
    }
}
