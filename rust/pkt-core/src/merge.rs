//! A weight and a change of it become one stored weight, and what rounding made of the change.
//!
//! `W' = round(W + Δ)`: Δ is f32, a block of rows of a low-rank product BA. The sum is rounded to
//! f32, as plain torch has it, then to the stored type (round to nearest, ties to even both times);
//! a sum with a weight in f64 is f64. bf16 keeps 8 bits, so where `|Δ|` is far below `|W|` the change
//! partly vanishes. How much of it is told by two sums in f64, the relative error being √(e / c):
//!
//! `e = Σ (W' − W − Δ)²`, `c = Σ Δ²`
//!
//! O(n) in one pass; sums are cut at fixed places, so that every number of threads and every SIMD
//! width gives the same bits.

#![allow(clippy::inline_always, reason = "a Kernel is only as wide as what is inlined into it")]

use half::{bf16, f16};
use rayon::prelude::*;

use crate::sensitivity::Element;
use crate::simd::{self, Kernel};
use crate::{Error, Result};

/// Elements one task merges: far above the cost of a fork, and within a core's L2 cache.
const BLOCK: usize = 1 << 15;
/// Partial sums: two AVX-512 registers of f64 for each of the two sums.
const LANES: usize = 16;

/// Stored weights of any float type.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// IEEE double precision.
    F64(&'a [f64]),
    /// IEEE single precision.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// The upper half of an f32.
    Bf16(&'a [bf16]),
    /// 4 exponent bits, no infinities.
    F8E4M3(&'a [u8]),
    /// The upper half of an f16.
    F8E5M2(&'a [u8]),
}

/// Where merged weights go, and in which type.
#[derive(Debug)]
pub enum Target<'a> {
    /// IEEE double precision.
    F64(&'a mut [f64]),
    /// IEEE single precision.
    F32(&'a mut [f32]),
    /// IEEE half precision.
    F16(&'a mut [f16]),
    /// The upper half of an f32.
    Bf16(&'a mut [bf16]),
}

/// What a merge left.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Merged {
    /// `Σ (W' − W − Δ)²`, what rounding took or added.
    pub error: f64,
    /// `Σ Δ²`.
    pub change: f64,
    /// The first element whose result is NaN or infinite, if there is one.
    pub not_finite: Option<usize>,
}

/// Binds the slice inside `$target`, whatever its type, and evaluates `$body` for that type.
macro_rules! with_slice {
    ($target:expr, |$slice:ident| $body:expr) => {
        match $target {
            Target::F64($slice) => $body,
            Target::F32($slice) => $body,
            Target::F16($slice) => $body,
            Target::Bf16($slice) => $body,
        }
    };
}

impl Weights<'_> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F8E4M3(bytes) | Self::F8E5M2(bytes) => bytes.len(),
            Self::F64(slice) => slice.len(),
            Self::F32(slice) => slice.len(),
            Self::F16(slice) => slice.len(),
            Self::Bf16(slice) => slice.len(),
        }
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Target<'_> {
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

/// Writes `round(weights + delta)` to `target`; without a delta the weights are converted, and both
/// sums of [`Merged`] are zero.
///
/// # Errors
/// [`Error::Invalid`] if the lengths differ; `target` is then untouched.
pub fn merge(weights: Weights, delta: Option<&[f32]>, target: Target) -> Result<Merged> {
    let (count, room) = (weights.len(), target.len());
    let changes = delta.map_or(count, <[f32]>::len);
    if changes != count || room != count {
        return Err(Error::Invalid(format!(
            "merge: expected a change of and room for each of {count} weights, found {changes} \
             changes and room for {room}"
        )));
    }
    let exact: Vec<f32>;
    let weights = match weights {
        Weights::F8E4M3(bytes) => {
            exact = bytes.iter().map(|&byte| e4m3(byte)).collect();
            Weights::F32(&exact)
        }
        Weights::F8E5M2(bytes) => {
            exact = bytes.iter().map(|&byte| e5m2(byte)).collect();
            Weights::F32(&exact)
        }
        wider => wider,
    };
    Ok(with_slice!(target, |t| match weights {
        Weights::F64(w) => merge_slices(w, delta, t),
        Weights::F32(w) => merge_slices(w, delta, t),
        Weights::F16(w) => merge_slices(w, delta, t),
        Weights::Bf16(w) => merge_slices(w, delta, t),
        Weights::F8E4M3(_) | Weights::F8E5M2(_) => unreachable!("widened above"),
    }))
}

fn merge_slices<W: Stored, T: Rounded>(
    weights: &[W],
    delta: Option<&[f32]>,
    target: &mut [T],
) -> Merged {
    let blocks = target.par_chunks_mut(BLOCK).zip(weights.par_chunks(BLOCK));
    let parts: Vec<Merged> = match delta {
        Some(delta) => blocks
            .zip(delta.par_chunks(BLOCK))
            .map(|((target, weights), delta)| simd::widest(Sum { weights, delta, target }))
            .collect(),
        None => {
            blocks.map(|(target, weights)| simd::widest(Conversion { weights, target })).collect()
        }
    };
    let mut whole = Merged::default();
    for (block, part) in parts.into_iter().enumerate() {
        whole.error += part.error;
        whole.change += part.change;
        whole.not_finite = whole.not_finite.or_else(|| Some(block * BLOCK + part.not_finite?));
    }
    whole
}

/// An 8-bit float with 5 exponent bits: the upper half of an f16.
fn e5m2(byte: u8) -> f32 {
    f16::from_bits(u16::from(byte) << 8).to_f32()
}

/// An 8-bit float with 4 exponent bits: no infinities, NaN where all seven bits are set. Its fields
/// begin one bit further right than those of an f16, whose bias is larger by 8.
fn e4m3(byte: u8) -> f32 {
    let (magnitude, sign) = (u16::from(byte & 0x7f), u16::from(byte & 0x80) << 8);
    let value = f16::from_bits(sign | (magnitude << 7)).to_f32() * 256.0;
    if magnitude == 0x7f { f32::NAN } else { value }
}

/// A stored float, exact in f64.
trait Stored: Copy + Sync {
    fn wide(self) -> f64;
}

impl Stored for f64 {
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
}

impl Stored for f32 {
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(f32::from_bits(u32::from(self.to_bits()) << 16))
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn wide(self) -> f64 {
        let sign = u32::from(self.to_bits() >> 15) << 31;
        f64::from(f32::from_bits(self.magnitude().to_bits() | sign))
    }
}

/// A float that results are stored as.
trait Rounded: Stored + Send {
    /// The nearest, ties to even, of the sum rounded to f32 (f64: of the sum itself).
    fn round(sum: f64) -> Self;
}

impl Rounded for f64 {
    #[inline(always)]
    fn round(sum: f64) -> Self {
        sum
    }
}

impl Rounded for f32 {
    #[inline(always)]
    fn round(sum: f64) -> Self {
        sum as f32
    }
}

impl Rounded for bf16 {
    /// Half a unit of the last kept bit is added, less one where that bit is even.
    #[inline(always)]
    fn round(sum: f64) -> Self {
        let sum = sum as f32;
        let bits = sum.to_bits();
        let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        Self::from_bits(if sum.is_nan() { 0x7fff } else { nearest as u16 })
    }
}

impl Rounded for f16 {
    /// Normal results round as bf16 does, 13 bits being dropped and the bias lowered by 112. Below
    /// 2⁻¹⁴ the addition of ½ puts the unit of the subnormals, 2⁻²⁴, at the end of the fraction.
    #[inline(always)]
    fn round(sum: f64) -> Self {
        const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
        const OVERFLOW: u32 = (127 + 16) << 23;
        let sum = sum as f32;
        let (bits, sign) = (sum.to_bits() & 0x7fff_ffff, (sum.to_bits() >> 16) & 0x8000);
        let nearest = bits.wrapping_add(0xfff + ((bits >> 13) & 1));
        let normal = nearest.wrapping_sub(112 << 23) >> 13;
        let subnormal = (sum.abs() + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        let finite = if bits < SMALLEST_NORMAL { subnormal } else { normal };
        let large = if sum.is_nan() { 0x7e00 } else { 0x7c00 };
        Self::from_bits((sign | if bits < OVERFLOW { finite } else { large }) as u16)
    }
}

/// [`merge`] of one block on one thread.
struct Sum<'a, W, T> {
    weights: &'a [W],
    delta: &'a [f32],
    target: &'a mut [T],
}

impl<W: Stored, T: Rounded> Kernel for Sum<'_, W, T> {
    type Output = Merged;

    #[inline(always)]
    fn run(self) -> Merged {
        let (mut error, mut change) = ([0.0; LANES], [0.0; LANES]);
        let (weights, last_weights) = self.weights.as_chunks::<LANES>();
        let (delta, last_delta) = self.delta.as_chunks::<LANES>();
        let (target, last_target) = self.target.as_chunks_mut::<LANES>();
        for (target, (weights, delta)) in target.iter_mut().zip(weights.iter().zip(delta)) {
            for lane in 0..LANES {
                let (stored, lost, changed) = add(weights[lane], delta[lane]);
                target[lane] = stored;
                error[lane] += lost;
                change[lane] += changed;
            }
        }
        let rest = last_target.iter_mut().zip(last_weights.iter().zip(last_delta)).enumerate();
        for (lane, (target, (&weight, &delta))) in rest {
            let (stored, lost, changed) = add(weight, delta);
            *target = stored;
            error[lane] += lost;
            change[lane] += changed;
        }
        let error: f64 = error.iter().sum();
        Merged {
            error,
            change: change.iter().sum(),
            // A result that is NaN or infinite leaves an error that is.
            not_finite: if error.is_finite() { None } else { first_not_finite(self.target) },
        }
    }
}

/// `round(w + δ)`, the square of what rounding took or added, and δ².
#[inline(always)]
fn add<W: Stored, T: Rounded>(weight: W, delta: f32) -> (T, f64, f64) {
    let (weight, delta) = (weight.wide(), f64::from(delta));
    let stored = T::round(weight + delta);
    let lost = (stored.wide() - weight) - delta;
    (stored, lost * lost, delta * delta)
}

/// [`merge`] of one block without a change.
struct Conversion<'a, W, T> {
    weights: &'a [W],
    target: &'a mut [T],
}

impl<W: Stored, T: Rounded> Kernel for Conversion<'_, W, T> {
    type Output = Merged;

    #[inline(always)]
    fn run(self) -> Merged {
        for (target, &w) in self.target.iter_mut().zip(self.weights) {
            *target = T::round(w.wide());
        }
        Merged { not_finite: first_not_finite(self.target), ..Merged::default() }
    }
}

fn first_not_finite<T: Stored>(values: &[T]) -> Option<usize> {
    values.iter().position(|value| !value.wide().is_finite())
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::simd::every;

    /// What is compared: bit by bit, but for sign and payload of a NaN.
    fn bits(value: f64) -> u64 {
        if value.is_nan() { u64::MAX } else { value.to_bits() }
    }

    /// A [`Sum`] or [`Conversion`] together with what it writes.
    #[derive(Clone)]
    struct Owned<'a, W, T>(&'a [W], Option<&'a [f32]>, Vec<T>);

    impl<W: Stored, T: Rounded> Kernel for Owned<'_, W, T> {
        type Output = (Vec<u64>, [u64; 2], Option<usize>);

        #[inline(always)]
        fn run(self) -> Self::Output {
            let Self(weights, delta, mut target) = self;
            let merged = match delta {
                Some(delta) => Sum { weights, delta, target: &mut target }.run(),
                None => Conversion { weights, target: &mut target }.run(),
            };
            let stored = target.iter().map(|value| bits(value.wide())).collect();
            (stored, [bits(merged.error), bits(merged.change)], merged.not_finite)
        }
    }

    /// The law of [`merge`], one element after the other.
    fn check<W: Stored, T: Rounded>(
        weights: &[W],
        delta: Option<&[f32]>,
        round: impl Fn(f64) -> f64,
        merged: Merged,
        target: &[T],
    ) -> std::result::Result<(), TestCaseError> {
        let expected: Vec<f64> = (0..weights.len())
            .map(|i| round(weights[i].wide() + delta.map_or(0.0, |d| f64::from(d[i]))))
            .collect();
        for (found, &expected) in target.iter().zip(&expected) {
            prop_assert_eq!(bits(found.wide() + 0.0), bits(expected + 0.0));
        }
        prop_assert_eq!(merged.not_finite, expected.iter().position(|x| !x.is_finite()));
        if let (Some(delta), None) = (delta, merged.not_finite) {
            let square = |x: f64| x * x;
            let change: f64 = delta.iter().map(|&d| square(f64::from(d))).sum();
            let lost = |i: usize| square(expected[i] - weights[i].wide() - f64::from(delta[i]));
            let error: f64 = (0..weights.len()).map(lost).sum();
            prop_assert!((merged.change - change).abs() <= 1e-12 * change);
            let same = merged.error.to_bits() == error.to_bits(); // both infinite, of f64 weights
            prop_assert!(same || (merged.error - error).abs() <= 1e-12 * error);
        } else if delta.is_none() {
            prop_assert_eq!(merged, Merged { not_finite: merged.not_finite, ..Merged::default() });
        }
        let outputs = every::width(&Owned(weights, delta, target.to_vec()));
        prop_assert!(outputs.iter().all(|output| output == &outputs[0]));
        Ok(())
    }

    fn check_targets<W: Stored>(
        weights: &[W],
        values: Weights,
        delta: Option<&[f32]>,
    ) -> std::result::Result<(), TestCaseError> {
        let count = weights.len();
        let mut wide = vec![0.0; count];
        let merged = merge(values, delta, Target::F64(&mut wide)).unwrap();
        check(weights, delta, |x| x, merged, &wide)?;
        let mut single = vec![0.0; count];
        let merged = merge(values, delta, Target::F32(&mut single)).unwrap();
        check(weights, delta, |x| f64::from(x as f32), merged, &single)?;
        let mut half = vec![f16::ZERO; count];
        let merged = merge(values, delta, Target::F16(&mut half)).unwrap();
        check(weights, delta, |x| f16::from_f32(x as f32).to_f64(), merged, &half)?;
        let mut brain = vec![bf16::ZERO; count];
        let merged = merge(values, delta, Target::Bf16(&mut brain)).unwrap();
        check(weights, delta, |x| bf16::from_f32(x as f32).to_f64(), merged, &brain)
    }

    #[test]
    fn every_16_bit_float_is_as_half_has_it() {
        for pattern in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(pattern), f16::from_bits(pattern));
            let found = [bits(b.wide()), bits(h.wide())];
            assert_eq!(found, [bits(b.to_f64()), bits(h.to_f64())], "{pattern:#06x}");
            let back = [bf16::round(b.wide()), bf16::round(h.wide())].map(|x| bits(x.wide()));
            let expected = [b.to_f64(), bf16::from_f64(h.to_f64()).to_f64()].map(bits);
            assert_eq!(back, expected, "{pattern:#06x} as bf16");
            let back = [f16::round(b.wide()), f16::round(h.wide())].map(|x| bits(x.wide()));
            let expected = [f16::from_f32(b.to_f32()).to_f64(), h.to_f64()].map(bits);
            assert_eq!(back, expected, "{pattern:#06x} as f16");
        }
    }

    #[test]
    fn every_8_bit_float_is_by_definition() {
        for pattern in 0..=u8::MAX {
            let sign = if pattern < 0x80 { 1.0 } else { -1.0 };
            let (exponent, fraction) = (i32::from(pattern >> 3 & 15), f64::from(pattern & 7) / 8.0);
            let expected = match (exponent, pattern & 7) {
                (15, 7) => f64::NAN,
                (0, _) => sign * fraction * f64::powi(2.0, -6),
                _ => sign * (1.0 + fraction) * f64::powi(2.0, exponent - 7),
            };
            assert_eq!(bits(e4m3(pattern).wide()), bits(expected), "E4M3 {pattern:#04x}");
            let (exponent, fraction) = (i32::from(pattern >> 2 & 31), f64::from(pattern & 3) / 4.0);
            let expected = match (exponent, pattern & 3) {
                (31, 0) => sign * f64::INFINITY,
                (31, _) => f64::NAN,
                (0, _) => sign * fraction * f64::powi(2.0, -14),
                _ => sign * (1.0 + fraction) * f64::powi(2.0, exponent - 15),
            };
            assert_eq!(bits(e5m2(pattern).wide()), bits(expected), "E5M2 {pattern:#04x}");
        }
    }

    #[test]
    fn rounding_is_to_nearest_with_ties_to_even() {
        let bf16_of = |x: f32| bf16::round(f64::from(x)).to_bits();
        let f16_of = |x: f32| f16::round(f64::from(x)).to_bits();
        let next = |x: f32| f32::from_bits(x.to_bits() + 1);
        let tie = 1.0 + 1.0 / 256.0;
        assert_eq!((bf16_of(tie), bf16_of(next(tie))), (0x3f80, 0x3f81));
        assert_eq!(bf16_of(1.0 + 3.0 / 256.0), 0x3f82);
        assert_eq!((f16_of(1.0 + 1.0 / 2048.0), f16_of(1.0 + 3.0 / 2048.0)), (0x3c00, 0x3c02));
        assert_eq!((f16_of(65519.0), f16_of(65520.0)), (0x7bff, 0x7c00));
        let half_unit = f32::powi(2.0, -25);
        assert_eq!(
            (f16_of(half_unit), f16_of(next(half_unit)), f16_of(3.0 * half_unit)),
            (0, 1, 2)
        );
        assert_eq!(bf16_of(f32::MAX), 0x7f80);
    }

    #[test]
    fn a_small_change_of_a_bf16_weight_is_lost_and_the_error_says_so() {
        let (weights, delta) = (vec![bf16::ONE; 3], [1e-5f32; 3]);
        let mut target = [bf16::ZERO; 3];
        let merged = merge(Weights::Bf16(&weights), Some(&delta), Target::Bf16(&mut target));
        let merged = merged.unwrap();
        assert_eq!(target, [bf16::ONE; 3]);
        assert!((merged.error / merged.change - 1.0).abs() < 1e-12);
    }

    #[test]
    fn lengths_that_differ_are_refused_and_empty_ones_are_not() {
        let mut target = [7.0f32; 2];
        let one = [1.0f32];
        for (weights, delta) in [(&one[..], None), (&[1.0, 2.0][..], Some(&one[..]))] {
            assert!(merge(Weights::F32(weights), delta, Target::F32(&mut target)).is_err());
            assert_eq!(target.map(f32::to_bits), [7.0f32.to_bits(); 2]);
        }
        let merged = merge(Weights::F32(&[]), Some(&[]), Target::F32(&mut []));
        assert_eq!(merged.unwrap(), Merged::default());
    }

    #[test]
    fn threads_leave_no_trace_and_indices_count_over_all_blocks() {
        let count = 3 * BLOCK + 5;
        let weights: Vec<f32> = (0..count).map(|i| (i as f32).sin()).collect();
        let mut delta: Vec<f32> = (0..count).map(|i| (i as f32).cos() / 100.0).collect();
        delta[2 * BLOCK + 1] = f32::INFINITY;
        delta[2 * BLOCK + 9] = f32::NAN;
        let results = every::thread_count(|| {
            let mut target = vec![bf16::ZERO; count];
            let merged =
                merge(Weights::F32(&weights), Some(&delta), Target::Bf16(&mut target)).unwrap();
            (target.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), merged.not_finite)
        });
        assert!(results.iter().all(|result| result == &results[0]));
        assert_eq!(results[0].1, Some(2 * BLOCK + 1));
        delta.truncate(2 * BLOCK);
        let sums = every::thread_count(|| {
            let mut target = vec![bf16::ZERO; 2 * BLOCK];
            let weights = Weights::F32(&weights[..2 * BLOCK]);
            let merged = merge(weights, Some(&delta), Target::Bf16(&mut target)).unwrap();
            (bits(merged.error), bits(merged.change))
        });
        assert!(sums.iter().all(|sum| sum == &sums[0]));
    }

    proptest! {
        #[test]
        fn a_merge_is_the_rounded_sum_for_every_pair_of_dtypes(
            patterns in vec((any::<u64>(), any::<u32>()), 0..80), with_delta in any::<bool>()
        ) {
            let delta: Vec<f32> = patterns.iter().map(|pair| f32::from_bits(pair.1)).collect();
            let delta = with_delta.then_some(&delta[..]);
            let of = |shift: u32| patterns.iter().map(move |pair| pair.0 >> shift);
            let wide: Vec<f64> = of(0).map(f64::from_bits).collect();
            check_targets(&wide, Weights::F64(&wide), delta)?;
            let single: Vec<f32> = of(32).map(|x| f32::from_bits(x as u32)).collect();
            check_targets(&single, Weights::F32(&single), delta)?;
            let half: Vec<f16> = of(48).map(|x| f16::from_bits(x as u16)).collect();
            check_targets(&half, Weights::F16(&half), delta)?;
            let brain: Vec<bf16> = of(48).map(|x| bf16::from_bits(x as u16)).collect();
            check_targets(&brain, Weights::Bf16(&brain), delta)?;
            let bytes: Vec<u8> = of(56).map(|x| x as u8).collect();
            let four: Vec<f32> = bytes.iter().map(|&byte| e4m3(byte)).collect();
            check_targets(&four, Weights::F8E4M3(&bytes), delta)?;
            let five: Vec<f32> = bytes.iter().map(|&byte| e5m2(byte)).collect();
            check_targets(&five, Weights::F8E5M2(&bytes), delta)?;
        }

        #[test]
        fn ordinary_weights_leave_an_error_of_half_a_unit_at_most(
            pairs in vec((-4.0f32..4.0, -0.1f32..0.1), 1..300)
        ) {
            let (weights, delta): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let weights: Vec<bf16> = weights.into_iter().map(bf16::from_f32).collect();
            let mut target = vec![bf16::ZERO; weights.len()];
            let values = Weights::Bf16(&weights);
            let merged = merge(values, Some(&delta), Target::Bf16(&mut target)).unwrap();
            let largest = 8.0 * f64::powi(2.0, -9);
            prop_assert!(merged.error <= weights.len() as f64 * largest * largest);
            check(&weights, Some(&delta), |x| bf16::from_f32(x as f32).to_f64(), merged, &target)?;
        }
    }
}
