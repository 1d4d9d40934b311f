//! Conversations in tokens, with what is learned of them, as transformers has them: `golden/chat/make.py`.

use std::{fs, path::Path};

use nibble::data::{DataOptions, Example, IGNORE, load_examples};
use nibble_models::tokenizer::Tokenizer;
use serde_json::{Value, json};

fn golden(name: &str) -> String {
    fs::read_to_string(Path::new("tests/golden/chat").join(name)).unwrap()
}

/// The example of a conversation.
fn example(messages: &Value, tokenizer: &Tokenizer) -> Example {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    fs::write(&path, json!({ "messages": messages }).to_string()).unwrap();
    let options = DataOptions { seq_len: 10_000, vocab_size: 10_000, ..DataOptions::default() };
    let examples = load_examples(&path.into(), Some(tokenizer), &options).unwrap();
    assert_eq!(examples.known().notes, Default::default());
    examples.get(0).unwrap()
}

#[test]
fn tokens_and_masks_are_those_of_transformers() {
    let golden_cases: Value = serde_json::from_str(&golden("golden.json")).unwrap();
    let mut checked = 0;
    for case in golden_cases["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let place = format!("{} {name} {}", case["tokenizer"], case["conversation"]);
        let kind = case["tokenizer"].as_str().unwrap();
        let tokenizer = Tokenizer::from_json(&golden(&format!("{kind}.json"))).unwrap();
        let id = |key: &str| case[key].as_str().map(|token| tokenizer.token_id(token).unwrap());
        let (bos, eos) = (id("bos"), id("eos"));
        let template = golden_cases["templates"][name].as_str().unwrap();
        let tokenizer = tokenizer.with_special(bos, eos.into_iter().collect(), None).unwrap();
        let tokenizer = tokenizer.with_chat_template(template);
        let number = case["conversation"].as_u64().unwrap() as usize;
        let found = example(&golden_cases["conversations"][number], &tokenizer);
        let numbers =
            |key: &str| case[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect::<Vec<_>>();
        let ids: Vec<u32> = numbers("ids").into_iter().map(|id| id as u32).collect();
        assert_eq!(found.ids, ids, "{place}");
        let learned: Vec<u64> = found.labels.iter().map(|&label| u64::from(label != IGNORE)).collect();
        assert_eq!(learned, numbers("learned"), "{place}");
        checked += 1;
    }
    assert_eq!(checked, 28);
}
