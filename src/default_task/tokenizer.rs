//! The byte-level BPE tokenizer of the default model, trained on its text.

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer, TokenizerBuilder};

/// Starts every sequence.
pub const BOS: &str = "<|bos|>";
/// Ends every document and every answer.
pub const EOS: &str = "<|eos|>";
/// The special tokens' ids: the first ones, in this order.
pub const BOS_ID: u32 = 0;
pub const EOS_ID: u32 = 1;

/// Trains a tokenizer of `vocab_size` entries on `texts`. Encoding with special tokens puts [`BOS`] in front.
///
/// Ties between merges go to the lower ids, and ids follow the byte alphabet's order, so the same texts always make the
/// same tokenizer.
///
/// # Errors
/// If `texts` hold too little to fill the vocabulary, or the tokenizer library fails.
pub fn train(texts: &[String], vocab_size: usize) -> Result<Tokenizer, tokenizers::Error> {
    let specials = [BOS, EOS].map(|token| AddedToken::from(token, true)).to_vec();
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(specials.clone())
        .build();
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(ByteLevel::new(false, true, true)))
        .with_post_processor(Some(
            TemplateProcessing::builder()
                .try_single(format!("{BOS} $A"))?
                .try_pair(format!("{BOS} $A {BOS} $B:1"))?
                .special_tokens(vec![(BOS, BOS_ID)])
                .build()?,
        ))
        .with_decoder(Some(ByteLevel::new(false, true, true)))
        .build()?;
    tokenizer.train(&mut trainer, texts.iter())?;
    let found = tokenizer.get_vocab_size(true);
    if found != vocab_size {
        return Err(format!("the text gives a vocabulary of {found} entries, {vocab_size} were asked for").into());
    }
    let json = tokenizer.to_string(false)?;
    json.parse()
}

/// What `tokenizer_config.json` says of it.
pub fn config_json() -> serde_json::Value {
    serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": true,
        "add_eos_token": false,
        "clean_up_tokenization_spaces": false,
        "model_max_length": 512,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::default_task::{task, text};

    fn texts() -> Vec<String> {
        (0..3000).map(|index| text::scene(1, index)).collect()
    }

    #[test]
    fn training_twice_gives_the_same_bytes() {
        let texts = texts();
        let first = train(&texts, 768).unwrap().to_string(true).unwrap();
        assert_eq!(first, train(&texts, 768).unwrap().to_string(true).unwrap());
    }

    #[test]
    fn every_text_survives_the_round_trip() {
        let texts = texts();
        let tokenizer = train(&texts, 768).unwrap();
        let rows = task::eval_rows(1, 100).into_iter().flat_map(|row| [row.prompt, row.completion]);
        for text in texts.into_iter().take(300).chain(rows).chain(["Größe → 中文 🎈\t\n".to_string()]) {
            let encoding = tokenizer.encode(text.as_str(), true).unwrap();
            assert_eq!(encoding.get_ids()[0], BOS_ID);
            assert!(!encoding.get_ids()[1..].contains(&BOS_ID));
            assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), text);
        }
        assert_eq!(tokenizer.token_to_id(EOS), Some(EOS_ID));
    }

    #[test]
    fn too_little_text_is_an_error() {
        let message = train(&["a b".to_string()], 768).unwrap_err().to_string();
        assert!(message.contains("768"), "{message}");
    }
}
