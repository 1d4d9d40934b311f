//! The dynamic 8-bit map and block-wise 8-bit quantization.
