//! Training: what a run leaves behind, and what must not change a bit of it.

use crate::support::{Place, golden};
use nibble_models::files::safetensors::SafetensorsFile;
use nibble_runtime::Tag;
use std::{
    process::Stdio,
    time::{Duration, Instant},
};

#[test]
fn a_run_leaves_what_it_promises() {
    let place = Place::new();
    let ran =
        place.train("run", &["--steps", "3", "--eval-data", "ids.jsonl", "--schedule", "cosine", "--warmup", "1"]);
    assert_eq!(ran.stdout, "");
    for word in ["device   c", "bits a weight", "held-out before", "held-out after", "run", "loss"] {
        assert!(ran.stderr.contains(word), "no {word:?} in\n{}", ran.stderr);
    }
    let metrics = place.metrics("run");
    assert_eq!(metrics.len(), 3);
    for (i, line) in metrics.iter().enumerate() {
        let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["step", "loss", "grad_norm", "lr", "tokens", "tok_s"]);
        assert_eq!(line["step"].as_u64(), Some(i as u64 + 1));
        assert_eq!(line["tokens"].as_u64(), Some((12..20).sum()));
        assert!(line["grad_norm"].as_f64().unwrap() > 0.0 && line["tok_s"].as_f64().unwrap() > 0.0);
    }
    let losses = place.losses("run");
    assert!(losses[2] < losses[0], "{losses:?}");
    let config: serde_json::Value = serde_json::from_slice(&place.bytes("run/adapter/adapter_config.json")).unwrap();
    assert_eq!((config["r"].as_u64(), config["peft_type"].as_str()), (Some(4), Some("LORA")));
    let adapter = SafetensorsFile::open(&place.path("run/adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(adapter.names().len(), 3 * 7 * 2);
    let picture = place.read("run/loss.svg");
    assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>") && picture.contains("<polyline"));
    let summary: serde_json::Value = serde_json::from_slice(&place.bytes("run/summary.json")).unwrap();
    assert!(summary["after"]["nll"].as_f64() < summary["before"]["nll"].as_f64(), "{summary}");
    assert_eq!((summary["steps"].as_u64(), summary["interrupted"].as_bool()), (Some(3), Some(false)));
}

#[test]
fn the_same_settings_give_the_same_bits() {
    let place = Place::new();
    // Dropout and shuffling too.
    let options = ["--batch-size", "3", "--dropout", "0.2", "--seed", "7"];
    place.train("first", &options);
    let adapter = place.adapter("first");
    place.ok(&["train", "--config", "first/settings.toml", "--out", "second"]);
    assert!(place.adapter("second") == adapter, "the settings file does not repeat the run");
    assert_eq!(place.losses("second"), place.losses("first"));
    place.train("recompute", &[&options[..], &["--recompute"]].concat());
    assert!(place.adapter("recompute") == adapter, "recomputing changes the result");
    place.ok(&["train", "--config", "first/settings.toml", "--out", "seed", "--seed", "8"]);
    assert!(place.adapter("seed") != adapter);
    // One thread or two: no sum depends on who computes it.
    let args = place.train_args("single", &options);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    assert!(place.command(&args).env("RAYON_NUM_THREADS", "1").output().unwrap().status.success());
    assert!(place.adapter("single") == adapter, "the number of threads changes the result");
}

/// The loss is the mean over all labelled tokens of a step, however many passes it takes.
#[test]
fn accumulated_batches_are_one_batch() {
    let place = Place::new();
    // A large ε: Adam's steps go by little more than the sign of a gradient otherwise, and rounding can turn that of one
    // that is nearly zero.
    place.train("whole", &["--batch-size", "4", "--no-shuffle", "--eps", "1e-3"]);
    place.train("parts", &["--batch-size", "2", "--grad-accum", "2", "--no-shuffle", "--eps", "1e-3"]);
    for (a, b) in place.losses("whole").iter().zip(place.losses("parts")) {
        assert!((a - b).abs() < 1e-6, "{a} {b}");
    }
    let open =
        |run: &str| SafetensorsFile::open(&place.path(&format!("{run}/adapter/adapter_model.safetensors"))).unwrap();
    let (whole, parts) = (open("whole"), open("parts"));
    for name in whole.names() {
        let read = |file: &SafetensorsFile| file.tensor(&name, Tag::Workspace).unwrap().to_f32().unwrap().into_owned();
        let (whole, parts) = (read(&whole), read(&parts));
        let worst = whole.iter().zip(&parts).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-6, "{name}: {worst}");
    }
}

