//! Planning: what is said before anything is loaded, and what a budget chooses.

use crate::support::{Place, golden};

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
