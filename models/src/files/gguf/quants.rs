//! Conversion of ggml's block formats to f32.
//!
//! Every product and sum is rounded by itself (no fused multiply-add), in the order of ggml's reference
//! `dequantize_row_*`, so that results are the same to the bit. Source: `ggml-quants.c` and `ggml-common.h` of ggml.

use super::types::GgmlType;
use half::{bf16, f16};

/// Converts one block: its bytes, and room for its elements.
pub type Decoder = fn(&[u8], &mut [f32]);

/// The decoder of a type; `None` for those that are not supported. Types of one element a block come by 32.
pub(super) fn decoder(kind: GgmlType) -> Option<Decoder> {
    Some(match kind {
        GgmlType::F32 => plain_f32,
        GgmlType::F16 => plain_f16,
        GgmlType::BF16 => plain_bf16,
        GgmlType::Q4_0 => q4_0,
        GgmlType::Q4_1 => q4_1,
        GgmlType::Q5_0 => q5_0,
        GgmlType::Q5_1 => q5_1,
        GgmlType::Q8_0 => q8_0,
        GgmlType::Q4_K => q4_k,
        GgmlType::Q5_K => q5_k,
        GgmlType::Q6_K => q6_k,
        _ => return None,
    })
}

/// Converts `bytes`, whole blocks of `kind`, to `out`. Returns whether the type is supported and the lengths fit.
#[must_use]
pub fn dequantize(kind: GgmlType, bytes: &[u8], out: &mut [f32]) -> bool {
    let Some(decode) = decoder(kind) else { return false };
    let fits =
        out.len().is_multiple_of(kind.block) && (out.len() / kind.block).checked_mul(kind.bytes) == Some(bytes.len());
    if fits && kind.block == 1 {
        decode(bytes, out);
    } else if fits {
        for (bytes, out) in bytes.chunks_exact(kind.bytes).zip(out.chunks_exact_mut(kind.block)) {
            decode(bytes, out);
        }
    }
    fits
}

fn plain_f32(bytes: &[u8], out: &mut [f32]) {
    for (bytes, x) in bytes.as_chunks::<4>().0.iter().zip(out) {
        *x = f32::from_le_bytes(*bytes);
    }
}

fn plain_f16(bytes: &[u8], out: &mut [f32]) {
    for (bytes, x) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *x = f16::from_le_bytes(*bytes).to_f32();
    }
}

fn plain_bf16(bytes: &[u8], out: &mut [f32]) {
    for (bytes, x) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *x = bf16::from_le_bytes(*bytes).to_f32();
    }
}

/// The f16 at byte `at` of a block.
#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The u32 at byte `at` of a block.
#[inline(always)]
fn word_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Halves of 16 bytes: low nibbles are elements 0 to 15, high ones 16 to 31.
#[inline(always)]
fn nibbles(packed: &[u8], out: &mut [f32], value: impl Fn(usize, u8) -> f32) {
    let (low, high) = out.split_at_mut(16);
    for (j, ((byte, low), high)) in packed.iter().zip(low).zip(high).enumerate() {
        *low = value(j, byte & 15);
        *high = value(j + 16, byte >> 4);
    }
}

/// `{f16 d; u8 q[16]}`: `d · (q − 8)`.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    nibbles(&block[2..18], out, |_, q| f32::from(q as i8 - 8) * d);
}

/// `{f16 d, m; u8 q[16]}`: `d · q + m`.
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(&block[4..20], out, |_, q| f32::from(q) * d + m);
}

/// `{f16 d; u32 fifth bits; u8 q[16]}`: `d · (q − 16)`.
fn q5_0(block: &[u8], out: &mut [f32]) {
    let (d, fifth) = (half_at(block, 0), word_at(block, 2));
    nibbles(&block[6..22], out, |j, q| f32::from((q | ((fifth >> j & 1) as u8) << 4) as i8 - 16) * d);
}

/// `{f16 d, m; u32 fifth bits; u8 q[16]}`: `d · q + m`.
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m, fifth) = (half_at(block, 0), half_at(block, 2), word_at(block, 4));
    nibbles(&block[8..24], out, |j, q| f32::from(q | ((fifth >> j & 1) as u8) << 4) * d + m);
}

/// `{f16 d; i8 q[32]}`: `d · q`.
fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (x, &q) in out.iter_mut().zip(&block[2..34]) {
        *x = f32::from(q as i8) * d;
    }
}

/// 6-bit scale and minimum of sub-block `j` of 8, packed into 12 bytes: the first four pairs lie in the low six bits of
/// bytes 0–3 and 4–7; the last four take their low nibbles from bytes 8–11 and their top two bits from bytes 0–7.
#[inline(always)]
fn scale_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// `{f16 d, dmin; u8 scales[12]; u8 q[128]}`: `(d · scale) · q − dmin · min`, scale and min by sub-blocks of 32.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, packed) = (&block[4..16], &block[16..144]);
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(scales, j);
        let (scale, min) = (d * scale, dmin * min);
        // Two sub-blocks share 32 bytes: the even one has the low nibbles.
        let shift = j % 2 * 4;
        for (x, byte) in out.iter_mut().zip(&packed[j / 2 * 32..]) {
            *x = scale * f32::from(byte >> shift & 15) - min;
        }
    }
}

/// `{f16 d, dmin; u8 scales[12]; u8 fifth bits[32]; u8 q[128]}`: as Q4_K with a fifth bit; sub-block `j` has bit `j`.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, fifth, packed) = (&block[4..16], &block[16..48], &block[48..176]);
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(scales, j);
        let (scale, min) = (d * scale, dmin * min);
        let shift = j % 2 * 4;
        for ((x, byte), fifth) in out.iter_mut().zip(&packed[j / 2 * 32..]).zip(fifth) {
            let q = byte >> shift & 15 | (fifth >> j & 1) << 4;
            *x = scale * f32::from(q) - min;
        }
    }
}

/// `{u8 low[128]; u8 high[64]; i8 scales[16]; f16 d}`: `(d · scale) · (q − 32)`, scales by sub-blocks of 16.
///
/// Each half of 128 elements is four runs of 32: runs 0 and 1 have the low nibbles of 64 bytes, runs 2 and 3 the high
/// ones, and run `r` has bits `2r` and `2r + 1` of 32 bytes of `high`.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (run, out) in out.chunks_exact_mut(32).enumerate() {
        let (half, r) = (run / 4, run % 4);
        let (low, high) = (&low[half * 64 + r % 2 * 32..][..32], &high[half * 32..][..32]);
        for (i, (x, (low, high))) in out.iter_mut().zip(low.iter().zip(high)).enumerate() {
            let scale = d * f32::from(scales[run * 2 + i / 16] as i8);
            let q = low >> (r / 2 * 4) & 15 | (high >> (2 * r) & 3) << 4;
            *x = scale * f32::from(q as i8 - 32);
        }
    }
}
