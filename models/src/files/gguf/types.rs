//! Element types of GGUF tensors: their numbers, names and block sizes.

use std::fmt;

/// An element type of ggml, by the number that files use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GgmlType {
    /// The number in the file.
    pub id: u32,
    /// ggml's name.
    pub name: &'static str,
    /// Elements in a block.
    pub block: usize,
    /// Bytes of a block.
    pub bytes: usize,
}

const fn of(id: u32, name: &'static str, block: usize, bytes: usize) -> GgmlType {
    GgmlType { id, name, block, bytes }
}

impl GgmlType {
    pub const F32: GgmlType = of(0, "F32", 1, 4);
    pub const F16: GgmlType = of(1, "F16", 1, 2);
    pub const Q4_0: GgmlType = of(2, "Q4_0", 32, 18);
    pub const Q4_1: GgmlType = of(3, "Q4_1", 32, 20);
    pub const Q5_0: GgmlType = of(6, "Q5_0", 32, 22);
    pub const Q5_1: GgmlType = of(7, "Q5_1", 32, 24);
    pub const Q8_0: GgmlType = of(8, "Q8_0", 32, 34);
    pub const Q4_K: GgmlType = of(12, "Q4_K", 256, 144);
    pub const Q5_K: GgmlType = of(13, "Q5_K", 256, 176);
    pub const Q6_K: GgmlType = of(14, "Q6_K", 256, 210);
    pub const BF16: GgmlType = of(30, "BF16", 1, 2);

    /// Every type with a fixed block size. Those that [`GgmlType::is_readable`] denies are here so that a file that
    /// holds them can still be described, and the type named in the error.
    const ALL: [GgmlType; 32] = [
        Self::F32,
        Self::F16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        of(9, "Q8_1", 32, 40),
        of(10, "Q2_K", 256, 84),
        of(11, "Q3_K", 256, 110),
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        of(15, "Q8_K", 256, 292),
        of(16, "IQ2_XXS", 256, 66),
        of(17, "IQ2_XS", 256, 74),
        of(18, "IQ3_XXS", 256, 98),
        of(19, "IQ1_S", 256, 50),
        of(20, "IQ4_NL", 32, 18),
        of(21, "IQ3_S", 256, 110),
        of(22, "IQ2_S", 256, 82),
        of(23, "IQ4_XS", 256, 136),
        of(24, "I8", 1, 1),
        of(25, "I16", 1, 2),
        of(26, "I32", 1, 4),
        of(27, "I64", 1, 8),
        of(28, "F64", 1, 8),
        of(29, "IQ1_M", 256, 56),
        Self::BF16,
        of(34, "TQ1_0", 256, 54),
        of(35, "TQ2_0", 256, 66),
        of(39, "MXFP4", 32, 17),
    ];

    /// The type with this number, if there is one.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        Self::ALL.into_iter().find(|kind| kind.id == id)
    }

    /// Whether nibble converts this type to f32.
    pub fn is_readable(self) -> bool {
        super::quants::decoder(self).is_some()
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
