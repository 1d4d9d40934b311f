//! Serde for what parses and prints.

use serde::{Deserialize, de};
use std::{fmt::Display, str::FromStr};

/// Serde for types that parse and print.
pub(crate) mod as_text {
    use super::*;

    pub fn serialize<T: Display, S: serde::Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T: FromStr<Err: Display>, D: de::Deserializer<'de>>(from: D) -> Result<T, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

/// The same, for optional values.
pub(crate) mod as_optional_text {
    use super::*;

    pub fn serialize<T: Display, S: serde::Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            None => serializer.serialize_none(),
            Some(value) => serializer.collect_str(value),
        }
    }

    pub fn deserialize<'de, T: FromStr<Err: Display>, D: de::Deserializer<'de>>(
        from: D,
    ) -> Result<Option<T>, D::Error> {
        super::as_text::deserialize(from).map(Some)
    }
}
