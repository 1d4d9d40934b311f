//! A tokenizer from a Hugging Face folder, and back.
//!
//! `tokenizer.json` holds the encoder. The special tokens and the chat template lie around it, in
//! `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`, `generation_config.json` and
//! `config.json`, depending on the age of the folder.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::AddedToken;

use super::gguf::check_merges;
use super::{Specials, Tokenizer};
use crate::files::atomic::atomic_write;
use crate::{Error, Result};

impl Tokenizer {
    /// The tokenizer in folder `dir`. Only `tokenizer.json` must be there; a malformed file is an [`Error::File`].
    pub fn from_folder(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let Some(json) = read(&path)? else {
            let what = if dir.join("tokenizer.model").exists() {
                "not found; the folder has only a SentencePiece tokenizer.model: load it once with transformers' \
                 AutoTokenizer and save it, which writes a tokenizer.json"
            } else {
                "not found; a model folder needs its tokenizer (transformers' tokenizer.save_pretrained writes it)"
            };
            return Err(Error::file(&path, what));
        };
        let mut inner = parse(&json).map_err(|what| Error::file(&path, what))?;
        let config = read_json(&dir.join("tokenizer_config.json"))?;
        let map = read_json(&dir.join("special_tokens_map.json"))?;
        let model = read_json(&dir.join("config.json"))?;
        let generation = read_json(&dir.join("generation_config.json"))?;
        add_tokens(&mut inner, &config).map_err(|what| Error::file(&dir.join("tokenizer_config.json"), what))?;

        // The tokenizer's own word first; the model's configuration where it has none.
        let special = |name: &str| {
            let spelling = spelling(&config[name]).or_else(|| spelling(&map[name]))?;
            inner.token_to_id(spelling)
        };
        let numbered = |name: &str| ids(&generation[name]).into_iter().chain(ids(&model[name]));
        let mut eos: Vec<u32> = special("eos_token").into_iter().collect();
        for id in numbered("eos_token_id") {
            // A model's configuration may name ids that its tokenizer does not have; they cannot be generated as text.
            if !eos.contains(&id) && inner.id_to_token(id).is_some() {
                eos.push(id);
            }
        }
        let specials = Specials {
            bos: special("bos_token").or_else(|| numbered("bos_token_id").find(|&id| inner.id_to_token(id).is_some())),
            eos,
            pad: special("pad_token"),
            unk: special("unk_token"),
            add_bos: config["add_bos_token"].as_bool(),
            add_eos: config["add_eos_token"].as_bool(),
            chat_template: template(dir, &config)?,
        };
        Self::assemble(inner, specials).map_err(|what| Error::file(&path, what))
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` (with the chat template) into the folder `dir`, which must
    /// exist. Each file appears whole or not at all. Of several eos tokens only the first has a place here; the others
    /// belong to the model's `generation_config.json`.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let json = self.inner.to_string(true).map_err(|error| Error::Invalid(format!("tokenizer.json: {error}")))?;
        let token = |id: Option<u32>| id.and_then(|id| self.id_to_token(id));
        let mut config = json!({
            "add_bos_token": self.add_bos,
            "add_eos_token": self.add_eos,
            "clean_up_tokenization_spaces": false,
            "tokenizer_class": "PreTrainedTokenizerFast",
        });
        let named = [
            ("bos_token", token(self.bos)),
            ("eos_token", token(self.eos())),
            ("pad_token", token(self.pad)),
            ("unk_token", token(self.unk)),
            ("chat_template", self.chat_template.clone()),
        ];
        for (name, text) in named {
            if let Some(text) = text {
                config[name] = text.into();
            }
        }
        let config = serde_json::to_string_pretty(&config).map_err(|error| Error::Invalid(error.to_string()))?;
        atomic_write(&dir.join("tokenizer.json"), |out| out.write_all(json.as_bytes()))?;
        atomic_write(&dir.join("tokenizer_config.json"), |out| out.write_all(config.as_bytes()))
    }
}

/// Parses a `tokenizer.json`, first checking what the `tokenizers` crate takes on trust: that it is JSON throughout, and
/// that merges and vocabulary fit each other. Violations panic there.
pub(super) fn parse(json: &[u8]) -> std::result::Result<tokenizers::Tokenizer, String> {
    check(json)?;
    tokenizers::Tokenizer::from_bytes(json).map_err(|error| format!("not a tokenizer: {error}"))
}

/// The part of a `tokenizer.json` whose inconsistencies would panic in the crate instead of failing.
#[derive(Deserialize)]
struct Outline {
    model: Option<Bpe>,
}

#[derive(Deserialize)]
struct Bpe {
    #[serde(default)]
    vocab: Value,
    #[serde(default)]
    merges: Vec<Merge>,
    continuing_subword_prefix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Line(String),
    Pair(String, String),
}

fn check(json: &[u8]) -> std::result::Result<(), String> {
    let value: Value = serde_json::from_slice(json).map_err(|error| format!("malformed: {error}"))?;
    let outline: Outline = serde_json::from_value(value).map_err(|error| format!("malformed: {error}"))?;
    let Some(model) = outline.model else { return Err("has no \"model\"".to_owned()) };
    if model.merges.is_empty() {
        return Ok(());
    }
    if model.continuing_subword_prefix.is_some_and(|prefix| !prefix.is_empty()) {
        return Err("BPE with a continuing_subword_prefix is not supported".to_owned());
    }
    let Value::Object(vocab) = model.vocab else { return Err("BPE whose \"vocab\" is no object".to_owned()) };
    let ids: HashMap<String, u32> = vocab
        .into_iter()
        .map(|(token, id)| match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => Ok((token, id)),
            None => Err(format!("the token {token:?} has the id {id}; expected a number below 2^32")),
        })
        .collect::<std::result::Result<_, _>>()?;
    let mut pairs = Vec::with_capacity(model.merges.len());
    for merge in &model.merges {
        pairs.push(match merge {
            Merge::Pair(left, right) => (left.as_str(), right.as_str()),
            // Older files may start with a version line, which is no merge.
            Merge::Line(line) if line.starts_with("#version") => continue,
            Merge::Line(line) => match line.split_once(' ') {
                Some(pair) => pair,
                None => return Err(format!("the merge {line:?} has no space between its parts")),
            },
        });
    }
    check_merges(&ids, pairs.into_iter())
}

/// Adds the tokens that only `tokenizer_config.json` knows (`added_tokens_decoder`); their ids must be the next free
/// ones, as the ids of a vocabulary are not to be chosen.
fn add_tokens(inner: &mut tokenizers::Tokenizer, config: &Value) -> std::result::Result<(), String> {
    let Some(listed) = config["added_tokens_decoder"].as_object() else { return Ok(()) };
    let mut listed: Vec<(u32, AddedToken)> = listed
        .iter()
        .map(|(id, token)| {
            let flag = |name: &str, default| token[name].as_bool().unwrap_or(default);
            let special = flag("special", false);
            let content = token["content"].as_str().ok_or_else(|| format!("added token {id} has no content"))?;
            let id = id.parse().map_err(|_| format!("added token id {id:?} is no number"))?;
            let added = AddedToken::from(content, special)
                .lstrip(flag("lstrip", false))
                .rstrip(flag("rstrip", false))
                .single_word(flag("single_word", false))
                .normalized(flag("normalized", !special));
            Ok::<_, String>((id, added))
        })
        .collect::<std::result::Result<_, _>>()?;
    listed.sort_by_key(|(id, _)| *id);
    let known = inner.get_added_tokens_decoder();
    for (id, token) in listed {
        if known.get(&id).is_some_and(|present| present.content == token.content) || token.content.is_empty() {
            continue;
        }
        let content = token.content.clone();
        inner.add_tokens([token]).map_err(|error| error.to_string())?;
        let got = inner.token_to_id(&content);
        if got != Some(id) {
            return Err(format!("added token {content:?} is listed with id {id}, but tokenizer.json gives it {got:?}"));
        }
    }
    Ok(())
}

/// `chat_template.jinja` if there is one, else `chat_template` of the configuration: a string, or a list of named
/// templates of which `default` (or the only one) counts.
fn template(dir: &Path, config: &Value) -> Result<Option<String>> {
    let path = dir.join("chat_template.jinja");
    if let Some(bytes) = read(&path)? {
        let text = String::from_utf8(bytes).map_err(|_| Error::file(&path, "not UTF-8"))?;
        return Ok(Some(text));
    }
    Ok(match &config["chat_template"] {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            let chosen = default.or(if named.len() == 1 { named.first() } else { None });
            chosen.and_then(|entry| entry["template"].as_str()).map(str::to_owned)
        }
        _ => None,
    })
}

/// A special token is written as a string or as an object with its `content`.
fn spelling(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

/// Token ids of a configuration are written as a number or as a list of numbers.
fn ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(items) => items.iter().filter_map(id).collect(),
        other => id(other).into_iter().collect(),
    }
}

/// The bytes of a file, `None` if it does not exist.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path)(error)),
    }
}

/// A JSON file; `null` if it does not exist.
fn read_json(path: &Path) -> Result<Value> {
    let Some(bytes) = read(path)? else { return Ok(Value::Null) };
    serde_json::from_slice(&bytes).map_err(|error| Error::file(path, format!("malformed JSON: {error}")))
}
