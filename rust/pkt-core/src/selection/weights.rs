//! Single weights, as a bit mask over the logical matrix: row-major, lowest bit first.

use rayon::prelude::*;

use super::{Matrix, at_most};
use crate::{Error, Result};

/// Rows whose bits fill whole bytes, whatever the number of columns.
const ROWS: usize = 8;

/// The mask of the `k` largest entries; ties: the lowest row-major index.
///
/// Non-negative floats order as their bits do, so two histograms, of the upper 16 bits and then of
/// the lower 16 below the digit where the k-th falls, find the threshold: O(mn), three passes, half
/// a megabyte a task.
///
/// # Errors
/// [`Error::Invalid`] if there are fewer than `k` entries.
pub fn top_weights(matrix: &Matrix, k: usize) -> Result<Vec<u8>> {
    let count = matrix.len();
    at_most(k, count, "weights")?;
    let mut mask = vec![0; count.div_ceil(8)];
    if k == 0 {
        return Ok(mask);
    }
    let (upper, rest) = digit_of(&histogram(matrix, |key| Some(key >> 16)), k);
    let lower = histogram(matrix, |key| (key >> 16 == upper).then_some(key & 0xffff));
    let (lower, ties) = digit_of(&lower, rest);
    let threshold = upper << 16 | lower;

    let ties_of = |group| entries(matrix, group).filter(|&score| key(matrix, score) == threshold);
    let mut spare = ties;
    let spares: Vec<usize> = (0..matrix.rows().div_ceil(ROWS))
        .into_par_iter()
        .map(|group| ties_of(group).count())
        .collect::<Vec<_>>()
        .into_iter()
        .map(|ties| {
            let taken = ties.min(spare);
            spare -= taken;
            taken
        })
        .collect();
    (mask.par_chunks_mut(matrix.columns()).zip(spares).enumerate()).for_each(
        |(group, (bytes, mut spare))| {
            entries(matrix, group).enumerate().for_each(|(index, score)| {
                let key = key(matrix, score);
                let tie = key == threshold && spare > 0;
                spare -= usize::from(tie);
                bytes[index / 8] |= u8::from(key > threshold || tie) << (index % 8);
            });
        },
    );
    Ok(mask)
}

/// The sum of the entries that `mask` holds.
///
/// # Errors
/// [`Error::Invalid`] if `mask` is not one bit an entry, filled up with zeros to whole bytes.
pub fn mask_score(matrix: &Matrix, mask: &[u8]) -> Result<f64> {
    let count = matrix.len();
    if mask.len() != count.div_ceil(8) {
        return Err(Error::Invalid(format!(
            "weight mask: expected {} bytes for {count} weights, found {}",
            count.div_ceil(8),
            mask.len()
        )));
    }
    if !count.is_multiple_of(8) && mask.last().is_some_and(|&last| last >> (count % 8) != 0) {
        return Err(Error::Invalid(format!(
            "weight mask: expected zeros after the last of {count} bits"
        )));
    }
    let sums = mask.par_chunks(matrix.columns()).enumerate().map(|(group, bytes)| {
        let bit = |index: usize| u64::from(bytes[index / 8] >> (index % 8) & 1);
        let fixed = entries(matrix, group).map(|score| matrix.fixed().quantize(score));
        fixed.enumerate().map(|(index, units)| units * bit(index)).sum::<u64>()
    });
    Ok(matrix.fixed().score(sums.sum()))
}

/// The physical scores of the logical rows of a group, whose bits fill whole bytes.
fn entries(matrix: &Matrix, group: usize) -> impl Iterator<Item = f32> {
    let rows = group * ROWS..((group + 1) * ROWS).min(matrix.rows());
    rows.flat_map(move |row| matrix.row(row)).copied()
}

/// What orders as the logical score does: its bits without the sign, which only -0 can have.
fn key(matrix: &Matrix, score: f32) -> u32 {
    matrix.fixed().shared(score).to_bits() & 0x7fff_ffff
}

/// How often each 16-bit digit occurs.
fn histogram(matrix: &Matrix, digit: impl Fn(u32) -> Option<u32> + Sync) -> Vec<usize> {
    let empty = || vec![0; 1 << 16];
    (0..matrix.rows().div_ceil(ROWS))
        .into_par_iter()
        .with_min_len(ROWS)
        .fold(empty, |mut counts, group| {
            entries(matrix, group)
                .filter_map(|score| digit(key(matrix, score)))
                .for_each(|digit| counts[digit as usize] += 1);
            counts
        })
        .reduce(empty, |mut counts, others| {
            counts.iter_mut().zip(others).for_each(|(count, other)| *count += other);
            counts
        })
}

/// The digit of the `k`-th largest of what was counted, and what is left of `k` within that digit.
fn digit_of(counts: &[usize], k: usize) -> (u32, usize) {
    let mut left = k;
    for (digit, &count) in counts.iter().enumerate().rev() {
        if left <= count {
            return (digit as u32, left);
        }
        left -= count;
    }
    unreachable!("a histogram of at least k entries has a k-th largest")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::matrix::tests::{Sample, large, sample};
    use super::*;
    use crate::cases;
    use crate::simd::every;

    /// The mask of the first `k` of a stable sort, largest first.
    fn reference(sample: &Sample, k: usize) -> Vec<u8> {
        let scores = sample.logical().concat();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap());
        let mut mask = vec![0; scores.len().div_ceil(8)];
        order[..k].iter().for_each(|index| mask[index / 8] |= 1 << (index % 8));
        mask
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(cases(500)))]

        #[test]
        fn top_weights_come_first_in_a_stable_sort(sample in sample(), share in 0.0..=1.0) {
            let (matrix, units) = (sample.matrix(), sample.units().concat());
            let k = (share * units.len() as f64) as usize;
            let mask = top_weights(&matrix, k).unwrap();
            prop_assert_eq!(&mask, &reference(&sample, k));
            let held = |index: &usize| mask[index / 8] >> (index % 8) & 1 == 1;
            let sum = (0..units.len()).filter(held).map(|index| units[index]).sum();
            let score = mask_score(&matrix, &mask).unwrap();
            prop_assert_eq!(score.to_bits(), matrix.fixed().score(sum).to_bits());
            prop_assert!(top_weights(&matrix, units.len() + 1).is_err());
        }
    }

    #[test]
    fn every_thread_count_gives_the_same() {
        let sample = large();
        let matrix = sample.matrix();
        for k in [1, 1000, 150_000, matrix.len()] {
            let expected = reference(&sample, k);
            for (mask, score) in every::thread_count(|| {
                let mask = top_weights(&matrix, k).unwrap();
                let score = mask_score(&matrix, &mask).unwrap();
                (mask, score.to_bits())
            }) {
                assert_eq!(mask, expected);
                assert_eq!(score, mask_score(&matrix, &expected).unwrap().to_bits());
            }
        }
    }

    #[test]
    fn masks_of_another_shape_are_refused() {
        let matrix = Matrix::new(&[1.0; 12], 3, None, 1).unwrap();
        assert_eq!(mask_score(&matrix, &[0xff, 0x0f]).unwrap().to_bits(), 12f64.to_bits());
        assert!(mask_score(&matrix, &[0xff]).is_err());
        assert!(mask_score(&matrix, &[0xff, 0x1f]).is_err());
        let empty = Matrix::new(&[], 3, None, 1).unwrap();
        assert_eq!(top_weights(&empty, 0).unwrap(), [0; 0]);
        assert_eq!(mask_score(&empty, &[]).unwrap().to_bits(), 0);
    }
}
