//! A model folder as one [`Catalogue`]: which tensor lies where, known from headers alone.
//!
//! A checkpoint is one safetensors file, or an index and the shards it names. The index and the
//! headers are validated against each other here, before any tensor is read: every tensor that the
//! index lists is in the shard that it says, and a tensor in two shards is taken from that one.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::folder::{self, Folder};
use crate::header::{self, Tensor};
use crate::json::{self, Value};

const INDEX: &str = "model.safetensors.index.json";
/// As long as a header may be; the index of a model of 10¹² parameters takes a tenth.
const MAX_INDEX_BYTES: u64 = header::MAX_JSON_BYTES;

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Name inside the folder, as the index spells it.
    pub name: String,
    /// Where to open it.
    pub path: PathBuf,
    /// Length of the file.
    pub bytes: u64,
    /// Digest of its header, see [`header::Header::digest`].
    pub digest: [u8; 32],
}

/// Where a tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Position of its shard in [`Catalogue::shards`].
    pub shard: usize,
    /// Element type.
    pub dtype: Dtype,
    /// Sizes, slowest first; empty for a scalar.
    pub shape: Vec<u64>,
    /// First byte in the shard.
    pub begin: u64,
    /// One past the last byte in the shard.
    pub end: u64,
}

impl Entry {
    /// Bytes in the file.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.end - self.begin
    }

    /// Number of elements: the product of the sizes, 1 for a scalar.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// Every tensor of a model folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Catalogue {
    /// The folder as the caller named it.
    pub folder: PathBuf,
    /// The files, ascending by name.
    pub shards: Vec<Shard>,
    /// The tensors by name.
    pub entries: BTreeMap<String, Entry>,
    /// Tensors that a shard holds but the index does not assign to it, ascending.
    pub unindexed: Vec<String>,
}

impl Catalogue {
    /// Reads the index and every header of the checkpoint in `folder`, and validates them against
    /// each other.
    ///
    /// # Errors
    /// [`Error::Unreadable`] if the folder holds no checkpoint that pkt reads, [`Error::Damaged`]
    /// if a file breaks its format or contradicts the index, [`Error::Io`] if the system refuses.
    pub fn open(folder: &Path) -> Result<Self> {
        let files = Folder::open(folder)?;
        let assigned = if files.has(INDEX) {
            let path = files.resolve(INDEX)?;
            Some(weight_map(&path, &read_index(&path)?)?)
        } else {
            None
        };
        let names = match &assigned {
            Some(map) => map.values().cloned().collect(),
            None => BTreeSet::from([files.only_checkpoint()?]),
        };

        let mut catalogue = Self {
            folder: folder.to_owned(),
            shards: Vec::new(),
            entries: BTreeMap::new(),
            unindexed: Vec::new(),
        };
        for name in names {
            catalogue.add(name, &files, assigned.as_ref())?;
        }
        catalogue.unindexed.sort_unstable();
        catalogue.unindexed.dedup();
        for (tensor, shard) in assigned.iter().flatten() {
            if !catalogue.entries.contains_key(tensor) {
                let expected = format!("this tensor, which {INDEX} assigns to the file");
                let path = folder.join(shard);
                return Err(Error::damaged(path, Some(tensor), expected, "no such tensor"));
            }
        }
        Ok(catalogue)
    }

    /// Bytes of all tensors in [`Catalogue::entries`]; `u64::MAX` if sparse files claim even more.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.entries.values().map(Entry::bytes).fold(0, u64::saturating_add)
    }

    /// SHA-256 over the names of the shards and the digests of their headers, in order of name:
    /// equal for equal checkpoints, wherever they lie.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        let mut shards: Vec<_> =
            self.shards.iter().map(|shard| (&shard.name, shard.digest)).collect();
        shards.sort_unstable();
        let mut hash = Sha256::new();
        for (name, digest) in shards {
            // The length keeps two names from running into each other.
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name);
            hash.update(digest);
        }
        hash.finalize().into()
    }

    /// Adds a shard and those of its tensors that are `assigned` to it; without an index, all.
    fn add(
        &mut self,
        name: String,
        files: &Folder,
        assigned: Option<&BTreeMap<String, String>>,
    ) -> Result<()> {
        let path = files.resolve(&name)?;
        let header = header::read(&path)?;
        let shard = self.shards.len();
        for Tensor { name: tensor, dtype, shape, begin, end } in header.tensors {
            if assigned.is_none_or(|map| map.get(&tensor) == Some(&name)) {
                self.entries.insert(tensor, Entry { shard, dtype, shape, begin, end });
            } else {
                self.unindexed.push(tensor);
            }
        }
        self.shards.push(Shard { name, path, bytes: header.bytes, digest: header.digest });
        Ok(())
    }
}

