//! Training data: files, rows, masks and batches.
