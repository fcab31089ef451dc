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

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

/// Runs `kernel` with the widest instruction set of this CPU.
pub(crate) fn widest<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if has_avx512() {
            // SAFETY: the CPU has every feature that `avx512` enables.
            return unsafe { avx512(kernel) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has the one feature that `avx2` enables.
            return unsafe { avx2(kernel) };
        }
    }
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
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
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the CPU has the one feature that `avx2` enables.
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
