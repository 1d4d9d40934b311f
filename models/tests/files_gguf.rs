//! GGUF files: block formats against ggml's arithmetic, a Llama through the permutation, and files that lie.

use half::{bf16, f16};
use nibble_kernels::rotary::RopeScaling;
use nibble_models::{
    Error, LlamaConfig,
    files::{
        checkpoint::{Checkpoint, CheckpointKind, CheckpointTensor},
        gguf::{GgmlType, GgufFile, gguf_name, quantize, quants::dequantize},
        inspect::describe,
        safetensors::SafetensorsFile,
    },
};
use nibble_runtime::{Tag, Tensor};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new("../tests/golden").join(name)
}

/// Builds GGUF files.
#[derive(Clone)]
struct Builder {
    version: u32,
    keys: Vec<Vec<u8>>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl Builder {
    fn new() -> Self {
        Builder { version: 3, keys: Vec::new(), tensors: Vec::new() }
    }

    fn raw(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.keys.push([&string(key)[..], &kind.to_le_bytes(), value].concat());
        self
    }

    fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    fn str(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, &string(value))
    }

    fn array(self, key: &str, kind: u32, count: u64, elements: &[u8]) -> Self {
        let value = [&kind.to_le_bytes()[..], &count.to_le_bytes(), elements].concat();
        self.raw(key, 9, &value)
    }

    /// `shape` outermost first.
    fn tensor(mut self, name: &str, shape: &[usize], kind: u32, bytes: Vec<u8>) -> Self {
        let dims = shape.iter().rev().map(|&dim| dim as u64).collect();
        self.tensors.push((name.into(), dims, kind, bytes));
        self
    }

    fn build(&self) -> Vec<u8> {
        let (tensors, keys) = (self.tensors.len() as u64, self.keys.len() as u64);
        let mut file =
            [&b"GGUF"[..], &self.version.to_le_bytes(), &tensors.to_le_bytes(), &keys.to_le_bytes()].concat();
        file.extend(self.keys.concat());
        let mut data = Vec::new();
        for (name, dims, kind, bytes) in &self.tensors {
            file.extend(string(name));
            file.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| file.extend(dim.to_le_bytes()));
            file.extend(kind.to_le_bytes());
            file.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(data);
        file
    }
}

fn open(bytes: &[u8]) -> Result<GgufFile, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.gguf");
    std::fs::write(&path, bytes).unwrap();
    GgufFile::open(&path)
}

#[test]
fn blocks_dequantize_as_ggmls_to_the_bit() {
    let golden = SafetensorsFile::open(&golden("gguf_quants.safetensors")).unwrap();
    let types = [
        GgmlType::F32,
        GgmlType::F16,
        GgmlType::BF16,
        GgmlType::Q8_0,
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
    ];
    assert_eq!(golden.names().len(), 2 * types.len());
    for kind in types {
        let raw = golden.view(&format!("{kind}.raw")).unwrap().bytes;
        let expected = golden.tensor(&format!("{kind}.f32"), Tag::Workspace).unwrap();
        let expected = expected.as_slice::<f32>().unwrap();
        let mut found = vec![f32::NAN; expected.len()];
        assert!(dequantize(kind, raw, &mut found));
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert_eq!(found.to_bits(), expected.to_bits(), "{kind} element {i}: {found} against {expected}");
        }
        assert!(!dequantize(kind, &raw[1..], &mut found));
        assert!(!dequantize(kind, raw, &mut found[1..]));
    }
}

