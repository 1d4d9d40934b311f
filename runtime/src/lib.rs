//! The runtime of nibble: devices, memory, tensors, the autograd tape and random numbers.
//!
//! It knows no model and no operation; `nibble-kernels` builds on it.

pub mod allocator;
pub mod cuda;
mod device;
mod dtype;
mod error;
pub mod memory;
pub mod pager;
pub mod rng;
mod stash;
pub mod tape;
mod tensor;

pub use device::{Device, DeviceRequest};
pub use dtype::{DType, Element, Float};
pub use error::{Error, Result};
pub use memory::Tag;
pub use stash::{Stash, Stashed};
pub use tape::{Function, GradSink, ParamId, Tape, Var};
pub use tensor::Tensor;
