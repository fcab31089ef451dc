//! A scored matrix seen through a row map, in fixed point.

use rayon::prelude::*;

use crate::simd::{self, Kernel};
use crate::{Error, Result};

/// Rows one task adds up before its column sums meet another's.
const ROWS: usize = 32;
/// Interleaved sums of one row, as in [`crate::sensitivity::sum`].
const LANES: usize = 32;

/// A logical matrix over a physical row-major one: logical row i is physical row `rows[i]`, every
/// score divided by `share`.
///
/// Grouped-query expansion (each key-value head's rows repeated, the score shared by the copies),
/// the parts of a fused projection (a range of rows) and GPT-NeoX's interleaved heads (every third
/// block of rows) are row maps; nothing is copied.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    scores: &'a [f32],
    columns: usize,
    rows: Option<&'a [u32]>,
    fixed: Fixed,
}

impl<'a> Matrix<'a> {
    /// The logical matrix with `rows.len()` rows, or with every physical row where `rows` is `None`.
    ///
    /// Reads the scores once, to check them and to find the fixed point.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `scores` are not whole rows of `columns` elements, a row is not there,
    /// `share` is 0, or a score of a logical row is negative, infinite or NaN (-0 is 0).
    pub fn new(
        scores: &'a [f32],
        columns: usize,
        rows: Option<&'a [u32]>,
        share: u32,
    ) -> Result<Self> {
        if share == 0 {
            return Err(Error::Invalid("score matrix: expected a share of 1 or more".into()));
        }
        let fixed = Fixed { share: share as f32, scale: 1.0 };
        let mut matrix = Self::again(scores, columns, rows, fixed)?;
        matrix.fixed.scale = power_of_two(matrix.shift()?);
        Ok(matrix)
    }

    /// The logical matrix over scores that [`Matrix::new`] has read before, by the fixed point that
    /// it found for them. Of other scores the sums mean nothing.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `scores` are not whole rows of `columns` elements, or a row is not there.
    pub fn again(
        scores: &'a [f32],
        columns: usize,
        rows: Option<&'a [u32]>,
        fixed: Fixed,
    ) -> Result<Self> {
        if columns == 0 || !scores.len().is_multiple_of(columns) {
            return Err(Error::Invalid(format!(
                "score matrix: expected whole rows of {columns} > 0 columns, found {} scores",
                scores.len()
            )));
        }
        let physical = scores.len() / columns;
        if let Some(&row) = rows.unwrap_or_default().iter().find(|&&row| row as usize >= physical) {
            return Err(Error::Invalid(format!(
                "score matrix: the row map names row {row} of {physical}"
            )));
        }
        Ok(Self { scores, columns, rows, fixed })
    }

    /// Number of logical rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows.map_or(self.scores.len() / self.columns, <[u32]>::len)
    }

    /// Number of columns.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Number of logical entries.
    pub(super) fn len(&self) -> usize {
        self.rows() * self.columns
    }

    /// Its fixed point, for [`Matrix::again`].
    #[must_use]
    pub fn fixed(&self) -> Fixed {
        self.fixed
    }

    /// The physical scores, not yet shared, of a logical row.
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        let row = self.rows.map_or(row, |rows| rows[row] as usize);
        &self.scores[row * self.columns..][..self.columns]
    }

    /// Sums over `rows` of each column. Integers, so the order of the tasks leaves no trace.
    pub(super) fn column_sums(&self, rows: impl IndexedParallelIterator<Item = usize>) -> Vec<u64> {
        rows.with_min_len(ROWS)
            .fold(
                || vec![0; self.columns],
                |mut sums, row| {
                    simd::widest(Add { sums: &mut sums, enter: self.row(row), fixed: self.fixed });
                    sums
                },
            )
            .reduce_with(|mut sums, others| {
                sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
                sums
            })
            .unwrap_or_else(|| vec![0; self.columns])
    }

    /// The column sums of a band of rows after row `enter` has come in and row `leave` has left.
    pub(super) fn slide(&self, sums: &mut [u64], leave: usize, enter: usize) {
        let (leave, enter) = (self.row(leave), self.row(enter));
        simd::widest(Slide { sums, leave, enter, fixed: self.fixed });
    }

    /// Sums of each row.
    pub(super) fn row_sums(&self) -> Vec<u64> {
        let fixed = self.fixed;
        (0..self.rows())
            .into_par_iter()
            .map(|row| simd::widest(Total { row: self.row(row), fixed }))
            .collect()
    }

    /// The largest shift with which no entry reaches 2⁵² and no total 2⁶⁴.
    ///
    /// One bit is kept back from the total for what rounding adds, half a unit an entry.
    fn shift(&self) -> Result<i32> {
        let fixed = self.fixed;
        let surveys: Vec<Survey> = (0..self.rows())
            .into_par_iter()
            .map(|row| simd::widest(Inspect { row: self.row(row), fixed }))
            .collect();
        if let Some(row) = surveys.iter().position(|survey| !survey.valid) {
            return Err(self.invalid(row));
        }
        let peak = surveys.iter().map(|survey| survey.peak).fold(0.0, f32::max);
        let total: f64 = surveys.iter().map(|survey| survey.total).sum();
        Ok(shift(total, 63).min(shift(f64::from(peak), 52)))
    }

    fn invalid(&self, row: usize) -> Error {
        let mut scores = self.row(row).iter().enumerate();
        let found = scores.find(|(_, score)| !is_score(**score));
        let (column, score) = found.unwrap_or((0, &f32::NAN));
        Error::Invalid(format!(
            "score at row {row}, column {column}: expected a finite number of 0 or more, \
             found {score}; the gradients overflowed, or these are not sensitivities"
        ))
    }
}

