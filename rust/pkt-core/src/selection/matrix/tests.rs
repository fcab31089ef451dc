use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::simd::every;

/// What a [`Matrix`] borrows.
#[derive(Clone, Debug)]
pub(in super::super) struct Sample {
    pub scores: Vec<f32>,
    pub columns: usize,
    pub rows: Option<Vec<u32>>,
    pub share: u32,
}

impl Sample {
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::new(&self.scores, self.columns, self.rows.as_deref(), self.share).unwrap()
    }

    /// The logical matrix, row by row.
    pub fn logical(&self) -> Vec<Vec<f32>> {
        let identity = (0..(self.scores.len() / self.columns) as u32).collect();
        let rows = self.rows.clone().unwrap_or(identity);
        let physical: Vec<_> = self.scores.chunks(self.columns).collect();
        let share = |&score: &f32| score / self.share as f32;
        rows.iter().map(|&row| physical[row as usize].iter().map(share).collect()).collect()
    }

    /// The logical matrix in the units of `matrix`.
    pub fn units(&self) -> Vec<Vec<u64>> {
        let scale = self.matrix().fixed.scale;
        let units = |score| (f64::from(score) * scale).round_ties_even() as u64;
        self.logical().into_iter().map(|row| row.into_iter().map(units).collect()).collect()
    }
}

/// Small matrices: many ties, or any scores, subnormal ones and -0 among them.
pub(in super::super) fn sample() -> impl Strategy<Value = Sample> {
    let score = prop_oneof![
        3 => (0u8..3).prop_map(f32::from),
        1 => (0..=f32::MAX.to_bits()).prop_map(f32::from_bits),
        1 => prop_oneof![Just(-0.0), Just(1e-45), Just(f32::MAX), Just(f32::MIN_POSITIVE)],
    ];
    let small = (0u8..3).prop_map(f32::from);
    let scores = move |count| prop_oneof![vec(small.clone(), count), vec(score.clone(), count)];
    (0usize..9, 1usize..9, 1u32..5)
        .prop_flat_map(move |(rows, columns, share)| {
            let map = vec(0..rows.max(1) as u32, if rows == 0 { 0..1 } else { 0..12 });
            (scores(rows * columns), Just(columns), proptest::option::of(map), Just(share))
        })
        .prop_map(|(scores, columns, rows, share)| Sample { scores, columns, rows, share })
}

/// 203 × 1021 scores, a few values each many times, and a map that repeats rows.
pub(in super::super) fn large() -> Sample {
    let score = |i: u32| (i.wrapping_mul(2_654_435_761) >> 20) as f32;
    let rows = (0..301).map(|row| row * 7 % 203).collect();
    Sample {
        scores: (0..203 * 1021).map(score).collect(),
        columns: 1021,
        rows: Some(rows),
        share: 3,
    }
}

/// A kernel together with the column sums that it changes.
#[derive(Clone)]
struct Owned<'a>(Vec<u64>, Option<&'a [f32]>, &'a [f32], Fixed);

impl Kernel for Owned<'_> {
    type Output = Vec<u64>;

    #[inline(always)]
    fn run(self) -> Vec<u64> {
        let Self(mut sums, leave, enter, fixed) = self;
        match leave {
            Some(leave) => Slide { sums: &mut sums, leave, enter, fixed }.run(),
            None => Add { sums: &mut sums, enter, fixed }.run(),
        }
        sums
    }
}

fn check_shift(sample: &Sample) {
    let scale = sample.matrix().fixed.scale;
    let scores = sample.logical().concat();
    let peak = scores.iter().copied().fold(0.0, f32::max);
    let total: f64 = scores.iter().copied().map(f64::from).sum();
    let fits = |scale| {
        f64::from(peak) * scale < 2f64.powi(52) && total * scale < 2f64.powi(63) / (1.0 + 1e-9)
    };
    assert!(fits(scale) && (peak == 0.0 || !fits(2.0 * scale)), "{scale}");
    assert!(sample.units().concat().into_iter().map(u128::from).sum::<u128>() < 1 << 64);
}

