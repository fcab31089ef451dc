//! The header of one safetensors file, validated as a whole before any tensor is read.
//!
//! A file is 8 bytes (little-endian length of the header), the header (a JSON object, padded with
//! spaces) and the data. A [`Header`] that exists guarantees: every tensor lies inside the file,
//! `end - begin` is the size that its dtype and shape demand, and the tensors fill the data from its
//! first byte to its last without overlap or hole. Readers therefore never check an offset again.
//!
//! Format: <https://github.com/huggingface/safetensors#format>

use std::collections::BTreeMap;
use std::fs::{File, FileType, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::json::{self, Value};

/// The longest header that the format allows.
pub(crate) const MAX_JSON_BYTES: u64 = 100_000_000;
/// The most dimensions that torch computes with.
const MAX_RANK: usize = 64;
const LENGTH_BYTES: usize = 8;
const METADATA: &str = "__metadata__";
const METADATA_FORM: &str = "__metadata__ that maps every name once to a text";

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Sizes, slowest first; empty for a scalar.
    pub shape: Vec<u64>,
    /// First byte, counted from the start of the file.
    pub begin: u64,
    /// One past the last byte, counted from the start of the file.
    pub end: u64,
}

/// All that a file says about its tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The tensors, ascending by `begin`, then by name.
    pub tensors: Vec<Tensor>,
    /// Free texts of whoever wrote the file.
    pub metadata: BTreeMap<String, String>,
    /// Length of the file.
    pub bytes: u64,
    /// SHA-256 of the length bytes and the JSON.
    pub digest: [u8; 32],
}

/// Reads and validates the header of the file at `path`; no tensor is touched.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Damaged`] if it is no valid safetensors file.
pub fn read(path: &Path) -> Result<Header> {
    let (mut file, file_bytes) = open_regular(path)?;
    let mut head = Vec::new();
    let mut read_more = |head: &mut Vec<u8>, bytes: u64| {
        file.by_ref().take(bytes).read_to_end(head).map_err(Error::io(path, "read"))
    };
    read_more(&mut head, LENGTH_BYTES as u64)?;
    let data_begin = data_begin(path, &head, file_bytes)?;
    read_more(&mut head, data_begin - LENGTH_BYTES as u64)?;
    parse(path, &head, file_bytes)
}

/// Validates `head`, the length bytes and the JSON of a file of `file_bytes` bytes; `path` only
/// names the file in errors.
///
/// # Errors
/// [`Error::Damaged`] with the first violation of the format.
pub fn parse(path: &Path, head: &[u8], file_bytes: u64) -> Result<Header> {
    let data_begin = data_begin(path, head, file_bytes)?;
    if head.len() as u64 != data_begin {
        let expected = format!("{data_begin} bytes of length and header");
        return Err(Error::damaged(path, None, expected, format!("{} bytes", head.len())));
    }
    let mut members = members(path, &head[LENGTH_BYTES..])?;
    let metadata = members
        .remove(METADATA)
        .map_or(Ok(BTreeMap::new()), json::texts)
        .map_err(|found| Error::damaged(path, None, METADATA_FORM, found))?;
    let mut tensors = members
        .into_iter()
        .map(|(name, value)| tensor(path, name, value))
        .collect::<Result<Vec<_>>>()?;
    place(path, &mut tensors, data_begin, file_bytes)?;
    Ok(Header { tensors, metadata, bytes: file_bytes, digest: Sha256::digest(head).into() })
}

/// Opens a regular file and tells its length. A pipe is refused, not waited for.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(Error::io(path, "open"))?;
    let about = file.metadata().map_err(Error::io(path, "inspect"))?;
    if about.is_file() {
        Ok((file, about.len()))
    } else {
        Err(Error::damaged(path, None, "a regular file", kind(about.file_type())))
    }
}

fn kind(kind: FileType) -> &'static str {
    if kind.is_dir() {
        "a folder"
    } else if kind.is_fifo() {
        "a pipe"
    } else {
        "a device"
    }
}

/// Where the data begins, from the length bytes: the header ends inside the file.
fn data_begin(path: &Path, head: &[u8], file_bytes: u64) -> Result<u64> {
    let damaged = |expected: String, found: String| Error::damaged(path, None, expected, found);
    let length = head.first_chunk::<LENGTH_BYTES>().filter(|_| file_bytes >= LENGTH_BYTES as u64);
    let Some(length) = length else {
        let found = file_bytes.min(head.len() as u64);
        let expected = "at least 8 bytes, the length of the header".to_owned();
        return Err(damaged(expected, format!("{found} bytes")));
    };
    let json_bytes = u64::from_le_bytes(*length);
    if !(1..=MAX_JSON_BYTES).contains(&json_bytes) {
        let found = match length {
            b"version " => {
                "a Git LFS pointer; fetch the file itself with 'git lfs pull'".to_owned()
            }
            _ => format!("{json_bytes}"),
        };
        return Err(damaged(format!("a header length from 1 to {MAX_JSON_BYTES}"), found));
    }
    let data_begin = LENGTH_BYTES as u64 + json_bytes;
    if data_begin > file_bytes {
        let expected = format!("at least {data_begin} bytes, where the header ends");
        return Err(damaged(expected, format!("{file_bytes} bytes: the file is truncated")));
    }
    Ok(data_begin)
}

