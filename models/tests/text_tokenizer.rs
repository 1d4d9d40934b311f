//! Tokenizers from hand-made vocabularies and folders.

use std::path::Path;

use nibble_models::Error;
use nibble_models::stream::TextStream;
use nibble_models::tokenizer::{GgufVocab, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

fn strings(items: &[&str]) -> Vec<String> {
    items.iter().map(|item| item.to_string()).collect()
}

fn build(vocab: &GgufVocab) -> nibble_models::Result<Tokenizer> {
    Tokenizer::from_gguf_vocab(vocab, Path::new("tiny.gguf"))
}

/// `a`, `b`, `1`, `2`, space and line end, with merges `ab`, ` a`, `12`, and a control token.
fn byte_level(pre: &str) -> GgufVocab {
    GgufVocab {
        model: "gpt2".to_owned(),
        pre: Some(pre.to_owned()),
        tokens: strings(&["<|end|>", "a", "b", "1", "2", "Ġ", "Ċ", "ab", "Ġa", "12", "<think>", "Ġab"]),
        token_types: vec![3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 1],
        merges: strings(&["a b", "Ġ a", "1 2"]),
        eos: Some(0),
        chat_template: Some("{{ eos_token }}".to_owned()),
        ..GgufVocab::default()
    }
}

/// SentencePiece with bytes for a, space-like pieces, and scores that decide between overlapping merges.
fn sentencepiece() -> GgufVocab {
    GgufVocab {
        model: "llama".to_owned(),
        tokens: strings(&["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab"]),
        token_types: vec![2, 3, 3, 6, 6, 1, 1, 1, 1, 1, 1, 1, 1],
        scores: vec![0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -9.0, -3.0, -2.0, -4.0, -5.0],
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        ..GgufVocab::default()
    }
}

#[test]
fn byte_level_merges_and_special_tokens() {
    let tokenizer = build(&byte_level("gpt-2")).unwrap();
    assert_eq!(tokenizer.encode("ab ab12\n", false).unwrap(), [7, 5, 7, 9, 6]);
    assert_eq!(tokenizer.encode("a<|end|>b<think>", true).unwrap(), [1, 0, 2, 10]);
    assert_eq!(tokenizer.decode(&[7, 0, 8, 10], false).unwrap(), "ab<|end|> a<think>");
    // Control tokens are left out on request, user-defined ones are text.
    assert_eq!(tokenizer.decode(&[7, 0, 8, 10], true).unwrap(), "ab a<think>");
    assert_eq!((tokenizer.vocab_size(), tokenizer.eos(), tokenizer.bos()), (12, Some(0), None));
    assert_eq!((tokenizer.token_id("Ġa"), tokenizer.token_id("c")), (Some(8), None));
    assert_eq!((tokenizer.id_to_token(7).as_deref(), tokenizer.id_to_token(12)), (Some("ab"), None));
    let chat = tokenizer.chat().unwrap().unwrap();
    assert_eq!(chat.render(&[], false).unwrap(), "<|end|>");
}

#[test]
fn pre_tokenizers_cut_differently() {
    let ids = |pre: &str, text: &str| build(&byte_level(pre)).unwrap().encode(text, false).unwrap();
    // smollm: digits one by one. qwen2 too, and one space may lead a word in all.
    assert_eq!(ids("smollm", "12"), [3, 4]);
    assert_eq!(ids("qwen2", "12"), [3, 4]);
    assert_eq!(ids("llama-bpe", "12"), [9]);
    assert_eq!(ids("default", "12"), [9]);
    // gpt-2 cuts numbers with their space, llama 3 without.
    assert_eq!(ids("gpt-2", " 1"), [5, 3]);
    // A whole word that is a token wins over merges in llama 3 only.
    assert_eq!(ids("llama-bpe", " ab"), [11]);
    assert_eq!(ids("qwen2", " ab"), [5, 7]);
    match build(&byte_level("from-the-future")) {
        Err(Error::Unsupported { what, .. }) => assert!(what.contains("\"from-the-future\""), "{what}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn bos_follows_the_file_and_the_family() {
    let adds = |vocab: GgufVocab| build(&vocab).unwrap().encode("a", true).unwrap();
    let with_bos = |pre: &str| GgufVocab { bos: Some(0), ..byte_level(pre) };
    assert_eq!(adds(with_bos("gpt-2")), [1]);
    assert_eq!(adds(with_bos("llama-bpe")), [0, 1]);
    assert_eq!(adds(GgufVocab { add_bos: Some(false), ..with_bos("llama-bpe") }), [1]);
    assert_eq!(adds(GgufVocab { add_bos: Some(true), ..byte_level("gpt-2") }), [1], "no bos to add");
    assert_eq!(adds(GgufVocab { add_bos: Some(true), add_eos: Some(true), ..with_bos("gpt-2") }), [0, 1, 0]);
    assert_eq!(adds(sentencepiece()), [1, 11]);
    let eot = GgufVocab { eot: Some(10), ..byte_level("gpt-2") };
    assert_eq!(build(&eot).unwrap().eos_ids(), [0, 10]);
}

#[test]
fn sentencepiece_merges_by_score() {
    let tokenizer = build(&sentencepiece()).unwrap();
    // "bc" (-2) before "ab" (-3); then "▁a" (-4).
    assert_eq!(tokenizer.encode("abc", false).unwrap(), [11, 10]);
    // "ab" first; then "▁ab" out of "▁" and "ab".
    assert_eq!(tokenizer.encode("ab", false).unwrap(), [12]);
    // Bytes for what is no piece; unknown where the bytes are missing too, several in a row as one.
    assert_eq!(tokenizer.encode("é", false).unwrap(), [5, 3, 4]);
    assert_eq!(tokenizer.encode("üü", false).unwrap(), [5, 0]);
    assert_eq!(tokenizer.encode("a</s>a", false).unwrap(), [11, 2, 11]);
    assert_eq!(tokenizer.decode(&[1, 12, 11, 5, 3, 4], true).unwrap(), "ab a é");
    // A continuation gets no space of its own, but what follows a special token in it does.
    assert_eq!(tokenizer.encode_continuation("ab").unwrap(), [9]);
    assert_eq!(tokenizer.encode_continuation(" ab").unwrap(), [12]);
    assert_eq!(tokenizer.encode_continuation("ab</s>ab").unwrap(), [9, 2, 12]);
    let bare = build(&GgufVocab { add_space_prefix: Some(false), ..sentencepiece() }).unwrap();
    assert_eq!(bare.encode("ab", false).unwrap(), [9]);
    assert_eq!(bare.decode(&[11], true).unwrap(), " a");
}

#[test]
fn vocabularies_that_do_not_fit_are_refused() {
    let cases = [
        (GgufVocab { tokens: vec![], ..byte_level("gpt-2") }, "tokens is empty"),
        (GgufVocab { token_types: vec![1], ..byte_level("gpt-2") }, "token_type has 1 entries for 12 tokens"),
        (GgufVocab { scores: vec![], ..sentencepiece() }, "needs tokenizer.ggml.scores"),
        (GgufVocab { scores: vec![1.0], ..sentencepiece() }, "scores has 1 entries for 13 tokens"),
        (GgufVocab { eos: Some(12), ..byte_level("gpt-2") }, "eos_token_id is 12, but there are 12 tokens"),
        (GgufVocab { merges: strings(&["ab"]), ..byte_level("gpt-2") }, "merge 0 is \"ab\""),
        (GgufVocab { merges: strings(&["a zz"]), ..byte_level("gpt-2") }, "needs the token \"zz\""),
        // The parts exist; the whole is longer than any token.
        (
            GgufVocab { merges: strings(&["<|end|> <|end|>"]), ..byte_level("gpt-2") },
            "needs the token \"<|end|><|end|>\"",
        ),
    ];
    for (vocab, expected) in cases {
        let error = build(&vocab).unwrap_err().to_string();
        assert!(error.starts_with("tiny.gguf: tokenizer: ") && error.contains(expected), "{expected}: {error}");
    }
    let other = GgufVocab { model: "bert".to_owned(), ..byte_level("gpt-2") };
    assert!(matches!(build(&other), Err(Error::Unsupported { .. })));
}

/// A vocabulary made from a tokenizer gives a tokenizer that encodes the same, and the name of its cuts.
#[test]
fn tokenizers_become_gguf_vocabularies() {
    let texts = ["ab ab12\n", "a<|end|>b", " abc", "cab bc ab", "é", "a1 2b12 "];
    for pre in ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken"] {
        let tokenizer = build(&byte_level(pre)).unwrap();
        let vocab = GgufVocab::from_tokenizer(&tokenizer).unwrap();
        let expected = byte_level(pre);
        assert_eq!(vocab.pre.as_deref(), Some(pre));
        assert_eq!((&vocab.tokens, &vocab.token_types), (&expected.tokens, &expected.token_types));
        assert_eq!((&vocab.merges, &vocab.chat_template), (&expected.merges, &expected.chat_template));
        let again = build(&vocab).unwrap();
        for text in texts {
            assert_eq!(again.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap(), "{pre}: {text:?}");
        }
    }
    for prefix in [true, false] {
        let tokenizer = build(&GgufVocab { add_space_prefix: Some(prefix), ..sentencepiece() }).unwrap();
        let vocab = GgufVocab::from_tokenizer(&tokenizer).unwrap();
        assert_eq!((&vocab.model[..], vocab.add_space_prefix), ("llama", Some(prefix)));
        assert_eq!((&vocab.tokens, &vocab.token_types), (&sentencepiece().tokens, &sentencepiece().token_types));
        assert!(vocab.merges.is_empty());
        let again = build(&vocab).unwrap();
        for text in texts {
            assert_eq!(again.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap(), "{text:?}");
        }
    }
    // A way of cutting that no name stands for.
    let json = json!({
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
        "pre_tokenizer": {"type": "Whitespace"},
    });
    let error = GgufVocab::from_tokenizer(&Tokenizer::from_json(&json.to_string()).unwrap()).unwrap_err().to_string();
    assert!(error.contains("Whitespace"), "{error}");
}

/// Rows of the embedding without a token stand for no text.
#[test]
fn padding_of_a_vocabulary_is_no_token() {
    let mut vocab = byte_level("gpt-2");
    vocab.tokens.extend(strings(&["[PAD12]", "[PAD99]"]));
    vocab.token_types.extend([5, 5]);
    let tokenizer = build(&vocab).unwrap();
    assert_eq!((tokenizer.id_to_token(12), tokenizer.id_to_token(13).as_deref()), (None, Some("[PAD99]")));
    assert_eq!(tokenizer.decode(&[1, 12, 2], true).unwrap(), "ab");
}

/// Text comes in whole characters and adds up to what the tokens say, spaces of SentencePiece included.
#[test]
fn streams_show_whole_characters() {
    let tokenizer = build(&sentencepiece()).unwrap();
    let mut stream = TextStream::new(&tokenizer, &tokenizer.encode("a", true).unwrap(), &[]);
    let pieces: Vec<String> = [12, 3, 4, 11, 3, 6].iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces[..4], [" ab", "", "é", " a"]);
    // A byte that becomes no character is shown as such, or not at all, once it is clear.
    assert!(pieces[4].is_empty() && pieces[5].ends_with('a'), "{pieces:?}");
    // Over a long text the window moves.
    let ids = [11, 8, 3, 4, 12].repeat(40);
    let mut stream = TextStream::new(&tokenizer, &[1], &["never".into()]);
    let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    text += &stream.finish();
    assert_eq!(text.trim_start(), " acé ab".repeat(40).trim_start());
}

#[test]
fn saved_tokenizers_read_back() {
    let byte = GgufVocab { bos: Some(0), pad: Some(10), add_bos: Some(true), ..byte_level("llama-bpe") };
    for vocab in [byte, byte_level("smollm"), sentencepiece()] {
        let (dir, tokenizer) = (tempfile::tempdir().unwrap(), build(&vocab).unwrap());
        tokenizer.save(dir.path()).unwrap();
        let back = Tokenizer::from_folder(dir.path()).unwrap();
        for text in ["ab ab12", " a<|end|>b", "é</s>a b", ""] {
            assert_eq!(back.encode(text, true).unwrap(), tokenizer.encode(text, true).unwrap());
            assert_eq!(back.encode_continuation(text).unwrap(), tokenizer.encode_continuation(text).unwrap());
        }
        assert_eq!((back.bos(), back.eos_ids(), back.pad()), (tokenizer.bos(), tokenizer.eos_ids(), tokenizer.pad()));
        assert_eq!((back.add_bos(), back.add_eos()), (tokenizer.add_bos(), tokenizer.add_eos()));
        assert_eq!((back.chat_template(), back.vocab_size()), (tokenizer.chat_template(), tokenizer.vocab_size()));
    }
}

/// A folder with the saved byte-level tokenizer, whose configuration files `files` replace.
fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    build(&byte_level("gpt-2")).unwrap().save(dir.path()).unwrap();
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    for (name, content) in files {
        let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

#[test]
fn folders_keep_special_tokens_in_many_places() {
    let load = |files: &[(&str, Value)]| Tokenizer::from_folder(folder(files).path()).unwrap();
    let bare = load(&[]);
    assert_eq!((bare.bos(), bare.eos(), bare.pad(), bare.chat_template()), (None, None, None, None));
    let full = load(&[
        (
            "tokenizer_config.json",
            json!({"bos_token": {"content": "<think>"}, "eos_token": "<|end|>",
            "add_bos_token": true, "added_tokens_decoder": {"0": {"content": "<|end|>", "special": true},
                                                            "12": {"content": "<new>", "special": true}}}),
        ),
        ("special_tokens_map.json", json!({"pad_token": {"content": "<|end|>"}, "bos_token": "a"})),
        // 99 is in no vocabulary.
        ("generation_config.json", json!({"eos_token_id": [7, 0, 99], "bos_token_id": 3})),
        ("config.json", json!({"eos_token_id": 8})),
    ]);
    assert_eq!((full.bos(), full.eos_ids(), full.pad()), (Some(10), &[0, 7, 8][..], Some(0)));
    assert_eq!(full.encode("a<new>", true).unwrap(), [10, 1, 12]);
    assert_eq!(full.vocab_size(), 13);
    let old = load(&[("config.json", json!({"bos_token_id": 10, "eos_token_id": 0}))]);
    assert_eq!((old.bos(), old.eos_ids(), old.add_bos()), (Some(10), &[0][..], false));
}

#[test]
fn chat_templates_come_in_three_forms() {
    let template = |files: &[(&str, Value)]| {
        Tokenizer::from_folder(folder(files).path()).unwrap().chat_template().map(str::to_owned)
    };
    let named = json!({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]});
    let unclear = json!({"chat_template": [{"name": "x", "template": "t"}, {"name": "y", "template": "d"}]});
    assert_eq!(template(&[("tokenizer_config.json", json!({"chat_template": "s"}))]).as_deref(), Some("s"));
    assert_eq!(template(&[("tokenizer_config.json", named.clone())]).as_deref(), Some("d"));
    assert_eq!(template(&[("tokenizer_config.json", unclear)]), None);
    let both = [("tokenizer_config.json", named), ("chat_template.jinja", json!("j\n"))];
    assert_eq!(template(&both).as_deref(), Some("j\n"));
}

#[test]
fn broken_folders_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_folder(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: not found"), "{error}");
    std::fs::write(dir.path().join("tokenizer.model"), "").unwrap();
    assert!(Tokenizer::from_folder(dir.path()).unwrap_err().to_string().contains("SentencePiece"));
    let bpe = |vocab: Value, merges: Value| json!({"added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": merges}});
    let cases = [
        ("tokenizer.json", json!("{"), "malformed"),
        ("tokenizer.json", json!({}), "no \"model\""),
        ("tokenizer.json", bpe(json!({"a": 0, "b": 1}), json!(["a b"])), "needs the token \"ab\""),
        ("tokenizer.json", bpe(json!({"a": 0, "b": 1}), json!([["a", "c"]])), "needs the token \"c\""),
        ("tokenizer.json", bpe(json!({"a": -1, "b": 1}), json!(["a b"])), "\"a\" has the id -1"),
        ("tokenizer_config.json", json!("{\"eos"), "tokenizer_config.json: malformed JSON"),
        ("tokenizer_config.json", json!({"added_tokens_decoder": {"77": {"content": "<x>"}}}), "listed with id 77"),
    ];
    for (name, content, expected) in cases {
        let error = Tokenizer::from_folder(folder(&[(name, content)]).path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let ids = Tokenizer::from_json("{}").unwrap_err().to_string();
    assert!(ids.contains("no \"model\""), "{ids}");
    let tokenizer = build(&byte_level("gpt-2")).unwrap();
    assert!(tokenizer.with_special(Some(12), vec![], None).unwrap_err().to_string().contains("id 12"));
}

proptest! {
    #[test]
    fn any_vocabulary_builds_or_fails(
        llama: bool,
        tokens in prop::collection::vec("[ab▁ <>]{0,3}", 0..8),
        types in prop::collection::vec(-1i32..8, 0..8),
        merges in prop::collection::vec("[ab ]{0,4}", 0..4),
        scores in prop::collection::vec(any::<f32>(), 0..8),
        ids in prop::array::uniform4(prop::option::of(0u32..9)),
        text in "[ab <>é▁]{0,8}",
    ) {
        let vocab = GgufVocab {
            model: if llama { "llama" } else { "gpt2" }.to_owned(),
            token_types: if types.len() == tokens.len() { types } else { vec![] },
            scores: if llama { scores.into_iter().cycle().take(tokens.len()).collect() } else { vec![] },
            tokens, merges, bos: ids[0], eos: ids[1], pad: ids[2], unk: ids[3], ..GgufVocab::default()
        };
        if let Ok(tokenizer) = build(&vocab) {
            let ids = tokenizer.encode(&text, true).unwrap();
            prop_assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            tokenizer.decode(&ids, false).unwrap();
            tokenizer.encode_continuation(&text).unwrap();
        }
    }
}

proptest! {
    // Each case writes a folder.
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn bent_tokenizer_files_build_or_fail(at in 0usize..4000, byte: u8) {
        let dir = folder(&[]);
        let path = dir.path().join("tokenizer.json");
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at % bytes.len();
        bytes[at] = byte;
        std::fs::write(&path, bytes).unwrap();
        if let Ok(tokenizer) = Tokenizer::from_folder(dir.path()) {
            let _ = tokenizer.encode("ab 12<|end|>", true);
        }
    }
}
