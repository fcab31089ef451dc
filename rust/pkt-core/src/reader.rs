//! Positional reads of many tensors into memory that the caller owns.
//!
//! [`Reader::read`] fills a slot as its [`Layout`](crate::layout::Layout) says, with several
//! threads, which take chunks of 8 MiB in file order.
//!
//! - In a slot aligned to 4096, direct reads land in place: no bounce buffer, no page cache.
//! - All three modes check every range against file and target before they write the first byte.
//! - `buffered` leaves its pages in the cache, where the backward sweep may find them; `direct`
//!   leaves none but those of unaligned edges; `mmap` unmaps behind itself, so that pages of the
//!   cache are not counted as memory of this process.
//!
//! A shard that is cut short or written to is an error that names it, in every mode: each read ends
//! with a look at the length and the time of change of its files, so what it returns is what was
//! opened. Nobody loads from a mapping: the kernel copies out of it (`process_vm_readv`) and reports
//! a page that the file no longer has, where a load would end the process with SIGBUS. A file that
//! another one is renamed over stays readable, and is read to its end.
//!
//! Linux only: `O_DIRECT`, `posix_fadvise`, `madvise`.

use std::fs;
use std::io;
use std::ops;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};
use rayon::iter::{ParallelBridge, ParallelIterator};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::layout::{Extent, PAGE_BYTES, Range, window};
use crate::{Error, Result};

/// Reading threads by default; twice as many gained nothing where it was measured.
pub const THREADS: usize = 8;
/// Bytes of one positional read, and the most that is still read after a stop.
const CHUNK_BYTES: u64 = 8 << 20;

/// How bytes come from the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Copied by the kernel out of a mapping of the file.
    Mmap,
    /// `pread` through the page cache.
    Buffered,
    /// `pread` past the page cache (`O_DIRECT`).
    Direct,
}

impl Mode {
    /// The mode that the command line calls `name`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Mmap, Self::Buffered, Self::Direct].into_iter().find(|mode| mode.name() == name)
    }

    /// The name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Mmap => "mmap",
            Self::Buffered => "buffered",
            Self::Direct => "direct",
        }
    }
}

/// A shard, and the length that its header gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Where it is.
    pub path: PathBuf,
    /// The length it must have.
    pub bytes: u64,
}

/// Open shards and the threads that read them.
#[derive(Debug)]
pub struct Reader {
    shards: Vec<Shard>,
    mode: Mode,
    pool: ThreadPool,
    chunk_bytes: u64,
}

impl Reader {
    /// Opens `files` for reading in `mode` with `threads` threads (usually [`THREADS`]).
    ///
    /// Also returns what the user should know: that direct reads are refused by a file system, or
    /// mapped ones by the host, in which case the reader is `buffered`.
    ///
    /// # Errors
    /// A file that cannot be opened or has another length than expected; no threads.
    pub fn open(files: &[File], mode: Mode, threads: usize) -> Result<(Self, Vec<String>)> {
        match Self::open_as(files, mode, threads) {
            Err(Error::Io { path, source, .. })
                if mode != Mode::Buffered && is_refusal(&source) =>
            {
                let (path, mode) = (path.display(), mode.name());
                let notice = format!("{path}: {mode} reads refused ({source}); reading buffered");
                Ok((Self::open_as(files, Mode::Buffered, threads)?, vec![notice]))
            }
            opened => Ok((opened?, Vec::new())),
        }
    }

