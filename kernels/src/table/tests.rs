//! 8-bit tables on the CPU, against their definition in f64 and against dense ones.

use super::*;
use crate::{
    cross_entropy::{IGNORE, Wanted, head_loss},
    testing::{FLOATS, close, random, random_as, wide},
};
use proptest::prelude::*;

const TAG: Tag = Tag::Workspace;

/// The table that 8 bits stand for, in f32.
fn dense(rows: &Rows8) -> Tensor {
    rows.rows(0, rows.codes.shape()[0], DType::F32, TAG).unwrap()
}

proptest! {
    #[test]
    fn codes_are_the_nearest(vocab in 1usize..20, width in 1usize..90, dtype in 0usize..3, power in -30i32..30, seed: u64) {
        let mut x = random(&[vocab, width], seed);
        x.as_mut_slice::<f32>().unwrap().iter_mut().for_each(|x| *x *= 2f32.powi(power / 3));
        let x = x.into_dtype(FLOATS[dtype], TAG).unwrap();
        let table = Rows8::quantize(&x, TAG).unwrap();
        let (codes, scales) = (table.codes.as_slice::<i8>().unwrap(), table.scales.as_slice::<f32>().unwrap());
        for (row, x) in wide(&x).chunks_exact(width).enumerate() {
            let top = x.iter().fold(0f64, |top, x| top.max(x.abs()));
            let scale = top / 127.0;
            prop_assert!((f64::from(scales[row]) - scale).abs() <= 1e-7 * scale);
            let codes = &codes[row * width..][..width];
            prop_assert_eq!(codes.iter().map(|code| code.unsigned_abs()).max(), Some(127));
            for (&code, x) in codes.iter().zip(x) {
                prop_assert!((f64::from(code) - x / scale).abs() <= 0.5 + 1e-4, "{code} for {}", x / scale);
            }
        }
        let expected: Vec<f64> = codes.iter().enumerate().map(|(i, &c)| f64::from(c) * f64::from(scales[i / width])).collect();
        close(&dense(&table), &expected, 1e-7);
    }

    /// Slices of one row and more: a table is as good as the dense one that it stands for.
    #[test]
    fn products_are_those_of_the_dense_table(t in 0usize..6, vocab in 1usize..50, width in 1usize..40, seed: u64) {
        let (x, grad) = (random(&[t, width], seed), random(&[t, vocab], seed ^ 1));
        let rows = Rows8::quantize(&random(&[vocab, width], seed ^ 2), TAG).unwrap();
        let (eight, dense) = (Table::Rows8(rows.clone()), Table::Dense(dense(&rows)));
        close(&project(&x, &eight).unwrap(), &wide(&project(&x, &dense).unwrap()), 1e-5);
        close(&input_grad(&grad, &eight).unwrap(), &wide(&input_grad(&grad, &dense).unwrap()), 1e-5);
        let ids: Vec<i32> = (0..t).map(|i| ((seed >> i) as usize % vocab) as i32).collect();
        for dtype in FLOATS {
            let (found, expected) = (gather(&ids, &eight, dtype).unwrap(), gather(&ids, &dense, dtype).unwrap());
            prop_assert_eq!((found.bytes().unwrap(), found.dtype()), (expected.bytes().unwrap(), dtype));
        }
    }
}

/// A table of several slices, under the loss: the dequantized head gives the same.
#[test]
fn the_loss_is_that_of_the_dequantized_head() {
    let (rows, width, vocab) = (70, 33, 21_001);
    assert!(slices(vocab, width, DType::F32, Device::Cpu).count() > 2);
    let h = random(&[rows, width], 1);
    let eight = Rows8::quantize(&random_as(&[vocab, width], DType::BF16, 2), TAG).unwrap();
    let labels: Vec<i32> = (0..rows as i32).map(|i| if i % 7 == 3 { IGNORE } else { i * 300 }).collect();
    let wanted = Wanted { hidden: true, ..Wanted::default() };
    let expected = head_loss(&h, &Table::Dense(dense(&eight)), &labels, 0.5, wanted).unwrap();
    let found = head_loss(&h, &Table::Rows8(eight), &labels, 0.5, wanted).unwrap();
    for (a, b) in found.nll().unwrap().iter().zip(expected.nll().unwrap()) {
        assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{a} for {b}");
    }
    close(&found.dhidden.unwrap(), &wide(&expected.dhidden.unwrap()), 1e-4);
}

#[test]
fn slices_cover_the_table() {
    let all = |vocab, width, dtype, device| slices(vocab, width, dtype, device).collect::<Vec<_>>();
    let large = all(128_256, 4096, DType::BF16, Device::Cuda(0));
    assert_eq!((large.len(), large[1], large[15]), (16, (8192, 8192), (122_880, 5376)));
    assert_eq!(all(3, 1 << 30, DType::F32, Device::Cpu), [(0, 1), (1, 1), (2, 1)]);
    assert_eq!(all(0, 8, DType::F32, Device::Cpu), []);
}

/// Rows of zeros, of numbers too small for a scale, and of what is none.
#[test]
fn odd_rows() {
    let values = [0.0, -0.0, 1e-40, -3e-38, f32::NAN, 1.0, f32::INFINITY, 2.0, 3.0, f32::NEG_INFINITY, -2.0, 254.0];
    let table = Rows8::quantize(&Tensor::from_slice(&values, &[6, 2], TAG).unwrap(), TAG).unwrap();
    assert_eq!(table.codes.as_slice::<i8>().unwrap(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1, 127]);
    let scales = table.scales.as_slice::<f32>().unwrap();
    assert!(scales[..2] == [0.0, 0.0] && scales[2..5].iter().all(|scale| scale.is_nan()) && scales[5] == 2.0);
    let back = dense(&table);
    let back = back.as_slice::<f32>().unwrap();
    assert!(back[..4] == [0.0; 4] && back[4..10].iter().all(|x| x.is_nan()) && back[10..] == [-2.0, 254.0]);
}

/// Ties go to the even code.
#[test]
fn ties_are_even() {
    let values = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5];
    let table = Rows8::quantize(&Tensor::from_slice(&values, &[1, 6], TAG).unwrap(), TAG).unwrap();
    assert_eq!(table.codes.as_slice::<i8>().unwrap(), [127, 0, 2, 2, 0, -2]);
}

#[test]
fn misuse_is_named() {
    let table = Table::Rows8(Rows8::quantize(&random(&[5, 3], 1), TAG).unwrap());
    for bad in [5, -1] {
        let error = gather(&[0, bad], &table, DType::F32).unwrap_err().to_string();
        assert!(error.contains(&bad.to_string()) && error.contains("position 1"), "{error}");
    }
    assert!(project(&random(&[2, 4], 1), &table).is_err());
    assert!(input_grad(&random(&[2, 4], 1), &table).is_err());
    let Table::Rows8(rows) = &table else { unreachable!("made above") };
    assert!(rows.rows(4, 2, DType::F32, TAG).is_err() && rows.rows(usize::MAX, 2, DType::F32, TAG).is_err());
    assert!(Rows8::quantize(&rows.codes, TAG).is_err());
}
