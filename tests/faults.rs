//! The program as its users meet it: mistakes give one clear message, exit code 1, and leave the disk as it was.

use nibble_models::files::{peft::read_adapter, safetensors::SafetensorsFile};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gqa_llama3rope").join(name)
}

/// A working folder with a copy of the golden model, whose files tests may damage.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        place.copy("model");
        place.write("train.jsonl", &"{\"input_ids\": [1, 5, 9, 30, 200, 7, 2]}\n".repeat(8));
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn copy(&self, folder: &str) {
        fs::create_dir(self.path(folder)).unwrap();
        for entry in fs::read_dir(golden(folder)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), self.path(folder).join(entry.file_name())).unwrap();
        }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// Changes a file's bytes.
    fn edit(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.path(name)).unwrap();
        change(&mut bytes);
        fs::write(self.path(name), bytes).unwrap();
    }

    fn run(&self, args: &str) -> Output {
        let program = env!("CARGO_BIN_EXE_train-llama");
        Command::new(program).args(args.split_whitespace()).current_dir(self.0.path()).output().unwrap()
    }

    /// Every file below the folder with its bytes.
    fn snapshot(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        fn walk(dir: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    found.insert(path.clone(), Vec::new());
                    walk(&path, found);
                } else {
                    found.insert(path.clone(), fs::read(&path).unwrap());
                }
            }
        }
        let mut found = BTreeMap::new();
        walk(self.0.path(), &mut found);
        found
    }

    /// Runs, and expects an error that mentions all of `words`, with nothing changed.
    #[track_caller]
    fn refuses(&self, args: &str, words: &[&str]) {
        let before = self.snapshot();
        let output = self.run(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args}: {stderr}");
        assert!(output.stdout.is_empty(), "{args} wrote to standard output");
        assert_eq!(stderr.matches("error: ").count(), 1, "{args}: {stderr}");
        assert!(!stderr.contains("panicked"), "{args}: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "{args}: no {word:?} in {stderr}");
        }
        assert!(self.snapshot() == before, "{args} changed the disk");
    }

    #[track_caller]
    fn succeeds(&self, args: &str) -> Output {
        let output = self.run(args);
        assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }

    fn metrics(&self, run: &str) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn adapter(&self, run: &str) -> Vec<u8> {
        fs::read(self.path(run).join("adapter/adapter_model.safetensors")).unwrap()
    }
}

const TRAIN: &str = "--model model --data train.jsonl --out run --steps 2 --batch-size 2 --grad-accum 2";

#[test]
fn files_that_are_not_there() {
    let place = Place::new();
    place.refuses("--model nowhere --data train.jsonl --out run", &["nowhere"]);
    place.refuses("--model model --data nothing.jsonl --out run", &["nothing.jsonl"]);
    place.refuses(&format!("{TRAIN} --config no.toml"), &["no.toml"]);
    place.refuses(&format!("{TRAIN} --adapter-init no-adapter"), &["no-adapter"]);
    place.refuses("logits --model model --adapter no-adapter --ids 1 --out x.safetensors", &["no-adapter"]);
    place.refuses("inspect nowhere", &["nowhere"]);
    fs::remove_file(place.path("model/model.safetensors")).unwrap();
    place.refuses(TRAIN, &["model"]);
}

#[test]
fn damaged_checkpoints() {
    let file = "model/model.safetensors";
    type Damage = fn(&mut Vec<u8>);
    let damages: [(&str, Damage); 5] = [
        ("cut short", |bytes| bytes.truncate(bytes.len() - 1000)),
        ("no header", |bytes| bytes.truncate(5)),
        ("a header longer than the file", |bytes| bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes())),
        ("a header that is not JSON", |bytes| bytes[8] ^= 0x40),
        ("an offset beyond the file", |bytes| {
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let text = String::from_utf8(bytes[8..8 + header].to_vec()).unwrap();
            let at = text.find("data_offsets\":[").unwrap() + "data_offsets\":[".len();
            bytes[8 + at] = b'9';
        }),
    ];
    for (what, damage) in damages {
        let place = Place::new();
        place.edit(file, damage);
        eprintln!("{what}");
        place.refuses(TRAIN, &["model.safetensors"]);
    }
    let place = Place::new();
    place.write("lying.gguf", "GGUF\u{3}\0\0\0\u{7f}\u{7f}\u{7f}\u{7f}\u{7f}\u{7f}\u{7f}\u{7f}\u{1}\0\0\0\0\0\0\0");
    place.refuses("--model lying.gguf --data train.jsonl --out run", &["lying.gguf"]);
}

