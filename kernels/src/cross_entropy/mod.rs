//! The language-model head and its cross-entropy loss, in chunks of rows: all logits are never held at once.
//!
//! For the hidden states `h` `[T, D]` and the head `W` `[V, D]`: `logits = h · Wᵀ`, and for each row with a label
//! `nll = logsumexp(logits) − logits[label]`. Rows labelled [`IGNORE`] cost nothing. The gradient is made in the same
//! pass, while a chunk's logits are at hand: `dlogits = scale · (softmax − onehot)`, `dh = dlogits · W`,
//! `dW = dlogitsᵀ · h`.

use crate::{
    linear::{Weight, forward, input_grad, weight_grad},
    math::{exp_sum, max, vectorized},
};
use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};
use rayon::prelude::*;

/// A label that takes no part in the loss.
pub const IGNORE: i32 = -100;

/// Logits held at a time: 24 MiB of f32, or one row if that is more.
const CHUNK: usize = 6 << 20;

/// Which gradients to make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Of the hidden states.
    pub hidden: bool,
    /// Of the head.
    pub head: bool,
}

/// Loss of every labelled row, and gradients.
#[derive(Debug)]
pub struct Output {
    /// Negative log-likelihood of each row's label; 0 where ignored.
    pub nll: Vec<f32>,
    /// Whether the label is the row's most likely token; true where ignored.
    pub correct: Vec<bool>,
    /// Gradient of `scale · Σ nll` by the hidden states, `[T, D]` in their type.
    pub dhidden: Option<Tensor>,
    /// And by the head, f32 `[V, D]`.
    pub dhead: Option<Tensor>,
}

impl Output {
    /// Σ nll, in f64 and in order.
    pub fn sum(&self) -> f64 {
        self.nll.iter().map(|&nll| f64::from(nll)).sum()
    }
}

/// Loss of `hidden` `[T, D]` against `labels` i32 `[T]` under the head `[V, D]`; gradients are those of
/// `scale · Σ nll`.
///
/// # Errors
/// A label is neither [`IGNORE`] nor a token, or shapes do not fit.
pub fn head_loss(hidden: &Tensor, head: &Weight, labels: &Tensor, scale: f32, wanted: Wanted) -> Result<Output> {
    let op = "cross-entropy";
    let ((rows, width), (vocab, inner)) = (hidden.dims2(op)?, head.dims()?);
    if labels.shape() != [rows] || width != inner {
        let what = format!("hidden {:?}, labels {:?}, head [{vocab}, {inner}]", hidden.shape(), labels.shape());
        return Err(Error::shape(op, what));
    }
    match hidden.device() {
        Device::Cpu => {}
        device => return Err(Error::NoKernel { op, device }),
    }
    let labels = labels.as_slice::<i32>()?;
    let valid = |label: i32| label == IGNORE || usize::try_from(label).is_ok_and(|label| label < vocab);
    if let Some(row) = labels.iter().position(|&label| !valid(label)) {
        let what = format!("label {} of row {row} is outside of the vocabulary of {vocab}", labels[row]);
        return Err(Error::invalid(op, what));
    }
    let labelled: Vec<usize> = (0..rows).filter(|&row| labels[row] != IGNORE).collect();
    let zeros = |shape: &[usize], tag| Tensor::zeros(shape, DType::F32, Device::Cpu, tag);
    let mut output = Output {
        nll: vec![0.0; rows],
        correct: vec![true; rows],
        dhidden: if wanted.hidden { Some(zeros(hidden.shape(), Tag::Workspace)?) } else { None },
        dhead: if wanted.head { Some(zeros(&[vocab, width], Tag::Gradients)?) } else { None },
    };
    let states = hidden.to_f32()?;
    let chunk_rows = (CHUNK / vocab.max(1)).clamp(1, 256);
    for chunk in labelled.chunks(chunk_rows) {
        let mut part = Tensor::empty(&[chunk.len(), width], DType::F32, Device::Cpu, Tag::Workspace)?;
        for (part, &row) in part.as_mut_slice::<f32>()?.chunks_exact_mut(width).zip(chunk) {
            part.copy_from_slice(&states[row * width..][..width]);
        }
        let mut logits = forward(&part, head, Tag::Workspace)?;
        let results: Vec<(f32, bool)> = logits
            .as_mut_slice::<f32>()?
            .par_chunks_mut(vocab)
            .zip(chunk)
            .map(|(logits, &row)| row_loss(logits, labels[row] as usize, scale))
            .collect();
        for (&row, (nll, correct)) in chunk.iter().zip(results) {
            (output.nll[row], output.correct[row]) = (nll, correct);
        }
        if let Some(dhidden) = &mut output.dhidden {
            let grads = input_grad(&logits, head, 1.0)?;
            let out = dhidden.as_mut_slice::<f32>()?;
            for (grad, &row) in grads.as_slice::<f32>()?.chunks_exact(width).zip(chunk) {
                out[row * width..][..width].copy_from_slice(grad);
            }
        }
        if let Some(dhead) = &mut output.dhead {
            let grad = weight_grad(&logits, &part, 1.0)?;
            crate::elementwise::add_assign(dhead, &grad)?;
        }
    }
    output.dhidden = output.dhidden.map(|grad| grad.into_dtype(hidden.dtype(), Tag::Workspace)).transpose()?;
    Ok(output)
}

