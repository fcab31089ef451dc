//! Twin of `pkt_core::merge`.

use half::slice::HalfBitsSliceExt;
use pkt_core::merge::{self as core, Target, Weights};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffer::Memory;
use crate::error::to_python;

/// A tensor as it comes from Python: 16-bit floats as uint16, 8-bit floats as uint8.
enum Tensor {
    Double(Memory<f64>),
    Single(Memory<f32>),
    Half(Memory<u16>),
    Byte(Memory<u8>),
}

impl Tensor {
    fn of(object: &Bound<'_, PyAny>, dtype: &str) -> PyResult<Self> {
        match dtype {
            "F64" => Ok(Self::Double(Memory::of(object)?)),
            "F32" => Ok(Self::Single(Memory::of(object)?)),
            "F16" | "BF16" => Ok(Self::Half(Memory::of(object)?)),
            "F8_E4M3" | "F8_E5M2" => Ok(Self::Byte(Memory::of(object)?)),
            _ => Err(PyValueError::new_err(format!("cannot merge weights of dtype '{dtype}'"))),
        }
    }

    fn writable(object: &Bound<'_, PyAny>, dtype: &str) -> PyResult<Self> {
        match dtype {
            "F64" => Ok(Self::Double(Memory::writable(object)?)),
            "F32" => Ok(Self::Single(Memory::writable(object)?)),
            "F16" | "BF16" => Ok(Self::Half(Memory::writable(object)?)),
            _ => Err(PyValueError::new_err(format!("cannot write weights of dtype '{dtype}'"))),
        }
    }

    fn apart_from(&self, other: (*mut u8, usize)) -> PyResult<()> {
        match self {
            Self::Double(memory) => memory.apart_from(other),
            Self::Single(memory) => memory.apart_from(other),
            Self::Half(memory) => memory.apart_from(other),
            Self::Byte(memory) => memory.apart_from(other),
        }
    }

    fn raw(&self) -> (*mut u8, usize) {
        match self {
            Self::Double(memory) => memory.raw(),
            Self::Single(memory) => memory.raw(),
            Self::Half(memory) => memory.raw(),
            Self::Byte(memory) => memory.raw(),
        }
    }

    fn weights(&self, dtype: &str) -> Weights<'_> {
        match self {
            Self::Double(memory) => Weights::F64(memory.slice()),
            Self::Single(memory) => Weights::F32(memory.slice()),
            Self::Half(memory) if dtype == "BF16" => {
                Weights::Bf16(memory.slice().reinterpret_cast())
            }
            Self::Half(memory) => Weights::F16(memory.slice().reinterpret_cast()),
            Self::Byte(memory) if dtype == "F8_E4M3" => Weights::F8E4M3(memory.slice()),
            Self::Byte(memory) => Weights::F8E5M2(memory.slice()),
        }
    }

    fn target(&mut self, dtype: &str) -> PyResult<Target<'_>> {
        Ok(match self {
            Self::Double(memory) => Target::F64(memory.slice_mut()),
            Self::Single(memory) => Target::F32(memory.slice_mut()),
            Self::Half(memory) => match dtype {
                "BF16" => Target::Bf16(memory.slice_mut().reinterpret_cast_mut()),
                _ => Target::F16(memory.slice_mut().reinterpret_cast_mut()),
            },
            Self::Byte(_) => {
                let text = format!("cannot write weights of dtype '{dtype}'");
                return Err(PyValueError::new_err(text));
            }
        })
    }
}

/// Write round(weights + delta) to target: (sum of squared rounding errors, sum of squared changes,
/// first index that is not finite).
#[pyfunction]
pub fn merge(
    py: Python<'_>,
    weights: &Bound<'_, PyAny>,
    weights_dtype: &str,
    delta: Option<&Bound<'_, PyAny>>,
    target: &Bound<'_, PyAny>,
    target_dtype: &str,
) -> PyResult<(f64, f64, Option<usize>)> {
    let weights = Tensor::of(weights, weights_dtype)?;
    let delta = delta.map(Memory::<f32>::of).transpose()?;
    let mut target = Tensor::writable(target, target_dtype)?;
    for source in [Some(weights.raw()), delta.as_ref().map(Memory::raw)].into_iter().flatten() {
        target.apart_from(source)?;
    }
    let weights = weights.weights(weights_dtype);
    let (delta, target) = (delta.as_ref().map(Memory::slice), target.target(target_dtype)?);
    let merged = py.detach(|| core::merge(weights, delta, target)).map_err(to_python)?;
    Ok((merged.error, merged.change, merged.not_finite))
}
