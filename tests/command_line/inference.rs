//! The commands that only run a model: generate, eval, logits, quantize, inspect.

use crate::{
    gguf,
    support::{Place, golden},
};
use nibble_models::files::safetensors::SafetensorsFile;
use nibble_runtime::Tag;
use serde_json::Value;
use std::path::Path;

fn floats(path: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensor = SafetensorsFile::open(path).unwrap().tensor(name, Tag::Workspace).unwrap();
    (tensor.shape().to_vec(), tensor.as_slice::<f32>().unwrap().to_vec())
}

fn golden_row() -> (String, Vec<f32>) {
    let file = golden("golden.safetensors");
    let ids = SafetensorsFile::open(&file).unwrap().tensor("ids", Tag::Workspace).unwrap();
    let ids: Vec<String> = ids.as_slice::<i64>().unwrap()[..48].iter().map(i64::to_string).collect();
    (ids.join(","), floats(&file, "logits").1[..48 * 512].to_vec())
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn logits_are_the_references() {
    let place = Place::new();
    let (ids, expected) = golden_row();
    let model = golden("model");
    let common = ["logits", "--model", model.to_str().unwrap(), "--ids", &ids];
    let ran = place.ok(&[&common[..], &["--quant", "none", "--dtype", "f32", "--out", "plain.safetensors"]].concat());
    assert_eq!(ran.stdout, "");
    let (shape, found) = floats(&place.path("plain.safetensors"), "logits");
    assert_eq!(shape, [1, 48, 512]);
    let difference = largest_difference(&found, &expected);
    assert!(difference < 1e-4, "{difference}");
    place.ok(&[&common[..], &["--out", "nf4.safetensors"]].concat());
    let difference = largest_difference(&floats(&place.path("nf4.safetensors"), "logits").1, &expected);
    assert!(difference > 1e-2, "NF4 is the default and changes the logits; they differ by {difference}");
}

/// In bf16: dequantized weights of a folder have the type of those that it was made from, which is then that of both.
#[test]
fn a_quantized_folder_gives_the_logits_of_quantizing_on_the_fly() {
    let place = Place::new();
    let model = golden("model");
    let model = model.to_str().unwrap();
    for (options, folder) in
        [(&[][..], "nf4"), (&["--quant", "fp4", "--no-double-quant", "--block-size", "128"], "fp4")]
    {
        place.ok(&[&["quantize", "--model", model, "--out", folder], options].concat());
        let logits = |model: &str, options: &[&str]| {
            place.ok(&[
                &["logits", "--model", model, "--dtype", "bf16", "--ids", "1,2,3,400", "--out", "l.safetensors"],
                options,
            ]
            .concat());
            floats(&place.path("l.safetensors"), "logits").1
        };
        // The folder says how it is quantized; to say it again changes nothing.
        let on_the_fly = logits(model, options);
        for options in [&[][..], &["--quant", folder]] {
            let difference = largest_difference(&logits(folder, options), &on_the_fly);
            assert!(difference == 0.0, "{folder}: {difference}");
        }
    }
    for (folder, kind) in [
        ("nf4", "21: nf4 in blocks of 64, double quantization in blocks of 256"),
        ("fp4", "21: fp4 in blocks of 128, scales in f32"),
    ] {
        let description = place.ok(&["inspect", folder]).stdout;
        assert!(description.contains(&format!("4-bit weights  {kind}\n")), "{description}");
        let line = place.ok(&["logits", "--model", folder, "--ids", "1", "--out", "l.safetensors"]).stderr;
        assert!(line.contains(&format!("in linear layers, {folder}:")), "{line}");
    }
}

/// The dtype that weights are rounded to is the checkpoint's own; the codes are bitsandbytes' on a CPU.
#[test]
fn quantize_gives_the_codes_of_bitsandbytes() {
    let place = Place::new();
    place.ok(&["quantize", "--model", golden("model").to_str().unwrap(), "--out", "nf4"]);
    let ours = SafetensorsFile::open(&place.path("nf4/model.safetensors")).unwrap();
    let theirs = SafetensorsFile::open(&golden("model-bnb4/model.safetensors")).unwrap();
    let is_part = |name: &String| name.contains("_proj.") && !name.contains("quant_state");
    let parts: Vec<String> = ours.names().into_iter().filter(is_part).collect();
    assert_eq!(parts.len(), 21 * 5);
    for name in parts {
        assert!(ours.view(&name).unwrap().bytes == theirs.view(&name).unwrap().bytes, "{name}");
    }
}

#[cfg(unix)]
#[test]
fn quantized_folders_can_be_read_by_whoever_reads_new_files() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    place.model_with_text();
    let new = place.write("new", "");
    place.ok(&["quantize", "--model", "texts", "--out", "nf4"]);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
    let files: Vec<_> = std::fs::read_dir(place.path("nf4")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 4, "{files:?}");
    for file in files {
        assert_eq!(mode(&file), mode(&new), "{}", file.display());
    }
}

