//! Mistakes: each is refused with one message that names its cause, exit code 1, and nothing changed on disk.

use crate::{
    gguf,
    support::{Place, edit_header, edit_json, golden},
};
use serde_json::json;
use std::fs;

#[test]
fn usage() {
    let place = Place::new();
    place.refuses(&["--no-such-option"], &["--no-such-option"]);
    place.refuses(&["bake"], &["bake"]);
    place.refuses(&["logits", "--ids", "1"], &["--out"]);
    place.refuses(&["logits", "--ids", "1,-2", "--out", "x"], &["-2"]);
    place.refuses(&["eval", "--data", "x", "--quant", "int8"], &["int8", "nf4"]);
    place.refuses(&["eval", "--data", "x", "--dtype", "i8"], &["i8", "bf16"]);
    place.refuses(&["inspect"], &["PATH"]);
    for (args, words) in [
        (&["--lr", "fast"][..], &["fast", "--lr"][..]),
        (&["--lr", "0"], &["--lr"]),
        (&["--lr", "-1"], &["--lr must be above 0"]),
        (&["--lr", "nan"], &["--lr"]),
        (&["--eps", "inf"], &["--eps"]),
        (&["--steps", "0"], &["--steps"]),
        (&["--steps", "3", "--epochs", "1"], &["--epochs"]),
        (&["--batch-size", "0"], &["--batch-size"]),
        (&["--seq-len", "1"], &["--seq-len"]),
        (&["--block-size", "48"], &["--block-size", "power of two"]),
        (&["--schedule", "square"], &["square"]),
        (&["--method", "dora"], &["dora", "qlora"]),
        (&["--method", "qlora", "--quant", "none"], &["--quant"]),
        (&["--targets", "q_proj,mouth_proj"], &["mouth_proj", "q_proj"]),
        (&["--targets", "lm_head"], &["lm_head", "q_proj"]),
        (&["--rank", "1000000000000"], &["--rank"]),
        (&["--seed", "18446744073709551615"], &["18446744073709551615"]),
        (&["--device", "cuda:99"], &["cuda:99", "--device cpu"]),
        (&["--device", "tpu"], &["tpu", "cuda:N"]),
        (&["--paged-budget", "1MiB"], &["--paged-budget 1MiB", "one page of 3MiB", "auto"]),
        (&["--paged-budget", "128KiB", "--page-size", "256KiB"], &["--paged-budget 128KiB", "one page of 256KiB"]),
        (&["--paged-budget", "4TiB"], &["--paged-budget", "TiB", "GiB"]),
        (&["--paged-budget", "most"], &["--paged-budget", "a size", "most", "auto"]),
        (&["--paged-budget=-1"], &["--paged-budget", "-1"]),
        (&["--page-size", "100KiB"], &["--page-size", "64KiB", "256KiB"]),
        (&["--page-size", "300000"], &["--page-size", "300000", "64KiB"]),
        (&["--page-size", "6 apples"], &["page-size", "apples"]),
        (&["--page-memory", "tape"], &["--page-memory tape", "pinned", "unified"]),
        (&["--page-policy", "fifo"], &["page-policy", "fifo", "in-place"]),
    ] {
        place.refuses_training(args, words);
    }
    let ran = place.ok(&["--help"]);
    assert!(ran.stdout.contains("--model") && ran.stderr.is_empty());
    assert!(place.ok(&["--version"]).stdout.starts_with("train-llama "));
}

#[test]
fn settings_files() {
    let place = Place::new();
    place.refuses_training(&["--config", "absent.toml"], &["absent.toml", "No such file"]);
    for (text, word) in
        [("lr = ", "TOML"), ("lrr = 1.0", "lrr"), ("lr = \"fast\"", "lr"), ("method = \"dora\"", "dora")]
    {
        place.write("run.toml", text);
        place.refuses_training(&["--config", "run.toml"], &["run.toml", word]);
    }
}

