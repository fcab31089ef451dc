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