#[test]
fn generation_is_a_function_of_its_arguments() {
    let place = Place::new();
    place.model_with_text();
    let generate = |extra: &[&str]| {
        place
            .ok(&[&["generate", "--model", "texts", "--prompt", "abc", "--max-new-tokens", "12"], extra].concat())
            .stdout
    };
    let greedy = generate(&[]);
    assert!(greedy.starts_with("abc") && greedy.ends_with('\n'), "{greedy:?}");
    assert_eq!(generate(&[]), greedy);
    assert_eq!(generate(&["--temperature", "5", "--top-k", "1"]), greedy);
    let drawn = generate(&["--temperature", "5", "--seed", "1"]);
    assert_eq!(generate(&["--temperature", "5", "--seed", "1"]), drawn);
    assert_ne!(generate(&["--temperature", "5", "--seed", "2"]), drawn);
    let chat = generate(&["--chat"]);
    assert_eq!(generate(&["--chat"]), chat);
    assert!(!chat.starts_with("abc") && !chat.contains("[user]"), "the answer alone: {chat:?}");
}

#[test]
fn evaluation_gives_numbers_to_people_and_to_programs() {
    let place = Place::new();
    place.model_with_text();
    place.write("d.jsonl", "{\"prompt\":\"ab\",\"completion\":\"cd\"}\n{\"prompt\":\"x\",\"completion\":\"yz\"}\n");
    let eval = |extra: &[&str]| place.ok(&[&["eval", "--model", "texts", "--data", "d.jsonl"], extra].concat()).stdout;
    let result: Value = serde_json::from_str(&eval(&["--json"])).unwrap();
    // Two bytes and the end, twice.
    assert_eq!((result["examples"].as_u64(), result["tokens"].as_u64()), (Some(2), Some(6)));
    let (nll, perplexity) = (result["nll"].as_f64().unwrap(), result["perplexity"].as_f64().unwrap());
    assert!(nll > 5.0 && (perplexity / nll.exp() - 1.0).abs() < 1e-12, "{result}");
    assert_eq!(result["exact_match"].as_f64(), Some(0.0));
    let text = eval(&[]);
    for line in
        ["examples     2", "tokens       6", &format!("mean NLL     {nll:.6}"), "perplexity", "exact match  0.00 %"]
    {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[test]
fn everything_can_be_inspected() {
    let place = Place::new();
    let inspect = |path: &Path| place.ok(&["inspect", path.to_str().unwrap()]).stdout;
    let file = place.write("tiny.gguf", gguf::tiny("llama"));
    place
        .write("pairs.jsonl", "{\"prompt\":\"one\",\"completion\":\"two\"}\n{\"prompt\":\"3\",\"completion\":\"4\"}\n");
    place.write(
        "chat.jsonl",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"},{\"role\":\"assistant\",\"content\":\"yo\"}]}",
    );
    place.write("prose.txt", "line one\nline two\n");
    for (path, words) in [
        (golden("model"), &["512", "128", "tensors", "BF16"][..]),
        (golden("model-bnb4"), &["4-bit weights  21: nf4 in blocks of 64, double", "U8"]),
        (golden("adapter-init"), &["rank", "q_proj"]),
        (golden("golden.safetensors"), &["tensors", "F32"]),
        (file, &["F32", "layers", "gpt2"]),
        (place.path("pairs.jsonl"), &["{\"prompt\",\"completion\"}", "rows           2", "\"one\"", "\"two\""]),
        (place.path("chat.jsonl"), &["messages", "rows           1", "user", "\"hi\"", "assistant", "\"yo\""]),
        (place.path("prose.txt"), &["plain text", "lines          2", "line one"]),
        (place.ids(), &["input_ids", "rows           8", "12 tokens"]),
    ] {
        let text = inspect(&path);
        for word in words {
            assert!(text.to_lowercase().contains(&word.to_lowercase()), "{}: no {word:?} in\n{text}", path.display());
        }
    }
}

/// From a GGUF file with its own tokenizer to an adapter, and back to text.
#[test]
fn a_gguf_file_runs_through_every_command() {
    let place = Place::new();
    place.write("tiny.gguf", gguf::tiny("llama"));
    place.write("d.jsonl", "{\"prompt\":\"ab\",\"completion\":\"ba\"}\n{\"text\":\"never reached\"}\n");
    place.refuses(&["eval", "--model", "tiny.gguf", "--data", "d.jsonl"], &["d.jsonl:2:", "prompt"]);
    place.write("d.jsonl", "{\"prompt\":\"ab\",\"completion\":\"ba\"}\n");
    let train = [
        "--model",
        "tiny.gguf",
        "--data",
        "d.jsonl",
        "--out",
        "run",
        "--steps",
        "100",
        "--lr",
        "0.01",
        "--dropout",
        "0",
    ];
    place.ok(&[&train[..], &["--grad-accum", "1", "--eval-data", "d.jsonl"]].concat());
    let adapter = ["--model", "tiny.gguf", "--adapter", "run/adapter"];
    let text = place.ok(&[&["generate", "--prompt", "ab"], &adapter[..]].concat()).stdout;
    assert_eq!(text, "abba\n");
    let eval = place.ok(&[&["eval", "--data", "d.jsonl"], &adapter[..]].concat()).stdout;
    assert!(eval.contains("exact match  100.00 %"), "{eval}");
    place.ok(&["quantize", "--model", "tiny.gguf", "--out", "folder"]);
    let folder = ["--model", "folder", "--adapter", "run/adapter"];
    assert_eq!(place.ok(&[&["generate", "--prompt", "ab"], &folder[..]].concat()).stdout, "abba\n");
}