#[test]
fn missing_files() {
    let place = Place::new();
    let model = golden("model");
    let model = model.to_str().unwrap();
    place.refuses_training(&["--model", "absent"], &["absent", "No such file"]);
    place.refuses_training(&["--model", "absent.gguf"], &["absent.gguf", "No such file"]);
    place.refuses_training(&["--data", "absent.jsonl"], &["absent.jsonl", "No such file"]);
    place.refuses_training(&["--eval-data", "absent.jsonl"], &["absent.jsonl", "No such file"]);
    place.refuses_training(&["--adapter-init", "absent"], &["absent", "adapter_config.json"]);
    place.refuses(&["logits", "--model", model, "--adapter", "absent", "--ids", "1", "--out", "x"], &["absent"]);
    place.refuses(&["inspect", "absent"], &["absent", "No such file"]);
    place.refuses(&["quantize", "--model", "absent", "--out", "q"], &["absent", "No such file"]);
    place.refuses(&["train", "--model", model], &["--data"]);
    fs::create_dir(place.path("empty")).unwrap();
    place.refuses_model(&place.path("empty"), &["empty", "config.json"]);
    place.refuses_model(&golden("adapter-init"), &["adapter-init", "adapter"]);
    place.refuses(&["generate", "--model", model, "--prompt", "x"], &["tokenizer.json"]);
    let weights = place.copy("model", "no-weights").join("model.safetensors");
    fs::remove_file(weights).unwrap();
    place.refuses_model(&place.path("no-weights"), &["no-weights", "safetensors"]);
}

#[test]
fn damaged_weights() {
    let place = Place::new();
    let model = place.copy("model", "m");
    let file = model.join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let with = |position: usize, bytes: &[u8]| {
        let mut copy = whole.clone();
        copy[position..position + bytes.len()].copy_from_slice(bytes);
        copy
    };
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("cut in its length", whole[..5].to_vec()),
        ("cut in its header", whole[..header / 2].to_vec()),
        ("cut in its data", whole[..whole.len() - 1].to_vec()),
        ("longer than its tensors", [&whole[..], b"more"].concat()),
        ("a length beyond the file", with(0, &u64::MAX.to_le_bytes())),
        ("a length of nothing", with(0, &[0; 8])),
        ("a flipped brace", with(8, &[b'{' ^ 2])),
        ("a flipped bit in a name", with(header / 2, &[whole[header / 2] ^ 0x80])),
    ] {
        eprintln!("{what}");
        fs::write(&file, bytes).unwrap();
        place.refuses_model(&model, &["model.safetensors"]);
    }
    let name = "model.layers.1.mlp.up_proj.weight";
    let lie = |what: &str, edit: &dyn Fn(&mut serde_json::Value), words: &[&str]| {
        eprintln!("{what}");
        fs::write(&file, &whole).unwrap();
        edit_header(&file, edit);
        place.refuses_model(&model, words);
    };
    lie("missing", &|h| drop(h.as_object_mut().unwrap().shift_remove(name)), &["model.safetensors"]);
    lie(
        "renamed",
        &|h| {
            let tensor = h.as_object_mut().unwrap().shift_remove(name).unwrap();
            h["model.layers.1.mlp.upp.weight"] = tensor;
        },
        &[name],
    );
    lie("transposed", &|h| h[name]["shape"] = json!([128, 384]), &[name, "[128, 384]", "[384, 128]"]);
    lie("more elements than bytes", &|h| h[name]["shape"] = json!([384, 129]), &["model.safetensors"]);
    lie("an overflowing shape", &|h| h[name]["shape"] = json!([u64::MAX, 2]), &["model.safetensors"]);
    lie("another type", &|h| h[name]["dtype"] = json!("F32"), &["model.safetensors"]);
    lie("an unknown type", &|h| h[name]["dtype"] = json!("F7"), &["model.safetensors"]);
    lie("integers", &|h| h[name]["dtype"] = json!("I16"), &[name, "I16"]);
    lie("offsets beyond the file", &|h| h[name]["data_offsets"][1] = json!(1u64 << 60), &["model.safetensors"]);
    lie(
        "overlapping offsets",
        &|h| {
            let other = h["model.layers.0.mlp.up_proj.weight"]["data_offsets"].clone();
            h[name]["data_offsets"] = other;
        },
        &["model.safetensors"],
    );
}

