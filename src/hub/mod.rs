//! Models and data by their names on the Hugging Face Hub, kept in its usual cache.
//!
//! `org/name`, `org/name@revision`, and behind either `/path` to a file or folder in it. What is there under such a path on
//! this machine comes first. The environment is that of Hugging Face's own programs: `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`,
//! `HF_ENDPOINT`, `HF_HUB_OFFLINE`.

mod snapshot;

use crate::data::{DataSpec, Place, names_data};
use anyhow::{Context, Result, bail, ensure};
use hf_hub::RepoType;
use nibble_models::files::atomic::read_json_object;
use snapshot::Hub;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

/// Files of a model beside its weights, as far as they are there.
const BESIDE: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "adapter_config.json",
];
const INDEX: &str = "model.safetensors.index.json";

/// Where a name points to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Name {
    repo: String,
    revision: String,
    /// Empty for all of it.
    path: String,
}

impl Name {
    /// The name that `text` is, unless it is a path on this machine.
    fn parse(text: &Path) -> Option<Name> {
        if text.exists() {
            return None;
        }
        let mut parts = text.to_str()?.splitn(3, '/');
        let (org, name, path) = (parts.next()?, parts.next()?, parts.next().unwrap_or_default());
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        let word = |text: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !text.is_empty() && text.chars().all(plain) && !text.starts_with('.')
        };
        let found = word(org) && word(name) && !revision.is_empty();
        found.then(|| Name { repo: format!("{org}/{name}"), revision: revision.into(), path: path.into() })
    }
}

/// The `config.json` of a model that has a name and one, without its weights.
///
/// # Errors
/// As [`model`].
pub fn config(path: &Path) -> Result<Option<PathBuf>> {
    let Some(name) = named(path).filter(|name| name.path.is_empty()) else { return Ok(None) };
    let hub = Hub::new()?;
    let snapshot = hub.snapshot(&name, RepoType::Model)?;
    let has = snapshot.files.iter().any(|found| found == "config.json");
    has.then(|| snapshot.file("config.json")).transpose()
}

/// The name that stands in place of a model's path, if one does.
fn named(path: &Path) -> Option<Name> {
    let file = path.extension().is_some_and(|ending| ending == "gguf") && path.components().count() < 3;
    Name::parse(path).filter(|_| !file)
}

/// The local path of a model: itself, or what its name was fetched to.
///
/// # Errors
/// There is nothing of this name, or it cannot be fetched; the message says what to do.
pub fn model(path: &Path) -> Result<PathBuf> {
    let Some(name) = named(path) else { return Ok(path.to_path_buf()) };
    let hub = Hub::new()?;
    let snapshot = hub.snapshot(&name, RepoType::Model)?;
    if !name.path.is_empty() {
        return snapshot.file(&name.path);
    }
    let has = |file: &str| snapshot.files.iter().any(|found| found == file);
    if !has("config.json") {
        let ggufs: Vec<&str> =
            snapshot.files.iter().map(String::as_str).filter(|name| name.ends_with(".gguf")).collect();
        ensure!(!ggufs.is_empty(), "{} has neither a config.json nor a .gguf file: it is no model", name.repo);
        bail!(
            "{0} has GGUF files; name one, as --model {0}/{1}. There are: {2}",
            name.repo,
            ggufs[0],
            ggufs.join(", ")
        );
    }
    let folder = snapshot.file("config.json")?.parent().map(Path::to_path_buf).context("a file without a folder")?;
    for file in BESIDE.into_iter().filter(|file| has(file)) {
        snapshot.file(file)?;
    }
    let mut weights = BTreeSet::from(["model.safetensors".to_owned()]);
    if has(INDEX) {
        let index = read_json_object(&snapshot.file(INDEX)?)?;
        let shards = index.get("weight_map").and_then(|map| map.as_object()).into_iter().flat_map(|map| map.values());
        weights = shards.filter_map(|shard| shard.as_str().map(str::to_owned)).collect();
    }
    for file in weights {
        ensure!(has(&file), "{} has no {file}: only weights in safetensors or GGUF can be read", name.repo);
        snapshot.file(&file)?;
    }
    Ok(folder)
}

