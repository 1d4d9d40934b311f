//! Models and data by their names on the Hugging Face Hub, kept in its usual cache.
//!
//! `org/name`, `org/name@revision`, and behind either `/path` to a file or folder in it. What is there under such a path on
//! this machine comes first. The environment is that of Hugging Face's own programs: `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`,
//! `HF_ENDPOINT`, `HF_HUB_OFFLINE`.

use crate::data::{DataSpec, Place, names_data};
use anyhow::{Context, Result, anyhow, bail, ensure};
use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{Api, ApiBuilder, ApiError},
};
use nibble_models::files::atomic::read_json_object;
use std::{
    collections::BTreeSet,
    env,
    path::{Component, Path, PathBuf},
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

/// The local path of a model: itself, or what its name was fetched to.
///
/// # Errors
/// There is nothing of this name, or it cannot be fetched; the message says what to do.
pub fn model(path: &Path) -> Result<PathBuf> {
    let file = path.extension().is_some_and(|ending| ending == "gguf") && path.components().count() < 3;
    let Some(name) = Name::parse(path).filter(|_| !file) else { return Ok(path.to_path_buf()) };
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

/// The Hub, or what was fetched from it before.
struct Hub {
    /// `None` if the user wants no network.
    api: Option<Api>,
    cache: Cache,
    endpoint: String,
}

/// One commit of a repository.
struct Snapshot<'a> {
    hub: &'a Hub,
    repo: Repo,
    name: Name,
    commit: String,
    files: Vec<String>,
    /// Whether the Hub can be asked for what is not in the cache.
    online: bool,
}

impl Hub {
    fn new() -> Result<Hub> {
        let variable = |name| env::var(name).ok().filter(|value| !value.is_empty());
        let cache = variable("HF_HUB_CACHE").map_or_else(Cache::from_env, |folder| Cache::new(folder.into()));
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let offline = variable("HF_HUB_OFFLINE").is_some_and(|value| value != "0");
        let mut builder = ApiBuilder::from_env().with_cache_dir(cache.path().clone()).with_endpoint(endpoint.clone());
        if let Some(token) = variable("HF_TOKEN") {
            builder = builder.with_token(Some(token));
        }
        let api = if offline { None } else { Some(builder.with_retries(3).build()?) };
        Ok(Hub { api, cache, endpoint })
    }

    /// The commit that a revision is now, or was when it was fetched last.
    fn snapshot(&self, name: &Name, kind: RepoType) -> Result<Snapshot<'_>> {
        let named = Repo::with_revision(name.repo.clone(), kind, name.revision.clone());
        let snapshot = |commit: String, files, online| {
            let repo = Repo::with_revision(name.repo.clone(), kind, commit.clone());
            Snapshot { hub: self, repo, name: name.clone(), commit, files, online }
        };
        let asked = self.api.as_ref().map(|api| api.repo(named.clone()).info());
        match asked {
            Some(Ok(info)) => {
                let files: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
                // They become paths in the cache.
                let safe =
                    |file: &String| Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
                let commit = info.sha;
                ensure!(
                    files.iter().all(safe) && commit.chars().all(|c| c.is_ascii_alphanumeric()),
                    "{} lists names that are no files of it",
                    self.endpoint
                );
                self.cache.repo(named).create_ref(&commit).context("writing the Hub's cache")?;
                Ok(snapshot(commit, files, true))
            }
            Some(Err(error)) if answered(&error).is_some() => Err(self.explained(error, name)),
            unreachable => {
                let fetched = self.fetched(&named).with_context(|| match unreachable {
                    Some(Err(error)) => self.explained(error, name).to_string(),
                    _ => format!("{} was not fetched yet, and HF_HUB_OFFLINE forbids to", name.repo),
                })?;
                crate::note!("hub      {}: offline, as fetched before", name.repo);
                Ok(snapshot(fetched.0, fetched.1, false))
            }
        }
    }

    /// The commit and the files of what is in the cache.
    fn fetched(&self, named: &Repo) -> Option<(String, Vec<String>)> {
        let refs = self.cache.path().join(named.folder_name()).join("refs").join(named.revision());
        let commit = std::fs::read_to_string(refs).ok()?.trim().to_owned();
        let folder = self.cache.repo(named.clone()).pointer_path(&commit);
        let mut files = Vec::new();
        let mut folders = vec![folder.clone()];
        while let Some(inside) = folders.pop() {
            for entry in std::fs::read_dir(inside).ok()?.flatten() {
                let path = entry.path();
                match entry.file_type().ok()?.is_dir() {
                    true => folders.push(path),
                    false => files.extend(path.strip_prefix(&folder).ok()?.to_str().map(str::to_owned)),
                }
            }
        }
        files.sort();
        (!files.is_empty()).then_some((commit, files))
    }

    /// What went wrong, and what the user can do.
    fn explained(&self, error: ApiError, name: &Name) -> anyhow::Error {
        let (Hub { endpoint, .. }, Name { repo, revision, .. }) = (self, name);
        match answered(&error) {
            Some(401 | 403) => anyhow!(
                "{endpoint} does not let you read {repo}: it does not exist, or is private, or its terms are to be accepted \
                 at {endpoint}/{repo}. Log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
            ),
            Some(404) => anyhow!(
                "there is no {repo} (revision {revision}) at {endpoint}, and no such path on this machine; check the name"
            ),
            Some(status) => anyhow!("{endpoint} answered {status} for {repo}; try again later"),
            None => anyhow!(
                "{repo} is not on this machine and {endpoint} cannot be reached ({error}). Check the network, or name a local \
                 path"
            ),
        }
    }
}

/// The Hub's answer, if it gave one: the HTTP status.
fn answered(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        ApiError::TooManyRetries(error) => answered(error),
        _ => None,
    }
}

impl Snapshot<'_> {
    /// The local path of a file, which is fetched if it is not there yet.
    fn file(&self, file: &str) -> Result<PathBuf> {
        let Snapshot { hub, repo, name, commit, files, online } = self;
        let path = hub.cache.repo(repo.clone()).pointer_path(commit).join(file);
        if path.exists() {
            return Ok(path);
        }
        ensure!(files.iter().any(|found| found == file), "{} has no {file}; it has {}", name.repo, listed(files));
        let api = hub.api.as_ref().filter(|_| *online);
        let api = api.with_context(|| format!("{file} of {} was not fetched yet", name.repo))?;
        crate::note!("hub      fetching {}/{file}", name.repo);
        api.repo(repo.clone()).download(file).map_err(|error| hub.explained(error, name))
    }
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
            ["name", "src/data", "/abs/path", "./a/b", "../a", "a//b", "random:tiny", "org/name@", "a b/c", "~/m"]
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
