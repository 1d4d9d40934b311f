//! Kinds of adapters: each learns, and what it is saved as gives, on the base that it names, what the run ended with.

use crate::support::{Place, golden};
use nibble_models::files::{peft::read_adapter, safetensors::SafetensorsFile};

/// The nll that `summary.json` of a run ends with, and that of its adapter on a base.
fn nll(place: &Place, run: &str, base: &[&str]) -> (f64, f64) {
    let summary: serde_json::Value = serde_json::from_str(&place.read(&format!("{run}/summary.json"))).unwrap();
    let adapter = format!("{run}/adapter");
    let eval = [&["eval", "--data", "ids.jsonl", "--json", "--adapter", &adapter][..], base].concat();
    let found: serde_json::Value = serde_json::from_str(&place.ok(&eval).stdout).unwrap();
    (summary["after"]["nll"].as_f64().unwrap(), found["nll"].as_f64().unwrap())
}

#[test]
fn every_variant_learns_and_is_saved_as_what_it_is() {
    let place = Place::new();
    let data = place.ids();
    let model = golden("model");
    let model = model.to_str().unwrap();
    let dense = ["--model", model, "--quant", "none"];
    let four_bits = ["--model", model];
    let runs: [(&str, &[&str], &[&str], f64); 9] = [
        ("dora", &["--method", "lora", "--dora", "--rank", "2"], &dense, 1e-6),
        ("dora4", &["--dora"], &four_bits, 1e-6),
        // The base is bf16, and what is taken out of it is rounded to that: what is given back is not.
        ("pissa", &["--method", "lora", "--init", "pissa", "--rank", "4", "--alpha", "8"], &dense, 2e-2),
        ("olora", &["--method", "lora", "--init", "olora", "--rank", "4", "--rslora"], &dense, 2e-2),
        ("pissa4", &["--init", "pissa"], &["--model", "pissa4/base"], 1e-6),
        ("loftq", &["--init", "loftq:2"], &["--model", "loftq/base"], 1e-6),
        ("plus", &["--lora-plus-ratio", "8"], &four_bits, 1e-6),
        ("whole", &["--method", "lora", "--modules-to-save", "embed_tokens,lm_head"], &dense, 1e-6),
        (
            "pattern",
            &["--target-pattern", r"^(?!.*mlp).*_proj$", "--rank-pattern", r"layers\.1\..*=3"],
            &four_bits,
            1e-6,
        ),
    ];
    let mut after = std::collections::BTreeMap::new();
    for (run, options, base, tolerance) in runs {
        let usual = ["--steps", "6", "--lr", "3e-3", "--eval-data", data.to_str().unwrap(), "--dropout", "0"];
        place.train(run, &[&usual[..], options].concat());
        let losses = place.losses(run);
        assert!(losses[5] < losses[0] - 0.02, "{run}: {losses:?}");
        let (ended, found) = nll(&place, run, base);
        assert!((ended - found).abs() <= tolerance, "{run}: {ended} and {found}");
        after.insert(run, ended);
    }
    assert!(after["plus"] < after["dora4"] - 0.1, "B learns faster: {after:?}");
    let adapter = |run: &str| read_adapter(&place.path(&format!("{run}/adapter"))).unwrap();
    assert!(adapter("dora").config.use_dora && adapter("dora").factors.values().all(|f| f.magnitude.is_some()));
    // What the base gave is given back, by an adapter of twice the rank and the same scale.
    assert_eq!((adapter("pissa").config.r, adapter("pissa").config.lora_alpha), (8, 16.0));
    assert_eq!(
        (adapter("pissa4").config.r, adapter("pissa4").config.base_model_name_or_path),
        (4, Some("pissa4/base".into()))
    );
    assert!(!place.path("pissa/base").exists());
    let whole = adapter("whole");
    assert!(whole.embedding.is_some() && whole.head.is_some());
    let ranks: Vec<usize> = adapter("pattern").factors.values().map(|factors| factors.a.shape()[0]).collect();
    assert_eq!((ranks.len(), ranks.iter().filter(|rank| **rank == 3).count()), (12, 4));
    assert!(place.read("pattern/settings.toml").contains("[rank-pattern]"));
    // A run goes on from each, to the bit.
    for run in ["dora4", "pissa4", "whole", "plus"] {
        let (options, ..) =
            runs.iter().find(|(name, ..)| *name == run).map(|(_, options, base, _)| (options, base)).unwrap();
        let usual = ["--lr", "3e-3", "--dropout", "0", "--steps", "6"];
        let all = [&usual[..], options].concat();
        let twice = format!("{run}-twice");
        place.train(&format!("{run}-once"), &all);
        place.train(&twice, &[&all[..], &["--save-every", "3"]].concat());
        std::fs::remove_dir_all(place.path(&format!("{twice}/checkpoints/step-6"))).unwrap();
        std::fs::remove_file(place.path(&format!("{twice}/summary.json"))).unwrap();
        place.ok(&["--resume", &twice]);
        assert!(place.adapter(&twice) == place.adapter(&format!("{run}-once")), "{run}");
    }
}

