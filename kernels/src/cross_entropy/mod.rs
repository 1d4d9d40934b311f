//! The language-model head and its cross-entropy loss, in chunks of rows: all logits are never held at once.
//!
//! For the hidden states `h` `[T, D]` and the head `W` `[V, D]`: `logits = h · Wᵀ`, and for each row with a label
//! `nll = logsumexp(logits) − logits[label]`. Rows labelled [`IGNORE`] cost nothing. The gradient is made in the same
//! pass, while a chunk's logits are at hand: `dlogits = scale · (softmax − onehot)`, `dh = dlogits · W`,
//! `dW = dlogitsᵀ · h`.
//!
//! On a GPU logits are f32 whatever the type of the hidden states, and `dlogits` is rounded to that type; so is, once, a head
//! in f32.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;

use crate::table::Table;
use nibble_runtime::{Device, Error, Result, Tag, Tensor};

/// A label that takes no part in the loss.
pub const IGNORE: i32 = -100;

/// Which gradients to make, and within what memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Of the hidden states.
    pub hidden: bool,
    /// Of the head.
    pub head: bool,
    /// Tokens that the caller takes at a time, if not all: logits then take as much memory as for a batch of these.
    pub at_once: Option<usize>,
}

/// Loss of every labelled row, and gradients. Everything is on the device of the hidden states; reading the loss waits
/// for it.
#[derive(Debug)]
pub struct Output {
    /// f32 `[T]`; 0 where ignored.
    nll: Tensor,
    /// u8 `[T]`; 1 where ignored.
    correct: Tensor,
    /// Gradient of `scale · Σ nll` by the hidden states, `[T, D]` in their type.
    pub dhidden: Option<Tensor>,
    /// And by the head, f32 `[V, D]`.
    pub dhead: Option<Tensor>,
}

impl Output {
    /// Negative log-likelihood of each row's label; 0 where ignored.
    ///
    /// # Errors
    /// A kernel failed.
    pub fn nll(&self) -> Result<Vec<f32>> {
        let nll = self.nll.clone().into_device(Device::Cpu, Tag::Workspace)?;
        Ok(nll.as_slice::<f32>()?.to_vec())
    }

    /// Whether the label is the row's most likely token, and the first of them; true where ignored.
    ///
    /// # Errors
    /// A kernel failed.
    pub fn correct(&self) -> Result<Vec<bool>> {
        let correct = self.correct.clone().into_device(Device::Cpu, Tag::Workspace)?;
        Ok(correct.as_slice::<u8>()?.iter().map(|&correct| correct != 0).collect())
    }

    /// Σ nll, in f64 and in order.
    ///
    /// # Errors
    /// A kernel failed.
    pub fn sum(&self) -> Result<f64> {
        Ok(self.nll()?.iter().map(|&nll| f64::from(nll)).sum())
    }
}

/// Loss of `hidden` `[T, D]` against `labels` `[T]` under the head `[V, D]`; gradients are those of `scale · Σ nll`.
///
/// # Errors
/// A label is neither [`IGNORE`] nor a token, or shapes do not fit.
pub fn head_loss(hidden: &Tensor, head: &Table, labels: &[i32], scale: f32, wanted: Wanted) -> Result<Output> {
    let op = "cross-entropy";
    let ((rows, width), (vocab, inner)) = (hidden.dims2(op)?, head.dims()?);
    if labels.len() != rows || width != inner {
        let what = format!("hidden {:?}, {} labels, head [{vocab}, {inner}]", hidden.shape(), labels.len());
        return Err(Error::shape(op, what));
    }
    let valid = |label: i32| label == IGNORE || usize::try_from(label).is_ok_and(|label| label < vocab);
    if let Some(row) = labels.iter().position(|&label| !valid(label)) {
        let what = format!("label {} of row {row} is outside of the vocabulary of {vocab}", labels[row]);
        return Err(Error::invalid(op, what));
    }
    let labelled: Vec<usize> = (0..rows).filter(|&row| labels[row] != IGNORE).collect();
    match hidden.device() {
        Device::Cpu => cpu::head_loss(hidden, head, labels, &labelled, scale, wanted),
        Device::Cuda(_) => cuda::head_loss(hidden, head, labels, &labelled, scale, wanted),
    }
}

/// Rows of a batch of `tokens` whose logits are held at a time, on the CPU or on a GPU.
pub fn chunk_rows(vocab: usize, tokens: usize, on_cpu: bool) -> usize {
    if on_cpu { cpu::chunk_rows(vocab) } else { cuda::chunk_rows(vocab, tokens) }
}

#[cfg(test)]
mod tests {
    use super::{cpu::CHUNK, *};
    use crate::testing::{close, close_beyond, numeric_gradient, random, wide};
    use proptest::prelude::*;

