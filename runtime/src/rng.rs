//! Counter-based random numbers: Philox4x32-10.
//!
//! Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
//! A number is a pure function of (seed, stream, position), so every thread and every device makes the same stream,
//! a resumed run continues it, and dropout masks need not be stored.

/// Names an independent stream of random numbers under one seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream {
    /// What the numbers are for: one value per use, so that no two uses share numbers.
    pub purpose: u32,
    /// Optimizer step (or epoch) the numbers belong to.
    pub step: u32,
    /// Layer or tensor within the step.
    pub layer: u32,
}

/// A generator of the numbers of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
    stream: Stream,
}

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The Philox4x32-10 bijection of `counter` under `key`.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

impl Philox {
    /// The generator of `stream` under `seed`.
    pub fn new(seed: u64, stream: Stream) -> Self {
        Philox { key: [seed as u32, (seed >> 32) as u32], stream }
    }

    /// The four numbers at positions `4·block .. 4·block + 4`. `purpose` and `layer` share a counter word (16 bits each).
    pub fn block(&self, block: u64) -> [u32; 4] {
        let Stream { purpose, step, layer } = self.stream;
        debug_assert!(purpose < 1 << 16 && layer < 1 << 16);
        philox4x32([block as u32, (block >> 32) as u32, step, purpose << 16 | layer & 0xFFFF], self.key)
    }

    /// The 32 random bits at `position`.
    pub fn bits(&self, position: u64) -> u32 {
        self.block(position / 4)[(position % 4) as usize]
    }

    /// Uniform in [0, 1) with 24 random bits.
    pub fn uniform(&self, position: u64) -> f32 {
        unit(self.bits(position))
    }

    /// Standard normal by Box–Muller; `position` numbers normals, not words.
    pub fn normal(&self, position: u64) -> f32 {
        let words = self.block(position / 2);
        let pair = 2 * (position % 2) as usize;
        // 1 - u lies in (0, 1], so that the logarithm is finite.
        let radius = (-2.0 * (1.0 - unit(words[pair])).ln()).sqrt();
        radius * (std::f32::consts::TAU * unit(words[pair + 1])).cos()
    }

    /// A uniform integer below `n` (which must not be 0) by multiply-shift; the bias is below n / 2³².
    pub fn below(&self, position: u64, n: u32) -> u32 {
        ((u64::from(self.bits(position)) * u64::from(n)) >> 32) as u32
    }

    /// A Fisher–Yates permutation of `0..n`.
    pub fn permutation(&self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u64, i as u32 + 1) as usize);
        }
        order
    }
}

fn unit(bits: u32) -> f32 {
    (bits >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the reference implementation (Random123, `kat_vectors`, philox4x32 10 rounds).
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn moments_and_ranges() {
        let rng = Philox::new(7, Stream { purpose: 1, step: 2, layer: 3 });
        let n = 100_000;
        let uniform: Vec<f64> = (0..n).map(|i| f64::from(rng.uniform(i))).collect();
        assert!(uniform.iter().all(|u| (0.0..1.0).contains(u)));
        assert!((uniform.iter().sum::<f64>() / n as f64 - 0.5).abs() < 0.005);
        let normal: Vec<f64> = (0..n).map(|i| f64::from(rng.normal(i))).collect();
        assert!((normal.iter().sum::<f64>() / n as f64).abs() < 0.015);
        assert!((normal.iter().map(|x| x * x).sum::<f64>() / n as f64 - 1.0).abs() < 0.02);
        let mut order = rng.permutation(1000);
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn streams_differ() {
        let base = Stream { purpose: 1, step: 1, layer: 1 };
        let first = Philox::new(0, base).block(0);
        for other in [Stream { purpose: 2, ..base }, Stream { step: 2, ..base }, Stream { layer: 2, ..base }] {
            assert_ne!(first, Philox::new(0, other).block(0));
        }
        assert_ne!(first, Philox::new(1, base).block(0));
    }
}
