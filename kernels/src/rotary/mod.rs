//! Rotary position embedding in the half-split ("rotate_half") layout.
//!
//! Source: Su et al., "RoFormer", arXiv 2104.09864; frequency scaling as in transformers' `modeling_rope_utils`.

pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;

use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};
use rayon::prelude::*;
use std::ops::Not;

/// How rotary frequencies are changed for long contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Positions divided by `factor`.
    Linear { factor: f64 },
    /// NTK-aware base, growing once the sequence is longer than `original_max_position`.
    Dynamic { factor: f64, original_max_position: usize },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth blend between.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position: usize },
}

/// Rotary settings of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric progression of wavelengths.
    pub theta: f64,
    /// Frequency scaling.
    pub scaling: RopeScaling,
}

/// Cosines and sines of every position and frequency.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    /// f32 `[positions, head_dim / 2]`.
    pub(crate) cos: Tensor,
    /// f32 `[positions, head_dim / 2]`.
    pub(crate) sin: Tensor,
}

impl RopeConfig {
    /// Inverse frequencies `[head_dim / 2]` for sequences of up to `length` positions, rounded to f32 as transformers
    /// holds them.
    pub fn inverse_frequencies(&self, head_dim: usize, length: usize) -> Vec<f32> {
        let dim = head_dim as f64;
        let base = match self.scaling {
            RopeScaling::Dynamic { factor, original_max_position } => {
                let original = original_max_position as f64;
                let length = (length as f64).max(original);
                self.theta * (factor * length / original - (factor - 1.0)).powf(dim / (dim - 2.0))
            }
            _ => self.theta,
        };
        let scale = |frequency: f64| match self.scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let turns = original_max_position as f64 * frequency / std::f64::consts::TAU;
                let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let smooth = smooth.clamp(0.0, 1.0);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        };
        (0..head_dim / 2).map(|i| scale(base.powf(-2.0 * i as f64 / dim)) as f32).collect()
    }

    /// The table for positions `0..length`.
    ///
    /// # Errors
    /// `head_dim` is odd.
    pub fn table(&self, head_dim: usize, length: usize) -> Result<RotaryTable> {
        if !head_dim.is_multiple_of(2) {
            return Err(Error::invalid("rotary", format!("head dimension {head_dim} is odd")));
        }
        let frequencies = self.inverse_frequencies(head_dim, length);
        let angles = || (0..length).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
        let cos: Vec<f32> = angles().map(f32::cos).collect();
        let sin: Vec<f32> = angles().map(f32::sin).collect();
        let shape = [length, head_dim / 2];
        Ok(RotaryTable {
            cos: Tensor::from_slice(&cos, &shape, Tag::Workspace)?,
            sin: Tensor::from_slice(&sin, &shape, Tag::Workspace)?,
        })
    }
}

impl RotaryTable {
    /// Positions that the table covers.
    pub fn len(&self) -> usize {
        self.cos.shape()[0]
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.cos.device()
    }

    /// Address of the cosines in device memory.
    ///
    /// # Errors
    /// The table is in host memory.
    pub fn device_pointer(&self) -> Result<u64> {
        self.cos.device_pointer()
    }

    /// The table on `device`; itself if it is there.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn to_device(&self, device: Device) -> Result<RotaryTable> {
        let to = |tensor: &Tensor| tensor.clone().into_device(device, Tag::Workspace);
        Ok(RotaryTable { cos: to(&self.cos)?, sin: to(&self.sin)? })
    }

    /// Whether it covers none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// By the position's angle.
    Forward,
    /// Back by it: the transpose, which is the gradient of the forward turn.
    Backward,
}

/// The angles of some tokens.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'a> {
    /// Position of each token, i32 `[T]`.
    pub positions: &'a Tensor,
    /// Angles of the positions.
    pub table: &'a RotaryTable,
}

