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

/// The sum of each row and of each column, correctly rounded from exact totals of fixed point.
#[must_use]
pub fn sums(matrix: &Matrix) -> (Vec<f64>, Vec<f64>) {
    let score = |sum| matrix.fixed().score(sum);
    let columns = matrix.column_sums((0..matrix.rows()).into_par_iter());
    (matrix.row_sums().into_iter().map(score).collect(), columns.into_iter().map(score).collect())
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::matrix::tests::sample;
    use super::*;
    use crate::cases;

    /// The `k` indices that no more than k - 1 others beat.
    fn reference(keys: &[u64], k: usize) -> Vec<usize> {
        let beats = |a: usize, b: usize| keys[a] > keys[b] || (keys[a] == keys[b] && a < b);
        let beaten = |index| (0..keys.len()).filter(|&other| beats(other, index)).count();
        (0..keys.len()).filter(|&index| beaten(index) < k).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(cases(1000)))]

        #[test]
        fn top_rows_and_columns_are_beaten_by_fewer_than_k(sample in sample(), k in 0usize..13) {
            let (matrix, units) = (sample.matrix(), sample.units());
            let rows: Vec<u64> = units.iter().map(|row| row.iter().sum()).collect();
            let column = |column: usize| units.iter().map(|row| row[column]).sum();
            let columns: Vec<u64> = (0..sample.columns).map(column).collect();
            for (found, sums) in [(top_rows(&matrix, k), rows), (top_columns(&matrix, k), columns)] {
                if k > sums.len() {
                    prop_assert!(found.is_err());
                } else {
                    prop_assert_eq!(found.unwrap(), reference(&sums, k));
                }
            }
        }

        #[test]
        fn sums_are_those_of_the_units_rounded_once(sample in sample()) {
            let (matrix, units) = (sample.matrix(), sample.units());
            let bits = |sums: Vec<u64>| -> Vec<u64> {
                sums.into_iter().map(|sum| matrix.fixed().score(sum).to_bits()).collect()
            };
            let column = |column: usize| units.iter().map(|row| row[column]).sum();
            let (rows, columns) = sums(&matrix);
            let found = |sums: Vec<f64>| sums.into_iter().map(f64::to_bits).collect::<Vec<_>>();
            prop_assert_eq!(found(rows), bits(units.iter().map(|row| row.iter().sum()).collect()));
            prop_assert_eq!(found(columns), bits((0..sample.columns).map(column).collect()));
        }

        #[test]
        fn the_cross_score_is_the_sum_of_its_entries(sample in sample(), pick in any::<(u16, u16)>()) {
            let (matrix, units) = (sample.matrix(), sample.units());
            let chosen = |bits: u16, count| (0..count).filter(|&i| bits >> i & 1 == 1).collect();
            let rows: Vec<usize> = chosen(pick.0, matrix.rows());
            let columns: Vec<usize> = chosen(pick.1, matrix.columns());
            let entries = rows.iter().flat_map(|&row| columns.iter().map(move |&c| (row, c)));
            let sum = entries.map(|(row, column)| units[row][column]).sum();
            let found = cross_score(&matrix, &rows, &columns).unwrap();
            prop_assert_eq!(found.to_bits(), matrix.fixed().score(sum).to_bits());
        }
    }

    #[test]
    fn layers_keep_their_order_and_ties_go_to_the_lower() {
        assert_eq!(top_layers(&[3.0, 5.0, 3.0, 9.0, 3.0], 4).unwrap(), [0, 1, 2, 3]);
        assert_eq!(top_layers(&[-0.0, 0.0, f64::INFINITY], 2).unwrap(), [0, 2]);
        assert_eq!(top_layers(&[], 0).unwrap(), [0; 0]);
        assert!(top_layers(&[1.0], 2).is_err());
        assert!(top_layers(&[1.0, f64::NAN], 1).unwrap_err().to_string().contains("layer 1"));
    }

    #[test]
    fn indices_that_do_not_ascend_are_refused() {
        let matrix = Matrix::new(&[1.0; 6], 3, None, 1).unwrap();
        for rows in [&[0, 0][..], &[1, 0], &[2]] {
            assert!(cross_score(&matrix, rows, &[0]).is_err());
        }
        assert!(cross_score(&matrix, &[0], &[3]).is_err());
    }
}
