//! Settings that are one of a few things.

use crate::paging::Bytes;
use nibble_models::llama::{Activations, Extent, Keeping};
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

/// What `--recompute` stands for: all layers (`all`), the first so many, or `none` keep their input alone.
pub fn recomputing(text: &str) -> Result<Activations, String> {
    let layers = match text {
        "all" => usize::MAX,
        "none" => 0,
        _ => text.parse().map_err(|_| format!("--recompute: expected all, none or a number of layers, not {text}"))?,
    };
    let inputs = Keeping { extent: Extent::Inputs, on_host: false };
    Ok(Activations::new(inputs, layers, Keeping::default()))
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

    fn from_str(text: &str) -> Result<Self, String> {
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
