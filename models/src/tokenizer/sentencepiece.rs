//! SentencePiece BPE from a GGUF vocabulary with scores.
//!
//! SentencePiece joins, of all neighbouring pieces that make a piece, those of the highest score first (Kudo and
//! Richardson, 2018). A BPE with a merge list does the same when every way to cut a piece in two is a merge, ranked by
//! the score of the piece it makes.

use std::cmp::Ordering;
use std::collections::HashMap;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};

/// SentencePiece's own spelling of a space.
const SPACE: &str = "▁";

/// Longer pieces are not learned by any trainer, and the cuts of a piece cost the square of its length.
const LONGEST: usize = 1024;

/// The merges of `tokens` with their `scores`, best first. Only tokens for which `normal` holds take part: control
/// tokens are matched before the merges, and byte tokens stand for bytes, not for their spelling.
/// The order within one score is that of transformers: longer left part first, then longer right part, then by id.
pub(super) fn merges(
    tokens: &[String],
    scores: &[f32],
    normal: impl Fn(usize) -> bool,
) -> Result<Vec<(String, String)>, String> {
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().filter(|(id, _)| normal(*id)).map(|(id, token)| (token.as_str(), id)).collect();
    let mut found: Vec<(f32, &str, &str)> = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| normal(*id)) {
        if token.len() > LONGEST {
            return Err(format!("token {id} is {} bytes long; at most {LONGEST} are supported", token.len()));
        }
        let first = found.len();
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if ids.contains_key(left) && ids.contains_key(right) {
                found.push((scores[id], left, right));
            }
        }
        found[first..].sort_by_key(|(_, left, right)| (ids[left], ids[right]));
    }
    let order = |a: &(f32, &str, &str), b: &(f32, &str, &str)| -> Ordering {
        let chars = |text: &str| text.chars().count();
        b.0.total_cmp(&a.0).then_with(|| chars(b.1).cmp(&chars(a.1))).then_with(|| chars(b.2).cmp(&chars(a.2)))
    };
    found.sort_by(order);
    Ok(found.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect())
}

/// Spaces become pieces of their own kind; `prefix` puts one before each stretch of text.
pub(super) fn normalizer(prefix: bool) -> tokenizers::Result<NormalizerWrapper> {
    let mut parts: Vec<NormalizerWrapper> = Vec::new();
    if prefix {
        parts.push(Prepend::new(SPACE.to_owned()).into());
    }
    parts.push(Replace::new(" ", SPACE)?.into());
    Ok(Normalizers::new(parts).into())
}

/// Pieces back to text: spaces, bytes, and the space that `prefix` put in front.
pub(super) fn decoder(prefix: bool) -> tokenizers::Result<Decoders> {
    let mut parts = vec![Replace::new(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        parts.push(Strip::new(' ', 1, 0).into());
    }
    Ok(Decoders::new(parts))
}
