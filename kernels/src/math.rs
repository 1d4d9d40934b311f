//! Element-wise f32 functions that compilers turn into vector code, and the dispatch that lets them.
//!
//! The standard library's `exp` is a call for each element; in attention, SwiGLU and cross-entropy that would cost more
//! than the matrix products around it.

/// Runs `f` compiled for the widest vectors that this processor has. `f` must be an `#[inline(always)]` chain of plain
/// loops.
#[inline(always)]
pub(crate) fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    struct Run<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Run<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Run(f))
}

/// eˣ within 2 ulp for x in [-87, 88]; below it decreases to 0 by way of clamping, above it saturates.
///
/// Cody–Waite reduction to |r| ≤ ln 2 / 2, then a degree-6 polynomial (minimax on that interval).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding it leaves the nearest integer in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_6e-1;
    let p = p * r + 0.5;
    let value = p * r * r + r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { value * power }
}

/// 1 / (1 + e⁻ˣ).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Replaces each score by `exp(score - max)` and returns the sum: eight partial sums in f32 for each [`RUN`] of scores, so
/// that the order is fixed and long rows lose nothing.
#[inline(always)]
pub(crate) fn exp_sum(scores: &mut [f32], max: f32) -> f32 {
    let mut total = 0.0f64;
    for run in scores.chunks_mut(RUN) {
        // Two loops: with the sums in the first one the compiler makes no vector code of it.
        run.iter_mut().for_each(|score| *score = exp(*score - max));
        let mut sums = [0.0f32; 8];
        let (chunks, tail) = run.as_chunks::<8>();
        for chunk in chunks {
            for (sum, score) in sums.iter_mut().zip(chunk) {
                *sum += score;
            }
        }
        let mut sum: f32 = sums.iter().sum();
        tail.iter().for_each(|score| sum += score);
        total += f64::from(sum);
    }
    total as f32
}

/// Scores that [`exp_sum`] sums in f32.
const RUN: usize = 2048;

/// Largest element; -∞ for none.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let (chunks, tail) = values.as_chunks::<8>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

/// Σ aᵢ·bᵢ in eight partial sums.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let ((a8, a1), (b8, b1)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a8.iter().zip(b8) {
        for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + a1.iter().zip(b1).map(|(a, b)| a * b).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        for i in 0..2_000_000 {
            let x = -87.0 + i as f32 * (175.0 / 2_000_000.0);
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - exact) / exact).abs() / f64::from(f32::EPSILON));
        }
        assert!(worst < 2.0, "{worst} ulp");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-200.0), 0.0);
        assert!(exp(f32::INFINITY) > 1e38);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_match_plain_ones() {
        let values: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.37).sin()).collect();
        let plain: f64 = values.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        assert!((f64::from(dot(&values, &values)) - plain).abs() < 1e-3);
        let top = values.iter().copied().fold(f32::MIN, f32::max);
        assert_eq!(max(&values), top);
        assert_eq!(max(&[]), f32::NEG_INFINITY);
        let mut scores = values.clone();
        let sum = vectorized(|| exp_sum(&mut scores, top));
        let exact: f64 = values.iter().map(|&x| f64::from(x - top).exp()).sum();
        assert!((f64::from(sum) / exact - 1.0).abs() < 1e-6);
    }
}
