//! RMSNorm: `y = x · rstd · w` with `rstd = 1/√(mean(x²) + ε)` for each row.
//!
//! Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
//!
//! Backward, with `x̂ = x · rstd` and `ŵ = dy · w`: `dx = rstd · (ŵ − x̂ · mean(ŵ · x̂))`, `dw = Σ_rows dy · x̂`.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;

use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};

fn check(x: &Tensor, weight: &Tensor) -> Result<(usize, usize)> {
    let (rows, width) = x.dims2("rms_norm")?;
    if weight.shape() != [width] || width == 0 {
        let what = format!("input {:?} and weight {:?} do not fit", x.shape(), weight.shape());
        return Err(Error::shape("rms_norm", what));
    }
    Ok((rows, width))
}

fn check_rstd(op: &'static str, rstd: &Tensor, rows: usize) -> Result<()> {
    if rstd.shape() != [rows] || rstd.dtype() != DType::F32 {
        let what = format!("rstd is {} {:?}; expected f32 [{rows}]", rstd.dtype(), rstd.shape());
        return Err(Error::shape(op, what));
    }
    Ok(())
}

/// Normalizes the rows of `x` `[T, D]` by `weight` `[D]`. Returns `y` in the type of `x`, and `rstd` f32 `[T]`, from
/// which [`apply`] makes `y` again.
pub fn forward(x: &Tensor, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let (rows, _) = check(x, weight)?;
    match x.device() {
        Device::Cpu => {
            let mut rstd = Tensor::empty(&[rows], DType::F32, Device::Cpu, Tag::Activations)?;
            cpu::rstd(&x.to_f32()?, eps, rstd.as_mut_slice()?);
            Ok((apply(x, weight, &rstd)?, rstd))
        }
        Device::Cuda(_) => cuda::forward(x, weight, eps),
    }
}

/// `x · rstd · w`: the output of [`forward`] from what it saved.
pub fn apply(x: &Tensor, weight: &Tensor, rstd: &Tensor) -> Result<Tensor> {
    let (rows, _) = check(x, weight)?;
    check_rstd("rms_norm", rstd, rows)?;
    match x.device() {
        Device::Cpu => {
            let mut y = Tensor::empty(x.shape(), DType::F32, Device::Cpu, Tag::Workspace)?;
            cpu::apply(&x.to_f32()?, &weight.to_f32()?, rstd.as_slice()?, y.as_mut_slice()?);
            y.into_dtype(x.dtype(), Tag::Workspace)
        }
        Device::Cuda(_) => cuda::apply(x, weight, rstd),
    }
}

fn check_backward(x: &Tensor, weight: &Tensor, rstd: &Tensor, grad: &Tensor, dx: &Tensor) -> Result<()> {
    let (rows, _) = check(x, weight)?;
    check_rstd("rms_norm backward", rstd, rows)?;
    if grad.shape() != x.shape() || dx.shape() != x.shape() {
        let what = format!("gradient {:?}, input gradient {:?}, input {:?}", grad.shape(), dx.shape(), x.shape());
        return Err(Error::shape("rms_norm backward", what));
    }
    Ok(())
}

/// Adds the gradient of the input to `dx` `[T, D]` and returns that of the weight, f32 `[D]`, where `want_weight`.
pub fn backward_add(
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    grad: &Tensor,
    dx: &mut Tensor,
    want_weight: bool,
) -> Result<Option<Tensor>> {
    check_backward(x, weight, rstd, grad, dx)?;
    match x.device() {
        Device::Cpu => {
            let (xs, grads, rstd) = (x.to_f32()?, grad.to_f32()?, rstd.as_slice()?);
            let dtype = dx.dtype();
            if dtype == DType::F32 {
                cpu::backward_add(&xs, &weight.to_f32()?, rstd, &grads, dx.as_mut_slice()?);
            } else {
                let mut wide = dx.cast(DType::F32, Tag::Workspace)?;
                cpu::backward_add(&xs, &weight.to_f32()?, rstd, &grads, wide.as_mut_slice()?);
                *dx = wide.cast(dtype, Tag::Workspace)?;
            }
        }
        Device::Cuda(_) => cuda::backward_add(x, weight, rstd, grad, dx)?,
    }
    want_weight.then(|| weight_grad(x, rstd, grad)).transpose()
}

