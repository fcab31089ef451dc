//! How much the loss would change without each weight, to first order.
//!
//! Zhong et al., "Seeking Neural Nuggets", ICLR 2024, [arXiv 2310.11451]:
//! `S_i = Σ_j |θ_i · ∂L_j/∂θ_i|` over seed samples j. [`accumulate`] adds one sample; the absolute
//! value is taken per sample, so gradients of several samples must never be summed beforehand.
//!
//! | paper       | here        |
//! |-------------|-------------|
//! | θ           | `weights`   |
//! | `∂L_j/∂θ`   | `gradients` |
//! | S           | `scores`    |
//!
//! The product is one f32 multiplication and the score one f32 addition; sums over many elements
//! are f64. O(n) in one pass: bf16 moves 12 bytes an element (2 + 2 + 4 read, 4 written), which is
//! what bounds it. Work is cut at fixed places, so the result is the same bit by bit for any number
//! of threads and any SIMD width.
//!
//! [arXiv 2310.11451]: https://arxiv.org/abs/2310.11451

#![allow(clippy::inline_always, reason = "a Kernel is only as wide as what is inlined into it")]

use std::ops::Add;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::simd::{self, Kernel};
use crate::{Error, Result};

/// Elements one task scores: far above the cost of a fork, and within a core's L2 cache.
const BLOCK: usize = 1 << 15;
/// Below this many elements a fork costs more than it saves.
const PARALLEL: usize = 1 << 16;
/// Most row chunks of [`accumulate_columns`], each with column sums of its own.
const CHUNKS: usize = 64;
/// Partial sums of [`sum`]: four AVX-512 registers of f64 hide the latency of an addition.
const LANES: usize = 32;

/// A borrowed tensor of one of the float types that weights and gradients come in.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// The upper half of an f32.
    Bf16(&'a [bf16]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// IEEE single precision.
    F32(&'a [f32]),
}

/// Binds the slice inside `$values`, whatever its type, and evaluates `$body` for that type.
macro_rules! with_slice {
    ($values:expr, |$slice:ident| $body:expr) => {
        match $values {
            Values::Bf16($slice) => $body,
            Values::F16($slice) => $body,
            Values::F32($slice) => $body,
        }
    };
}
pub(crate) use with_slice;

impl Values<'_> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        with_slice!(self, |slice| slice.len())
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Adds one sample: `scores[i] += |weights[i] · gradients[i]|`.
///
/// Returns the lowest index whose score is not finite afterwards, `None` if all are: a product that
/// is NaN or infinite, a sum that overflows, and a score that was not finite before all count.
///
/// # Errors
/// [`Error::Invalid`] if the three lengths differ; `scores` is then untouched.
pub fn accumulate(weights: Values, gradients: Values, scores: &mut [f32]) -> Result<Option<usize>> {
    same_length(weights, gradients)?;
    if scores.len() != weights.len() {
        return Err(Error::Invalid(format!(
            "sensitivity: expected a score for each of {} weights, found {} scores",
            weights.len(),
            scores.len()
        )));
    }
    Ok(with_slice!(weights, |w| with_slice!(gradients, |g| accumulate_slices(w, g, scores))))
}

fn accumulate_slices<W: Element, G: Element>(
    weights: &[W],
    gradients: &[G],
    scores: &mut [f32],
) -> Option<usize> {
    if scores.len() < PARALLEL {
        return simd::widest(Block { weights, gradients, scores });
    }
    let blocks = weights.par_chunks(BLOCK).zip(gradients.par_chunks(BLOCK));
    (scores.par_chunks_mut(BLOCK).zip(blocks).enumerate())
        .filter_map(|(block, (scores, (weights, gradients)))| {
            let index = simd::widest(Block { weights, gradients, scores })?;
            Some(block * BLOCK + index)
        })
        .min()
}

/// Adds one sample to the column sums of a row-major matrix, as for embeddings, whose window slides
/// over the columns only: `sums[c] += Σ_r |weights[r, c] · gradients[r, c]|`.
///
/// Products are f32 as in [`accumulate`], sums f64. Returns the lowest index of a product that is
/// NaN or infinite, `None` if there is none. Memory: at most 64 times that of `sums`.
///
/// # Errors
/// [`Error::Invalid`] if `weights` and `gradients` are not whole rows of `columns` elements or
/// `sums` is not one row; `sums` is then untouched.
pub fn accumulate_columns(
    weights: Values,
    gradients: Values,
    columns: usize,
    sums: &mut [f64],
) -> Result<Option<usize>> {
    same_length(weights, gradients)?;
    if columns == 0 || !weights.len().is_multiple_of(columns) {
        return Err(Error::Invalid(format!(
            "column sensitivity: expected whole rows of {columns} > 0 columns, found {} weights",
            weights.len()
        )));
    }
    if sums.len() != columns {
        return Err(Error::Invalid(format!(
            "column sensitivity: expected a sum for each of {columns} columns, found {}",
            sums.len()
        )));
    }
    Ok(with_slice!(weights, |w| with_slice!(gradients, |g| accumulate_rows(w, g, sums))))
}

fn accumulate_rows<W: Element, G: Element>(
    weights: &[W],
    gradients: &[G],
    sums: &mut [f64],
) -> Option<usize> {
    let columns = sums.len();
    let rows = (weights.len() / columns).div_ceil(CHUNKS).max(PARALLEL.div_ceil(columns));
    let chunk = rows * columns;
    let partials: Vec<(Vec<f64>, Option<usize>)> = weights
        .par_chunks(chunk)
        .zip(gradients.par_chunks(chunk))
        .map(|(weights, gradients)| {
            let mut sums = vec![0.0; columns];
            let index = simd::widest(Rows { weights, gradients, sums: &mut sums });
            (sums, index)
        })
        .collect();
    let mut first = None;
    for (number, (partial, index)) in partials.into_iter().enumerate() {
        sums.iter_mut().zip(partial).for_each(|(sum, part)| *sum += part);
        first = first.or_else(|| Some(number * chunk + index?));
    }
    first
}

/// The sum of `scores` in f64, the same whatever the number of threads.
#[must_use]
pub fn sum(scores: &[f32]) -> f64 {
    if scores.len() < PARALLEL {
        return scores.chunks(BLOCK).map(|block| simd::widest(Sum(block))).fold(0.0, Add::add);
    }
    let partials: Vec<f64> =
        scores.par_chunks(BLOCK).map(|block| simd::widest(Sum(block))).collect();
    partials.into_iter().fold(0.0, Add::add)
}

fn same_length(weights: Values, gradients: Values) -> Result<()> {
    if weights.len() == gradients.len() {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "sensitivity: expected a gradient for each of {} weights, found {} gradients",
        weights.len(),
        gradients.len()
    )))
}

