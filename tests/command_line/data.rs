//! Data as users give it.

use crate::support::Place;
use serde_json::{Value, json};
use std::fs;

#[test]
fn several_places_with_weights_are_trained_on_and_shown() {
    let place = Place::new();
    let model = place.model_with_text();
    place.write("a.csv", "prompt,completion\nq,\"a, b\"\nr,c\n");
    place.write("more/b.jsonl", "{\"text\":\"hello\"}\n{\"text\":5}\n{\"prompt\":\"x\",\"completion\":\"y\"}\n");
    let data = ["--data", "a.csv:2,more", "--skip-bad-rows", "--model", model.to_str().unwrap()];
    // Five examples an epoch: the two of a.csv twice, and one of more.
    let args = [&data[..], &["--epochs", "1", "--batch-size", "1", "--no-shuffle"]].concat();
    let shown = place.ok(&[&args[..], &["--show-batch", "9"]].concat());
    assert_eq!(shown.stdout.matches("micro-batch").count(), 5, "{}", shown.stdout);
    assert!(shown.stdout.contains("  read    \"<s>q\"\n  learned \"a, b</s>\"\n"), "{}", shown.stdout);
    assert!(!shown.stdout.contains('\x1b') && !shown.stderr.contains('\x1b'));
    assert!(shown.stderr.contains("warning: 2 rows cannot be used") && shown.stderr.contains("b.jsonl:2: "));
    assert!(!place.path("runs").exists() && !shown.stderr.contains("weights"));
    let refused = place.run(&["--data", "more", "--model", model.to_str().unwrap()]);
    assert!(refused.code == 1 && refused.stderr.contains("b.jsonl:2: \"text\" is a number"), "{}", refused.stderr);

    let ran = place.ok(&[&args[..], &["--grad-accum", "1", "--out", "run"]].concat());
    assert_eq!(place.metrics("run").len(), 5, "{}", ran.stderr);
    // What was written goes back in, and a continued run finds the same examples.
    let settings = place.read("run/settings.toml");
    assert!(settings.contains("data = \"a.csv:2,more\"") && settings.contains("skip-bad-rows = true"), "{settings}");
    let again = place.ok(&["--config", "run/settings.toml", "--out", "again"]);
    assert_eq!(place.losses("again"), place.losses("run"), "{}", again.stderr);
    let place = Place::new();
    place.model_with_text();
    place.write("a.csv", "text\na\n");
    place.refuses_training(&["--data", "a.csv,b:0"], &["the weight of b is 0"]);
    place.refuses_training(&["--data", "a.csv,"], &["PATH:WEIGHT"]);
    place.refuses_training(&["--data", "nowhere.jsonl"], &["nowhere.jsonl"]);
    place.refuses_training(&["--format", "chatml"], &["messages, sharegpt"]);
    place.refuses(
        &["eval", "--model", model.to_str().unwrap(), "--data", "a.csv:2"],
        &["weights are for data to train on"],
    );
}

#[test]
fn packed_runs_say_how_full_they_are_and_go_on_exactly() {
    let place = Place::new();
    // Eight examples of 12 to 19 tokens, in micro-batches of at most 40.
    let args = ["--pack", "--batch-size", "2", "--seq-len", "20", "--steps", "6", "--dropout", "0.1"];
    let whole = place.train("whole", &args);
    assert!(
        whole.stderr.contains("packing  4 micro-batches an epoch of up to 40 tokens, 77.5 % full"),
        "{}",
        whole.stderr
    );
    let cut = place.train("cut", &[&args[..], &["--save-every", "1", "--keep", "9"]].concat());
    assert_eq!(cut.code, 0);
    // As if it had been killed in its second epoch.
    fs::remove_file(place.path("cut/summary.json")).unwrap();
    for step in [6, 5] {
        let _ = fs::remove_dir_all(place.path(&format!("cut/checkpoints/step-{step}")));
    }
    place.ok(&["--resume", "cut"]);
    assert_eq!(place.adapter("cut"), place.adapter("whole"));
    assert_eq!(place.losses("cut"), place.losses("whole"));
}

