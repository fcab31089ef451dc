//! Contiguous windows.

use std::cmp::Reverse;
use std::ops::Range;

use rayon::prelude::*;

use super::Matrix;
use super::matrix::{power_of_two, shift};
use crate::{Error, Result};

/// Where a window begins and what it sums to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// Its first logical row.
    pub row: usize,
    /// Its first column.
    pub column: usize,
    /// The sum of its scores.
    pub score: f64,
}

/// A window's sum, row and column in fixed point.
type Place = (u64, usize, usize);

/// The `rows` × `columns` window with the largest sum; ties: smallest row, then smallest column.
///
/// The column sums of a band of `rows` rows slide down the matrix, one row entering and one leaving;
/// along them slides the sum of `columns` neighbours. O(mn) time, O(n) memory a band.
///
/// # Errors
/// [`Error::Invalid`] if the window has no entry, or does not fit into the matrix.
pub fn best_window(matrix: &Matrix, rows: usize, columns: usize) -> Result<Window> {
    let (places, _) = places((matrix.rows(), matrix.columns()), (rows, columns))?;
    // With B bands on T threads, B · rows / T rows are added up to begin, then 2 · places / B slid
    // over: least at B = √(2 · places · T / rows).
    let threads = rayon::current_num_threads();
    let bands = (2 * places * threads / rows).isqrt().clamp(1, threads.min(places));
    let best = (0..bands)
        .into_par_iter()
        .map(|band| {
            best_of_band(matrix, band * places / bands..(band + 1) * places / bands, rows, columns)
        })
        .max_by_key(|&(sum, row, column)| (sum, Reverse((row, column))));
    let (sum, row, column) = best.unwrap_or_default();
    Ok(Window { row, column, score: matrix.fixed().score(sum) })
}

/// The best window among those whose first row is in `first_rows`.
fn best_of_band(matrix: &Matrix, first_rows: Range<usize>, rows: usize, columns: usize) -> Place {
    let top = first_rows.start;
    let mut sums = matrix.column_sums((top..top + rows).into_par_iter());
    let (sum, column) = best_run(&sums, columns);
    let mut best = (sum, top, column);
    for row in first_rows.skip(1) {
        matrix.slide(&mut sums, row - 1, row - 1 + rows);
        let (sum, column) = best_run(&sums, columns);
        if sum > best.0 {
            best = (sum, row, column);
        }
    }
    best
}

/// The largest sum of `width` neighbours, and the lowest index where it begins.
fn best_run(sums: &[u64], width: usize) -> (u64, usize) {
    let mut run = sums[..width].iter().sum();
    let mut best = (run, 0);
    for (start, (leave, enter)) in sums.iter().zip(&sums[width..]).enumerate() {
        run = run + enter - leave;
        if run > best.0 {
            best = (run, start + 1);
        }
    }
    best
}

/// The run of `width` columns with the largest sum, as a window of the one row `sums`; ties: the
/// smallest column. For embeddings, whose window slides over the hidden axis only.
///
/// # Errors
/// [`Error::Invalid`] if `width` is 0 or more than there are sums, or if a sum is negative or NaN,
/// or their total is not finite.
pub fn best_columns(sums: &[f64], width: usize) -> Result<Window> {
    places((1, sums.len()), (1, width))?;
    let total: f64 = sums.iter().sum();
    if let Some(column) = sums.iter().position(|sum| sum.is_nan() || *sum < 0.0) {
        return Err(Error::Invalid(format!(
            "column sums: expected numbers of 0 or more, found {} at column {column}",
            sums[column]
        )));
    }
    if total.is_infinite() {
        return Err(Error::Invalid("column sums: their total is not finite".into()));
    }
    let scale = power_of_two(shift(total, 63));
    let fixed: Vec<u64> = sums.iter().map(|sum| (sum * scale).round_ties_even() as u64).collect();
    let (sum, column) = best_run(&fixed, width);
    Ok(Window { row: 0, column, score: sum as f64 / scale })
}

/// The sum of the scores in `rows` × `columns`, 0 where either is empty.
///
/// # Errors
/// [`Error::Invalid`] if a range runs backwards or beyond the matrix.
pub fn window_score(matrix: &Matrix, rows: Range<usize>, columns: Range<usize>) -> Result<f64> {
    let fits = |range: &Range<usize>, count| range.start <= range.end && range.end <= count;
    if !fits(&rows, matrix.rows()) || !fits(&columns, matrix.columns()) {
        return Err(Error::Invalid(format!(
            "rows {rows:?} and columns {columns:?} are not a window of a matrix of {}×{}",
            matrix.rows(),
            matrix.columns()
        )));
    }
    let sums = matrix.column_sums(rows.into_par_iter());
    Ok(matrix.fixed().score(sums[columns].iter().sum()))
}

/// In how many rows and in how many columns a window of shape `window` can begin.
pub(super) fn places(shape: (usize, usize), window: (usize, usize)) -> Result<(usize, usize)> {
    let ((rows, columns), (height, width)) = (shape, window);
    if height == 0 || width == 0 {
        return Err(Error::Invalid(format!(
            "a window of {height}×{width} has no entry; expected at least 1×1"
        )));
    }
    if height > rows || width > columns {
        return Err(Error::Invalid(format!(
            "a window of {height}×{width} does not fit into a matrix of {rows}×{columns}; \
             the student must not be larger than the teacher"
        )));
    }
    Ok((rows - height + 1, columns - width + 1))
}
