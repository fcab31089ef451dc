//! Twin of `pkt_core::checkpoint`.

use std::fmt::Write;
use std::path::PathBuf;

use pkt_core::{Catalogue as Core, Dtype};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::to_python;

/// A tensor: name, shard, dtype, shape, begin, end.
type Row = (String, usize, &'static str, Vec<u64>, u64, u64);

/// The validated tensors of a model folder.
#[pyclass(frozen, module = "pkt._core")]
pub struct Catalogue(Core);

#[pymethods]
impl Catalogue {
    #[new]
    fn new(py: Python<'_>, folder: PathBuf) -> PyResult<Self> {
        py.detach(|| Core::open(&folder)).map(Self).map_err(to_python)
    }

    /// (path, bytes) of each shard.
    fn files(&self) -> Vec<(PathBuf, u64)> {
        self.0.shards.iter().map(|shard| (shard.path.clone(), shard.bytes)).collect()
    }

    /// (name, shard, dtype, shape, begin, end) of each tensor, by name.
    fn entries(&self) -> Vec<Row> {
        let row = |(name, entry): (&String, &pkt_core::Entry)| {
            let dtype = entry.dtype.name();
            (name.clone(), entry.shard, dtype, entry.shape.clone(), entry.begin, entry.end)
        };
        self.0.entries.iter().map(row).collect()
    }

    /// Tensors in the shards that the index does not list.
    #[getter]
    fn unindexed(&self) -> Vec<String> {
        self.0.unindexed.clone()
    }

    /// Hash of shard names and headers.
    #[getter]
    fn sha256(&self) -> String {
        self.0.digest().iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

/// Bytes of an element of a safetensors dtype.
#[pyfunction]
pub fn dtype_bytes(name: &str) -> PyResult<u64> {
    Dtype::from_name(name)
        .map(Dtype::bytes)
        .ok_or_else(|| PyValueError::new_err(format!("unknown dtype '{name}'")))
}