    fn open_as(files: &[File], mode: Mode, threads: usize) -> Result<Self> {
        if threads == 0 {
            return Err(Error::Invalid("reading needs at least one thread".into()));
        }
        let shards = files.iter().map(|file| Shard::open(file, mode)).collect::<Result<_>>()?;
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("pkt-read-{i}"))
            .build()
            .map_err(|error| Error::Thread(format!("cannot start {threads} readers: {error}")))?;
        Ok(Self { shards, mode, pool, chunk_bytes: CHUNK_BYTES })
    }

    /// The mode in use: the one asked for, or `buffered` where that was refused.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Reads `ranges` into `target` and returns the bytes read, small gaps included.
    ///
    /// `None` if `stop` became true before all was read; it is looked at between chunks. Bytes of
    /// `target` outside the ranges are not touched. In mode `direct`, only ranges whose address
    /// in memory is congruent to their file offset modulo 4096 bypass the page cache; the others
    /// go through it and are dropped from it.
    ///
    /// # Errors
    /// [`Error::Invalid`] before anything is written: a range leaves its file or `target`, or two
    /// overlap in `target`. [`Error::Io`] or [`Error::Damaged`] of a chunk that cannot be read, or
    /// of a file that has changed since it was opened; what `target` then holds is unspecified.
    pub fn read(
        &self,
        ranges: &[Range],
        target: &mut [u8],
        stop: &AtomicBool,
    ) -> Result<Option<u64>> {
        let chunks = self.split(self.verified(ranges, target.len())?, target);
        let mut files: Vec<_> = chunks.iter().map(|chunk| chunk.file).collect();
        files.dedup();
        let wanted: u64 = ranges.iter().map(|range| range.bytes as u64).sum();
        // A bridge hands out chunks in order, so the disk sees one sequential front.
        let read = self.pool.install(|| {
            let running = |_: &Chunk| !stop.load(Ordering::Relaxed);
            let chunks = chunks.into_iter().take_while(running).par_bridge();
            chunks
                .map(|chunk| self.shards[chunk.file].read(chunk))
                .try_reduce(|| 0, |a, b| Ok(a + b))
        })?;
        if read != wanted {
            return Ok(None);
        }
        files.into_iter().try_for_each(|file| self.shards[file].check_unchanged())?;
        Ok(Some(read))
    }

    /// Reads rows and columns of a row-major matrix into `target`, densely and in row order.
    ///
    /// `matrix` holds `shape` = (rows, columns) elements of `matrix.align` bytes. As
    /// [`Reader::read`] otherwise; whole rows are one range.
    ///
    /// # Errors
    /// Those of [`Reader::read`]; [`Error::Invalid`] also if `matrix` has not the size of `shape`,
    /// the window leaves it, or `target` has not the size of the window.
    pub fn read_rows(
        &self,
        matrix: &Extent,
        shape: (u64, u64),
        rows: ops::Range<u64>,
        columns: ops::Range<u64>,
        target: &mut [u8],
        stop: &AtomicBool,
    ) -> Result<Option<u64>> {
        self.read(&window(matrix, shape, &rows, &columns, target.len())?, target, stop)
    }

    /// `ranges` ordered by their place in a target of `target_bytes`, each inside its file and
    /// the target, no two overlapping there.
    pub(crate) fn verified<'r>(
        &self,
        ranges: &'r [Range],
        target_bytes: usize,
    ) -> Result<Vec<&'r Range>> {
        let mut ordered: Vec<_> = ranges.iter().collect();
        ordered.sort_by_key(|range| (range.at, range.bytes));
        let mut free = 0;
        for &&Range { file, begin, bytes, at } in &ordered {
            let Some(shard) = self.shards.get(file) else {
                let open = self.shards.len();
                return Err(Error::Invalid(format!("file {file} is asked for, {open} are open")));
            };
            if begin.checked_add(bytes as u64).is_none_or(|end| end > shard.file.bytes) {
                let File { path, bytes: length } = &shard.file;
                return Err(Error::Invalid(format!(
                    "{}: {bytes} bytes from byte {begin} are asked for, the file has {length}",
                    path.display()
                )));
            }
            let Some(end) = at.checked_add(bytes).filter(|&end| end <= target_bytes) else {
                return Err(Error::Invalid(format!(
                    "{bytes} bytes do not fit at byte {at} of a target of {target_bytes} bytes"
                )));
            };
            if at < free {
                return Err(Error::Invalid(format!(
                    "two reads overlap at byte {at} of the target"
                )));
            }
            free = end;
        }
        Ok(ordered)
    }

    /// Cuts verified ranges at multiples of the chunk size in the file; in file order.
    fn split<'t>(&self, ordered: Vec<&Range>, mut target: &'t mut [u8]) -> Vec<Chunk<'t>> {
        let mut chunks = Vec::new();
        let mut passed = 0;
        for &Range { file, mut begin, bytes, at } in ordered {
            target = &mut target[at - passed..];
            let end = begin + bytes as u64;
            while begin < end {
                let cut = (begin + 1).next_multiple_of(self.chunk_bytes).min(end);
                let (piece, rest) = target.split_at_mut((cut - begin) as usize);
                chunks.push(Chunk { file, begin, target: piece });
                (begin, target) = (cut, rest);
            }
            passed = at + bytes;
        }
        chunks.sort_by_key(|chunk| (chunk.file, chunk.begin));
        chunks
    }
}

/// A piece of a range with the memory it goes to.
struct Chunk<'t> {
    file: usize,
    begin: u64,
    target: &'t mut [u8],
}

