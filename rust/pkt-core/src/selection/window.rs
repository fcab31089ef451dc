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
/// Fixed point as in [`Matrix`], of 63 bits for the total, as long as that is above 2⁻⁹⁶⁰.
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::matrix::tests::{Sample, large, sample};
    use super::*;
    use crate::cases;
    use crate::simd::every;

    /// The best window by going through all of them.
    fn reference<T: PartialOrd + Copy + std::iter::Sum>(
        scores: &[Vec<T>],
        rows: usize,
        columns: usize,
    ) -> (T, usize, usize) {
        let sum = |row: usize, column: usize| -> T {
            scores[row..row + rows].iter().flat_map(|r| &r[column..column + columns]).copied().sum()
        };
        let starts = (0..=scores.len() - rows)
            .flat_map(|row| (0..=scores[0].len() - columns).map(move |column| (row, column)));
        let places = starts.map(|(row, column)| (sum(row, column), row, column));
        places.reduce(|best, place| if place.0 > best.0 { place } else { best }).unwrap()
    }

    /// A matrix and the shape of a window that fits into it.
    fn fitting() -> impl Strategy<Value = (Sample, usize, usize)> {
        let filled = sample().prop_filter("no row", |sample| sample.matrix().rows() > 0);
        filled.prop_flat_map(|sample| {
            let (rows, columns) = (1..=sample.matrix().rows(), 1..=sample.columns);
            (Just(sample), rows, columns)
        })
    }

    /// Column sums and a width that fits.
    fn summed(sum: impl Strategy<Value = f64>) -> impl Strategy<Value = (Vec<f64>, usize)> {
        vec(sum, 1..20).prop_flat_map(|sums| {
            let width = 1..=sums.len();
            (Just(sums), width)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(cases(4000)))]

        #[test]
        fn the_best_window_is_that_of_brute_force((sample, rows, columns) in fitting()) {
            let matrix = sample.matrix();
            let window = best_window(&matrix, rows, columns).unwrap();
            let (units, row, column) = reference(&sample.units(), rows, columns);
            prop_assert_eq!(window, Window { row, column, score: matrix.fixed().score(units) });
            let found = window_score(&matrix, row..row + rows, column..column + columns).unwrap();
            prop_assert_eq!(window.score.to_bits(), found.to_bits());
        }

        #[test]
        fn its_score_is_that_of_plain_floats((sample, rows, columns) in fitting()) {
            let wide = |row: Vec<f32>| row.into_iter().map(f64::from).collect();
            let floats: Vec<Vec<f64>> = sample.logical().into_iter().map(wide).collect();
            let window = best_window(&sample.matrix(), rows, columns).unwrap();
            let (score, ..) = reference(&floats, rows, columns);
            prop_assert!((window.score - score).abs() <= 1e-6 * score);
        }

        #[test]
        fn the_best_columns_are_those_of_brute_force(
            (sums, width) in summed(prop_oneof![0.0..1e300, 0.0..1.0, Just(1e-45), Just(-0.0)])
        ) {
            let window = best_columns(&sums, width).unwrap();
            let (score, ..) = reference(&[sums], 1, width);
            prop_assert!((window.score - score).abs() <= 1e-12 * score);
        }

        #[test]
        fn ties_of_columns_go_to_the_smallest((sums, width) in summed((0u8..3).prop_map(f64::from))) {
            let window = best_columns(&sums, width).unwrap();
            let (score, row, column) = reference(&[sums], 1, width);
            prop_assert_eq!(window, Window { row, column, score });
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(cases(40)))]

        #[test]
        fn the_number_of_threads_leaves_no_trace((sample, rows, columns) in fitting()) {
            let windows = every::thread_count(|| best_window(&sample.matrix(), rows, columns));
            let windows: Vec<Window> = windows.into_iter().map(Result::unwrap).collect();
            prop_assert!(windows.iter().all(|window| window == &windows[0]));
        }

        #[test]
        fn every_number_of_bands_gives_the_same(rows in 1usize..302, columns in 1usize..1022) {
            let sample = large();
            let matrix = sample.matrix();
            let (sum, row, column) = best_of_band(&matrix, 0..302 - rows, rows, columns);
            let expected = Window { row, column, score: matrix.fixed().score(sum) };
            for window in every::thread_count(|| best_window(&matrix, rows, columns).unwrap()) {
                prop_assert_eq!(&window, &expected);
            }
        }
    }

    #[test]
    fn ties_go_to_the_smallest_row_then_the_smallest_column() {
        let at = |scores: &[f32], rows, columns| {
            let matrix = Matrix::new(scores, 4, Some(&[0, 0, 1, 1]), 2).unwrap();
            let window = best_window(&matrix, rows, columns).unwrap();
            (window.row, window.column, window.score)
        };
        assert_eq!(at(&[0.0; 8], 2, 3), (0, 0, 0.0));
        assert_eq!(at(&[0.1; 8], 1, 2), (0, 0, f64::from(0.1f32)));
        assert_eq!(at(&[0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 3.0], 1, 1), (2, 1, 1.5));
        assert_eq!(at(&[0.0, 3.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0], 1, 1), (0, 1, 1.5));
        assert_eq!(at(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 4, 4), (0, 0, 36.0));
    }

    #[test]
    fn a_peak_does_not_drown_what_is_small() {
        let mut scores = vec![1e-3; 64 * 64];
        scores[5] = 1e4;
        let matrix = Matrix::new(&scores, 64, None, 1).unwrap();
        let score = window_score(&matrix, 1..64, 0..64).unwrap();
        assert!((score / (63.0 * 64.0 * f64::from(1e-3f32)) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn windows_that_cannot_be_are_refused_with_both_shapes() {
        let matrix = Matrix::new(&[1.0; 6], 3, None, 1).unwrap();
        let message = best_window(&matrix, 3, 2).unwrap_err().to_string();
        assert!(message.contains("3×2") && message.contains("2×3"), "{message}");
        assert!(best_window(&matrix, 2, 4).is_err());
        assert!(best_window(&matrix, 0, 1).is_err() && best_window(&matrix, 1, 0).is_err());
        let empty = Matrix::new(&[], 3, None, 1).unwrap();
        assert!(best_window(&empty, 1, 1).is_err());
        #[expect(clippy::reversed_empty_ranges, reason = "that is what is refused")]
        let backwards = window_score(&matrix, 2..1, 0..3);
        assert!(backwards.is_err());
        assert!(window_score(&matrix, 0..3, 0..3).is_err());
        assert!(window_score(&matrix, 0..2, 0..4).is_err());
        assert_eq!(window_score(&matrix, 2..2, 0..3).unwrap().to_bits(), 0);
        assert!(best_columns(&[], 1).is_err() && best_columns(&[1.0], 2).is_err());
        assert!(best_columns(&[1.0, f64::NAN], 1).is_err());
        assert!(best_columns(&[-1.0], 1).is_err());
        assert!(best_columns(&[f64::MAX; 2], 1).is_err());
    }
}