#[test]
fn configurations_that_do_not_fit() {
    let replace = |from: &'static str, to: &'static str| {
        let place = Place::new();
        let path = place.path("model/config.json");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from));
        fs::write(&path, text.replace(from, to)).unwrap();
        place
    };
    replace("\"model_type\": \"llama\"", "\"model_type\": \"gemma\"").refuses(TRAIN, &["gemma", "config.json"]);
    replace("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4").refuses(TRAIN, &["model.layers.3"]);
    replace("\"intermediate_size\": 384", "\"intermediate_size\": 400").refuses(TRAIN, &["384", "400"]);
    let gptq = "\"vocab_size\": 512, \"quantization_config\": {\"quant_method\": \"gptq\"}";
    replace("\"vocab_size\": 512", gptq).refuses(TRAIN, &["gptq"]);
    let place = Place::new();
    place.copy("model-bnb4");
    place.refuses("--model model-bnb4 --data train.jsonl --out run --quant fp4", &["nf4", "fp4"]);
}

#[test]
fn adapters_of_other_models() {
    let place = Place::new();
    place.copy("adapter-init");
    place.edit("adapter-init/adapter_model.safetensors", |bytes| {
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let text = String::from_utf8(bytes[8..8 + header].to_vec()).unwrap();
        bytes[8..8 + header].copy_from_slice(text.replace("layers.2.", "layers.7.").as_bytes());
    });
    place.refuses(&format!("{TRAIN} --adapter-init adapter-init"), &["adapter-init", "layers.7", "another model"]);
}

#[test]
fn data_that_cannot_be_learned() {
    for (rows, words) in [
        ("", &["train.jsonl"][..]),
        ("{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [1, 512]}\n", &["train.jsonl:2", "512"]),
        ("{\"input_ids\": [1, 2, 3]}\n{\"question\": \"?\"}\n", &["train.jsonl:2"]),
        ("{\"input_ids\": [1, 2, 3]}\nnot json\n", &["train.jsonl:2"]),
        ("{\"input_ids\": [1, 2, 3], \"labels\": [-100, -100, -100]}\n", &["train.jsonl:1"]),
        ("{\"text\": \"words\"}\n", &["train.jsonl:1", "tokenizer"]),
    ] {
        let place = Place::new();
        place.write("train.jsonl", rows);
        place.refuses(TRAIN, words);
    }
    let place = Place::new();
    let row = "{\"input_ids\": [1, 2, 3, 4, 5, 6], \"labels\": [-100, -100, -100, -100, 5, 6]}\n";
    place.write("train.jsonl", row);
    place.refuses(&format!("{TRAIN} --seq-len 4"), &["train.jsonl:1", "seq-len"]);
}

#[test]
fn settings_that_make_no_sense() {
    let place = Place::new();
    place.refuses(&format!("{TRAIN} --lr -1"), &["lr"]);
    place.refuses(&format!("{TRAIN} --block-size 48"), &["block-size"]);
    place.refuses(&format!("{TRAIN} --no-such-flag"), &["no-such-flag"]);
    place.refuses(&format!("{TRAIN} --targets lm_head"), &["lm_head", "q_proj"]);
    place.refuses(&format!("{TRAIN} --device cuda"), &["cuda:0", "--device cpu"]);
    place.refuses("logits --model model --ids 1,512 --out x.safetensors", &["512"]);
    place.refuses("generate --model model --prompt hello", &["tokenizer.json"]);
    place.write("bad.toml", "learning-rate = 1.0\n");
    place.refuses(&format!("{TRAIN} --config bad.toml"), &["bad.toml", "learning-rate"]);
    assert_eq!(place.run("--help").status.code(), Some(0));
}

#[test]
fn a_run_is_never_overwritten_and_its_settings_repeat_it() {
    let place = Place::new();
    place.succeeds(&format!("{TRAIN} --dropout 0.2"));
    for name in ["metrics.jsonl", "settings.toml", "summary.json", "loss.svg", "adapter/adapter_config.json"] {
        assert!(place.path("run").join(name).is_file(), "{name}");
    }
    for key in ["step", "loss", "grad_norm", "lr", "tokens", "tok_s"] {
        assert!(place.metrics("run").iter().all(|line| line[key].is_number()), "{key}");
    }
    place.refuses(TRAIN, &["run", "--out"]);
    place.succeeds("--config run/settings.toml --out again");
    assert!(place.adapter("run") == place.adapter("again"));
    place.succeeds("--config run/settings.toml --out recomputed --recompute");
    assert!(place.adapter("run") == place.adapter("recomputed"));
    place.succeeds("--config run/settings.toml --out other --seed 1");
    assert!(place.adapter("run") != place.adapter("other"));
}

