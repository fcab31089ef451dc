//! Scores of a linear layer's weight from what its gradient is made of: the gradient never exists.
//!
//! For y = xWᵀ the gradient of W (n, m) by one sample is `dYᵀX`: its upstream gradient dY (t, n)
//! and its input X (t, m) over t tokens. [`accumulate_products`] adds `Σ_j |W ⊙ dY_jᵀX_j|` to the
//! scores of `pkt_core::sensitivity` for a batch of samples: tile by tile in registers, the product
//! of one sample is made, multiplied by the weights and added while the tile's scores are in cache.
//! To make gradients in memory and score them moves 14 bytes an element and sample; here it is
//! what packing needs, and the product's arithmetic is what bounds it.
//!
//! The gradient's element is one chain of fused multiply-adds over the tokens in order, never
//! rounded to bfloat16. So neither tiles, threads nor the width of registers change a bit of it,
//! but where the processor multiplies pairs of bfloat16: it adds the two products in an order of its
//! own, and takes numbers below 2⁻¹²⁶ for zero.

#![allow(clippy::inline_always, reason = "a Kernel is only as wide as what is inlined into it")]

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use crate::sensitivity::{Element, INFINITY, Values, product, with_slice};
use crate::simd::{self, Kernel, Width};
use crate::{Error, Result};

/// Columns of weights a task goes through at once: packed inputs are used for every row panel.
const COLUMNS: usize = 512;
/// Tokens packed at once.
const TOKENS: usize = 128;
/// Most rows of weights of a task: its packed upstream gradients stay in a core's L2 cache.
const ROWS: usize = 384;

/// One sample's part in the gradient of a weight (n, m): t tokens, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// X, (t, m).
    pub inputs: &'a [bf16],
    /// dY, (t, n).
    pub upstream: &'a [bf16],
}

/// Adds `|W ⊙ dYᵀX|` of each sample to `scores` (n, m), in the order of the samples; where they are
/// `fresh`, to zeros, whatever lies there.
///
/// `weights` are n rows of `columns` elements. Returns the first sample after which a score is not
/// finite, `None` if there is none. Memory: about 1 MiB a thread, kept. Worth calling where the
/// processor has fused multiply-add in registers of 256 bits or more.
///
/// # Errors
/// [`Error::Invalid`] if the shapes do not fit each other; `scores` are then untouched.
pub fn accumulate_products(
    weights: Values,
    columns: usize,
    samples: &[Sample],
    scores: &mut [f32],
    fresh: bool,
) -> Result<Option<usize>> {
    require_shapes(weights.len(), columns, samples, scores.len())?;
    if samples.is_empty() && fresh {
        scores.fill(0.0);
    }
    if scores.is_empty() || samples.is_empty() {
        return Ok(None);
    }
    Ok(with_slice!(weights, |w| by_rows(w, columns, samples, scores, fresh)))
}

fn require_shapes(weights: usize, columns: usize, samples: &[Sample], scores: usize) -> Result<()> {
    if columns == 0 || !weights.is_multiple_of(columns) || scores != weights {
        return Err(Error::Invalid(format!(
            "gradient scores: expected rows of {columns} > 0 weights with as many scores, \
             found {weights} weights and {scores} scores"
        )));
    }
    let rows = weights / columns;
    for (index, sample) in samples.iter().enumerate() {
        let tokens = sample.inputs.len() / columns;
        if sample.inputs.len() != tokens * columns || sample.upstream.len() != tokens * rows {
            return Err(Error::Invalid(format!(
                "gradient scores: sample {index}: expected (t, {columns}) inputs and (t, {rows}) \
                 upstream gradients, found {} and {} elements",
                sample.inputs.len(),
                sample.upstream.len()
            )));
        }
    }
    Ok(())
}

fn by_rows<W: Element>(
    weights: &[W],
    columns: usize,
    samples: &[Sample],
    scores: &mut [f32],
    fresh: bool,
) -> Option<usize> {
    let height = scores.len() / columns;
    // A few tasks for every thread, of whole tiles whatever the width.
    let rows = height.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(12).min(ROWS);
    let parts = weights.par_chunks(rows * columns).zip(scores.par_chunks_mut(rows * columns));
    (parts.enumerate())
        .filter_map(|(number, (weights, scores))| {
            let first = number * rows;
            ROOM.with_borrow_mut(|room| {
                Task { weights, scores, columns, height, first, samples, fresh, room }
                    .run(simd::width())
            })
        })
        .min()
}

