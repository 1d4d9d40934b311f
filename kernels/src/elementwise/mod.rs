//! Element-wise sums.
