//! merge and export-gguf: the logits of what they write are those of base and adapter.

use crate::support::{Place, golden};
use nibble_models::files::{gguf::GgufFile, safetensors::SafetensorsFile};
use nibble_runtime::Tag;

const IDS: &str = "1,17,300,5,42,42,7,211,99,450,3,128";

fn logits(place: &Place, args: &[&str]) -> Vec<f32> {
    place
        .ok(&[&["logits", "--quant", "none", "--dtype", "f32", "--ids", IDS, "--out", "l.safetensors"], args].concat());
    let tensor = SafetensorsFile::open(&place.path("l.safetensors")).unwrap().tensor("logits", Tag::Workspace).unwrap();
    tensor.as_slice::<f32>().unwrap().to_vec()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// A place with a model in f32 ("texts"), and adapters "one" and "two" that change its logits by more than 0.1.
fn trained() -> Place {
    let place = Place::new();
    place.model_with_text();
    for (run, seed) in [("one", "1"), ("two", "2")] {
        place.train(run, &["--lr", "0.05", "--seed", seed, "--steps", "4"]);
    }
    place
}

/// The value behind the last "by" or "of" that precedes `after` in a report of what was lost.
fn loss(stderr: &str) -> (f32, f32) {
    let line = stderr.lines().find(|line| line.starts_with("lossy")).expect("what was lost is said");
    let words: Vec<&str> = line.split([' ', ',']).collect();
    let numbers: Vec<f32> =
        words.iter().filter(|word| word.contains('e')).filter_map(|word| word.parse().ok()).collect();
    (numbers[0], numbers[1])
}

#[test]
fn a_merged_folder_is_base_and_adapter() {
    let place = trained();
    let base = logits(&place, &["--model", "texts"]);
    let expected = logits(&place, &["--model", "texts", "--adapter", "one/adapter"]);
    assert!(largest_difference(&base, &expected) > 0.1);
    for (dtype, tolerance) in [("f32", 1e-4), ("f16", 2e-2), ("bf16", 1e-1)] {
        let merge = ["merge", "--model", "texts", "--adapter", "one/adapter", "--dtype", dtype, "--out", dtype];
        let (largest, relative) = loss(&place.ok(&merge).stderr);
        let difference = largest_difference(&logits(&place, &["--model", dtype]), &expected);
        assert!(difference <= tolerance, "{dtype}: {difference}");
        assert_eq!((largest == 0.0, relative == 0.0), (dtype == "f32", dtype == "f32"), "{dtype}");
        assert!(relative < 5e-3, "{relative}");
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            assert_eq!(place.bytes(&format!("{dtype}/{name}")), place.bytes(&format!("texts/{name}")));
        }
        place.refuses(&merge, &["already holds a model", dtype]);
    }
    // What was not adapted keeps its bytes where the type is the model's.
    let file = |name: &str| SafetensorsFile::open(&place.path(&format!("{name}/model.safetensors"))).unwrap();
    let (ours, theirs) = (file("bf16"), file("texts"));
    assert_eq!(ours.names().len(), theirs.names().len());
    for name in theirs.names().iter().filter(|name| !name.contains("_proj")) {
        assert!(ours.view(name).unwrap().bytes == theirs.view(name).unwrap().bytes, "{name}");
    }
}

#[test]
fn weights_of_adapters_add_their_effects() {
    let place = trained();
    let model = ["--model", "texts", "--dtype", "f32"];
    let merge = |out: &str, adapters: &[&str]| {
        let adapters: Vec<&str> = adapters.iter().flat_map(|adapter| ["--adapter", adapter]).collect();
        place.ok(&[&["merge", "--out", out][..], &model, &adapters].concat());
        let file = SafetensorsFile::open(&place.path(&format!("{out}/model.safetensors"))).unwrap();
        let tensor = file.tensor("model.layers.1.mlp.up_proj.weight", Tag::Workspace).unwrap();
        tensor.as_slice::<f32>().unwrap().to_vec()
    };
    let base = merge("none", &["one/adapter:0"]);
    let (one, two) = (merge("one-merged", &["one/adapter"]), merge("two-merged", &["two/adapter:1"]));
    let both = merge("both", &["one/adapter:0.5", "two/adapter:-2"]);
    let worst = (0..base.len()).map(|i| both[i] - base[i] - 0.5 * (one[i] - base[i]) + 2.0 * (two[i] - base[i]));
    let worst = worst.map(f32::abs).fold(0.0, f32::max);
    assert!(worst < 1e-6, "{worst}");
    assert!(largest_difference(&one, &base) > 1e-3);
}