#[inline(always)]
fn is_score(score: f32) -> bool {
    (0.0..=f32::MAX).contains(&score)
}

/// The largest s with `value · 2ˢ < 2^bits`, among those whose 2ˢ is a normal f64. `value` may be a
/// sum: 1e-9 too small by rounding, or -0, the sum of nothing.
pub(super) fn shift(value: f64, bits: i32) -> i32 {
    let exponent = (value.abs() * (1.0 + 1e-9)).to_bits() >> 52;
    (bits + 1022 - exponent as i32).clamp(-1022, 1023)
}

/// 2^`exponent`, exactly.
pub(super) fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((1023 + exponent) as u64) << 52)
}

/// Scores as integers: `round(score / share · 2^shift)`, ties to even.
#[derive(Clone, Copy, Debug)]
pub struct Fixed {
    share: f32,
    scale: f64,
}

impl Fixed {
    /// 2⁵²: from here to 2⁵³ a unit in the last place of an f64 is 1.
    const BIAS: f64 = (1u64 << 52) as f64;

    /// The logical score.
    #[inline(always)]
    pub(super) fn shared(self, score: f32) -> f32 {
        score / self.share
    }

    /// The fixed-point score plus the bits of 2⁵².
    ///
    /// The product with a power of two is exact and below 2⁵², so adding 2⁵² rounds it to a whole
    /// number of units and leaves that number in the mantissa: every SIMD width converts so, also
    /// those that have no instruction from float to u64.
    #[inline(always)]
    fn biased(self, score: f32) -> u64 {
        (f64::from(self.shared(score)) * self.scale + Self::BIAS).to_bits()
    }

    #[inline(always)]
    pub(super) fn quantize(self, score: f32) -> u64 {
        self.biased(score) - Self::BIAS.to_bits()
    }

    /// A sum of fixed-point scores as a number: one rounding.
    pub(super) fn score(self, sum: u64) -> f64 {
        sum as f64 / self.scale
    }
}

/// Adds a row to column sums.
struct Add<'a> {
    sums: &'a mut [u64],
    enter: &'a [f32],
    fixed: Fixed,
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (sum, &enter) in self.sums.iter_mut().zip(self.enter) {
            *sum += self.fixed.quantize(enter);
        }
    }
}

/// Adds one row to column sums and takes another away; the biases cancel.
struct Slide<'a> {
    sums: &'a mut [u64],
    leave: &'a [f32],
    enter: &'a [f32],
    fixed: Fixed,
}

impl Kernel for Slide<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for ((sum, &leave), &enter) in self.sums.iter_mut().zip(self.leave).zip(self.enter) {
            let (leave, enter) = (self.fixed.biased(leave), self.fixed.biased(enter));
            *sum = sum.wrapping_add(enter).wrapping_sub(leave);
        }
    }
}

/// The sum of a row.
#[derive(Clone)]
struct Total<'a> {
    row: &'a [f32],
    fixed: Fixed,
}

impl Kernel for Total<'_> {
    type Output = u64;

    #[inline(always)]
    fn run(self) -> u64 {
        self.row.iter().map(|&score| self.fixed.quantize(score)).sum()
    }
}

/// What the fixed point must hold of a row.
#[derive(Debug, PartialEq)]
struct Survey {
    valid: bool,
    peak: f32,
    total: f64,
}

/// Takes the [`Survey`] of a row.
#[derive(Clone)]
struct Inspect<'a> {
    row: &'a [f32],
    fixed: Fixed,
}

impl Kernel for Inspect<'_> {
    type Output = Survey;

    #[inline(always)]
    fn run(self) -> Survey {
        let mut valid = true;
        let mut peaks = [0f32; LANES];
        let mut totals = [0f64; LANES];
        let mut inspect = |scores: &[f32]| {
            for ((peak, total), &score) in peaks.iter_mut().zip(&mut totals).zip(scores) {
                let shared = self.fixed.shared(score);
                valid &= is_score(score);
                *peak = if shared > *peak { shared } else { *peak };
                *total += f64::from(shared);
            }
        };
        let (groups, rest) = self.row.as_chunks::<LANES>();
        for group in groups {
            inspect(group);
        }
        inspect(rest);
        Survey { valid, peak: peaks.into_iter().fold(0.0, f32::max), total: totals.iter().sum() }
    }
}

#[cfg(test)]
pub(super) mod tests;