#[test]
fn other_architectures_and_quantizations() {
    let place = Place::new();
    let model = place.copy("model", "m");
    let whole = fs::read(model.join("config.json")).unwrap();
    for (edit, words) in [
        (json!({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}), &["config.json", "gpt2"][..]),
        (json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}), &["config.json", "gptq"]),
        (json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}), &["8 bits"]),
        (json!({"hidden_act": "gelu"}), &["config.json", "gelu"]),
        (json!({"attention_bias": true}), &["config.json", "attention_bias"]),
        (json!({"num_hidden_layers": 4}), &["model.layers.3"]),
        (json!({"num_hidden_layers": u64::MAX}), &["config.json"]),
        (json!({"num_key_value_heads": 3}), &["config.json"]),
        (json!({"intermediate_size": 400}), &["[384, 128]", "[400, 128]"]),
        (json!({"vocab_size": 513}), &["[512, 128]", "[513, 128]"]),
    ] {
        fs::write(model.join("config.json"), &whole).unwrap();
        edit_json(&model.join("config.json"), |config| {
            edit.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        });
        place.refuses_model(&model, words);
    }
    fs::write(model.join("config.json"), &whole[..100]).unwrap();
    place.refuses_model(&model, &["config.json", "JSON"]);
    let bnb = golden("model-bnb4");
    let bnb = bnb.to_str().unwrap();
    place.refuses(&["logits", "--model", bnb, "--quant", "fp4", "--ids", "1", "--out", "x"], &["model-bnb4", "nf4"]);
}

#[test]
fn damaged_gguf_files() {
    let place = Place::new();
    let whole = gguf::tiny("llama");
    let with = |position: usize, bytes: &[u8]| {
        let mut copy = whole.clone();
        copy[position..position + bytes.len()].copy_from_slice(bytes);
        copy
    };
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("another magic", with(0, b"GGML")),
        ("an unknown version", with(4, &9u32.to_le_bytes())),
        ("a huge count of tensors", with(8, &u64::MAX.to_le_bytes())),
        ("a huge count of keys", with(16, &(1u64 << 40).to_le_bytes())),
        ("a huge string", with(24, &(u64::MAX - 7).to_le_bytes())),
        ("cut in its keys", whole[..100].to_vec()),
        ("cut in its data", whole[..whole.len() - 64].to_vec()),
        ("another architecture", gguf::tiny("mamba")),
    ] {
        eprintln!("{what}");
        let path = place.write("m.gguf", bytes);
        place.refuses_model(&path, &["m.gguf"]);
    }
    let path = place.write("m.gguf", gguf::tiny("mamba"));
    place.refuses_model(&path, &["m.gguf", "mamba"]);
    let text = place.write("m.bin", "neither");
    place.refuses_model(&text, &["m.bin", ".gguf"]);
}

#[test]
fn adapters_that_do_not_fit() {
    let place = Place::new();
    let adapter = place.copy("adapter-init", "a");
    let (config, weights) = (adapter.join("adapter_config.json"), adapter.join("adapter_model.safetensors"));
    let (good_config, good_weights) = (fs::read(&config).unwrap(), fs::read(&weights).unwrap());
    let refused = |words: &[&str]| {
        place.refuses_training(&["--adapter-init", "a"], words);
        let model = golden("model");
        let model = ["--model", model.to_str().unwrap()];
        place.refuses(&[&["logits"], &model[..], &["--adapter", "a", "--ids", "1", "--out", "x"]].concat(), words);
        fs::write(&config, &good_config).unwrap();
        fs::write(&weights, &good_weights).unwrap();
    };
    // For a model of another size, and for one with more layers.
    let key =
        |layer: usize, half: &str| format!("base_model.model.model.layers.{layer}.mlp.up_proj.lora_{half}.weight");
    edit_header(&weights, |h| {
        let rank = h[key(0, "A")]["shape"][0].as_u64().unwrap();
        assert!(rank.is_multiple_of(2));
        for half in ["A", "B"] {
            let tensor = h.as_object_mut().unwrap().shift_remove(&key(2, half)).unwrap();
            h[key(9, half)] = tensor;
        }
    });
    refused(&["a:", "model.layers.9", "another model"]);
    edit_header(&weights, |h| {
        let module = |name: &str, half: &str| format!("base_model.model.model.layers.0.{name}.lora_{half}.weight");
        for half in ["A", "B"] {
            let (up, down) = (h[module("mlp.up_proj", half)].clone(), h[module("mlp.down_proj", half)].clone());
            h[module("mlp.up_proj", half)] = down;
            h[module("mlp.down_proj", half)] = up;
        }
    });
    refused(&["a:", "proj", "another model"]);
    edit_json(&config, |c| c["r"] = json!(3));
    refused(&["adapter_model.safetensors", "rank 3"]);
    edit_json(&config, |c| c["peft_type"] = json!("IA3"));
    refused(&["adapter_config.json", "IA3"]);
    edit_json(&config, |c| c["use_dora"] = json!(true));
    refused(&["adapter_model.safetensors", "use_dora"]);
    edit_json(&config, |c| c["lora_bias"] = json!(true));
    refused(&["adapter_config.json", "lora_bias"]);
    fs::write(&weights, &good_weights[..good_weights.len() / 2]).unwrap();
    refused(&["adapter_model.safetensors"]);
    let mut infinite = good_weights.clone();
    let end = infinite.len();
    infinite[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, infinite).unwrap();
    refused(&["adapter_model.safetensors", "NaN"]);
    place.refuses_training(&["--method", "full", "--adapter-init", "a"], &["--adapter-init"]);
}

