//! Memory of Python objects as slices, without copying.
//!
//! All `unsafe` of this crate that concerns memory is here. What the caller guarantees, and
//! `pkt`'s Python code keeps: while a call runs, no other thread writes to a buffer it was given.

use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// A C-contiguous buffer that stays alive and in place as long as this value.
#[derive(Debug)]
pub struct Memory<T>(PyBuffer<T>);

impl<T: Element> Memory<T> {
    /// The memory of `object`, which must support the buffer protocol with items of type `T`.
    pub fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyBuffer::get(object)?;
        if buffer.is_c_contiguous() {
            Ok(Self(buffer))
        } else {
            Err(PyValueError::new_err("expected a C-contiguous buffer"))
        }
    }

    /// As [`Memory::of`], for memory that is going to be written.
    pub fn writable(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let memory = Self::of(object)?;
        if memory.0.readonly() {
            return Err(PyValueError::new_err("expected a writable buffer"));
        }
        Ok(memory)
    }

    /// The first byte, and how many there are.
    pub fn raw(&self) -> (*mut u8, usize) {
        (self.0.buf_ptr().cast(), self.0.len_bytes())
    }

    /// Refuses to go on if `other` shares a byte with this memory, which is going to be written.
    pub fn apart_from(&self, other: (*mut u8, usize)) -> PyResult<()> {
        let ((ours, bytes), (theirs, length)) = (self.raw(), other);
        let (ours, theirs) = (ours as usize, theirs as usize);
        if ours < theirs + length && theirs < ours + bytes {
            return Err(PyValueError::new_err("the result must not overlap its inputs"));
        }
        Ok(())
    }

    /// The items.
    pub fn slice(&self) -> &[T] {
        let (first, count) = (self.0.buf_ptr().cast::<T>().cast_const(), self.0.item_count());
        if count == 0 {
            return &[];
        }
        // SAFETY: the buffer is held, contiguous, aligned and typed (PyBuffer::get checked the
        // format), and by the module's contract nobody writes to it during the call.
        unsafe { std::slice::from_raw_parts(first, count) }
    }

    /// The items, to write to.
    pub fn slice_mut(&mut self) -> &mut [T] {
        let (first, count) = (self.0.buf_ptr().cast::<T>(), self.0.item_count());
        if count == 0 {
            return &mut [];
        }
        // SAFETY: as in `slice`; the buffer is writable, and nobody else uses it meanwhile.
        unsafe { std::slice::from_raw_parts_mut(first, count) }
    }
}