impl Turn<'_> {
    /// Whether these are angles of so many tokens, for heads of `dim`.
    pub(crate) fn check(&self, tokens: usize, dim: usize) -> Result<()> {
        let (half, at) = (self.table.cos.shape()[1], self.positions);
        if 2 * half != dim
            || at.shape() != [tokens]
            || at.dtype() != DType::I32
            || (self.table.is_empty() && tokens > 0)
        {
            let what =
                format!("heads of {dim}, {tokens} tokens, positions {at:?}, {} angles of {half}", self.table.len());
            return Err(Error::shape("rotary", what));
        }
        Ok(())
    }

    /// `grad` turned back, where it was turned.
    pub(crate) fn back(turn: Option<Turn>, grad: Tensor) -> Result<Tensor> {
        match turn {
            Some(Turn { positions, table }) => apply(grad, positions, table, Direction::Backward),
            None => Ok(grad),
        }
    }
}

/// Turns each head of `x` `[T, heads · head_dim]` by the angle of its token's position (i32 `[T]`). In place where nothing
/// else refers to `x` (on the CPU, where it is f32 too).
///
/// # Errors
/// The shapes do not fit, or a position is outside of the table. On a GPU positions are not looked at, as that would
/// wait for the device: there whoever makes positions and table makes them fit, and the kernel takes a position outside
/// for the nearest in the table.
pub fn apply(x: Tensor, positions: &Tensor, table: &RotaryTable, direction: Direction) -> Result<Tensor> {
    let (width, half) = check(&x, positions, table)?;
    match x.device() {
        Device::Cpu => {
            let positions = positions.as_slice::<i32>()?;
            let length = table.len();
            if let Some(bad) = positions.iter().find(|&&p| usize::try_from(p).is_ok_and(|p| p < length).not()) {
                return Err(Error::invalid("rotary", format!("position {bad} is outside of the table of {length}")));
            }
            let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
            let dtype = x.dtype();
            let own = x.is_unique() && dtype == DType::F32;
            let mut out = if own { x } else { x.cast(DType::F32, Tag::Activations)? };
            let (cos, sin) = (table.cos.as_slice::<f32>()?, table.sin.as_slice::<f32>()?);
            let rows = out.as_mut_slice::<f32>()?.par_chunks_mut(width).zip(positions);
            rows.with_min_len(32).for_each(|(row, &position)| {
                let at = position as usize * half;
                let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
                for head in row.chunks_exact_mut(2 * half) {
                    let (lows, highs) = head.split_at_mut(half);
                    for i in 0..half {
                        let (low, high, sin) = (lows[i], highs[i], sign * sin[i]);
                        lows[i] = low * cos[i] - high * sin;
                        highs[i] = high * cos[i] + low * sin;
                    }
                }
            });
            out.into_dtype(dtype, Tag::Activations)
        }
        Device::Cuda(_) => {
            let [x] = cuda::apply([x], positions, table, direction)?;
            Ok(x)
        }
    }
}

/// [`apply`] to q and k of the same tokens: on a GPU in one launch.
///
/// # Errors
/// As there, and on a GPU if they differ in type.
pub fn apply_both(
    qk: [Tensor; 2],
    positions: &Tensor,
    table: &RotaryTable,
    direction: Direction,
) -> Result<[Tensor; 2]> {
    qk.iter().try_for_each(|x| check(x, positions, table).map(drop))?;
    if qk[0].device() != Device::Cpu {
        return cuda::apply(qk, positions, table, direction);
    }
    let [q, k] = qk;
    Ok([apply(q, positions, table, direction)?, apply(k, positions, table, direction)?])
}

