//! The embedded default model and task: what `train-llama` trains when it is told nothing.
//!
//! * [`text`]: scenes of a small world, which the base model is trained on;
//! * [`task`]: sentences of that world and the records of what they say, which the adapter is trained on;
//! * [`tokenizer`] and [`init`]: the tokenizer trained on the text, the model's shape and its random start.
//!
//! The program `make-assets` writes all of it from one seed; `assets/default/README.md` names the commands.

pub mod init;
pub mod task;
pub mod text;
pub mod tokenizer;
pub mod world;

use std::io;
use std::path::{Path, PathBuf};

/// The seed that the committed assets were made with.
pub const SEED: u64 = 1;
/// Rows of `train.jsonl`.
pub const TRAIN_ROWS: u32 = 2000;
/// Rows of `eval.jsonl`.
pub const EVAL_ROWS: u32 = 200;
/// Scenes of the base model's text.
pub const SCENES: u32 = 30_000;

/// Folder of the model within [`unpack`]'s folder.
pub const MODEL: &str = "model";
/// The examples to train on, within [`unpack`]'s folder.
pub const TRAIN: &str = "train.jsonl";
/// The held-out examples, within [`unpack`]'s folder.
pub const EVAL: &str = "eval.jsonl";
/// Settings of the default run, as TOML over the usual defaults.
pub const RECIPE: &str = include_str!("../../assets/default/recipe.toml");

/// Writes the embedded model and data into a temporary folder, so that they are read like anyone's files. The folder goes
/// with the returned value.
pub fn unpack() -> io::Result<tempfile::TempDir> {
    macro_rules! asset {
        ($name:literal) => {
            ($name, include_bytes!(concat!("../../assets/default/", $name)).as_slice())
        };
    }
    let dir = tempfile::Builder::new().prefix("nibble-").tempdir()?;
    std::fs::create_dir(dir.path().join(MODEL))?;
    for (name, bytes) in [
        asset!("model/config.json"),
        asset!("model/model.safetensors"),
        asset!("model/tokenizer.json"),
        asset!("model/tokenizer_config.json"),
        asset!("train.jsonl"),
        asset!("eval.jsonl"),
    ] {
        std::fs::write(dir.path().join(name), bytes)?;
    }
    Ok(dir)
}

/// A failure to make the assets.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused to write.
    #[error("cannot write {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    /// The tokenizer could not be trained.
    #[error("cannot train the tokenizer: {0}")]
    Tokenizer(#[from] tokenizers::Error),
    /// The initial weights could not be written.
    #[error("cannot write the initial weights: {0}")]
    Weights(#[from] safetensors::SafeTensorError),
}

/// Writes the assets that are generated, not trained, into `assets` (the tokenizer, `config.json`, `train.jsonl`,
/// `eval.jsonl`) and what training the base needs into `work`: `pretrain.jsonl` with one `{"text"}` row a scene, and the
/// model folder `init`. Existing files are replaced.
///
/// # Errors
/// If a file cannot be written or the tokenizer cannot be trained.
pub fn write(assets: &Path, work: &Path, seed: u64) -> Result<(), Error> {
    let scenes: Vec<String> = (0..SCENES).map(|index| text::scene(seed, index)).collect();
    let tokenizer = tokenizer::train(&scenes, init::VOCAB)?.to_string(true)?;
    let init = work.join("init");
    for dir in [&assets.join(MODEL), &init] {
        std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.to_path_buf(), source })?;
        put(&dir.join("tokenizer.json"), &tokenizer)?;
        put(&dir.join("tokenizer_config.json"), &pretty(&tokenizer::config_json()))?;
        put(&dir.join("config.json"), &pretty(&init::config_json()))?;
    }
    init::write_weights(&init.join("model.safetensors"), seed)?;
    put(&work.join("pretrain.jsonl"), &lines(scenes.iter().map(|text| serde_json::json!({ "text": text }))))?;
    put(&assets.join("train.jsonl"), &lines(task::train_rows(seed, TRAIN_ROWS)))?;
    put(&assets.join("eval.jsonl"), &lines(task::eval_rows(seed, EVAL_ROWS)))
}

fn put(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text).map_err(|source| Error::Io { path: path.to_path_buf(), source })
}

fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}

/// `rows` as JSON lines.
fn lines<T: serde::Serialize>(rows: impl IntoIterator<Item = T>) -> String {
    // Rows hold strings only, which always serialize.
    rows.into_iter().filter_map(|row| serde_json::to_string(&row).ok()).map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GENERATED: [&str; 5] =
        ["model/config.json", "model/tokenizer.json", "model/tokenizer_config.json", TRAIN, EVAL];

    /// The embedded files are what the generator makes, byte for byte, and fit their budget with the weights.
    #[test]
    fn the_assets_are_current_and_small() {
        let made = tempfile::tempdir().unwrap();
        let (assets, work) = (made.path().join("assets"), made.path().join("work"));
        write(&assets, &work, SEED).unwrap();
        let unpacked = unpack().unwrap();
        let size = |name: &str| std::fs::metadata(unpacked.path().join(name)).unwrap().len();
        for name in GENERATED {
            let [fresh, embedded] =
                [assets.as_path(), unpacked.path()].map(|dir| std::fs::read(dir.join(name)).unwrap());
            assert!(fresh == embedded, "{name} is stale: run `cargo run --release --bin make-assets`");
        }
        let total = GENERATED.map(size).iter().sum::<u64>() + size("model/model.safetensors");
        assert!(total <= 4_000_000, "{total} bytes");
    }

    #[test]
    fn the_unpacked_folder_goes_with_its_handle() {
        let dir = unpack().unwrap();
        let path = dir.path().to_path_buf();
        assert!(path.join(MODEL).join("model.safetensors").is_file());
        drop(dir);
        assert!(!path.exists());
    }
}
