//! Errors of models and their files.

use std::path::{Path, PathBuf};

/// What can go wrong with a model, an adapter or a tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused to read or write.
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    /// A file is not what it should be: truncated, malformed, lying about its contents.
    #[error("{path}: {what}")]
    File { path: PathBuf, what: String },
    /// A checkpoint lacks a tensor or has it in another shape, or an adapter does not fit the model.
    #[error("{path}: {what}")]
    Mismatch { path: PathBuf, what: String },
    /// Well-formed, but of a kind that nibble does not run.
    #[error("{path}: {what}")]
    Unsupported { path: PathBuf, what: String },
    /// A setting or an input is outside of what the model allows.
    #[error("{0}")]
    Invalid(String),
    /// An operation failed.
    #[error(transparent)]
    Runtime(#[from] nibble_runtime::Error),
}

/// Result of a model call.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Io`] of `path`, for `map_err`.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
        move |source| Error::Io { path: path.to_path_buf(), source }
    }

    /// An [`Error::File`] of `path`.
    pub fn file(path: &Path, what: impl Into<String>) -> Error {
        Error::File { path: path.to_path_buf(), what: what.into() }
    }

    /// An [`Error::Mismatch`] of `path`.
    pub fn mismatch(path: &Path, what: impl Into<String>) -> Error {
        Error::Mismatch { path: path.to_path_buf(), what: what.into() }
    }

    /// An [`Error::Unsupported`] of `path`.
    pub fn unsupported(path: &Path, what: impl Into<String>) -> Error {
        Error::Unsupported { path: path.to_path_buf(), what: what.into() }
    }
}
