use std::cell::RefCell;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::{fs, io};

use proptest::prelude::*;
use tempfile::TempDir;

use super::shard::{Access, copy, fill, whole_pages};
use super::*;
use crate::cases;
use crate::layout::tests::{extent, files_and_extents};
use crate::layout::{PAGE_BYTES, layout};

/// Miri maps no files and knows no `O_DIRECT`.
pub(crate) const MODES: &[Mode] =
    if cfg!(miri) { &[Mode::Buffered] } else { &[Mode::Mmap, Mode::Buffered, Mode::Direct] };
static GO: AtomicBool = AtomicBool::new(false);
const BLANK: u8 = 0xA5;

/// Memory whose address is `skew` modulo 4096, all [`BLANK`].
struct Arena {
    memory: Vec<u8>,
    first: usize,
}

impl Arena {
    fn new(bytes: usize, skew: usize) -> Self {
        let memory = vec![BLANK; bytes + 2 * PAGE_BYTES as usize];
        let first = memory.as_ptr().align_offset(PAGE_BYTES as usize) + skew;
        Self { memory, first }
    }

    fn slice(&mut self, bytes: usize) -> &mut [u8] {
        &mut self.memory[self.first..self.first + bytes]
    }
}

fn content(bytes: usize, seed: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u8 ^ seed as u8).collect()
}

fn write(folder: &Path, name: &str, content: &[u8]) -> File {
    let path = folder.join(name);
    fs::write(&path, content).unwrap();
    File { path, bytes: content.len() as u64 }
}

fn one_file(bytes: usize) -> (TempDir, File, Vec<u8>) {
    let folder = TempDir::new().unwrap();
    let content = content(bytes, 1);
    let file = write(folder.path(), "shard", &content);
    (folder, file, content)
}

fn open(file: &File, mode: Mode) -> Reader {
    Reader::open(std::slice::from_ref(file), mode, 2).unwrap().0
}

fn whole(file: &File) -> Range {
    Range { file: 0, begin: 0, bytes: file.bytes as usize, at: 0 }
}

#[test]
fn a_mode_is_found_by_its_name() {
    for &mode in MODES {
        assert_eq!(Mode::from_name(mode.name()), Some(mode));
    }
    assert_eq!(Mode::from_name("auto"), None);
}

/// A `read_at` that plays back `script` and checks that each call continues the last.
fn scripted(
    script: Vec<io::Result<usize>>,
    begin: u64,
) -> impl Fn(&mut [u8], u64) -> io::Result<usize> {
    let state = RefCell::new((script.into_iter(), begin));
    move |target, at| {
        let (script, expected) = &mut *state.borrow_mut();
        assert_eq!(at, *expected);
        let bytes = script.next().expect("one call too many")?;
        for (byte, offset) in target[..bytes].iter_mut().zip(at..) {
            *byte = offset as u8;
        }
        *expected += bytes as u64;
        Ok(bytes)
    }
}

fn code(number: i32) -> io::Result<usize> {
    Err(io::Error::from_raw_os_error(number))
}

#[test]
fn interrupted_and_short_reads_are_continued() {
    let mut target = [BLANK; 10];
    let script = vec![code(libc::EINTR), Ok(3), code(libc::EINTR), Ok(1), Ok(6)];
    assert_eq!(fill(&mut target, 100, scripted(script, 100)).unwrap(), 10);
    assert_eq!(target, [100, 101, 102, 103, 104, 105, 106, 107, 108, 109]);
}

#[test]
fn the_end_of_the_file_ends_the_read() {
    let mut target = [BLANK; 10];
    assert_eq!(fill(&mut target, 0, scripted(vec![Ok(4), Ok(0)], 0)).unwrap(), 4);
    assert_eq!(target[4..], [BLANK; 6]);
}

