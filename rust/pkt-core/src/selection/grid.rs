//! A small picture of a large matrix.

use rayon::prelude::*;

use super::{Matrix, at_most};
use crate::{Error, Result};

/// Mean scores on a coarse grid, `row_bins` × `column_bins`, row-major: what a heat map shows.
///
/// Bin i of b over n covers ⌊i·n/b⌋ .. ⌊(i+1)·n/b⌋; each sum is exact, and rounded once. One pass.
///
/// # Errors
/// [`Error::Invalid`] if there are no bins, or more than rows or columns.
pub fn bin_means(matrix: &Matrix, row_bins: usize, column_bins: usize) -> Result<Vec<f64>> {
    at_most(row_bins, matrix.rows(), "rows")?;
    at_most(column_bins, matrix.columns(), "columns")?;
    if row_bins == 0 || column_bins == 0 {
        return Err(Error::Invalid(format!(
            "a grid of {row_bins}×{column_bins} has no bin; expected at least 1×1"
        )));
    }
    Ok((0..row_bins)
        .into_par_iter()
        .flat_map_iter(|bin| {
            let rows = bin * matrix.rows() / row_bins..(bin + 1) * matrix.rows() / row_bins;
            let height = rows.len();
            let sums = matrix.column_sums(rows.into_par_iter());
            (0..column_bins).map(move |bin| {
                let columns = bin * sums.len() / column_bins..(bin + 1) * sums.len() / column_bins;
                let entries = (height * columns.len()) as f64;
                matrix.fixed().score(sums[columns].iter().sum()) / entries
            })
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::matrix::tests::{large, sample};
    use super::super::window_score;
    use super::*;
    use crate::simd::every;

    proptest! {
        #[test]
        fn a_bin_is_the_mean_of_its_window(sample in sample(), bins in (1usize..9, 1usize..9)) {
            let matrix = sample.matrix();
            let (rows, columns) = (matrix.rows(), matrix.columns());
            let Ok(means) = bin_means(&matrix, bins.0, bins.1) else {
                prop_assert!(bins.0 > rows || bins.1 > columns);
                return Ok(());
            };
            prop_assert_eq!(means.len(), bins.0 * bins.1);
            for (index, mean) in means.into_iter().enumerate() {
                let (i, j) = (index / bins.1, index % bins.1);
                let (top, bottom) = (i * rows / bins.0, (i + 1) * rows / bins.0);
                let (left, right) = (j * columns / bins.1, (j + 1) * columns / bins.1);
                let sum = window_score(&matrix, top..bottom, left..right).unwrap();
                let expected = sum / ((bottom - top) * (right - left)) as f64;
                prop_assert_eq!(mean.to_bits(), expected.to_bits());
            }
        }
    }

    #[test]
    fn every_thread_count_gives_the_same() {
        let sample = large();
        let grids = every::thread_count(|| bin_means(&sample.matrix(), 7, 64).unwrap());
        assert!(grids.iter().all(|grid| grid == &grids[0]));
    }

    #[test]
    fn no_bins_are_refused() {
        let matrix = Matrix::new(&[1.0; 6], 3, None, 1).unwrap();
        assert!(bin_means(&matrix, 0, 1).is_err() && bin_means(&matrix, 1, 0).is_err());
        assert_eq!(bin_means(&matrix, 2, 3).unwrap(), [1.0; 6]);
    }
}
