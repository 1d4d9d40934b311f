//! Conversion of f32 to ggml's K formats: blocks of 256 with scales by sub-blocks, chosen by trying a few.
//!
//! As ggml's reference `quantize_row_q4_K_ref` and `quantize_row_q6_K_ref`, operation by operation. A compiler that fuses
//! multiplications and additions, as those that build ggml do, makes another choice now and then.

use half::f16;

/// Below this a block counts as zeros.
const NOTHING: f32 = 1e-15;

fn nearest(x: f32) -> i32 {
    x.round_ties_even() as i32
}

/// Scale of `x` and the codes `−32..32` that go with it: of several scales that which fits best, large values counting more.
fn symmetric(x: &[f32]) -> f32 {
    const MOST: i32 = 32;
    let extreme = x.iter().fold(0f32, |max, &x| if x.abs() > max.abs() { x } else { max });
    if extreme.abs() < NOTHING {
        return 0.0;
    }
    let fit = |inverse: f32| {
        let (mut sum_lx, mut sum_l2) = (0f32, 0f32);
        for &x in x {
            let l = nearest(inverse * x).clamp(-MOST, MOST - 1) as f32;
            let weight = x * x;
            sum_lx += weight * x * l;
            sum_l2 += weight * l * l;
        }
        (sum_lx, sum_l2)
    };
    let (sum_lx, sum_l2) = fit(-(MOST as f32) / extreme);
    let mut scale = if sum_l2 == 0.0 { 0.0 } else { sum_lx / sum_l2 };
    let mut best = scale * sum_lx;
    for step in (-9..=9).filter(|step| *step != 0) {
        let (sum_lx, sum_l2) = fit(-(MOST as f32 + 0.1 * step as f32) / extreme);
        if sum_l2 > 0.0 && sum_lx * sum_lx > best * sum_l2 {
            scale = sum_lx / sum_l2;
            best = scale * sum_lx;
        }
    }
    scale
}

/// `{u8 low[128]; u8 high[64]; i8 scales[16]; f16 d}`.
pub(super) fn q6_k(x: &[f32], out: &mut [u8]) {
    let scales: Vec<f32> = x.chunks_exact(16).map(symmetric).collect();
    let extreme = scales.iter().fold(0f32, |max, &s| if s.abs() > max.abs() { s } else { max });
    out.fill(0);
    if extreme.abs() < NOTHING {
        return;
    }
    let inverse = -128.0 / extreme;
    let d = f16::from_f32(1.0 / inverse);
    out[208..210].copy_from_slice(&d.to_le_bytes());
    let mut codes = [32u8; 256];
    for (j, (&scale, x)) in scales.iter().zip(x.chunks_exact(16)).enumerate() {
        let of_scale = nearest(inverse * scale).min(127) as i8;
        out[192 + j] = of_scale as u8;
        let step = d.to_f32() * f32::from(of_scale);
        for (code, x) in codes[16 * j..].iter_mut().zip(x) {
            if step != 0.0 {
                *code = (nearest(x / step).clamp(-32, 31) + 32) as u8;
            }
        }
    }
    for (half, codes) in codes.chunks_exact(128).enumerate() {
        for i in 0..32 {
            let [a, b, c, e] = [codes[i], codes[i + 32], codes[i + 64], codes[i + 96]];
            out[half * 64 + i] = a & 15 | (c & 15) << 4;
            out[half * 64 + i + 32] = b & 15 | (e & 15) << 4;
            out[128 + half * 32 + i] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | e >> 4 << 6;
        }
    }
}

/// Scale and (negated) minimum of `x` for codes `0..16`: of several pairs that which fits best by `weights`.
fn with_minimum(x: &[f32], weights: &[f32]) -> (f32, f32) {
    const MOST: i32 = 15;
    let (mut least, mut most) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (0f32, 0f32);
    for (&x, &w) in x.iter().zip(weights) {
        (least, most) = (least.min(x), most.max(x));
        sum_w += w;
        sum_x += w * x;
    }
    let mut min = least.min(0.0);
    if most == min {
        return (0.0, -min);
    }
    // Codes count from `start`, which is the best minimum so far: of the one that was found they make another.
    let code = |start: f32, inverse: f32, x: f32| nearest(inverse * (x - start)).clamp(0, MOST) as f32;
    let error = |start: f32, inverse: f32, scale: f32, min: f32| {
        let term = |(&x, &w): (&f32, &f32)| {
            let difference = scale * code(start, inverse, x) + min - x;
            w * (difference * difference)
        };
        x.iter().zip(weights).map(term).fold(0f32, |sum, term| sum + term)
    };
    let inverse = MOST as f32 / (most - min);
    let mut scale = 1.0 / inverse;
    let mut best = error(min, inverse, scale, min);
    for step in 0..=20 {
        let inverse = (-1.0 + 0.1 * step as f32 + MOST as f32) / (most - min);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0f32, 0f32, 0f32);
        for (&x, &w) in x.iter().zip(weights) {
            let l = code(min, inverse, x);
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant > 0.0 {
            let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut this_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if this_min > 0.0 {
                (this_scale, this_min) = (sum_xl / sum_l2, 0.0);
            }
            let found = error(min, inverse, this_scale, this_min);
            if found < best {
                (best, scale, min) = (found, this_scale, this_min);
            }
        }
    }
    (scale, -min)
}

/// `{f16 d, dmin; u8 scales[12]; u8 q[128]}`.
pub(super) fn q4_k(x: &[f32], out: &mut [u8]) {
    let pairs: Vec<(f32, f32)> = x
        .chunks_exact(32)
        .map(|x| {
            let mean = (x.iter().fold(0f32, |sum, x| sum + x * x) / 32.0).sqrt();
            with_minimum(x, &x.iter().map(|x| mean + x.abs()).collect::<Vec<_>>())
        })
        .collect();
    let largest = |of: fn(&(f32, f32)) -> f32| pairs.iter().map(of).fold(0f32, f32::max);
    let (scale, min) = (largest(|pair| pair.0), largest(|pair| pair.1));
    let inverse = |x: f32| if x > 0.0 { 63.0 / x } else { 0.0 };
    let (inverse_scale, inverse_min) = (inverse(scale), inverse(min));
    let (d, dmin) = (f16::from_f32(scale / 63.0), f16::from_f32(min / 63.0));
    out.fill(0);
    out[..2].copy_from_slice(&d.to_le_bytes());
    out[2..4].copy_from_slice(&dmin.to_le_bytes());
    let mut codes = [0u8; 256];
    for (j, (&(scale, min), x)) in pairs.iter().zip(x.chunks_exact(32)).enumerate() {
        let of = |inverse: f32, value: f32| nearest(inverse * value).clamp(0, 63) as u8;
        let (scale, min) = (of(inverse_scale, scale), of(inverse_min, min));
        let packed = &mut out[4..16];
        if j < 4 {
            (packed[j], packed[j + 4]) = (packed[j] | scale, packed[j + 4] | min);
        } else {
            packed[j + 4] = scale & 15 | (min & 15) << 4;
            packed[j - 4] |= scale >> 4 << 6;
            packed[j] |= min >> 4 << 6;
        }
        let (step, least) = (d.to_f32() * f32::from(scale), dmin.to_f32() * f32::from(min));
        for (code, x) in codes[32 * j..].iter_mut().zip(x) {
            if step != 0.0 {
                *code = nearest((x + least) / step).clamp(0, 15) as u8;
            }
        }
    }
    for (j, codes) in codes.chunks_exact(64).enumerate() {
        for i in 0..32 {
            out[16 + 32 * j + i] = codes[i] | codes[i + 32] << 4;
        }
    }
}
