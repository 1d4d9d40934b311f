//! AdamW updates.
