//! The rows, columns and layers with the largest sums.

use std::cmp::Ordering;

use rayon::prelude::*;

use super::{Matrix, at_most};
use crate::{Error, Result};

/// The `k` rows with the largest sums, ascending; ties: the lower row.
///
/// # Errors
/// [`Error::Invalid`] if there are fewer than `k`.
pub fn top_rows(matrix: &Matrix, k: usize) -> Result<Vec<usize>> {
    at_most(k, matrix.rows(), "rows")?;
    Ok(largest(&matrix.row_sums(), k))
}

/// The `k` columns with the largest sums, ascending; ties: the lower column.
///
/// # Errors
/// [`Error::Invalid`] if there are fewer than `k`.
pub fn top_columns(matrix: &Matrix, k: usize) -> Result<Vec<usize>> {
    at_most(k, matrix.columns(), "columns")?;
    Ok(largest(&matrix.column_sums((0..matrix.rows()).into_par_iter()), k))
}

/// The `k` layers with the highest `scores`, ascending, so that their order is kept; ties: the
/// lower layer.
///
/// # Errors
/// [`Error::Invalid`] if there are fewer than `k`, or a score is NaN.
pub fn top_layers(scores: &[f64], k: usize) -> Result<Vec<usize>> {
    at_most(k, scores.len(), "layers")?;
    match scores.iter().position(|score| score.is_nan()) {
        Some(layer) => Err(Error::Invalid(format!("the score of layer {layer} is NaN"))),
        None => Ok(largest(scores, k)),
    }
}

/// The sum of the scores where one of `rows` crosses one of `columns`.
///
/// # Errors
/// [`Error::Invalid`] unless both ascend strictly, as [`top_rows`] gives them, within the matrix.
pub fn cross_score(matrix: &Matrix, rows: &[usize], columns: &[usize]) -> Result<f64> {
    ascending(rows, matrix.rows(), "rows")?;
    ascending(columns, matrix.columns(), "columns")?;
    let sums = matrix.column_sums(rows.par_iter().copied());
    Ok(matrix.fixed().score(columns.iter().map(|&column| sums[column]).sum()))
}

fn ascending(indices: &[usize], count: usize, things: &str) -> Result<()> {
    if indices.is_sorted_by(|a, b| a < b) && indices.last().is_none_or(|&last| last < count) {
        return Ok(());
    }
    Err(Error::Invalid(format!("{things}: expected ascending indices, each once, below {count}")))
}

/// The indices of the `k` largest keys, ascending; ties: the lower index, as the sort is stable.
fn largest<T: PartialOrd>(keys: &[T], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_by(|&a, &b| keys[b].partial_cmp(&keys[a]).unwrap_or(Ordering::Equal));
    order.truncate(k);
    order.sort_unstable();
    order
}