/// Tokens that the model never had are learned, written, merged and exported with their tokenizer.
#[test]
fn new_tokens_come_with_their_tokenizer() {
    let place = Place::new();
    place.ok(&["--steps", "2", "--new-tokens", "<tool>,<end>", "--out", "run"]);
    let adapter = read_adapter(&place.path("run/adapter")).unwrap();
    // The embedded model is tied, and stays so.
    assert!(adapter.config.ensure_weight_tying);
    let (embedding, head) = (adapter.embedding.unwrap(), adapter.head.unwrap());
    assert_eq!((embedding.shape()[0], embedding.bytes().unwrap()), (770, head.bytes().unwrap()));
    assert!(place.read("run/adapter/tokenizer.json").contains("<tool>"));
    let text = place.ok(&["generate", "--adapter", "run/adapter", "--prompt", "a<tool>b", "--max-tokens", "3"]).stdout;
    assert!(text.starts_with("a<tool>b"), "{text}");
    // Going on with it keeps them.
    place.ok(&["--steps", "1", "--adapter-init", "run/adapter", "--out", "more"]);
    assert!(place.read("more/adapter/tokenizer.json").contains("<end>"));
    let unpacked = nibble::default_task::unpack().unwrap();
    let model = unpacked.path().join(nibble::default_task::MODEL);
    let model = model.to_str().unwrap();
    place.ok(&["merge", "--model", model, "--adapter", "run/adapter", "--dtype", "f32", "--out", "merged"]);
    assert!(place.read("merged/tokenizer.json").contains("<tool>"));
    let file = SafetensorsFile::open(&place.path("merged/model.safetensors")).unwrap();
    assert_eq!(file.view("model.embed_tokens.weight").unwrap().shape, [770, 192]);
    assert!(!file.has("lm_head.weight"));
    place.ok(&["export-gguf", "--model", model, "--adapter", "run/adapter", "--type", "f32", "--out", "m.gguf"]);
    // After two steps tokens are so close that 16 bits cannot tell them apart.
    let generate = |args: &[&str]| {
        let common = ["generate", "--quant", "none", "--dtype", "f32", "--prompt", "I <tool>", "--max-tokens", "8"];
        place.ok(&[&common[..], args].concat()).stdout
    };
    let expected = generate(&["--model", model, "--adapter", "run/adapter"]);
    assert_eq!(generate(&["--model", "merged"]), expected);
    assert_eq!(generate(&["--model", "m.gguf"]), expected);
    place.refuses(&["--new-tokens", "a,<x>", "--out", "x"], &["\"a\""]);
}

#[test]
fn what_does_not_go_together_is_named() {
    let place = Place::new();
    for (options, words) in [
        (&["--dora", "--init", "pissa"][..], &["--dora", "--init"][..]),
        (&["--method", "lora", "--init", "loftq"], &["loftq", "qlora"]),
        (&["--init", "svd"], &["pissa", "svd"]),
        (&["--init", "loftq:0"], &["loftq:0"]),
        (&["--method", "full", "--dora"], &["--method full"]),
        (&["--modules-to-save", "norm"], &["norm", "embed_tokens"]),
        (&["--modules-to-save", "lm_head", "--embedding-bits", "8"], &["--embedding-bits"]),
        (&["--lora-plus-ratio", "0"], &["--lora-plus-ratio"]),
        (&["--target-pattern", "q_("], &["q_("]),
        (&["--target-pattern", "nothing"], &["q_proj"]),
        (&["--targets", "all-linear,q_proj"], &["all-linear"]),
        (&["--init", "pissa", "--rank", "65"], &["rank 65", "self_attn"]),
    ] {
        place.refuses_training(options, words);
    }
}