#[test]
fn a_failing_disk_is_an_error() {
    let error = fill(&mut [0; 10], 0, scripted(vec![Ok(4), code(libc::EIO)], 0)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

#[test]
fn direct_reads_end_where_they_are_refused_or_leave_a_page() {
    let page = PAGE_BYTES as usize;
    for (script, filled) in [
        (vec![code(libc::EINVAL)], 0),
        (vec![Ok(page), code(libc::EINVAL)], page),
        (vec![Ok(page), code(libc::EINTR), Ok(100)], page + 100),
        (vec![Ok(page), Ok(2 * page)], 3 * page),
    ] {
        let mut target = vec![BLANK; 3 * page];
        let read_at = whole_pages(scripted(script, PAGE_BYTES));
        assert_eq!(fill(&mut target, PAGE_BYTES, read_at).unwrap(), filled);
    }
    let read_at = whole_pages(scripted(vec![code(libc::EIO)], 0));
    assert_eq!(fill(&mut [0; 1], 0, read_at).unwrap_err().raw_os_error(), Some(libc::EIO));
}

#[test]
#[cfg_attr(miri, ignore = "of calls that Miri does not know")]
fn direct_reads_agree_at_any_address() {
    let (_folder, file, content) = one_file(50_000);
    for skew in [0, 1, 64] {
        let reader = open(&file, Mode::Direct);
        let mut arena = Arena::new(content.len(), skew);
        let target = arena.slice(content.len());
        let read = reader.read(&[whole(&file)], target, &GO).unwrap();
        assert_eq!(read, Some(file.bytes));
        assert_eq!(target, content);
    }
}

#[test]
#[cfg_attr(miri, ignore = "of calls that Miri does not know")]
fn what_a_direct_read_leaves_over_is_read_ordinarily() {
    let (_folder, file, content) = one_file(20_000);
    let shard = Shard::open(&file, Mode::Direct).unwrap();
    for bytes in [0, 100, 4096, 5000, 16_384] {
        let (_folder, short, _) = one_file(bytes);
        let short = fs::File::open(short.path).unwrap();
        let mut arena = Arena::new(content.len(), 0);
        let target = arena.slice(content.len());
        shard.read_direct(&short, 0, target).unwrap();
        assert_eq!(target, content);
    }
}

#[test]
#[cfg_attr(miri, ignore = "of calls that Miri does not know")]
fn refused_direct_reads_become_buffered_with_a_notice() {
    let (_folder, file, content) = one_file(10_000);
    let procfs = File { path: "/proc/version".into(), bytes: 0 };
    let (reader, notices) = Reader::open(&[file.clone(), procfs], Mode::Direct, 2).unwrap();
    assert_eq!(reader.mode(), Mode::Buffered);
    assert_eq!(notices.len(), 1);
    assert!(notices[0].starts_with("/proc/version: direct reads refused"), "{notices:?}");
    let mut target = vec![BLANK; content.len()];
    reader.read(&[whole(&file)], &mut target, &GO).unwrap();
    assert_eq!(target, content);
}

#[test]
fn a_file_of_another_length_is_damaged() {
    let (_folder, file, _) = one_file(100);
    for (&mode, bytes) in MODES.iter().flat_map(|mode| [(mode, 99), (mode, 101)]) {
        let wrong = File { bytes, ..file.clone() };
        let error = Reader::open(&[wrong], mode, 1).unwrap_err();
        let expected = format!("{}: expected {bytes} bytes, found 100 bytes", file.path.display());
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn a_file_cut_after_opening_is_damaged() {
    for &mode in MODES {
        let (_folder, file, content) = one_file(20_000);
        let reader = open(&file, mode);
        fs::OpenOptions::new().write(true).open(&file.path).unwrap().set_len(9000).unwrap();
        let mut arena = Arena::new(content.len(), 0);
        let error = reader.read(&[whole(&file)], arena.slice(content.len()), &GO).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }));
        assert!(error.to_string().ends_with("expected 20000 bytes, found 9000 bytes"), "{error}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "of calls that Miri does not know")]
fn a_file_written_to_after_opening_is_damaged() {
    for &mode in MODES {
        let (_folder, file, content) = one_file(20_000);
        let reader = open(&file, mode);
        let mut target = vec![BLANK; content.len()];
        reader.read(&[whole(&file)], &mut target, &GO).unwrap();
        let writer = fs::OpenOptions::new().write(true).open(&file.path).unwrap();
        writer.write_all_at(&[0], 10_000).unwrap();
        writer.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let error = reader.read(&[whole(&file)], &mut target, &GO).unwrap_err().to_string();
        assert!(error.starts_with(file.path.to_str().unwrap()), "{error}");
        assert!(error.ends_with("found that it was written to since it was opened"), "{error}");
    }
}

#[test]
fn a_file_that_another_is_renamed_over_is_read_to_its_end() {
    for &mode in MODES {
        let (folder, file, content) = one_file(20_000);
        let reader = open(&file, mode);
        let other = write(folder.path(), "other", b"shorter");
        fs::rename(other.path, &file.path).unwrap();
        let mut target = vec![BLANK; content.len()];
        assert_eq!(reader.read(&[whole(&file)], &mut target, &GO).unwrap(), Some(file.bytes));
        assert_eq!(target, content);
    }
}

#[test]
#[cfg_attr(miri, ignore = "of calls that Miri does not know")]
fn a_map_yields_what_its_file_still_has() {
    let (_folder, file, content) = one_file(20_000);
    let shard = Shard::open(&file, Mode::Mmap).unwrap();
    let Access::Mmap(map) = &shard.access else { panic!("no map") };
    let mut target = vec![BLANK; content.len()];
    assert_eq!(copy(map, 0, &mut target).unwrap(), content.len());
    assert_eq!(target, content);
    fs::OpenOptions::new().write(true).open(&file.path).unwrap().set_len(4096).unwrap();
    assert_eq!(copy(map, 0, &mut target[..4096]).unwrap(), 4096);
    assert_eq!(target[..4096], content[..4096]);
    let error = copy(map, 8192, &mut target[..100]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
}

#[test]
fn a_missing_file_and_no_threads_are_errors() {
    let missing = File { path: "/nowhere/shard".into(), bytes: 1 };
    for &mode in MODES {
        let error = Reader::open(std::slice::from_ref(&missing), mode, 1).unwrap_err();
        assert!(error.to_string().starts_with("/nowhere/shard: cannot open"), "{error}");
    }
    assert!(matches!(Reader::open(&[], MODES[0], 0), Err(Error::Invalid(_))));
}

#[test]
fn ranges_outside_are_refused_before_anything_is_written() {
    let (_folder, file, _) = one_file(1000);
    let good = Range { file: 0, begin: 0, bytes: 10, at: 0 };
    for bad in [
        Range { file: 1, ..good },
        Range { begin: 991, at: 10, ..good },
        Range { begin: u64::MAX, at: 10, ..good },
        Range { at: 91, ..good },
        Range { at: usize::MAX, ..good },
        Range { at: 9, ..good },
        good,
    ] {
        for &mode in MODES {
            let mut target = [BLANK; 100];
            let error = open(&file, mode).read(&[good, bad], &mut target, &GO).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{bad:?}");
            assert_eq!(target, [BLANK; 100]);
        }
    }
}

#[test]
fn a_stopped_read_is_none() {
    let (_folder, file, content) = one_file(1000);
    let mut target = vec![BLANK; content.len()];
    for &mode in MODES {
        let stopped = AtomicBool::new(true);
        assert_eq!(open(&file, mode).read(&[whole(&file)], &mut target, &stopped).unwrap(), None);
    }
    assert!(target.iter().all(|&byte| byte == BLANK));
}

#[test]
fn a_window_that_is_none_is_refused() {
    let (_folder, file, _) = one_file(1000);
    let reader = open(&file, MODES[0]);
    let read = |shape, rows, columns, bytes| {
        let mut target = vec![BLANK; bytes];
        reader.read_rows(&extent(40, 80, 2), shape, rows, columns, &mut target, &GO)
    };
    assert_eq!(read((4, 5), 1..3, 0..5, 20).unwrap(), Some(20));
    assert_eq!(read((4, 5), 2..2, 0..5, 0).unwrap(), Some(0));
    for (shape, rows, columns, bytes) in [
        ((4, 6), 0..1, 0..1, 2),
        ((u64::MAX, u64::MAX), 0..1, 0..1, 2),
        ((4, 5), 0..4, 0..1, 1 << 20),
        ((4, 5), 3..5, 0..1, 4),
        ((4, 5), 0..1, 0..6, 12),
        ((4, 5), std::ops::Range { start: 2, end: 1 }, 0..1, 0),
        ((4, 5), 0..1, 0..1, 3),
    ] {
        assert!(matches!(read(shape, rows, columns, bytes), Err(Error::Invalid(_))));
    }
}

#[test]
fn a_matrix_that_ends_before_it_begins_is_refused_whatever_its_shape() {
    let backwards = extent(10, 5, 8);
    for shape in [(u64::MAX, u64::MAX), (0, 0), (1, 1)] {
        assert!(window(&backwards, shape, &(0..0), &(0..0), 0).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(48)))]

    #[test]
    fn every_mode_reads_what_the_files_hold_and_touches_nothing_else(
        (lengths, extents) in files_and_extents(),
        skew in prop_oneof![3 => Just(0_usize), 1 => 0..4096_usize],
        chunk_pages in 1..40_u64,
    ) {
        let folder = TempDir::new().unwrap();
        let contents: Vec<_> = lengths.iter().zip(1..).map(|(&n, i)| content(n, i)).collect();
        let files: Vec<_> = contents
            .iter()
            .enumerate()
            .map(|(i, content)| write(folder.path(), &i.to_string(), content))
            .collect();
        let plan = layout(&extents);
        let bytes = plan.bytes + 100;
        let mut expected = vec![BLANK; bytes];
        for &Range { file, begin, bytes, at } in &plan.ranges {
            let begin = begin as usize;
            expected[at..at + bytes].copy_from_slice(&contents[file][begin..begin + bytes]);
        }
        for &mode in MODES {
            let (mut reader, notices) = Reader::open(&files, mode, 3).unwrap();
            prop_assert!(notices.is_empty() || mode == Mode::Direct);
            reader.chunk_bytes = chunk_pages * PAGE_BYTES;
            let mut arena = Arena::new(bytes, skew);
            let target = arena.slice(bytes);
            let read = reader.read(&plan.ranges, target, &GO).unwrap();
            prop_assert_eq!(read, Some(plan.ranges.iter().map(|range| range.bytes as u64).sum()));
            for (extent, &place) in extents.iter().zip(&plan.places) {
                let held = &contents[extent.file][extent.begin as usize..extent.end as usize];
                prop_assert_eq!(&target[place..place + held.len()], held);
            }
            prop_assert!(*target == expected, "{} touches what it should not", mode.name());
        }
    }

    #[test]
    fn a_window_is_what_indexing_finds(
        (height, width) in (1..40_u64, 1..if cfg!(miri) { 60_u64 } else { 3000 }),
        element in prop::sample::select(vec![1_u64, 2, 4, 8]),
        (a, b, c, d) in any::<(u64, u64, u64, u64)>(),
        skip in 0..5000_u64,
        full_rows in any::<bool>(),
    ) {
        let bytes = height * width * element;
        let (_folder, file, content) = one_file((skip + bytes) as usize);
        let (a, b) = (a % (height + 1), b % (height + 1));
        let (c, d) = if full_rows { (0, width) } else { (c % (width + 1), d % (width + 1)) };
        let (rows, columns) = (a.min(b)..a.max(b), c.min(d)..c.max(d));
        let at = |row, column| (skip + (row * width + column) * element) as usize;
        let expected: Vec<u8> = rows
            .clone()
            .flat_map(|row| &content[at(row, columns.start)..at(row, columns.end)])
            .copied()
            .collect();
        let matrix = extent(skip, skip + bytes, element as usize);
        let shape = (height, width);
        for &mode in MODES {
            let mut target = vec![BLANK; expected.len()];
            open(&file, mode)
                .read_rows(&matrix, shape, rows.clone(), columns.clone(), &mut target, &GO)
                .unwrap();
            prop_assert_eq!(&target, &expected);
        }
        if full_rows && !rows.is_empty() {
            let ranges = window(&matrix, shape, &rows, &columns, expected.len()).unwrap();
            prop_assert_eq!(ranges.len(), 1);
        }
    }
}
