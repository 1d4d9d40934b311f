//! Loss and gradient on the GPU against those on the CPU.

use super::{
    cpu::row_loss,
    cuda::{Labels, chunk_rows, loss},
    *,
};
use crate::{
    embedding::cuda::upload,
    testing::{FLOATS, gpu, random, random_as, same},
};
use nibble_runtime::DType;
use proptest::prelude::*;

#[test]
fn chunks_are_whole_tiles() {
    assert_eq!([128_256, 32_000, 768].map(|vocab| chunk_rows(vocab, 100)), [256, 1024, 8192]);
    assert_eq!(
        [2048, 4096, 8191, 8192, 1 << 20].map(|tokens| chunk_rows(128_256, tokens)),
        [256, 512, 768, 1024, 1024]
    );
    assert_eq!(chunk_rows(1 << 30, 1), 1);
}

/// Rows of logits, each labelled, on both devices. Values lie on a coarse grid, so that maxima are met more than once.
fn check_rows(gpu: Device, rows: usize, vocab: usize, wanted: Option<DType>, scale: f32, seed: u64) {
    println!("[{rows}, {vocab}], gradient {wanted:?}, scale {scale}");
    let mut logits = random(&[rows, vocab], seed);
    let values = logits.as_mut_slice::<f32>().unwrap();
    values.iter_mut().for_each(|x| *x = (*x * 4.0).round() / 2.0);
    // Half of the labels are a most likely token, the others any.
    let labels: Vec<i32> = (0..rows)
        .map(|row| {
            let row_values = &values[row * vocab..][..vocab];
            let any = (seed as usize).wrapping_add(row * 7919) % vocab;
            let top = (0..vocab).fold(0, |best, i| if row_values[i] > row_values[best] { i } else { best });
            let last = (0..vocab).rfind(|&i| row_values[i] == row_values[top]).unwrap_or(top);
            [any, top, last][row % 3] as i32
        })
        .collect();

    // Written to the rows in reverse, with one row between that is not part of the chunk.
    let places: Vec<i32> = (0..rows as i32).rev().map(|row| 2 * row).collect();
    let chunk = Labels { labels: upload(&labels, gpu).unwrap(), rows: upload(&places, gpu).unwrap() };
    let zeros = |dtype| Tensor::zeros(&[2 * rows], dtype, gpu, Tag::Workspace).unwrap();
    let mut output = Output { nll: zeros(DType::F32), correct: zeros(DType::U8), dhidden: None, dhead: None };
    let on_gpu = logits.to_device(gpu, Tag::Workspace).unwrap();
    let grad = loss(on_gpu, &chunk, wanted, scale, &mut output).unwrap();
    let (nll, correct) = (output.nll().unwrap(), output.correct().unwrap());

    let mut expected = logits;
    let values = expected.as_mut_slice::<f32>().unwrap();
    for (row, logits) in values.chunks_exact_mut(vocab).enumerate() {
        let (row_nll, row_correct) = row_loss(logits, labels[row] as usize, scale);
        let place = places[row] as usize;
        assert!((nll[place] - row_nll).abs() <= 2e-6 * (1.0 + row_nll), "row {row}: {} for {row_nll}", nll[place]);
        assert_eq!(correct[place], row_correct, "row {row}");
        assert_eq!((nll[place + 1], correct[place + 1]), (0.0, false));
    }
    match (wanted, grad) {
        (Some(dtype), Some(grad)) => {
            let tolerance = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
            same(&grad, &expected.into_dtype(dtype, Tag::Workspace).unwrap(), tolerance);
        }
        (wanted, grad) => assert!(wanted.is_none() && grad.is_none()),
    }
}