/// A float whose magnitude widens to f32 exactly, in operations that every SIMD width has.
pub(crate) trait Element: Copy + Sync {
    fn magnitude(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn magnitude(self) -> f32 {
        self.abs()
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn magnitude(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits() & 0x7fff) << 16)
    }
}

impl Element for f16 {
    /// Moves the bias of the exponent from 15 to 127; infinity and NaN (exponent 31) move twice as
    /// far, to 255; zero and subnormals are multiples of 2⁻²⁴. (`half` asks the CPU per element.)
    #[inline(always)]
    fn magnitude(self) -> f32 {
        const REBIAS: u32 = (127 - 15) << 23;
        let bits = u32::from(self.to_bits() & 0x7fff);
        let normal = (bits << 13) + if bits < 0x7c00 { REBIAS } else { 2 * REBIAS };
        let subnormal = bits as f32 * f32::from_bits((127 - 24) << 23);
        if bits < 0x0400 { subnormal } else { f32::from_bits(normal) }
    }
}

/// `|weight · gradient|`, rounded once: signs do not change how a product rounds.
#[inline(always)]
pub(crate) fn product<W: Element, G: Element>(weight: W, gradient: G) -> f32 {
    weight.magnitude() * gradient.magnitude()
}

/// The bits of infinity: as integers, finite non-negative floats are below, NaNs above.
pub(crate) const INFINITY: u32 = f32::INFINITY.to_bits();

/// [`accumulate`] on one thread. The largest bit pattern tells whether a block needs a second look.
struct Block<'a, W, G> {
    weights: &'a [W],
    gradients: &'a [G],
    scores: &'a mut [f32],
}

