//! Rows of one batch that belong to different adapters of a layer.
//!
//! The A's and B's of all adapters lie side by side: A `[R, K]` and B `[N, R]`, with R the sum of the ranks. For row `i` with
//! owner `o`, whose columns of R are `o`'s,
//!
//! ```text
//! tᵢ = s ∘ (xᵢ·Aᵀ), zero outside of o's columns        yᵢ = gainsₒ ∘ (xᵢ·Wᵀ + tᵢ·Bᵀ) + residualᵢ
//! ```
//! On a GPU one product makes `t` of every row with every adapter, and a kernel leaves each row what is its own
//! (`mixed.cu`): a layer is as many launches with eight adapters as with two, nobody on the host asks which row is whose,
//! and weights are read once; the products with others' adapters are in vain, and small beside the layer's own. The CPU
//! makes each row's own products only.

pub(crate) mod cuda;

use crate::{
    elementwise,
    linear::{Weight, forward_as, forward_lora, lora},
    math::{dot, vectorized},
};
use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// The adapters of one linear layer `[N, K]`, side by side.
#[derive(Debug)]
pub struct Adapters {
    /// `[R, K]`, one adapter's A after another's.
    pub a: Tensor,
    /// `[N, R]`.
    pub b: Tensor,
    /// Whose each of the R is, i32: those of one adapter lie together.
    pub columns: Tensor,
    /// What each is multiplied by, f32 `[R]`.
    pub scales: Tensor,
    /// Of each adapter's outputs, f32 `[adapters, N]`, where one is a DoRA.
    pub gains: Option<Tensor>,
}

fn check(tensor: &Tensor, dtype: DType, shape: &[usize]) -> Result<()> {
    if tensor.dtype() != dtype || tensor.shape() != shape {
        let what = format!("{} {:?}; expected {dtype} {shape:?}", tensor.dtype(), tensor.shape());
        return Err(Error::shape("mixed adapters", what));
    }
    Ok(())
}

impl Adapters {
    /// Checks that everything fits a layer of `n` outputs and a batch of `rows`.
    fn check(&self, n: usize, owners: &Tensor, rows: usize) -> Result<()> {
        let (rank, _) = self.a.dims2("mixed adapters")?;
        check(owners, DType::I32, &[rows])?;
        check(&self.columns, DType::I32, &[rank])?;
        check(&self.scales, DType::F32, &[rank])?;
        check(&self.b, self.a.dtype(), &[n, rank])?;
        match &self.gains {
            Some(gains) => check(gains, DType::F32, &[gains.dims2("mixed adapters")?.0, n]),
            None => Ok(()),
        }
    }
}

/// The layer's output `[T, N]` in the type of `x`, where row `i` has adapter `owners[i]` (i32 `[T]`; −1 for none), counted
/// under `tag`. The residual `[T, N]` is of the type of `x`.
///
/// # Errors
/// Types or shapes do not fit; on the CPU, an owner is beyond the last adapter with gains.
pub fn forward(
    x: &Tensor,
    weight: &Weight,
    adapters: &Adapters,
    owners: &Tensor,
    residual: Option<&Tensor>,
    tag: Tag,
) -> Result<Tensor> {
    let (rows, n) = (x.dims2("mixed adapters")?.0, weight.dims()?.0);
    adapters.check(n, owners, rows)?;
    let Adapters { a, b, columns, scales, gains } = adapters;
    if x.device() == Device::Cpu {
        let mut y = forward_as(x, weight, DType::F32, tag)?;
        add_own(x, adapters, owners, &mut y)?;
        residual.map_or(Ok(()), |residual| elementwise::add_assign(&mut y, residual))?;
        return Ok(y.into_dtype(x.dtype(), tag)?.retag(tag));
    }
    let mut t = lora::down(x, a, 1.0, None, Tag::Workspace)?;
    cuda::keep_own(&mut t, owners, columns, scales)?;
    let Some(gains) = gains else { return forward_lora(x, weight, Some((&t, b)), residual, x.dtype(), tag) };
    let mut y = forward_lora(x, weight, Some((&t, b)), None, x.dtype(), tag)?;
    cuda::scale_own(&mut y, owners, gains)?;
    residual.map_or(Ok(()), |residual| elementwise::add_assign(&mut y, residual))?;
    Ok(y)
}