proptest! {
    #![proptest_config(crate::testing::cases(32))]

    #[test]
    fn gpu_rows_match_the_cpu(
        rows in 1usize..20, vocab in prop_oneof![1usize..9000, (1usize..1200).prop_map(|n| 8 * n)], wanted in 0usize..4,
        scale in prop_oneof![Just(1f32), 0.001f32..2.0], seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        check_rows(gpu, rows, vocab, FLOATS.get(wanted).copied(), scale, seed);
    }

    /// The whole: gathered rows, several chunks' worth of code paths, products, scattered gradients.
    #[test]
    fn gpu_head_loss_matches_the_cpu(
        rows in 1usize..70, width in 1usize..20, vocab in 1usize..300, dtype in 0usize..3, hidden: bool, head: bool,
        trained: bool, seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let dtype = FLOATS[dtype];
        // Widths that matrix products take: sixteen at a time.
        let h = random_as(&[rows, 16 * width], dtype, seed);
        // One that trains is in f32, here with numbers of the type that it is rounded to.
        let w = random_as(&[vocab, 16 * width], dtype, seed ^ 1);
        let w = if trained { w.into_dtype(DType::F32, Tag::Workspace).unwrap() } else { w };
        let label = |i: usize| if (seed >> (i % 60)) & 3 == 0 { IGNORE } else { ((i * 31) % vocab) as i32 };
        let labels: Vec<i32> = (0..rows).map(label).collect();
        let wanted = Wanted { hidden, head, at_once: None };
        let on = |x: &Tensor| x.to_device(gpu, Tag::Workspace).unwrap();
        let found = head_loss(&on(&h), &Table::Dense(on(&w)), &labels, 0.25, wanted).unwrap();
        let expected = head_loss(&h, &Table::Dense(w), &labels, 0.25, wanted).unwrap();
        same(&found.nll, &expected.nll, 1e-5);
        prop_assert_eq!((found.dhidden.is_some(), found.dhead.is_some()), (hidden, head));
        let tolerance = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
        for (found, expected) in [(&found.dhidden, &expected.dhidden), (&found.dhead, &expected.dhead)] {
            if let (Some(found), Some(expected)) = (found, expected) {
                // With one token in the vocabulary the gradient is rounding noise on both sides.
                if vocab > 1 {
                    same(found, expected, tolerance);
                }
            }
        }
    }
}

/// A vocabulary as wide as Llama 3's, and one token more (no alignment); the first that a cluster takes, and one whose last
/// part is short; more than clusters hold.
#[test]
fn gpu_rows_of_large_vocabularies() {
    let Some(gpu) = gpu() else { return };
    for vocab in [128_256, 128_257, 65_536, 151_944, 500_000] {
        for wanted in [None, Some(DType::F32), Some(DType::BF16)] {
            check_rows(gpu, 5, vocab, wanted, 0.5, 11);
        }
    }
}

/// Logits of −∞ are tokens that cannot be; a row that is not a number says so.
#[test]
fn gpu_rows_with_infinite_logits() {
    let Some(gpu) = gpu() else { return };
    let logits = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY, 2.0, f32::NAN, 1.0, 0.0, 0.0];
    let logits = Tensor::from_slice(&logits, &[2, 4], Tag::Workspace).unwrap().to_device(gpu, Tag::Workspace).unwrap();
    let chunk = Labels { labels: upload(&[3, 1], gpu).unwrap(), rows: upload(&[0, 1], gpu).unwrap() };
    let zeros = |dtype| Tensor::zeros(&[2], dtype, gpu, Tag::Workspace).unwrap();
    let mut output = Output { nll: zeros(DType::F32), correct: zeros(DType::U8), dhidden: None, dhead: None };
    let grad = loss(logits, &chunk, Some(DType::F32), 1.0, &mut output).unwrap().unwrap();
    let nll = output.nll().unwrap();
    assert!((nll[0] - (1.0 + (-1f32).exp()).ln()).abs() < 1e-6 && nll[1].is_nan(), "{nll:?}");
    let grad = grad.rows(0, 1).unwrap().to_device(Device::Cpu, Tag::Workspace).unwrap();
    let grad = grad.as_slice::<f32>().unwrap();
    assert!(grad[0] == 0.0 && grad[2] == 0.0 && (grad[1] + grad[3]).abs() < 1e-6, "{grad:?}");
}
