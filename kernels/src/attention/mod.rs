//! Causal grouped-query attention.