impl<W: Element, G: Element> Kernel for Block<'_, W, G> {
    type Output = Option<usize>;

    #[inline(always)]
    fn run(self) -> Option<usize> {
        let mut peak = 0;
        for ((score, &w), &g) in self.scores.iter_mut().zip(self.weights).zip(self.gradients) {
            *score += product(w, g);
            peak = peak.max(score.to_bits());
        }
        if peak < INFINITY { None } else { self.scores.iter().position(|s| !s.is_finite()) }
    }
}

/// [`accumulate_columns`] on one thread, row by row.
struct Rows<'a, W, G> {
    weights: &'a [W],
    gradients: &'a [G],
    sums: &'a mut [f64],
}

impl<W: Element, G: Element> Kernel for Rows<'_, W, G> {
    type Output = Option<usize>;

    #[inline(always)]
    fn run(self) -> Option<usize> {
        let columns = self.sums.len();
        let mut peak = 0;
        let rows = self.weights.chunks_exact(columns).zip(self.gradients.chunks_exact(columns));
        for (weights, gradients) in rows {
            for ((sum, &w), &g) in self.sums.iter_mut().zip(weights).zip(gradients) {
                let score = product(w, g);
                *sum += f64::from(score);
                peak = peak.max(score.to_bits());
            }
        }
        if peak < INFINITY {
            return None;
        }
        let mut pairs = self.weights.iter().zip(self.gradients);
        pairs.position(|(&w, &g)| !product(w, g).is_finite())
    }
}

