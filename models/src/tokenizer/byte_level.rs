//! Byte-level BPE from a GGUF vocabulary: how a text is cut into words before the merges apply.
//!
//! A GGUF file names the way with `tokenizer.ggml.pre`, a name that llama.cpp gives to each tokenizer it has met. The
//! cuts are facts of those tokenizers: what a vocabulary's merges were learned on.

use serde_json::Value;
use tokenizers::SplitDelimiterBehavior::Isolated;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};

/// Llama 3: words with at most one character before them, numbers of one to three digits, line ends on their own.
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Qwen 2: as Llama 3, but digits one by one.
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Tekken (Mistral NeMo): words also cut where lower case turns into upper case; digits one by one.
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// How a family of byte-level tokenizers works beside its vocabulary and merges.
pub(super) struct Family {
    pub pre_tokenizer: PreTokenizerWrapper,
    /// A word that is a token is taken whole, whatever the merges would make of it.
    pub ignore_merges: bool,
    /// Whether bos goes before a text when the file does not say.
    pub add_bos: bool,
}

/// The family that `tokenizer.ggml.pre` names; `Ok(None)` for a name that is not known here.
/// A file without the key is read as `default`: GPT-2's cuts.
pub(super) fn family(pre: &str) -> tokenizers::Result<Option<Family>> {
    let gpt2 = || ByteLevel::new(false, true, true);
    let split = |pattern: &str| -> tokenizers::Result<PreTokenizerWrapper> {
        let cut = Split::new(SplitPattern::Regex(pattern.to_owned()), Isolated, false)?;
        let bytes = ByteLevel::new(false, true, false);
        Ok(Sequence::new(vec![cut.into(), bytes.into()]).into())
    };
    let plain = |pre_tokenizer| Family { pre_tokenizer, ignore_merges: false, add_bos: false };
    Ok(Some(match pre {
        "default" | "gpt-2" | "gpt2" | "olmo" | "mpt" | "phi-2" => plain(gpt2().into()),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" => {
            plain(Sequence::new(vec![Digits::new(true).into(), gpt2().into()]).into())
        }
        "qwen2" | "deepseek-r1-qwen" => plain(split(QWEN2)?),
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral" => {
            Family { pre_tokenizer: split(LLAMA3)?, ignore_merges: true, add_bos: true }
        }
        "tekken" => Family { pre_tokenizer: split(TEKKEN)?, ignore_merges: true, add_bos: true },
        _ => return Ok(None),
    }))
}

/// The name by which [`family`] knows how `cuts`, the `pre_tokenizer` of a `tokenizer.json`, cuts a text; `None` for a way
/// that has none.
pub(super) fn name(cuts: &Value) -> Option<&'static str> {
    let known = ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken"];
    known.into_iter().find(|name| {
        let family = family(name).ok().flatten();
        let own = family.and_then(|family| serde_json::to_value(family.pre_tokenizer).ok());
        own.is_some_and(|own| outline(own) == outline(cuts.clone()))
    })
}

/// What decides where a text is cut: offsets are not used, and a sequence of one is its part.
fn outline(mut cuts: Value) -> Value {
    if let Some(parts) = cuts["pretokenizers"].as_array_mut() {
        let parts: Vec<Value> = parts.drain(..).map(outline).collect();
        return if parts.len() == 1 { parts.into_iter().next().unwrap_or_default() } else { Value::Array(parts) };
    }
    if let Some(settings) = cuts.as_object_mut() {
        settings.remove("trim_offsets");
    }
    cuts
}
