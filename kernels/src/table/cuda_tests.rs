//! 8-bit tables on the GPU against the CPU's.

use super::*;
use crate::{
    cross_entropy::{IGNORE, Output, Wanted, head_loss},
    testing::{FLOATS, gpu, random, random_as, same},
};
use proptest::prelude::*;

const TAG: Tag = Tag::Workspace;

fn on(tensor: &Tensor, device: Device) -> Tensor {
    tensor.to_device(device, TAG).unwrap()
}

fn moved(rows: &Rows8, device: Device) -> Rows8 {
    Rows8 { codes: on(&rows.codes, device), scales: on(&rows.scales, device) }
}

fn bits(tensor: &Tensor) -> Vec<u8> {
    on(tensor, Device::Cpu).bytes().unwrap().to_vec()
}

fn widths() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..1500, (1usize..300).prop_map(|n| 8 * n)]
}

proptest! {
    #![proptest_config(crate::testing::cases(32))]

    /// The same bytes: quantized, read back in every type, and gathered.
    #[test]
    fn gpu_tables_have_the_bytes_of_the_cpu(
        vocab in 1usize..60, width in widths(), from in 0usize..3, to in 0usize..3, first in 0usize..60, odd: bool, seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        // A view that begins at any row of a larger table.
        let whole = random_as(&[vocab + 1, width], FLOATS[from], seed);
        let skip = usize::from(odd);
        let (x, there) = (whole.rows(skip, vocab).unwrap(), on(&whole, gpu).rows(skip, vocab).unwrap());
        let (expected, found) = (Rows8::quantize(&x, TAG).unwrap(), Rows8::quantize(&there, TAG).unwrap());
        prop_assert!(bits(&found.codes) == bits(&expected.codes), "codes");
        prop_assert!(bits(&found.scales) == bits(&expected.scales), "scales");
        let first = first % vocab;
        let rows = |table: &Rows8| bits(&table.rows(first, vocab - first, FLOATS[to], TAG).unwrap());
        prop_assert!(rows(&found) == rows(&expected), "rows");
        let ids: Vec<i32> = (0..40).map(|i| ((seed >> i) as usize % vocab) as i32).collect();
        let gathered = |table: &Rows8| bits(&gather(&ids, &Table::Rows8(table.clone()), FLOATS[to]).unwrap());
        prop_assert!(gathered(&found) == gathered(&expected), "gathered");
    }

    /// Few rows, which the codes are multiplied with, and many, for which slices are dequantized.
    #[test]
    fn gpu_products_with_tables_match_the_cpu(
        t in prop_oneof![1usize..18, 1usize..150], vocab in 1usize..400, width in widths(), dtype in 0usize..3, seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let dtype = FLOATS[dtype];
        let (x, grad) = (random_as(&[t, width], dtype, seed), random_as(&[t, vocab], dtype, seed ^ 1));
        let rows = Rows8::quantize(&random_as(&[vocab, width], DType::BF16, seed ^ 2), TAG).unwrap();
        let (there, here) = (Table::Rows8(moved(&rows, gpu)), Table::Rows8(rows));
        let tolerance = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
        same(&project(&on(&x, gpu), &there).unwrap(), &project(&x, &here).unwrap(), tolerance);
        same(&input_grad(&on(&grad, gpu), &there).unwrap(), &input_grad(&grad, &here).unwrap(), tolerance);
    }

    /// The columns that a copy is not about stay as they are.
    #[test]
    fn gpu_columns_match_the_cpu(
        rows in 1usize..20, widths in (1usize..900, 1usize..900), firsts in (0usize..900, 0usize..900), whole: bool,
        dtype in 0usize..3, seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let round = |n: usize| if whole { n / 8 * 8 } else { n };
        let (from_width, to_width) = (round(widths.0).max(8), round(widths.1).max(8));
        let (from_first, to_first) = (round(firsts.0 % from_width), round(firsts.1 % to_width));
        let count = round((from_width - from_first).min(to_width - to_first));
        let from = random_as(&[rows, from_width], FLOATS[dtype], seed);
        let mut expected = random_as(&[rows, to_width], FLOATS[dtype], seed ^ 1);
        let mut found = on(&expected, gpu);
        columns(&from, from_first, &mut expected, to_first, count).unwrap();
        columns(&on(&from, gpu), from_first, &mut found, to_first, count).unwrap();
        prop_assert!(bits(&found) == bits(&expected));
    }
}

/// Several slices, the last of them short, and no alignment from slice to slice.
#[test]
fn gpu_tables_of_several_slices_match_the_cpu() {
    let Some(gpu) = gpu() else { return };
    for (dtype, vocab) in [(DType::BF16, 9001), (DType::F32, 6008)] {
        let width = 8192;
        assert!(slices(vocab, width, dtype, gpu).count() > 1);
        let h = random_as(&[33, width], dtype, 1);
        // Logits of about 1: of large ones the softmax is nearly a maximum, which rounding can turn.
        let mut head = random(&[vocab, width], 2);
        head.as_mut_slice::<f32>().unwrap().iter_mut().for_each(|x| *x *= 0.01);
        let rows = Rows8::quantize(&head, TAG).unwrap();
        let labels: Vec<i32> = (0..33).map(|i| if i % 5 == 1 { IGNORE } else { i * 180 }).collect();
        let wanted = Wanted { hidden: true, ..Wanted::default() };
        let found = head_loss(&on(&h, gpu), &Table::Rows8(moved(&rows, gpu)), &labels, 0.5, wanted).unwrap();
        let expected = head_loss(&h, &Table::Rows8(rows), &labels, 0.5, wanted).unwrap();
        let tolerance = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
        let nll = |output: &Output| Tensor::from_slice(&output.nll().unwrap(), &[33], TAG).unwrap();
        same(&nll(&found), &nll(&expected), tolerance);
        same(&found.dhidden.unwrap(), &expected.dhidden.unwrap(), tolerance);
    }
}

/// Zeros, numbers too small for a scale, and what is none; pinned host memory.
#[test]
fn gpu_odd_rows_have_the_bytes_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let mut values = vec![0f32; 8 * 64];
    values[64] = 1e-40;
    values[128] = -3e-38;
    (values[192], values[256], values[320]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    (0..64).for_each(|i| values[384 + i] = (i as f32 - 32.0) / 2.0);
    values[384] = 127.0;
    values[448] = f32::MAX;
    let x = Tensor::from_slice(&values, &[8, 64], TAG).unwrap();
    let (expected, found) = (Rows8::quantize(&x, TAG).unwrap(), Rows8::quantize(&on(&x, gpu), TAG).unwrap());
    assert_eq!(bits(&found.codes), bits(&expected.codes));
    let scales = |table: &Rows8| on(&table.scales, Device::Cpu).to_f32().unwrap().into_owned();
    for (a, b) in scales(&found).iter().zip(scales(&expected)) {
        assert!(a.to_bits() == b.to_bits(), "{a} for {b}");
    }
    let pinned = Table::Rows8(expected.clone()).to_pinned(gpu).unwrap();
    let ids = [7, 0, 6, 2, 6];
    let rows = |table: &Table| bits(&gather(&ids, table, DType::BF16).unwrap());
    assert!(rows(&pinned) == rows(&Table::Rows8(expected)));
}
