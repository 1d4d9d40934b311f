//! The folder of a run: claimed once, never overwritten.

use crate::settings::Settings;
use anyhow::{Context, Result, bail};
use nibble_models::files::atomic::{atomic_write, read_json_object};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// File of a run's settings.
const SETTINGS: &str = "settings.toml";

/// What a folder that holds a run contains.
const MARKS: [&str; 4] = [SETTINGS, "metrics.jsonl", "adapter", "model"];

/// Where a run writes.
#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// The folder that the settings name, or the first free `runs/<model>-<method>-<number>`. Nothing is made yet.
    ///
    /// # Errors
    /// The folder holds a run, or is not a folder.
    pub fn plan(settings: &Settings) -> Result<RunDir> {
        let path = match &settings.out {
            Some(path) => path.clone(),
            None => {
                let model = settings.model.as_deref().map_or("embedded".into(), stem);
                let name = |n: usize| Path::new("runs").join(format!("{model}-{}-{n}", settings.method));
                (1..).map(name).find(|path| !path.exists()).context("no free name under runs/")?
            }
        };
        if path.exists() && !path.is_dir() {
            bail!("{} is a file; --out must name a folder", path.display());
        }
        if let Some(mark) = MARKS.iter().find(|mark| path.join(mark).exists()) {
            bail!("{} already holds a run ({mark}); choose another --out or move it away", path.display());
        }
        Ok(RunDir { path })
    }

    /// The run in `path`, or the latest one under `runs/`, to continue.
    ///
    /// # Errors
    /// There is none.
    pub fn open(path: Option<&Path>) -> Result<RunDir> {
        let path = match path {
            Some(path) => path.to_path_buf(),
            None => {
                latest(Path::new("runs")).context("there is no run under runs/ to continue; name one: --resume DIR")?
            }
        };
        if !path.join(SETTINGS).is_file() {
            bail!("{} holds no run to continue: it has no {SETTINGS}", path.display());
        }
        Ok(RunDir { path })
    }

    /// The number of its steps, if the run went to its end.
    pub fn finished(&self) -> Option<u64> {
        let summary = read_json_object(&self.join("summary.json")).ok()?;
        summary.get("steps")?.as_u64().filter(|_| summary.get("interrupted") == Some(&false.into()))
    }

    /// The file of the exact settings.
    pub fn settings(&self) -> PathBuf {
        self.join(SETTINGS)
    }

    /// Makes the folder and writes the exact settings.
    pub fn create(&self, settings: &Settings) -> Result<()> {
        fs::create_dir_all(&self.path).with_context(|| format!("creating {}", self.path.display()))?;
        let text = toml::to_string(settings).context("writing the settings")?;
        atomic_write(&self.settings(), |out| out.write_all(text.as_bytes()))?;
        Ok(())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path inside of it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

/// A file's or folder's name without its ending.
fn stem(path: &Path) -> String {
    let name = path.file_stem().or(path.file_name());
    name.map_or("model".into(), |name| name.to_string_lossy().into_owned())
}

/// The run under `folder` that was written to last.
fn latest(folder: &Path) -> Option<PathBuf> {
    let runs = fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let written = |run: PathBuf| {
        let times =
            ["metrics.jsonl", SETTINGS].map(|name| fs::metadata(run.join(name)).and_then(|file| file.modified()).ok());
        // The settings come first: without them it is no run.
        times[1].map(|settings| (times[0].unwrap_or(settings), run))
    };
    runs.filter_map(written).max().map(|(_, run)| run)
}
