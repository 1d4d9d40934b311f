//! Optimizers, learning-rate schedules and gradient accumulation of nibble.
//!
//! A training step uses them in this order: the tape's backward pass fills [`Gradients`]; [`Gradients::clip`]
//! makes the clipping factor; [`Schedule::factor`] the learning rate; [`AdamW::step`] updates. What they keep is a tensor
//! for each parameter, or lies in pages that may leave the device ([`PagedState`]); the results are the same to the bit.

mod adamw;
mod gradients;
mod paged;
#[cfg(test)]
mod paged_tests;
mod schedule;
mod sweep;

pub use adamw::{AdamW, EIGHT_BIT_FROM, Layout, Part, Saved, StateBits, Update};
pub use gradients::Gradients;
pub use nibble_kernels::adamw::{AdamWConfig, DecayOrder};
pub use paged::PagedState;
pub use schedule::Schedule;
