//! One open file, read in the three ways of [`Mode`].
//!
//! - In memory aligned to 4096, direct reads land in place: no bounce buffer, no page cache.
//! - `buffered` leaves its pages in the cache, where the backward sweep may find them; `direct`
//!   leaves none but those of unaligned edges; `mmap` unmaps behind itself, so that pages of the
//!   cache are not counted as memory of this process.
//! - Nobody loads from a mapping: the kernel copies out of it (`process_vm_readv`) and reports a
//!   page that the file no longer has, where a load would end the process with SIGBUS.
//!
//! Linux only: `O_DIRECT`, `posix_fadvise`, `madvise`.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};

use super::{File, Mode};
use crate::layout::PAGE_BYTES;
use crate::{Error, Result};

/// One open file. The ordinary descriptor is there in every mode: for lengths and for edges.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) file: File,
    ordinary: fs::File,
    /// When the file was last written to, as it was opened: seconds and nanoseconds.
    modified: (i64, i64),
    pub(super) access: Access,
}

/// What a [`Mode`] needs per file.
#[derive(Debug)]
pub(super) enum Access {
    Buffered,
    Mmap(MmapRaw),
    Direct(fs::File),
}

impl Shard {
    pub(super) fn open(file: &File, mode: Mode) -> Result<Self> {
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

    /// Fills `target` from byte `begin` on, in the way of the mode; returns its length.
    pub(super) fn read(&self, begin: u64, target: &mut [u8]) -> Result<u64> {
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
    pub(super) fn read_direct(
        &self,
        direct: &fs::File,
        begin: u64,
        target: &mut [u8],
    ) -> Result<()> {
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
    pub(super) fn check_unchanged(&self) -> Result<()> {
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
pub(super) fn copy(map: &MmapRaw, begin: usize, target: &mut [u8]) -> io::Result<usize> {
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
pub(super) fn fill(
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
pub(super) fn whole_pages(
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
pub(super) fn is_refusal(error: &io::Error) -> bool {
    let refusals = [libc::EINVAL, libc::EOPNOTSUPP, libc::ENODEV, libc::ENOSYS, libc::EPERM];
    error.raw_os_error().is_some_and(|number| refusals.contains(&number))
}
