//! A tokenizer from the vocabulary in a GGUF header.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, ModelWrapper};

use super::{Specials, Tokenizer, byte_level, sentencepiece};
use crate::files::gguf::GgufFile;
use crate::{Error, Result};

/// The `tokenizer.*` keys of a GGUF header.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: how byte-level BPE cuts a text into words.
    pub pre: Option<String>,
    /// Spelling of every token, by id.
    pub tokens: Vec<String>,
    /// Kind of every token (1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte); empty if the file has none.
    pub token_types: Vec<i32>,
    /// `left right` pairs, best first; empty if the file has none.
    pub merges: Vec<String>,
    /// Score of every token; empty if the file has none.
    pub scores: Vec<f32>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// End of a turn, where it is another token than `eos`.
    pub eot: Option<u32>,
    pub pad: Option<u32>,
    pub unk: Option<u32>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    /// Whether SentencePiece puts a space before a text (it does unless this is `false`).
    pub add_space_prefix: Option<bool>,
    pub chat_template: Option<String>,
}

/// `tokenizer.ggml.token_type`: what a token is.
impl GgufVocab {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

impl Tokenizer {
    /// The tokenizer in the header of a GGUF file.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        Self::from_gguf_vocab(&GgufVocab::read(file)?, file.path())
    }

    /// The tokenizer of a vocabulary; `path` is for error messages.
    ///
    /// [`Error::Unsupported`] for a tokenizer model or pre-tokenizer that is not known, [`Error::File`] for arrays that
    /// do not fit each other.
    pub fn from_gguf_vocab(vocab: &GgufVocab, path: &Path) -> Result<Self> {
        let file = |what: String| Error::file(path, format!("tokenizer: {what}"));
        vocab.check().map_err(file)?;
        let (mut inner, add_bos) = match vocab.model.as_str() {
            "gpt2" => {
                let pre = vocab.pre.as_deref().unwrap_or("default");
                let family = byte_level::family(pre).map_err(|error| file(error.to_string()))?.ok_or_else(|| {
                    let what = format!(
                        "the pre-tokenizer {pre:?} (tokenizer.ggml.pre) is not supported; \
                         use the model's Hugging Face folder, which has a tokenizer.json"
                    );
                    Error::unsupported(path, what)
                })?;
                let add_bos = family.add_bos;
                (vocab.byte_level(family).map_err(file)?, add_bos)
            }
            "llama" => (vocab.sentencepiece().map_err(file)?, true),
            other => {
                let what =
                    format!("the tokenizer model {other:?} (tokenizer.ggml.model) is not supported: gpt2, llama");
                return Err(Error::unsupported(path, what));
            }
        };
        vocab.add_tokens(&mut inner).map_err(file)?;
        let mut eos: Vec<u32> = vocab.eos.into_iter().collect();
        eos.extend(vocab.eot.filter(|eot| Some(*eot) != vocab.eos));
        let specials = Specials {
            bos: vocab.bos,
            eos,
            pad: vocab.pad,
            unk: vocab.unk,
            add_bos: Some(vocab.add_bos.unwrap_or(add_bos)),
            add_eos: Some(vocab.add_eos.unwrap_or(false)),
            chat_template: vocab.chat_template.clone(),
        };
        Self::assemble(inner, specials).map_err(file)
    }
}

impl GgufVocab {
    /// Reads the `tokenizer.*` keys of `file`; a file without a vocabulary is an [`Error::File`].
    pub fn read(file: &GgufFile) -> Result<Self> {
        let missing =
            |key: &str| Error::file(file.path(), format!("has no readable {key}: the file carries no tokenizer"));
        let text = |key: &str| file.get_str(key).map(str::to_owned);
        // -1 stands for "none" in some files and reads as no u32.
        let id = |name: &str| file.get_u32(&format!("tokenizer.ggml.{name}_token_id"));
        Ok(GgufVocab {
            model: text("tokenizer.ggml.model").ok_or_else(|| missing("tokenizer.ggml.model"))?,
            pre: text("tokenizer.ggml.pre"),
            tokens: file.get_str_array("tokenizer.ggml.tokens").ok_or_else(|| missing("tokenizer.ggml.tokens"))?,
            token_types: file.get_i32_array("tokenizer.ggml.token_type").unwrap_or_default(),
            merges: file.get_str_array("tokenizer.ggml.merges").unwrap_or_default(),
            scores: file.get_f32_array("tokenizer.ggml.scores").unwrap_or_default(),
            bos: id("bos"),
            eos: id("eos"),
            eot: id("eot"),
            pad: id("padding"),
            unk: id("unknown"),
            add_bos: file.get_bool("tokenizer.ggml.add_bos_token"),
            add_eos: file.get_bool("tokenizer.ggml.add_eos_token"),
            add_space_prefix: file.get_bool("tokenizer.ggml.add_space_prefix"),
            chat_template: text("tokenizer.chat_template"),
        })
    }

    fn check(&self) -> std::result::Result<(), String> {
        let count = self.tokens.len();
        if count == 0 {
            return Err("tokenizer.ggml.tokens is empty".to_owned());
        }
        if u32::try_from(count).is_err() {
            return Err(format!("{count} tokens are more than ids can name"));
        }
        for (name, len) in [("token_type", self.token_types.len()), ("scores", self.scores.len())] {
            if len != 0 && len != count {
                return Err(format!("tokenizer.ggml.{name} has {len} entries for {count} tokens"));
            }
        }
        let ids =
            [("bos", self.bos), ("eos", self.eos), ("eot", self.eot), ("padding", self.pad), ("unknown", self.unk)];
        for (name, id) in ids {
            if let Some(id) = id.filter(|id| *id as usize >= count) {
                return Err(format!("tokenizer.ggml.{name}_token_id is {id}, but there are {count} tokens"));
            }
        }
        Ok(())
    }

