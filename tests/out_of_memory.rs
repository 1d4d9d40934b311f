//! A GPU that runs out of memory, at any allocation of a training run: the run ends with the table of who holds what and
//! what to change, and leaves nothing half-written.

use nibble::{
    paging::{Bytes, PagedBudget},
    settings::Settings,
    train::train,
};
use nibble_runtime::{
    DeviceRequest,
    cuda::{Gpu, device_for_tests},
};
use std::{collections::BTreeSet, fs, path::Path};

const PAGE: usize = 256 << 10;

/// Two steps on random ids with an adapter, from loading to saving.
fn settings(dir: &Path, device: DeviceRequest, paged_budget: PagedBudget) -> Settings {
    let data = dir.join("train.jsonl");
    let rows: String = (0..4).map(|i| format!("{{\"input_ids\": {:?}}}\n", [i + 1, i + 2, i + 3, i + 9])).collect();
    fs::write(&data, rows).unwrap();
    Settings {
        model: Some("tests/golden/gqa_llama3rope/model".into()),
        data: Some(data.into()),
        out: Some(dir.join("run")),
        steps: Some(2),
        batch_size: 2,
        grad_accum: 1,
        activations: "inputs:1,attention@host".parse().unwrap(),
        device,
        paged_budget: Some(paged_budget),
        page_size: Bytes(PAGE),
        ..Settings::default()
    }
}

/// What there is of a run that failed is whole: settings, the answers from before, the steps that were made, in two files, and
/// no adapter yet.
fn assert_whole(run: &Path, what: &str) {
    let names = fs::read_dir(run).into_iter().flatten().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let names: BTreeSet<String> = names.collect();
    // Nothing, what is made before the first step, or what steps add to.
    let made = ["samples.json", "settings.toml", "metrics.jsonl", "tensorboard"];
    assert!(
        [0, 2, 4].iter().any(|&n| names == made[..n].iter().map(|&name| name.into()).collect()),
        "{what}: {names:?}"
    );
    if names.is_empty() {
        return;
    }
    let text = |name: &str| fs::read_to_string(run.join(name)).unwrap();
    let samples: serde_json::Value = serde_json::from_str(&text("samples.json")).unwrap();
    assert!(samples["before"].is_array(), "{what}: {samples}");
    let settings: Settings = toml::from_str(&text("settings.toml")).unwrap();
    assert_eq!(settings.steps, Some(2), "{what}");
    if names.contains("tensorboard") {
        let metrics = text("metrics.jsonl");
        assert!(metrics.is_empty() || metrics.ends_with('\n'), "{what}: {metrics:?}");
        for (line, step) in metrics.lines().zip(1..) {
            assert_eq!(serde_json::from_str::<serde_json::Value>(line).unwrap()["step"], step, "{what}");
        }
        let files: Vec<_> = fs::read_dir(run.join("tensorboard")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{what}: {files:?}");
        // A version, then the steps.
        assert_eq!(records(&fs::read(&files[0]).unwrap()), 1 + metrics.lines().count(), "{what}");
    }
}

/// Records of an event file, which are whole: a length, its checksum, so many bytes and their checksum.
fn records(mut events: &[u8]) -> usize {
    let mut found = 0;
    while !events.is_empty() {
        let length = u64::from_le_bytes(events[..8].try_into().unwrap()) as usize;
        events = &events[8 + 4 + length + 4..];
        found += 1;
    }
    found
}

#[test]
fn gpu_out_of_memory_at_any_allocation_ends_with_the_table() {
    let Some(device) = device_for_tests() else { return };
    let memory = Gpu::of(device).unwrap().memory().unwrap();
    // Without pages; with pages of which some are streamed.
    for budget in [PagedBudget::Off, PagedBudget::Bytes(Bytes(5 * PAGE))] {
        let mut failed = 0;
        // A stride that has no part in the pattern of a layer's allocations.
        for n in (1..).step_by(7) {
            let dir = tempfile::tempdir().unwrap();
            let settings = settings(dir.path(), DeviceRequest::Exactly(device), budget);
            memory.lock().fail_at(Some(n));
            let outcome = train(&settings);
            memory.lock().fail_at(None);
            let run = dir.path().join("run");
            let Err(error) = outcome else {
                assert!(run.join("adapter/adapter_model.safetensors").exists());
                break;
            };
            failed += 1;
            let text = format!("{error:#}");
            assert!(text.contains("out of memory") && text.contains("peak"), "budget {budget}, allocation {n}: {text}");
            assert_whole(&run, &format!("budget {budget}, allocation {n}"));
        }
        assert!(failed > 40, "budget {budget}: only {failed} allocations failed");
    }
}

#[test]
fn scratch() {
    let dir = tempfile::tempdir().unwrap();
    train(&settings(dir.path(), DeviceRequest::Exactly(nibble_runtime::Device::Cpu), PagedBudget::Off)).unwrap();
    let run = dir.path().join("run");
    assert!(std::panic::catch_unwind(|| assert_whole(&run, "finished")).is_err());
    fs::remove_dir_all(run.join("adapter")).unwrap();
    for name in ["report.html", "loss.svg", "summary.json"] {
        fs::remove_file(run.join(name)).unwrap();
    }
    assert_whole(&run, "whole");
    let file = run.join("tensorboard/events.out.tfevents.0.nibble");
    let good = fs::read(&file).unwrap();
    for cut in [1, 5, 17, good.len() / 2] {
        fs::write(&file, &good[..good.len() - cut]).unwrap();
        assert!(std::panic::catch_unwind(|| assert_whole(&run, "cut")).is_err());
    }
    fs::write(&file, &good).unwrap();
    let m = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    fs::write(run.join("metrics.jsonl"), &m[..m.len() - 1]).unwrap();
    assert!(std::panic::catch_unwind(|| assert_whole(&run, "cut")).is_err());
    let first = m.find('\n').unwrap() + 1;
    fs::write(run.join("metrics.jsonl"), &m[..first]).unwrap();
    assert!(std::panic::catch_unwind(|| assert_whole(&run, "step lost")).is_err());
    fs::remove_file(run.join("metrics.jsonl")).unwrap();
    assert!(std::panic::catch_unwind(|| assert_whole(&run, "metrics lost")).is_err());
    fs::remove_dir_all(run.join("tensorboard")).unwrap();
    assert_whole(&run, "before");
    fs::remove_file(run.join("samples.json")).unwrap();
    assert!(std::panic::catch_unwind(|| assert_whole(&run, "samples lost")).is_err());
}
