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
