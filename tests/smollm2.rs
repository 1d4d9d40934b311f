//! A real model, SmolLM2-135M-Instruct from a Q4_1 GGUF, against transformers (`tests/golden/smollm2-135m.json`): tokenizer,
//! chat template, logits, loss and greedy text, with the file's weights in f32 and with NF4 made from them.
//!
//! The file is not in the repository: `scripts/get-smollm2.sh` fetches it, `NIBBLE_SMOLLM2` says where it is.

use nibble_kernels::quantize::{QuantType, ScaleRounding};
use nibble_models::{
    Llama,
    chat::Message,
    files::checkpoint::Checkpoint,
    generate::generate,
    llama::{LoadOptions, Packed, Quantization},
    sampling::Sampling,
    tokenizer::Tokenizer,
};
use nibble_runtime::{DType, Device, Tag};
use serde::Deserialize;
use std::path::PathBuf;

#[derive(Deserialize)]
struct Golden {
    fp32_from_gguf: Vec<Case>,
    nf4dq_of_bf16_of_gguf: Vec<Case>,
    chat_template: String,
}

/// What the reference says about a text.
#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    /// The eight most likely next tokens, in order.
    top_ids: Vec<usize>,
    top_logits: Vec<f32>,
    /// Over all tokens but the first.
    mean_nll: f64,
    greedy: Vec<u32>,
    greedy_text: String,
}

fn golden() -> Golden {
    let path = "tests/golden/smollm2-135m.json";
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn checkpoint() -> Option<Checkpoint> {
    let Some(path) = std::env::var_os("NIBBLE_SMOLLM2") else {
        println!("skipped: set NIBBLE_SMOLLM2 to SmolLM2-135M-Instruct.Q4_1.gguf (scripts/get-smollm2.sh fetches it)");
        return None;
    };
    Some(Checkpoint::open(&PathBuf::from(path)).unwrap())
}

fn load(checkpoint: &Checkpoint, quantization: Option<Quantization>, device: Device) -> Llama {
    Llama::load(checkpoint, LoadOptions { quantization, dtype: DType::F32, device, tables_in_8_bits: false }, |_, _| {})
        .unwrap()
        .0
}

/// The CPU, and a GPU where there is one.
fn devices() -> impl Iterator<Item = Device> {
    [Device::Cpu].into_iter().chain(nibble_runtime::cuda::device_for_tests())
}

/// How far logits and mean NLL may be from the reference.
const LOGIT: f32 = 0.001;
const NLL: f64 = 1e-4;

/// Logits after the text and mean NLL of it, each held against the reference.
#[track_caller]
fn assert_case(llama: &Llama, case: &Case) {
    let ids: Vec<i32> = case.ids.iter().map(|&id| id as i32).collect();
    let lengths = [ids.len()];
    let logits = llama.logits(&ids, &lengths).unwrap().into_device(Device::Cpu, Tag::Workspace).unwrap();
    let last = &logits.as_slice::<f32>().unwrap()[(ids.len() - 1) * llama.config.vocab_size..];
    let mut order: Vec<usize> = (0..last.len()).collect();
    order.sort_by(|&a, &b| last[b].total_cmp(&last[a]));
    assert_eq!(order[..8], case.top_ids[..], "{:?}: the most likely tokens", case.text);
    for (&id, expected) in case.top_ids.iter().zip(&case.top_logits) {
        let found = last[id];
        assert!((found - expected).abs() <= LOGIT, "{:?}, token {id}: logit {found}, expected {expected}", case.text);
    }
    let labels: Vec<i32> = ids[1..].iter().copied().chain([-100]).collect();
    let out = llama.evaluate(Packed { ids: &ids, labels: &labels, lengths: &lengths }).unwrap();
    let (nll, expected) = (out.sum().unwrap() / (ids.len() - 1) as f64, case.mean_nll);
    assert!((nll - expected).abs() <= NLL, "{:?}: mean NLL {nll}, expected {expected}", case.text);
}

#[test]
fn token_ids_and_chat_template() {
    let Some(checkpoint) = checkpoint() else { return };
    let tokenizer = Tokenizer::from_gguf(checkpoint.gguf().unwrap()).unwrap();
    let golden = golden();
    for case in golden.fp32_from_gguf.iter().chain(&golden.nf4dq_of_bf16_of_gguf) {
        assert_eq!(tokenizer.encode(&case.text, false).unwrap(), case.ids, "{:?}", case.text);
        assert_eq!(tokenizer.decode(&case.ids, false).unwrap(), case.text);
    }
    let messages = [Message::new("user", "Hi"), Message::new("assistant", "Hello!"), Message::new("user", "Bye")];
    let found = tokenizer.chat().unwrap().unwrap().render(&messages, true).unwrap();
    assert_eq!(found, golden.chat_template);
}

#[test]
fn weights_in_f32() {
    let Some(checkpoint) = checkpoint() else { return };
    let tokenizer = Tokenizer::from_gguf(checkpoint.gguf().unwrap()).unwrap();
    let golden = golden();
    assert_eq!(golden.fp32_from_gguf.len(), 6);
    for device in devices() {
        let llama = load(&checkpoint, None, device);
        for case in &golden.fp32_from_gguf {
            assert_case(&llama, case);
            let found = generate(&llama, &case.ids, case.greedy.len(), &[], Sampling::GREEDY, |_| true).unwrap();
            assert_eq!(tokenizer.decode(&found, false).unwrap(), case.greedy_text);
            assert_eq!(found, case.greedy, "{:?}", case.text);
        }
    }
}

/// The golden's base was quantized on a CPU.
#[test]
fn weights_in_nf4() {
    let Some(checkpoint) = checkpoint() else { return };
    let stepped = Some(ScaleRounding::Stepped);
    let nf4 = Quantization { quant_type: QuantType::Nf4, block_size: 64, double_quant: stepped };
    let golden = golden();
    assert_eq!(golden.nf4dq_of_bf16_of_gguf.len(), 6);
    for device in devices() {
        let llama = load(&checkpoint, Some(nf4), device);
        for case in &golden.nf4dq_of_bf16_of_gguf {
            assert_case(&llama, case);
        }
    }
}
