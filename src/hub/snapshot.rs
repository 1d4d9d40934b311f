//! Commits of repositories on the Hub, file by file, and what a refusal means.

use super::{Name, listed};
use anyhow::{Context, Result, anyhow, ensure};
use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{Api, ApiBuilder, ApiError},
};
use std::{
    env,
    path::{Component, Path, PathBuf},
};

/// The Hub, or what was fetched from it before.
pub struct Hub {
    /// `None` if the user wants no network.
    api: Option<Api>,
    cache: Cache,
    endpoint: String,
}

/// One commit of a repository.
pub struct Snapshot<'a> {
    hub: &'a Hub,
    repo: Repo,
    name: Name,
    commit: String,
    /// Paths of its files.
    pub files: Vec<String>,
    /// Whether the Hub can be asked for what is not in the cache.
    online: bool,
}

impl Hub {
    /// By the environment's variables.
    ///
    /// # Errors
    /// They make no sense.
    pub fn new() -> Result<Hub> {
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
    ///
    /// # Errors
    /// There is none, or it cannot be read; the message says what to do.
    pub fn snapshot(&self, name: &Name, kind: RepoType) -> Result<Snapshot<'_>> {
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
    ///
    /// # Errors
    /// It has no such file, or the file cannot be fetched.
    pub fn file(&self, file: &str) -> Result<PathBuf> {
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