    fn kind(&self, id: usize) -> i32 {
        self.token_types.get(id).copied().unwrap_or(Self::NORMAL)
    }

    fn ids(&self) -> HashMap<String, u32> {
        // Rows of the embedding that no token has are called [PADn] by llama.cpp's converter; they stand for no text.
        let padding = |id: usize, token: &str| self.kind(id) == Self::UNUSED && token == format!("[PAD{id}]");
        let used = self.tokens.iter().enumerate().filter(|(id, token)| !padding(*id, token));
        used.map(|(id, token)| (token.clone(), id as u32)).collect()
    }

    fn byte_level(&self, family: byte_level::Family) -> std::result::Result<tokenizers::Tokenizer, String> {
        let merges = split_merges(&self.merges)?;
        let model = bpe(self.ids(), merges, |builder| builder.ignore_merges(family.ignore_merges))?;
        let mut inner = tokenizers::Tokenizer::new(model);
        inner.with_pre_tokenizer(Some(family.pre_tokenizer));
        inner.with_decoder(Some(ByteLevel::new(false, true, true)));
        Ok(inner)
    }

    fn sentencepiece(&self) -> std::result::Result<tokenizers::Tokenizer, String> {
        let merges = if self.merges.is_empty() {
            if self.scores.is_empty() {
                return Err(
                    "a SentencePiece vocabulary needs tokenizer.ggml.scores or tokenizer.ggml.merges".to_owned()
                );
            }
            sentencepiece::merges(&self.tokens, &self.scores, |id| self.kind(id) == Self::NORMAL)?
        } else {
            split_merges(&self.merges)?
        };
        // Without byte tokens, falling back to bytes would fall through to nothing.
        let bytes = self.token_types.contains(&Self::BYTE) || self.tokens.iter().any(|token| token == "<0x0A>");
        let unk = self.unk.map(|id| id as usize);
        let unk = unk.or_else(|| (0..self.tokens.len()).find(|&id| self.kind(id) == Self::UNKNOWN));
        let model = bpe(self.ids(), merges, |builder| {
            let builder = builder.fuse_unk(true).byte_fallback(bytes);
            match unk {
                Some(id) => builder.unk_token(self.tokens[id].clone()),
                None => builder,
            }
        })?;
        let prefix = self.add_space_prefix.unwrap_or(true);
        let mut inner = tokenizers::Tokenizer::new(model);
        let normalizer = sentencepiece::normalizer(prefix).map_err(|error| error.to_string())?;
        inner.with_normalizer(Some(normalizer)).map_err(|error| error.to_string())?;
        inner.with_decoder(Some(sentencepiece::decoder(prefix).map_err(|error| error.to_string())?));
        Ok(inner)
    }

    /// Control and user-defined tokens are found in a text before anything else, whole.
    fn add_tokens(&self, inner: &mut tokenizers::Tokenizer) -> std::result::Result<(), String> {
        let special = |id: usize| {
            self.kind(id) == Self::CONTROL || [self.bos, self.eos, self.eot, self.pad].contains(&Some(id as u32))
        };
        let mut added = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if !token.is_empty()
                && (special(id) || self.kind(id) == Self::USER_DEFINED || self.kind(id) == Self::UNKNOWN)
            {
                let special = special(id) || self.kind(id) == Self::UNKNOWN;
                added.push(AddedToken::from(token.as_str(), special).normalized(false));
            }
        }
        inner.add_tokens(added).map(drop).map_err(|error| error.to_string())
    }
}

fn split_merges(merges: &[String]) -> std::result::Result<Vec<(String, String)>, String> {
    let split = |(i, merge): (usize, &String)| match merge.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() => Ok((left.to_owned(), right.to_owned())),
        _ => Err(format!("merge {i} is {merge:?}; expected two parts with a space between")),
    };
    merges.iter().enumerate().map(split).collect()
}

/// Builds a BPE after checking what the builder takes on trust: that both parts of a merge and the whole are tokens.
fn bpe(
    ids: HashMap<String, u32>,
    merges: Vec<(String, String)>,
    settings: impl FnOnce(BpeBuilder) -> BpeBuilder,
) -> std::result::Result<ModelWrapper, String> {
    check_merges(&ids, merges.iter().map(|(left, right)| (left.as_str(), right.as_str())))?;
    let builder = BPE::builder().vocab_and_merges(ids.into_iter().collect::<Vocab>(), merges);
    Ok(settings(builder).build().map_err(|error| error.to_string())?.into())
}

/// An unknown part would make the builder panic.
pub(super) fn check_merges<'a>(
    ids: &HashMap<String, u32>,
    merges: impl Iterator<Item = (&'a str, &'a str)>,
) -> std::result::Result<(), String> {
    let known: HashSet<&str> = ids.keys().map(String::as_str).collect();
    for (left, right) in merges {
        for part in [left, right, &format!("{left}{right}")] {
            if !known.contains(part) {
                return Err(format!("the merge of {left:?} and {right:?} needs the token {part:?}, which is missing"));
            }
        }
    }
    Ok(())
}