/// Loss of one row; its logits become their scaled gradient.
fn row_loss(logits: &mut [f32], label: usize, scale: f32) -> (f32, bool) {
    vectorized(
        #[inline(always)]
        || {
            let (top, own) = (max(logits), logits[label]);
            let first_top = logits.iter().position(|&x| x == top);
            let sum = exp_sum(logits, top);
            let factor = scale / sum;
            logits.iter_mut().for_each(|p| *p *= factor);
            logits[label] -= scale;
            (sum.ln() + (top - own), first_top == Some(label))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, numeric_gradient, random, wide};
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

    fn labels(labels: &[i32]) -> Tensor {
        Tensor::from_slice(labels, &[labels.len()], Tag::Workspace).unwrap()
    }

    const ALL: Wanted = Wanted { hidden: true, head: true };

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn matches_f64_and_finite_differences(rows in 1usize..6, width in 1usize..8, vocab in 1i32..12, seed: u64) {
            let (h, w) = (random(&[rows, width], seed), random(&[vocab as usize, width], seed ^ 1));
            let label = |i: usize| if i > 0 && (seed >> i) & 1 == 0 { IGNORE } else { (seed as i32).rem_euclid(vocab) };
            let targets: Vec<i32> = (0..rows).map(label).collect();
            let (hs, ws) = (wide(&h), wide(&w));
            let out = head_loss(&h, &Weight::Dense(w), &labels(&targets), 0.5, ALL).unwrap();
            let nll = Tensor::from_slice(&out.nll, &[rows], Tag::Workspace).unwrap();
            let expected = reference(&hs, &ws, &targets, width);
            for (found, expected) in wide(&nll).iter().zip(&expected) {
                prop_assert!((found - expected).abs() <= 2e-6 * (1.0 + expected.abs()));
            }
            let loss = |h: &[f64], w: &[f64]| 0.5 * reference(h, w, &targets, width).iter().sum::<f64>();
            if vocab > 1 {
                close(&out.dhidden.unwrap(), &numeric_gradient(&hs, |h| loss(h, &ws)), 1e-4);
                close(&out.dhead.unwrap(), &numeric_gradient(&ws, |w| loss(&hs, w)), 1e-4);
            }
        }
    }

    /// A vocabulary so large that the rows take several chunks.
    #[test]
    fn chunks_join() {
        let (rows, width, vocab) = (70, 4, CHUNK / 30);
        let (h, w) = (random(&[rows, width], 1), random(&[vocab, width], 2));
        let targets: Vec<i32> = (0..rows as i32).map(|i| if i % 7 == 3 { IGNORE } else { i * 1000 }).collect();
        let out = head_loss(&h, &Weight::Dense(w.clone()), &labels(&targets), 1.0, ALL).unwrap();
        let expected = reference(&wide(&h), &wide(&w), &targets, width);
        for (row, (&found, expected)) in out.nll.iter().zip(&expected).enumerate() {
            assert!((f64::from(found) - expected).abs() < 1e-4, "row {row}: {found} against {expected}");
        }
        let dhidden = out.dhidden.unwrap();
        let row = |row: usize| wide(&dhidden.rows(row, 1).unwrap());
        assert_eq!(row(3), [0.0; 4]);
        // The gradient of a row alone, computed in one chunk. Its terms over the vocabulary nearly cancel, so that the
        // order of the sum shows in the fifth digit.
        for i in [0, 31, 69] {
            let alone =
                head_loss(&h.rows(i, 1).unwrap(), &Weight::Dense(w.clone()), &labels(&targets[i..=i]), 1.0, ALL);
            close(&alone.unwrap().dhidden.unwrap(), &row(i), 3e-4);
        }
    }

    #[test]
    fn accuracy_is_that_of_the_first_most_likely_token() {
        let w = Tensor::from_slice(&[1f32, 2., 2.], &[3, 1], Tag::Workspace).unwrap();
        let h = Tensor::from_slice(&[1f32, 1., 1.], &[3, 1], Tag::Workspace).unwrap();
        let out = head_loss(&h, &Weight::Dense(w), &labels(&[1, 2, IGNORE]), 1.0, Wanted::default()).unwrap();
        assert_eq!(out.correct, [true, false, true]);
        assert!(out.dhidden.is_none() && out.dhead.is_none());
    }

    #[test]
    fn labels_outside_of_the_vocabulary_are_named() {
        let (h, w) = (random(&[2, 3], 1), Weight::Dense(random(&[5, 3], 2)));
        for bad in [5, -1, -101] {
            let error = head_loss(&h, &w, &labels(&[0, bad]), 1.0, Wanted::default()).unwrap_err().to_string();
            assert!(error.contains(&bad.to_string()) && error.contains("row 1"), "{error}");
        }
    }
}
