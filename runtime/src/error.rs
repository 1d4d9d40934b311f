//! Errors of the runtime.

use crate::{DType, Device, allocator::OutOfMemory};

/// What can go wrong with devices, memory and tensors.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor was read as another element type than it holds.
    #[error("{op}: expected a {expected} tensor, found {found}")]
    DType { op: &'static str, expected: String, found: DType },
    /// Shapes do not fit the operation.
    #[error("{op}: {what}")]
    Shape { op: &'static str, what: String },
    /// A tensor was to be written while something else still refers to its storage.
    #[error("{op}: the tensor's storage is shared with another tensor, so it cannot be written in place")]
    Shared { op: &'static str },
    /// The operation has no kernel for the device.
    #[error("{op}: no kernel for {device}; run with --device cpu")]
    NoKernel { op: &'static str, device: Device },
    /// The requested device does not exist or cannot be used.
    #[error("device {requested}: {reason}")]
    Device { requested: String, reason: String },
    /// The device has no memory left.
    #[error(transparent)]
    OutOfMemory(Box<OutOfMemory>),
    /// The CUDA driver refused a call, or a kernel failed.
    #[error("{op}: {what}")]
    Cuda { op: &'static str, what: String },
    /// An argument is outside of what the operation is defined for.
    #[error("{op}: {what}")]
    Invalid { op: &'static str, what: String },
}

/// Result of a runtime or kernel call.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A shape error of `op`.
    pub fn shape(op: &'static str, what: impl Into<String>) -> Self {
        Error::Shape { op, what: what.into() }
    }

    /// An invalid-argument error of `op`.
    pub fn invalid(op: &'static str, what: impl Into<String>) -> Self {
        Error::Invalid { op, what: what.into() }
    }
}
