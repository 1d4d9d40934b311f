//! Matrix products with dense and quantized weights.
