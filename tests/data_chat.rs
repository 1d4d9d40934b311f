//! Rows in tokens, with what is learned of them, as transformers and TRL have them: `golden/chat/make.py`.

use std::{fs, path::Path};

use nibble::data::{DataOptions, Example, IGNORE, load_examples};
use nibble_models::tokenizer::Tokenizer;
use serde_json::{Value, json};

fn golden(name: &str) -> String {
    fs::read_to_string(Path::new("tests/golden/chat").join(name)).unwrap()
}

/// The example of a row.
fn example(row: &Value, tokenizer: &Tokenizer) -> Example {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    fs::write(&path, row.to_string()).unwrap();
    let options = DataOptions { seq_len: 10_000, vocab_size: 10_000, ..DataOptions::default() };
    let examples = load_examples(&path.into(), Some(tokenizer), &options).unwrap();
    assert_eq!(examples.known().notes, Default::default());
    examples.get(0).unwrap()
}

fn numbers<T: TryFrom<i64, Error: std::fmt::Debug>>(values: &Value) -> Vec<T> {
    values.as_array().unwrap().iter().map(|value| value.as_i64().unwrap().try_into().unwrap()).collect()
}

#[test]
fn tokens_and_masks_of_conversations_are_those_of_transformers_and_trl() {
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
        let messages = &golden_cases["conversations"][number];
        let turns = messages.as_array().unwrap().iter();
        let said: Vec<Value> = turns.map(|turn| json!({"from": turn["role"], "value": turn["content"]})).collect();
        for row in [json!({ "messages": messages }), json!({ "conversations": said })] {
            let found = example(&row, &tokenizer);
            assert_eq!(found.ids, numbers::<u32>(&case["ids"]), "{place}");
            let learned: Vec<u64> = found.labels.iter().map(|&label| u64::from(label != IGNORE)).collect();
            assert_eq!(learned, numbers::<u64>(&case["learned"]), "{place}");
        }
        checked += 1;
    }
    assert_eq!(checked, 28);
}

#[test]
fn tokens_and_labels_of_texts_and_completions_are_those_of_trl() {
    let golden_cases: Value = serde_json::from_str(&golden("golden.json")).unwrap();
    let rows = golden_cases["rows"].as_array().unwrap();
    for case in rows {
        let file = format!("{}.json", case["tokenizer"].as_str().unwrap());
        let tokenizer = Tokenizer::from_json(&golden(&file)).unwrap();
        let eos = tokenizer.token_id(case["eos"].as_str().unwrap()).unwrap();
        let found = example(&case["row"], &tokenizer.with_special(None, vec![eos], None).unwrap());
        assert_eq!(found.ids, numbers::<u32>(&case["ids"]), "{}", case["row"]);
        assert_eq!(found.labels, numbers::<i64>(&case["labels"]), "{}", case["row"]);
    }
    assert_eq!(rows.len(), 8);
}
