//! Twin of `pkt_core::writer`.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pkt_core::Dtype;
use pkt_core::writer::{Spec, Writer as Core};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::buffer::Memory;
use crate::error::writing_to_python;

/// One safetensors file that is written piece by piece and appears whole.
#[pyclass(frozen, module = "pkt._core")]
pub struct Writer(Mutex<Option<Core>>);

#[pymethods]
impl Writer {
    #[new]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        tensors: Vec<(String, String, Vec<u64>)>,
    ) -> PyResult<Self> {
        let specs = tensors
            .into_iter()
            .map(|(name, dtype, shape)| match Dtype::from_name(&dtype) {
                Some(dtype) => Ok(Spec { name, dtype, shape }),
                None => Err(PyValueError::new_err(format!("unknown dtype '{dtype}'"))),
            })
            .collect::<PyResult<Vec<_>>>()?;
        let core = py.detach(|| Core::create(&path, &specs)).map_err(writing_to_python)?;
        Ok(Self(Mutex::new(Some(core))))
    }

    /// Write the next bytes of a tensor.
    fn write(&self, py: Python<'_>, name: &str, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let memory = Memory::<u8>::of(data)?;
        let bytes = memory.slice();
        py.detach(|| {
            let mut core = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            core.as_mut().map(|writer| writer.write(name, bytes))
        })
        .ok_or_else(closed)?
        .map_err(writing_to_python)
    }

    /// Sync the file and give it its name; its length.
    fn finish(&self, py: Python<'_>) -> PyResult<u64> {
        let core = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| core.map(Core::finish)).ok_or_else(closed)?.map_err(writing_to_python)
    }

    /// Give the file up, if it is not finished.
    fn close(&self) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

fn closed() -> PyErr {
    PyRuntimeError::new_err("writer: used after its end")
}