#[test]
fn a_merged_model_can_be_in_shards_and_combined_by_rules() {
    let place = trained();
    let merge = |out: &str, options: &[&str]| {
        let model = ["--model", "texts", "--dtype", "f32", "--adapter", "one/adapter", "--adapter", "two/adapter:0.5"];
        place.ok(&[&["merge", "--out", out][..], &model, options].concat()).stderr
    };
    merge("whole", &[]);
    merge("shards", &["--max-shard", "300KiB"]);
    let index: serde_json::Value = serde_json::from_str(&place.read("shards/model.safetensors.index.json")).unwrap();
    let whole = SafetensorsFile::open(&place.path("whole/model.safetensors")).unwrap();
    let files: std::collections::BTreeSet<&str> =
        index["weight_map"].as_object().unwrap().values().map(|file| file.as_str().unwrap()).collect();
    assert!(files.len() > 4 && !place.path("shards/model.safetensors").exists(), "{files:?}");
    let mut bytes = 0;
    for name in whole.names() {
        let file = place.path("shards").join(index["weight_map"][&name].as_str().unwrap());
        let view = SafetensorsFile::open(&file).unwrap();
        assert!(view.view(&name).unwrap().bytes == whole.view(&name).unwrap().bytes, "{name}");
        bytes += view.view(&name).unwrap().bytes.len();
        assert!(view.names().len() == 1 || std::fs::metadata(file).unwrap().len() < 310 << 10);
    }
    assert_eq!(index["metadata"]["total_size"].as_u64(), Some(bytes as u64));
    assert_eq!(logits(&place, &["--model", "shards"]), logits(&place, &["--model", "whole"]));
    // The rules differ, each from each; what they compute is checked where they are defined.
    let mut seen = vec![logits(&place, &["--model", "whole"])];
    for rule in ["ties", "dare_linear", "dare_ties"] {
        merge(rule, &["--combine", rule, "--density", "0.4", "--seed", "7"]);
        let found = logits(&place, &["--model", rule]);
        assert!(seen.iter().all(|other| largest_difference(other, &found) > 1e-3), "{rule}");
        seen.push(found);
    }
    merge("again", &["--combine", "dare_ties", "--density", "0.4", "--seed", "7"]);
    assert!(place.bytes("again/model.safetensors") == place.bytes("dare_ties/model.safetensors"));
}

/// What llama.cpp would add to its weights, `α/r · B·A` with the rows of q and k in its order, is what a merged file has.
#[test]
fn an_adapter_alone_is_what_merging_adds() {
    let place = trained();
    place.train("scaled", &["--rslora", "--alpha", "5", "--rank-pattern", "k_proj=3", "--steps", "2", "--lr", "0.05"]);
    for adapter in ["one/adapter", "scaled/adapter"] {
        let export = |out: &str, options: &[&str]| {
            place.ok(&[&["export-gguf", "--model", "texts", "--type", "f32", "--out", out][..], options].concat());
            GgufFile::open(&place.path(out)).unwrap()
        };
        let name = adapter.replace('/', "-");
        let lora = export(&format!("{name}-lora.gguf"), &["--adapter", adapter, "--lora"]);
        let merged = export(&format!("{name}-merged.gguf"), &["--adapter", adapter]);
        let base = export(&format!("{name}-base.gguf"), &[]);
        assert_eq!(lora.get_str("general.type"), Some("adapter"));
        assert_eq!(lora.get_str("adapter.type"), Some("lora"));
        let alpha = lora.get_f32("adapter.lora.alpha").unwrap();
        assert_eq!(lora.tensors().count(), 2 * 21);
        let values = |file: &GgufFile, name: &str| {
            let tensor = file.tensor(name, Tag::Workspace).unwrap();
            (tensor.shape().to_vec(), tensor.as_slice::<f32>().unwrap().to_vec())
        };
        for tensor in ["blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.2.ffn_down.weight"] {
            let ((shape, a), (_, b)) =
                (values(&lora, &format!("{tensor}.lora_a")), values(&lora, &format!("{tensor}.lora_b")));
            let ((_, merged), (_, base)) = (values(&merged, tensor), values(&base, tensor));
            let (r, k) = (shape[0], shape[1]);
            for (i, (m, w)) in merged.iter().zip(&base).enumerate() {
                let product: f32 = (0..r).map(|j| b[i / k * r + j] * a[j * k + i % k]).sum();
                assert!((w + alpha / r as f32 * product - m).abs() < 1e-6, "{adapter} {tensor} {i}");
            }
        }
    }
    let refuses = |args: &[&str], words: &[&str]| {
        place.refuses(&[&["export-gguf", "--model", "texts", "--lora", "--out", "x.gguf"][..], args].concat(), words);
    };
    refuses(&[], &["--adapter"]);
    refuses(&["--adapter", "one/adapter", "--adapter", "two/adapter"], &["one"]);
    refuses(&["--adapter", "one/adapter", "--type", "q8_0"], &["f32, f16 or bf16"]);
    place.train("dora", &["--dora", "--steps", "1"]);
    refuses(&["--adapter", "dora/adapter"], &["DoRA", "merge"]);
}

