//! The operations of nibble: one folder each, with its contract, its CPU reference and its tests.

pub mod adamw;
pub mod argmax;
pub mod attention;
pub mod cast;
pub mod cross_entropy;
pub mod cuda;
pub mod decoding;
pub mod dora;
pub mod dropout;
pub mod dynamic8;
pub mod elementwise;
pub mod embedding;
#[cfg(test)]
mod golden;
pub mod linear;
mod math;
pub mod mixed;
pub mod norm;
#[cfg(any(test, feature = "build-ptx"))]
pub mod ptx;
pub mod quantize;
pub mod random;
pub mod rms_norm;
pub mod rotary;
pub mod swiglu;
pub mod table;
mod tensor_list;
#[cfg(test)]
mod testing;