/// Data whose places are all on this machine. `held_out` says which files are meant where a name points to a whole data
/// set: those to evaluate on, or those to train on.
///
/// # Errors
/// A place is not there, holds no data or cannot be fetched; the message says what to do.
pub fn data(spec: &DataSpec, held_out: bool) -> Result<DataSpec> {
    let mut places = Vec::new();
    for place in &spec.0 {
        // A file that is missing here, rather than a data set.
        let file = names_data(&place.path) && place.path.components().count() < 3;
        let Some(name) = Name::parse(&place.path).filter(|_| !file) else {
            place.files()?;
            places.push(place.clone());
            continue;
        };
        let hub = Hub::new()?;
        let snapshot = hub.snapshot(&name, RepoType::Dataset)?;
        for file in chosen(&snapshot.files, &name, held_out)? {
            places.push(Place { path: snapshot.file(&file)?, weight: place.weight });
        }
    }
    Ok(DataSpec(places))
}

/// The data files that are meant.
fn chosen(files: &[String], name: &Name, held_out: bool) -> Result<Vec<String>> {
    let Name { repo, path, .. } = name;
    let data: Vec<&String> = files.iter().filter(|file| names_data(Path::new(file))).collect();
    if !path.is_empty() {
        let inside: Vec<String> =
            data.iter().filter(|file| Path::new(file).starts_with(path)).map(|f| (*f).clone()).collect();
        ensure!(!inside.is_empty(), "{repo} has no data at {path}; it has {}", listed(files));
        return Ok(inside);
    }
    ensure!(!data.is_empty(), "{repo} has no data files that can be read; it has {}", listed(files));
    let of = |splits: &[&str]| -> Vec<String> {
        let words = |file: &str| file.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| splits.contains(&word));
        data.iter().filter(|file| words(file)).map(|file| (*file).clone()).collect()
    };
    const HELD_OUT: [&[&str]; 2] = [&["validation", "valid", "val", "dev"], &["test", "eval"]];
    if held_out {
        let found = HELD_OUT.iter().map(|splits| of(splits)).find(|found| !found.is_empty());
        return found.with_context(|| {
            format!(
                "{repo} has no validation or test files; name what to evaluate on: {repo}/PATH. It has {}",
                listed(files)
            )
        });
    }
    let train = of(&["train"]);
    let others = of(&HELD_OUT.concat());
    Ok(if train.is_empty() { data.into_iter().filter(|file| !others.contains(file)).cloned().collect() } else { train })
}

fn listed(files: &[String]) -> String {
    let shown: Vec<&str> = files.iter().take(12).map(String::as_str).collect();
    shown.join(", ") + if files.len() > shown.len() { ", …" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_paths_are_told_apart() {
        let parse = |text: &str| Name::parse(Path::new(text)).map(|name| (name.repo, name.revision, name.path));
        let name = |repo: &str, revision: &str, path: &str| Some((repo.into(), revision.into(), path.into()));
        assert_eq!(parse("org/na.me-1"), name("org/na.me-1", "main", ""));
        assert_eq!(parse("org/name@v1/data/a.csv"), name("org/name", "v1", "data/a.csv"));
        for path in
            ["name", "models/tests", "/abs/path", "./a/b", "../a", "a//b", "random:tiny", "org/name@", "a b/c", "~/m"]
        {
            assert_eq!(parse(path), None, "{path}");
        }
        // What is missing here is an error of this machine, not of the Hub.
        assert_eq!(model(Path::new("models/x.gguf")).unwrap(), Path::new("models/x.gguf"));
        let missing = data(&PathBuf::from("nowhere/x.jsonl").into(), false).unwrap_err().to_string();
        assert!(missing.starts_with("nowhere/x.jsonl: "), "{missing}");
    }

    #[test]
    fn splits_are_found_by_their_words() {
        let files = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let choose = |names: &[&str], path: &str, held_out| {
            let name = Name { repo: "o/n".into(), revision: "main".into(), path: path.into() };
            chosen(&files(names), &name, held_out).map_err(|error| error.to_string())
        };
        let hub = [
            "README.md",
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-0.parquet",
        ];
        assert_eq!(choose(&hub, "", false).unwrap(), hub[1..3]);
        assert_eq!(choose(&hub, "", true).unwrap(), hub[3..]);
        assert_eq!(choose(&hub, "data/train-00001-of-00002.parquet", true).unwrap(), hub[2..3]);
        assert_eq!(choose(&hub, "data", false).unwrap(), hub[1..]);
        assert!(choose(&hub, "other", false).unwrap_err().contains("it has README.md, data/train"));
        let plain = ["alpaca.json", "constraints.jsonl", "valid.csv"];
        assert_eq!(choose(&plain, "", false).unwrap(), plain[..2]);
        assert_eq!(choose(&plain, "", true).unwrap(), plain[2..]);
        assert!(choose(&plain[..2], "", true).unwrap_err().contains("o/n/PATH"));
        assert!(choose(&["a.py"], "", false).unwrap_err().contains("no data files"));
    }
}
