//! A shard that `checkpoint::weight_map` accepts stays in the folder; nothing panics.

#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use pkt_core::checkpoint;

fuzz_target!(|json: &[u8]| {
    let Ok(map) = checkpoint::weight_map(Path::new("f"), json) else { return };
    assert!(!map.is_empty());
    for shard in map.values() {
        assert!(Path::new(shard).components().all(|part| matches!(part, Component::Normal(_))));
    }
});