/// Adds each row's own `t·Bᵀ` to `y`, f32 `[T, N]`, and applies its gains.
fn add_own(x: &Tensor, adapters: &Adapters, owners: &Tensor, y: &mut Tensor) -> Result<()> {
    let (k, n, rank) = (x.shape()[1], y.shape()[1], adapters.a.shape()[0]);
    if rank > 0 && adapters.a.shape() != [rank, k] {
        return Err(Error::shape("mixed adapters", format!("A {:?} for inputs of {k}", adapters.a.shape())));
    }
    let (x, a, b) = (x.to_f32()?, adapters.a.to_f32()?, adapters.b.to_f32()?);
    let (columns, scales) = (adapters.columns.as_slice::<i32>()?, adapters.scales.as_slice::<f32>()?);
    let gains = adapters.gains.as_ref().map(|gains| gains.as_slice::<f32>()).transpose()?;
    let owners = owners.as_slice::<i32>()?;
    let with_gains = gains.map_or(usize::MAX, |gains| gains.len() / n.max(1));
    if let Some(bad) = owners.iter().find(|&&owner| usize::try_from(owner).is_ok_and(|owner| owner >= with_gains)) {
        return Err(Error::invalid("mixed adapters", format!("a row of adapter {bad}, of {with_gains}")));
    }
    let own = |owner: i32| -> Range<usize> {
        let first = columns.iter().position(|&column| column == owner).unwrap_or(0);
        first..first + columns[first..].iter().take_while(|&&column| column == owner).count()
    };
    let rows = y.as_mut_slice::<f32>()?.par_chunks_mut(n.max(1)).zip(x.par_chunks(k.max(1))).zip(owners);
    rows.for_each(|((y, x), &owner)| {
        let Ok(number) = usize::try_from(owner) else { return };
        vectorized(
            #[inline(always)]
            || {
                let own = own(owner);
                let t: Vec<f32> = own.clone().map(|r| scales[r] * dot(x, &a[r * k..(r + 1) * k])).collect();
                for (y, b) in y.iter_mut().zip(b.chunks_exact(rank.max(1))) {
                    *y += dot(&t, &b[own.clone()]);
                }
                if let Some(gains) = gains {
                    y.iter_mut().zip(&gains[number * n..]).for_each(|(y, gain)| *y *= gain);
                }
            },
        );
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FLOATS, close, gpu, random, random_as, wide};
    use nibble_runtime::rng::{Philox, Stream};
    use proptest::prelude::*;

    /// Adapters of these ranks for a layer `[n, k]`, in `dtype`, with gains or without; and a batch's owners.
    fn adapters(ranks: &[usize], n: usize, k: usize, dtype: DType, dora: bool, seed: u64) -> Adapters {
        let rank = ranks.iter().sum();
        let whose: Vec<i32> = (0..).zip(ranks).flat_map(|(i, &rank)| std::iter::repeat_n(i, rank)).collect();
        Adapters {
            a: random_as(&[rank, k], dtype, seed),
            b: random_as(&[n, rank], dtype, seed ^ 1),
            columns: Tensor::from_slice(&whose, &[rank], Tag::Workspace).unwrap(),
            scales: random(&[rank], seed ^ 2),
            gains: dora.then(|| random(&[ranks.len(), n], seed ^ 3)),
        }
    }

    fn owners(rows: usize, adapters: usize, seed: u64) -> Vec<i32> {
        let rng = Philox::new(seed, Stream { purpose: 99, step: 1, layer: 0 });
        (0..rows as u64).map(|i| rng.below(i, adapters as u32 + 1) as i32 - 1).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn each_row_has_its_own(
            ranks in prop::collection::vec(0usize..5, 1..5), rows in 1usize..9, n in 1usize..20, k in 1usize..40,
            dora: bool, residual: bool, seed: u64,
        ) {
            let all = adapters(&ranks, n, k, DType::F32, dora, seed);
            let owners = owners(rows, ranks.len(), seed);
            let (x, w, rest) = (random(&[rows, k], seed ^ 4), random(&[n, k], seed ^ 5), random(&[rows, n], seed ^ 6));
            let whose = Tensor::from_slice(&owners, &[rows], Tag::Workspace).unwrap();
            let residual = residual.then_some(&rest);
            let y = forward(&x, &Weight::Dense(w.clone()), &all, &whose, residual, Tag::Workspace).unwrap();
            let [x, w, a, b, scales] = [&x, &w, &all.a, &all.b, &all.scales].map(wide);
            let (gains, rest) = (all.gains.as_ref().map(wide), residual.map(wide));
            let (rank, columns) = (a.len() / k, all.columns.as_slice::<i32>().unwrap());
            let row = |m: &[f64], i: usize, width: usize| m[i * width..(i + 1) * width].to_vec();
            let product = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>();
            let mut expected = Vec::new();
            for (i, &owner) in owners.iter().enumerate() {
                for j in 0..n {
                    let mut sum = product(row(&x, i, k), row(&w, j, k));
                    for r in (0..rank).filter(|&r| columns[r] == owner) {
                        sum += scales[r] * product(row(&x, i, k), row(&a, r, k)) * b[j * rank + r];
                    }
                    if let (Some(gains), Ok(owner)) = (&gains, usize::try_from(owner)) {
                        sum *= gains[owner * n + j];
                    }
                    expected.push(sum + rest.as_ref().map_or(0.0, |rest| rest[i * n + j]));
                }
            }
            close(&y, &expected, 1e-5);
        }
    }

    proptest! {
        #![proptest_config(crate::testing::cases(24))]

        #[test]
        fn gpu_mixes_as_the_cpu(
            ranks in prop::collection::vec(1usize..20, 1..9), rows in 1usize..40, n in 1usize..300, k in 1usize..300,
            kind in 0usize..3, dora: bool, residual: bool, seed: u64,
        ) {
            let Some(gpu) = gpu() else { return Ok(()) };
            let on = |tensor: &Tensor| tensor.to_device(gpu, Tag::Workspace).unwrap();
            let dtype = FLOATS[kind];
            let all = adapters(&ranks, n, k, dtype, dora, seed);
            let whose = Tensor::from_slice(&owners(rows, ranks.len(), seed), &[rows], Tag::Workspace).unwrap();
            let x = random_as(&[rows, k], dtype, seed ^ 4);
            let (w, rest) = (random_as(&[n, k], dtype, seed ^ 5), random_as(&[rows, n], dtype, seed ^ 6));
            let there = Adapters {
                a: on(&all.a),
                b: on(&all.b),
                columns: on(&all.columns),
                scales: on(&all.scales),
                gains: all.gains.as_ref().map(on),
            };
            let (rest_there, weight) = (on(&rest), Weight::Dense(on(&w)));
            let found =
                forward(&on(&x), &weight, &there, &on(&whose), residual.then_some(&rest_there), Tag::Workspace).unwrap();
            let expected =
                forward(&x, &Weight::Dense(w), &all, &whose, residual.then_some(&rest), Tag::Workspace).unwrap();
            prop_assert_eq!(found.dtype(), dtype);
            let found = found.into_device(Device::Cpu, Tag::Workspace).unwrap();
            // `t` is rounded to the type of the computation on the GPU.
            close(&found, &wide(&expected), [1e-5, 2e-3, 1.5e-2][kind]);
        }
    }

    #[test]
    fn misfits_are_refused() {
        let all = adapters(&[2, 1], 3, 4, DType::F32, true, 1);
        let (x, w) = (random(&[2, 4], 2), Weight::Dense(random(&[3, 4], 3)));
        let whose = |owners: &[i32]| Tensor::from_slice(owners, &[owners.len()], Tag::Workspace).unwrap();
        let run = |all: &Adapters, whose: &Tensor| forward(&x, &w, all, whose, None, Tag::Workspace);
        assert!(run(&all, &whose(&[1, -1])).is_ok());
        assert!(run(&all, &whose(&[1])).is_err());
        assert!(run(&all, &whose(&[1, 2])).unwrap_err().to_string().contains("adapter 2"));
        assert!(run(&Adapters { scales: random(&[2], 1), ..all }, &whose(&[0, 1])).is_err());
    }
}
