//! Rotary position embedding in the half-split ("rotate_half") layout.
//!
//! Source: Su et al., "RoFormer", arXiv 2104.09864; frequency scaling as in transformers' `modeling_rope_utils`.

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
