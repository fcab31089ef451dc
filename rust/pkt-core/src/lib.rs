//! Reading, scoring, selecting and writing the weights of models larger than memory.
//!
//! ```text
//! folder ─checkpoint→ Catalogue ─layout→ ranges ─reader→ bytes ─stream→ layer slots
//!                                         gradients ─sensitivity→ scores ─selection→ windows
//!                                         windows ─thin→ products for their factors
//!                                         weights + changes ─merge→ bytes ─writer→ folder
//! ```
//!
//! Everything here works on memory that the caller owns (what is laid out anew for products is
//! [`thin::Packed`]'s), knows nothing of Python, and never panics on what a file holds: damage is an
//! [`Error`] that names file, tensor, expected, found.

pub mod checkpoint;
pub mod dtype;
pub mod error;
mod folder;
pub mod gradient;
pub mod header;
mod json;
pub mod layout;
pub mod merge;
pub mod reader;
pub mod selection;
pub mod sensitivity;
mod simd;
pub mod stream;
pub mod thin;
pub mod writer;

/// How many cases of a property are tried: few under Miri, which is a thousand times slower.
#[cfg(test)]
pub(crate) const fn cases(count: u32) -> u32 {
    if cfg!(miri) { 2 } else { count }
}

/// Draws numbers of [−1, 1), as many as it is asked for, that differ from place to place without a
/// pattern that tiles could share.
#[cfg(test)]
pub(crate) fn numbers(seed: u32) -> impl FnMut(usize) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    move |count| (0..count).map(|_| next()).collect()
}

pub use checkpoint::{Catalogue, Entry, Shard};
pub use dtype::Dtype;
pub use error::{Error, Result};
