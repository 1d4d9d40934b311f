//! The parts of a matrix that low-rank adapters start from: leading singular vectors, and a QR decomposition.
//!
//! Both are for matrices with thousands of rows of which a few dozen vectors are wanted. The singular vectors come from
//! subspace iteration with a random start (Halko, Martinsson, Tropp, "Finding Structure with Randomness", arXiv 0909.4061,
//! algorithm 4.4), repeated until the singular values stand still; small matrices are done exactly, without iterating.

use crate::{Error, Result};
use nibble_kernels::linear::{Weight, forward, input_grad};
use nibble_runtime::{
    Tag, Tensor,
    rng::{Philox, Stream},
};
use rayon::prelude::*;

/// Vectors beyond the wanted ones: they make the iteration converge faster.
const SPARE: usize = 16;
/// Rounds at most: by then what is left to gain is below what rounding to f32 loses for all but flat spectra.
const ROUNDS: usize = 20;
/// The iteration ends when no wanted singular value changes by more than this share of the largest.
const STILL: f64 = 1e-7;
/// [`Stream::purpose`] of the random start.
const PURPOSE: u32 = 21;

/// `w ≈ Uᵀ · diag(s) · V` by its largest singular values.
pub(crate) struct Svd {
    /// Left singular vectors as rows, `[r][N]`.
    pub u: Vec<Vec<f64>>,
    /// Singular values, falling.
    pub s: Vec<f64>,
    /// Right singular vectors as rows, `[r][K]`.
    pub v: Vec<Vec<f64>>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Makes the rows orthonormal, those that hang on the ones before them zero. Twice is enough (Kahan, Parlett).
fn orthonormalize(rows: &mut [Vec<f64>]) {
    for _ in 0..2 {
        for i in 0..rows.len() {
            let (done, rest) = rows.split_at_mut(i + 1);
            let row = &mut done[i];
            let length = dot(row, row).sqrt();
            let inverse = if length > 1e-30 { 1.0 / length } else { 0.0 };
            row.iter_mut().for_each(|x| *x *= inverse);
            rest.par_iter_mut().for_each(|other| {
                let share = dot(row, other);
                other.iter_mut().zip(&*row).for_each(|(x, y)| *x -= share * y);
            });
        }
    }
}

fn tensor(rows: &[Vec<f64>]) -> Result<Tensor> {
    let values: Vec<f32> = rows.iter().flatten().map(|&x| x as f32).collect();
    Ok(Tensor::from_slice(&values, &[rows.len(), rows.first().map_or(0, Vec::len)], Tag::Workspace)?)
}

fn rows(tensor: &Tensor) -> Result<Vec<Vec<f64>>> {
    let width = tensor.dims2("rows")?.1;
    Ok(tensor.as_slice::<f32>()?.chunks(width.max(1)).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect())
}

/// Eigenvalues, falling, and eigenvectors (as rows) of a symmetric matrix, by Jacobi's rotations.
fn symmetric_eigen(mut a: Vec<Vec<f64>>) -> (Vec<f64>, Vec<Vec<f64>>) {
    let n = a.len();
    let mut vectors: Vec<Vec<f64>> = (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    let size = a.iter().map(|row| dot(row, row)).sum::<f64>();
    for _ in 0..60 {
        let off: f64 = (0..n).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| a[i][j] * a[i][j]).sum();
        if off <= 1e-30 * size {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                if a[p][q] == 0.0 {
                    continue;
                }
                let theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for row in a.iter_mut() {
                    (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                }
                for matrix in [&mut a, &mut vectors] {
                    let (above, below) = matrix.split_at_mut(q);
                    for (x, y) in above[p].iter_mut().zip(&mut below[0]) {
                        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                    }
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| a[j][j].total_cmp(&a[i][i]));
    (order.iter().map(|&i| a[i][i]).collect(), order.iter().map(|&i| vectors[i].clone()).collect())
}

/// The `rank` largest singular values of `w`, f32 `[N, K]` in host memory, with their vectors.
///
/// # Errors
/// `w` has fewer rows or columns than `rank`.
pub(crate) fn leading(w: &Tensor, rank: usize) -> Result<Svd> {
    let (n, k) = w.dims2("singular values")?;
    if rank > n.min(k) {
        return Err(Error::Invalid(format!("rank {rank} is more than a weight of {n} × {k} has; choose a lower one")));
    }
    let width = (rank + SPARE).min(n.min(k));
    let weight = Weight::Dense(w.clone());
    let rng = Philox::new(0, Stream { purpose: PURPOSE, step: 0, layer: 0 });
    // Rows span the space of columns, then of rows, in turn.
    let start = |i: usize| (0..n).map(|j| f64::from(rng.normal((i * n + j) as u64))).collect();
    let mut left: Vec<Vec<f64>> = (0..width).map(start).collect();
    if width == n {
        // The whole space.
        left = (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    }
    orthonormalize(&mut left);
    let mut before: Vec<f64> = Vec::new();
    for round in 0.. {
        // `left · w` holds what is to be found: w restricted to the space.
        let small = rows(&input_grad(&tensor(&left)?, &weight, 1.0)?)?;
        let gram = small.par_iter().map(|a| small.iter().map(|b| dot(a, b)).collect()).collect();
        let (squares, turns) = symmetric_eigen(gram);
        let s: Vec<f64> = squares[..rank].iter().map(|x| x.max(0.0).sqrt()).collect();
        let largest = s.first().copied().unwrap_or(0.0);
        let still = before.len() == rank && before.iter().zip(&s).all(|(a, b)| (a - b).abs() <= STILL * largest);
        if still || round == ROUNDS || width == n {
            let turned = |of: &[Vec<f64>], turn: &[f64]| {
                let mut sum = vec![0.0; of[0].len()];
                for (share, row) in turn.iter().zip(of) {
                    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += share * x);
                }
                sum
            };
            let u = turns[..rank].par_iter().map(|turn| turned(&left, turn)).collect();
            let inverse = |s: f64| if s > 1e-30 { 1.0 / s } else { 0.0 };
            let v = turns[..rank]
                .par_iter()
                .zip(&s)
                .map(|(turn, &s)| turned(&small, turn).into_iter().map(|x| x * inverse(s)).collect());
            return Ok(Svd { u, v: v.collect(), s });
        }
        before = s;
        let mut right = small;
        orthonormalize(&mut right);
        left = rows(&forward(&tensor(&right)?, &weight, Tag::Workspace)?)?;
        orthonormalize(&mut left);
    }
    unreachable!("the loop ends by its last round")
}

/// The first `rank` columns of Q, as rows `[r][N]`, of `w = Q·R`, with LAPACK's signs.
///
/// # Errors
/// `w` has fewer rows or columns than `rank`.
pub(crate) fn orthogonal(w: &Tensor, rank: usize) -> Result<Vec<Vec<f64>>> {
    let (n, k) = w.dims2("QR")?;
    if rank > n.min(k) {
        return Err(Error::Invalid(format!("rank {rank} is more than a weight of {n} × {k} has; choose a lower one")));
    }
    let values = w.as_slice::<f32>()?;
    let mut columns: Vec<Vec<f64>> =
        (0..rank).map(|j| (0..n).map(|i| f64::from(values[i * k + j])).collect()).collect();
    // Householder's reflections I − τ·h·hᵀ, one a column, each applied to the columns after it.
    let mut reflections: Vec<(Vec<f64>, f64)> = Vec::new();
    let reflect = |(h, tau): &(Vec<f64>, f64), column: &mut [f64]| {
        let share = tau * dot(h, column);
        column.iter_mut().zip(h).for_each(|(x, h)| *x -= share * h);
    };
    for j in 0..rank {
        let column = &columns[j];
        let (alpha, below) = (column[j], dot(&column[j + 1..], &column[j + 1..]));
        let mut h = vec![0.0; n];
        let mut tau = 0.0;
        if below > 0.0 {
            let beta = -alpha.signum() * (alpha * alpha + below).sqrt();
            h[j] = 1.0;
            h[j + 1..].iter_mut().zip(&column[j + 1..]).for_each(|(h, x)| *h = x / (alpha - beta));
            tau = (beta - alpha) / beta;
        }
        reflections.push((h, tau));
        columns[j + 1..].par_iter_mut().for_each(|column| reflect(&reflections[j], column));
    }
    let unit = |j: usize| {
        let mut column: Vec<f64> = (0..n).map(|i| f64::from(u8::from(i == j))).collect();
        reflections[..=j].iter().rev().for_each(|reflection| reflect(reflection, &mut column));
        column
    };
    Ok((0..rank).into_par_iter().map(unit).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn random(n: usize, k: usize, decay: f32, seed: u64) -> Tensor {
        let rng = Philox::new(seed, Stream { purpose: 99, step: 0, layer: 0 });
        let values: Vec<f32> = (0..n * k).map(|i| rng.normal(i as u64) * decay.powi((i % k) as i32)).collect();
        Tensor::from_slice(&values, &[n, k], Tag::Workspace).unwrap()
    }

    /// `W·v = s·u`, `Wᵀ·u = s·v`, orthonormal vectors, and what is left has no larger singular value.
    fn check(w: &Tensor, rank: usize, tolerance: f64) {
        let (n, k) = w.dims2("").unwrap();
        let Svd { u, s, v } = leading(w, rank).unwrap();
        let w: Vec<f64> = w.as_slice::<f32>().unwrap().iter().map(|&x| f64::from(x)).collect();
        let largest = s[0];
        for (i, ((u_i, &s_i), v_i)) in u.iter().zip(&s).zip(&v).enumerate() {
            let image: Vec<f64> = w.chunks(k).map(|row| dot(row, v_i)).collect();
            let back: Vec<f64> = (0..k).map(|c| (0..n).map(|r| w[r * k + c] * u_i[r]).sum()).collect();
            let far = |found: &[f64], expected: &[f64]| {
                found.iter().zip(expected).map(|(a, b)| (a - s_i * b).abs()).fold(0.0, f64::max)
            };
            assert!(far(&image, u_i).max(far(&back, v_i)) <= tolerance * largest, "{i}: {}", far(&image, u_i));
            for j in 0..i {
                assert!(dot(u_i, &u[j]).abs() < 1e-6 && dot(v_i, &v[j]).abs() < 1e-4);
                assert!(s[j] >= s_i);
            }
        }
        // ‖W‖² is the sum of all squares of singular values: those left are small enough together.
        let rest = dot(&w, &w) - dot(&s, &s);
        assert!(
            rest <= ((n.min(k) - rank) as f64 + 1e-4) * s[rank - 1] * s[rank - 1] + 1e-6 * largest * largest,
            "{rest}"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn finds_singular_vectors(n in 1usize..50, k in 1usize..50, seed: u64) {
            check(&random(n, k, 0.9, seed), n.min(k).min(5), 1e-4);
        }

        #[test]
        fn q_is_orthogonal_and_r_triangular(n in 1usize..30, k in 1usize..30, seed: u64) {
            let w = random(n, k, 1.0, seed);
            let rank = n.min(k).min(6);
            let q = orthogonal(&w, rank).unwrap();
            let values = w.as_slice::<f32>().unwrap();
            for (i, row) in q.iter().enumerate() {
                for (j, other) in q.iter().enumerate() {
                    prop_assert!((dot(row, other) - f64::from(u8::from(i == j))).abs() < 1e-10);
                }
                // R = Qᵀ·W below its diagonal.
                for j in 0..i {
                    let r: f64 = row.iter().enumerate().map(|(n, q)| q * f64::from(values[n * k + j])).sum();
                    prop_assert!(r.abs() < 1e-9);
                }
            }
        }
    }

    #[test]
    fn a_large_matrix_with_a_falling_spectrum_converges() {
        check(&random(300, 200, 0.97, 3), 8, 1e-3);
        assert!(leading(&random(4, 9, 1.0, 1), 5).is_err());
        assert!(orthogonal(&random(4, 9, 1.0, 1), 5).is_err());
    }
}
