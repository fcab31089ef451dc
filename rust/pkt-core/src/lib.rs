//! Reading, scoring, selecting and writing the weights of models larger than memory.
//!
//! ```text
//! folder ─checkpoint→ Catalogue ─layout→ ranges ─reader→ bytes ─stream→ layer slots
//!                                         gradients ─sensitivity→ scores ─selection→ windows
//!                                         weights + changes ─merge→ bytes ─writer→ folder
//! ```
//!
//! Everything here works on memory that the caller owns, knows nothing of Python, and never
//! panics on what a file holds: damage is an [`Error`] that names file, tensor, expected, found.

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

pub use checkpoint::{Catalogue, Entry, Shard};
pub use dtype::Dtype;
pub use error::{Error, Result};
