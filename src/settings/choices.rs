//! Settings that are one of a few things.

use crate::paging::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt::Display;

/// What trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Adapters on a 4-bit base.
    Qlora,
    /// Adapters on the base as it is.
    Lora,
    /// Every weight.
    Full,
}

impl Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Method::Qlora => "qlora",
            Method::Lora => "lora",
            Method::Full => "full",
        })
    }
}

/// How many layers, from the first on, run their forward pass again instead of keeping what it made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recompute(pub usize);

impl std::str::FromStr for Recompute {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "all" => Ok(Recompute(usize::MAX)),
            "none" => Ok(Recompute(0)),
            _ => {
                text.parse().map(Recompute).map_err(|_| format!("expected all, none or a number of layers, not {text}"))
            }
        }
    }
}

impl std::fmt::Display for Recompute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            usize::MAX => f.write_str("all"),
            0 => f.write_str("none"),
            layers => layers.fmt(f),
        }
    }
}

/// Within how much memory to plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryBudget {
    /// What is free.
    Auto,
    Bytes(Bytes),
}

impl std::str::FromStr for MemoryBudget {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(MemoryBudget::Auto),
            _ => text.parse().map(MemoryBudget::Bytes).map_err(|error| format!("--memory-budget: {error}; or auto")),
        }
    }
}

impl std::fmt::Display for MemoryBudget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            MemoryBudget::Auto => f.write_str("auto"),
            MemoryBudget::Bytes(bytes) => bytes.fmt(f),
        }
    }
}