/// The `weight_map` of an index: for each tensor the name of its shard, which stays in the folder
/// by its spelling. `path` only names the file in errors.
///
/// # Errors
/// [`Error::Damaged`] with the first violation of the format.
pub fn weight_map(path: &Path, json: &[u8]) -> Result<BTreeMap<String, String>> {
    let form = "a JSON object with one weight_map that maps every tensor once to a shard";
    let damaged = |found: String| Error::damaged(path, None, form, found);
    let members = match Value::parse(json).map_err(damaged)? {
        Value::Object(members) => members,
        other => return Err(damaged(other.to_string())),
    };
    let mut members =
        json::unique(members).map_err(|name| damaged(format!("'{name}' more than once")))?;
    let map = members.remove("weight_map").ok_or_else(|| damaged("no weight_map".to_owned()))?;
    let map = json::texts(map).map_err(|found| damaged(format!("in weight_map {found}")))?;
    if map.is_empty() {
        return Err(damaged("an empty weight_map".to_owned()));
    }
    for (tensor, shard) in &map {
        if !folder::stays_inside(shard) {
            let expected = "a *.safetensors file inside the folder";
            return Err(Error::damaged(path, Some(tensor), expected, format!("'{shard}'")));
        }
    }
    Ok(map)
}

fn read_index(path: &Path) -> Result<Vec<u8>> {
    let (file, bytes) = header::open_regular(path)?;
    if bytes > MAX_INDEX_BYTES {
        let expected = format!("at most {MAX_INDEX_BYTES} bytes of index");
        return Err(Error::damaged(path, None, expected, format!("{bytes} bytes")));
    }
    let mut json = Vec::new();
    file.take(MAX_INDEX_BYTES).read_to_end(&mut json).map_err(Error::io(path, "read"))?;
    Ok(json)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    const FORM: &str = "a JSON object with one weight_map that maps every tensor once to a shard";

    /// A file of `U8` tensors, each `size` bytes long.
    fn shard(tensors: &[(&str, usize)]) -> Vec<u8> {
        let mut begin = 0;
        let entries = tensors.iter().map(|(name, size)| {
            let end = begin + size;
            let entry = format!(
                r#""{name}":{{"dtype":"U8","shape":[{size},1],"data_offsets":[{begin},{end}]}}"#
            );
            begin = end;
            entry
        });
        let json = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
        [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &vec![0; begin]].concat()
    }

    fn index(map: &[(&str, &str)]) -> Vec<u8> {
        let map: Vec<_> =
            map.iter().map(|(name, shard)| format!("\"{name}\":\"{shard}\"")).collect();
        let map = map.join(",");
        format!(r#"{{"metadata":{{"total_size":1}},"weight_map":{{{map}}}}}"#).into_bytes()
    }

    fn folder(files: &[(&str, &[u8])]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        fill(folder.path(), files);
        folder
    }

    fn fill(folder: &Path, files: &[(&str, &[u8])]) {
        for (name, bytes) in files {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }

    /// The message of the refusal, less the folder.
    #[track_caller]
    fn refusal(folder: &Path) -> String {
        let error = Catalogue::open(folder).unwrap_err().to_string();
        let rest = error.strip_prefix(folder.to_str().unwrap()).expect(&error);
        rest.trim_start_matches(['/', ':', ' ']).to_owned()
    }

    #[track_caller]
    fn index_refused(json: &str, found: &str) {
        let error = weight_map(Path::new("f"), json.as_bytes()).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }));
        assert_eq!(error.to_string(), format!("f: expected {FORM}, found {found}"));
    }

    #[test]
    fn a_single_file_is_a_checkpoint() {
        for name in ["model.safetensors", "other.safetensors", "m-00001-of-00001.safetensors"] {
            let file = shard(&[("a", 2), ("b", 3)]);
            let adapter = shard(&[("c", 1)]);
            let folder = folder(&[(name, &file), ("adapter_model.safetensors", &adapter)]);
            let catalogue = Catalogue::open(folder.path()).unwrap();
            assert_eq!(catalogue.folder, folder.path());
            assert_eq!(catalogue.shards.len(), 1);
            assert_eq!(catalogue.shards[0].path, folder.path().join(name));
            assert_eq!(catalogue.shards[0].bytes, file.len() as u64);
            assert_eq!(catalogue.bytes(), 5);
            let entry = &catalogue.entries["b"];
            assert_eq!((entry.shard, entry.dtype), (0, Dtype::U8));
            assert_eq!((entry.bytes(), entry.elements(), entry.end), (3, 3, file.len() as u64));
            assert_eq!(catalogue.unindexed, [""; 0]);
        }
    }

    #[test]
    fn the_index_says_which_shard_holds_a_tensor() {
        let folder = folder(&[
            (INDEX, &index(&[("a", "2.safetensors"), ("b", "in/1.safetensors")])),
            // Both hold "a", and the second holds "c", which the index does not know.
            ("in/1.safetensors", &shard(&[("a", 7), ("b", 2)])),
            ("2.safetensors", &shard(&[("a", 3), ("c", 9)])),
            ("model.safetensors", b"not read where an index is"),
        ]);
        let catalogue = Catalogue::open(folder.path()).unwrap();
        let shards: Vec<_> = catalogue.shards.iter().map(|shard| &*shard.name).collect();
        assert_eq!(shards, ["2.safetensors", "in/1.safetensors"]);
        let entries =
            catalogue.entries.iter().map(|(name, entry)| (&**name, entry.shard, entry.bytes()));
        assert_eq!(entries.collect::<Vec<_>>(), [("a", 0, 3), ("b", 1, 2)]);
        assert_eq!(catalogue.unindexed, ["a", "c"]);
        assert_eq!(catalogue.bytes(), 5);
    }

    #[test]
    fn the_digest_depends_on_names_and_headers_only() {
        let a = shard(&[("a", 2)]);
        let mut other_data = a.clone();
        *other_data.last_mut().unwrap() ^= 1;
        let digest = |name, file: &[u8]| {
            let folder = folder(&[(name, file)]);
            Catalogue::open(folder.path()).unwrap().digest()
        };
        let expected = digest("model.safetensors", &a);
        assert_eq!(digest("model.safetensors", &other_data), expected);
        assert_ne!(digest("other.safetensors", &a), expected);
        assert_ne!(digest("model.safetensors", &shard(&[("b", 2)])), expected);

        let map = index(&[("a", "1.safetensors"), ("b", "2.safetensors")]);
        let folder =
            folder(&[(INDEX, &map), ("1.safetensors", &a), ("2.safetensors", &shard(&[("b", 1)]))]);
        let mut catalogue = Catalogue::open(folder.path()).unwrap();
        let expected = catalogue.digest();
        catalogue.shards.reverse();
        assert_eq!(catalogue.digest(), expected);
    }

    #[test]
    fn a_tensor_that_its_shard_lacks_is_refused() {
        let folder = folder(&[
            (INDEX, &index(&[("a", "1.safetensors"), ("b", "1.safetensors")])),
            ("1.safetensors", &shard(&[("a", 1)])),
        ]);
        assert_eq!(
            refusal(folder.path()),
            "1.safetensors: tensor 'b': expected this tensor, which model.safetensors.index.json \
             assigns to the file, found no such tensor"
        );
    }

    #[test]
    fn a_shard_that_is_missing_is_refused() {
        let folder = folder(&[(INDEX, &index(&[("a", "1.safetensors")]))]);
        assert_eq!(
            refusal(folder.path()),
            "1.safetensors: expected a file of the checkpoint inside its folder, found no such file"
        );
    }

    #[test]
    fn a_damaged_shard_is_refused_by_its_name() {
        let file = shard(&[("a", 4)]);
        let truncated = &file[..file.len() - 1];
        let folder =
            folder(&[(INDEX, &index(&[("a", "1.safetensors")])), ("1.safetensors", truncated)]);
        let expected = format!(
            "1.safetensors: expected {} bytes, as the header promises, found {} bytes: the file is truncated",
            file.len(),
            truncated.len()
        );
        assert_eq!(refusal(folder.path()), expected);
    }

    #[test]
    fn a_shard_that_is_no_regular_file_is_refused_without_waiting() {
        let folder = folder(&[(INDEX, &index(&[("a", "1.safetensors")]))]);
        let path = folder.path().join("1.safetensors");
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let expected = "1.safetensors: expected a regular file, found";
        assert_eq!(refusal(folder.path()), format!("{expected} a pipe"));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(refusal(folder.path()), format!("{expected} a folder"));
    }

    #[test]
    fn an_index_that_is_no_regular_file_is_refused_without_waiting() {
        let folder = folder(&[]);
        let path = folder.path().join(INDEX);
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
        assert_eq!(
            refusal(folder.path()),
            format!("{INDEX}: expected a regular file, found a pipe")
        );
    }

    #[test]
    fn an_index_beyond_the_limit_is_refused_unread() {
        let folder = folder(&[(INDEX, b"")]);
        let file = fs::OpenOptions::new().write(true).open(folder.path().join(INDEX)).unwrap();
        file.set_len(MAX_INDEX_BYTES + 1).unwrap();
        let expected = "expected at most 100000000 bytes of index, found 100000001 bytes";
        assert_eq!(refusal(folder.path()), format!("{INDEX}: {expected}"));
    }

    #[test]
    fn an_index_that_is_malformed_is_refused() {
        index_refused("", "malformed JSON: EOF while parsing a value at line 1 column 0");
        index_refused("{} x", "malformed JSON: trailing characters at line 1 column 4");
        index_refused("[]", "[]");
    }

    #[test]
    fn an_index_without_weight_map_is_refused() {
        index_refused(r#"{"metadata":{}}"#, "no weight_map");
        index_refused(r#"{"weight_map":{}}"#, "an empty weight_map");
        index_refused(r#"{"weight_map":null}"#, "in weight_map null");
        index_refused(r#"{"weight_map":{"a":1}}"#, "in weight_map 1 at 'a'");
    }

    #[test]
    fn an_index_that_says_something_twice_is_refused() {
        index_refused(
            r#"{"weight_map":{"a":"1.safetensors"},"weight_map":{"a":"2.safetensors"}}"#,
            "'weight_map' more than once",
        );
        index_refused(
            r#"{"weight_map":{"a":"1.safetensors","\u0061":"2.safetensors"}}"#,
            "in weight_map 'a' more than once",
        );
    }

    #[test]
    fn an_index_says_what_it_likes_beside_the_weight_map() {
        let json =
            br#"{"metadata":{"total_size":1e9,"x":[{}]},"weight_map":{"a":"1.safetensors"}}"#;
        let map = weight_map(Path::new("f"), json).unwrap();
        assert_eq!(map["a"], "1.safetensors");
    }

    #[test]
    fn a_shard_name_that_leads_out_of_the_folder_is_refused() {
        for name in
            ["/etc/1.safetensors", "../1.safetensors", "a/../../1.safetensors", "pytorch.bin"]
        {
            let error = weight_map(Path::new("f"), &index(&[("a", name)])).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "f: tensor 'a': expected a *.safetensors file inside the folder, found '{name}'"
                )
            );
        }
    }

    #[test]
    fn a_shard_behind_a_link_that_leads_out_is_refused() {
        let outside = folder(&[("1.safetensors", &shard(&[("a", 1)]))]);
        let folder = folder(&[(INDEX, &index(&[("a", "1.safetensors")]))]);
        symlink(outside.path().join("1.safetensors"), folder.path().join("1.safetensors")).unwrap();
        let real = fs::canonicalize(outside.path().join("1.safetensors")).unwrap();
        assert_eq!(
            refusal(folder.path()),
            format!(
                "1.safetensors: expected a file of the checkpoint inside its folder, found a link \
                 to {}, outside",
                real.display()
            )
        );
    }

    proptest! {
        #[test]
        fn every_index_is_read_back(
            map in proptest::collection::btree_map(any::<String>(), "[a-z]{1,4}\\.safetensors", 1..9),
        ) {
            let json = serde_json::json!({ "weight_map": map }).to_string();
            prop_assert_eq!(weight_map(Path::new("f"), json.as_bytes()).unwrap(), map);
        }

        #[test]
        fn a_mutated_index_never_panics(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut json = index(&[("a", "1.safetensors"), ("b", "x/2.safetensors")]);
            let at = at.index(json.len());
            json[at] = byte;
            for shard in weight_map(Path::new("f"), &json).into_iter().flatten().map(|row| row.1) {
                prop_assert!(folder::stays_inside(&shard));
            }
        }

        #[test]
        fn random_bytes_never_panic(json in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = weight_map(Path::new("f"), &json);
        }
    }
}
