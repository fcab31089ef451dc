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
    let map: Vec<_> = map.iter().map(|(name, shard)| format!("\"{name}\":\"{shard}\"")).collect();
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
fn the_single_file_counts_before_an_index_beside_it() {
    let parts = index(&[("a", "1.safetensors")]);
    for others in [vec![], vec![("1.safetensors", shard(&[("a", 9)]))]] {
        let single = shard(&[("a", 2)]);
        let files =
            [("model.safetensors", single), ("model.safetensors.index.json", parts.clone())];
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files.into_iter().chain(others) {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        let catalogue = Catalogue::open(folder.path()).unwrap();
        assert_eq!(catalogue.bytes(), 2, "as transformers loads it");
        assert_eq!(catalogue.shards.len(), 1);
    }
}

#[test]
fn the_index_says_which_shard_holds_a_tensor() {
    let folder = folder(&[
        (INDEX, &index(&[("a", "2.safetensors"), ("b", "in/1.safetensors")])),
        // Both hold "a", and the second holds "c", which the index does not know.
        ("in/1.safetensors", &shard(&[("a", 7), ("b", 2)])),
        ("2.safetensors", &shard(&[("a", 3), ("c", 9)])),
        ("other.safetensors", b"not read where an index is"),
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
    assert_eq!(refusal(folder.path()), format!("{INDEX}: expected a regular file, found a pipe"));
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
    let json = br#"{"metadata":{"total_size":1e9,"x":[{}]},"weight_map":{"a":"1.safetensors"}}"#;
    let map = weight_map(Path::new("f"), json).unwrap();
    assert_eq!(map["a"], "1.safetensors");
}

#[test]
fn a_shard_name_that_leads_out_of_the_folder_is_refused() {
    for name in ["/etc/1.safetensors", "../1.safetensors", "a/../../1.safetensors", "pytorch.bin"] {
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
