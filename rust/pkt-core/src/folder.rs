//! The files of a model folder: which of them hold the checkpoint, and what they may resolve to.
//!
//! Names come from an index that a stranger wrote, and links from whoever packed the folder. Neither
//! may lead out of it, with one exception: in the cache of the Hugging Face hub
//! `models--org--name/snapshots/<revision>/` holds links into `blobs/` of the same repository.
//! Pickles are never opened; a folder that has nothing else is refused with the way out.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, readable};

/// The whole checkpoint in one file; where it lies beside an index, transformers loads it.
pub(crate) const SINGLE: &str = "model.safetensors";
const ADAPTER: &str = "adapter_model.safetensors";

/// A folder that exists.
pub(crate) struct Folder<'a> {
    path: &'a Path,
    /// The real folder and, in the cache of the hub, the blobs of the same repository.
    roots: Vec<PathBuf>,
}

impl<'a> Folder<'a> {
    /// The folder at `path`, which may itself be a link.
    pub(crate) fn open(path: &'a Path) -> Result<Self> {
        let unreadable = |message| Err(unreadable(path, message));
        let root = match fs::canonicalize(path) {
            Ok(root) if root.is_dir() => root,
            Ok(_) => return unreadable("expected the folder of a model, found a file"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return unreadable("expected the folder of a model, found nothing there");
            }
            Err(error) => return Err(Error::io(path, "resolve")(error)),
        };
        let blobs = hub_blobs(&root);
        Ok(Self { path, roots: [root].into_iter().chain(blobs).collect() })
    }

    /// Whether the folder has the name `name`, even as a link to nowhere.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.path.join(name).symlink_metadata().is_ok()
    }

    /// The path of the file `name`, once its links are known to stay in bounds.
    pub(crate) fn resolve(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        let found = match fs::canonicalize(&path) {
            Ok(real) if self.roots.iter().any(|root| real.starts_with(root)) => return Ok(path),
            Ok(real) => format!("a link to {}, outside", real.display()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(path, "resolve")(error));
            }
            Err(_) if self.has(name) => "a link to nowhere".to_owned(),
            Err(_) => "no such file".to_owned(),
        };
        Err(Error::damaged(path, None, "a file of the checkpoint inside its folder", found))
    }

    /// The name of the one file that is the whole checkpoint, where no index names the files.
    pub(crate) fn only_checkpoint(&self) -> Result<String> {
        if self.has(SINGLE) {
            return Ok(SINGLE.to_owned());
        }
        let mut names = Vec::new();
        for item in fs::read_dir(self.path).map_err(Error::io(self.path, "list"))? {
            let item = item.map_err(Error::io(self.path, "list"))?;
            names.push(item.file_name().to_string_lossy().into_owned());
        }
        names.sort_unstable();
        let is_checkpoint = |name: &&String| name.ends_with(".safetensors") && *name != ADAPTER;
        let checkpoints: Vec<_> = names.iter().filter(is_checkpoint).collect();
        let shard = checkpoints.iter().find(|name| is_one_of_several(name));
        let message = match (checkpoints.as_slice(), shard) {
            ([only], None) => return Ok((*only).clone()),
            (_, Some(shard)) => format!(
                "found the shard '{}' but no {SINGLE}.index.json, which says what the shards hold; \
                 fetch the index from where the shards come from",
                readable(shard)
            ),
            ([first, second, ..], None) => format!(
                "expected {SINGLE} or its index, found '{}' and '{}'; leave one of them",
                readable(first),
                readable(second)
            ),
            ([], None) => no_checkpoint(&names),
        };
        Err(unreadable(self.path, message))
    }
}

