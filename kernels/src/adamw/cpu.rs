//! CPU kernels of AdamW.

use super::{BLOCK, Coefficients, State8};
use crate::dynamic8;
use nibble_runtime::{Result, Tensor};
use rayon::prelude::*;

/// Elements that a task handles at a time; smaller tensors stay on the calling thread.
const PIECE: usize = 1 << 14;

/// Code of zero in the signed map. As in the reference, a negative first moment never takes it: where the second moment
/// is zero too, the sign of the first still makes a step.
const ZERO: u8 = 127;

/// See [`super::step32`]; everything has been checked.
pub(super) fn step32(
    w: &mut [f32],
    grad: &Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    coefficients: &Coefficients,
) -> Result<()> {
    let grad = grad.to_f32()?;
    let (m, v) = (m.as_mut_slice::<f32>()?, v.as_mut_slice::<f32>()?);
    w.par_chunks_mut(PIECE)
        .zip(grad.par_chunks(PIECE))
        .zip(m.par_chunks_mut(PIECE).zip(v.par_chunks_mut(PIECE)))
        .for_each(|((w, g), (m, v))| {
            for (((w, &g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
                coefficients.update(w, g, m, v);
            }
        });
    Ok(())
}

/// See [`super::step8`]; everything has been checked.
pub(super) fn step8(
    w: &mut [f32],
    grad: &Tensor,
    m: &mut State8,
    v: &mut State8,
    coefficients: &Coefficients,
) -> Result<()> {
    let grad = grad.to_f32()?;
    let (m_codes, m_absmax) = (m.codes.as_mut_slice::<u8>()?, m.absmax.as_mut_slice::<f32>()?);
    let (v_codes, v_absmax) = (v.codes.as_mut_slice::<u8>()?, v.absmax.as_mut_slice::<f32>()?);
    let (signed, unsigned) = (dynamic8::signed_map(), dynamic8::unsigned_map());
    w.par_chunks_mut(BLOCK)
        .zip(grad.par_chunks(BLOCK))
        .zip(m_codes.par_chunks_mut(BLOCK).zip(m_absmax))
        .zip(v_codes.par_chunks_mut(BLOCK).zip(v_absmax))
        .with_min_len(PIECE / BLOCK)
        .for_each(|(((w, g), (m_codes, m_absmax)), (v_codes, v_absmax))| {
            let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
            let (m, v) = (&mut m[..w.len()], &mut v[..w.len()]);
            dynamic8::dequantize_block(m_codes, *m_absmax, signed, m);
            dynamic8::dequantize_block(v_codes, *v_absmax, unsigned, v);
            for (((w, &g), m), v) in w.iter_mut().zip(g).zip(&mut *m).zip(&mut *v) {
                coefficients.update(w, g, m, v);
            }
            *m_absmax = dynamic8::quantize_block(m, signed, m_codes);
            for (code, &m) in m_codes.iter_mut().zip(&*m) {
                if *code == ZERO && m < 0.0 {
                    *code -= 1;
                }
            }
            *v_absmax = dynamic8::quantize_block(v, unsigned, v_codes);
        });
    Ok(())
}
