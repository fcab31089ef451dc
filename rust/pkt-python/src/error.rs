//! The one place where errors of the core become exceptions of `pkt.errors`.

use pkt_core::Error;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

/// `CheckpointError` for what files hold, `ValueError` for what a caller asks.
pub fn to_python(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Invalid(_) => PyValueError::new_err(text),
        _ => Python::attach(|py| checkpoint_error(py, &text).unwrap_or_else(|other| other)),
    }
}

/// As [`to_python`], but what the system says of a file that is being written is an `OSError` with
/// its number, text and path.
pub fn writing_to_python(error: Error) -> PyErr {
    match error {
        Error::Io { path, source, .. } if source.raw_os_error().is_some() => {
            let text = source.to_string();
            let text = text.split(" (os error").next().unwrap_or_default().to_owned();
            PyOSError::new_err((source.raw_os_error(), text, path))
        }
        other => to_python(other),
    }
}

fn checkpoint_error(py: Python<'_>, text: &str) -> PyResult<PyErr> {
    let class = py.import("pkt.errors")?.getattr("CheckpointError")?;
    Ok(PyErr::from_value(class.call1((text,))?))
}
