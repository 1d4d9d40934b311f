//! The program as a user runs it, in a folder of its own.

use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};
use tempfile::TempDir;

/// A file or folder of the reference stack's small Llama.
pub fn golden(name: &str) -> PathBuf {
    let path = Path::new("tests/golden/gqa_llama3rope").join(name);
    std::path::absolute(path).unwrap()
}

/// The program under test: the one built with these tests, or that of a bundle.
fn program() -> PathBuf {
    std::env::var_os("NIBBLE_PROGRAM").map_or_else(|| env!("CARGO_BIN_EXE_train-llama").into(), PathBuf::from)
}

/// A temporary folder, in which every command of a test runs.
pub struct Place {
    dir: TempDir,
}

/// What a command printed, and its exit code.
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    fn new(output: Output) -> Ran {
        let text = |bytes| String::from_utf8(bytes).expect("the program prints UTF-8");
        let code = output.status.code().expect("the program was not killed by a signal");
        Ran { code, stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Place {
    pub fn new() -> Place {
        Place { dir: tempfile::tempdir().unwrap() }
    }

    /// Another folder with the same contents.
    pub fn copy_of(&self) -> Place {
        let place = Place::new();
        for (path, bytes) in self.contents() {
            if let (Some(bytes), Ok(name)) = (bytes, path.strip_prefix(self.dir.path())) {
                place.write(name.to_str().unwrap(), bytes);
            }
        }
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file, and returns its path.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, contents).unwrap();
        path
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// A copy of a golden folder.
    pub fn copy(&self, golden_name: &str, name: &str) -> PathBuf {
        for entry in fs::read_dir(golden(golden_name)).unwrap() {
            let entry = entry.unwrap();
            self.write(&format!("{name}/{}", entry.file_name().to_str().unwrap()), fs::read(entry.path()).unwrap());
        }
        self.path(name)
    }

    /// Eight sequences of token ids to train on.
    pub fn ids(&self) -> PathBuf {
        let row = |i: usize| (0..12 + i).map(|j| 3 + (i * 37 + j * j * 11) % 500).collect::<Vec<_>>();
        let rows: String = (0..8).map(|i| format!("{{\"input_ids\": {:?}}}\n", row(i))).collect();
        self.write("ids.jsonl", rows)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null()).env("RAYON_NUM_THREADS", "2");
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        Ran::new(self.command(args).output().unwrap())
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> Ran {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "{args:?}:\n{}", ran.stderr);
        ran
    }

    /// Trains the golden model on [`Place::ids`] without dropout for two steps of all eight examples, or as `args` say.
    #[track_caller]
    pub fn train(&self, out: &str, args: &[&str]) -> Ran {
        self.ok(&self.train_args(out, args).iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The arguments of [`Place::train`]. An option in `args` replaces the usual one.
    pub fn train_args(&self, out: &str, args: &[&str]) -> Vec<String> {
        let (data, model) = (self.ids(), golden("model"));
        let usual = [
            ("--model", model.to_str().unwrap()),
            ("--data", data.to_str().unwrap()),
            ("--out", out),
            ("--steps", "2"),
            ("--batch-size", "8"),
            ("--grad-accum", "1"),
            ("--lr", "1e-3"),
            ("--rank", "4"),
            ("--dropout", "0"),
        ];
        let mut all = vec!["train".to_string()];
        for (name, value) in usual.into_iter().filter(|(name, _)| !args.contains(name)) {
            all.extend([name.to_string(), value.to_string()]);
        }
        all.extend(args.iter().map(|arg| arg.to_string()));
        all
    }

    /// Runs a command that must be refused: exit code 1, one message, which holds all of `words`, nothing on standard
    /// output and nothing changed on disk.
    #[track_caller]
    pub fn refuses(&self, args: &[&str], words: &[&str]) {
        let before = self.contents();
        let ran = self.run(args);
        let errors: Vec<&str> = ran.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!((ran.code, errors.len()), (1, 1), "{args:?}:\n{}", ran.stderr);
        assert!(!ran.stderr.contains("panicked"), "{args:?}:\n{}", ran.stderr);
        assert_eq!(ran.stdout, "", "{args:?}");
        // The message and what follows it: clap adds lines of help.
        let message = &ran.stderr[ran.stderr.find(errors[0]).unwrap()..];
        for word in words {
            assert!(message.contains(word), "{args:?}: no {word:?} in\n{}", ran.stderr);
        }
        let after = self.contents();
        let names = |contents: &BTreeMap<PathBuf, _>| contents.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&before), names(&after), "{args:?}");
        assert!(before == after, "{args:?} changed a file");
    }

    /// [`Place::refuses`] for a training run with `args`.
    #[track_caller]
    pub fn refuses_training(&self, args: &[&str], words: &[&str]) {
        let args = self.train_args("run", args);
        self.refuses(&args.iter().map(String::as_str).collect::<Vec<_>>(), words);
    }

    /// [`Place::refuses`] for the same training run on another model.
    #[track_caller]
    pub fn refuses_model(&self, model: &Path, words: &[&str]) {
        self.refuses(&["logits", "--model", model.to_str().unwrap(), "--ids", "1,2", "--out", "logits.st"], words);
    }

    /// Every file with its bytes, and every folder.
    pub fn contents(&self) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
        let mut found = BTreeMap::new();
        let mut folders = vec![self.dir.path().to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path.clone());
                    found.insert(path, None);
                } else {
                    let bytes = fs::read(&path).unwrap();
                    found.insert(path, Some(bytes));
                }
            }
        }
        found
    }

    /// The lines of a run's metrics.
    pub fn metrics(&self, run: &str) -> Vec<Value> {
        let text = self.read(&format!("{run}/metrics.jsonl"));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The losses of a run.
    pub fn losses(&self, run: &str) -> Vec<f64> {
        self.metrics(run).iter().map(|line| line["loss"].as_f64().unwrap()).collect()
    }

    /// The adapter that a run wrote.
    pub fn adapter(&self, run: &str) -> Vec<u8> {
        self.bytes(&format!("{run}/adapter/adapter_model.safetensors"))
    }

    /// A copy of the golden model with a byte-level tokenizer and a chat template.
    pub fn model_with_text(&self) -> PathBuf {
        let path = self.copy("model", "texts");
        self.write("texts/tokenizer.json", tokenizer().to_string());
        let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}\
                        {% if add_generation_prompt %}[assistant]{% endif %}";
        let config = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true, "chat_template": template});
        self.write("texts/tokenizer_config.json", config.to_string());
        path
    }
}

/// One token a byte, `<s>` (1) and `</s>` (2).
fn tokenizer() -> Value {
    let mut vocab = serde_json::Map::from_iter([("<s>".to_string(), json!(1)), ("</s>".to_string(), json!(2))]);
    // Bytes that print are themselves in byte-level vocabularies; the others are the characters from 256 on.
    let prints = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let others = (0..256).filter(|&byte| !prints(byte)).count() as u32;
    let characters = (0..256).filter(|&byte| prints(byte)).chain(256..256 + others);
    vocab.extend(characters.zip(3..).map(|(c, id)| (char::from_u32(c).unwrap().to_string(), json!(id))));
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(1, "<s>"), special(2, "</s>")],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

/// Changes the header of a safetensors file, keeping its data.
pub fn edit_header(path: &Path, edit: impl FnOnce(&mut Value)) {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let (header, data) = bytes[8..].split_at(length);
    let mut header: Value = serde_json::from_slice(header).unwrap();
    edit(&mut header);
    let header = header.to_string().into_bytes();
    fs::write(path, [&(header.len() as u64).to_le_bytes()[..], &header, data].concat()).unwrap();
}

/// Changes a JSON file.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}