/// The members of the header by name, each once.
fn members(path: &Path, json: &[u8]) -> Result<BTreeMap<String, Value>> {
    let expected = "a JSON object that begins with '{'";
    let damaged = |found: String| Error::damaged(path, None, expected, found);
    if json.first() != Some(&b'{') {
        let start = &json[..json.len().min(16)];
        return Err(damaged(format!("'{}'", String::from_utf8_lossy(start))));
    }
    match Value::parse(json).map_err(damaged)? {
        Value::Object(members) => json::unique(members).map_err(|name| {
            Error::damaged(path, Some(&name), "every name once", "this name more than once")
        }),
        other => Err(damaged(other.to_string())),
    }
}

/// One entry, consistent in itself; `begin` and `end` still count from the start of the data.
fn tensor(path: &Path, name: String, value: Value) -> Result<Tensor> {
    let damaged =
        |expected: &str, found: String| Error::damaged(path, Some(&name), expected, found);
    let fields = "an object of exactly dtype, shape and data_offsets";
    let Value::Object(members) = value else { return Err(damaged(fields, value.to_string())) };
    let mut members = json::unique(members)
        .map_err(|field| damaged(fields, format!("field '{field}' more than once")))?;
    let mut take = |field: &str| {
        members.remove(field).ok_or_else(|| damaged(fields, format!("no field '{field}'")))
    };
    let (dtype, shape, offsets) = (take("dtype")?, take("shape")?, take("data_offsets")?);
    if let Some(field) = members.keys().next() {
        return Err(damaged(fields, format!("also a field '{field}'")));
    }

    let dtype = match &dtype {
        Value::Text(spelling) => Dtype::from_name(spelling),
        _ => None,
    }
    .ok_or_else(|| {
        let readable = Dtype::names().collect::<Vec<_>>().join(", ");
        damaged(&format!("a dtype that pkt reads ({readable})"), dtype.to_string())
    })?;
    let shape = match shape {
        Value::Sizes(sizes) if sizes.len() <= MAX_RANK => sizes,
        other => {
            let expected = format!("a shape of at most {MAX_RANK} sizes");
            return Err(damaged(&expected, other.to_string()));
        }
    };
    let (begin, end) = match &offsets {
        Value::Sizes(pair) if pair.len() == 2 && pair[0] <= pair[1] => (pair[0], pair[1]),
        _ => return Err(damaged("data_offsets [begin, end], begin ≤ end", offsets.to_string())),
    };
    let bytes = size_bytes(dtype, &shape)
        .ok_or_else(|| damaged("a shape whose bytes fit 64 bits", format!("{shape:?}")))?;
    if end - begin != bytes {
        let expected = format!("{bytes} bytes for {dtype} {shape:?}");
        return Err(damaged(&expected, format!("data_offsets of {} bytes", end - begin)));
    }
    Ok(Tensor { name, dtype, shape, begin, end })
}

/// Bytes of a tensor. `None` as well if only a zero keeps the product small: its strides overflow.
fn size_bytes(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    let mut nonzero = shape.iter().filter(|&&size| size > 0);
    let bytes = nonzero.try_fold(dtype.bytes(), |product: u64, &size| product.checked_mul(size))?;
    Some(if shape.contains(&0) { 0 } else { bytes })
}

/// Turns offsets into positions in the file, once the tensors fill its data exactly.
fn place(path: &Path, tensors: &mut [Tensor], data_begin: u64, file_bytes: u64) -> Result<()> {
    // An empty tensor stands before the one that begins at the same byte.
    tensors.sort_unstable_by_key(|tensor| (tensor.begin, tensor.end));
    let mut end = 0;
    for tensor in &*tensors {
        if tensor.begin != end {
            let fault = if tensor.begin < end { "an overlap" } else { "a hole" };
            let expected = format!("data that begins at {end}, where the tensor before it ends");
            let found = format!("{fault}: data_offsets that begin at {}", tensor.begin);
            return Err(Error::damaged(path, Some(&tensor.name), expected, found));
        }
        end = tensor.end;
    }
    let promised = u128::from(data_begin) + u128::from(end);
    if promised != u128::from(file_bytes) {
        let fault = if promised > u128::from(file_bytes) {
            "the file is truncated"
        } else {
            "bytes follow the last tensor"
        };
        let expected = format!("{promised} bytes, as the header promises");
        return Err(Error::damaged(path, None, expected, format!("{file_bytes} bytes: {fault}")));
    }
    for tensor in &mut *tensors {
        tensor.begin += data_begin;
        tensor.end += data_begin;
    }
    tensors.sort_unstable_by(|a, b| (a.begin, &a.name).cmp(&(b.begin, &b.name)));
    Ok(())
}

#[cfg(test)]
mod tests;