/// Whether `name` is, on every system, a plain relative name of a safetensors file.
pub(crate) fn stays_inside(name: &str) -> bool {
    name.ends_with(".safetensors")
        && !name.contains(['\\', ':', '\0'])
        && name.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

fn unreadable(path: &Path, message: impl Into<String>) -> Error {
    Error::Unreadable { path: path.to_owned(), message: message.into() }
}

/// `blobs` beside `snapshots`, if `root` is `…/models--org--name/snapshots/<revision>`.
fn hub_blobs(root: &Path) -> Option<PathBuf> {
    let snapshots = root.parent().filter(|folder| folder.ends_with("snapshots"))?;
    let repository = snapshots.parent()?;
    let is_model = repository.file_name()?.to_str()?.starts_with("models--");
    is_model.then(|| repository.join("blobs"))
}

/// Whether `name` reads `*-NNNNN-of-NNNNN.safetensors`, of more than one.
fn is_one_of_several(name: &str) -> bool {
    let number = |text: &str| text.parse::<u32>().ok();
    name.strip_suffix(".safetensors")
        .and_then(|stem| stem.rsplit_once("-of-"))
        .and_then(|(rest, total)| Some((number(rest.rsplit_once('-')?.1)?, number(total)?)))
        .is_some_and(|(_, total)| total > 1)
}

/// What a folder without checkpoint holds instead, and what to do.
fn no_checkpoint(names: &[String]) -> String {
    let first = |endings: &[&str]| {
        let found = names.iter().find(|name| endings.iter().any(|ending| name.ends_with(ending)));
        found.map(|name| readable(name))
    };
    if names.is_empty() {
        format!("expected {SINGLE}, found an empty folder")
    } else if first(&[ADAPTER]).is_some() {
        format!(
            "expected {SINGLE}, found only the adapter '{ADAPTER}'; name the folder of the model \
             that the adapter belongs to"
        )
    } else if let Some(pickle) = first(&[".bin", ".pt", ".pth"]) {
        format!(
            "expected {SINGLE}, found '{pickle}': a pickle can run code when it is loaded, so pkt \
             never does; where you trust it, load the model with transformers and write it with \
             save_pretrained(folder)"
        )
    } else if let Some(gguf) = first(&[".gguf"]) {
        format!(
            "expected {SINGLE}, found '{gguf}'; pkt does not read GGUF: fetch the safetensors \
             checkpoint that it was made from"
        )
    } else {
        format!("expected {SINGLE}, found no safetensors file among {} others", names.len())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    fn folder(names: &[&str]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            touch(&folder.path().join(name));
        }
        folder
    }

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }

    /// What `only_checkpoint` finds among these names, or the message without the path.
    fn found(names: &[&str]) -> std::result::Result<String, String> {
        let folder = folder(names);
        let found = Folder::open(folder.path()).unwrap().only_checkpoint();
        found.map_err(|error| match error {
            Error::Unreadable { path, message } if path == folder.path() => message,
            other => panic!("{other}"),
        })
    }

    #[track_caller]
    fn refused(names: &[&str], message: &str) {
        assert_eq!(found(names).unwrap_err(), message);
    }

    #[test]
    fn the_usual_name_comes_first_and_any_only_file_after_it() {
        assert_eq!(found(&["a.safetensors", "model.safetensors"]).unwrap(), "model.safetensors");
        assert_eq!(found(&["a.safetensors", ADAPTER, "b.bin"]).unwrap(), "a.safetensors");
        let whole = "m-00001-of-00001.safetensors";
        assert_eq!(found(&[whole]).unwrap(), whole);
    }

    #[test]
    fn shards_without_index_are_refused() {
        let message = "found the shard 'm-00001-of-00002.safetensors' but no \
                       model.safetensors.index.json, which says what the shards hold; fetch the \
                       index from where the shards come from";
        refused(&["m-00001-of-00002.safetensors"], message);
        refused(
            &["a.safetensors", "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"],
            message,
        );
    }

    #[test]
    fn two_checkpoints_are_refused() {
        refused(
            &["a.safetensors", "b.safetensors"],
            "expected model.safetensors or its index, found 'a.safetensors' and 'b.safetensors'; \
             leave one of them",
        );
    }

    #[test]
    fn an_adapter_is_refused() {
        refused(
            &[ADAPTER, "adapter_config.json", "training_args.bin"],
            "expected model.safetensors, found only the adapter 'adapter_model.safetensors'; name \
             the folder of the model that the adapter belongs to",
        );
    }

    #[test]
    fn a_pickle_is_refused_with_the_way_to_convert_it() {
        for name in ["pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth"] {
            refused(
                &[name, "config.json"],
                &format!(
                    "expected model.safetensors, found '{name}': a pickle can run code when it is \
                     loaded, so pkt never does; where you trust it, load the model with \
                     transformers and write it with save_pretrained(folder)"
                ),
            );
        }
    }

    #[test]
    fn gguf_is_refused() {
        refused(
            &["model-q4.gguf"],
            "expected model.safetensors, found 'model-q4.gguf'; pkt does not read GGUF: fetch the \
             safetensors checkpoint that it was made from",
        );
    }

    #[test]
    fn a_folder_without_any_weights_is_refused() {
        refused(&[], "expected model.safetensors, found an empty folder");
        refused(
            &["config.json", "README.md"],
            "expected model.safetensors, found no safetensors file among 2 others",
        );
    }

    #[test]
    fn a_folder_that_is_missing_or_a_file_is_refused() {
        let folder = folder(&["file"]);
        let message = |name: &str| {
            let path = folder.path().join(name);
            let error = Folder::open(&path).err().unwrap().to_string();
            error.strip_prefix(path.to_str().unwrap()).unwrap().to_owned()
        };
        assert_eq!(message("none"), ": expected the folder of a model, found nothing there");
        assert_eq!(message("file"), ": expected the folder of a model, found a file");
    }

    #[test]
    fn a_name_that_leads_out_is_no_name_of_a_shard() {
        for inside in ["a.safetensors", "a/b.safetensors", "..a.safetensors", ".safetensors"] {
            assert!(stays_inside(inside), "{inside}");
        }
        for outside in [
            "",
            "..",
            "a.bin",
            "/a.safetensors",
            "../a.safetensors",
            "a/../a.safetensors",
            "./a.safetensors",
            "a//a.safetensors",
            "..\\a.safetensors",
            "C:a.safetensors",
            "\\\\host\\a.safetensors",
            "a\0.safetensors",
            "a.safetensors/",
        ] {
            assert!(!stays_inside(outside), "{outside}");
        }
    }

    #[test]
    fn links_may_lead_anywhere_inside() {
        let folder = folder(&["real/a.safetensors"]);
        let root = folder.path();
        symlink("real/a.safetensors", root.join("b.safetensors")).unwrap();
        symlink(root, root.join("itself")).unwrap();
        let linked = root.join("itself");
        let files = Folder::open(&linked).unwrap();
        assert_eq!(files.resolve("b.safetensors").unwrap(), linked.join("b.safetensors"));
    }

    #[test]
    fn links_may_not_lead_out_nor_to_nowhere() {
        let outside = folder(&["a.safetensors"]);
        let folder = folder(&["model.safetensors"]);
        symlink(outside.path().join("a.safetensors"), folder.path().join("file")).unwrap();
        symlink(outside.path(), folder.path().join("folder")).unwrap();
        symlink("gone", folder.path().join("nowhere")).unwrap();
        let files = Folder::open(folder.path()).unwrap();
        let error = |name| files.resolve(name).unwrap_err().to_string();
        assert!(error("file").ends_with("a.safetensors, outside"));
        assert!(error("folder/a.safetensors").ends_with("a.safetensors, outside"));
        assert!(error("nowhere").ends_with("found a link to nowhere"));
        assert!(error("none").ends_with("found no such file"));
    }

    #[test]
    fn the_cache_of_the_hub_may_link_to_its_own_blobs_only() {
        let cache = folder(&["models--o--n/blobs/1", "models--o--m/blobs/1", "o/blobs/1"]);
        let own = cache.path().join("models--o--n/snapshots/rev");
        let copied = cache.path().join("o/snapshots/rev");
        for folder in [&own, &copied] {
            fs::create_dir_all(folder).unwrap();
            symlink("../../blobs/1", folder.join("model.safetensors")).unwrap();
        }
        symlink("../../../models--o--m/blobs/1", own.join("other")).unwrap();
        let resolve = |folder, name| Folder::open(folder).unwrap().resolve(name).map(drop);
        resolve(&own, "model.safetensors").unwrap();
        assert!(resolve(&own, "other").unwrap_err().to_string().ends_with("outside"));
        // The same links mean nothing where the folder is not named as the hub names it.
        assert!(resolve(&copied, "model.safetensors").is_err());
        // The hub's folder may itself be reached by a link.
        symlink(&own, cache.path().join("link")).unwrap();
        resolve(&cache.path().join("link"), "model.safetensors").unwrap();
    }
}
