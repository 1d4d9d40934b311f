//! safetensors files: round trips, sharded folders, and files that lie.

use nibble_models::{
    Error,
    files::{
        safetensors::{SafetensorsFile, write_safetensors},
        shards::Shards,
    },
};
use nibble_runtime::{DType, Tag, Tensor};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new("../tests/golden").join(name)
}

fn tensor(dtype: DType, shape: &[usize], seed: u8) -> Tensor {
    let bytes = shape.iter().product::<usize>() * dtype.size();
    let bytes: Vec<u8> = (0..bytes).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect();
    Tensor::from_bytes(&bytes, dtype, shape, Tag::Workspace).unwrap()
}

/// A file with this header text and this many bytes of data.
fn file_of(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 7);
    bytes
}

/// Opens a file of these bytes and reads all of it.
fn read_all(bytes: &[u8]) -> Result<usize, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let file = SafetensorsFile::open(&path)?;
    let mut total = 0;
    for name in file.names() {
        total += file.view(&name)?.bytes.len();
        match file.tensor(&name, Tag::Workspace) {
            Ok(tensor) => assert_eq!(tensor.bytes().unwrap(), file.view(&name)?.bytes),
            Err(error) => assert!(matches!(error, Error::Unsupported { .. })),
        }
    }
    assert!(total <= bytes.len());
    Ok(total)
}

#[test]
fn a_written_file_is_the_reference_writers_to_the_byte() {
    for name in ["gqa_llama3rope/model/model.safetensors", "gqa_llama3rope/adapter-init/adapter_model.safetensors"] {
        let file = SafetensorsFile::open(&golden(name)).unwrap();
        assert_eq!(file.metadata()["format"], "pt");
        let mut tensors: Vec<_> =
            file.names().into_iter().map(|n| (n.clone(), file.tensor(&n, Tag::Workspace).unwrap())).collect();
        tensors.reverse();
        file.release();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy.safetensors");
        write_safetensors(&path, &tensors, &[("format", "pt")]).unwrap();
        assert!(std::fs::read(&path).unwrap() == std::fs::read(golden(name)).unwrap(), "{name}");
    }
}

#[test]
fn every_type_round_trips() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    let types = [DType::F32, DType::F16, DType::BF16, DType::U8, DType::I8, DType::I32, DType::I64];
    let tensors: Vec<_> = types.iter().map(|t| (format!("t.{t}"), tensor(*t, &[3, 5], 1))).collect();
    let empty = [("empty".to_string(), tensor(DType::F32, &[0, 4], 0)), ("scalar".into(), tensor(DType::F32, &[], 9))];
    let tensors = [tensors, empty.to_vec()].concat();
    write_safetensors(&path, &tensors, &[]).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.names().len(), tensors.len());
    for (name, expected) in &tensors {
        let found = file.tensor(name, Tag::Workspace).unwrap();
        assert_eq!(
            (found.dtype(), found.shape(), found.bytes().unwrap()),
            (expected.dtype(), expected.shape(), expected.bytes().unwrap())
        );
    }
    assert!(matches!(file.view("none"), Err(Error::Mismatch { .. })));
    let twice = [("a".to_string(), tensor(DType::U8, &[1], 0)), ("a".to_string(), tensor(DType::U8, &[1], 0))];
    assert!(matches!(write_safetensors(&path, &twice, &[]), Err(Error::Invalid(_))));
    assert_eq!(SafetensorsFile::open(&path).unwrap().names().len(), tensors.len(), "the old file must be left alone");
}

