//! Optimizers, learning-rate schedules and gradient accumulation of nibble.
//!
//! A training step uses them in this order: the tape's backward pass fills [`Gradients`]; [`Gradients::clip`]
//! makes the clipping factor; [`Schedule::factor`] the learning rate; [`AdamW::step`] updates.

mod adamw;
mod gradients;
mod schedule;

pub use adamw::{AdamW, EIGHT_BIT_FROM, Part, StateBits, Update};
pub use gradients::Gradients;
pub use nibble_kernels::adamw::{AdamWConfig, DecayOrder};
pub use schedule::Schedule;
