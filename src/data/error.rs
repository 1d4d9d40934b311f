//! Errors of training data.

use std::path::{Path, PathBuf};

/// What can be wrong with a data file.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The system refused to read it.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// The file as a whole cannot be trained on.
    #[error("{}: {what}", path.display())]
    File { path: PathBuf, what: String },
    /// A row is not what it should be. `line` counts from 1; in a Parquet file it is the row.
    #[error("{}:{line}: {what}", path.display())]
    Row { path: PathBuf, line: usize, what: String },
    /// The user interrupted the reading.
    #[error("stopped while reading data")]
    Stopped,
    /// A setting is outside of what makes sense.
    #[error("{0}")]
    Options(String),
}

/// Result of reading data.
pub type Result<T> = std::result::Result<T, DataError>;

impl DataError {
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> DataError + '_ {
        move |source| DataError::Io { path: path.to_path_buf(), source }
    }

    pub(super) fn file(path: &Path, what: impl Into<String>) -> DataError {
        DataError::File { path: path.to_path_buf(), what: what.into() }
    }

    pub(super) fn row(path: &Path, line: usize, what: impl Into<String>) -> DataError {
        DataError::Row { path: path.to_path_buf(), line, what: what.into() }
    }
}
