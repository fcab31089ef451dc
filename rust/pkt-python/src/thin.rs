//! Twin of `pkt_core::thin`.

use pkt_core::thin as core;
use pyo3::prelude::*;

use crate::buffer::Memory;
use crate::error::to_python;
use crate::sensitivity::Tensor;

/// A matrix (n, m), laid out to be multiplied from the left by a few rows.
#[pyclass(frozen)]
pub struct Packed(core::Packed);

#[pymethods]
impl Packed {
    #[new]
    fn new(
        py: Python<'_>,
        matrix: &Bound<'_, PyAny>,
        dtype: &str,
        rows: usize,
        columns: usize,
    ) -> PyResult<Self> {
        let matrix = Tensor::of(matrix, dtype)?;
        let matrix = matrix.values();
        py.detach(|| core::Packed::new(matrix, rows, columns)).map(Self).map_err(to_python)
    }

    /// Set products (b, m) to rows (b, n) times the matrix; turned, (b, n) to (b, m) times its
    /// transpose.
    fn multiply(
        &self,
        py: Python<'_>,
        rows: &Bound<'_, PyAny>,
        products: &Bound<'_, PyAny>,
        turned: bool,
    ) -> PyResult<()> {
        let rows = Memory::<f32>::of(rows)?;
        let mut products = Memory::<f32>::writable(products)?;
        products.apart_from(rows.raw())?;
        let (rows, products) = (rows.slice(), products.slice_mut());
        py.detach(|| {
            if turned {
                self.0.multiply_turned(rows, products)
            } else {
                self.0.multiply(rows, products)
            }
        })
        .map_err(to_python)
    }
}
