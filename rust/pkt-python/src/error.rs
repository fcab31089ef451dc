//! The one place where errors of the core become exceptions of `pkt.errors`.

use pkt_core::Error;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// `CheckpointError` for what files hold, `ValueError` for what a caller asks.
pub fn to_python(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Invalid(_) => PyValueError::new_err(text),
        _ => Python::attach(|py| checkpoint_error(py, &text).unwrap_or_else(|other| other)),
    }
}

fn checkpoint_error(py: Python<'_>, text: &str) -> PyResult<PyErr> {
    let class = py.import("pkt.errors")?.getattr("CheckpointError")?;
    Ok(PyErr::from_value(class.call1((text,))?))
}
