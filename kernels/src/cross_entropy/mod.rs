//! Head and cross-entropy in chunks.
