//! Rows to examples: forms, masks, and what is refused.

use std::path::{Path, PathBuf};

use nibble::data::{self, DataOptions, Example, Format, IGNORE, Rows, Span, instruction_prompt, preview};
use nibble_models::tokenizer::Tokenizer;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const BOS: u32 = 256;
const EOS: u32 = 257;
const START: u32 = 258;
const VOCAB: usize = 259;

/// Byte-level BPE without merges: the token id of a byte is its place in the alphabet below; bytes of ASCII text are
/// easily told apart, and every text is representable.
fn tokenizer() -> Tokenizer {
    // Bytes that print as themselves; the others are shifted beyond U+0100, in order.
    let prints = |byte: u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut shifted = 0x100;
    let mut vocab = Map::new();
    for byte in 0..256 {
        let spelled = if prints(byte) { byte } else { shifted };
        shifted += u32::from(!prints(byte));
        vocab.insert(char::from_u32(spelled).unwrap().to_string(), json!(byte));
    }
    let added: Vec<Value> = ["<s>", "<|im_end|>", "<|im_start|>"]
        .iter()
        .enumerate()
        .map(|(i, content)| {
            json!({"id": 256 + i, "content": content, "special": true, "normalized": false,
                   "single_word": false, "lstrip": false, "rstrip": false})
        })
        .collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    Tokenizer::from_json(&json.to_string()).unwrap()
}

fn chat() -> Tokenizer {
    tokenizer().with_special(None, vec![EOS], None).unwrap().with_chat_template(CHATML)
}

