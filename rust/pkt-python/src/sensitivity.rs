//! Twin of `pkt_core::sensitivity` and `pkt_core::gradient`.

use half::slice::HalfBitsSliceExt;
use pkt_core::gradient::{self, Sample};
use pkt_core::sensitivity::{self as core, Values};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffer::Memory;
use crate::error::to_python;

/// A tensor as it comes from Python: 16-bit floats as uint16, with their dtype's name.
pub enum Tensor {
    Half(Memory<u16>, bool),
    Single(Memory<f32>),
}

impl Tensor {
    pub fn of(object: &Bound<'_, PyAny>, dtype: &str) -> PyResult<Self> {
        match dtype {
            "BF16" => Ok(Self::Half(Memory::of(object)?, true)),
            "F16" => Ok(Self::Half(Memory::of(object)?, false)),
            "F32" => Ok(Self::Single(Memory::of(object)?)),
            _ => Err(PyValueError::new_err(format!("cannot score weights of dtype '{dtype}'"))),
        }
    }

    pub fn raw(&self) -> (*mut u8, usize) {
        match self {
            Self::Half(memory, _) => memory.raw(),
            Self::Single(memory) => memory.raw(),
        }
    }

    pub fn values(&self) -> Values<'_> {
        match self {
            Self::Half(memory, true) => Values::Bf16(memory.slice().reinterpret_cast()),
            Self::Half(memory, false) => Values::F16(memory.slice().reinterpret_cast()),
            Self::Single(memory) => Values::F32(memory.slice()),
        }
    }
}

/// Add |weights · gradients| of one sample to scores; the first index that is not finite.
#[pyfunction]
pub fn accumulate(
    py: Python<'_>,
    weights: &Bound<'_, PyAny>,
    weights_dtype: &str,
    gradients: &Bound<'_, PyAny>,
    gradients_dtype: &str,
    scores: &Bound<'_, PyAny>,
) -> PyResult<Option<usize>> {
    let weights = Tensor::of(weights, weights_dtype)?;
    let gradients = Tensor::of(gradients, gradients_dtype)?;
    let mut scores = Memory::<f32>::writable(scores)?;
    scores.apart_from(weights.raw())?;
    scores.apart_from(gradients.raw())?;
    let (weights, gradients, scores) = (weights.values(), gradients.values(), scores.slice_mut());
    py.detach(|| core::accumulate(weights, gradients, scores)).map_err(to_python)
}

/// Add the column sums of |weights · gradients| of one sample to sums.
#[pyfunction]
pub fn accumulate_columns(
    py: Python<'_>,
    weights: &Bound<'_, PyAny>,
    weights_dtype: &str,
    gradients: &Bound<'_, PyAny>,
    gradients_dtype: &str,
    columns: usize,
    sums: &Bound<'_, PyAny>,
) -> PyResult<Option<usize>> {
    let weights = Tensor::of(weights, weights_dtype)?;
    let gradients = Tensor::of(gradients, gradients_dtype)?;
    let mut sums = Memory::<f64>::writable(sums)?;
    sums.apart_from(weights.raw())?;
    sums.apart_from(gradients.raw())?;
    let (weights, gradients, sums) = (weights.values(), gradients.values(), sums.slice_mut());
    py.detach(|| core::accumulate_columns(weights, gradients, columns, sums)).map_err(to_python)
}

/// Add |weights · dYᵀX| of some samples to scores; the first sample after which they are not finite.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "a call from Python")]
pub fn accumulate_products(
    py: Python<'_>,
    weights: &Bound<'_, PyAny>,
    weights_dtype: &str,
    columns: usize,
    inputs: Vec<Bound<'_, PyAny>>,
    upstream: Vec<Bound<'_, PyAny>>,
    scores: &Bound<'_, PyAny>,
    fresh: bool,
) -> PyResult<Option<usize>> {
    let weights = Tensor::of(weights, weights_dtype)?;
    let held = |objects: &[Bound<'_, PyAny>]| -> PyResult<Vec<Memory<u16>>> {
        objects.iter().map(Memory::of).collect()
    };
    let (inputs, upstream) = (held(&inputs)?, held(&upstream)?);
    if inputs.len() != upstream.len() {
        return Err(PyValueError::new_err("expected an upstream gradient for each input"));
    }
    let mut scores = Memory::<f32>::writable(scores)?;
    scores.apart_from(weights.raw())?;
    inputs.iter().chain(&upstream).try_for_each(|memory| scores.apart_from(memory.raw()))?;
    let samples: Vec<Sample<'_>> = (inputs.iter().zip(&upstream))
        .map(|(inputs, upstream)| Sample {
            inputs: inputs.slice().reinterpret_cast(),
            upstream: upstream.slice().reinterpret_cast(),
        })
        .collect();
    let (weights, scores) = (weights.values(), scores.slice_mut());
    py.detach(|| gradient::accumulate_products(weights, columns, &samples, scores, fresh))
        .map_err(to_python)
}

/// Sum of scores in f64, in a fixed order.
#[pyfunction]
pub fn score_sum(py: Python<'_>, scores: &Bound<'_, PyAny>) -> PyResult<f64> {
    let scores = Memory::<f32>::of(scores)?;
    let scores = scores.slice();
    Ok(py.detach(|| core::sum(scores)))
}
