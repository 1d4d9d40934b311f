//! What new adapters start from: nothing that changes the model, or a part of the weight.
//!
//! [`Init::Pissa`] and [`Init::Olora`] take `s·B·A` out of the base weight, [`Init::Loftq`] takes its quantization error
//! into the adapter. In each case the model computes what it did (to rounding, or, quantized, better), and the base is
//! another one than before: see [`super::Lora::taken`] for what an adapter file says of it.
//!
//! Sources: Meng et al., "PiSSA", arXiv 2404.02948; Büyükakyüz, "OLoRA", arXiv 2406.01775; Li et al., "LoftQ",
//! arXiv 2310.08659. All as peft does them; LoftQ's factors are divided by the adapter's scale, which peft leaves out.

use super::{
    Linear,
    svd::{Svd, leading, orthogonal},
};
use crate::{Error, Result};
use nibble_kernels::{
    cast::into_dtype,
    linear::{Weight, input_grad, input_grad_add},
    quantize::{Absmax, QuantTensor, ScaleRounding, dequantize, quantize},
};
use nibble_runtime::{DType, Device, Tag, Tensor};
use std::{fmt, str::FromStr};

/// What new adapters start from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// A uniform in ±1/√K, B zero.
    #[default]
    Lora,
    /// The largest singular values: `B·A` is their part of the weight.
    Pissa,
    /// The first columns of Q and rows of R of the weight's QR decomposition.
    Olora,
    /// The largest singular values of the quantization error, found in turns with the quantized weight.
    Loftq {
        /// Turns.
        iterations: usize,
    },
}

impl fmt::Display for Init {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Init::Lora => f.write_str("lora"),
            Init::Pissa => f.write_str("pissa"),
            Init::Olora => f.write_str("olora"),
            Init::Loftq { iterations: 1 } => f.write_str("loftq"),
            Init::Loftq { iterations } => write!(f, "loftq:{iterations}"),
        }
    }
}

impl FromStr for Init {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.split_once(':').unwrap_or((text, "1")) {
            ("lora", _) if text == "lora" => Ok(Init::Lora),
            ("pissa", _) if text == "pissa" => Ok(Init::Pissa),
            ("olora", _) if text == "olora" => Ok(Init::Olora),
            ("loftq", count) if count.parse::<usize>().is_ok_and(|count| (1..=100).contains(&count)) => {
                Ok(Init::Loftq { iterations: count.parse().unwrap_or(1) })
            }
            _ => Err(format!("init: expected lora, pissa, olora, loftq or loftq:ITERATIONS, not {text}")),
        }
    }
}

/// A, B and the base weight to go with them.
pub(super) struct Start {
    pub a: Tensor,
    pub b: Tensor,
    pub weight: Weight,
}

/// A matrix in f32 whose rows are `rows`, each times a number.
fn scaled_rows(rows: &[Vec<f64>], by: impl Fn(usize) -> f64) -> Result<Tensor> {
    let values: Vec<f32> = rows
        .iter()
        .enumerate()
        .flat_map(|(i, row)| {
            let by = by(i);
            row.iter().map(move |x| (x * by) as f32)
        })
        .collect();
    Ok(Tensor::from_slice(&values, &[rows.len(), rows[0].len()], Tag::Adapters)?)
}

/// The same, for the columns of a matrix that are `columns`.
fn scaled_columns(columns: &[Vec<f64>], by: impl Fn(usize) -> f64) -> Result<Tensor> {
    let (n, r) = (columns[0].len(), columns.len());
    let values: Vec<f32> =
        (0..n).flat_map(|i| (0..r).map(move |j| (i, j))).map(|(i, j)| (columns[j][i] * by(j)) as f32).collect();
    Ok(Tensor::from_slice(&values, &[n, r], Tag::Adapters)?)
}

/// `w − scale · B·A`.
fn without(w: &Tensor, a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
    let mut rest = w.copy(Tag::Workspace)?;
    input_grad_add(b, &Weight::Dense(a.clone()), -scale, &mut rest)?;
    Ok(rest)
}

impl Linear {
    /// What an adapter of this layer starts from, given the layer's weight before it was quantized, f32 in host memory.
    ///
    /// # Errors
    /// The rank is higher than the weight's, or LoftQ is to start on a weight that is not quantized.
    pub(super) fn start(&self, init: Init, original: &Tensor, rank: usize, scale: f32) -> Result<Start> {
        let root = |s: f64| (s / f64::from(scale)).sqrt();
        let factors = |Svd { u, s, v }: Svd| -> Result<(Tensor, Tensor)> {
            Ok((scaled_rows(&v, |i| root(s[i]))?, scaled_columns(&u, |i| root(s[i]))?))
        };
        let (a, b) = match init {
            Init::Lora => return Err(Error::Invalid("a plain adapter takes nothing from the weight".into())),
            Init::Pissa => factors(leading(original, rank)?)?,
            Init::Olora => {
                let q = orthogonal(original, rank)?;
                let r = input_grad(&scaled_rows(&q, |_| 1.0)?, &Weight::Dense(original.clone()), 1.0)?;
                (r, scaled_columns(&q, |_| 1.0)?)
            }
            Init::Loftq { iterations } => {
                let Weight::Quantized(like) = &self.weight else {
                    return Err(Error::Invalid(
                        "LoftQ makes up for quantization, and the base is not quantized".into(),
                    ));
                };
                let mut target = original.clone();
                let mut found = None;
                for _ in 0..iterations {
                    let weight = self.again(like, &target)?;
                    let error = without_weight(original, &weight)?;
                    let (a, b) = factors(leading(&error, rank)?)?;
                    target = without(original, &a, &b, scale)?;
                    found = Some(Start { a, b, weight });
                }
                return found.ok_or_else(|| Error::Invalid("LoftQ needs at least one iteration".into()));
            }
        };
        let rest = without(original, &a, &b, scale)?;
        let weight = match &self.weight {
            Weight::Quantized(like) => self.again(like, &rest)?,
            Weight::Dense(like) => {
                let rest = rest.into_dtype(like.dtype(), Tag::Weights)?.into_device(like.device(), Tag::Weights)?;
                Weight::Dense(rest.retag(Tag::Weights))
            }
        };
        Ok(Start { a, b, weight })
    }

    /// `values` quantized as `like` is, on its device.
    fn again(&self, like: &QuantTensor, values: &Tensor) -> Result<Weight> {
        let scales = matches!(like.absmax, Absmax::Double { .. }).then(ScaleRounding::default);
        let values = values.to_device(like.packed.device(), Tag::Workspace)?;
        Ok(Weight::Quantized(quantize(&values, like.quant_type, like.block_size, scales, like.dtype, Tag::Weights)?))
    }
}

/// `w − weight`, of a quantized one.
fn without_weight(w: &Tensor, weight: &Weight) -> Result<Tensor> {
    let Weight::Quantized(quantized) = weight else {
        return Err(Error::Invalid("a quantized weight was expected".into()));
    };
    let values = into_dtype(dequantize(quantized, Tag::Workspace)?, DType::F32, Tag::Workspace)?;
    let values = values.into_device(Device::Cpu, Tag::Workspace)?;
    let mut rest = w.copy(Tag::Workspace)?;
    rest.as_mut_slice::<f32>()?.iter_mut().zip(values.as_slice::<f32>()?).for_each(|(x, y)| *x -= y);
    Ok(rest)
}