    fn reference(h: &[f64], w: &[f64], labels: &[i32], width: usize) -> Vec<f64> {
        let row = |(h, &label): (&[f64], &i32)| {
            if label == IGNORE {
                return 0.0;
            }
            let dot = |w: &[f64]| h.iter().zip(w).map(|(h, w)| h * w).sum::<f64>();
            let logits: Vec<f64> = w.chunks(width).map(dot).collect();
            logits.iter().map(|x| x.exp()).sum::<f64>().ln() - logits[label as usize]
        };
        h.chunks(width).zip(labels).map(row).collect()
    }

    const ALL: Wanted = Wanted { hidden: true, head: true, at_once: None };

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn matches_f64_and_finite_differences(rows in 1usize..6, width in 1usize..8, vocab in 1i32..12, seed: u64) {
            let (h, w) = (random(&[rows, width], seed), random(&[vocab as usize, width], seed ^ 1));
            let label = |i: usize| if i > 0 && (seed >> i) & 1 == 0 { IGNORE } else { (seed as i32).rem_euclid(vocab) };
            let targets: Vec<i32> = (0..rows).map(label).collect();
            let (hs, ws) = (wide(&h), wide(&w));
            let out = head_loss(&h, &Table::Dense(w), &targets, 0.5, ALL).unwrap();
            let nll = out.nll().unwrap();
            prop_assert_eq!(out.sum().unwrap(), nll.iter().map(|&nll| f64::from(nll)).sum::<f64>());
            let expected = reference(&hs, &ws, &targets, width);
            for (&found, expected) in nll.iter().zip(&expected) {
                prop_assert!((f64::from(found) - expected).abs() <= 2e-6 * (1.0 + expected.abs()));
            }
            let loss = |h: &[f64], w: &[f64]| 0.5 * reference(h, w, &targets, width).iter().sum::<f64>();
            // A label of nearly all probability: p - 1 is what rounding leaves of the two.
            let rounding = |factors: &[f64]| 1e-6 * factors.iter().map(|x| x * x).sum::<f64>().sqrt();
            if vocab > 1 {
                let (dh, dw) = (numeric_gradient(&hs, |h| loss(h, &ws)), numeric_gradient(&ws, |w| loss(&hs, w)));
                close_beyond(&out.dhidden.unwrap(), &dh, 1e-4, rounding(&ws));
                close_beyond(&out.dhead.unwrap(), &dw, 1e-4, rounding(&hs));
            }
        }
    }

    /// A vocabulary so large that the rows take several chunks.
    #[test]
    fn chunks_join() {
        let (rows, width, vocab) = (70, 4, CHUNK / 30);
        let (h, w) = (random(&[rows, width], 1), random(&[vocab, width], 2));
        let targets: Vec<i32> = (0..rows as i32).map(|i| if i % 7 == 3 { IGNORE } else { i * 1000 }).collect();
        let out = head_loss(&h, &Table::Dense(w.clone()), &targets, 1.0, ALL).unwrap();
        let expected = reference(&wide(&h), &wide(&w), &targets, width);
        for (row, (&found, expected)) in out.nll().unwrap().iter().zip(&expected).enumerate() {
            assert!((f64::from(found) - expected).abs() < 1e-4, "row {row}: {found} against {expected}");
        }
        let dhidden = out.dhidden.unwrap();
        let row = |row: usize| wide(&dhidden.rows(row, 1).unwrap());
        assert_eq!(row(3), [0.0; 4]);
        // The gradient of a row alone, computed in one chunk. Its terms over the vocabulary nearly cancel, so that the
        // order of the sum shows in the fifth digit.
        for i in [0, 31, 69] {
            let alone = head_loss(&h.rows(i, 1).unwrap(), &Table::Dense(w.clone()), &targets[i..=i], 1.0, ALL);
            close(&alone.unwrap().dhidden.unwrap(), &row(i), 3e-4);
        }
    }

    #[test]
    fn accuracy_is_that_of_the_first_most_likely_token() {
        let w = Tensor::from_slice(&[1f32, 2., 2.], &[3, 1], Tag::Workspace).unwrap();
        let h = Tensor::from_slice(&[1f32, 1., 1.], &[3, 1], Tag::Workspace).unwrap();
        let out = head_loss(&h, &Table::Dense(w), &[1, 2, IGNORE], 1.0, Wanted::default()).unwrap();
        assert_eq!(out.correct().unwrap(), [true, false, true]);
        assert!(out.dhidden.is_none() && out.dhead.is_none());
    }

    #[test]
    fn labels_outside_of_the_vocabulary_are_named() {
        let (h, w) = (random(&[2, 3], 1), Table::Dense(random(&[5, 3], 2)));
        for bad in [5, -1, -101] {
            let error = head_loss(&h, &w, &[0, bad], 1.0, Wanted::default()).unwrap_err().to_string();
            assert!(error.contains(&bad.to_string()) && error.contains("row 1"), "{error}");
        }
    }
}