/// `gguf_encode.safetensors` is what the Python package `gguf` 0.19 writes for normal and heavy-tailed values, zeros, a
/// constant and tiny ones.
#[test]
fn blocks_are_written_as_ggmls_to_the_bit() {
    let golden = SafetensorsFile::open(&golden("gguf_encode.safetensors")).unwrap();
    let input = golden.tensor("input", Tag::Workspace).unwrap();
    let input = input.as_slice::<f32>().unwrap();
    for kind in [GgmlType::F16, GgmlType::BF16, GgmlType::Q8_0, GgmlType::Q4_0, GgmlType::Q5_0] {
        let found = quantize(kind, input).unwrap();
        let expected = golden.view(&kind.to_string()).unwrap().bytes;
        assert_eq!(found.len(), expected.len());
        let different = found.iter().zip(expected).filter(|(a, b)| a != b).count();
        assert_eq!(different, 0, "{kind}: of {} bytes", found.len());
        if kind.block > 1 {
            assert!(quantize(kind, &input[1..]).is_none(), "{kind}: no whole blocks");
        }
    }
    assert!(quantize(GgmlType::Q4_K, &input[..128]).is_none());
    assert!(quantize(GgmlType::Q5_K, &input[..256]).is_none());
}

/// As ggml's `quantize_row_*_ref` of llama-cpp-python 0.3.36. That build fuses multiplications and additions, so a few
/// blocks have other codes; the values are as near to the input.
#[test]
fn k_blocks_are_written_as_near_as_ggmls() {
    let golden = SafetensorsFile::open(&golden("gguf_encode.safetensors")).unwrap();
    let input = golden.tensor("input", Tag::Workspace).unwrap();
    let input = &input.as_slice::<f32>().unwrap()[..26 * 256];
    for kind in [GgmlType::Q4_K, GgmlType::Q6_K] {
        let found = quantize(kind, input).unwrap();
        let expected = golden.view(&kind.to_string()).unwrap().bytes;
        assert_eq!(found.len(), expected.len());
        let same = found.chunks(kind.bytes).zip(expected.chunks(kind.bytes)).filter(|(a, b)| a == b).count();
        let blocks = found.len() / kind.bytes;
        assert!(same * 10 >= blocks * 9, "{kind}: {same} of {blocks} blocks are the same");
        let values = |bytes: &[u8]| {
            let mut out = vec![0.0; input.len()];
            assert!(dequantize(kind, bytes, &mut out));
            out
        };
        let error = |values: &[f32]| -> f64 {
            values.iter().zip(input).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>().sqrt()
        };
        let (ours, theirs) = (error(&values(&found)), error(&values(expected)));
        assert!(ours <= 1.000_01 * theirs, "{kind}: {ours} and {theirs}");
    }
}

