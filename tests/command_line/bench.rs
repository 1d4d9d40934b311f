//! Timing steps: what is printed for people and for programs.

use crate::support::{Place, golden};
use serde_json::Value;

/// Three steps of the embedded model on the CPU.
const STEPS: [&str; 11] =
    ["bench-step", "--device", "cpu", "--batch-size", "2", "--seq-len", "24", "--warm", "1", "--timed", "2"];

#[test]
fn figures_for_programs_are_those_for_people() {
    let place = Place::new();
    let options = ["--recompute", "--paged-budget", "0", "--decode", "3", "--rows", "2"];
    let people = place.ok(&[&STEPS[..], &options].concat());
    let ran = place.ok(&[&STEPS[..], &options, &["--json"]].concat());
    // One object and nothing else; what people read is beside it.
    let found: Value = serde_json::from_str(&ran.stdout).unwrap();
    let number = |key: &str| found.pointer(key).and_then(Value::as_f64).unwrap_or_else(|| panic!("{key} in {found}"));
    let last = format!("loss {:.4}  gradient norm {:.4}\n", number("/loss"), number("/grad_norm"));
    for line in [
        &last,
        &format!("median {:.4} s  {:.0} tok/s  ", number("/seconds"), number("/tok_s")),
        &format!("decoding: {:.1} tok/s after a prompt of 128", number("/decoding/tok_s")),
        &format!("2 rows: {:.1} tok/s with one adapter", number("/rows/one_adapter_tok_s")),
        "2 x 24 tokens, kept: inputs\n",
        "pages    ",
    ] {
        assert!(ran.stderr.contains(line), "no {line:?} in\n{}", ran.stderr);
    }
    let steps = |text: &str| text.lines().filter(|line| line.starts_with("step ")).count();
    assert_eq!((steps(&ran.stderr), steps(&people.stdout), steps(&people.stderr)), (3, 3, 0));
    // The same steps: the last one's loss is that of the last line.
    assert!(people.stdout.contains(&last), "{}", people.stdout);

    assert_eq!((&found["batch_size"], &found["seq_len"]), (&2.into(), &24.into()));
    assert_eq!((&found["activations"], &found["feed_forward_rows"]), (&"inputs".into(), &Value::Null));
    assert_eq!((&found["device"], &found["target"], &found["driver"]), (&"cpu".into(), &Value::Null, &Value::Null));
    assert!((number("/tok_s") * number("/seconds") - 48.0).abs() < 1e-6);
    let tags = found["peak"].as_object().unwrap();
    let largest = tags.iter().filter(|(tag, _)| *tag != "total").map(|(_, bytes)| bytes.as_u64().unwrap()).max();
    assert!(tags.len() == 7 && largest < tags["total"].as_u64(), "{tags:?}");
    assert!(number("/host_peak") > number("/peak/total"));
    assert!(number("/pages/bytes") > 0.0 && number("/pages/resident") == 0.0);
}

#[test]
fn what_was_not_asked_for_is_null() {
    let place = Place::new();
    let ran = place.ok(&[&STEPS[..], &["--json", "--quiet", "--feed-forward-rows", "16", "--dropout", "0"]].concat());
    assert_eq!(ran.stderr, "");
    let found: Value = serde_json::from_str(&ran.stdout).unwrap();
    for key in ["pages", "decoding", "rows", "driver"] {
        assert_eq!(found.get(key), Some(&Value::Null), "{key}");
    }
    assert_eq!((&found["activations"], &found["feed_forward_rows"]), (&"all".into(), &16.into()));
    assert_eq!(found["dequantized_layers"], 0);
    let people = place.ok(&STEPS);
    assert!(!people.stdout.contains('{'), "{}", people.stdout);
}

#[test]
fn dequantized_weights_need_kernels_that_take_them() {
    let place = Place::new();
    let dense = ["--dequantized-layers", "1", "--method", "lora"];
    place.refuses(&[&STEPS[..], &dense].concat(), &["--dequantized-layers 1", "no weight is in 4 bits"]);
    place.refuses(
        &[&STEPS[..], &["--dequantized-layers", "1"]].concat(),
        &["--dequantized-layers 1", "Hopper", "give 0"],
    );
}

/// The first step on data is the first step of training on it: the same examples in the same order, of which the same is
/// learned.
#[test]
fn steps_on_data_are_those_of_training() {
    let place = Place::new();
    let (data, model) = (place.ids(), golden("model"));
    let (data, model) = (data.to_str().unwrap(), model.to_str().unwrap());
    let same = ["--model", model, "--data", data, "--batch-size", "2", "--device", "cpu", "--seed", "3"];
    let bench = ["bench-step", "--warm", "0", "--timed", "1", "--json"];
    let found: Value = serde_json::from_str(&place.ok(&[&bench[..], &same].concat()).stdout).unwrap();
    assert_eq!(found["batch_size"], 2);
    place.ok(&[&["train", "--steps", "1", "--grad-accum", "1", "--out", "run"][..], &same].concat());
    let step = &place.metrics("run")[0];
    assert_eq!((&found["loss"], &found["grad_norm"]), (&step["loss"], &step["grad_norm"]), "{found} {step}");
}