/// Some rows of the weights, with all their columns.
struct Task<'a, W> {
    weights: &'a [W],
    scores: &'a mut [f32],
    columns: usize,
    /// Rows of the whole matrix: the width of upstream gradients.
    height: usize,
    /// Which of them is the first one here.
    first: usize,
    samples: &'a [Sample<'a>],
    fresh: bool,
    room: &'a mut Room,
}

impl<W: Element> Task<'_, W> {
    fn run(self, width: Width) -> Option<usize> {
        match width {
            #[cfg(target_arch = "x86_64")]
            Width::Avx512Bf16 => simd::on(width, Tiled::<W, Pairs, 12, 32>(self, PhantomData)),
            Width::Avx512 => simd::on(width, Tiled::<W, Singles, 12, 32>(self, PhantomData)),
            _ => simd::on(width, Tiled::<W, Singles, 6, 16>(self, PhantomData)),
        }
    }
}

/// How a tile of products is made of packed operands: token after token, the tile's rows or columns
/// side by side, the first token in the upper half of each element.
trait Multiply<const R: usize, const C: usize> {
    /// Tokens in an element.
    const TOKENS: usize;

    /// Adds the products of all tokens to `sums`.
    fn add(left: &[[u32; R]], right: &[[u32; C]], sums: &mut [[f32; C]; R]);
}

/// One token an element, which is then its float32.
struct Singles;

impl<const R: usize, const C: usize> Multiply<R, C> for Singles {
    const TOKENS: usize = 1;

    #[inline(always)]
    fn add(left: &[[u32; R]], right: &[[u32; C]], sums: &mut [[f32; C]; R]) {
        let mut held = *sums;
        for (left, right) in left.iter().zip(right) {
            for (row, &factor) in held.iter_mut().zip(left) {
                for (sum, &other) in row.iter_mut().zip(right) {
                    *sum = f32::from_bits(factor).mul_add(f32::from_bits(other), *sum);
                }
            }
        }
        *sums = held;
    }
}

/// Two tokens an element, for processors that multiply them so.
#[cfg(target_arch = "x86_64")]
struct Pairs;

#[cfg(target_arch = "x86_64")]
impl<const R: usize> Multiply<R, 32> for Pairs {
    const TOKENS: usize = 2;

    #[inline(always)]
    fn add(left: &[[u32; R]], right: &[[u32; 32]], sums: &mut [[f32; 32]; R]) {
        simd::add_pairs(left, right, sums);
    }
}

thread_local! {
    /// What tasks pack in, kept: to touch new memory takes longer than to fill it.
    static ROOM: RefCell<Room> = RefCell::default();
}

#[derive(Default)]
struct Room {
    left: Vec<u32>,
    right: Vec<u32>,
    /// Of samples that are longer than what is packed at once.
    sums: Vec<f32>,
}

/// A task in tiles of R × C.
struct Tiled<'a, W, M, const R: usize, const C: usize>(Task<'a, W>, PhantomData<M>);

impl<W: Element, M: Multiply<R, C>, const R: usize, const C: usize> Kernel
    for Tiled<'_, W, M, R, C>
{
    type Output = Option<usize>;

    #[inline(always)]
    fn run(self) -> Option<usize> {
        let Self(mut task, _) = self;
        let mut first = None;
        for start in (0..task.columns).step_by(COLUMNS) {
            for (index, sample) in task.samples.iter().enumerate() {
                let fresh = task.fresh && index == 0;
                let finite = block::<W, M, R, C>(&mut task, start, sample, fresh);
                if !finite && first.is_none_or(|first| index < first) {
                    first = Some(index);
                }
            }
        }
        first
    }
}

