//! NVIDIA GPUs through the driver API, loaded at run time: no toolkit at build time, none on the user's machine.
//!
//! [`Gpu::of`] gives the one [`Gpu`] of a device: its context, its compute stream, its memory and its loaded modules.
//! All operations run in order on the compute stream; nothing waits for the device but reading a tensor back,
//! [`Gpu::synchronize`] and [`Timer::milliseconds`].

mod arena;
mod bus;
mod copy;
mod driver;
mod event;
mod gpu;
mod graph;
mod launch;
mod memory;
#[cfg(test)]
mod memory_tests;
#[cfg(test)]
mod pages_tests;
mod pinned;
mod profile;
mod space;
mod tensor_map;
mod testing;
mod transfer;
mod unified;

pub(crate) use arena::PinnedArena;
pub use bus::BusRates;
pub use copy::COPY;
pub(crate) use copy::{copy, download, upload, upload_on};
pub use driver::{DRIVER_NEEDED, MIN_CAPABILITY, available};
pub use event::{Event, Timer};
pub use gpu::{Chip, Gpu, Stream};
pub use graph::Graph;
pub use launch::{Args, Entry, Module, Work};
pub(crate) use memory::DeviceBuffer;
pub use memory::{DeviceMemory, poison};
pub use pinned::PinnedPages;
pub use profile::{Launch, Profiled};
pub use space::{GpuEvents, GpuSpace};
pub use testing::device_for_tests;
pub use unified::UnifiedPages;
