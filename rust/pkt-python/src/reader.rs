//! Twin of `pkt_core::layout`, `pkt_core::reader` and `pkt_core::stream`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pkt_core::layout::{self as core, Extent};
use pkt_core::reader::{File, Mode, Reader as CoreReader};
use pkt_core::stream::{Slot, Stream as CoreStream};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::buffer::Memory;
use crate::error::to_python;

/// Where tensors lie in a slot, and the reads that bring them there.
#[pyclass(frozen, module = "pkt._core")]
pub struct Layout(core::Layout);

#[pymethods]
impl Layout {
    /// Offset in the slot of each extent.
    #[getter]
    fn places(&self) -> Vec<usize> {
        self.0.places.clone()
    }

    /// Bytes the slot must have.
    #[getter]
    fn bytes(&self) -> usize {
        self.0.bytes
    }
}

/// Place extents (file, begin, end, element bytes) in a slot.
#[pyfunction]
pub fn layout(extents: Vec<(usize, u64, u64, usize)>) -> Layout {
    let extents: Vec<_> = extents
        .iter()
        .map(|&(file, begin, end, align)| Extent { file, begin, end, align })
        .collect();
    Layout(core::layout(&extents))
}

/// Open shards and the threads that read them.
#[pyclass(frozen, module = "pkt._core")]
pub struct Reader {
    core: Arc<CoreReader>,
    notices: Vec<String>,
    bytes: AtomicU64,
}

#[pymethods]
impl Reader {
    #[new]
    fn new(
        py: Python<'_>,
        files: Vec<(PathBuf, u64)>,
        mode: &str,
        threads: usize,
    ) -> PyResult<Self> {
        let mode = Mode::from_name(mode)
            .ok_or_else(|| PyValueError::new_err(format!("unknown reading mode '{mode}'")))?;
        let files: Vec<_> = files.into_iter().map(|(path, bytes)| File { path, bytes }).collect();
        let (core, notices) =
            py.detach(|| CoreReader::open(&files, mode, threads)).map_err(to_python)?;
        Ok(Self { core: Arc::new(core), notices, bytes: AtomicU64::new(0) })
    }

    /// The mode in use.
    #[getter]
    fn mode(&self) -> &'static str {
        self.core.mode().name()
    }

    /// What the user should know, such as a refused direct mode.
    #[getter]
    fn notices(&self) -> Vec<String> {
        self.notices.clone()
    }

    /// Bytes read by `read` and `read_rows` (streams count their own).
    #[getter]
    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Fill `target` as `layout` says.
    fn read(&self, py: Python<'_>, layout: &Layout, target: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut memory = Memory::<u8>::writable(target)?;
        let (target, go) = (memory.slice_mut(), AtomicBool::new(false));
        let read = py.detach(|| self.core.read(&layout.0.ranges, target, &go));
        self.count(read)
    }

    /// Read rows and columns of a row-major matrix densely into `target`.
    #[allow(clippy::too_many_arguments, reason = "a matrix, a window and a target")]
    fn read_rows(
        &self,
        py: Python<'_>,
        extent: (usize, u64, u64, usize),
        shape: (u64, u64),
        rows: (u64, u64),
        columns: (u64, u64),
        target: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (file, begin, end, align) = extent;
        let matrix = Extent { file, begin, end, align };
        let mut memory = Memory::<u8>::writable(target)?;
        let (target, go) = (memory.slice_mut(), AtomicBool::new(false));
        let (rows, columns) = (rows.0..rows.1, columns.0..columns.1);
        let read = py.detach(|| self.core.read_rows(&matrix, shape, rows, columns, target, &go));
        self.count(read)
    }
}

impl Reader {
    fn count(&self, read: pkt_core::Result<Option<u64>>) -> PyResult<()> {
        let bytes = read.map_err(to_python)?.unwrap_or(0);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }
}

/// Jobs read ahead into slots.
#[pyclass(frozen, module = "pkt._core")]
pub struct Stream {
    // Dropped in this order: the reading thread ends before its memory goes.
    core: std::sync::RwLock<Option<CoreStream>>,
    last: std::sync::Mutex<pkt_core::stream::Counts>,
    _slots: Vec<Memory<u8>>,
}

#[pymethods]
impl Stream {
    #[new]
    fn new(
        reader: &Reader,
        slots: Vec<Bound<'_, PyAny>>,
        jobs: Vec<PyRef<'_, Layout>>,
    ) -> PyResult<Self> {
        let memories: Vec<_> = slots.iter().map(Memory::<u8>::writable).collect::<PyResult<_>>()?;
        let slots = memories
            .iter()
            .map(|memory| {
                let (first, bytes) = memory.raw();
                // SAFETY: `memories` is kept beside the stream and dropped after it; `pkt.stream`
                // looks at a slot only between `next` and `release`.
                unsafe { Slot::new(first, bytes) }
            })
            .collect();
        let jobs = jobs.iter().map(|layout| layout.0.ranges.clone()).collect();
        let core = CoreStream::start(Arc::clone(&reader.core), slots, jobs).map_err(to_python)?;
        let core = std::sync::RwLock::new(Some(core));
        Ok(Self { core, last: std::sync::Mutex::default(), _slots: memories })
    }

    /// (job, slot) of the next job, waiting until it is read; None after the last.
    fn next(&self, py: Python<'_>) -> PyResult<Option<(usize, usize)>> {
        py.detach(|| {
            let core = self.core.read().unwrap_or_else(std::sync::PoisonError::into_inner);
            let Some(core) = core.as_ref() else { return Ok(None) };
            core.next().map(|lease| lease.map(|lease| (lease.job, lease.slot)))
        })
        .map_err(to_python)
    }

    /// Give a slot back to the reader.
    fn release(&self, slot: usize) -> PyResult<()> {
        let core = self.core.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        core.as_ref().map_or(Ok(()), |core| core.release(slot)).map_err(to_python)
    }

    /// Stop reading; the slots are free when this returns.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            let Ok(mut core) = self.core.try_write() else {
                return Err(PyRuntimeError::new_err("stream: closed while in use"));
            };
            if let Some(stream) = core.take() {
                let counts = stream.counts();
                drop(stream);
                *self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = counts;
            }
            Ok(())
        })
    }

    /// Bytes, seconds and stalls so far.
    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let core = self.core.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let counts = core.as_ref().map_or_else(
            || *self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner),
            CoreStream::counts,
        );
        let dict = PyDict::new(py);
        dict.set_item("bytes", counts.bytes)?;
        dict.set_item("read_seconds", counts.read_seconds)?;
        dict.set_item("stalls", counts.stalls)?;
        dict.set_item("stall_seconds", counts.stall_seconds)?;
        dict.set_item("idle_seconds", counts.idle_seconds)?;
        Ok(dict)
    }
}
