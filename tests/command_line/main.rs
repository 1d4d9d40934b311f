//! The program itself: what each command promises, and how it answers mistakes.

mod export;
mod faults;
mod gguf;
mod inference;
#[cfg(unix)]
mod resume;
mod support;
mod text;
mod training;
mod variants;