/// [`sum`] of one block: [`LANES`] interleaved sums, added in order.
#[derive(Clone)]
struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f64;

    #[inline(always)]
    fn run(self) -> f64 {
        let (groups, rest) = self.0.as_chunks::<LANES>();
        let mut lanes = [0.0; LANES];
        for group in groups {
            lanes.iter_mut().zip(group).for_each(|(lane, &score)| *lane += f64::from(score));
        }
        lanes.iter_mut().zip(rest).for_each(|(lane, &score)| *lane += f64::from(score));
        lanes.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::simd::every;

    fn reference(weight: f32, gradient: f32, score: f32) -> f32 {
        score + (weight * gradient).abs()
    }

    /// The element as `half` widens it.
    fn wide(values: Values, index: usize) -> f32 {
        match values {
            Values::Bf16(slice) => slice[index].to_f32(),
            Values::F16(slice) => slice[index].to_f32(),
            Values::F32(slice) => slice[index],
        }
    }

    /// What is compared: bit by bit, but for the payload of a NaN.
    fn score_bits(scores: &[f32]) -> Vec<u32> {
        scores.iter().map(|s| if s.is_nan() { u32::MAX } else { s.to_bits() }).collect()
    }

    /// The same for sums.
    fn sum_bits(sums: &[f64]) -> Vec<u64> {
        sums.iter().map(|s| if s.is_nan() { u64::MAX } else { s.to_bits() }).collect()
    }

    /// The same bits read as every type: all values occur, NaN and subnormals among them.
    fn typed(bits: &[u32]) -> (Vec<bf16>, Vec<f16>, Vec<f32>) {
        (
            bits.iter().map(|&bits| bf16::from_bits(bits as u16)).collect(),
            bits.iter().map(|&bits| f16::from_bits(bits as u16)).collect(),
            bits.iter().map(|&bits| f32::from_bits(bits)).collect(),
        )
    }

    /// `count` elements between ¼ and 4, different ones.
    fn ordinary(count: usize) -> Vec<f32> {
        (0..count as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 4e6 + 0.25)
            .collect()
    }

    /// A [`Block`] together with the scores that it changes.
    #[derive(Clone)]
    struct Owned<'a, W, G>(&'a [W], &'a [G], Vec<f32>);

    impl<W: Element, G: Element> Kernel for Owned<'_, W, G> {
        type Output = (Vec<u32>, Option<usize>);

        #[inline(always)]
        fn run(self) -> Self::Output {
            let Self(weights, gradients, mut scores) = self;
            let index = Block { weights, gradients, scores: &mut scores }.run();
            (score_bits(&scores), index)
        }
    }

    /// [`Rows`] together with the sums that it changes.
    #[derive(Clone)]
    struct OwnedRows<'a, W, G>(&'a [W], &'a [G], Vec<f64>);

    impl<W: Element, G: Element> Kernel for OwnedRows<'_, W, G> {
        type Output = (Vec<u64>, Option<usize>);

        #[inline(always)]
        fn run(self) -> Self::Output {
            let Self(weights, gradients, mut sums) = self;
            let index = Rows { weights, gradients, sums: &mut sums }.run();
            (sum_bits(&sums), index)
        }
    }

    #[test]
    fn every_16_bit_float_widens_as_half_does() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            let found = score_bits(&[b.magnitude(), h.magnitude()]);
            let expected = score_bits(&[b.to_f32().abs(), h.to_f32().abs()]);
            assert_eq!(found, expected, "bf16 and f16 of {bits:#06x}");
        }
    }

    proptest! {
        #[test]
        fn accumulate_is_the_reference_for_every_dtype(
            elements in vec((any::<u32>(), any::<u32>(), 0..=0x7f80_0000u32), 0..200)
        ) {
            let (w, (g, s)): (Vec<u32>, (Vec<u32>, Vec<u32>)) =
                elements.into_iter().map(|(w, g, s)| (w, (g, s))).unzip();
            let ((wb, wh, wf), (gb, gh, gf), (_, _, start)) = (typed(&w), typed(&g), typed(&s));
            for weights in [Values::Bf16(&wb), Values::F16(&wh), Values::F32(&wf)] {
                for gradients in [Values::Bf16(&gb), Values::F16(&gh), Values::F32(&gf)] {
                    let mut scores = start.clone();
                    let first = accumulate(weights, gradients, &mut scores).unwrap();
                    let expected = |i| reference(wide(weights, i), wide(gradients, i), start[i]);
                    let expected: Vec<f32> = (0..start.len()).map(expected).collect();
                    prop_assert_eq!(score_bits(&scores), score_bits(&expected));
                    prop_assert_eq!(first, scores.iter().position(|score| !score.is_finite()));
                    with_slice!(weights, |w| with_slice!(gradients, |g| {
                        let outputs = every::width(&Owned(w, g, start.clone()));
                        prop_assert!(outputs.iter().all(|output| output == &outputs[0]));
                    }));
                }
            }
        }

        #[test]
        fn column_sums_add_the_scores_of_each_column_for_every_dtype(
            elements in vec((any::<u32>(), any::<u32>()), 0..200), columns in 1usize..9
        ) {
            let (mut w, mut g): (Vec<u32>, Vec<u32>) = elements.into_iter().unzip();
            let count = w.len() / columns * columns;
            w.truncate(count);
            g.truncate(count);
            let ((wb, wh, wf), (gb, gh, gf)) = (typed(&w), typed(&g));
            for weights in [Values::Bf16(&wb), Values::F16(&wh), Values::F32(&wf)] {
                for gradients in [Values::Bf16(&gb), Values::F16(&gh), Values::F32(&gf)] {
                    let score = |i| reference(wide(weights, i), wide(gradients, i), 0.0);
                    let mut sums = vec![1.0; columns];
                    let first = accumulate_columns(weights, gradients, columns, &mut sums).unwrap();
                    prop_assert_eq!(first, (0..count).position(|i| !score(i).is_finite()));
                    for (column, &sum) in sums.iter().enumerate() {
                        let entries = (column..count).step_by(columns);
                        let expected = 1.0 + entries.map(|i| f64::from(score(i))).sum::<f64>();
                        prop_assert_eq!(sum_bits(&[sum]), sum_bits(&[expected]));
                    }
                    with_slice!(weights, |w| with_slice!(gradients, |g| {
                        let outputs = every::width(&OwnedRows(w, g, vec![0.0; columns]));
                        prop_assert!(outputs.iter().all(|output| output == &outputs[0]));
                    }));
                }
            }
        }

        #[test]
        fn sum_is_close_to_the_plain_sum(bits in vec(0..=f32::MAX.to_bits(), 0..200)) {
            let (_, _, scores) = typed(&bits);
            let expected: f64 = scores.iter().map(|&score| f64::from(score)).sum();
            prop_assert!((sum(&scores) - expected).abs() <= 1e-13 * expected);
            let sums = every::width(&Sum(&scores));
            prop_assert!(sums.iter().all(|sum| sum.to_bits() == sums[0].to_bits()));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]

        #[test]
        fn every_thread_count_gives_what_one_block_does(
            count in PARALLEL - 1..5 * BLOCK,
            damage in vec(0..5 * BLOCK, 0..3),
            columns in 1usize..3000,
        ) {
            let (mut weights, gradients) = (ordinary(count), ordinary(count));
            damage.iter().filter(|&&i| i < count).for_each(|&i| weights[i] = f32::NAN);
            let (w, g) = (&weights[..], &gradients[..]);
            let block = Owned(w, g, vec![0.5; count]).run();
            for found in every::thread_count(|| {
                let mut scores = vec![0.5; count];
                let first = accumulate(Values::F32(w), Values::F32(g), &mut scores).unwrap();
                (score_bits(&scores), first)
            }) {
                prop_assert_eq!(&found, &block);
            }

            // So few elements of like size have an exact sum in f64, in whatever order.
            let whole = count / columns * columns;
            let (w, g) = (&w[..whole], &g[..whole]);
            let rows = OwnedRows(w, g, vec![0.0; columns]).run();
            for found in every::thread_count(|| {
                let mut sums = vec![0.0; columns];
                let (w, g) = (Values::F32(w), Values::F32(g));
                let first = accumulate_columns(w, g, columns, &mut sums).unwrap();
                (sum_bits(&sums), first)
            }) {
                prop_assert_eq!(&found, &rows);
            }
        }

        #[test]
        fn every_thread_count_gives_the_same_sum(count in PARALLEL - 1..5 * BLOCK) {
            let scores: Vec<f32> = ordinary(count).into_iter().map(|score| score.powi(9)).collect();
            let sums = every::thread_count(|| sum(&scores));
            prop_assert!(sums.iter().all(|sum| sum.to_bits() == sums[0].to_bits()));
            let expected: f64 = scores.iter().map(|&score| f64::from(score)).sum();
            prop_assert!((sums[0] - expected).abs() <= 1e-11 * expected);
        }
    }

    #[test]
    fn opposite_gradients_of_two_samples_do_not_cancel() {
        let (weights, mut scores) = ([2.0, -3.0], [0.0; 2]);
        for gradients in [[1.0, 5.0], [-1.0, -5.0]] {
            accumulate(Values::F32(&weights), Values::F32(&gradients), &mut scores).unwrap();
        }
        assert_eq!(score_bits(&scores), score_bits(&[4.0, 30.0]));
    }

    #[test]
    fn overflow_of_product_and_of_sum_are_both_found() {
        let (weights, gradients) = ([1.0, f32::MAX, f32::MAX], [1.0, 1.0, 2.0]);
        let (w, g) = (Values::F32(&weights), Values::F32(&gradients));
        assert_eq!(accumulate(w, g, &mut [0.0, f32::MAX, 0.0]).unwrap(), Some(1));
        assert_eq!(accumulate(w, g, &mut [0.0; 3]).unwrap(), Some(2));
        assert_eq!(accumulate_columns(w, g, 1, &mut [0.0]).unwrap(), Some(2));
        assert_eq!(accumulate_columns(w, g, 3, &mut [0.0; 3]).unwrap(), Some(2));
    }

    #[test]
    fn empty_is_empty() {
        let empty = Values::Bf16(&[]);
        assert!(empty.is_empty());
        assert_eq!(accumulate(empty, empty, &mut []).unwrap(), None);
        assert_eq!(accumulate_columns(empty, empty, 2, &mut [1.0, 2.0]).unwrap(), None);
        assert_eq!(sum(&[]).to_bits(), 0);
    }

    #[test]
    fn lengths_that_differ_are_refused_and_named() {
        let (two, six) = (Values::F32(&[1.0; 2]), Values::F32(&[1.0; 6]));
        let message = accumulate(two, six, &mut [0.0; 2]).unwrap_err().to_string();
        assert!(message.contains('2') && message.contains('6'), "{message}");
        assert!(accumulate(six, six, &mut [0.0; 5]).is_err());
        assert!(accumulate_columns(six, two, 2, &mut [0.0; 2]).is_err());
        assert!(accumulate_columns(six, six, 4, &mut [0.0; 4]).is_err());
        assert!(accumulate_columns(six, six, 0, &mut []).is_err());
        assert!(accumulate_columns(six, six, 3, &mut [0.0; 2]).is_err());
    }
}
