//! Positional reads of many tensors into memory that the caller owns.
//!
//! [`Reader::read`] fills a slot as its [`Layout`](crate::layout::Layout) says, with several
//! threads, which take chunks of 8 MiB in file order. Every range is checked against file and target
//! before the first byte is written; how bytes then come from a file is `shard`'s.
//!
//! A shard that is cut short or written to is an error that names it, in every mode: each read ends
//! with a look at the length and the time of change of its files, so what it returns is what was
//! opened. A file that another one is renamed over stays readable, and is read to its end.

mod shard;

use std::ops;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::iter::{ParallelBridge, ParallelIterator};
use rayon::{ThreadPool, ThreadPoolBuilder};

use self::shard::{Shard, is_refusal};
use crate::layout::{Extent, Range, window};
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
                .map(|Chunk { file, begin, target }| self.shards[file].read(begin, target))
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

#[cfg(test)]
pub(crate) mod tests;