#[test]
fn choices_are_ranked_by_likelihood() {
    let place = Place::new();
    let model = place.model_with_text();
    let model = model.to_str().unwrap();
    let evaluate = |name: &str, rows: &str| -> Value {
        place.write(name, rows);
        let printed = place.ok(&["eval", "--model", model, "--data", name, "--json"]).stdout;
        serde_json::from_str(&printed).unwrap()
    };
    // A letter's token, see the tokenizer of these tests.
    let ids = |text: &str| text.bytes().map(|byte| u32::from(byte) - 30).collect::<Vec<_>>();
    let (mut rows, mut right, mut short) = (String::new(), 0, 0);
    let choices = ["xyz", "k", "mnopqrst"];
    for (number, prompt) in ["qab", "zz", "Hello", "w", "ccc", "dd"].iter().enumerate() {
        let nll = |choice: &&str| {
            let all = [vec![1], ids(prompt), ids(choice)].concat();
            let labels: Vec<i64> =
                all.iter().enumerate().map(|(i, &id)| if i > prompt.len() { i64::from(id) } else { -100 }).collect();
            let result = evaluate("one.jsonl", &json!({ "input_ids": all, "labels": labels }).to_string());
            result["nll"].as_f64().unwrap() * result["tokens"].as_f64().unwrap()
        };
        let sums: Vec<f64> = choices.iter().map(nll).collect();
        let best = |of: &dyn Fn(usize) -> f64| (0..3).min_by(|&a, &b| of(a).total_cmp(&of(b))).unwrap();
        // Half of them have the answer that the model gives.
        let answer = (best(&|i| sums[i]) + number % 2) % 3;
        right += usize::from(answer == best(&|i| sums[i]));
        short += usize::from(answer == best(&|i| sums[i] / choices[i].len() as f64));
        let spelled = [json!(answer), json!(choices[answer]), json!(["A", "B", "C"][answer])][number % 3].clone();
        rows += &(json!({ "prompt": prompt, "choices": choices, "answer": spelled }).to_string() + "\n");
    }
    assert_eq!(right, 3);
    let result = evaluate("choices.jsonl", &rows);
    assert_eq!(result["choice"], json!({ "questions": 6, "accuracy": 0.5, "accuracy_by_length": short as f64 / 6.0 }));
    // The rest is about the right answers alone, as trained on.
    let completions = rows.lines().map(|line| {
        let row: Value = serde_json::from_str(line).unwrap();
        let answer = match &row["answer"] {
            Value::String(text) if text.len() == 1 && "ABC".contains(&text[..]) => {
                choices["ABC".find(&text[..]).unwrap()]
            }
            Value::String(text) => choices[choices.iter().position(|choice| choice == text).unwrap()],
            number => choices[number.as_u64().unwrap() as usize],
        };
        json!({ "prompt": row["prompt"], "completion": answer }).to_string() + "\n"
    });
    let plain = evaluate("completions.jsonl", &completions.collect::<String>());
    for figure in ["examples", "tokens", "exact_match"] {
        assert_eq!(result[figure], plain[figure], "{figure}");
    }
    assert!((result["nll"].as_f64().unwrap() - plain["nll"].as_f64().unwrap()).abs() < 1e-6);
    let (asked, completed) =
        (["choices.jsonl", "completions.jsonl"].map(|data| ["--model", model, "--data", data]), "--show-batch");
    let shown = asked.map(|args| place.ok(&[&args[..], &[completed, "--no-shuffle"]].concat()).stdout);
    assert_eq!(shown[0], shown[1]);
    for (row, words) in [
        (json!({ "prompt": "a", "choices": ["b", "c"], "answer": 2 }), "expected a number from 0 to 1"),
        (json!({ "prompt": "a", "choices": ["b", ""], "answer": 0 }), "empty"),
        (json!({ "prompt": "a", "choices": [], "answer": 0 }), "answer"),
        (json!({ "prompt": "a", "choices": "b", "answer": 0 }), "a list of strings"),
    ] {
        place.write("bad.jsonl", row.to_string());
        place.refuses(&["eval", "--model", model, "--data", "bad.jsonl"], &["bad.jsonl:1: ", words]);
    }
}
