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
use std::{fs, path::Path};

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
            // What there is of the run is whole: settings, metrics and the answers from before, and no adapter yet.
            let names = fs::read_dir(&run).into_iter().flatten().map(|entry| entry.unwrap().file_name());
            for name in names {
                assert!(
                    ["settings.toml", "metrics.jsonl", "samples.json"].iter().any(|whole| name == *whole),
                    "budget {budget}, allocation {n}: {name:?}"
                );
            }
        }
        assert!(failed > 40, "budget {budget}: only {failed} allocations failed");
    }
}