/// [`backward_add`], and [`apply`] in the place of the gradient, which a GPU makes on the way.
pub fn backward_and_apply(
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    grad: Tensor,
    dx: &mut Tensor,
    want_weight: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    if x.device() == Device::Cpu {
        let of_weight = backward_add(x, weight, rstd, &grad, dx, want_weight)?;
        drop(grad);
        return Ok((apply(x, weight, rstd)?, of_weight));
    }
    check_backward(x, weight, rstd, &grad, dx)?;
    let of_weight = want_weight.then(|| weight_grad(x, rstd, &grad)).transpose()?;
    Ok((cuda::backward_and_apply(x, weight, rstd, grad, dx)?, of_weight))
}

/// The gradient of the weight, f32 `[D]`: `Σ_rows dy · x · rstd`.
///
/// # Errors
/// Shapes do not fit.
pub fn weight_grad(x: &Tensor, rstd: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let op = "rms_norm weight gradient";
    let (rows, width) = x.dims2(op)?;
    check_rstd(op, rstd, rows)?;
    if grad.shape() != x.shape() {
        return Err(Error::shape(op, format!("gradient {:?}, input {:?}", grad.shape(), x.shape())));
    }
    match x.device() {
        Device::Cpu => {
            let mut dw = Tensor::zeros(&[width], DType::F32, Device::Cpu, Tag::Gradients)?;
            cpu::weight_grad(&x.to_f32()?, rstd.as_slice()?, &grad.to_f32()?, dw.as_mut_slice()?);
            Ok(dw)
        }
        Device::Cuda(_) => cuda::weight_grad(x, rstd, grad),
    }
}

/// Bytes of workspace of a weight's gradient on a GPU.
pub fn weight_grad_workspace(rows: usize, width: usize) -> usize {
    cuda::workspace(rows, width)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, numeric_gradient, random, wide};
    use proptest::prelude::*;

    const EPS: f32 = 1e-5;

    fn reference(x: &[f64], w: &[f64]) -> Vec<f64> {
        let width = w.len();
        let row = |row: &[f64]| {
            let rstd = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / width as f64 + f64::from(EPS)).sqrt();
            row.iter().zip(w).map(move |(x, w)| x * rstd * w).collect::<Vec<_>>()
        };
        x.chunks(width).flat_map(row).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn matches_f64_and_finite_differences(rows in 1usize..6, width in 1usize..40, seed: u64) {
            let (x, w) = (random(&[rows, width], seed), random(&[width], seed ^ 1));
            let (grad, start) = (random(&[rows, width], seed ^ 2), random(&[rows, width], seed ^ 3));
            let (y, rstd) = forward(&x, &w, EPS).unwrap();
            let (xs, ws, grads) = (wide(&x), wide(&w), wide(&grad));
            close(&y, &reference(&xs, &ws), 1e-6);
            let loss = |x: &[f64], w: &[f64]| reference(x, w).iter().zip(&grads).map(|(y, g)| y * g).sum::<f64>();
            let mut dx = start.copy(Tag::Workspace).unwrap();
            let dw = backward_add(&x, &w, &rstd, &grad, &mut dx, true).unwrap().unwrap();
            let expected = numeric_gradient(&xs, |x| loss(x, &ws));
            let expected: Vec<f64> = expected.iter().zip(wide(&start)).map(|(dx, start)| dx + start).collect();
            close(&dx, &expected, 1e-5);
            close(&dw, &numeric_gradient(&ws, |w| loss(&xs, w)), 1e-5);
        }
    }

    #[test]
    fn many_rows_sum_in_a_fixed_order() {
        let (x, w, grad) = (random(&[1000, 33], 1), random(&[33], 2), random(&[1000, 33], 3));
        let (_, rstd) = forward(&x, &w, EPS).unwrap();
        let run = || {
            let mut dx = random(&[1000, 33], 4);
            backward_add(&x, &w, &rstd, &grad, &mut dx, true).unwrap().unwrap()
        };
        assert_eq!(run().bytes().unwrap(), run().bytes().unwrap());
    }

    #[test]
    fn half_rounds_once() {
        let (x, w) = (random(&[3, 64], 1).cast(DType::F16, Tag::Workspace).unwrap(), random(&[64], 2));
        let (y, _) = forward(&x, &w, EPS).unwrap();
        assert_eq!(y.dtype(), DType::F16);
        close(&y, &reference(&wide(&x), &wide(&w)), 5e-4);
    }
}
