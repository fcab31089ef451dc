//! A safetensors file that is written piece by piece and appears whole.
//!
//! Names, types and shapes are known before the first byte, so the header is written first and each
//! tensor has its place: memory holds what the caller hands over, never the file. Everything goes
//! to `NAME.part`; [`Writer::finish`] makes sure that every byte was given, syncs, and renames.
//! A writer that is dropped before takes its file along.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::readable;
use crate::{Dtype, Error, Result};

/// What the data of a file is aligned to.
const ALIGNMENT: usize = 8;

/// A tensor that a file is going to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Name in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Sizes, slowest first.
    pub shape: Vec<u64>,
}

/// A place in the file, and how much of it is filled.
#[derive(Debug)]
struct Place {
    name: String,
    begin: u64,
    bytes: u64,
    written: u64,
}

/// One file on its way.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    part: PathBuf,
    file: File,
    places: Vec<Place>,
    bytes: u64,
    finished: bool,
}

impl Writer {
    /// Begins the file `path` with the header of `tensors`, whose data will lie in this order.
    ///
    /// # Errors
    /// [`Error::Invalid`] if two tensors have one name or the sizes do not fit 64 bits;
    /// [`Error::Io`] if the file cannot be made.
    pub fn create(path: &Path, tensors: &[Spec]) -> Result<Self> {
        let (head, places, bytes) = lay_out(tensors)?;
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&part)
            .map_err(Error::io(&part, "create"))?;
        let writer = Self { path: path.to_owned(), part, file, places, bytes, finished: false };
        writer.file.write_all_at(&head, 0).map_err(Error::io(&writer.part, "write"))?;
        Ok(writer)
    }

    /// Writes the next `bytes` of tensor `name`. Tensors may come in any order, the bytes of one
    /// tensor from its first to its last.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such tensor, or not so much of it left; [`Error::Io`].
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(place) = self.places.iter_mut().find(|place| place.name == name) else {
            return Err(self.invalid(name, "a tensor of the header", "none of this name"));
        };
        let (left, given) = (place.bytes - place.written, bytes.len() as u64);
        if given > left {
            return Err(self.invalid(name, &format!("at most {left} bytes"), &given.to_string()));
        }
        let at = place.begin + place.written;
        place.written += given;
        self.file.write_all_at(bytes, at).map_err(Error::io(&self.part, "write"))
    }

    /// Syncs the file and gives it its name; returns its length.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a tensor is not complete; [`Error::Io`]. The file is gone then.
    pub fn finish(mut self) -> Result<u64> {
        if let Some(short) = self.places.iter().find(|place| place.written < place.bytes) {
            let (expected, found) = (format!("{} bytes", short.bytes), short.written.to_string());
            return Err(self.invalid(&short.name, &expected, &found));
        }
        self.file.sync_all().map_err(Error::io(&self.part, "sync"))?;
        forget_pages(&self.file);
        fs::rename(&self.part, &self.path).map_err(Error::io(&self.path, "rename"))?;
        self.finished = true;
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(Error::io(folder, "sync"))?;
        Ok(self.bytes)
    }

    fn invalid(&self, name: &str, expected: &str, found: &str) -> Error {
        let (path, name) = (self.path.display(), readable(name));
        Error::Invalid(format!("{path}: tensor '{name}': expected {expected}, found {found}"))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished {
            let _: io::Result<()> = fs::remove_file(&self.part);
        }
    }
}

/// Length bytes and header, the place of each tensor, and the length of the file. The bytes are
/// those of the safetensors library: an unchanged file is written as it was.
fn lay_out(tensors: &[Spec]) -> Result<(Vec<u8>, Vec<Place>, u64)> {
    let mut json = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let (mut places, mut end) = (Vec::<Place>::new(), 0u64);
    let mut names = BTreeSet::new();
    for Spec { name, dtype, shape } in tensors {
        let refused = |what: &str| Error::Invalid(format!("tensor '{}': {what}", readable(name)));
        if !names.insert(name) || name == "__metadata__" {
            return Err(refused("a name that the file has already"));
        }
        let bytes = shape.iter().try_fold(dtype.bytes(), |bytes, &size| bytes.checked_mul(size));
        let (begin, sum) = (end, bytes.and_then(|bytes| bytes.checked_add(end)));
        end = sum.ok_or_else(|| refused("more bytes than 64 bits count"))?;
        let (key, shape) = (serde_json::json!(name), serde_json::json!(shape));
        let _ = write!(
            json,
            r#",{key}:{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#
        );
        places.push(Place { name: name.clone(), begin, bytes: end - begin, written: 0 });
    }
    json.push('}');
    let padded = json.len().next_multiple_of(ALIGNMENT);
    json.push_str(&" ".repeat(padded - json.len()));
    let head = [&(padded as u64).to_le_bytes(), json.as_bytes()].concat();
    let data = head.len() as u64;
    for place in &mut places {
        place.begin += data;
    }
    let bytes = end.checked_add(data);
    let bytes = bytes.ok_or_else(|| Error::Invalid("a file longer than 64 bits count".into()))?;
    Ok((head, places, bytes))
}

