//! Random controls: the same on every platform for the same seed.

use super::at_most;
use super::window::places;
use crate::Result;

/// A mask (see [`super::top_weights`]) of `k` of `len` entries, every subset equally likely.
///
/// Selection sampling in order (Fan, Muller and Rezucha 1962; Knuth, TAOCP 2, 3.4.2, algorithm S):
/// an entry is taken with probability (still to take) / (still to come).
///
/// # Errors
/// [`crate::Error::Invalid`] if `len` is less than `k`.
pub fn random_weights(len: usize, k: usize, seed: u64) -> Result<Vec<u8>> {
    at_most(k, len, "weights")?;
    let mut generator = SplitMix64(seed);
    let mut mask = vec![0; len.div_ceil(8)];
    let mut wanted = k as u64;
    for index in 0..len {
        let taken = generator.below((len - index) as u64) < wanted;
        wanted -= u64::from(taken);
        mask[index / 8] |= u8::from(taken) << (index % 8);
    }
    Ok(mask)
}

/// The (row, column) of a window of shape `window` in a matrix of shape `shape`, both (rows,
/// columns), every place equally likely.
///
/// # Errors
/// [`crate::Error::Invalid`] if the window has no entry, or does not fit.
pub fn random_window(
    shape: (usize, usize),
    window: (usize, usize),
    seed: u64,
) -> Result<(usize, usize)> {
    let (rows, columns) = places(shape, window)?;
    let mut generator = SplitMix64(seed);
    let row = generator.below(rows as u64) as usize;
    Ok((row, generator.below(columns as u64) as usize))
}

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with the
/// constants of Vigna's `splitmix64.c`.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Uniform in 0 .. `bound`, without bias: Lemire, "Fast random integer generation in an
    /// interval", 2019. The product's upper half is the number; lower halves that would favour
    /// some numbers are drawn again.
    fn below(&mut self, bound: u64) -> u64 {
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            let (number, lower) = ((product >> 64) as u64, product as u64);
            if lower >= bound || lower >= bound.wrapping_neg() % bound {
                return number;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// χ² of `counts` against all equal.
    fn chi_squared(counts: impl ExactSizeIterator<Item = u32>, total: u32) -> f64 {
        let expected = f64::from(total) / counts.len() as f64;
        counts.map(|count| (f64::from(count) - expected).powi(2) / expected).sum()
    }

    proptest! {
        #[test]
        fn exactly_k_bits_are_set(len in 0usize..300, share in 0.0..=1.0, seed: u64) {
            let k = (share * len as f64) as usize;
            let mask = random_weights(len, k, seed).unwrap();
            prop_assert_eq!(mask.len(), len.div_ceil(8));
            prop_assert_eq!(mask.iter().map(|byte| byte.count_ones() as usize).sum::<usize>(), k);
            prop_assert!(len % 8 == 0 || mask[len / 8] >> (len % 8) == 0);
            prop_assert!(random_weights(len, len + 1, seed).is_err());
        }

        #[test]
        fn a_random_window_lies_within(
            shape in (1usize..9, 1usize..9), window in (0usize..9, 0usize..9), seed: u64
        ) {
            let fits = window.0 > 0 && window.1 > 0 && window.0 <= shape.0 && window.1 <= shape.1;
            match random_window(shape, window, seed) {
                Ok(at) => prop_assert!(fits && at.0 + window.0 <= shape.0 && at.1 + window.1 <= shape.1),
                Err(_) => prop_assert!(!fits),
            }
        }
    }

    #[test]
    fn the_generator_gives_its_published_values() {
        let mut generator = SplitMix64(1_234_567);
        let published =
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!(published.map(|_| generator.next()), published);
    }

    #[test]
    fn a_bound_that_does_not_divide_leaves_no_bias() {
        // Four of 2⁶⁴ values would fall on three numbers: twice on each multiple of 3.
        let (mut generator, mut counts) = (SplitMix64(1), [0; 3]);
        for _ in 0..3000 {
            counts[(generator.below(3 << 62) % 3) as usize] += 1;
        }
        // 99.9 % of uniform samples stay below 13.8 (2 degrees of freedom).
        assert!(chi_squared(counts.into_iter(), 3000) < 13.8, "{counts:?}");
    }

    #[test]
    fn every_subset_is_equally_likely() {
        let mut counts = HashMap::new();
        for seed in 0..56_000 {
            *counts.entry(random_weights(8, 3, seed).unwrap()).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 56);
        // 99.9 % of uniform samples stay below 93 (55 degrees of freedom).
        assert!(chi_squared(counts.into_values().collect::<Vec<_>>().into_iter(), 56_000) < 93.0);
    }

    #[test]
    fn every_place_is_equally_likely() {
        let mut counts = [0; 12];
        for seed in 0..12_000 {
            let (row, column) = random_window((5, 4), (3, 1), seed).unwrap();
            counts[row * 4 + column] += 1;
        }
        // 99.9 % of uniform samples stay below 31.3 (11 degrees of freedom).
        assert!(chi_squared(counts.into_iter(), 12_000) < 31.3);
    }

    #[test]
    fn a_seed_gives_the_same_bits_for_ever() {
        assert_eq!(random_weights(40, 16, 42).unwrap(), [94, 133, 37, 1, 60]);
        assert_eq!(random_window((8192, 8192), (4096, 4096), 42).unwrap(), (3038, 655));
    }
}