#[test]
fn metadata_is_read_by_type() {
    let strings = [string("a"), string("é"), string("")].concat();
    let numbers: Vec<u8> = [1i32, -2].iter().flat_map(|x| x.to_le_bytes()).collect();
    let floats: Vec<u8> = [0.5f32, -1.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let file = Builder::new()
        .str("s", "text")
        .u32("u", 7)
        .raw("u64", 10, &(1u64 << 40).to_le_bytes())
        .raw("i8", 1, &[255])
        .f32("f", 1.5)
        .raw("b", 7, &[1])
        .array("strings", 8, 3, &strings)
        .array("ints", 5, 2, &numbers)
        .array("floats", 6, 2, &floats)
        .build();
    let file = open(&file).unwrap();
    assert_eq!(file.get_str("s"), Some("text"));
    assert_eq!((file.get_u32("u"), file.get_u32("u64"), file.get_u64("u64")), (Some(7), None, Some(1 << 40)));
    assert_eq!((file.get_u32("i8"), file.get_f32("f"), file.get_bool("b")), (None, Some(1.5), Some(true)));
    assert_eq!(file.get_str_array("strings").unwrap(), ["a", "é", ""]);
    assert_eq!(file.get_i32_array("ints").unwrap(), [1, -2]);
    assert_eq!(file.get_f32_array("floats").unwrap(), [0.5, -1.0]);
    assert_eq!(file.array_len("strings"), Some(3));
    // Another type than asked for is as good as absent.
    assert_eq!((file.get_str("u"), file.get_u32("s"), file.get_f32("u"), file.get_bool("u")), (None, None, None, None));
    assert!(file.get_str_array("ints").is_none() && file.get_f32_array("ints").is_none() && !file.has_key("none"));
}

/// Rows of q or k as GGUF has them: the two halves of every head interleaved.
fn permute(values: &[f32], heads: usize, columns: usize) -> Vec<f32> {
    let dim = values.len() / heads / columns;
    let mut out = Vec::new();
    for row in 0..heads * dim {
        let (head, within) = (row / dim, row % dim);
        let source = head * dim + within % 2 * (dim / 2) + within / 2;
        out.extend(&values[source * columns..][..columns]);
    }
    out
}

fn rope_divisors(original: f32) -> Vec<u8> {
    let one = |i: usize| {
        let wavelength = std::f32::consts::TAU * 500_000f32.powf(i as f32 / 16.0);
        let smooth = (original / wavelength - 1.0) / 3.0;
        1.0 / ((1.0 - smooth.clamp(0.0, 1.0)) / 8.0 + smooth.clamp(0.0, 1.0))
    };
    (0..16).flat_map(|i| one(i).to_le_bytes()).collect()
}

/// The golden Llama as a GGUF, its bf16 values stored as `kind`: 0 (F32), 1 (F16) or 30 (BF16).
fn llama(kind: u32, head: bool) -> Builder {
    let model = SafetensorsFile::open(&golden("gqa_llama3rope/model/model.safetensors")).unwrap();
    let mut builder = Builder::new()
        .str("general.architecture", "llama")
        .u32("llama.context_length", 512)
        .u32("llama.embedding_length", 128)
        .u32("llama.feed_forward_length", 384)
        .u32("llama.block_count", 3)
        .u32("llama.attention.head_count", 4)
        .u32("llama.attention.head_count_kv", 2)
        .u32("llama.rope.dimension_count", 32)
        .f32("llama.rope.freq_base", 500_000.0)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .tensor("rope_freqs.weight", &[16], 0, rope_divisors(64.0));
    for name in model.names().into_iter().filter(|name| head || name != "lm_head.weight") {
        let tensor = model.tensor(&name, Tag::Workspace).unwrap();
        let mut values = tensor.to_f32().unwrap().into_owned();
        if name.contains("q_proj") {
            values = permute(&values, 4, 128);
        } else if name.contains("k_proj") {
            values = permute(&values, 2, 128);
        }
        let bytes = match kind {
            0 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            1 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        };
        builder = builder.tensor(&gguf_name(&name).unwrap(), tensor.shape(), kind, bytes);
    }
    builder
}

#[test]
fn a_llama_reads_as_its_hugging_face_folder_does() {
    let folder = tempfile::tempdir().unwrap();
    let reference = Checkpoint::open(&golden("gqa_llama3rope/model")).unwrap();
    for kind in [0, 30] {
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, llama(kind, true).build()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.kind(), CheckpointKind::Gguf);
        assert_eq!(checkpoint.config(), reference.config());
        assert_eq!(checkpoint.names(), reference.names());
        assert!(checkpoint.gguf().is_some());
        for name in reference.names() {
            let shape = reference.shards().unwrap().view(&name).unwrap().shape.to_vec();
            let read = |from: &Checkpoint| match from.weight(&name, &shape, Tag::Weights).unwrap() {
                CheckpointTensor::Dense(tensor) => tensor.to_f32().unwrap().into_owned(),
                CheckpointTensor::Quantized(_) => panic!("{name} is not quantized"),
            };
            assert!(read(&checkpoint) == read(&reference), "{name}");
            checkpoint.release_pages();
        }
        let wrong = checkpoint.weight("model.norm.weight", &[64], Tag::Weights).unwrap_err();
        assert!(wrong.to_string().contains("shape [128]") && wrong.to_string().contains("[64]"), "{wrong}");
        assert!(describe(&path).unwrap().contains("Llama3"));
    }
    let path = folder.path().join("tied.gguf");
    std::fs::write(&path, llama(1, false).build()).unwrap();
    let tied = Checkpoint::open(&path).unwrap();
    assert!(tied.config().tie_word_embeddings && !tied.has("lm_head.weight"));
}

/// The configuration error of the golden Llama after a change.
fn config_error(change: impl FnOnce(Builder) -> Builder) -> Error {
    open(&change(llama(30, true)).build()).unwrap().llama_config().unwrap_err()
}

