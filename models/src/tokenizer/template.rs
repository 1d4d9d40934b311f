//! The special tokens around a text: which ones the encoder adds, and making it add what a configuration asks for.

use tokenizers::PostProcessorWrapper;
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};

use super::Specials;

/// Makes `inner` add bos and eos as `specials` asks (where it says nothing, as the encoder's own post-processing does)
/// and returns what it adds then: (bos before a text, eos after it).
pub(super) fn install(inner: &mut tokenizers::Tokenizer, specials: &Specials) -> Result<(bool, bool), String> {
    let eos = specials.eos.first().copied();
    let own = adds(inner, specials)?;
    // A tokenizer cannot add what it does not have.
    let wanted = (
        specials.add_bos.unwrap_or(own.0) && specials.bos.is_some(),
        specials.add_eos.unwrap_or(own.1) && eos.is_some(),
    );
    if wanted != own {
        let before = if wanted.0 { specials.bos } else { None };
        let after = if wanted.1 { eos } else { None };
        // Byte-level post-processing only moves offsets, which are not used: a template may replace it.
        let processor = template(inner, before, after)?;
        inner.with_post_processor(processor);
    }
    Ok(wanted)
}

/// What `inner` adds by itself, seen from an encoded letter.
fn adds(inner: &tokenizers::Tokenizer, specials: &Specials) -> Result<(bool, bool), String> {
    let ids = |special| {
        let encoding = inner.encode_fast("a", special).map_err(|error| error.to_string())?;
        Ok::<_, String>(encoding.get_ids().to_vec())
    };
    let (bare, full) = (ids(false)?, ids(true)?);
    let added = full.len() - bare.len().min(full.len());
    if added == 0 {
        return Ok((false, false));
    }
    let first = specials.bos.is_some() && full.first().copied() == specials.bos;
    let last = specials.eos.iter().any(|&eos| full.last() == Some(&eos));
    Ok((first, last && (added > 1 || !first)))
}

fn template(
    inner: &tokenizers::Tokenizer,
    before: Option<u32>,
    after: Option<u32>,
) -> Result<Option<PostProcessorWrapper>, String> {
    if before.is_none() && after.is_none() {
        return Ok(None);
    }
    // The template's own text syntax splits at spaces and colons, which a token may hold: name the tokens here.
    let mut single = vec!["$A"];
    let mut tokens = Vec::new();
    for (name, id) in [("bos", before), ("eos", after)] {
        let Some(id) = id else { continue };
        let spelling = inner.id_to_token(id).ok_or_else(|| format!("token id {id} is not in the vocabulary"))?;
        tokens.push(SpecialToken::new(name.to_owned(), vec![id], vec![spelling]).map_err(|error| error.to_string())?);
        if name == "bos" {
            single.insert(0, name);
        } else {
            single.push(name);
        }
    }
    let built = TemplateProcessing::builder()
        .try_single(single)
        .map_err(|error| error.to_string())?
        .special_tokens(tokens)
        .build()
        .map_err(|error| error.to_string())?;
    Ok(Some(PostProcessorWrapper::Template(built)))
}