#[test]
fn a_loss_that_is_not_a_number_keeps_the_last_good_adapter() {
    let place = Place::new();
    let output = place.run("--model model --data train.jsonl --out run --steps 20 --lr 1e38 --max-grad-norm 0");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("run holds") && stderr.contains("--lr"), "{stderr}");
    let adapter = read_adapter(&place.path("run/adapter")).unwrap();
    assert_eq!(adapter.tensors.len(), 21); // reading refuses NaN
}

#[test]
fn accumulation_is_one_large_batch() {
    let place = Place::new();
    // Rows of different lengths, so that a mean of means would differ.
    let row = |n: usize| format!("{{\"input_ids\": {:?}}}\n", (1..=3 + 5 * (n % 3)).collect::<Vec<_>>());
    place.write("train.jsonl", &(0..8).map(row).collect::<String>());
    let common = "--model model --data train.jsonl --steps 2 --dropout 0 --no-shuffle --lr 1e-3";
    place.succeeds(&format!("{common} --batch-size 4 --grad-accum 1 --out whole"));
    place.succeeds(&format!("{common} --batch-size 1 --grad-accum 4 --out parts"));
    for (whole, parts) in place.metrics("whole").iter().zip(place.metrics("parts")) {
        for key in ["loss", "grad_norm"] {
            let (a, b) = (whole[key].as_f64().unwrap(), parts[key].as_f64().unwrap());
            assert!((a / b - 1.0).abs() < 1e-4, "{key}: {a} and {b}");
        }
    }
}

#[test]
fn every_method_and_type_learns() {
    let place = Place::new();
    let common = "--model model --data train.jsonl --steps 12 --batch-size 2 --grad-accum 1 --lr 5e-3 --dropout 0";
    for (name, extra) in [
        ("lora", "--method lora --rslora --targets q_proj,down_proj"),
        ("fp4", "--quant fp4 --no-double-quant --optimizer-bits 8"),
        ("full", "--method full"),
        ("bf16", "--dtype bf16"),
        ("f16", "--dtype f16"),
    ] {
        place.succeeds(&format!("{common} --out {name} {extra}"));
        let losses: Vec<f64> = place.metrics(name).iter().map(|line| line["loss"].as_f64().unwrap()).collect();
        assert!(losses[11] < losses[0] - 0.1, "{name}: {losses:?}");
    }
    assert_eq!(read_adapter(&place.path("lora/adapter")).unwrap().tensors.len(), 6);
    place.succeeds("logits --model full/model --ids 1,5,9 --quant none --out full.safetensors");
}

#[test]
fn logits_quantize_eval_and_inspect() {
    let place = Place::new();
    place.succeeds("logits --model model --ids 1,5,9,30 --quant none --out logits.safetensors");
    let file = SafetensorsFile::open(&place.path("logits.safetensors")).unwrap();
    assert_eq!(file.view("logits").unwrap().shape, [1, 4, 512]);
    place.succeeds("quantize --model model --out small");
    place.refuses("quantize --model model --out small", &["small", "--out"]);
    place.succeeds("logits --model small --ids 1,5 --out small.safetensors");
    let output = place.succeeds("eval --model small --data train.jsonl --json");
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["examples"], 8);
    assert!((result["perplexity"].as_f64().unwrap() - result["nll"].as_f64().unwrap().exp()).abs() < 1e-9);
    place.copy("adapter-final");
    for path in ["model", "small", "adapter-final", "logits.safetensors", "train.jsonl"] {
        assert!(!place.succeeds(&format!("inspect {path}")).stdout.is_empty(), "{path}");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupt_saves_what_there_is() {
    let place = Place::new();
    let args = "--model model --data train.jsonl --out run --steps 100000 --batch-size 1 --grad-accum 1";
    let child = Command::new(env!("CARGO_BIN_EXE_train-llama"))
        .args(args.split_whitespace())
        .current_dir(place.0.path())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = place.path("run/metrics.jsonl");
    while fs::metadata(&metrics).map_or(0, |metadata| metadata.len()) == 0 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("stopped after") && stderr.contains("run"), "{stderr}");
    assert!(read_adapter(&place.path("run/adapter")).is_ok());
    assert!(!place.metrics("run").is_empty());
}