/// Written and synced pages are of no further use here: the source's may stay instead.
fn forget_pages(file: &File) {
    if cfg!(miri) {
        return; // it has no page cache
    }
    // SAFETY: the descriptor is open as long as `file` is borrowed; advice changes no data.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tempfile::tempdir;

    use super::*;
    use crate::header;

    fn spec(name: &str, dtype: Dtype, shape: &[u64]) -> Spec {
        Spec { name: name.to_owned(), dtype, shape: shape.to_owned() }
    }

    fn names(folder: &Path) -> Vec<String> {
        let names = fs::read_dir(folder).unwrap().map(|item| item.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_is_read_back_with_its_order_its_format_and_an_aligned_header() {
        let folder = tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let specs = [
            spec("b\n\"ü", Dtype::F32, &[2, 1]),
            spec("a", Dtype::Bf16, &[3]),
            spec("none", Dtype::F32, &[0, 4]),
            spec("scalar", Dtype::U8, &[]),
        ];
        let mut writer = Writer::create(&path, &specs).unwrap();
        writer.write("scalar", &[9]).unwrap();
        writer.write("b\n\"ü", &[1, 2, 3, 4, 5]).unwrap();
        writer.write("a", &[11, 12, 13, 14, 15, 16]).unwrap();
        writer.write("b\n\"ü", &[6, 7, 8]).unwrap();
        assert_eq!(names(folder.path()), ["m.safetensors.part"]);
        let bytes = writer.finish().unwrap();
        assert_eq!(names(folder.path()), ["m.safetensors"]);

        let file = fs::read(&path).unwrap();
        assert_eq!(file.len() as u64, bytes);
        let header = header::read(&path).unwrap();
        assert_eq!(header.metadata["format"], "pt");
        let data = (bytes - 15) as usize;
        assert_eq!(data % ALIGNMENT, 0);
        assert_eq!(file[data..], [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 9]);
        let found: Vec<_> = header.tensors.iter().map(|t| (&t.name[..], t.dtype)).collect();
        let order = [("b\n\"ü", Dtype::F32), ("a", Dtype::Bf16)];
        assert_eq!(found[..2], order);
        assert_eq!(header.tensors.len(), 4);
    }

    #[test]
    fn what_is_not_finished_leaves_nothing_and_what_was_there_stays() {
        let folder = tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        fs::write(&path, b"before").unwrap();
        let specs = [spec("a", Dtype::U8, &[4])];
        drop(Writer::create(&path, &specs).unwrap());
        let mut writer = Writer::create(&path, &specs).unwrap();
        writer.write("a", &[1]).unwrap();
        let error = writer.finish().unwrap_err().to_string();
        assert!(error.ends_with("tensor 'a': expected 4 bytes, found 1"), "{error}");
        assert_eq!(names(folder.path()), ["m.safetensors"]);
        assert_eq!(fs::read(&path).unwrap(), b"before");
    }

    #[test]
    fn bytes_without_a_place_are_refused() {
        let folder = tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let mut writer = Writer::create(&path, &[spec("a", Dtype::U8, &[2])]).unwrap();
        let error = writer.write("b", &[1]).unwrap_err().to_string();
        assert!(error.ends_with("'b': expected a tensor of the header, found none of this name"));
        writer.write("a", &[1]).unwrap();
        let error = writer.write("a", &[1, 2]).unwrap_err().to_string();
        assert!(error.ends_with("tensor 'a': expected at most 1 bytes, found 2"), "{error}");
        writer.write("a", &[2]).unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn headers_that_cannot_be_are_refused() {
        let folder = tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let twice = [spec("a", Dtype::U8, &[2]), spec("a", Dtype::U8, &[2])];
        let large = [spec("a", Dtype::F32, &[1 << 40, 1 << 40])];
        let metadata = [spec("__metadata__", Dtype::U8, &[2])];
        for specs in [&twice[..], &large, &metadata] {
            assert!(Writer::create(&path, specs).is_err());
        }
        assert_eq!(names(folder.path()), [""; 0]);
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error_of_the_system() {
        let error = Writer::create(Path::new("/nowhere/m.safetensors"), &[]).unwrap_err();
        assert!(matches!(error, Error::Io { operation: "create", .. }));
    }

    proptest! {
        #[test]
        fn every_header_is_read_back(
            tensors in proptest::collection::btree_map(
                any::<String>(), (0usize..15, proptest::collection::vec(0u64..5, 0..4)), 0..9
            ),
        ) {
            let dtypes: Vec<_> = Dtype::names().map(|n| Dtype::from_name(n).unwrap()).collect();
            let specs: Vec<_> = tensors
                .iter()
                .filter(|(name, _)| *name != "__metadata__")
                .map(|(name, (dtype, shape))| spec(name, dtypes[*dtype], shape))
                .collect();
            let (head, places, bytes) = lay_out(&specs).unwrap();
            let header = header::parse(Path::new("f"), &head, bytes).unwrap();
            prop_assert_eq!(header.tensors.len(), specs.len());
            for (spec, place) in specs.iter().zip(&places) {
                let found = header.tensors.iter().find(|t| t.name == spec.name).unwrap();
                prop_assert_eq!((found.dtype, &found.shape), (spec.dtype, &spec.shape));
                prop_assert_eq!((found.begin, found.end), (place.begin, place.begin + place.bytes));
            }
        }
    }
}