#[test]
fn what_nibble_does_not_run_is_named() {
    let unsupported = |change: fn(Builder) -> Builder, part: &str| {
        let error = config_error(change);
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(part), "{error}");
    };
    unsupported(|b| b.tensor("blk.0.attn_q.bias", &[32], 0, vec![0; 128]), "blk.0.attn_q.bias");
    unsupported(|b| b.u32("llama.expert_count", 8), "8 experts");
    unsupported(|b| b.str("llama.rope.scaling.type", "yarn"), "yarn");
    unsupported(|b| b.str("general.type", "adapter"), "adapter");
    unsupported(|b| b.u32("llama.attention.value_length", 64), "value_length");
    unsupported(
        |b| b.str("llama.rope.scaling.type", "linear").f32("llama.rope.scaling.factor", 2.0),
        "on top of linear",
    );
    let mut without = llama(30, true);
    without.tensors.retain(|(name, ..)| name != "token_embd.weight");
    assert!(matches!(open(&without.build()).unwrap().llama_config(), Err(Error::Mismatch { .. })));
    let other = Builder::new().str("general.architecture", "qwen2").build();
    let error = open(&other).unwrap().llama_config().unwrap_err();
    assert!(error.to_string().contains("qwen2"), "{error}");

    let q2 = Builder::new().tensor("t", &[256], 10, vec![0; 84]).build();
    let error = open(&q2).unwrap().tensor("t", Tag::Weights).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("Q2_K"), "{error}");
    let unknown = Builder::new().tensor("t", &[256], 4, vec![0; 84]).build();
    assert!(matches!(open(&unknown), Err(Error::Unsupported { .. })));
    for version in [1, 4, 3u32.swap_bytes()] {
        let file = Builder { version, ..Builder::new() }.build();
        assert!(matches!(open(&file), Err(Error::Unsupported { .. })), "{version}");
    }
    assert!(open(&Builder { version: 2, ..Builder::new() }.build()).is_ok());
}

#[test]
fn linear_rotary_scaling_is_read() {
    let mut builder = llama(30, true).str("llama.rope.scaling.type", "linear").f32("llama.rope.scaling.factor", 2.0);
    builder.tensors.retain(|(name, ..)| name != "rope_freqs.weight");
    let config: LlamaConfig = open(&builder.build()).unwrap().llama_config().unwrap();
    assert_eq!(config.rope.scaling, RopeScaling::Linear { factor: 2.0 });
}

