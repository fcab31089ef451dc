use std::fmt::Write as _;
use std::iter;
use std::process::Command;

use proptest::prelude::*;

use super::*;

const A: &str = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
const FIELDS: &str = "an object of exactly dtype, shape and data_offsets";
const OBJECT: &str = "a JSON object that begins with '{'";

fn with_length(json: &[u8]) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes(), json].concat()
}

fn parse_json(json: &str, data_bytes: u64) -> Result<Header> {
    let head = with_length(json.as_bytes());
    parse(Path::new("f"), &head, head.len() as u64 + data_bytes)
}

/// Parses a whole file that lies in memory.
fn parse_file(file: &[u8]) -> Result<Header> {
    let json_bytes = file.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
    let head_bytes = json_bytes.saturating_add(8).min(file.len() as u64);
    parse(Path::new("f"), &file[..head_bytes as usize], file.len() as u64)
}

/// Asserts that the file is refused in these words.
#[track_caller]
fn refused(parsed: Result<Header>, expected: &str, found: &str) {
    let error = parsed.unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }));
    assert_eq!(error.to_string(), format!("f: expected {expected}, found {found}"));
}

/// Asserts that tensor "a" with this entry is refused in these words.
#[track_caller]
fn entry_refused(entry: &str, expected: &str, found: &str) {
    let error = parse_json(&format!(r#"{{"a":{entry}}}"#), 8).unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }));
    assert_eq!(error.to_string(), format!("f: tensor 'a': expected {expected}, found {found}"));
}

fn entry(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}"#)
}

#[test]
fn a_padded_header_is_read_as_it_was_written() {
    let json = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"BF16","shape":[2,1],"data_offsets":[8,12]},
        "z":{"data_offsets":[8,8],"shape":[0,3],"dtype":"I64"},
        "scalar":{"dtype":"BOOL","shape":[],"data_offsets":[12,13]},"#;
    let json = format!("{json}{A}}}   ");
    let header = parse_json(&json, 13).unwrap();
    let base = 8 + json.len() as u64;
    let tensor = |name: &str, dtype, shape: &[u64], begin, end| Tensor {
        name: name.to_owned(),
        dtype,
        shape: shape.to_owned(),
        begin: base + begin,
        end: base + end,
    };
    let tensors = [
        tensor("a", Dtype::F32, &[2], 0, 8),
        tensor("b", Dtype::Bf16, &[2, 1], 8, 12),
        tensor("z", Dtype::I64, &[0, 3], 8, 8),
        tensor("scalar", Dtype::Bool, &[], 12, 13),
    ];
    assert_eq!(header.tensors, tensors);
    assert_eq!(header.metadata, BTreeMap::from([("format".to_owned(), "pt".to_owned())]));
    assert_eq!(header.bytes, base + 13);
    assert_eq!(header.digest[..], Sha256::digest(with_length(json.as_bytes()))[..]);
}

#[test]
fn a_file_without_tensors_is_legal() {
    assert_eq!(parse_json("{}", 0).unwrap().tensors, []);
}

#[test]
fn a_file_too_short_for_its_length_is_refused() {
    let expected = "at least 8 bytes, the length of the header";
    refused(parse_file(b""), expected, "0 bytes");
    refused(parse_file(&[2, 0, 0, 0, 0, 0, 0]), expected, "7 bytes");
}

#[test]
fn a_header_length_of_zero_or_beyond_the_limit_is_refused() {
    let expected = "a header length from 1 to 100000000";
    let parse_length = |length: u64| parse(Path::new("f"), &length.to_le_bytes(), u64::MAX);
    refused(parse_length(0), expected, "0");
    refused(parse_length(100_000_001), expected, "100000001");
    refused(parse_length(u64::MAX), expected, "18446744073709551615");
}

