//! How the learning rate changes over a run.

use nibble_runtime::Error;
use std::{f64::consts::PI, fmt, str::FromStr};

/// What follows the linear warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Schedule {
    /// The full rate.
    #[default]
    Constant,
    /// A straight line towards zero.
    Linear,
    /// Half a cosine wave towards zero.
    Cosine,
}

impl Schedule {
    /// What the learning rate of update `step` (from 0 on) of `total` is multiplied by.
    ///
    /// The warm-up's updates take `(step + 1) / warmup`. The curve is that of transformers' schedules, in which the first
    /// update has a rate of zero during a warm-up; here no update is without effect. After it the factors are theirs:
    /// 1 at `step = warmup`, and 0 from `step = total` on, which is past the last update.
    pub fn factor(self, step: u32, warmup: u32, total: u32) -> f64 {
        if step < warmup {
            return (f64::from(step) + 1.0) / f64::from(warmup);
        }
        let progress = f64::from(step - warmup) / f64::from(total.saturating_sub(warmup).max(1));
        let progress = progress.min(1.0);
        match self {
            Schedule::Constant => 1.0,
            Schedule::Linear => 1.0 - progress,
            Schedule::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Schedule::Constant => "constant",
            Schedule::Linear => "linear",
            Schedule::Cosine => "cosine",
        })
    }
}

impl FromStr for Schedule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "constant" => Ok(Schedule::Constant),
            "linear" => Ok(Schedule::Linear),
            "cosine" => Ok(Schedule::Cosine),
            _ => {
                let what = format!("unknown schedule \"{text}\"; expected constant, linear or cosine");
                Err(Error::invalid("schedule", what))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [Schedule; 3] = [Schedule::Constant, Schedule::Linear, Schedule::Cosine];

    fn factors(schedule: Schedule, warmup: u32, total: u32) -> Vec<f64> {
        (0..total).map(|step| schedule.factor(step, warmup, total)).collect()
    }

    #[test]
    fn known_factors() {
        assert_eq!(factors(Schedule::Constant, 2, 5), [0.5, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(factors(Schedule::Linear, 2, 6), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]);
        for (found, expected) in factors(Schedule::Cosine, 0, 4).iter().zip([1.0, 0.853_553_39, 0.5, 0.146_446_61]) {
            assert!((found - expected).abs() < 1e-8);
        }
    }

    #[test]
    fn names_are_read_back() {
        for schedule in ALL {
            assert_eq!(schedule.to_string().parse::<Schedule>().unwrap(), schedule);
        }
        assert!("step".parse::<Schedule>().unwrap_err().to_string().contains("cosine"));
    }

    proptest! {
        #[test]
        fn rises_to_one_then_never_rises(warmup in 0u32..50, total in 1u32..200, at in 0usize..3, any in any::<u32>()) {
            let factors = factors(ALL[at], warmup, total);
            // Every update has an effect.
            prop_assert!(factors.iter().all(|&f| f > 0.0 && f <= 1.0));
            let warmup = warmup as usize;
            for (step, pair) in factors.windows(2).enumerate() {
                if step + 1 < warmup {
                    prop_assert!(pair[1] > pair[0]);
                } else {
                    prop_assert!(pair[1] <= pair[0]);
                }
            }
            for first in [warmup.wrapping_sub(1), warmup] {
                if let Some(&factor) = factors.get(first) {
                    prop_assert_eq!(factor, 1.0);
                }
            }
            prop_assert!((0.0..=1.0).contains(&ALL[at].factor(any, warmup as u32, total)));
        }
    }
}