/// Adds one sample to the scores of the columns from `start`, which are zeros if they are `fresh`;
/// whether they are finite then.
#[inline(always)]
fn block<W: Element, M: Multiply<R, C>, const R: usize, const C: usize>(
    task: &mut Task<W>,
    start: usize,
    sample: &Sample,
    fresh: bool,
) -> bool {
    let Task { weights, scores, columns: stride, height, first, room, .. } = task;
    let (stride, rows, columns) = (*stride, scores.len() / *stride, COLUMNS.min(*stride - start));
    let tokens = sample.inputs.len() / stride;
    if fresh && tokens == 0 {
        scores.chunks_mut(stride).for_each(|row| row[start..start + columns].fill(0.0));
    }
    let mut peak = 0;
    for done in (0..tokens).step_by(TOKENS) {
        let now = done..tokens.min(done + TOKENS);
        let left = pack::<R>(
            sample.upstream,
            *height,
            now.clone(),
            M::TOKENS,
            *first,
            rows,
            &mut room.left,
        );
        let right = pack::<C>(
            sample.inputs,
            stride,
            now.clone(),
            M::TOKENS,
            start,
            columns,
            &mut room.right,
        );
        let steps = now.len().div_ceil(M::TOKENS);
        let (begins, ends) = (done == 0, now.end == tokens);
        let panels = rows.div_ceil(R);
        if !(begins && ends) {
            room.sums.resize(panels * columns.div_ceil(C) * R * C, 0.0);
        }
        for (j, right) in right.chunks_exact(steps).enumerate() {
            for (i, left) in left.chunks_exact(steps).enumerate() {
                let tile = j * panels + i;
                let kept = tile * R * C..(tile + 1) * R * C;
                let mut sums = [[0.0; C]; R];
                if !begins {
                    sums.as_flattened_mut().copy_from_slice(&room.sums[kept.clone()]);
                }
                let across = start + j * C..(start + (j + 1) * C).min(start + columns);
                let down = i * R * stride..((i + 1) * R * stride).min(scores.len());
                let (weights, scores) = (&weights[down.clone()], &mut scores[down]);
                if ends {
                    let rows = weights.chunks_exact(stride).zip(scores.chunks_exact(stride));
                    rows.for_each(|(weights, scores)| {
                        simd::prefetch(&weights[across.clone()]);
                        simd::prefetch(&scores[across.clone()]);
                    });
                }
                M::add(left, right, &mut sums);
                if ends {
                    peak = peak.max(score(weights, scores, stride, across, &sums, fresh));
                } else {
                    room.sums[kept].copy_from_slice(sums.as_flattened());
                }
            }
        }
    }
    peak < INFINITY
}

/// Lays the columns `first .. first + count` of some tokens out in panels of N, zeros behind the last.
#[inline(always)]
fn pack<'a, const N: usize>(
    source: &[bf16],
    width: usize,
    tokens: Range<usize>,
    together: usize,
    first: usize,
    count: usize,
    room: &'a mut Vec<u32>,
) -> &'a [[u32; N]] {
    let steps = tokens.len().div_ceil(together);
    room.resize(count.div_ceil(N) * steps * N, 0);
    let (panels, _) = room.as_chunks_mut::<N>();
    for (step, token) in tokens.clone().step_by(together).enumerate() {
        let row = |token: usize| &source[token * width + first..][..count];
        let upper = row(token);
        let lower = if together == 2 && token + 1 < tokens.end { row(token + 1) } else { &[] };
        let (whole, rest) = upper.as_chunks::<N>();
        for (number, upper) in whole.iter().enumerate() {
            panels[number * steps + step] = upper.map(|value| u32::from(value.to_bits()) << 16);
        }
        if !rest.is_empty() {
            let last = &mut panels[whole.len() * steps + step];
            *last = [0; N];
            for (packed, upper) in last.iter_mut().zip(rest) {
                *packed = u32::from(upper.to_bits()) << 16;
            }
        }
        for (number, lower) in lower.chunks(N).enumerate() {
            let packed = panels[number * steps + step].iter_mut();
            packed.zip(lower).for_each(|(packed, lower)| *packed |= u32::from(lower.to_bits()));
        }
    }
    panels
}

