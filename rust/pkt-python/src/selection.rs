//! Twin of `pkt_core::selection`.

use std::sync::OnceLock;

use pkt_core::selection as core;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::buffer::Memory;
use crate::error::to_python;

type Span = (usize, usize);

/// A logical matrix over stored scores: a row map, and how many rows share a score. The first call
/// reads the scores to check them; they must stay as they are.
#[pyclass(frozen, module = "pkt._core")]
pub struct Matrix {
    scores: Memory<f32>,
    columns: usize,
    rows: Option<Memory<u32>>,
    share: u32,
    fixed: OnceLock<core::Fixed>,
}

#[pymethods]
impl Matrix {
    #[new]
    #[pyo3(signature = (scores, columns, rows=None, share=1))]
    fn new(
        scores: &Bound<'_, PyAny>,
        columns: usize,
        rows: Option<&Bound<'_, PyAny>>,
        share: u32,
    ) -> PyResult<Self> {
        let rows = rows.map(Memory::of).transpose()?;
        Ok(Self { scores: Memory::of(scores)?, columns, rows, share, fixed: OnceLock::new() })
    }

    /// (rows, columns) of the logical matrix.
    #[getter]
    fn shape(&self) -> Span {
        let stored = self.scores.slice().len() / self.columns.max(1);
        (self.rows.as_ref().map_or(stored, |rows| rows.slice().len()), self.columns)
    }

    /// (row, column, score) of the best contiguous window.
    fn best_window(
        &self,
        py: Python<'_>,
        rows: usize,
        columns: usize,
    ) -> PyResult<(usize, usize, f64)> {
        let best = self.with(py, |matrix| core::best_window(matrix, rows, columns))?;
        Ok((best.row, best.column, best.score))
    }

    /// Sum of a window, given as half-open ranges.
    fn window_score(&self, py: Python<'_>, rows: Span, columns: Span) -> PyResult<f64> {
        self.with(py, |matrix| core::window_score(matrix, rows.0..rows.1, columns.0..columns.1))
    }

    /// The k rows of the largest sums, ascending.
    fn top_rows(&self, py: Python<'_>, k: usize) -> PyResult<Vec<usize>> {
        self.with(py, |matrix| core::top_rows(matrix, k))
    }

    /// The k columns of the largest sums, ascending.
    fn top_columns(&self, py: Python<'_>, k: usize) -> PyResult<Vec<usize>> {
        self.with(py, |matrix| core::top_columns(matrix, k))
    }

    /// (sum of each row, sum of each column).
    fn sums(&self, py: Python<'_>) -> PyResult<(Vec<f64>, Vec<f64>)> {
        self.with(py, |matrix| Ok(core::sums(matrix)))
    }

    /// Sum where chosen rows and columns cross.
    fn cross_score(&self, py: Python<'_>, rows: Vec<usize>, columns: Vec<usize>) -> PyResult<f64> {
        self.with(py, |matrix| core::cross_score(matrix, &rows, &columns))
    }

    /// Bit mask of the k largest entries.
    fn top_weights<'py>(&self, py: Python<'py>, k: usize) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.with(py, |matrix| core::top_weights(matrix, k))?))
    }

    /// Sum of the entries of a bit mask.
    fn mask_score(&self, py: Python<'_>, mask: &[u8]) -> PyResult<f64> {
        self.with(py, |matrix| core::mask_score(matrix, mask))
    }

    /// Mean score of each bin of a grid, row-major.
    fn bin_means(&self, py: Python<'_>, rows: usize, columns: usize) -> PyResult<Vec<f64>> {
        self.with(py, |matrix| core::bin_means(matrix, rows, columns))
    }
}

impl Matrix {
    /// Runs `work` on the matrix without the interpreter.
    fn with<R: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&core::Matrix<'_>) -> pkt_core::Result<R> + Send,
    ) -> PyResult<R> {
        let scores = self.scores.slice();
        let rows = self.rows.as_ref().map(Memory::slice);
        py.detach(|| {
            let matrix = match self.fixed.get() {
                Some(&fixed) => core::Matrix::again(scores, self.columns, rows, fixed)?,
                None => core::Matrix::new(scores, self.columns, rows, self.share)?,
            };
            self.fixed.get_or_init(|| matrix.fixed());
            work(&matrix)
        })
        .map_err(to_python)
    }
}

/// (start, score) of the best run of columns.
#[pyfunction]
pub fn best_columns(
    py: Python<'_>,
    sums: &Bound<'_, PyAny>,
    width: usize,
) -> PyResult<(usize, f64)> {
    let sums = Memory::<f64>::of(sums)?;
    let sums = sums.slice();
    let best = py.detach(|| core::best_columns(sums, width)).map_err(to_python)?;
    Ok((best.column, best.score))
}

/// The k highest layers, ascending.
#[pyfunction]
pub fn top_layers(scores: Vec<f64>, k: usize) -> PyResult<Vec<usize>> {
    core::top_layers(&scores, k).map_err(to_python)
}

/// Bit mask of k of len entries, every subset equally likely.
#[pyfunction]
pub fn random_weights(
    py: Python<'_>,
    len: usize,
    k: usize,
    seed: u64,
) -> PyResult<Bound<'_, PyBytes>> {
    let mask = py.detach(|| core::random_weights(len, k, seed)).map_err(to_python)?;
    Ok(PyBytes::new(py, &mask))
}

/// (row, column) of a window, every place equally likely.
#[pyfunction]
pub fn random_window(shape: Span, window: Span, seed: u64) -> PyResult<Span> {
    core::random_window(shape, window, seed).map_err(to_python)
}
