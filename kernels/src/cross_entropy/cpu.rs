//! Head and loss on the CPU.

use super::{Output, Wanted};
use crate::{
    linear::weight_grad,
    math::{exp_sum, max, vectorized},
    table::{Table, input_grad, project},
};
use nibble_runtime::{DType, Device, Result, Tag, Tensor};
use rayon::prelude::*;

/// Logits held at a time: 12 MiB of f32, or one row if that is more.
pub(super) const CHUNK: usize = 3 << 20;

/// Rows of a chunk.
pub(super) fn chunk_rows(vocab: usize) -> usize {
    (CHUNK / vocab.max(1)).clamp(1, 256)
}

/// The loss of the `labelled` rows of `hidden` `[T, D]`; labels and shapes were checked.
pub(super) fn head_loss(
    hidden: &Tensor,
    head: &Table,
    labels: &[i32],
    labelled: &[usize],
    scale: f32,
    wanted: Wanted,
) -> Result<Output> {
    let ((rows, width), (vocab, _)) = (hidden.dims2("cross-entropy")?, head.dims()?);
    let zeros = |shape: &[usize], tag| Tensor::zeros(shape, DType::F32, Device::Cpu, tag);
    let (mut nll, mut correct) = (vec![0f32; rows], vec![1u8; rows]);
    let mut dhidden = if wanted.hidden { Some(zeros(hidden.shape(), Tag::Workspace)?) } else { None };
    let mut dhead = if wanted.head { Some(zeros(&[vocab, width], Tag::Gradients)?) } else { None };
    let states = hidden.to_f32()?;
    for chunk in labelled.chunks(chunk_rows(vocab)) {
        let mut part = Tensor::empty(&[chunk.len(), width], DType::F32, Device::Cpu, Tag::Workspace)?;
        for (part, &row) in part.as_mut_slice::<f32>()?.chunks_exact_mut(width).zip(chunk) {
            part.copy_from_slice(&states[row * width..][..width]);
        }
        let mut logits = project(&part, head)?;
        let results: Vec<(f32, bool)> = logits
            .as_mut_slice::<f32>()?
            .par_chunks_mut(vocab)
            .zip(chunk)
            .map(|(logits, &row)| row_loss(logits, labels[row] as usize, scale))
            .collect();
        for (&row, (loss, best)) in chunk.iter().zip(results) {
            (nll[row], correct[row]) = (loss, best.into());
        }
        if let Some(dhidden) = &mut dhidden {
            let grads = input_grad(&logits, head)?;
            let out = dhidden.as_mut_slice::<f32>()?;
            for (grad, &row) in grads.as_slice::<f32>()?.chunks_exact(width).zip(chunk) {
                out[row * width..][..width].copy_from_slice(grad);
            }
        }
        if let Some(dhead) = &mut dhead {
            let grad = weight_grad(&logits, &part, 1.0)?;
            crate::elementwise::add_assign(dhead, &grad)?;
        }
    }
    Ok(Output {
        nll: Tensor::from_slice(&nll, &[rows], Tag::Workspace)?,
        correct: Tensor::from_slice(&correct, &[rows], Tag::Workspace)?,
        dhidden: dhidden.map(|grad| grad.into_dtype(hidden.dtype(), Tag::Workspace)).transpose()?,
        dhead,
    })
}

/// Loss of one row; its logits become their scaled gradient.
pub(super) fn row_loss(logits: &mut [f32], label: usize, scale: f32) -> (f32, bool) {
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