#[test]
fn unshuffled_steps_follow_the_file() {
    let place = Place::new();
    place.train("run", &["--batch-size", "1", "--steps", "9", "--no-shuffle"]);
    let tokens: Vec<u64> = place.metrics("run").iter().map(|line| line["tokens"].as_u64().unwrap()).collect();
    assert_eq!(tokens, [12, 13, 14, 15, 16, 17, 18, 19, 12]);
    // An epoch in a window of three: the last one is short.
    let args = place.train_args("epoch", &["--batch-size", "1", "--grad-accum", "3", "--no-shuffle", "--epochs", "1"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let steps = args.iter().position(|arg| *arg == "--steps").unwrap();
    place.ok(&[&args[..steps], &args[steps + 2..]].concat());
    let tokens: Vec<u64> = place.metrics("epoch").iter().map(|line| line["tokens"].as_u64().unwrap()).collect();
    assert_eq!(tokens, [12 + 13 + 14, 15 + 16 + 17, 18 + 19]);
}

#[test]
fn every_method_type_and_option_learns() {
    let place = Place::new();
    for (run, options) in [
        ("lora", &["--method", "lora"][..]),
        ("fp4", &["--quant", "fp4", "--no-double-quant", "--block-size", "32"]),
        ("bf16", &["--dtype", "bf16"]),
        ("f16", &["--dtype", "f16"]),
        ("bits8", &["--optimizer-bits", "8"]),
        ("embedding8", &["--embedding-bits", "8"]),
        ("embedding8bf16", &["--method", "lora", "--embedding-bits", "8", "--dtype", "bf16"]),
        ("rslora", &["--rslora", "--targets", "q_proj,down_proj"]),
        ("full", &["--method", "full"]),
        ("full16", &["--method", "full", "--dtype", "bf16"]),
    ] {
        place.train(run, &[&["--steps", "8", "--lr", "3e-3"], options].concat());
        let losses = place.losses(run);
        assert!(losses.len() == 8 && losses[7] < losses[0] - 0.02, "{run}: {losses:?}");
    }
    let config: serde_json::Value = serde_json::from_slice(&place.bytes("rslora/adapter/adapter_config.json")).unwrap();
    assert_eq!(config["use_rslora"].as_bool(), Some(true));
    let adapter = SafetensorsFile::open(&place.path("rslora/adapter/adapter_model.safetensors")).unwrap();
    let names = adapter.names();
    assert_eq!(names.len(), 3 * 2 * 2);
    assert!(names.iter().all(|name| name.contains("q_proj") || name.contains("down_proj")));
    // A trained model is a model: in the type of the one it came from, and better.
    assert!(place.path("full/model/model.safetensors").exists() && !place.path("full/adapter").exists());
    let nll = |model: &str| {
        let eval = place.ok(&["eval", "--model", model, "--quant", "none", "--data", "ids.jsonl", "--json"]).stdout;
        serde_json::from_str::<serde_json::Value>(&eval).unwrap()["nll"].as_f64().unwrap()
    };
    assert!(nll("full/model") < nll(golden("model").to_str().unwrap()));
    assert!(place.ok(&["inspect", "full/model"]).stdout.contains("BF16"));
}

/// Embedding and head in 8 bits take about half, and change the model little; what trains on them runs on them.
#[test]
fn embedding_and_head_fit_in_8_bits() {
    let place = Place::new();
    let (data, model) = (place.ids(), golden("model"));
    let (data, model) = (data.to_str().unwrap(), model.to_str().unwrap());
    let eval = |bits: &str, more: &[&str]| {
        let args = ["eval", "--model", model, "--data", data, "--json", "--embedding-bits", bits];
        let ran = place.ok(&[&args[..], more].concat());
        let nll = serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap()["nll"].as_f64().unwrap();
        (nll, ran.stderr)
    };
    let ((sixteen, _), (eight, stderr)) = (eval("16", &[]), eval("8", &[]));
    assert!(sixteen != eight && (sixteen - eight).abs() < 0.01 * sixteen, "{sixteen} and {eight}");
    assert!(stderr.contains("head (both in 8 bits)"), "{stderr}");

    let ran = place.train("run", &["--embedding-bits", "8", "--steps", "8", "--lr", "3e-3"]);
    assert!(ran.stderr.contains("head (both in 8 bits)"), "{}", ran.stderr);
    assert!(place.read("run/settings.toml").contains("embedding-bits = \"8\""));
    assert!(eval("8", &["--adapter", "run/adapter"]).0 < eight - 0.02);
    let generate = ["logits", "--model", model, "--ids", "3,4,5", "--out", "l.safetensors", "--embedding-bits", "8"];
    place.ok(&generate);
    place.refuses_training(&["--method", "full", "--embedding-bits", "8"], &["--embedding-bits", "--method full"]);
}

/// Budgets and pages change where the optimizer's state is, and no bit of what is trained. The picture is of the last step.
#[test]
fn pages_change_nothing() {
    let place = Place::new();
    let options = ["--rank", "64", "--batch-size", "4", "--grad-accum", "2", "--device", "cpu"];
    place.train("without", &options);
    let small = ["--page-size", "256KiB"];
    for (run, paging) in [
        ("none", &["--paged-budget", "0"][..]),
        ("some", &["--paged-budget", "2MiB", "--trace", "pages.svg"]),
        ("all", &["--paged-budget", "auto", "--trace", "pages.json"]),
    ] {
        let ran = place.train(run, &[&options[..], &small[..], paging].concat());
        assert!(place.adapter(run) == place.adapter("without"), "{run}");
        let said = ran.stderr.lines().find(|line| line.starts_with("pages "));
        assert!(said.is_some_and(|line| line.contains("256.0 KiB in host memory")), "{}", ran.stderr);
        assert!(place.read(&format!("{run}/settings.toml")).contains("paged-budget"));
    }
    let picture = place.read("pages.svg");
    assert!(picture.starts_with("<svg") && picture.contains("streamed in") && picture.contains("2.0 MiB"), "{picture}");
    let trace: serde_json::Value = serde_json::from_str(&place.read("pages.json")).unwrap();
    assert!(trace["traceEvents"].as_array().unwrap().len() > 20);
    // No pages, no picture, and one that cannot be written costs no run.
    let ran = place.train("pageless", &["--trace", "absent.svg"]);
    assert!(ran.stderr.contains("absent.svg") && !place.path("absent.svg").exists(), "{}", ran.stderr);
    let ran = place.train("unwritten", &["--paged-budget", "0", "--trace", "absent/pages.svg"]);
    assert!(ran.stderr.contains("absent/pages.svg") && place.path("unwritten/adapter").exists(), "{}", ran.stderr);
}

/// Said before anything is trained.
#[test]
fn a_profile_wants_a_gpu() {
    let place = Place::new();
    place.refuses_training(&["--device", "cpu", "--profile", "step.json"], &["--profile", "GPU", "CPU"]);
    assert!(!place.path("step.json").exists());
}

#[test]
fn an_adapter_trains_on() {
    let place = Place::new();
    place.train("first", &["--steps", "4"]);
    place.train("second", &["--steps", "4", "--adapter-init", "first/adapter"]);
    let (first, second) = (place.losses("first"), place.losses("second"));
    assert!(second[0] < first[3], "{first:?} then {second:?}");
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_keeps_what_it_has() {
    let place = Place::new();
    let args = place.train_args("run", &["--steps", "1000000"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut child = place.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !std::fs::read_to_string(place.path("run/metrics.jsonl")).is_ok_and(|text| text.lines().count() > 1) {
        assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline, "no step was made");
        std::thread::sleep(Duration::from_millis(20));
    }
    let interrupt = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupt.success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("stopped after") && stderr.contains("results are in run"), "{stderr}");
    let summary: serde_json::Value = serde_json::from_slice(&place.bytes("run/summary.json")).unwrap();
    assert_eq!(summary["interrupted"].as_bool(), Some(true));
    assert_eq!(summary["steps"].as_u64(), Some(place.metrics("run").len() as u64));
    assert!(place.read("run/loss.svg").contains("</svg>"));
    let model = golden("model");
    place.ok(&["eval", "--model", model.to_str().unwrap(), "--adapter", "run/adapter", "--data", "ids.jsonl"]);
    place.refuses_training(&[], &["run", "already holds a run"]);
}
