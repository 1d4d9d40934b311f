//! Planning: what is said before anything is loaded, and what a budget chooses.

use crate::support::{Place, golden};
use serde_json::Value;

#[test]
fn a_plan_needs_no_gpu_and_no_weights() {
    let place = Place::new();
    let ran = place.ok(&["plan", "--model", "random:llama-3.1-8b", "--seq-len", "2048", "--memory", "16GiB"]);
    for word in ["activations", "4 x 2048", "inputs@host", "Fastest that fits: --activations ", "tok/s: "] {
        assert!(ran.stdout.contains(word), "no {word:?} in\n{}", ran.stdout);
    }
    // By what all layers keep; then shapes.
    let rows = |ran: &str| ran.lines().filter(|line| line.contains("  yes") || line.ends_with("  no")).count();
    assert!(rows(&ran.stdout) >= 13, "{}", ran.stdout);
    let ran = place.ok(&["plan", "--model", "random:llama-3.1-70b", "--seq-len", "2048", "--memory", "16GiB"]);
    assert!(ran.stdout.contains("Nothing fits. What would: a smaller model."), "{}", ran.stdout);
    let ran = place.ok(&["plan", "--model", "random:llama-3.1-8b", "--seq-len", "8192", "--memory", "6GiB"]);
    assert!(ran.stdout.contains("Nothing fits. What would: --activations inputs@host "), "{}", ran.stdout);
    place.ok(&["plan", "--model", golden("model-bnb4").to_str().unwrap(), "--device", "cpu"]);
    place.refuses(&["plan", "--model", "nowhere", "--memory", "8GiB"], &["nowhere"]);
    place.refuses(&["plan", "--model", "random:nothing"], &["no shape is named"]);
}

/// The objects in a list of `plan --json`.
fn list<'a>(plan: &'a Value, key: &str) -> &'a [Value] {
    plan[key].as_array().unwrap_or_else(|| panic!("no {key} in {plan}"))
}

#[test]
fn a_plan_for_programs_is_that_for_people() {
    let place = Place::new();
    let args = "plan --model random:llama-3.1-8b --seq-len 2048 --dropout 0 --rank 64 --memory 8GiB";
    let args: Vec<&str> = args.split(' ').collect();
    let people = place.ok(&args).stdout;
    let ran = place.ok(&[&args[..], &["--json"]].concat());
    let plan: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert!(plan["memory"].as_u64().unwrap() < 8 << 30 && plan["model"]["layers"] == 32, "{plan}");
    // As many rows as lines, each with the line's speed and verdict, in the same order.
    let ends = |line: &&str| line.contains("  yes") || line.contains("  no,") || line.ends_with("  no");
    let lines: Vec<&str> = people.lines().filter(ends).collect();
    let rows = [list(&plan, "choices"), list(&plan, "shapes")].concat();
    assert_eq!(lines.len(), rows.len(), "{people}");
    for (line, row) in lines.iter().zip(&rows) {
        let (speed, fits) = (row["tok_s"].as_f64().unwrap(), row["fits"].as_bool().unwrap());
        let verdict = format!(" {speed:.0}  {}", if fits { "yes" } else { "no" });
        assert!(line.contains(&verdict) && line.contains(row["activations"].as_str().unwrap()), "{line}\n{row}");
        assert_eq!(line.contains("--paged-budget"), row["paged_budget"].is_u64(), "{line}\n{row}");
        let tags = row["peak"].as_object().unwrap();
        let total = tags["total"].as_u64().unwrap();
        assert!(tags.len() == 7 && tags["weights"].as_u64().unwrap() < total, "{row}");
        assert!(!fits || total < plan["memory"].as_u64().unwrap(), "{row}");
    }
    // What is fastest of those that fit is among them. For it pages leave the device, which nobody asked for in the others.
    assert!(list(&plan, "choices").contains(&plan["fastest"]), "{}", plan["fastest"]);
    assert!(plan["fastest"]["paged_budget"].is_u64() && plan["choices"][0]["paged_budget"].is_null(), "{plan}");
    assert!(people.contains(&format!("--activations {}", plan["fastest"]["activations"].as_str().unwrap())));
    assert!(people.contains(plan["rates"].as_str().unwrap()) && plan["remedy"].is_null());
    assert_eq!((&plan["batch_size"], &plan["seq_len"]), (&4.into(), &2048.into()));
}

#[test]
fn what_a_plan_does_not_know_is_null() {
    let place = Place::new();
    let plan = |args: &str| -> Value {
        let args: Vec<&str> = args.split(' ').collect();
        serde_json::from_str(&place.ok(&[&["plan", "--json"], &args[..]].concat()).stdout).unwrap()
    };
    let cpu = plan("--device cpu --model random:tiny");
    assert!(cpu["rates"].is_null() && list(&cpu, "choices").iter().all(|row| row["tok_s"].is_null()), "{cpu}");
    assert_eq!((&cpu["device"], &cpu["present"]), (&"cpu".into(), &true.into()));
    let short = plan("--model random:llama-3.1-8b --seq-len 8192 --memory 6GiB");
    assert!(short["fastest"].is_null(), "{short}");
    assert!(short["remedy"].as_str().unwrap().starts_with("--activations inputs@host "), "{short}");
    assert!(plan("--model random:llama-3.1-70b --seq-len 2048 --memory 16GiB")["remedy"].is_null());
}

#[test]
fn a_budget_chooses_what_is_kept() {
    let place = Place::new();
    let args =
        ["bench-step", "--device", "cpu", "--model", "random:tiny", "--seq-len", "50", "--warm", "1", "--timed", "1"];
    for (budget, kept) in [("auto", "kept: all\n"), ("20MiB", "kept: attention:3,all\n"), ("16MiB", "kept: inputs\n")] {
        let ran = place.ok(&[&args[..], &["--memory-budget", budget]].concat());
        assert!(ran.stdout.contains(kept), "{budget}:\n{}{}", ran.stderr, ran.stdout);
        assert!(ran.stderr.contains("plan     "), "{}", ran.stderr);
    }
    place.refuses(
        &[&args[..], &["--memory-budget", "8MiB"]].concat(),
        &["nothing fits", "--activations inputs --batch-size 1"],
    );
    place.refuses(&[&args[..], &["--memory-budget", "8MiB", "--recompute", "2"]].concat(), &["--recompute"]);
}

#[test]
fn a_run_keeps_what_its_budget_chose() {
    let place = Place::new();
    place.train("kept", &["--device", "cpu"]);
    place.train("planned", &["--device", "cpu", "--memory-budget", "3400KiB"]);
    assert!(place.adapter("kept") == place.adapter("planned"));
    let settings = place.read("planned/settings.toml");
    assert!(settings.contains("activations = \"inputs:2,all\"") && !settings.contains("memory-budget"), "{settings}");
    place.refuses_training(&["--device", "cpu", "--memory-budget", "100KiB"], &["nothing fits"]);
}