#[test]
fn data_that_cannot_be_trained_on() {
    let place = Place::new();
    let text = place.model_with_text();
    let (ids, text) = (golden("model"), text.to_str().unwrap());
    let ids = ids.to_str().unwrap();
    for (model, contents, words) in [
        (ids, "", &["d.jsonl", "no examples"][..]),
        (ids, "\n  \n", &["d.jsonl", "no examples"]),
        (ids, "{\"input_ids\":[1,2,512]}", &["d.jsonl:1:", "512", "vocabulary"]),
        (ids, "{\"input_ids\":[1,2,3]}\n\n{\"input_ids\":[1,-2]}", &["d.jsonl:3:", "-2"]),
        (ids, "{\"input_ids\":[1,2],\"labels\":[1,600]}", &["d.jsonl:1:", "600"]),
        (ids, "{\"input_ids\":[1,2],\"labels\":[1]}", &["d.jsonl:1:", "labels"]),
        (ids, "{\"input_ids\":[1,2],\"labels\":[-100,-100]}", &["d.jsonl:1:", "-100"]),
        (ids, "{\"input_ids\":[7]}", &["d.jsonl:1:", "at least 2"]),
        (ids, "{\"input_ids\":[]}", &["d.jsonl:1:"]),
        (ids, "{\"text\":\"hello\"}", &["d.jsonl:1:", "tokenizer.json"]),
        (text, "{\"text\":\"hello\"}\n{\"txt\":\"hello\"}", &["d.jsonl:2:", "text"]),
        (text, "{\"question\":\"a\"}", &["d.jsonl:1:", "question", "prompt"]),
        (text, "{\"text\":\"a\"}\nnot json", &["d.jsonl:2:", "JSON"]),
        (text, "[1,2]", &["d.jsonl:1:", "a number"]),
        (text, "{\"text\":\"\"}", &["d.jsonl:1:", "empty"]),
        (text, "{\"prompt\":\"a\",\"completion\":\"\"}", &["d.jsonl:1:", "completion"]),
        (text, "{\"prompt\":\"a\",\"completion\":5}", &["d.jsonl:1:", "a number"]),
        (
            text,
            "{\"prompt\":\"twenty tokens or so..\",\"completion\":\"b\"}",
            &["d.jsonl:1:", "truncation", "--seq-len"],
        ),
        (text, "{\"messages\":[{\"role\":\"user\"}]}", &["d.jsonl:1:", "content"]),
        (text, "{\"messages\":[]}", &["d.jsonl:1:"]),
        (text, "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}", &["d.jsonl:1:", "assistant"]),
    ] {
        eprintln!("{contents}");
        place.write("d.jsonl", contents);
        place.refuses_training(&["--model", model, "--data", "d.jsonl", "--seq-len", "16"], words);
    }
    // The data to evaluate on is read before training starts.
    place.refuses_training(&["--eval-data", "d.jsonl"], &["d.jsonl:1:"]);
    place.refuses(&["eval", "--model", text, "--data", "d.jsonl"], &["d.jsonl:1:"]);
    place.write("d.txt", [b'a', 0xFF]);
    place.refuses_training(&["--model", text, "--data", "d.txt"], &["d.txt", "UTF-8 at byte 1"]);
    place.write("d.txt", "");
    place.refuses_training(&["--model", text, "--data", "d.txt"], &["d.txt", "no examples"]);
    fs::create_dir(place.path("empty")).unwrap();
    place.refuses_training(&["--data", "empty"], &["empty", "no data files", ".jsonl"]);
    place.refuses(&["inspect", "d.txt"], &["d.txt"]);
    place.write("d.jsonl", "{\"text\":\"a\"}\n{\"text\":1}");
    place.refuses(&["inspect", "d.jsonl"], &["d.jsonl:2:", "a number"]);
}

