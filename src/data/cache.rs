//! Where tokenized data is kept between runs.
//!
//! A file of examples is found under a key made of all that they depend on: files (path, size, time of the last change),
//! tokenizer and template, and settings. A file that has changed has another key, so nothing is ever out of date.

use super::error::{DataError, Result};
use super::store::Examples;
use std::{
    fs::{self, File, FileTimes},
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use tempfile::NamedTempFile;

/// What has not been used for so long is removed.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);
const ENDING: &str = "examples";
/// How the names of files begin that are being written, or that a process has left which was killed.
const UNFINISHED: &str = ".writing-";

/// A folder of tokenized data.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The cache in `folder`, or in the user's folder for such files (`$XDG_CACHE_HOME`, `~/.cache`). Nothing is made yet.
    pub fn new(folder: Option<PathBuf>) -> Self {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let usual = || {
            let home = || Some(variable("HOME").or_else(|| variable("USERPROFILE"))?.join(".cache"));
            variable("XDG_CACHE_HOME").or_else(home).unwrap_or_else(std::env::temp_dir).join("nibble")
        };
        Cache { folder: folder.unwrap_or_else(usual) }
    }

    /// The file of a key.
    pub fn path(&self, key: &str) -> PathBuf {
        self.folder.join(&key[..key.len().min(32)]).with_extension(ENDING)
    }

    /// The examples of a key, if there are any.
    pub(super) fn find(&self, key: &str) -> Option<Examples> {
        let path = self.path(key);
        let examples = Examples::open(&path).filter(|examples| examples.known().key == key)?;
        // Only for cleaning up: it works without.
        let _ = File::options()
            .append(true)
            .open(&path)
            .and_then(|file| file.set_times(FileTimes::new().set_modified(SystemTime::now())));
        Some(examples)
    }

    /// A new file, to be renamed when it is whole. What has not been used for long is removed first.
    ///
    /// # Errors
    /// It cannot be made.
    pub(super) fn create(&self) -> Result<NamedTempFile> {
        fs::create_dir_all(&self.folder).map_err(|error| self.full(error))?;
        self.remove_old();
        tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.folder).map_err(|error| self.full(error))
    }

    fn remove_old(&self) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            let old = |path: &Path| -> Option<bool> {
                let age = fs::metadata(path).ok()?.modified().ok()?.elapsed().ok()?;
                let unfinished = path.file_name()?.to_str()?.starts_with(UNFINISHED);
                Some(age > KEPT && (unfinished || path.extension()? == ENDING))
            };
            if old(&path).unwrap_or(false) {
                // Another process may have been faster.
                let _ = fs::remove_file(&path);
            }
        }
    }

    /// The error of a cache that cannot be written.
    pub(super) fn full(&self, error: io::Error) -> DataError {
        let what = format!("cannot keep tokenized data there: {error}; name a folder with more room by --cache DIR");
        DataError::file(&self.folder, what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_old_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(dir.path().join("deep/cache")));
        drop(cache.create().unwrap());
        let names = ["old.examples", "new.examples", "old.txt", ".writing-a"];
        let files = names.map(|name| cache.folder.join(name));
        for path in &files {
            let file = File::create(path).unwrap();
            let age = if path == &files[1] { KEPT / 2 } else { 2 * KEPT };
            file.set_times(FileTimes::new().set_modified(SystemTime::now() - age)).unwrap();
        }
        drop(cache.create().unwrap());
        assert_eq!(files.map(|path| path.exists()), [false, true, true, false]);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let file = NamedTempFile::new().unwrap();
        let cache = Cache::new(Some(file.path().join("cache")));
        let error = cache.create().unwrap_err().to_string();
        assert!(error.contains("--cache DIR") && error.contains("cache: cannot keep"), "{error}");
    }
}
