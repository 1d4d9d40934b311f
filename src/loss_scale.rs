//! Dynamic loss scaling for f16, whose smallest numbers are too large for most gradients.
//!
//! The loss is multiplied by a power of two before the backward pass and the gradient divided by it after. When a gradient
//! overflows, the step is left out and the factor halved; after a run of good steps it doubles (Micikevicius et al.,
//! "Mixed Precision Training", arXiv 1710.03740).

use nibble_runtime::DType;
use serde::{Deserialize, Serialize};

/// Good steps after which the factor doubles.
const GROW_AFTER: u32 = 200;

/// The current factor.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    factor: f32,
    good: u32,
    dynamic: bool,
}

impl LossScale {
    /// 2¹⁵ for f16, and always 1 for types with the range of f32.
    pub fn new(dtype: DType) -> Self {
        let dynamic = dtype == DType::F16;
        let factor = if dynamic { 32_768.0 } else { 1.0 };
        LossScale { factor, good: 0, dynamic }
    }

    /// Whether an overflow is answered by another factor.
    pub fn is_dynamic(&self) -> bool {
        self.dynamic && self.factor > 1.0
    }

    /// What to multiply the next loss by.
    pub fn factor(&self) -> f32 {
        self.factor
    }

    /// Takes note of whether the gradients are finite; returns whether to apply them.
    pub fn update(&mut self, finite: bool) -> bool {
        if !self.dynamic {
            return finite;
        }
        self.good = if finite { self.good + 1 } else { 0 };
        if !finite {
            self.factor = (self.factor / 2.0).max(1.0);
        } else if self.good == GROW_AFTER {
            self.factor = (self.factor * 2.0).min(65_536.0 * 256.0);
            self.good = 0;
        }
        finite
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_on_overflow_and_doubles_after_a_good_run() {
        let mut scale = LossScale::new(DType::F16);
        assert!(!scale.update(false));
        assert_eq!(scale.factor(), 16_384.0);
        for _ in 0..GROW_AFTER {
            assert!(scale.update(true));
        }
        assert_eq!(scale.factor(), 32_768.0);
        while scale.is_dynamic() {
            scale.update(false);
        }
        assert_eq!(scale.factor(), 1.0);
    }

    #[test]
    fn wide_types_need_none() {
        let mut scale = LossScale::new(DType::BF16);
        assert!(scale.update(true) && !scale.is_dynamic());
        assert_eq!(scale.factor(), 1.0);
    }
}
