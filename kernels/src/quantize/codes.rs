//! The two 4-bit code books: values, decision points, and pairs of values by byte.

use nibble_runtime::{Error, Result};
use std::{fmt, str::FromStr};

/// Which 4-bit code book.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// 4-bit NormalFloat: quantiles of a normal distribution.
    Nf4,
    /// bitsandbytes' 4-bit float (not MX).
    Fp4,
}

/// Values of the NF4 codes, ascending.
#[allow(clippy::excessive_precision)] // the digits of the reference
pub const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// An NF4 code is the number of these that a scaled value lies strictly above.
#[allow(clippy::excessive_precision)] // the digits of the reference
pub const NF4_MIDPOINTS: [f32; 15] = [
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
];

/// Values of the FP4 codes: bit 3 is the sign, so that code 8 is a negative zero.
pub const FP4: [f32; 16] = {
    let magnitudes = [0.0, 0.0625 / 12.0, 8.0 / 12.0, 1.0, 4.0 / 12.0, 6.0 / 12.0, 2.0 / 12.0, 3.0 / 12.0];
    let mut values = [0.0; 16];
    let mut code = 0;
    while code < 8 {
        values[code] = magnitudes[code];
        values[code + 8] = -magnitudes[code];
        code += 1;
    }
    values
};

/// The rank of an FP4 magnitude is the number of these that it lies strictly above.
pub const FP4_MIDPOINTS: [f32; 7] = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333];

/// FP4 codes in ascending order of their magnitudes.
const FP4_BY_RANK: [u8; 8] = [0, 1, 6, 7, 4, 5, 2, 3];

/// The two values that each packed byte stands for.
pub(super) type Pairs = [[f32; 2]; 256];

const fn pairs(values: &[f32; 16]) -> Pairs {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [values[byte >> 4], values[byte & 15]];
        byte += 1;
    }
    pairs
}

static NF4_PAIRS: Pairs = pairs(&NF4);
static FP4_PAIRS: Pairs = pairs(&FP4);

/// NF4 code of a scaled value; of NaN (0 · 1/0, in a block of zeros) 0.
#[inline(always)]
pub(super) fn encode_nf4(x: f32) -> u8 {
    NF4_MIDPOINTS.iter().map(|&midpoint| u8::from(x > midpoint)).sum()
}

/// FP4 code of a scaled value; of NaN 0.
#[inline(always)]
pub(super) fn encode_fp4(x: f32) -> u8 {
    let rank: u8 = FP4_MIDPOINTS.iter().map(|&midpoint| u8::from(x.abs() > midpoint)).sum();
    FP4_BY_RANK[rank as usize & 7] | u8::from(x < 0.0) << 3
}

impl QuantType {
    /// Value of each code.
    pub const fn values(self) -> &'static [f32; 16] {
        match self {
            QuantType::Nf4 => &NF4,
            QuantType::Fp4 => &FP4,
        }
    }

    /// [`QuantType::values`] as checkpoints store them (`quant_map`), which know no negative zero.
    pub fn quant_map(self) -> [f32; 16] {
        self.values().map(|x| x + 0.0)
    }

    /// Its row in the table of the CUDA kernels (`codes.cuh`).
    pub(crate) fn index(self) -> u32 {
        match self {
            QuantType::Nf4 => 0,
            QuantType::Fp4 => 1,
        }
    }

    pub(super) fn pairs(self) -> &'static Pairs {
        match self {
            QuantType::Nf4 => &NF4_PAIRS,
            QuantType::Fp4 => &FP4_PAIRS,
        }
    }
}

impl fmt::Display for QuantType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            QuantType::Nf4 => "nf4",
            QuantType::Fp4 => "fp4",
        })
    }
}

impl FromStr for QuantType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "nf4" => Ok(QuantType::Nf4),
            "fp4" => Ok(QuantType::Fp4),
            _ => Err(Error::invalid("quantize", format!("unknown 4-bit type \"{text}\"; expected nf4 or fp4"))),
        }
    }
}
