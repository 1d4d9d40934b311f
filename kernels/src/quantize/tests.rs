//! Tests of 4-bit quantization: against the reference's files, and properties of arbitrary matrices.

use super::{scales::quantize_scales, *};
use crate::golden::{Golden, bits};
use proptest::prelude::*;

const TYPES: [QuantType; 2] = [QuantType::Nf4, QuantType::Fp4];

/// The file's inputs. Two are out of the ordinary and yet give the reference's bytes: `ties_f32` lies within one unit in
/// the last place of every NF4 midpoint once scaled, and `denorm_f32` is subnormal throughout, which both take for zeros.
pub(super) const CASES: [&str; 11] = [
    "gauss_f32",
    "gauss_f16",
    "gauss_bf16",
    "heavy_f32",
    "const_bf16",
    "tail_bf16",
    "big_f32",
    "tiny_f32",
    "zeros_f32",
    "denorm_f32",
    "ties_f32",
];

fn tensor(values: &[f32], rows: usize) -> Tensor {
    Tensor::from_slice(values, &[rows, values.len() / rows], Tag::Workspace).unwrap()
}

fn bytes(tensor: &Tensor) -> &[u8] {
    tensor.as_slice().unwrap()
}

fn single(quantized: &QuantTensor) -> &[f32] {
    match &quantized.absmax {
        Absmax::Single(absmax) => absmax.as_slice().unwrap(),
        Absmax::Double { .. } => panic!("double-quantized"),
    }
}

/// Codes of the scales, and their own scales.
fn double(absmax: &Absmax) -> (&[u8], &[f32]) {
    match absmax {
        Absmax::Double { codes, absmax2, .. } => (bytes(codes), absmax2.as_slice().unwrap()),
        Absmax::Single(_) => panic!("not double-quantized"),
    }
}

fn offset_of(absmax: &Absmax) -> f32 {
    match absmax {
        Absmax::Double { offset, .. } => offset.as_slice().unwrap()[0],
        Absmax::Single(_) => panic!("not double-quantized"),
    }
}

/// The elements' codes, unpacked.
fn unpack(packed: &[u8]) -> Vec<u8> {
    packed.iter().flat_map(|byte| [byte >> 4, byte & 15]).collect()
}

fn plain(x: &Tensor, quant_type: QuantType, block: usize) -> QuantTensor {
    quantize(x, quant_type, block, None, x.dtype(), Tag::Workspace).unwrap()
}

#[test]
fn code_books_are_the_references() {
    let golden = Golden::open("quant.safetensors");
    for quant_type in TYPES {
        assert_eq!(bits(&golden.f32(&format!("map.{quant_type}"))), bits(&quant_type.quant_map()));
        assert_eq!(quant_type.to_string().parse::<QuantType>().unwrap(), quant_type);
    }
    assert!("int4".parse::<QuantType>().is_err());
}

/// Elements whose code is not the reference's.
fn differing(mine: &QuantTensor, theirs: &[u8]) -> Vec<usize> {
    let (mine, theirs) = (unpack(bytes(&mine.packed)), unpack(theirs));
    assert_eq!(mine.len(), theirs.len());
    (0..mine.len()).filter(|&i| mine[i] != theirs[i]).collect()
}

/// Whether element `i` of `x`, scaled, is within one unit in the last place of a decision point. There the reference's
/// reciprocal (the GPU's `rcp.approx`, one unit off at times; checked on an H200) can decide otherwise than an exact one.
fn is_a_tie(x: &Tensor, quantized: &QuantTensor, i: usize) -> bool {
    let x = x.to_f32().unwrap()[i] * (1.0 / single(quantized)[i / quantized.block_size]);
    let near = |point: f32, x: f32| point.to_bits().abs_diff(x.to_bits()) <= 1;
    match quantized.quant_type {
        QuantType::Nf4 => NF4_MIDPOINTS.iter().any(|&point| near(point, x)),
        QuantType::Fp4 => FP4_MIDPOINTS.iter().any(|&point| near(point, x.abs())),
    }
}

/// Whether two codes' values are neighbours.
fn are_adjacent(quant_type: QuantType, a: u8, b: u8) -> bool {
    let rank = |code: u8| {
        let value = quant_type.values()[code as usize];
        quant_type.values().iter().filter(|&&other| other < value).count()
    };
    rank(a).abs_diff(rank(b)) == 1
}