/// Adds |w · g| of a tile, some columns of some rows, to the scores; the largest of their bits then.
#[inline(always)]
fn score<W: Element, const R: usize, const C: usize>(
    weights: &[W],
    scores: &mut [f32],
    stride: usize,
    columns: Range<usize>,
    gradients: &[[f32; C]; R],
    fresh: bool,
) -> u32 {
    let mut peak = 0;
    let rows = weights.chunks_exact(stride).zip(scores.chunks_exact_mut(stride));
    for ((weights, scores), gradients) in rows.zip(gradients) {
        let (weights, scores) = (&weights[columns.clone()], &mut scores[columns.clone()]);
        for ((score, &weight), &gradient) in scores.iter_mut().zip(weights).zip(gradients) {
            *score = if fresh { 0.0 } else { *score } + product(weight, gradient);
            peak = peak.max(score.to_bits());
        }
    }
    peak
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::simd::every;
    use crate::{cases, numbers};

    /// What the processor does with pairs, in plain Rust.
    struct Paired;

    impl<const R: usize, const C: usize> Multiply<R, C> for Paired {
        const TOKENS: usize = 2;

        fn add(left: &[[u32; R]], right: &[[u32; C]], sums: &mut [[f32; C]; R]) {
            let upper = |pair: u32| f32::from_bits(pair & 0xffff_0000);
            let lower = |pair: u32| f32::from_bits(pair << 16);
            for (left, right) in left.iter().zip(right) {
                for (row, &a) in sums.iter_mut().zip(left) {
                    for (sum, &b) in row.iter_mut().zip(right) {
                        *sum = lower(a).mul_add(lower(b), upper(a).mul_add(upper(b), *sum));
                    }
                }
            }
        }
    }

    /// The layer's weights and a batch of samples: X and dY of each.
    #[derive(Clone, Debug)]
    struct Case {
        rows: usize,
        columns: usize,
        weights: Vec<f32>,
        samples: Vec<(Vec<bf16>, Vec<bf16>)>,
    }

    impl Case {
        fn new(rows: usize, columns: usize, lengths: &[usize], seed: u32) -> Self {
            let mut numbers = numbers(seed);
            let weights = numbers(rows * columns);
            let mut halves = |count| numbers(count).into_iter().map(bf16::from_f32).collect();
            let samples =
                lengths.iter().map(|&t| (halves(t * columns), halves(t * rows))).collect();
            Self { rows, columns, weights, samples }
        }

        fn samples(&self) -> Vec<Sample<'_>> {
            let of = |(inputs, upstream)| Sample { inputs, upstream };
            self.samples.iter().map(|(inputs, upstream)| of((inputs, upstream))).collect()
        }

        /// The formula, element by element.
        fn reference(&self, weights: impl Fn(usize) -> f32) -> Vec<u32> {
            let element = |at: usize| {
                let (row, column) = (at / self.columns, at % self.columns);
                self.samples.iter().fold(0.5f32, |score, (inputs, upstream)| {
                    let tokens = inputs.len() / self.columns;
                    let gradient = (0..tokens).fold(0f32, |sum, token| {
                        let dy = upstream[token * self.rows + row].to_f32();
                        dy.mul_add(inputs[token * self.columns + column].to_f32(), sum)
                    });
                    score + (weights(at) * gradient).abs()
                })
            };
            (0..self.weights.len()).map(|at| element(at).to_bits()).collect()
        }

        /// Scores by tiles of one kind, in one task.
        fn tiled<M: Multiply<R, C>, const R: usize, const C: usize>(&self) -> Vec<u32> {
            let (mut scores, samples) = (vec![0.5; self.weights.len()], self.samples());
            let task = Task {
                weights: &self.weights[..],
                scores: &mut scores,
                columns: self.columns,
                height: self.rows,
                first: 0,
                samples: &samples,
                fresh: false,
                room: &mut Room::default(),
            };
            assert_eq!(Tiled::<f32, M, R, C>(task, PhantomData).run(), None);
            bits(&scores)
        }
    }

    fn bits(scores: &[f32]) -> Vec<u32> {
        scores.iter().map(|score| score.to_bits()).collect()
    }

    /// Whether scores are the expected ones: to the bit, but where a processor adds pairs of
    /// products as it likes.
    fn same(found: &[u32], expected: &[u32]) -> bool {
        let near = |(&found, &expected): (&u32, &u32)| {
            let (found, expected) = (f32::from_bits(found), f32::from_bits(expected));
            (found - expected).abs() <= 1e-4 * expected.max(1.0)
        };
        let exact = simd::width() != Width::Avx512Bf16;
        if exact { found == expected } else { found.iter().zip(expected).all(near) }
    }

    fn scored(case: &Case, weights: Values) -> Vec<u32> {
        let mut scores = vec![0.5; case.weights.len()];
        let samples = case.samples();
        let found = accumulate_products(weights, case.columns, &samples, &mut scores, false);
        assert_eq!(found.unwrap(), None);
        bits(&scores)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(cases(100)))]

        #[test]
        fn scores_are_the_formula(
            rows in 1usize..60, columns in 1usize..80, lengths in vec(0usize..9, 0..4), seed: u32
        ) {
            let case = Case::new(rows, columns, &lengths, seed);
            let b: Vec<bf16> = case.weights.iter().map(|&w| bf16::from_f32(w)).collect();
            let h: Vec<f16> = case.weights.iter().map(|&w| f16::from_f32(w)).collect();
            let expected = case.reference(|at| case.weights[at]);
            prop_assert!(same(&scored(&case, Values::F32(&case.weights)), &expected));
            let rounded = case.reference(|at| b[at].to_f32());
            prop_assert!(same(&scored(&case, Values::Bf16(&b)), &rounded));
            let rounded = case.reference(|at| h[at].to_f32());
            prop_assert!(same(&scored(&case, Values::F16(&h)), &rounded));
            prop_assert_eq!(case.tiled::<Singles, 6, 16>(), &expected[..]);
            prop_assert_eq!(case.tiled::<Singles, 12, 32>(), &expected[..]);
            prop_assert_eq!(case.tiled::<Paired, 12, 32>(), &expected[..]);
            prop_assert_eq!(case.tiled::<Paired, 1, 1>(), expected);
            let (mut anew, mut zeros) = (vec![f32::NAN; rows * columns], vec![0.0; rows * columns]);
            let (weights, samples) = (Values::F32(&case.weights), case.samples());
            accumulate_products(weights, columns, &samples, &mut anew, true).unwrap();
            accumulate_products(weights, columns, &samples, &mut zeros, false).unwrap();
            prop_assert_eq!(bits(&anew), bits(&zeros));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "minutes")]
    fn more_than_is_packed_at_once_is_the_formula() {
        let lengths = [2 * TOKENS + 3, 1, TOKENS];
        let case = Case::new(ROWS + 5, COLUMNS + 37, &lengths, 7);
        let expected = case.reference(|at| case.weights[at]);
        let found = every::thread_count(|| scored(&case, Values::F32(&case.weights)));
        assert!(same(&found[0], &expected));
        assert!(found.iter().all(|others| others == &found[0]));
        assert!(case.tiled::<Paired, 12, 32>() == expected);
    }

    #[test]
    fn what_is_not_finite_names_the_first_sample() {
        let spoil = |at: usize, sample: usize, what: f32| {
            let mut case = Case::new(40, 600, &[3, 3, 3, 3], 3);
            case.samples[sample].0[at] = bf16::from_f32(what);
            let (weights, mut scores) = (Values::F32(&case.weights), vec![0.0; 40 * 600]);
            accumulate_products(weights, 600, &case.samples(), &mut scores, false).unwrap()
        };
        assert_eq!(spoil(0, 2, f32::NAN), Some(2));
        assert_eq!(spoil(599, 1, f32::INFINITY), Some(1));
        assert_eq!(spoil(599, 0, 1.0), None);
        let mut case = Case::new(40, 600, &[3, 3, 3], 3);
        case.samples[2].0[1] = bf16::NAN;
        case.samples[1].0[599] = bf16::NAN;
        let mut scores = vec![0.0; 40 * 600];
        let weights = Values::F32(&case.weights);
        let first = accumulate_products(weights, 600, &case.samples(), &mut scores, false).unwrap();
        assert_eq!(first, Some(1), "though an earlier column finds the later sample");
    }

    #[test]
    fn opposite_gradients_of_two_samples_do_not_cancel() {
        let one = [bf16::ONE];
        let minus = [-bf16::ONE];
        let samples =
            [Sample { inputs: &one, upstream: &one }, Sample { inputs: &one, upstream: &minus }];
        let mut scores = [0.0];
        accumulate_products(Values::F32(&[-3.0]), 1, &samples, &mut scores, false).unwrap();
        assert_eq!(bits(&scores), bits(&[6.0]));
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (weights, mut scores) = ([1.0; 6], [0.0; 6]);
        let (two, three, four) = (&[bf16::ONE; 2][..], &[bf16::ONE; 3][..], &[bf16::ONE; 4][..]);
        let mut refused = |columns, inputs, upstream| {
            let samples = [Sample { inputs, upstream }];
            accumulate_products(Values::F32(&weights), columns, &samples, &mut scores, false)
                .unwrap_err()
                .to_string()
        };
        assert!(refused(0, two, two).contains("rows of 0"));
        assert!(refused(4, two, two).contains("rows of 4"));
        assert!(refused(3, two, two).contains("sample 0"));
        assert!(refused(3, three, three).contains("(t, 2) upstream"));
        assert!(refused(2, four, two).contains("found 4 and 2"));
        let error = accumulate_products(Values::F32(&weights), 3, &[], &mut [0.0; 3], false);
        assert!(error.unwrap_err().to_string().contains("3 scores"));
    }
}
