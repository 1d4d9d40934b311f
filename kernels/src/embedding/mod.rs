//! Token embedding.