/// The width of `x`, and the half of a head, if all fits.
fn check(x: &Tensor, positions: &Tensor, table: &RotaryTable) -> Result<(usize, usize)> {
    let (tokens, width) = x.dims2("rotary")?;
    let half = table.cos.shape()[1];
    if half == 0 || !width.is_multiple_of(2 * half) || positions.shape() != [tokens] {
        let what = format!("input {:?}, positions {:?}, head dimension {}", x.shape(), positions.shape(), 2 * half);
        return Err(Error::shape("rotary", what));
    }
    Ok((width, half))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, random, wide};

    const PLAIN: RopeConfig = RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default };

    fn positions(positions: &[i32]) -> Tensor {
        Tensor::from_slice(positions, &[positions.len()], Tag::Workspace).unwrap()
    }

    /// The definition: each pair (i, i + half) of a head is a complex number times e^(i·angle).
    #[test]
    fn turns_pairs_by_their_angle() {
        let (head_dim, heads) = (8, 3);
        let x = random(&[4, heads * head_dim], 1);
        let at = [0, 5, 2, 99];
        let y = apply(x.clone(), &positions(&at), &PLAIN.table(head_dim, 100).unwrap(), Direction::Forward).unwrap();
        let xs = wide(&x);
        let mut expected = vec![0.0; xs.len()];
        for (t, &position) in at.iter().enumerate() {
            for head in 0..heads {
                for i in 0..head_dim / 2 {
                    let angle = f64::from(position) * 10_000f64.powf(-(i as f64) / 4.0);
                    let low = t * heads * head_dim + head * head_dim + i;
                    let high = low + head_dim / 2;
                    expected[low] = xs[low] * angle.cos() - xs[high] * angle.sin();
                    expected[high] = xs[high] * angle.cos() + xs[low] * angle.sin();
                }
            }
        }
        close(&y, &expected, 1e-5);
    }

    #[test]
    fn a_tensor_that_others_see_is_not_turned() {
        let (x, at, table) = (random(&[2, 16], 1), positions(&[3, 5]), PLAIN.table(16, 64).unwrap());
        let before = wide(&x);
        let turned = apply(x.clone(), &at, &table, Direction::Forward).unwrap();
        assert_eq!(wide(&x), before);
        let alone = apply(x, &at, &table, Direction::Forward).unwrap();
        assert_eq!(alone.bytes().unwrap(), turned.bytes().unwrap());
    }

    #[test]
    fn backward_is_the_inverse() {
        let x = random(&[4, 32], 1);
        let (at, table) = (positions(&[0, 1, 2, 50]), PLAIN.table(16, 64).unwrap());
        let y = apply(x.clone(), &at, &table, Direction::Forward).unwrap();
        close(&apply(y, &at, &table, Direction::Backward).unwrap(), &wide(&x), 1e-6);
    }

    /// Values of transformers 5 (`ROPE_INIT_FUNCTIONS`) for head dimension 8.
    #[test]
    fn scalings() {
        let frequencies = |scaling, length| RopeConfig { theta: 10_000.0, scaling }.inverse_frequencies(8, length);
        assert_eq!(frequencies(RopeScaling::Default, 10), [1.0, 0.1, 0.01, 0.001]);
        assert_eq!(frequencies(RopeScaling::Linear { factor: 4.0 }, 10), [0.25, 0.025, 0.0025, 0.00025]);
        let dynamic = RopeScaling::Dynamic { factor: 2.0, original_max_position: 64 };
        assert_eq!(frequencies(dynamic, 64), [1.0, 0.1, 0.01, 0.001]);
        let grown = 10_000f64 * (2.0f64 * 128.0 / 64.0 - 1.0).powf(8.0 / 6.0);
        assert_eq!(frequencies(dynamic, 128)[3], grown.powf(-0.75) as f32);
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 128,
        };
        let found = frequencies(llama3, 10);
        // Wavelengths 6.3 (kept), 63 (between 128/4 and 128/1: blended), 628 and 6283 (divided by 8).
        let smooth = (128.0 * 0.1 / std::f64::consts::TAU - 1.0) / 3.0;
        assert_eq!(found[0], 1.0);
        assert!((f64::from(found[1]) - ((1.0 - smooth) * 0.1 / 8.0 + smooth * 0.1)).abs() < 1e-8);
        assert_eq!(found[2..], [0.01 / 8.0, 0.001 / 8.0]);
    }

    #[test]
    fn positions_outside_of_the_table_are_errors() {
        let (x, table) = (random(&[1, 8], 1), PLAIN.table(8, 4).unwrap());
        for bad in [-1, 4] {
            assert!(apply(x.clone(), &positions(&[bad]), &table, Direction::Forward).is_err());
        }
        assert!(apply(random(&[1, 12], 1), &positions(&[0]), &table, Direction::Forward).is_err());
        assert!(PLAIN.table(7, 4).is_err());
    }
}
