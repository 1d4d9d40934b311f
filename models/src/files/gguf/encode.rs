//! Conversion of f32 to ggml's formats, as ggml's reference `quantize_row_*_ref` does it: to the bit
//! (but for the K formats, see [`encode_k`]).

use super::{encode_k, types::GgmlType};
use half::{bf16, f16};
use rayon::prelude::*;

/// Blocks that a thread converts at a time.
const GRAIN: usize = 256;

/// The bytes of `values` as `kind`; `None` for a type that nibble does not write, or values that are no whole blocks.
pub fn quantize(kind: GgmlType, values: &[f32]) -> Option<Vec<u8>> {
    let encode: fn(&[f32], &mut [u8]) = match kind {
        GgmlType::F32 => |x, out| out.copy_from_slice(&x[0].to_le_bytes()),
        GgmlType::F16 => |x, out| out.copy_from_slice(&f16::from_f32(x[0]).to_le_bytes()),
        GgmlType::BF16 => |x, out| out.copy_from_slice(&bf16::from_f32(x[0]).to_le_bytes()),
        GgmlType::Q8_0 => q8_0,
        GgmlType::Q4_0 => q4_0,
        GgmlType::Q5_0 => q5_0,
        GgmlType::Q4_K => encode_k::q4_k,
        GgmlType::Q6_K => encode_k::q6_k,
        _ => return None,
    };
    if !values.len().is_multiple_of(kind.block) {
        return None;
    }
    let mut out = vec![0; values.len() / kind.block * kind.bytes];
    let blocks = out.par_chunks_exact_mut(kind.bytes).zip(values.par_chunks_exact(kind.block));
    blocks.with_min_len(GRAIN).for_each(|(out, values)| encode(values, out));
    Some(out)
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// `{f16 d; i8 q[32]}`: `d` is the largest magnitude over 127.
fn q8_0(x: &[f32], out: &mut [u8]) {
    let d = x.iter().fold(0f32, |max, x| max.max(x.abs())) / 127.0;
    let scale = inverse(d);
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (q, x) in out[2..].iter_mut().zip(x) {
        *q = (x * scale).round() as i8 as u8;
    }
}

/// `{f16 d; u8 q[16]}`: the value of the largest magnitude, sign included, becomes code 0, which stands for −8·d.
fn q4_0(x: &[f32], out: &mut [u8]) {
    let extreme = x.iter().fold(0f32, |max, &x| if x.abs() > max.abs() { x } else { max });
    let d = extreme / -8.0;
    let scale = inverse(d);
    let code = |x: f32| ((x * scale + 8.5) as u8).min(15);
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (j, q) in out[2..].iter_mut().enumerate() {
        *q = code(x[j]) | code(x[j + 16]) << 4;
    }
}

/// `{f16 d; u32 fifth bits; u8 q[16]}`: as Q4_0 with codes to 31, of which 16 stands for zero.
fn q5_0(x: &[f32], out: &mut [u8]) {
    let extreme = x.iter().fold(0f32, |max, &x| if x.abs() > max.abs() { x } else { max });
    let d = extreme / -16.0;
    let scale = inverse(d);
    let code = |x: f32| ((x * scale + 16.5) as u8).min(31);
    out[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    let mut fifth = 0u32;
    for (j, q) in out[6..].iter_mut().enumerate() {
        let (low, high) = (code(x[j]), code(x[j + 16]));
        *q = low & 15 | (high & 15) << 4;
        fifth |= u32::from(low >> 4) << j | u32::from(high >> 4) << (j + 16);
    }
    out[2..6].copy_from_slice(&fifth.to_le_bytes());
}