#[test]
fn inputs_give_the_references_bytes() {
    let golden = Golden::open("quant.safetensors");
    for case in CASES {
        let x = golden.tensor(&format!("{case}.input"));
        for (quant_type, block) in TYPES.into_iter().flat_map(|t| [(t, 64), (t, 128)]) {
            let name = format!("{case}.{quant_type}.{block}");
            let quantized = plain(&x, quant_type, block);
            quantized.validate().unwrap();
            assert!(bits(single(&quantized)) == bits(&golden.f32(&format!("{name}.absmax"))), "{name}");
            let theirs = golden.u8(&format!("{name}.packed"));
            let differing = differing(&quantized, &theirs);
            // Quotients of two bf16 numbers meet FP4's decision points, which are simple fractions, now and then.
            let expected = match &name[..] {
                "gauss_bf16.fp4.64" => 1,
                "gauss_bf16.fp4.128" => 5,
                _ => 0,
            };
            assert_eq!(differing.len(), expected, "{name}");
            let (mine, codes) = (unpack(bytes(&quantized.packed)), unpack(&theirs));
            for i in differing {
                assert!(is_a_tie(&x, &quantized, i) && are_adjacent(quant_type, mine[i], codes[i]), "{name}: {i}");
            }
            // From the reference's codes, dequantized values are the reference's to the bit.
            let packed = golden.tensor(&format!("{name}.packed"));
            let theirs = QuantTensor { packed, ..quantized };
            let dequantized = dequantize(&theirs, Tag::Workspace).unwrap();
            let expected = golden.tensor(&format!("{name}.dequant"));
            assert_eq!((dequantized.dtype(), dequantized.shape()), (expected.dtype(), expected.shape()));
            assert!(dequantized.bytes().unwrap() == expected.bytes().unwrap(), "{name}");
        }
    }
}

/// The file comes from a GPU.
#[test]
fn double_quantization_follows_the_reference() {
    let golden = Golden::open("quant.safetensors");
    for case in CASES {
        let x = golden.tensor(&format!("{case}.input"));
        let get = |part: &str| golden.tensor(&format!("{case}.nf4dq.{part}"));
        let exact = Some(ScaleRounding::Exact);
        let quantized = quantize(&x, QuantType::Nf4, 64, exact, x.dtype(), Tag::Workspace).unwrap();
        quantized.validate().unwrap();
        assert_eq!(bytes(&quantized.packed), bytes(&get("packed")), "{case}");

        let (codes, absmax2) = double(&quantized.absmax);
        assert_eq!(codes, bytes(&get("absmax_u8")), "{case}");
        let offset = get("offset").as_slice::<f32>().unwrap()[0];
        // The file's mean was summed in f32, in an order of its own, and may differ in its last bits.
        let found = offset_of(&quantized.absmax);
        assert!((found - offset).abs() <= 4e-7 * offset.abs(), "{case}: {found}, expected {offset}");
        for (a, b) in absmax2.iter().zip(get("absmax2").as_slice::<f32>().unwrap()) {
            assert!((a - b).abs() <= 4e-7 * (a.abs() + offset), "{case}: {a}, expected {b}");
        }
        // With the file's mean, everything is the same.
        let absmax =
            quantize_scales(single(&plain(&x, QuantType::Nf4, 64)), offset, ScaleRounding::Exact, Tag::Workspace)
                .unwrap();
        assert_eq!(double(&absmax).0, bytes(&get("absmax_u8")), "{case}");
        assert_eq!(bits(double(&absmax).1), bits(get("absmax2").as_slice().unwrap()), "{case}");

        // From the reference's codes, every dequantized value is the reference's.
        let absmax = Absmax::Double {
            codes: get("absmax_u8"),
            absmax2: get("absmax2"),
            code: get("code"),
            offset: get("offset").reshape(&[1]).unwrap(),
            block_size: 256,
        };
        let shape = x.shape().to_vec();
        let theirs = QuantTensor::new_checked(get("packed"), absmax, QuantType::Nf4, 64, shape, x.dtype()).unwrap();
        let dequantized = dequantize(&theirs, Tag::Workspace).unwrap();
        assert_eq!(bits(&dequantized.to_f32().unwrap()), bits(&get("dequant").to_f32().unwrap()), "{case}");
    }
}

