//! Data as users give it.

use crate::support::Place;
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
