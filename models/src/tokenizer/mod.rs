//! Tokenizers: text to token ids and back.
//!
//! The encoding itself is the `tokenizers` crate's. This module makes one from a Hugging Face folder ([`folder`]) or
//! from the vocabulary in a GGUF header ([`gguf`]), and keeps beside it what a trainer asks for: special token ids and
//! the chat template.

mod byte_level;
mod folder;
mod gguf;
mod sentencepiece;
mod template;
mod to_gguf;

pub use gguf::GgufVocab;

use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;

use crate::chat::ChatTemplate;
use crate::{Error, Result};

/// A tokenizer with its special tokens and chat template.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same without the space that some tokenizers put before a text; `None` if this one puts none.
    continuing: Option<Box<tokenizers::Tokenizer>>,
    bos: Option<u32>,
    eos: Vec<u32>,
    pad: Option<u32>,
    unk: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    vocab_size: usize,
    chat_template: Option<String>,
}

/// What a tokenizer needs beside the encoder, as found in a folder or a GGUF header.
#[derive(Clone, Debug, Default)]
struct Specials {
    bos: Option<u32>,
    eos: Vec<u32>,
    pad: Option<u32>,
    unk: Option<u32>,
    /// `None` leaves it to the encoder's own post-processing.
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    chat_template: Option<String>,
}

impl Tokenizer {
    /// A tokenizer from the text of a `tokenizer.json`, with no special ids and no chat template.
    /// Malformed JSON or an inconsistent vocabulary is an [`Error::Invalid`].
    pub fn from_json(json: &str) -> Result<Self> {
        let inner = folder::parse(json.as_bytes()).map_err(Error::Invalid)?;
        Self::assemble(inner, Specials::default()).map_err(Error::Invalid)
    }

    /// Puts encoder and special tokens together; the error says what does not fit.
    fn assemble(mut inner: tokenizers::Tokenizer, specials: Specials) -> std::result::Result<Self, String> {
        // Lengths are the caller's business: a tokenizer.json saved after training may carry its own.
        inner.with_truncation(None).map_err(|error| error.to_string())?;
        inner.with_padding(None);
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        for id in [specials.bos, specials.pad, specials.unk].into_iter().flatten().chain(specials.eos.iter().copied()) {
            if id as usize >= vocab_size {
                return Err(format!("special token id {id} is outside of the vocabulary of {vocab_size} tokens"));
            }
        }
        let (add_bos, add_eos) = template::install(&mut inner, &specials)?;
        let continuing = without_prefix(&inner)?.map(Box::new);
        let Specials { bos, eos, pad, unk, chat_template, .. } = specials;
        Ok(Tokenizer { inner, continuing, bos, eos, pad, unk, add_bos, add_eos, vocab_size, chat_template })
    }