#[test]
fn a_git_lfs_pointer_is_recognized() {
    refused(
        parse_file(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "a header length from 1 to 100000000",
        "a Git LFS pointer; fetch the file itself with 'git lfs pull'",
    );
}

#[test]
fn a_header_beyond_the_file_is_refused() {
    let head = with_length(b"{}");
    refused(
        parse_file(&head[..9]),
        "at least 10 bytes, where the header ends",
        "9 bytes: the file is truncated",
    );
}

#[test]
fn a_head_that_is_not_as_long_as_it_says_is_refused() {
    let head = with_length(b"{}");
    let parsed = parse(Path::new("f"), &head[..9], 10);
    refused(parsed, "10 bytes of length and header", "9 bytes");
}

#[test]
fn bytes_that_are_not_utf8_are_refused() {
    let head = with_length(b"{\"\xff\":0}");
    refused(parse_file(&head), OBJECT, "bytes that are not UTF-8 at 2");
}

#[test]
fn malformed_json_is_refused() {
    let found = "malformed JSON: EOF while parsing an object at line 1 column 1";
    refused(parse_json("{", 0), OBJECT, found);
}

#[test]
fn a_header_that_is_no_object_is_refused() {
    refused(parse_json("[1]", 0), OBJECT, "'[1]'");
    refused(parse_json(" {}", 0), OBJECT, "' {}'");
}

#[test]
fn junk_after_the_object_is_refused() {
    let found = "malformed JSON: trailing characters at line 1 column 4";
    refused(parse_json("{} {}", 0), OBJECT, found);
}

#[test]
fn a_tensor_named_twice_is_refused() {
    let error = parse_json(&format!("{{{A},{A}}}"), 8).unwrap_err().to_string();
    assert_eq!(error, "f: tensor 'a': expected every name once, found this name more than once");
}

#[test]
fn a_field_named_twice_is_refused() {
    let entry = r#"{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}"#;
    entry_refused(entry, FIELDS, "field 'shape' more than once");
}

#[test]
fn an_unknown_field_is_refused() {
    let entry = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8],"stride":[1]}"#;
    entry_refused(entry, FIELDS, "also a field 'stride'");
}