/// One open file. The ordinary descriptor is there in every mode: for lengths and for edges.
#[derive(Debug)]
struct Shard {
    file: File,
    ordinary: fs::File,
    /// When the file was last written to, as it was opened: seconds and nanoseconds.
    modified: (i64, i64),
    access: Access,
}

/// What a [`Mode`] needs per file.
#[derive(Debug)]
enum Access {
    Buffered,
    Mmap(MmapRaw),
    Direct(fs::File),
}

impl Shard {
    fn open(file: &File, mode: Mode) -> Result<Self> {
        let ordinary = fs::File::open(&file.path).map_err(Error::io(&file.path, "open"))?;
        let mut shard =
            Self { file: file.clone(), ordinary, modified: (0, 0), access: Access::Buffered };
        shard.modified = shard.checked_length()?;
        let access = match mode {
            Mode::Mmap => shard.map(),
            Mode::Buffered => return Ok(shard),
            Mode::Direct => shard.open_direct(),
        };
        Ok(Self { access: access.map_err(Error::io(&file.path, "open"))?, ..shard })
    }

    /// Some sandboxes refuse the copying call: try it.
    fn map(&self) -> io::Result<Access> {
        let map = MmapOptions::new().map_raw_read_only(&self.ordinary)?;
        if self.file.bytes > 0 {
            copy(&map, 0, &mut [0])?;
        }
        Ok(Access::Mmap(map))
    }

    /// Some file systems refuse direct reads at the opening, others at the first read: try it.
    fn open_direct(&self) -> io::Result<Access> {
        #[repr(align(4096))]
        struct Page([u8; PAGE_BYTES as usize]);
        let mut page = Page([0; PAGE_BYTES as usize]);
        let mut options = fs::OpenOptions::new();
        let direct = options.read(true).custom_flags(libc::O_DIRECT).open(&self.file.path)?;
        fill(&mut page.0, 0, |to, at| if at == 0 { direct.read_at(to, at) } else { Ok(0) })?;
        self.advise(0, 0, libc::POSIX_FADV_RANDOM); // no reading ahead from an edge
        Ok(Access::Direct(direct))
    }

    /// Fills the chunk in the way of the mode; returns its length.
    fn read(&self, Chunk { begin, target, .. }: Chunk) -> Result<u64> {
        match &self.access {
            Access::Buffered => self.read_ordinary(begin, target)?,
            Access::Mmap(map) => self.read_mapped(map, begin, target)?,
            Access::Direct(direct) => self.read_direct(direct, begin, target)?,
        }
        Ok(target.len() as u64)
    }

    fn read_ordinary(&self, begin: u64, target: &mut [u8]) -> Result<()> {
        let filled = fill(target, begin, |to, at| self.ordinary.read_at(to, at))
            .map_err(Error::io(&self.file.path, "read"))?;
        if filled == target.len() {
            return Ok(());
        }
        self.checked_length()?;
        Err(self.damaged(format!("its end at byte {}", begin + filled as u64)))
    }

    /// What the map does not yield is read ordinarily, which also says why: a file cut short, or a
    /// failing disk.
    fn read_mapped(&self, map: &MmapRaw, begin: u64, target: &mut [u8]) -> Result<()> {
        map.advise_range(Advice::WillNeed, begin as usize, target.len()).ok(); // may be refused
        let filled = fill(target, begin, |to, at| copy(map, at as usize, to).or(Ok(0)))
            .map_err(Error::io(&self.file.path, "read"))?;
        // SAFETY: nobody writes to the map, so what is dropped can be had again from the file.
        unsafe {
            map.unchecked_advise_range(UncheckedAdvice::DontNeed, begin as usize, target.len())
        }
        .ok(); // may be refused
        self.read_ordinary(begin + filled as u64, &mut target[filled..])
    }

    /// The pages that lie whole in `target` come directly, the edges through the page cache, as
    /// does all that the direct descriptor leaves over.
    fn read_direct(&self, direct: &fs::File, begin: u64, target: &mut [u8]) -> Result<()> {
        if target.as_ptr().addr() as u64 % PAGE_BYTES != begin % PAGE_BYTES {
            self.read_ordinary(begin, target)?;
            self.advise(begin, target.len(), libc::POSIX_FADV_DONTNEED);
            return Ok(());
        }
        let edge = (begin.next_multiple_of(PAGE_BYTES) - begin) as usize;
        let (head, pages) = target.split_at_mut(edge.min(target.len()));
        self.read_ordinary(begin, head)?;
        let begin = begin + head.len() as u64;
        let whole = pages.len() - pages.len() % PAGE_BYTES as usize;
        let filled = fill(&mut pages[..whole], begin, whole_pages(|to, at| direct.read_at(to, at)))
            .map_err(Error::io(&self.file.path, "read"))?;
        self.read_ordinary(begin + filled as u64, &mut pages[filled..])
    }