    /// Token ids of `text`. Special tokens spelled in it (`<|im_start|>`) become their ids.
    /// `add_special` puts bos (and eos) where this tokenizer adds them, see [`add_bos`](Self::add_bos).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        encode(&self.inner, text, add_special)
    }

    /// Token ids of `text` as the continuation of a text before it: without special tokens, and without the space that
    /// a SentencePiece tokenizer puts before a text. Concatenating a prompt's ids with these decodes to the
    /// concatenated text.
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>> {
        let Some(continuing) = self.continuing.as_deref() else { return encode(&self.inner, text, false) };
        // What follows a special token inside the text gets its space as it would in the whole text.
        let added = self.inner.get_added_tokens_decoder();
        let first = added.values().filter(|token| token.special).filter_map(|token| text.find(&token.content)).min();
        let (head, tail) = text.split_at(first.unwrap_or(text.len()));
        let mut ids = encode(continuing, head, false)?;
        ids.extend(encode(&self.inner, tail, false)?);
        Ok(ids)
    }

    /// Token ids of `text` after the token `last`, as they are where both stand in one text: some tokenizers put a space
    /// behind a special token, and some special tokens swallow one.
    pub fn encode_after(&self, last: u32, text: &str) -> Result<Vec<u32>> {
        let added = self.inner.get_added_tokens_decoder();
        let Some(special) = added.get(&last).filter(|token| token.special) else {
            return self.encode_continuation(text);
        };
        let mut ids = encode(&self.inner, &(special.content.clone() + text), false)?;
        match ids.iter().position(|&id| id == last) {
            Some(place) => Ok(ids.split_off(place + 1)),
            None => self.encode_continuation(text),
        }
    }

    /// The text of `ids`; `skip_special` leaves special tokens out. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|error| Error::Invalid(format!("decoding tokens: {error}")))
    }

    /// One more than the largest token id, added tokens included. A model may have more rows than that.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token spelled as in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The vocabulary's spelling of a token.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text in training: the first of [`eos_ids`](Self::eos_ids).
    pub fn eos(&self) -> Option<u32> {
        self.eos.first().copied()
    }

    /// Every token that ends a generation.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// The padding token.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// Whether [`encode`](Self::encode) with `add_special` puts bos first.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether [`encode`](Self::encode) with `add_special` puts eos last.
    pub fn add_eos(&self) -> bool {
        self.add_eos
    }

    /// The chat template's Jinja source.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// All that encoding depends on, as text: two tokenizers that differ in it may encode otherwise.
    ///
    /// # Errors
    /// [`Error::Invalid`]: the encoder has no form as JSON.
    pub fn description(&self) -> Result<String> {
        let Tokenizer { inner, bos, eos, pad, unk, add_bos, add_eos, chat_template, .. } = self;
        let json = inner.to_string(false).map_err(|error| Error::Invalid(format!("tokenizer: {error}")))?;
        Ok(format!("{json}\n{:?}", (bos, eos, pad, unk, add_bos, add_eos, chat_template)))
    }

    /// The compiled chat template; `None` if the tokenizer has none, [`Error::Invalid`] if it is not valid Jinja.
    pub fn chat(&self) -> Result<Option<ChatTemplate>> {
        let token = |id: Option<u32>| id.and_then(|id| self.id_to_token(id));
        let (bos, eos) = (token(self.bos), token(self.eos()));
        self.chat_template
            .as_deref()
            .map(|source| ChatTemplate::new(source, bos.as_deref(), eos.as_deref()))
            .transpose()
    }

    /// The same tokenizer with these special tokens: `bos` is added before a text if there is one, the first of `eos`
    /// ends a text in training. An id outside of the vocabulary is an [`Error::Invalid`].
    pub fn with_special(self, bos: Option<u32>, eos: Vec<u32>, pad: Option<u32>) -> Result<Self> {
        let Tokenizer { inner, unk, chat_template, .. } = self;
        let (add_bos, add_eos) = (Some(bos.is_some()), Some(false));
        Self::assemble(inner, Specials { bos, eos, pad, unk, add_bos, add_eos, chat_template }).map_err(Error::Invalid)
    }

    /// The same tokenizer with more tokens, each of which is one token wherever it stands in a text.
    ///
    /// # Errors
    /// A token is empty, or there already.
    pub fn with_new_tokens(self, tokens: &[String]) -> Result<Self> {
        let Tokenizer { mut inner, bos, eos, pad, unk, add_bos, add_eos, chat_template, .. } = self;
        for token in tokens {
            if token.is_empty() || inner.token_to_id(token).is_some() {
                return Err(Error::Invalid(format!("the new token \"{token}\" is empty or in the vocabulary already")));
            }
            let added = tokenizers::AddedToken::from(token.as_str(), false).normalized(false);
            inner.add_tokens([added]).map_err(|error| Error::Invalid(error.to_string()))?;
        }
        let (add_bos, add_eos) = (Some(add_bos), Some(add_eos));
        Self::assemble(inner, Specials { bos, eos, pad, unk, add_bos, add_eos, chat_template }).map_err(Error::Invalid)
    }

    /// The same tokenizer with this chat template.
    pub fn with_chat_template(self, source: impl Into<String>) -> Self {
        Tokenizer { chat_template: Some(source.into()), ..self }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field("pad", &self.pad)
            .field("add_bos", &self.add_bos)
            .finish_non_exhaustive()
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>> {
    // encode_fast leaves out the offsets, which nothing here needs.
    let encoding = tokenizer
        .encode_fast(text, add_special)
        .map_err(|error| Error::Invalid(format!("encoding a text: {error}")))?;
    Ok(encoding.get_ids().to_vec())
}

/// A copy that puts no space before a text; `None` if `inner` already puts none.
fn without_prefix(inner: &tokenizers::Tokenizer) -> std::result::Result<Option<tokenizers::Tokenizer>, String> {
    let mut copy = None;
    let prepends = |normalizer: &NormalizerWrapper| matches!(normalizer, NormalizerWrapper::Prepend(_));
    let kept = match inner.get_normalizer() {
        Some(normalizer) if prepends(normalizer) => Some(Vec::new()),
        Some(NormalizerWrapper::Sequence(parts)) if parts.as_ref().iter().any(prepends) => {
            Some(parts.as_ref().iter().filter(|part| !prepends(part)).cloned().collect())
        }
        _ => None,
    };
    if let Some(kept) = kept {
        let kept = (!kept.is_empty()).then(|| tokenizers::normalizers::Sequence::new(kept));
        let copy = copy.get_or_insert_with(|| inner.clone());
        copy.with_normalizer(kept).map_err(|error| error.to_string())?;
    }
    match inner.get_pre_tokenizer() {
        Some(PreTokenizerWrapper::Metaspace(metaspace)) if metaspace.prepend_scheme != PrependScheme::Never => {
            let mut metaspace = metaspace.clone();
            metaspace.prepend_scheme = PrependScheme::Never;
            copy.get_or_insert_with(|| inner.clone()).with_pre_tokenizer(Some(metaspace));
        }
        Some(PreTokenizerWrapper::ByteLevel(level)) if level.add_prefix_space => {
            copy.get_or_insert_with(|| inner.clone()).with_pre_tokenizer(Some(level.add_prefix_space(false)));
        }
        _ => {}
    }
    Ok(copy)
}
