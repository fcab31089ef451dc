//! How much the loss would change without each weight, to first order.
//!
//! Zhong et al., "Seeking Neural Nuggets", ICLR 2024, [arXiv 2310.11451], section 3.1:
//! `S_i = Σ_j |θ_i · ∂L_j/∂θ_i|` over seed samples j. [`accumulate`] adds one sample; the absolute
//! value is taken per sample, so gradients of several samples must never be summed beforehand.
//!
//! | paper       | here        |
//! |-------------|-------------|
//! | θ           | `weights`   |
//! | ∂L_j/∂θ     | `gradients` |
//! | S           | `scores`    |
//!
//! The product is one f32 multiplication and the score one f32 addition; sums over many elements
//! are f64. O(n) in one pass: bf16 moves 12 bytes an element (2 + 2 + 4 read, 4 written), which is
//! what bounds it. Work is cut at fixed places, so the result is the same bit by bit for any number
//! of threads and any SIMD width.
//!
//! [arXiv 2310.11451]: https://arxiv.org/abs/2310.11451

#![allow(clippy::inline_always, reason = "a Kernel is only as wide as what is inlined into it")]

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
        return scores.chunks(BLOCK).map(|block| simd::widest(Sum(block))).sum();
    }
    let partials: Vec<f64> =
        scores.par_chunks(BLOCK).map(|block| simd::widest(Sum(block))).collect();
    partials.into_iter().sum()
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
trait Element: Copy + Sync {
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
fn product<W: Element, G: Element>(weight: W, gradient: G) -> f32 {
    weight.magnitude() * gradient.magnitude()
}

/// The bits of infinity: as integers, finite non-negative floats are below, NaNs above.
const INFINITY: u32 = f32::INFINITY.to_bits();

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