#[test]
fn bad_tokenizers_and_prompts() {
    let place = Place::new();
    let text = place.model_with_text();
    let whole = fs::read(text.join("tokenizer.json")).unwrap();
    let generate = |extra: &[&str], words: &[&str]| {
        place.refuses(&[&["generate", "--model", "texts"], extra].concat(), words);
    };
    generate(&["--prompt", "a", "--temperature", "-1"], &["--temperature"]);
    generate(&["--prompt", "a", "--top-p", "0"], &["--top-p"]);
    generate(&["--prompt", "a", "--max-tokens", "99999999999999"], &["--max-tokens"]);
    fs::write(text.join("tokenizer.json"), &whole[..whole.len() / 2]).unwrap();
    generate(&["--prompt", "a"], &["tokenizer.json"]);
    fs::write(text.join("tokenizer.json"), &whole).unwrap();
    edit_json(&text.join("tokenizer.json"), |t| t["model"]["vocab"]["too far"] = json!(600));
    generate(&["--prompt", "a"], &["texts", "512"]);
    fs::write(text.join("tokenizer.json"), &whole).unwrap();
    edit_json(&text.join("tokenizer_config.json"), |c| c["chat_template"] = json!("{% for"));
    generate(&["--prompt", "a", "--chat"], &["template"]);
    edit_json(&text.join("tokenizer_config.json"), |c| c["chat_template"] = json!(null));
    generate(&["--prompt", "a", "--chat"], &["chat template", "--chat"]);
}

#[test]
fn ids_outside_of_the_vocabulary() {
    let place = Place::new();
    let model = golden("model");
    for (ids, word) in [("1,512", "512"), ("4294967295", "4294967295"), ("1,2,4294967296", "4294967296"), ("", "--ids")]
    {
        let model = model.to_str().unwrap();
        place.refuses(&["logits", "--model", model, "--ids", ids, "--out", "logits.st"], &[word]);
    }
}

#[test]
fn folders_that_are_taken_or_cannot_be_made() {
    let place = Place::new();
    place.train("run", &["--steps", "1"]);
    place.refuses_training(&[], &["run", "already holds a run", "--out"]);
    place.copy("model", "m");
    place.write("file", "text");
    place.refuses_training(&["--out", "file"], &["file", "folder"]);
    place.refuses_training(&["--out", "file/run"], &["file/run"]);
    place.refuses(&["quantize", "--model", "m", "--out", "m"], &["m already holds a model", "--out"]);
    place.refuses(&["quantize", "--model", "m", "--out", "file/q"], &["file/q"]);
    place.refuses(&["logits", "--model", "m", "--ids", "1", "--out", "absent/logits.st"], &["absent/logits.st"]);
    fs::create_dir(place.path("folder")).unwrap();
    place.refuses(&["logits", "--model", "m", "--ids", "1", "--out", "folder"], &["folder"]);
}

/// The run stops, and what it leaves can be used.
#[test]
fn a_loss_that_is_no_number_stops_the_run_with_the_last_good_adapter() {
    // The second makes its only update infinite, which no later loss would show.
    for (run, lr, steps) in [("loss", "1e30", "9"), ("update", "1e300", "1")] {
        let place = Place::new();
        let args = place.train_args(run, &["--lr", lr, "--steps", steps, "--max-grad-norm", "0"]);
        let ran = place.run(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(ran.code, 1, "{}", ran.stderr);
        let error = ran.stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
        assert!(error.contains("--lr") && error.contains(run) && error.contains("step"), "{error}");
        assert!(!ran.stderr.contains("panicked") && ran.stdout.is_empty(), "{}", ran.stderr);
        let model = golden("model");
        let adapter = format!("{run}/adapter");
        let eval = place.ok(&[
            "eval",
            "--model",
            model.to_str().unwrap(),
            "--adapter",
            &adapter,
            "--data",
            "ids.jsonl",
            "--json",
        ]);
        let result: serde_json::Value = serde_json::from_str(&eval.stdout).unwrap();
        assert!(result["nll"].as_f64().unwrap() < 7.0, "{result}");
        assert!(place.metrics(run).iter().all(|line| line["loss"].is_f64()));
    }
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let place = Place::new();
    let path = golden("model");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = place.command(&["inspect", path.to_str().unwrap()]).stdout(writer).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && stderr.contains("standard output"), "{stderr}");
}