#[test]
fn a_merged_model_can_be_quantized_again() {
    let place = trained();
    place.ok(&["merge", "--model", "texts", "--adapter", "one/adapter", "--out", "dense"]);
    let merge = ["merge", "--model", "texts", "--adapter", "one/adapter", "--quant", "nf4", "--out", "nf4"];
    let (_, relative) = loss(&place.ok(&merge).stderr);
    assert!((0.05..0.12).contains(&relative), "NF4 loses about 9 %: {relative}");
    place.ok(&["quantize", "--model", "dense", "--out", "expected"]);
    for name in ["model.safetensors", "config.json"] {
        assert!(place.bytes(&format!("nf4/{name}")) == place.bytes(&format!("expected/{name}")), "{name}");
    }
    // A 4-bit base is dequantized.
    place.ok(&["merge", "--model", "nf4", "--adapter", "two/adapter:0", "--dtype", "f32", "--out", "back"]);
    let difference = largest_difference(&logits(&place, &["--model", "back"]), &logits(&place, &["--model", "nf4"]));
    assert!(difference <= 1e-4, "{difference}");
}

#[test]
fn a_gguf_file_is_base_and_adapter() {
    let place = trained();
    let expected = logits(&place, &["--model", "texts", "--adapter", "one/adapter"]);
    for (kind, tolerance) in [
        ("f32", 1e-4),
        ("f16", 2e-2),
        ("bf16", 1e-1),
        ("q8_0", 0.3),
        // Rows of 128 are no whole blocks of 256: written as Q8_0 and Q5_0.
        ("q6_k", 0.3),
        ("q5_0", 2.0),
        ("q4_k", 2.0),
        ("q4_0", 4.0),
    ] {
        let out = format!("{kind}.gguf");
        let export = ["export-gguf", "--model", "texts", "--adapter", "one/adapter", "--type", kind, "--out", &out];
        let (_, relative) = loss(&place.ok(&export).stderr);
        let difference = largest_difference(&logits(&place, &["--model", &out]), &expected);
        assert!(difference <= tolerance, "{kind}: {difference}");
        let bound = match kind {
            "f32" => 0.0,
            "f16" => 5e-4,
            "bf16" => 4e-3,
            "q8_0" | "q6_k" => 1e-2,
            "q5_0" | "q4_k" => 0.06,
            _ => 0.12,
        };
        assert!(relative <= bound && (relative > bound / 10.0 || kind == "f32"), "{kind}: {relative}");
        place.refuses(&export, &["exists already"]);
    }
    // The settings and the tokenizer come back: rotary scaling in "rope_freqs", ids and template in the header.
    let gguf = GgufFile::open(&place.path("f32.gguf")).unwrap();
    let folder = nibble_models::files::checkpoint::Checkpoint::open(&place.path("texts")).unwrap();
    let (ours, theirs) = (gguf.llama_config().unwrap(), folder.config());
    assert_eq!((ours.rope, ours.vocab_size, ours.head_dim), (theirs.rope, theirs.vocab_size, theirs.head_dim));
    assert_eq!(gguf.array_len("tokenizer.ggml.tokens"), Some(512));
    let generate = |model: &str| {
        let args = ["generate", "--quant", "none", "--max-tokens", "9", "--chat", "--prompt", "héllo"];
        place.ok(&[&args[..], &["--model", model]].concat()).stdout
    };
    place.ok(&["merge", "--model", "texts", "--adapter", "one/adapter", "--dtype", "f32", "--out", "dense"]);
    assert_eq!(generate("f32.gguf"), generate("dense"));
    // And from one GGUF to another.
    place.ok(&["export-gguf", "--model", "f32.gguf", "--type", "f32", "--out", "again.gguf"]);
    assert_eq!(logits(&place, &["--model", "again.gguf"]), logits(&place, &["--model", "f32.gguf"]));
    assert_eq!(generate("again.gguf"), generate("dense"));
}

#[test]
fn what_cannot_be_merged_is_named() {
    let place = trained();
    let refuses = |args: &[&str], words: &[&str]| place.refuses(args, words);
    let merge = ["merge", "--model", "texts", "--out", "m"];
    refuses(&merge, &["--adapter"]);
    refuses(&[&merge[..], &["--adapter", "texts"]].concat(), &["adapter_config.json"]);
    refuses(&[&merge[..], &["--adapter", "one/adapter:NaN"]].concat(), &["DIR:WEIGHT"]);
    refuses(&[&merge[..], &["--adapter", "one/adapter", "--block-size", "48", "--quant", "nf4"]].concat(), &["48"]);
    let other = ["merge", "--out", "m", "--adapter", "one/adapter", "--model"];
    place.write("tiny.gguf", crate::gguf::tiny("llama"));
    refuses(&[&other[..], &["tiny.gguf"]].concat(), &["another model", "tiny.gguf"]);
    let export = ["export-gguf", "--out", "m.gguf", "--model"];
    refuses(&[&export[..], &["texts", "--type", "q2_k"]].concat(), &["q8_0", "q2_k"]);
    refuses(&[&export[..], &[golden("model").to_str().unwrap()]].concat(), &["tokenizer.json"]);
}