#[test]
fn lying_headers_are_refused() {
    let good = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    assert_eq!(read_all(&file_of(good, 8)).unwrap(), 8);
    let max = u64::MAX;
    let huge = 1u64 << 61;
    let cases = [
        ("truncated", file_of(good, 7)),
        ("left-over bytes", file_of(good, 9)),
        ("seven bytes", vec![0; 7]),
        ("huge header", [max.to_le_bytes().as_slice(), b"{}"].concat()),
        ("not JSON", file_of("[1,2", 0)),
        ("not an object", file_of("7", 0)),
        (
            "overlap",
            file_of(
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
                6,
            ),
        ),
        (
            "gap",
            file_of(
                r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[5,9]}}"#,
                9,
            ),
        ),
        ("shape too large", file_of(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8)),
        ("backwards", file_of(r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[8,0]}}"#, 8)),
        (
            "overflowing shape",
            file_of(&format!(r#"{{"a":{{"dtype":"F32","shape":[{max},{max}],"data_offsets":[0,8]}}}}"#), 8),
        ),
        (
            "beyond the file",
            file_of(&format!(r#"{{"a":{{"dtype":"U8","shape":[{huge}],"data_offsets":[0,{huge}]}}}}"#), 8),
        ),
        // Seven tensors that fill the address space almost to its end: their end plus the header overflows.
        (
            "end of memory",
            file_of(
                &{
                    let step = huge - 1;
                    let one = |i: u64| {
                        format!(
                            r#""t{i}":{{"dtype":"U8","shape":[{step}],"data_offsets":[{},{}]}}"#,
                            i * step,
                            (i + 1) * step
                        )
                    };
                    format!(
                        "{{{},\"z\":{{\"dtype\":\"U8\",\"shape\":[7],\"data_offsets\":[{},{}]}}}}",
                        (0..8).map(one).collect::<Vec<_>>().join(","),
                        8 * step,
                        8 * step + 7
                    )
                },
                8,
            ),
        ),
    ];
    for (name, bytes) in cases {
        match read_all(&bytes) {
            Err(Error::File { path, what }) => assert!(path.ends_with("t.safetensors") && !what.is_empty(), "{name}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    assert!(matches!(read_all(&[]), Err(Error::File { .. })));
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(SafetensorsFile::open(&folder.path().join("none")), Err(Error::Io { .. })));
    assert!(SafetensorsFile::open(folder.path()).is_err(), "a folder");
}

/// A folder of two shards and the index's text.
fn sharded(folder: &Path) -> String {
    write_safetensors(&folder.join("m-1.safetensors"), &[("a".into(), tensor(DType::F32, &[2, 2], 1))], &[]).unwrap();
    let second = [("b".to_string(), tensor(DType::BF16, &[3], 2)), ("c".to_string(), tensor(DType::BF16, &[1], 3))];
    write_safetensors(&folder.join("m-2.safetensors"), &second, &[]).unwrap();
    r#"{"metadata":{"total_size":24},"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors","c":"m-2.safetensors"}}"#
        .to_string()
}

#[test]
fn sharded_folders_open_and_bad_ones_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let error = |index: &str| {
        std::fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
        Shards::open(folder).map(|_| ()).unwrap_err().to_string()
    };
    assert!(Shards::open(folder).unwrap_err().to_string().contains("neither model.safetensors"));
    let index = sharded(folder);
    std::fs::write(folder.join("model.safetensors.index.json"), &index).unwrap();
    let shards = Shards::open(folder).unwrap();
    assert_eq!(shards.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(shards.files().len(), 2);
    assert_eq!(
        shards.tensor("b", Tag::Workspace).unwrap().bytes().unwrap(),
        tensor(DType::BF16, &[3], 2).bytes().unwrap()
    );
    shards.release();
    assert_eq!(
        shards.tensor("a", Tag::Workspace).unwrap().bytes().unwrap(),
        tensor(DType::F32, &[2, 2], 1).bytes().unwrap()
    );
    assert!(matches!(shards.tensor("d", Tag::Workspace), Err(Error::Mismatch { .. })));

    assert!(error(&index.replace("m-1", "../m-1")).contains("plain file name"));
    assert!(error(&index.replace("\"m-1.safetensors\"", "3")).contains("plain file name"));
    assert!(error(&index.replace("m-1", "m-9")).contains("m-9.safetensors: the file is missing"));
    assert!(error(&index.replace("m-1", "m-2")).contains("\"a\" is here; it is not"));
    assert!(error(&index.replace("weight_map", "map")).contains("weight_map"));
    assert!(error("[]").contains("not a JSON object"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damaged_files_never_panic(cut in 0usize..1300, at in 0usize..1300, bit in 0u32..8) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let tensors: Vec<_> = (0..12u8).map(|i| (format!("tensor.{i}"), tensor(DType::F16, &[2, 3], i))).collect();
        write_safetensors(&path, &tensors, &[("format", "pt")]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        if cut < whole.len() {
            prop_assert!(read_all(&whole[..cut]).is_err());
        }
        let mut flipped = whole.clone();
        let at = at % whole.len();
        flipped[at] ^= 1 << bit;
        // In the header a flip may only rename something; every other outcome is an error, none a panic.
        if let Ok(total) = read_all(&flipped) {
            prop_assert_eq!(total, 12 * 12);
        }
    }

    #[test]
    fn any_header_is_handled(shape in prop::collection::vec(any::<u64>(), 0..4), start in any::<u64>(), end in any::<u64>()) {
        let header = format!(r#"{{"a":{{"dtype":"BF16","shape":{shape:?},"data_offsets":[{start},{end}]}}}}"#);
        let _ = read_all(&file_of(&header, 64));
    }

    #[test]
    fn any_bytes_are_handled(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read_all(&bytes);
    }
}