    /// Tells the page cache what the ordinary descriptor is about; may be refused without harm.
    fn advise(&self, begin: u64, bytes: usize, advice: libc::c_int) {
        let (begin, bytes) = (begin.cast_signed(), bytes.cast_signed() as libc::off_t);
        if cfg!(miri) {
            return; // it has no page cache
        }
        // SAFETY: no pointer is passed.
        unsafe { libc::posix_fadvise(self.ordinary.as_raw_fd(), begin, bytes, advice) };
    }

    /// When the file was last written to, if it still has its length.
    fn checked_length(&self) -> Result<(i64, i64)> {
        let metadata = self.ordinary.metadata().map_err(Error::io(&self.file.path, "stat"))?;
        if metadata.len() == self.file.bytes {
            return Ok((metadata.mtime(), metadata.mtime_nsec()));
        }
        Err(self.damaged(format!("{} bytes", metadata.len())))
    }

    /// That nobody has written to the file since it was opened, as far as length and time tell.
    fn check_unchanged(&self) -> Result<()> {
        if self.checked_length()? == self.modified {
            return Ok(());
        }
        let expected = "a file that is left alone while it is read".to_owned();
        let found = "that it was written to since it was opened".to_owned();
        Err(Error::Damaged { path: self.file.path.clone(), tensor: None, expected, found })
    }

    fn damaged(&self, found: String) -> Error {
        let expected = format!("{} bytes", self.file.bytes);
        Error::Damaged { path: self.file.path.clone(), tensor: None, expected, found }
    }
}

/// Copies from byte `begin` of `map`, as far as its file reaches; returns the bytes copied.
///
/// The kernel copies, from this process to this process, and says what a load could not survive.
fn copy(map: &MmapRaw, begin: usize, target: &mut [u8]) -> io::Result<usize> {
    let bytes = target.len().min(map.len() - begin);
    let local = libc::iovec { iov_base: target.as_mut_ptr().cast(), iov_len: bytes };
    let first = map.as_ptr().wrapping_add(begin).cast_mut();
    let remote = libc::iovec { iov_base: first.cast(), iov_len: bytes };
    // SAFETY: `local` is `target` or its beginning, and nothing else is written; `remote` is
    // read by the kernel alone.
    let copied = unsafe {
        libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
    };
    usize::try_from(copied).map_err(|_| io::Error::last_os_error())
}

/// Calls `read_at(rest of target, offset)` until `target` is full or nothing comes; returns the
/// bytes filled. An interrupted call is made again.
fn fill(
    target: &mut [u8],
    begin: u64,
    read_at: impl Fn(&mut [u8], u64) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut filled = 0;
    while filled < target.len() {
        match read_at(&mut target[filled..], begin + filled as u64) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// `read_at`, except that it yields nothing where direct reads cannot go on: at an offset inside
/// a page, where a short read has left off, or when they are refused.
fn whole_pages(
    read_at: impl Fn(&mut [u8], u64) -> io::Result<usize>,
) -> impl Fn(&mut [u8], u64) -> io::Result<usize> {
    move |target, at| {
        if !at.is_multiple_of(PAGE_BYTES) {
            return Ok(0);
        }
        read_at(target, at).or_else(|error| if is_refusal(&error) { Ok(0) } else { Err(error) })
    }
}

/// Whether a file system says so that it has no direct reads, none of this alignment, or no
/// mappings, or a sandbox that copying out of one is not allowed.
fn is_refusal(error: &io::Error) -> bool {
    let refusals = [libc::EINVAL, libc::EOPNOTSUPP, libc::ENODEV, libc::ENOSYS, libc::EPERM];
    error.raw_os_error().is_some_and(|number| refusals.contains(&number))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::RefCell;
    use std::path::Path;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::cases;
    use crate::layout::layout;
    use crate::layout::tests::{extent, files_and_extents};

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
            let expected =
                format!("{}: expected {bytes} bytes, found 100 bytes", file.path.display());
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
            assert!(
                error.to_string().ends_with("expected 20000 bytes, found 9000 bytes"),
                "{error}"
            );
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
            assert_eq!(
                open(&file, mode).read(&[whole(&file)], &mut target, &stopped).unwrap(),
                None
            );
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
            (height, width) in (1..40_u64, 1..3000_u64),
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
}