/// The checkpoint comes from a CPU. Its offsets are compared as part of the file by the tests of checkpoints.
#[test]
fn matrices_of_a_model_give_the_bytes_of_its_quantized_checkpoint() {
    let model = Golden::open("gqa_llama3rope/model/model.safetensors");
    let reference = Golden::open("gqa_llama3rope/model-bnb4/model.safetensors");
    let (mut matrices, mut otherwise) = (0, 0);
    for name in model.names().iter().filter(|name| name.contains("_proj.")) {
        let [stepped, exact] = [ScaleRounding::Stepped, ScaleRounding::Exact].map(|rounding| {
            quantize(&model.tensor(name), QuantType::Nf4, 64, Some(rounding), DType::BF16, Tag::Workspace).unwrap()
        });
        assert_eq!(bytes(&stepped.packed), reference.u8(name), "{name}");
        let (codes, absmax2) = double(&stepped.absmax);
        assert_eq!(codes, reference.u8(&format!("{name}.absmax")), "{name}");
        assert_eq!(bits(absmax2), bits(&reference.f32(&format!("{name}.nested_absmax"))), "{name}");
        matrices += 1;
        otherwise += codes.iter().zip(double(&exact.absmax).0).filter(|(a, b)| a != b).count();
    }
    assert_eq!((matrices, otherwise), (21, 20), "the two rules give different codes");
}

#[test]
fn bits_per_weight_are_what_the_format_says() {
    let x = tensor(&vec![1.0; 64 * 1024], 64);
    assert_eq!(plain(&x, QuantType::Nf4, 64).bits_per_weight(), 4.5);
    let double = quantize(&x, QuantType::Nf4, 64, Some(ScaleRounding::Exact), DType::BF16, Tag::Workspace).unwrap();
    let offset = 32.0 / x.numel() as f64;
    assert_eq!(double.bits_per_weight(), 4.0 + 8.0 / 64.0 + 32.0 / (64.0 * 256.0) + offset);
}

#[test]
fn bad_input_is_named() {
    let good = tensor(&[1.0; 64], 2);
    let quant = |x: &Tensor, block| quantize(x, QuantType::Nf4, block, None, DType::F32, Tag::Workspace);
    for block in [0, 16, 48, 8192] {
        assert!(quant(&good, block).unwrap_err().to_string().contains("power of two"));
    }
    for (at, bad) in [(63, f32::NAN), (40, f32::INFINITY), (0, f32::NEG_INFINITY)] {
        let mut values = vec![0.5; 64];
        values[at] = bad;
        let message = quant(&tensor(&values, 1), 32).unwrap_err().to_string();
        assert!(message.contains(&format!("element {at} is {bad}")), "{message}");
    }
    assert!(quant(&good.reshape(&[64]).unwrap(), 64).is_err());
    assert!(quant(&Tensor::from_slice(&[1u8; 4], &[2, 2], Tag::Workspace).unwrap(), 64).is_err());
    assert!(quant(&Tensor::from_slice::<f32>(&[], &[0, 4], Tag::Workspace).unwrap(), 64).is_err());
    assert!(quantize(&good, QuantType::Nf4, 64, None, DType::U8, Tag::Workspace).is_err());
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let x = tensor(&[1.0; 300], 3);
    let good = quantize(&x, QuantType::Nf4, 64, Some(ScaleRounding::Exact), DType::F32, Tag::Workspace).unwrap();
    let spoiled: [fn(&mut QuantTensor); 13] = [
        |q| q.shape = vec![3, 101],
        |q| q.shape = vec![300],
        |q| q.shape = vec![usize::MAX, 2],
        |q| q.shape = vec![0, 100],
        |q| q.block_size = 32,
        |q| q.block_size = 65,
        |q| q.dtype = DType::U8,
        |q| q.packed = q.packed.rows(0, 149).unwrap(),
        |q| q.absmax = Absmax::Single(tensor(&[1.0; 4], 4).reshape(&[4]).unwrap()),
        |q| q.absmax = Absmax::Single(tensor(&[1.0, 1.0, f32::NAN, 1.0, 1.0], 1)),
        |q| {
            if let Absmax::Double { block_size, .. } = &mut q.absmax {
                *block_size = 0;
            }
        },
        |q| {
            if let Absmax::Double { code, .. } = &mut q.absmax {
                *code = code.rows(0, 255).unwrap();
            }
        },
        |q| {
            if let Absmax::Double { offset, .. } = &mut q.absmax {
                *offset = offset.rows(0, 0).unwrap();
            }
        },
    ];
    good.validate().unwrap();
    for (i, spoil) in spoiled.iter().enumerate() {
        let mut bad = good.clone();
        spoil(&mut bad);
        assert!(bad.validate().is_err(), "{i}");
        // What a read relies on is checked by every read; the values of the scales are not.
        assert_eq!(bad.read_f32(0, &mut [0.0]).is_err(), i != 9, "{i}");
    }
    assert!(good.read_f32(299, &mut [0.0; 2]).is_err());
    assert!(good.read_f32(usize::MAX, &mut [0.0; 2]).is_err());
    good.read_f32(300, &mut []).unwrap();
}

