//! Which part of a scored matrix is worth keeping: windows, rows and columns, single weights.
//!
//! Zhong et al., "Seeking Neural Nuggets", ICLR 2024, [arXiv 2310.11451]: of a teacher
//! weight, the contiguous `n_S × m_S` sub-matrix with the largest sum of sensitivity, and the
//! `L_S` layers with the largest; rows and columns, single weights and random ones to compare with.
//!
//! | paper         | here                                  |
//! |---------------|---------------------------------------|
//! | S             | [`Matrix`]                            |
//! | `n_S` × `m_S` | `rows` × `columns` of [`best_window`] |
//! | `L_S`         | `k` of [`top_layers`]                 |
//!
//! Scores become 64-bit fixed point once, with the largest shift whose total cannot overflow. From
//! then on every sum is an integer, exact, and independent of order, threads and SIMD width; equal
//! sums are equal, and ties follow a written rule: the lowest index first. (In floats, ties between
//! the repeated rows of grouped-query attention go either way.) O(mn) for everything here.
//!
//! Nothing here panics on its arguments: what cannot be is an [`Error::Invalid`].
//!
//! [arXiv 2310.11451]: https://arxiv.org/abs/2310.11451

#![allow(clippy::inline_always, reason = "a Kernel is only as wide as what is inlined into it")]

mod grid;
mod matrix;
mod random;
mod top;
mod weights;
mod window;

pub use grid::bin_means;
pub use matrix::{Fixed, Matrix};
pub use random::{random_weights, random_window};
pub use top::{cross_score, sums, top_columns, top_layers, top_rows};
pub use weights::{mask_score, top_weights};
pub use window::{Window, best_columns, best_window, window_score};

use crate::{Error, Result};

/// The error for `k` of `count` things, unless there are that many.
fn at_most(k: usize, count: usize, things: &str) -> Result<()> {
    if k <= count {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "cannot select {k} of {count} {things}; the student must not be larger than the teacher"
    )))
}
