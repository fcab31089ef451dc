//! One body, three instruction sets: the widest that the CPU has is chosen at run time.
//!
//! The wheel is built for baseline x86-64. A [`Kernel`] is plain Rust that the compiler vectorises;
//! [`widest`] inlines it into functions compiled for AVX-512 and AVX2. Rust neither reorders nor
//! contracts floating-point arithmetic, so every width gives the same bits. Other architectures
//! get the plain body. All `unsafe` of the arithmetic is in this file.

/// A loop worth compiling for several instruction sets. Mark `run` `#[inline(always)]`: only what
/// is inlined is compiled for the wider set.
pub(crate) trait Kernel {
    type Output;
    fn run(self) -> Self::Output;
}

/// The widest registers of a CPU, and what it can multiply in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    /// AVX-512 with dot products of bfloat16 pairs ([`Pairs`]).
    Avx512Bf16,
    Avx512,
    Avx2,
    /// What every CPU of the architecture has.
    Plain,
}

/// The widest that this CPU has.
pub(crate) fn width() -> Width {
    #[cfg(target_arch = "x86_64")]
    {
        if has_avx512() {
            let pairs = is_x86_feature_detected!("avx512bf16");
            return if pairs { Width::Avx512Bf16 } else { Width::Avx512 };
        }
        if has_avx2() {
            return Width::Avx2;
        }
    }
    Width::Plain
}

/// Runs `kernel` with the widest instruction set of this CPU.
pub(crate) fn widest<K: Kernel>(kernel: K) -> K::Output {
    on(width(), kernel)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// Runs `kernel` with the instructions of `width`, which must be no wider than [`width()`].
pub(crate) fn on<K: Kernel>(width: Width, kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    match width {
        Width::Avx512Bf16 | Width::Avx512 => {
            assert!(has_avx512());
            // SAFETY: the CPU has every feature that `avx512` enables.
            return unsafe { avx512(kernel) };
        }
        Width::Avx2 => {
            assert!(has_avx2());
            // SAFETY: the CPU has both features that `avx2` enables.
            return unsafe { avx2(kernel) };
        }
        Width::Plain => {}
    }
    kernel.run()
}

/// Adds to `sums[i][j]` the products of the two bfloat16 in `left[k][i]` with those in
/// `right[k][j]`, over k: upper half with upper half, then lower with lower, each in one fused
/// multiply-add. The CPU must have [`Width::Avx512Bf16`].
#[cfg(target_arch = "x86_64")]
pub(crate) fn add_pairs<const ROWS: usize>(
    left: &[[u32; ROWS]],
    right: &[[u32; 32]],
    sums: &mut [[f32; 32]; ROWS],
) {
    use std::arch::x86_64::{__m512, __m512bh, _mm512_dpbf16_ps, _mm512_set1_epi32};
    use std::mem::transmute;

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn held<const ROWS: usize>(
        left: &[[u32; ROWS]],
        right: &[[u32; 32]],
        sums: &mut [[f32; 32]; ROWS],
    ) {
        // SAFETY: 32 floats are two registers of 16, whatever their bits.
        let mut registers = sums.map(|row| unsafe { transmute::<[f32; 32], [__m512; 2]>(row) });
        for (left, right) in left.iter().zip(right) {
            // SAFETY: 32 pairs are two registers of 16, whatever their bits.
            let right = unsafe { transmute::<[u32; 32], [__m512bh; 2]>(*right) };
            for (row, &pair) in registers.iter_mut().zip(left) {
                // SAFETY: both are 512 bits.
                let pair: __m512bh = unsafe { transmute(_mm512_set1_epi32(pair.cast_signed())) };
                row[0] = _mm512_dpbf16_ps(row[0], pair, right[0]);
                row[1] = _mm512_dpbf16_ps(row[1], pair, right[1]);
            }
        }
        // SAFETY: as above.
        *sums = registers.map(|row| unsafe { transmute::<[__m512; 2], [f32; 32]>(row) });
    }
    debug_assert_eq!(width(), Width::Avx512Bf16);
    // SAFETY: by contract the CPU has both features.
    unsafe { held(left, right, sums) }
}

/// Asks for the cache lines of `values` ahead of their use.
#[inline]
pub(crate) fn prefetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for value in values.iter().step_by(64 / size_of::<T>()).chain(values.last()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which reads nothing; every x86-64 has the instruction.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) };
    }
}

/// What must leave no trace in a result, for tests to go through.
#[cfg(test)]
pub(crate) mod every {
    use rayon::ThreadPoolBuilder;

    use super::Kernel;

    /// The outputs of `kernel` at every width that this CPU has.
    pub(crate) fn width<K: Kernel + Clone>(kernel: &K) -> Vec<K::Output> {
        #[allow(unused_mut, reason = "other architectures have one width")]
        let mut outputs = vec![kernel.clone().run()];
        #[cfg(target_arch = "x86_64")]
        {
            if super::has_avx2() {
                // SAFETY: the CPU has both features that `avx2` enables.
                outputs.push(unsafe { super::avx2(kernel.clone()) });
            }
            if super::has_avx512() {
                // SAFETY: the CPU has every feature that `avx512` enables.
                outputs.push(unsafe { super::avx512(kernel.clone()) });
            }
        }
        outputs
    }

    /// The results of `run` on 1, 2, 3 and 5 threads.
    pub(crate) fn thread_count<R: Send>(run: impl Fn() -> R + Sync) -> Vec<R> {
        let pool = |threads| ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        [1, 2, 3, 5].into_iter().map(|threads| pool(threads).install(&run)).collect()
    }
}
