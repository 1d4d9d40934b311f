//! The program itself: what each command promises, and how it answers mistakes.

mod bench;
mod data;
mod export;
mod faults;
mod gguf;
mod hub;
mod inference;
mod plan;
mod reports;
#[cfg(unix)]
mod resume;
mod support;
mod text;
mod training;
mod variants;
