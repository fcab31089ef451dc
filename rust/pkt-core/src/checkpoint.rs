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
use crate::folder::{self, Folder, SINGLE};
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
    /// each other. An index beside a `model.safetensors` is not read, nor its shards: transformers
    /// loads the single file of the two, whichever was written last.
    ///
    /// # Errors
    /// [`Error::Unreadable`] if the folder holds no checkpoint that pkt reads, [`Error::Damaged`]
    /// if a file breaks its format or contradicts the index, [`Error::Io`] if the system refuses.
    pub fn open(folder: &Path) -> Result<Self> {
        let files = Folder::open(folder)?;
        let assigned = if files.has(INDEX) && !files.has(SINGLE) {
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
mod tests;
