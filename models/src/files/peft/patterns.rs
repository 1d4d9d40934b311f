//! Modules by name and by regular expression, in Python's way of writing them.

use fancy_regex::Regex;
use std::collections::BTreeMap;

fn compile(pattern: &str, before: &str) -> Result<Regex, String> {
    // Alone first: a bracket that closes ours would be well formed in its place.
    let good = Regex::new(pattern).and_then(|_| Regex::new(&format!("\\A{before}(?:{pattern})\\z")));
    good.map_err(|error| format!("\"{pattern}\" is no regular expression: {error}"))
}

/// Whether `pattern` is a regular expression.
///
/// # Errors
/// It is not; the message says why.
pub(crate) fn check(pattern: &str) -> Result<(), String> {
    compile(pattern, "").map(drop)
}

/// Whether a pattern matches: false as well if it is none, or takes too long.
fn matches(regex: Result<Regex, String>, path: &str) -> bool {
    regex.is_ok_and(|regex| regex.is_match(path).unwrap_or(false))
}

/// Whether `pattern` matches all of `path`.
pub(crate) fn is(pattern: &str, path: &str) -> bool {
    matches(compile(pattern, ""), path)
}

/// Whether `name` is `path` or the end of it, from a dot on.
pub(crate) fn ends(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// The value of the first key that matches `path` or the end of it, from a dot on.
pub(crate) fn find<T: Copy>(patterns: &BTreeMap<String, T>, path: &str) -> Option<T> {
    let fits = |key: &str| matches(compile(key, r"(?:.*\.)?"), path);
    patterns.iter().find(|(key, _)| fits(key)).map(|(_, &value)| value)
}
