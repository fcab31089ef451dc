//! `pkt._core`: signatures and conversion. The work, and every formula, is in `pkt-core`.
//!
//! Each function converts its arguments, lets go of the interpreter ([`Python::detach`]) and maps
//! the error once. Memory stays where the caller keeps it: buffers in, nothing copied.

#![allow(clippy::needless_pass_by_value, reason = "Python hands arguments over by value")]

mod buffer;
mod checkpoint;
mod error;
mod merge;
mod reader;
mod selection;
mod sensitivity;
mod thin;
mod writer;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::checkpoint::{Catalogue, dtype_bytes};
    #[pymodule_export]
    use super::merge::merge;
    #[pymodule_export]
    use super::reader::{Layout, Reader, Stream, layout};
    #[pymodule_export]
    use super::selection::{Matrix, best_columns, random_weights, random_window, top_layers};
    #[pymodule_export]
    use super::sensitivity::{accumulate, accumulate_columns, accumulate_products, score_sum};
    #[pymodule_export]
    use super::thin::Packed;
    #[pymodule_export]
    use super::writer::Writer;
}