struct Data {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn data(name: &str, content: impl AsRef<[u8]>) -> Data {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    Data { _dir: dir, path }
}

const OPTIONS: DataOptions = DataOptions {
    seq_len: 512,
    vocab_size: VOCAB,
    format: None,
    all_choices: false,
    skip_bad_rows: false,
    cache: None,
};

fn load_examples(path: &Path, tokenizer: Option<&Tokenizer>, options: &DataOptions) -> data::Result<Vec<Example>> {
    data::load_examples(&path.to_path_buf().into(), tokenizer, options)?.iter().collect()
}

fn load(content: &str, tokenizer: &Tokenizer) -> Vec<Example> {
    load_examples(&data("rows.jsonl", content).path, Some(tokenizer), &OPTIONS).unwrap()
}

fn refused(name: &str, content: impl AsRef<[u8]>, tokenizer: &Tokenizer, options: &DataOptions) -> String {
    let data = data(name, content);
    let error = load_examples(&data.path, Some(tokenizer), options).unwrap_err().to_string();
    let place = data.path.display().to_string();
    assert!(error.starts_with(&place), "{error}");
    error[place.len()..].to_owned()
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn span(learned: bool, text: &str) -> Span {
    Span { learned, text: text.to_owned() }
}

#[test]
fn text_rows_learn_everything_and_end_with_eos() {
    let rows = "{\"coarse\":\"X\",\"text\":\"hé\"}\n\n{\"text\":\"b\"}\r\n";
    let examples = load(rows, &tokenizer().with_special(Some(BOS), vec![EOS], None).unwrap());
    assert_eq!(examples.len(), 2);
    assert_eq!(examples[0].ids, [BOS, 104, 0xC3, 0xA9, EOS]);
    assert_eq!(examples[0].labels, [256, 104, 0xC3, 0xA9, 257]);
    // Without special tokens the text is all there is.
    assert_eq!(load("{\"text\":\"ab\"}", &tokenizer())[0].ids, bytes("ab"));
}

#[test]
fn completions_are_learned_with_their_eos() {
    let tokenizer = tokenizer().with_special(Some(BOS), vec![EOS], None).unwrap();
    let examples = load(r#"{"prompt":"Q:","completion":" a"}"#, &tokenizer);
    assert_eq!(examples[0].ids, [&[BOS], &bytes("Q: a")[..], &[EOS]].concat());
    assert_eq!(examples[0].labels, [IGNORE, IGNORE, IGNORE, 32, 97, 257]);
    assert_eq!(preview(&examples[0], &tokenizer).unwrap(), [span(false, "<s>Q:"), span(true, " a<|im_end|>")]);
}

#[test]
fn instructions_are_laid_out_in_sections() {
    let tokenizer = chat();
    let rows = "{\"instruction\":\"Add\",\"input\":\"1 2\",\"output\":\"3\"}\n{\"instruction\":\"Hi\",\"output\":\"Yo\"}\n\
                {\"instruction\":\"Hi\",\"input\":null,\"output\":\"Yo\"}";
    let examples = load(rows, &tokenizer);
    let shown = preview(&examples[0], &tokenizer).unwrap();
    assert_eq!(shown, [span(false, &instruction_prompt("Add", "1 2")), span(true, "3<|im_end|>")]);
    assert!(shown[0].text.ends_with("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n"));
    assert_eq!(preview(&examples[1], &tokenizer).unwrap()[0].text, instruction_prompt("Hi", ""));
    assert!(!instruction_prompt("Hi", "").contains("Input"));
    assert_eq!(examples[1], examples[2]);
}

#[test]
fn assistant_turns_are_learned_up_to_their_end_token() {
    let tokenizer = chat();
    let row = json!({"messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "weight": 1},
        {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "\nTa"},
    ]});
    let examples = load(&row.to_string(), &tokenizer);
    assert_eq!(
        preview(&examples[0], &tokenizer).unwrap(),
        [
            span(false, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
            span(true, "Yo<|im_end|>"),
            span(false, "\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"),
            span(true, "\nTa<|im_end|>"),
            span(false, "\n"),
        ]
    );
    assert_eq!(examples[0].ids[0], START);
}

#[test]
fn token_rows_are_taken_as_they_are() {
    let tokenizer = tokenizer();
    let examples = load("{\"input_ids\":[1,2,3]}\n{\"input_ids\":[1,2,3],\"labels\":[-100,7,-100]}", &tokenizer);
    assert_eq!(examples[0], Example { ids: vec![1, 2, 3], labels: vec![1, 2, 3] });
    assert_eq!(examples[1], Example { ids: vec![1, 2, 3], labels: vec![IGNORE, 7, IGNORE] });
}

#[test]
fn plain_text_is_cut_into_blocks() {
    let tokenizer = tokenizer().with_special(Some(BOS), vec![EOS], None).unwrap();
    let file = data("book.txt", "{\"text\":1}abc");
    let options = DataOptions { seq_len: 5, ..OPTIONS };
    let examples = load_examples(&file.path, Some(&tokenizer), &options).unwrap();
    let ids: Vec<u32> = examples.iter().flat_map(|example| example.ids.clone()).collect();
    assert_eq!(ids, [&[BOS], &bytes("{\"text\":1}abc")[..], &[EOS]].concat());
    assert_eq!(examples.iter().map(|example| example.ids.len()).collect::<Vec<_>>(), [5, 5, 5]);
    assert!(examples.iter().all(|example| example.unmasked() == 4));
    // A last block of one token predicts nothing and is left out.
    let six = load_examples(&data("six.txt", "abcd").path, Some(&tokenizer), &options).unwrap();
    assert_eq!(six.iter().map(|example| example.ids.len()).collect::<Vec<_>>(), [5]);
}

#[test]
fn the_richest_form_wins() {
    let all = json!({"text": "t", "input_ids": [1, 2], "instruction": "i", "output": "o", "prompt": "p",
                     "completion": "c", "messages": [{"role": "assistant", "content": "x"}]});
    let mut row = all.as_object().unwrap().clone();
    let expected = [
        (Format::Messages, "messages"),
        (Format::Completion, "prompt"),
        (Format::Instruction, "output"),
        (Format::Tokens, "input_ids"),
        (Format::Text, "coarse"),
    ];
    for (format, key) in expected {
        let file = data("rows.jsonl", Value::Object(row.clone()).to_string());
        let mut rows = Rows::open(&file.path).unwrap();
        rows.next().unwrap().unwrap();
        assert_eq!(rows.format(), Some(format));
        row.remove(key);
    }
}

#[test]
fn truncation_keeps_the_front() {
    let options = DataOptions { seq_len: 4, ..OPTIONS };
    let file = data("rows.jsonl", r#"{"prompt":"abc","completion":"defg"}"#);
    let examples = load_examples(&file.path, Some(&chat()), &options).unwrap();
    assert_eq!(examples[0].ids, bytes("abcd"));
    assert_eq!(examples[0].labels, [IGNORE, IGNORE, IGNORE, 100]);
    // The completion starts exactly behind the cut.
    let error = refused(
        "rows.jsonl",
        "{\"prompt\":\"ab\",\"completion\":\"c\"}\n{\"prompt\":\"abcd\",\"completion\":\"e\"}",
        &chat(),
        &options,
    );
    assert!(error.starts_with(":2: the completion is empty after truncation"), "{error}");
    assert!(error.contains("--seq-len"), "{error}");
}

#[test]
fn bad_rows_are_named() {
    let tokenizer = chat();
    let cases = [
        ("", ": holds no examples"),
        ("\n  \n", ": holds no examples"),
        ("{\"text\":\"ab\"}\n\n{\"text\":3}", ":3: \"text\" is a number; expected a string"),
        ("{\"text\":\"ab\"}\n{\"prompt\":\"a\",\"completion\":\"b\"}", ":2: has no \"text\"; expected {\"text\"}"),
        ("{\"question\":\"ab\"}", ":1: a row with the keys [\"question\"]; expected one of {\"messages\""),
        ("[1]", ":1: found a number; expected a JSON object"),
        ("[{\"text\":\"ab\"},\n{\"text\":3}]", ":2: \"text\" is a number; expected a string"),
        ("[{\"text\":\"ab\"}\n,\n {", ": line 3: the list is not closed with ]"),
        ("[{\"text\":\"ab\"},,{}]", ": line 1: a comma without an item before it"),
        ("[]", ": holds no examples"),
        ("{\"conversations\":[{\"from\":\"gpt\"}]}", ":1: turn 1 is not of the form {\"from\",\"value\"}"),
        ("{\"conversations\":[{\"from\":\"human\",\"value\":\"a\"}]}", ":1: the conversation has no assistant turn"),
        ("{\"text\":\"ab\"}\n{\"text\":\"ab\"", ":2: not valid JSON (EOF while parsing an object at column"),
        ("{\"text\":\"\"}", ":1: \"text\" is empty"),
        ("{\"prompt\":\"a\",\"completion\":\"\"}", ":1: \"completion\" is empty"),
        ("{\"instruction\":\"a\",\"output\":\"\"}", ":1: \"output\" is empty"),
        ("{\"instruction\":\"a\",\"input\":[],\"output\":\"\"}", ":1: \"input\" is a list; expected a string"),
        ("{\"messages\":[]}", ":1: the conversation has no assistant turn"),
        ("{\"messages\":{}}", ":1: \"messages\" is an object; expected a list"),
        ("{\"messages\":[{\"role\":\"user\"}]}", ":1: message 1 is not of the form"),
        ("{\"input_ids\":[1,-2]}", ":1: \"input_ids\" holds -2"),
        ("{\"input_ids\":[1,2.5]}", ":1: \"input_ids\" holds 2.5"),
        ("{\"input_ids\":[1,259]}", ":1: the token id 259 is outside of the model's vocabulary of 259"),
        ("{\"input_ids\":[1,2],\"labels\":[1]}", ":1: 1 labels for 2 input_ids"),
        ("{\"input_ids\":[1,2],\"labels\":[1,-1]}", ":1: \"labels\" holds -1"),
        ("{\"input_ids\":[1,2],\"labels\":[1,259]}", ":1: the label 259 is outside"),
        ("{\"input_ids\":[1,2],\"labels\":[-100,-100]}", ":1: no label is left to learn"),
        ("{\"input_ids\":[1,2],\"labels\":[1,-100]}", ":1: 2 token(s), of which none is left to predict"),
        ("{\"input_ids\":[]}", ":1: no label is left to learn"),
    ];
    for (content, expected) in cases {
        let error = refused("rows.jsonl", content, &tokenizer, &OPTIONS);
        assert!(error.starts_with(expected), "{content}\n  gives    {error}\n  expected {expected}");
    }
    let error = refused("rows.jsonl", b"{\"text\":\"ab\"}\n{\"text\":\"\xFF\"}", &tokenizer, &OPTIONS);
    assert!(error.starts_with(":2: not valid JSON"), "{error}");
    assert!(refused("book.txt", "", &tokenizer, &OPTIONS).starts_with(": holds no examples"));
    assert!(refused("book.txt", b"ab\xFF", &tokenizer, &OPTIONS).starts_with(": not UTF-8 at byte 2"));
    let small = DataOptions { vocab_size: 99, ..OPTIONS };
    assert!(refused("book.txt", "abcd", &tokenizer, &small).starts_with(": the token id 99 is outside"));
    assert!(refused("rows.jsonl", "{\"text\":\"abcd\"}", &tokenizer, &small).starts_with(":1: the token id 99"));
}

#[test]
fn what_is_not_there_is_named() {
    let missing = std::path::Path::new("no/such/rows.jsonl");
    assert!(
        load_examples(missing, Some(&chat()), &OPTIONS).unwrap_err().to_string().starts_with("no/such/rows.jsonl: ")
    );
    let row = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
    let error = refused("rows.jsonl", row, &tokenizer(), &OPTIONS);
    assert!(error.starts_with(":1: the model has no chat template"), "{error}");
    let short = DataOptions { seq_len: 1, ..OPTIONS };
    assert!(load_examples(missing, Some(&chat()), &short).unwrap_err().to_string().contains("--seq-len is 1"));
}

#[test]
fn without_a_tokenizer_token_ids_are_enough() {
    let file = data("rows.jsonl", "{\"input_ids\":[1,2]}");
    assert_eq!(load_examples(&file.path, None, &OPTIONS).unwrap()[0].ids, [1, 2]);
    for (name, content) in [
        ("rows.jsonl", r#"{"text":"ab"}"#),
        ("rows.jsonl", r#"{"prompt":"a","completion":"b"}"#),
        ("rows.jsonl", r#"{"instruction":"a","output":"b"}"#),
        ("rows.jsonl", r#"{"messages":[{"role":"assistant","content":"b"}]}"#),
        ("book.txt", "ab"),
    ] {
        let error = load_examples(&data(name, content).path, None, &OPTIONS).unwrap_err().to_string();
        let place = if name == "book.txt" { "book.txt: " } else { "rows.jsonl:1: " };
        assert!(error.contains(&format!("{place}holds text, but the model comes without a tokenizer")), "{error}");
    }
}

#[test]
fn templates_that_rewrite_the_past_are_refused() {
    let row = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
    // Writes the number of turns first; writes the prompt in other words than the turn.
    for template in [
        "{{ messages | length }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% if add_generation_prompt %}bot:{% endif %}",
    ] {
        let error = refused("rows.jsonl", row, &chat().with_chat_template(template), &OPTIONS);
        assert!(error.starts_with(":1: the chat template does not write message 2"), "{error}");
    }
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}\
                   {% endfor %}";
    let error = refused("rows.jsonl", row, &chat().with_chat_template(endless), &OPTIONS);
    assert!(error.starts_with(":1: chat template: stopped after") && error.contains("loop without end"), "{error}");
    let strict = "{{ raise_exception('only systems') }}";
    let error = refused("rows.jsonl", row, &chat().with_chat_template(strict), &OPTIONS);
    assert!(error.contains("only systems"), "{error}");
    // A broken template matters to conversations alone.
    let broken = chat().with_chat_template("{% for %}");
    assert!(refused("rows.jsonl", row, &broken, &OPTIONS).starts_with(":1: chat template: "));
    assert_eq!(load("{\"text\":\"ab\"}", &broken).len(), 1);
}

proptest! {
    #[test]
    fn bytes_never_panic(content in prop::collection::vec(any::<u8>(), 0..300), text: bool) {
        let file = data(if text { "a.txt" } else { "a.jsonl" }, content);
        let _ = load_examples(&file.path, Some(&chat()), &OPTIONS);
    }

    #[test]
    fn almost_rows_never_panic(
        lines in prop::collection::vec(
            r#"\{"(text|prompt|messages|input_ids|labels)":("[a-z<|é]{0,4}"|\[[0-9,-]{0,6}\]|null|\{\})(,"(completion|labels|output)":("x"|\[1\]))?\}"#,
            0..4,
        ),
        seq_len in 0usize..6,
    ) {
        let file = data("a.jsonl", lines.join("\n"));
        if let Ok(examples) = load_examples(&file.path, Some(&chat()), &DataOptions { seq_len, ..OPTIONS }) {
            prop_assert!(examples.iter().all(|example| example.unmasked() > 0 && example.ids.len() <= seq_len));
        }
    }

    #[test]
    fn masks_cover_the_prompt_alone(
        rows in prop::collection::vec((".{0,12}", ".{1,12}"), 1..6), seq_len in 2usize..80,
    ) {
        let tokenizer = chat();
        let content: Vec<String> =
            rows.iter().map(|(p, c)| json!({"prompt": p, "completion": c}).to_string()).collect();
        let file = data("rows.jsonl", content.join("\n"));
        let options = DataOptions { seq_len, ..OPTIONS };
        let Ok(examples) = load_examples(&file.path, Some(&tokenizer), &options) else { return Ok(()) };
        prop_assert_eq!(examples.len(), rows.len());
        for (example, (prompt, completion)) in examples.iter().zip(&rows) {
            let full = [bytes(prompt), bytes(completion), vec![EOS]].concat();
            prop_assert_eq!(&example.ids[..], &full[..full.len().min(seq_len)]);
            prop_assert_eq!(example.prompt_len(), prompt.len());
            for (i, (&id, &label)) in example.ids.iter().zip(&example.labels).enumerate() {
                prop_assert_eq!(label, if i < prompt.len() { IGNORE } else { i64::from(id) });
            }
        }
    }
}
