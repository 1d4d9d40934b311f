//! What runs leave behind for people, and runs beside each other.

use crate::support::Place;
use serde_json::Value;

#[test]
fn a_run_leaves_a_page_and_events_and_runs_are_compared() {
    let place = Place::new();
    let model = place.model_with_text();
    let rows: String = (0..4).map(|i| format!("{{\"prompt\":\"q{i}<\",\"completion\":\"a{i}\"}}\n")).collect();
    place.write("qa.jsonl", rows);
    let model = model.to_str().unwrap();
    let usual = ["--model", model, "--data", "qa.jsonl", "--eval-data", "qa.jsonl", "--eval-every", "1"];
    place.train("a", &usual);
    place.train("b", &[&usual[..], &["--rank", "2", "--lr", "2e-3"]].concat());
    let page = place.read("a/report.html");
    for part in
        ["<svg", "held out", "learning rate", "gradient norm", "tokens a second", "optimizer", "q0&lt;", "rank = 4"]
    {
        assert!(page.contains(part), "no {part}");
    }
    assert!(place.read("a/loss.svg").contains("</svg>"));
    let samples: Value = serde_json::from_str(&place.read("a/samples.json")).unwrap();
    for when in ["before", "after"] {
        assert_eq!(samples[when].as_array().unwrap().len(), 3, "{samples}");
        assert!(samples[when][0]["prompt"].as_str().unwrap().starts_with('q'), "{samples}");
    }
    // A version and two steps, each a length, two checksums and a message.
    let events = place.bytes("a/tensorboard/events.out.tfevents.0.nibble");
    let (mut rest, mut records) = (&events[..], 0);
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        rest = &rest[8 + 4 + length + 4..];
        records += 1;
    }
    assert_eq!(records, 3);

    let compared = place.ok(&["compare", "a", "b", "--html", "both.html"]).stdout;
    let lines: Vec<Vec<&str>> = compared.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["a", "b"]);
    assert!(lines.contains(&vec!["rank", "4", "2"]) && lines.contains(&vec!["lr", "0.001", "0.002"]), "{compared}");
    assert!(lines.contains(&vec!["steps", "2", "2"]) && !compared.contains("batch-size"), "{compared}");
    assert!(place.read("both.html").matches("<svg").count() == 4);
    let json: Value = serde_json::from_str(&place.ok(&["compare", "a", "b", "--json"]).stdout).unwrap();
    assert_eq!(json[1]["settings"]["rank"], "2");
    assert_eq!(json[0]["figures"]["nll after"], place.metrics("a")[1]["eval_nll"]);
    place.refuses(&["compare", "a", "nowhere"], &["nowhere holds no run"]);
}

#[test]
fn quiet_runs_say_nothing_and_json_is_for_programs() {
    let place = Place::new();
    let ran = place.train("run", &["--quiet", "--json", "--eval-data", "ids.jsonl"]);
    assert_eq!(ran.stderr, "");
    let outcome: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&outcome["run"], &outcome["steps"]), (&"run".into(), &2.into()));
    assert!(outcome["after"]["nll"].as_f64().unwrap() < outcome["before"]["nll"].as_f64().unwrap());
    // Warnings are said all the same.
    place.write("mixed.jsonl", "{\"input_ids\":[5,6,7]}\n5\n");
    let ran = place.train("other", &["--quiet", "--skip-bad-rows", "--data", "mixed.jsonl"]);
    assert!(ran.stderr.starts_with("warning: 1 rows") && ran.stderr.lines().count() == 1, "{}", ran.stderr);
    assert_eq!(ran.stdout, "");
}

#[test]
fn shells_complete_and_help_has_examples() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = place.ok(&["completions", shell]).stdout;
        assert!(
            script.contains("train-llama") && script.contains("export-gguf") && script.contains("show-batch"),
            "{shell}"
        );
    }
    place.refuses(&["completions", "csh"], &["csh", "bash"]);
    let help = place.ok(&["--help"]).stdout;
    let commands = help.split("Commands:\n").nth(1).unwrap().lines().take_while(|line| !line.is_empty());
    let names: Vec<&str> = commands.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.contains(&"compare") && names.contains(&"chat"), "{names:?}");
    for name in names.iter().filter(|name| **name != "help") {
        let help = place.ok(&[name, "--help"]).stdout;
        assert!(help.contains("Example") && help.contains(&format!("train-llama {name}")), "{name}");
        assert!(!help.contains('\x1b'), "{name}");
    }
}
