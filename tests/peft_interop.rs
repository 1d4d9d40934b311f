//! Adapters written by peft, read here: `tests/golden/peft_interop` holds them with the logits that peft gave on the model of
//! `tests/golden/gqa_llama3rope`. `scripts/check_peft.py golden` made them, and its `adapter` checks the other direction.

use nibble_models::{
    Llama,
    files::{checkpoint::Checkpoint, peft::read_adapter, safetensors::SafetensorsFile},
    llama::LoadOptions,
};
use nibble_runtime::{DType, Device, Tag};
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new("tests/golden").join(name)
}

/// Largest difference of logits from peft's, and the largest that the adapter makes; checks which layers it sits on.
fn difference(name: &str, layers: usize) -> (f32, f32) {
    let file = SafetensorsFile::open(&golden("peft_interop/golden.safetensors")).unwrap();
    let ids = file.tensor("ids", Tag::Workspace).unwrap();
    let ids: Vec<i32> = ids.as_slice::<i64>().unwrap().iter().map(|&id| id as i32).collect();
    let checkpoint = Checkpoint::open(&golden("gqa_llama3rope/model")).unwrap();
    let options = LoadOptions { quantization: None, dtype: DType::F32, device: Device::Cpu, tables_in_8_bits: false };
    let mut llama = Llama::load(&checkpoint, options, |_, _| {}).unwrap().0;
    let logits = |llama: &Llama| llama.logits(&ids, &[ids.len()]).unwrap().to_f32().unwrap().into_owned();
    let base = logits(&llama);
    let dir = golden("peft_interop").join(name);
    llama.set_adapter(&read_adapter(&dir).unwrap(), &dir).unwrap();
    assert_eq!(llama.parameters().len(), 2 * layers);
    let found = logits(&llama);
    let expected = file.tensor(&format!("logits.{name}"), Tag::Workspace).unwrap();
    let expected = expected.to_f32().unwrap();
    let largest = |other: &[f32]| {
        assert_eq!(other.len(), expected.len());
        other.iter().zip(expected.iter()).map(|(x, e)| (x - e).abs()).fold(0.0, f32::max)
    };
    (largest(&found), largest(&base))
}

/// α/√r with α 9 and r 3, on three of the seven linear layers.
#[test]
fn rank_stabilized_on_a_subset() {
    let (error, effect) = difference("rslora", 9);
    assert!(error < 1e-4, "{error}");
    assert!(effect > 0.1, "the adapter hardly does anything: {effect}");
}

/// Layers chosen by a regular expression, of two ranks and two α.
#[test]
fn patterns_of_rank_and_alpha() {
    let (error, effect) = difference("patterns", 6);
    assert!(error < 1e-4, "{error}");
    assert!(effect > 0.1, "the adapter hardly does anything: {effect}");
}
