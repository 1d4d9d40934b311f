//! The folder of a run: claimed once, never overwritten.

use crate::settings::Settings;
use anyhow::{Context, Result, bail};
use nibble_models::files::atomic::atomic_write;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// What a folder that holds a run contains.
const MARKS: [&str; 4] = ["settings.toml", "metrics.jsonl", "adapter", "model"];

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

    /// Makes the folder and writes the exact settings.
    pub fn create(&self, settings: &Settings) -> Result<()> {
        fs::create_dir_all(&self.path).with_context(|| format!("creating {}", self.path.display()))?;
        let text = toml::to_string(settings).context("writing the settings")?;
        atomic_write(&self.join("settings.toml"), |out| out.write_all(text.as_bytes()))?;
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
