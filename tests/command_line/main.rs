//! The program itself: what each command promises, and how it answers mistakes.

mod export;
mod faults;
mod gguf;
mod inference;
mod plan;
#[cfg(unix)]
mod resume;
mod support;
mod text;
mod training;