/// A matrix with values of many magnitudes, some zero, its shape odd in places.
fn matrix() -> impl Strategy<Value = (Vec<f32>, usize)> {
    (1usize..6, 1usize..400).prop_flat_map(|(rows, columns)| {
        let value = prop_oneof![8 => -1f32..1.0, 1 => Just(0.0), 1 => -1e3f32..1e3];
        (prop::collection::vec(value, rows * columns), Just(rows))
    })
}

fn any_type() -> impl Strategy<Value = QuantType> {
    prop_oneof![Just(QuantType::Nf4), Just(QuantType::Fp4)]
}

fn any_scales() -> impl Strategy<Value = Option<ScaleRounding>> {
    prop_oneof![Just(None), Just(Some(ScaleRounding::Exact)), Just(Some(ScaleRounding::Stepped))]
}

fn any_dtype() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)]
}

proptest! {
    #[test]
    fn values_take_the_nearest_code((values, rows) in matrix(), quant_type in any_type(), shift in 5u32..=12) {
        let block = 1 << shift;
        let quantized = plain(&tensor(&values, rows), quant_type, block);
        let mut back = vec![0.0; values.len()];
        quantized.read_f32(0, &mut back).unwrap();
        for (x, back) in values.chunks(block).zip(back.chunks(block)) {
            let absmax = x.iter().fold(0f32, |max, x| x.abs().max(max));
            for (x, back) in x.iter().zip(back) {
                let distance = |value: f32| (value * absmax - x).abs();
                let least = quant_type.values().iter().map(|&value| distance(value)).fold(f32::INFINITY, f32::min);
                // FP4's decision points are midpoints rounded to a few digits.
                prop_assert!((back - x).abs() <= least + 2e-6 * absmax, "{x} became {back}");
            }
        }
    }

    #[test]
    fn quantizing_again_changes_nothing((values, rows) in matrix(), quant_type in any_type(), shift in 5u32..=12) {
        let once = plain(&tensor(&values, rows), quant_type, 1 << shift);
        let twice = plain(&dequantize(&once, Tag::Workspace).unwrap(), quant_type, 1 << shift);
        prop_assert_eq!(bits(single(&once)), bits(single(&twice)));
        // FP4's negative zero comes back as a zero.
        let codes = |q: &QuantTensor| unpack(bytes(&q.packed)).into_iter().map(move |code| match quant_type {
            QuantType::Fp4 if code == 8 => 0,
            _ => code,
        }).collect::<Vec<_>>();
        prop_assert_eq!(codes(&once), codes(&twice));
    }

    #[test]
    fn any_range_reads_as_a_piece_of_the_whole(
        (values, rows) in matrix(),
        (quant_type, dtype, shift, double) in (any_type(), any_dtype(), 5u32..=12, any_scales()),
        (a, b) in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
    ) {
        let x = tensor(&values, rows);
        let quantized = quantize(&x, quant_type, 1 << shift, double, dtype, Tag::Workspace).unwrap();
        let whole = dequantize(&quantized, Tag::Workspace).unwrap();
        prop_assert_eq!((whole.dtype(), whole.shape()), (dtype, x.shape()));
        let whole = whole.to_f32().unwrap();
        // The definition, element by element.
        let scales = quantized.scales().unwrap();
        let codes = unpack(bytes(&quantized.packed));
        let exact: Vec<f32> = (0..values.len())
            .map(|i| quant_type.values()[codes[i] as usize] * scales[i >> shift])
            .collect();
        let defined = Tensor::from_slice(&exact, x.shape(), Tag::Workspace).unwrap().cast(dtype, Tag::Workspace).unwrap();
        prop_assert_eq!(bits(&whole), bits(&defined.to_f32().unwrap()));

        let (a, b) = (a.index(values.len() + 1), b.index(values.len() + 1));
        let (start, end) = (a.min(b), a.max(b));
        let mut piece = vec![f32::NAN; end - start];
        quantized.read_f32(start, &mut piece).unwrap();
        prop_assert_eq!(bits(&piece), bits(&whole[start..end]));
    }
}
