//! A real model, SmolLM2-135M-Instruct from a Q4_1 GGUF, against transformers (`tests/golden/smollm2-135m.json`): tokenizer,
//! chat template, logits, loss and greedy text, with the file's weights in f32 and with NF4 made from them.
//!
//! The file is not in the repository: `scripts/get-smollm2.sh` fetches it, `NIBBLE_SMOLLM2` says where it is.

use nibble_kernels::{
    dynamic8,
    linear::Weight,
    quantize::{Absmax, QuantType, SCALE_BLOCK},
};
use nibble_models::{
    Llama,
    chat::Message,
    files::checkpoint::Checkpoint,
    generate::{Sampling, generate},
    llama::{LoadOptions, Packed, Quantization},
    tokenizer::Tokenizer,
};
use nibble_runtime::{DType, Tag, Tensor};
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

fn load(checkpoint: &Checkpoint, quantization: Option<Quantization>) -> Llama {
    Llama::load(checkpoint, LoadOptions { quantization, dtype: DType::F32 }, |_, _| {}).unwrap().0
}

/// How far a model may be from the reference.
#[derive(Clone, Copy)]
struct Tolerance {
    /// Neighbours among the eight may swap if the reference's logits are not further apart.
    swap: f32,
    logit: f32,
    nll: f64,
}

const TOLERANCE: Tolerance = Tolerance { swap: 0.0, logit: 0.001, nll: 1e-4 };

/// Logits after the text and mean NLL of it, each held against the reference.
#[track_caller]
fn assert_case(llama: &Llama, case: &Case, tolerance: Tolerance) {
    let ids: Vec<i32> = case.ids.iter().map(|&id| id as i32).collect();
    let lengths = [ids.len()];
    let logits = llama.logits(&ids, &lengths).unwrap();
    let last = &logits.as_slice::<f32>().unwrap()[(ids.len() - 1) * llama.config.vocab_size..];
    let mut order: Vec<usize> = (0..last.len()).collect();
    order.sort_by(|&a, &b| last[b].total_cmp(&last[a]));
    let expected_at = |id: usize| case.top_ids.iter().position(|&top| top == id).map(|at| case.top_logits[at]);
    for (at, (&found, &expected)) in order.iter().zip(&case.top_ids).enumerate() {
        let apart = expected_at(found).map(|logit| (logit - case.top_logits[at]).abs());
        let fits = found == expected || apart.is_some_and(|apart| apart < tolerance.swap);
        assert!(fits, "{:?}: the most likely tokens are {:?}, expected {:?}", case.text, &order[..8], case.top_ids);
    }
    for (&id, expected) in case.top_ids.iter().zip(&case.top_logits) {
        let found = last[id];
        assert!(
            (found - expected).abs() <= tolerance.logit,
            "{:?}, token {id}: logit {found}, expected {expected}",
            case.text
        );
    }
    let labels: Vec<i32> = ids[1..].iter().copied().chain([-100]).collect();
    let out = llama.evaluate(Packed { ids: &ids, labels: &labels, lengths: &lengths }).unwrap();
    let (nll, expected) = (out.sum() / (ids.len() - 1) as f64, case.mean_nll);
    assert!((nll - expected).abs() <= tolerance.nll, "{:?}: mean NLL {nll}, expected {expected}", case.text);
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
    let llama = load(&checkpoint, None);
    let golden = golden();
    assert_eq!(golden.fp32_from_gguf.len(), 6);
    for case in &golden.fp32_from_gguf {
        assert_case(&llama, case, TOLERANCE);
        let found = generate(&llama, &case.ids, case.greedy.len(), &[], Sampling::GREEDY, |_| true).unwrap();
        assert_eq!(tokenizer.decode(&found, false).unwrap(), case.greedy_text);
        assert_eq!(found, case.greedy, "{:?}", case.text);
    }
}

/// 8-bit codes of centred scales as bitsandbytes makes them on a CPU, where the golden comes from: the scaled value is first
/// rounded to one of 65,536 even steps from -1 to 1, and the code nearest to that is taken. On a GPU bitsandbytes, and
/// everywhere this program, take the code nearest to the value itself; they differ by one code where a value is near the middle
/// between two.
fn scale_codes_of_a_cpu(centred: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let absmax = |block: &[f32]| block.iter().fold(0f32, |max, x| max.max(x.abs()));
    let blocks: Vec<f32> = centred.chunks(SCALE_BLOCK).map(absmax).collect();
    let code = |(i, &x): (usize, &f32)| {
        let scaled = f64::from(x * (1.0 / blocks[i / SCALE_BLOCK]));
        let step = ((scaled + 1.0) * 32767.5).round();
        dynamic8::encode(dynamic8::signed_map(), (step / 32767.5 - 1.0) as f32)
    };
    (centred.iter().enumerate().map(code).collect(), blocks)
}

/// Gives a model whose scales are f32 the double quantization of bitsandbytes on a CPU.
fn quantize_scales_as_a_cpu(llama: &mut Llama) {
    for linear in llama.layers.iter_mut().flat_map(|layer| layer.linears_mut()) {
        let Weight::Quantized(weight) = &mut linear.weight else { panic!("{} is not quantized", linear.name) };
        let scales = weight.scales().unwrap();
        let offset = (scales.iter().map(|&x| f64::from(x)).sum::<f64>() / scales.len() as f64) as f32;
        let (codes, absmax2) = scale_codes_of_a_cpu(&scales.iter().map(|x| x - offset).collect::<Vec<_>>());
        weight.absmax = Absmax::Double {
            codes: Tensor::from_slice(&codes, &[codes.len()], Tag::Weights).unwrap(),
            absmax2: Tensor::from_slice(&absmax2, &[absmax2.len()], Tag::Weights).unwrap(),
            code: Tensor::from_slice(dynamic8::signed_map(), &[256], Tag::Weights).unwrap(),
            offset,
            block_size: SCALE_BLOCK,
        };
    }
}

const NF4: Quantization = Quantization { quant_type: QuantType::Nf4, block_size: 64, double_quant: true };

#[test]
fn weights_in_nf4() {
    let Some(checkpoint) = checkpoint() else { return };
    let mut llama = load(&checkpoint, Some(Quantization { double_quant: false, ..NF4 }));
    quantize_scales_as_a_cpu(&mut llama);
    let golden = golden();
    assert_eq!(golden.nf4dq_of_bf16_of_gguf.len(), 6);
    for case in &golden.nf4dq_of_bf16_of_gguf {
        assert_case(&llama, case, TOLERANCE);
    }
}

/// With the program's own scale codes, which are bitsandbytes' on a GPU: see [`scale_codes_of_a_cpu`] for why they differ from
/// the golden's. That is a little further away, and may swap tokens whose logits are closer than that.
#[test]
fn weights_in_nf4_with_our_own_scales() {
    let Some(checkpoint) = checkpoint() else { return };
    let llama = load(&checkpoint, Some(NF4));
    for case in &golden().nf4dq_of_bf16_of_gguf {
        assert_case(&llama, case, Tolerance { swap: 0.01, logit: 0.03, nll: 4e-3 });
    }
}
