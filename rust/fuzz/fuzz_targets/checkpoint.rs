//! A folder of arbitrary files: what `Catalogue` accepts is read as the bytes that the files
//! hold, in the mode that the length of the input says; any other read is refused. Nothing panics.
//!
//! The input is cut at bytes 0xFF, which no JSON holds. A part begins with the letter of a file:
//! `i` the index, `m` the only file, `1` and `2` shards, `p` a pickle; two bytes say how much data
//! follows the header, whose length is written here, so that the fuzzer need not count. `R` is the
//! only file as it stands. Any other letter begins bytes from which a read is made up.

#![no_main]

use std::cell::OnceCell;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use libfuzzer_sys::arbitrary::{self, Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use pkt_core::layout::{Extent, Range, layout};
use pkt_core::reader::{File, Mode, Reader};
use pkt_core::{Catalogue, Error};
use tempfile::TempDir;

/// Enough for what the fuzzer finds; more is refused by the target, not by the code.
const TARGET_BYTES: usize = 1 << 16;
static GO: AtomicBool = AtomicBool::new(false);

/// Reads that nobody has planned.
#[derive(Arbitrary, Debug)]
struct Reads {
    target: u16,
    ranges: [Option<(u8, u64, usize, usize)>; 3],
    window: Asked,
}

/// A window of a matrix that nobody has validated, or of a tensor of the catalogue.
#[derive(Arbitrary, Debug)]
struct Asked {
    tensor: Option<u8>,
    extent: (u8, u64, u64, u8),
    shape: (u64, u64),
    rows: (u64, u64),
    columns: (u64, u64),
}

fuzz_target!(|input: &[u8]| {
    thread_local!(static FOLDER: OnceCell<TempDir> = const { OnceCell::new() });
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(|| {
            let memory = Path::new("/dev/shm");
            if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() }.unwrap()
        });
        run(folder.path(), input);
    });
});

fn run(folder: &Path, input: &[u8]) {
    let mut asked = Vec::new();
    for part in input.split(|&byte| byte == 0xFF) {
        let Some((&letter, rest)) = part.split_first() else { continue };
        let (name, content) = match letter {
            b'i' => ("model.safetensors.index.json", rest.to_vec()),
            b'm' => ("model.safetensors", with_length(rest)),
            b'1' => ("1.safetensors", with_length(rest)),
            b'2' => ("x/2.safetensors", with_length(rest)),
            b'p' => ("pytorch_model.bin", rest.to_vec()),
            b'R' => ("model.safetensors", rest.to_vec()),
            _ => {
                asked.extend(Reads::arbitrary_take_rest(Unstructured::new(rest)));
                continue;
            }
        };
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    if let Ok(catalogue) = Catalogue::open(folder) {
        asked.truncate(8);
        let mode = [Mode::Mmap, Mode::Buffered, Mode::Direct][input.len() % 3];
        read(&catalogue, mode, &asked);
    }
    for name in fs::read_dir(folder).unwrap() {
        let path = name.unwrap().path();
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
    }
}

fn read(catalogue: &Catalogue, mode: Mode, asked: &[Reads]) {
    let files: Vec<_> = (catalogue.shards.iter())
        .map(|shard| File { path: shard.path.clone(), bytes: shard.bytes })
        .collect();
    let held: Vec<_> = files.iter().map(|file| fs::read(&file.path).unwrap()).collect();
    let extents: Vec<_> = (catalogue.entries.values())
        .map(|entry| Extent {
            file: entry.shard,
            begin: entry.begin,
            end: entry.end,
            align: entry.dtype.bytes() as usize,
        })
        .collect();
    let (reader, _) = Reader::open(&files, mode, 1).unwrap();
    let plan = layout(&extents);
    let mut slot = vec![0; plan.bytes];
    let wanted: u64 = plan.ranges.iter().map(|range| range.bytes as u64).sum();
    assert_eq!(reader.read(&plan.ranges, &mut slot, &GO).unwrap(), Some(wanted));
    for (extent, &place) in extents.iter().zip(&plan.places) {
        assert_eq!(place % extent.align, 0);
        let tensor = &held[extent.file][extent.begin as usize..extent.end as usize];
        assert_eq!(&slot[place..place + tensor.len()], tensor);
    }
    for reads in asked {
        ranges(&reader, &held, reads);
        window(&reader, catalogue, &extents, &held, &reads.window);
    }
}

fn ranges(reader: &Reader, held: &[Vec<u8>], reads: &Reads) {
    let ranges: Vec<_> = (reads.ranges.iter().flatten())
        .map(|&(file, begin, bytes, at)| Range { file: (file % 4).into(), begin, bytes, at })
        .collect();
    let mut target = vec![0; reads.target.into()];
    if let Some(read) = valid(reader.read(&ranges, &mut target, &GO)) {
        assert!(read as usize <= target.len());
        for Range { file, begin, bytes, at } in ranges {
            assert_eq!(target[at..at + bytes], held[file][begin as usize..][..bytes]);
        }
    }
}

fn window(
    reader: &Reader,
    catalogue: &Catalogue,
    extents: &[Extent],
    held: &[Vec<u8>],
    asked: &Asked,
) {
    let (file, begin, end, align) = asked.extent;
    let mut matrix = Extent { file: (file % 4).into(), begin, end, align: align.into() };
    let mut shape = asked.shape;
    if let Some(tensor) =
        asked.tensor.and_then(|tensor| usize::from(tensor).checked_rem(extents.len()))
    {
        matrix = extents[tensor];
        if let Some(entry) = catalogue.entries.values().nth(tensor)
            && let [height, width] = entry.shape[..]
        {
            shape = (height, width);
        }
    }
    let (rows, columns) = (asked.rows.0..asked.rows.1, asked.columns.0..asked.columns.1);
    let count = |range: &std::ops::Range<u64>| u128::from(range.end.saturating_sub(range.start));
    let bytes = count(&rows).saturating_mul(count(&columns)).saturating_mul(matrix.align as u128);
    let mut target = vec![0; bytes.min(TARGET_BYTES as u128) as usize];
    let found = reader.read_rows(&matrix, shape, rows.clone(), columns.clone(), &mut target, &GO);
    if let Some(read) = valid(found) {
        assert_eq!(read as usize, target.len());
        let at = |row, column| matrix.begin + (row * shape.1 + column) * matrix.align as u64;
        let part = |row| {
            &held[matrix.file][at(row, columns.start) as usize..at(row, columns.end) as usize]
        };
        let expected: Vec<u8> = if target.is_empty() {
            Vec::new() // perhaps of rows without number that hold nothing
        } else {
            rows.flat_map(part).copied().collect()
        };
        assert_eq!(target, expected);
    }
}

/// The bytes read; `None` if the caller has asked for what cannot be, the one error there may be.
fn valid(read: pkt_core::Result<Option<u64>>) -> Option<u64> {
    match read {
        Ok(read) => Some(read.expect("nobody stops the reader")),
        Err(Error::Invalid(_)) => None,
        Err(other) => panic!("{other}"),
    }
}

fn with_length(part: &[u8]) -> Vec<u8> {
    let (count, json) = part.split_at(part.len().min(2));
    let data_bytes = count.iter().fold(0, |count, &byte| count << 8 | usize::from(byte));
    let data = (0..data_bytes).map(|index| (index * 40_503 >> 8) as u8);
    let length = json.len() as u64;
    length.to_le_bytes().into_iter().chain(json.iter().copied()).chain(data).collect()
}