#[test]
fn the_shift_of_many_entries_is_bounded_by_their_total() {
    let sample = large();
    check_shift(&sample);
    check_shift(&Sample { scores: vec![f32::MAX; 1 << 16], columns: 1 << 8, rows: None, share: 1 });
}

proptest! {
    #[test]
    fn the_shift_is_the_largest_that_cannot_overflow(sample in sample()) {
        check_shift(&sample);
    }

    #[test]
    fn sums_equal_the_naive_ones(sample in sample()) {
        let (matrix, units) = (sample.matrix(), sample.units());
        let rows: Vec<u64> = units.iter().map(|row| row.iter().sum()).collect();
        prop_assert_eq!(matrix.row_sums(), rows);
        let column = |column: usize| units.iter().map(|row| row[column]).sum::<u64>();
        let columns: Vec<u64> = (0..sample.columns).map(column).collect();
        prop_assert_eq!(matrix.column_sums((0..matrix.rows()).into_par_iter()), columns);
    }

    #[test]
    fn every_width_gives_the_same(
        rows in vec((0..=f32::MAX.to_bits(), 0..=f32::MAX.to_bits()), 0..100),
        share in 1u32..4,
    ) {
        let (leave, enter): (Vec<f32>, Vec<f32>) =
            rows.into_iter().map(|(a, b)| (f32::from_bits(a), f32::from_bits(b))).unzip();
        let scores = [leave.clone(), enter.clone()].concat();
        let matrix = Matrix::new(&scores, leave.len().max(1), None, share).unwrap();
        let fixed = matrix.fixed;
        let sums: Vec<u64> = leave.iter().map(|&score| fixed.quantize(score)).collect();
        let entered: Vec<u64> = enter.iter().map(|&score| fixed.quantize(score)).collect();
        for found in every::width(&Owned(sums, Some(&leave), &enter, fixed)) {
            prop_assert_eq!(&found, &entered);
        }
        for found in every::width(&Owned(vec![0; leave.len()], None, &enter, fixed)) {
            prop_assert_eq!(&found, &entered);
        }
        for found in every::width(&Total { row: &enter, fixed }) {
            prop_assert_eq!(found, entered.iter().sum::<u64>());
        }
        let surveys = every::width(&Inspect { row: &enter, fixed });
        prop_assert!(surveys.iter().all(|survey| survey == &surveys[0] && survey.valid));
    }
}

#[test]
fn every_thread_count_gives_the_same() {
    let sample = large();
    let outcomes = every::thread_count(|| {
        let matrix = sample.matrix();
        let columns = matrix.column_sums((0..matrix.rows()).into_par_iter());
        (matrix.fixed.scale.to_bits(), matrix.row_sums(), columns)
    });
    assert!(outcomes.iter().all(|outcome| outcome == &outcomes[0]));
}

#[test]
fn what_is_no_score_is_refused_and_named() {
    for (score, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-1e-45, "-0.0")] {
        let mut scores = vec![1.0; 100 * 40];
        scores[70 * 40 + 35] = score;
        let message = Matrix::new(&scores, 40, None, 1).unwrap_err().to_string();
        assert!(message.contains("row 70, column 35"), "{message}");
        assert!(message.contains(&format!("found {name}")), "{message}");
        let others: Vec<u32> = (0..70).collect();
        assert_eq!(Matrix::new(&scores, 40, Some(&others), 1).unwrap().rows(), 70);
    }
}

#[test]
fn shapes_that_cannot_be_are_refused() {
    assert!(Matrix::new(&[], 0, None, 1).is_err());
    assert!(Matrix::new(&[1.0; 5], 2, None, 1).is_err());
    assert!(Matrix::new(&[1.0; 4], 2, None, 0).is_err());
    assert!(Matrix::new(&[1.0; 4], 2, Some(&[0, 2]), 1).is_err());
    assert_eq!(Matrix::new(&[], 3, None, 1).unwrap().rows(), 0);
    let one = Matrix::new(&[7.0], 1, Some(&[0; 4]), 2).unwrap();
    assert_eq!((one.rows(), one.columns()), (4, 1));
    assert_eq!(one.fixed.score(one.row_sums()[3]).to_bits(), 3.5f64.to_bits());
}
