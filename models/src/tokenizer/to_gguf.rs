//! The vocabulary of a tokenizer as a GGUF header has it.

use super::{GgufVocab, Tokenizer, byte_level};
use crate::{Error, Result};
use serde_json::Value;
use std::collections::HashMap;

impl GgufVocab {
    /// The keys that make llama.cpp encode as `tokenizer` does.
    ///
    /// # Errors
    /// It is no BPE, or cuts texts into words in a way that GGUF has no name for.
    pub fn from_tokenizer(tokenizer: &Tokenizer) -> Result<GgufVocab> {
        let invalid = |what: String| Error::Invalid(format!("the tokenizer has no form in GGUF: {what}"));
        let json: Value = tokenizer
            .inner
            .to_string(false)
            .map_err(|error| invalid(error.to_string()))
            .and_then(|json| serde_json::from_str(&json).map_err(|error| invalid(error.to_string())))?;
        let model = &json["model"];
        if model["type"] != "BPE" {
            return Err(invalid(format!("it is {}, not BPE", model["type"])));
        }
        let merges: Vec<String> = model["merges"].as_array().into_iter().flatten().filter_map(merge).collect();
        let sentencepiece = model["byte_fallback"] == true;
        let mut tokens: Vec<Option<String>> = vec![None; tokenizer.vocab_size()];
        for (token, id) in tokenizer.inner.get_vocab(true) {
            if let Some(slot) = tokens.get_mut(id as usize) {
                *slot = Some(token);
            }
        }
        let mut token_types: Vec<i32> = tokens
            .iter()
            .map(|token| match token {
                None => Self::UNUSED,
                Some(token) if sentencepiece && is_byte(token) => Self::BYTE,
                Some(_) => Self::NORMAL,
            })
            .collect();
        for (id, added) in tokenizer.inner.get_added_tokens_decoder() {
            if let Some(kind) = token_types.get_mut(id as usize) {
                *kind = if added.special { Self::CONTROL } else { Self::USER_DEFINED };
            }
        }
        if let (true, Some(kind)) = (sentencepiece, tokenizer.unk.and_then(|id| token_types.get_mut(id as usize))) {
            *kind = Self::UNKNOWN;
        }
        let named = tokens.into_iter().enumerate().map(|(id, token)| token.unwrap_or_else(|| format!("[PAD{id}]")));
        let tokens: Vec<String> = named.collect();
        let (pre, scores, merges) = match sentencepiece {
            true => (None, scores(&tokens, &merges), Vec::new()),
            false => {
                let cuts = &json["pre_tokenizer"];
                // Where nothing merges, it does not matter how a text is cut.
                let pre = if merges.is_empty() { Some("gpt-2") } else { byte_level::name(cuts) };
                (Some(pre.ok_or_else(|| invalid(format!("pre_tokenizer {cuts}")))?.to_string()), Vec::new(), merges)
            }
        };
        Ok(GgufVocab {
            model: if sentencepiece { "llama" } else { "gpt2" }.into(),
            pre,
            tokens,
            token_types,
            merges,
            scores,
            bos: tokenizer.bos,
            eos: tokenizer.eos(),
            eot: tokenizer.eos_ids().get(1).copied(),
            pad: tokenizer.pad,
            unk: tokenizer.unk,
            add_bos: Some(tokenizer.add_bos),
            add_eos: Some(tokenizer.add_eos),
            add_space_prefix: sentencepiece.then_some(tokenizer.continuing.is_some()),
            chat_template: tokenizer.chat_template.clone(),
        })
    }
}

/// A merge as a file of either age spells it.
fn merge(merge: &Value) -> Option<String> {
    match merge {
        Value::String(line) => Some(line.clone()),
        pair => Some(format!("{} {}", pair[0].as_str()?, pair[1].as_str()?)),
    }
}

fn is_byte(token: &str) -> bool {
    token.len() == 6 && token.starts_with("<0x") && token.ends_with('>')
}

/// Scores that put pieces in the order of their first merge, best first. Single characters need none: nothing makes them.
fn scores(tokens: &[String], merges: &[String]) -> Vec<f32> {
    let mut ranks = HashMap::new();
    for (rank, merge) in merges.iter().enumerate() {
        ranks.entry(merge.replacen(' ', "", 1)).or_insert(rank);
    }
    tokens.iter().map(|token| ranks.get(token).map_or(0.0, |&rank| -(rank as f32))).collect()
}
