//! `selection` against going through all there is.
//!
//! Scores may be anything, also NaN, infinite, negative or subnormal; row map, shapes and counts
//! too. What is refused must be what cannot be. What is found must be the first of the best: to the
//! bit where the scores are small integers, whose sums floats hold too, else as near as fixed point
//! promises.

#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use pkt_core::selection::{self, Matrix};

#[derive(Arbitrary, Debug)]
struct Input {
    columns: u8,
    scores: Scores,
    rows: Option<Vec<u8>>,
    share: u32,
    window: (Count, Count),
    k: Count,
}

#[derive(Arbitrary, Debug)]
enum Scores {
    Small(Vec<u8>),
    Any(Vec<u32>),
}

/// One that may fit, or any at all.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Count {
    Small(u8),
    Any(usize),
}

impl Count {
    fn value(self) -> usize {
        match self {
            Self::Small(count) => usize::from(count % 32),
            Self::Any(count) => count,
        }
    }
}

fuzz_target!(|input: Input| {
    let columns = usize::from(input.columns % 16);
    let (mut scores, small): (Vec<f32>, _) = match &input.scores {
        Scores::Small(scores) => (scores.iter().map(|&score| (score % 4).into()).collect(), true),
        Scores::Any(bits) => (bits.iter().copied().map(f32::from_bits).collect(), false),
    };
    scores.truncate(400);
    let map: Option<Vec<u32>> =
        input.rows.map(|rows| rows.iter().take(64).map(|&row| (row % 32).into()).collect());
    let found = Matrix::new(&scores, columns, map.as_deref(), input.share);
    let logical = logical(&scores, columns, map.as_deref(), input.share);
    assert_eq!(found.is_ok(), logical.is_some());
    let (Ok(matrix), Some(logical)) = (found, logical) else { return };
    assert_eq!((matrix.rows(), matrix.columns()), (logical.len(), columns));

    let exact = small && input.share.is_power_of_two();
    let law = Law { exact, entries: logical.concat() };
    let (rows, width) = (input.window.0.value(), input.window.1.value());
    law.window(&matrix, &logical, rows, width);
    law.top(&matrix, &logical, input.k.value());
    law.weights(&matrix, input.k.value());
});

/// The matrix as its documentation says it, where it can be.
fn logical(
    scores: &[f32],
    columns: usize,
    map: Option<&[u32]>,
    share: u32,
) -> Option<Vec<Vec<f64>>> {
    if columns == 0 || !scores.len().is_multiple_of(columns) || share == 0 {
        return None;
    }
    let physical: Vec<&[f32]> = scores.chunks(columns).collect();
    let rows = map.map_or_else(|| (0..physical.len() as u32).collect(), <[u32]>::to_vec);
    let shared =
        |&score: &f32| (score.is_finite() && score >= 0.0).then(|| f64::from(score / share as f32));
    rows.into_iter().map(|row| physical.get(row as usize)?.iter().map(shared).collect()).collect()
}

/// How equal two results must be.
struct Law {
    exact: bool,
    entries: Vec<f64>,
}

impl Law {
    /// Each entry is rounded to 2⁻⁵² of the largest, or the total to 2⁻⁶³.
    #[track_caller]
    fn near(&self, found: f64, expected: f64) {
        let total: f64 = self.entries.iter().sum();
        let error = if self.exact { 0.0 } else { total * 1e-12 };
        assert!((found - expected).abs() <= error, "found {found}, expected {expected}");
    }

    #[track_caller]
    fn same<T: PartialEq + Debug>(&self, found: T, expected: T) {
        assert!(!self.exact || found == expected, "found {found:?}, expected {expected:?}");
    }

    fn window(&self, matrix: &Matrix, logical: &[Vec<f64>], rows: usize, width: usize) {
        let found = selection::best_window(matrix, rows, width);
        let fits = (1..=matrix.rows()).contains(&rows) && (1..=matrix.columns()).contains(&width);
        assert_eq!(found.is_ok(), fits);
        let Ok(found) = found else { return };
        let mut best = (0, 0, -1.0);
        for row in 0..=logical.len() - rows {
            for column in 0..=matrix.columns() - width {
                let band = logical[row..row + rows].iter();
                let sum = band.flat_map(|line| &line[column..column + width]).sum();
                if sum > best.2 {
                    best = (row, column, sum);
                }
            }
        }
        self.near(found.score, best.2);
        self.same((found.row, found.column), (best.0, best.1));
        let (down, right) = (found.row..found.row + rows, found.column..found.column + width);
        let score = selection::window_score(matrix, down, right).unwrap();
        assert_eq!(found.score.to_bits(), score.to_bits());
    }

    fn top(&self, matrix: &Matrix, logical: &[Vec<f64>], k: usize) {
        let rows: Vec<f64> = logical.iter().map(|line| line.iter().sum()).collect();
        let column = |column: usize| logical.iter().map(|line| line[column]).sum();
        let columns: Vec<f64> = (0..matrix.columns()).map(column).collect();
        let sums = selection::sums(matrix);
        for (found, sums, expected) in [
            (selection::top_rows(matrix, k), sums.0, rows),
            (selection::top_columns(matrix, k), sums.1, columns),
        ] {
            sums.iter().zip(&expected).for_each(|(&sum, &expected)| self.near(sum, expected));
            assert_eq!(found.is_ok(), k <= expected.len());
            if let Ok(found) = found {
                assert!(found.len() == k && found.is_sorted_by(|a, b| a < b));
                self.same(found, largest(&expected, k));
            }
        }
    }

    fn weights(&self, matrix: &Matrix, k: usize) {
        let found = selection::top_weights(matrix, k);
        assert_eq!(found.is_ok(), k <= self.entries.len());
        let Ok(mask) = found else { return };
        let held = |&index: &usize| mask[index / 8] >> (index % 8) & 1 == 1;
        let found: Vec<usize> = (0..self.entries.len()).filter(held).collect();
        assert_eq!(found, largest(&self.entries, k)); // no sums, so no rounding
        let score = selection::mask_score(matrix, &mask).unwrap();
        self.near(score, found.into_iter().map(|index| self.entries[index]).sum());
    }
}

/// The first `k` of a stable sort, largest first, then ascending.
fn largest(keys: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_by(|&a, &b| keys[b].partial_cmp(&keys[a]).unwrap());
    order.truncate(k);
    order.sort_unstable();
    order
}
