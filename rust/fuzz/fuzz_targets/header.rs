//! A file that `header::parse` accepts is filled by its tensors, byte for byte; no other panics.
//!
//! The input is the JSON; its first byte says how much data follows, so that the fuzzer need not
//! guess lengths.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use pkt_core::header;

fuzz_target!(|input: &[u8]| {
    let Some((&data_bytes, json)) = input.split_first() else { return };
    let head = [&(json.len() as u64).to_le_bytes(), json].concat();
    let file_bytes = head.len() as u64 + u64::from(data_bytes);
    let Ok(header) = header::parse(Path::new("f"), &head, file_bytes) else { return };

    let mut tensors = header.tensors;
    assert!(tensors.is_sorted_by(|a, b| (a.begin, &a.name) < (b.begin, &b.name)));
    tensors.sort_by_key(|tensor| (tensor.begin, tensor.end));
    let mut end = head.len() as u64;
    for tensor in tensors {
        assert_eq!(tensor.begin, end);
        end = tensor.end;
        let elements: u64 = tensor.shape.iter().product();
        assert_eq!(tensor.end - tensor.begin, elements * tensor.dtype.bytes());
    }
    assert_eq!(end, file_bytes);
});