#[test]
fn a_missing_field_is_refused() {
    entry_refused(r#"{"shape":[2],"data_offsets":[0,8]}"#, FIELDS, "no field 'dtype'");
    entry_refused(r#"{"dtype":"F32","data_offsets":[0,8]}"#, FIELDS, "no field 'shape'");
    entry_refused(r#"{"dtype":"F32","shape":[2]}"#, FIELDS, "no field 'data_offsets'");
}

#[test]
fn an_entry_that_is_no_object_is_refused() {
    entry_refused("[1,2]", FIELDS, "[1, 2]");
    entry_refused("null", FIELDS, "null");
}

#[test]
fn a_dtype_that_pkt_does_not_read_is_refused_with_those_it_reads() {
    let expected = "a dtype that pkt reads (F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, I32, \
                    I16, I8, U64, U32, U16, U8, BOOL)";
    entry_refused(&entry(r#""F8_E8M0""#, "[8]", "[0,8]"), expected, "'F8_E8M0'");
    entry_refused(&entry(r#""F4""#, "[16]", "[0,8]"), expected, "'F4'");
    entry_refused(&entry("7", "[8]", "[0,8]"), expected, "7");
}

#[test]
fn a_shape_that_is_no_list_of_sizes_is_refused() {
    let expected = "a shape of at most 64 sizes";
    let shaped = |shape: &str| entry(r#""F32""#, shape, "[0,8]");
    entry_refused(&shaped("2"), expected, "2");
    entry_refused(&shaped("[-2]"), expected, "a list that holds the number -2");
    entry_refused(&shaped("[2.0]"), expected, "a list that holds the number 2.0");
    entry_refused(&shaped("[[2]]"), expected, "a list that holds a list");
    entry_refused(&shaped(r#"["2",true]"#), expected, "a list that holds '2'");
}

#[test]
fn an_absurdly_long_shape_is_refused() {
    let shape = format!("[{}1]", "1,".repeat(1_000_000));
    let entry = entry(r#""U8""#, &shape, "[0,1]");
    entry_refused(&entry, "a shape of at most 64 sizes", "a list of 1000001");
}

#[test]
fn a_shape_whose_product_overflows_is_refused_even_beside_a_zero() {
    let expected = "a shape whose bytes fit 64 bits";
    for shape in ["[4294967296, 4294967296]", "[4294967296, 0, 4294967296]"] {
        entry_refused(&entry(r#""U8""#, shape, "[0,0]"), expected, shape);
    }
    let shape = "[4611686018427387904]";
    entry_refused(&entry(r#""F32""#, shape, "[0,0]"), expected, shape);
}

#[test]
fn a_shape_that_contradicts_its_offsets_is_refused() {
    let entry = entry(r#""BF16""#, "[3]", "[0,8]");
    entry_refused(&entry, "6 bytes for BF16 [3]", "data_offsets of 8 bytes");
}

#[test]
fn offsets_that_are_no_ascending_pair_are_refused() {
    let expected = "data_offsets [begin, end], begin ≤ end";
    for offsets in ["[8, 0]", "[8]", "[0, 4, 8]"] {
        entry_refused(&entry(r#""F32""#, "[2]", offsets), expected, offsets);
    }
}

#[test]
fn a_truncated_file_is_refused() {
    let bytes = 8 + A.len() as u64 + 2;
    refused(
        parse_json(&format!("{{{A}}}"), 7),
        &format!("{} bytes, as the header promises", bytes + 8),
        &format!("{} bytes: the file is truncated", bytes + 7),
    );
}

#[test]
fn a_tensor_at_the_end_of_all_numbers_is_refused() {
    let entry = entry(r#""U8""#, "[18446744073709551615]", "[0,18446744073709551615]");
    let json = format!(r#"{{"a":{entry}}}"#);
    let bytes = 8 + json.len();
    refused(
        parse_json(&json, 8),
        &format!("{} bytes, as the header promises", u128::from(u64::MAX) + bytes as u128),
        &format!("{} bytes: the file is truncated", bytes + 8),
    );
}

#[test]
fn bytes_after_the_last_tensor_are_refused() {
    let bytes = 8 + A.len() as u64 + 2;
    refused(
        parse_json(&format!("{{{A}}}"), 9),
        &format!("{} bytes, as the header promises", bytes + 8),
        &format!("{} bytes: bytes follow the last tensor", bytes + 9),
    );
}

#[track_caller]
fn second_refused(offsets: &str, found: &str) {
    let json = format!(r#"{{{A},"b":{}}}"#, entry(r#""F32""#, "[1]", offsets));
    let expected = "data that begins at 8, where the tensor before it ends";
    let error = parse_json(&json, 12).unwrap_err().to_string();
    assert_eq!(error, format!("f: tensor 'b': expected {expected}, found {found}"));
}

#[test]
fn an_overlap_is_refused() {
    second_refused("[4,8]", "an overlap: data_offsets that begin at 4");
}

#[test]
fn a_hole_is_refused() {
    second_refused("[9,13]", "a hole: data_offsets that begin at 9");
}

#[test]
fn data_that_does_not_begin_at_zero_is_refused() {
    entry_refused(
        &entry(r#""F32""#, "[1]", "[4,8]"),
        "data that begins at 0, where the tensor before it ends",
        "a hole: data_offsets that begin at 4",
    );
}

#[test]
fn metadata_other_than_texts_is_refused() {
    let metadata = |json: &str| parse_json(&format!(r#"{{"__metadata__":{json}}}"#), 0);
    refused(metadata("null"), METADATA_FORM, "null");
    refused(metadata(r#"{"a":1}"#), METADATA_FORM, "1 at 'a'");
    refused(metadata(r#"{"a":"1","a":"2"}"#), METADATA_FORM, "'a' more than once");
}

#[test]
fn a_nesting_bomb_is_refused() {
    let object = "EOF while parsing an object"; // those within are passed over, not held
    for (open, innermost, words) in
        [("[", "", "recursion limit exceeded"), (r#"{"a":"#, "0", object)]
    {
        let json = format!(r#"{{"a":{}{innermost}"#, open.repeat(1_000_000));
        let error = parse_json(&json, 0).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_long_name_is_clipped_in_the_message() {
    let json = format!(r#"{{"{}":null}}"#, "a".repeat(10_000));
    assert!(parse_json(&json, 0).unwrap_err().to_string().len() < 400);
}

#[test]
fn read_agrees_with_parse() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let file = [with_length(format!("{{{A}}}").as_bytes()), vec![7; 8]].concat();
    for bytes in [0, 5, 8, 20, file.len() - 1, file.len()] {
        std::fs::write(&path, &file[..bytes]).unwrap();
        match (read(&path), parse_file(&file[..bytes])) {
            (Ok(header), Ok(expected)) => assert_eq!(header, expected),
            (Err(error), Err(expected)) => {
                let expected = expected.to_string().replacen('f', path.to_str().unwrap(), 1);
                assert_eq!(error.to_string(), expected);
            }
            (header, expected) => panic!("{bytes} bytes: {header:?}, not {expected:?}"),
        }
    }
}

#[test]
fn only_a_regular_file_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let device = Path::new("/dev/null");
    for (path, found) in [(&*pipe, "a pipe"), (folder.path(), "a folder"), (device, "a device")] {
        let error = read(path).unwrap_err().to_string();
        let path = path.display();
        assert_eq!(error, format!("{path}: expected a regular file, found {found}"));
    }
    let missing = read(&folder.path().join("none")).unwrap_err();
    assert!(matches!(missing, Error::Io { operation: "open", .. }));
}

/// A header as a stranger's writer would spell it: fields and tensors in any order, every
/// character of a name escaped, blanks in places.
fn written(tensors: &[Tensor], order: &[usize], blanks: usize) -> Vec<u8> {
    let blank = " ".repeat(blanks);
    let entries = order.iter().map(|&index| {
        let Tensor { name, dtype, shape, begin, end } = &tensors[index];
        let name = name.encode_utf16().fold(String::new(), |mut escaped, unit| {
            write!(escaped, "\\u{unit:04x}").unwrap();
            escaped
        });
        let mut fields = [
            format!(r#""dtype":{blank}"{dtype}""#),
            format!(r#""shape"{blank}:{shape:?}"#),
            format!(r#"{blank}"data_offsets":[{begin}{blank},{end}]"#),
        ];
        fields.rotate_left(index % 3);
        format!(r#""{name}":{{{}}}"#, fields.join(","))
    });
    let json = format!("{{{}}}{blank}", entries.collect::<Vec<_>>().join(","));
    let data = tensors.iter().map(|tensor| tensor.end).max().unwrap_or(0);
    let mut file = with_length(json.as_bytes());
    file.extend(iter::repeat_n(0x5a, data as usize));
    file
}

fn dtypes() -> impl Strategy<Value = Dtype> {
    let names: Vec<_> = Dtype::names().collect();
    proptest::sample::select(names).prop_map(|name| Dtype::from_name(name).unwrap())
}

/// A valid file, and its tensors with offsets that count from the start of the data.
fn files() -> impl Strategy<Value = (Vec<u8>, Vec<Tensor>)> {
    let shapes = proptest::collection::vec(0..5_u64, 0..4);
    proptest::collection::btree_map(any::<String>(), (dtypes(), shapes), 0..6)
        .prop_map(|parts| {
            let mut begin = 0;
            let place = |(name, (dtype, shape)): (String, (Dtype, Vec<u64>))| {
                let end = begin + dtype.bytes() * shape.iter().product::<u64>();
                Tensor { name, dtype, shape, begin: std::mem::replace(&mut begin, end), end }
            };
            parts.into_iter().map(place).collect::<Vec<_>>()
        })
        .prop_flat_map(|tensors| {
            let order = Just((0..tensors.len()).collect::<Vec<_>>()).prop_shuffle();
            (Just(tensors), order, 0..3_usize)
        })
        .prop_map(|(tensors, order, blanks)| (written(&tensors, &order, blanks), tensors))
}

/// Asserts what a header guarantees to readers.
fn assert_filled(header: &Header, file: &[u8]) {
    assert_eq!(header.bytes, file.len() as u64);
    let mut tensors: Vec<_> = header.tensors.iter().collect();
    assert!(tensors.is_sorted_by_key(|tensor| (tensor.begin, &tensor.name)));
    tensors.sort_by_key(|tensor| (tensor.begin, tensor.end));
    let mut end = 8 + u64::from_le_bytes(*file.first_chunk().unwrap());
    for tensor in tensors {
        assert_eq!(tensor.begin, end);
        end = tensor.end;
        let elements: u64 = tensor.shape.iter().product();
        assert_eq!(tensor.end - tensor.begin, elements * tensor.dtype.bytes());
    }
    assert_eq!(end, file.len() as u64);
}

proptest! {
    #[test]
    fn every_valid_file_is_read_back((file, mut tensors) in files()) {
        let header = parse_file(&file).unwrap();
        assert_filled(&header, &file);
        let base = 8 + u64::from_le_bytes(*file.first_chunk().unwrap());
        for tensor in &mut tensors {
            tensor.begin += base;
            tensor.end += base;
        }
        tensors.sort_by(|a, b| (a.begin, &a.name).cmp(&(b.begin, &b.name)));
        prop_assert_eq!(header.tensors, tensors);
    }

    #[test]
    fn a_mutated_file_is_refused_or_still_filled(
        (mut file, _) in files(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        for (index, byte) in changes {
            let index = index.index(file.len());
            file[index] = byte;
        }
        if let Some(cut) = cut {
            file.truncate(cut.index(file.len()));
        }
        if let Ok(header) = parse_file(&file) {
            assert_filled(&header, &file);
        }
    }

    #[test]
    fn a_digit_changed_is_refused_or_still_filled(
        (mut file, _) in files(), choice in any::<prop::sample::Index>(), digit in b'0'..=b'9',
    ) {
        let digits: Vec<_> =
            (8..file.len()).filter(|&index| file[index].is_ascii_digit()).collect();
        prop_assume!(!digits.is_empty());
        file[digits[choice.index(digits.len())]] = digit;
        if let Ok(header) = parse_file(&file) {
            assert_filled(&header, &file);
        }
    }

    #[test]
    fn a_truncated_file_is_never_read((file, _) in files(), cut in any::<prop::sample::Index>()) {
        prop_assert!(parse_file(&file[..cut.index(file.len())]).is_err());
    }

    #[test]
    fn random_bytes_never_panic(
        json in proptest::collection::vec(any::<u8>(), 0..200), data_bytes in any::<u64>(),
    ) {
        let head = with_length(&json);
        let _ = parse(Path::new("f"), &json, data_bytes);
        let _ = parse(Path::new("f"), &head, data_bytes);
    }
}