#[test]
fn lying_headers_are_refused() {
    let refused = |name: &str, bytes: &[u8]| match open(bytes) {
        Err(Error::File { .. }) => {}
        other => panic!("{name}: {:?}", other.map(|_| ())),
    };
    let header = |tensors: u64, keys: u64| {
        [&b"GGUF"[..], &3u32.to_le_bytes(), &tensors.to_le_bytes(), &keys.to_le_bytes()].concat()
    };
    refused("empty", b"");
    refused("other magic", b"GGML0000000000000000000000000000");
    refused("huge key count", &header(0, u64::MAX));
    refused("huge tensor count", &header(u64::MAX, 0));
    let long = [header(0, 1), u64::MAX.to_le_bytes().to_vec()].concat();
    refused("huge string", &long);
    for (kind, count) in [(8, u64::MAX), (8, 1 << 40), (10, u64::MAX), (4, 1 << 62), (0, u64::MAX), (9, 1), (13, 1)] {
        refused("array", &Builder::new().array("k", kind, count, &[0; 64]).build());
    }
    refused("unknown value type", &Builder::new().raw("k", 13, &[0; 8]).build());
    refused("a bool of 2", &Builder::new().raw("k", 7, &[2]).build());
    refused("not UTF-8", &Builder::new().raw("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]).build());
    refused("a key twice", &Builder::new().u32("k", 1).u32("k", 1).build());
    let tensor = |shape: &[usize], kind, bytes| Builder::new().tensor("t", shape, kind, bytes);
    refused("five dimensions", &tensor(&[1; 5], 0, vec![0; 4]).build());
    refused("dimensions overflow", &tensor(&[usize::MAX, 8], 0, vec![0; 4]).build());
    refused("size overflows", &tensor(&[usize::MAX], 0, vec![0; 4]).build());
    refused("beyond the file", &tensor(&[1 << 40], 0, vec![0; 4]).build());
    refused("part of a block", &tensor(&[33], 8, vec![0; 34]).build());
    refused("a tensor twice", &tensor(&[1], 0, vec![0; 4]).tensor("t", &[1], 0, vec![0; 4]).build());
    for alignment in [0, 3, 48] {
        refused("alignment", &tensor(&[1], 0, vec![0; 4]).u32("general.alignment", alignment).build());
    }
    refused("alignment", &tensor(&[1], 0, vec![0; 4]).u32("general.alignment", 1 << 31).build());
    refused("alignment", &tensor(&[1], 0, vec![0; 4]).str("general.alignment", "32").build());

    // Two tensors of 64 bytes; the second one's offset is the last eight bytes before the padding.
    let two = tensor(&[16], 0, vec![1; 64]).tensor("u", &[16], 0, vec![2; 64]).build();
    let at = two.windows(8).rposition(|bytes| bytes == 64u64.to_le_bytes()).unwrap();
    let with_offset = |offset: u64| [&two[..at], &offset.to_le_bytes(), &two[at + 8..]].concat();
    assert_eq!(open(&with_offset(64)).unwrap().tensor("u", Tag::Workspace).unwrap().bytes().unwrap(), [2; 64]);
    refused("overlap", &with_offset(32));
    refused("same place", &with_offset(0));
    refused("not aligned", &with_offset(63));
    refused("offset overflow", &with_offset(u64::MAX - 31));
    refused("truncated", &two[..two.len() - 1]);
}

/// Everything that a reader of a damaged file may call; none may panic.
fn exercise(bytes: &[u8]) {
    let Ok(file) = open(bytes) else { return };
    let _ = file.llama_config();
    for key in file.keys().map(str::to_string).collect::<Vec<_>>() {
        let _ = (file.get_str(&key), file.get_u32(&key), file.get_f32(&key), file.get_bool(&key));
        let _ = (file.get_str_array(&key), file.get_i32_array(&key), file.get_f32_array(&key));
    }
    let mut total = 0;
    for (name, info) in file.tensors() {
        total += info.size_bytes();
        let tensor: Result<Tensor, _> = file.tensor(name, Tag::Workspace);
        assert_eq!(tensor.is_ok(), info.kind.is_readable());
    }
    assert!(total <= bytes.len());
}

fn small() -> Builder {
    let tokens = [string("a"), string("b")].concat();
    Builder::new()
        .str("general.architecture", "llama")
        .u32("llama.context_length", 512)
        .u32("llama.embedding_length", 32)
        .u32("llama.feed_forward_length", 64)
        .u32("llama.block_count", 1)
        .u32("llama.attention.head_count", 2)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .array("tokenizer.ggml.tokens", 8, 2, &tokens)
        .tensor("token_embd.weight", &[2, 32], 8, vec![1; 68])
        .tensor("blk.0.attn_q.weight", &[32, 32], 2, vec![3; 18 * 32])
        .tensor("output_norm.weight", &[32], 0, vec![0; 128])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_files_never_panic(cut in 0.0..1.0, at in 0.0..1.0, bit in 0u32..8, word in any::<u64>()) {
        let whole = small().build();
        prop_assert!(open(&whole).unwrap().llama_config().is_ok());
        prop_assert!(open(&whole[..(cut * (whole.len() - 32) as f64) as usize]).is_err());
        // Most of the header is in the first part.
        let at = (at * at * (whole.len() - 8) as f64) as usize;
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << bit;
        exercise(&flipped);
        let mut overwritten = whole;
        overwritten[at..at + 8].copy_from_slice(&word.to_le_bytes());
        exercise(&overwritten);
    }

    #[test]
    fn any_bytes_are_handled(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        exercise(&[&b"GGUF\x03\0\0\0"[..], &bytes].concat());
        exercise(&bytes);
    }
}
