//! Packed training is the same examples trained one by one.

use nibble::{
    data::{Example, Examples, IGNORE},
    deal::Deal,
    eval::packed,
    settings::Settings,
};
use nibble_models::{Llama, LlamaConfig, files::checkpoint::Checkpoint, llama::LoadOptions};
use nibble_optim::Gradients;
use nibble_runtime::{DType, Device, Tag};
use std::path::Path;

fn llama(device: Device) -> Llama {
    let checkpoint = Checkpoint::open(Path::new("tests/golden/gqa_llama3rope/model")).unwrap();
    let options = LoadOptions { quantization: None, dtype: DType::F32, device, tables_in_8_bits: false };
    let (mut llama, _) = Llama::load(&checkpoint, options, |_, _| {}).unwrap();
    llama.train_all().unwrap();
    llama
}

/// 23 examples of 2 to 40 tokens, some of them masked in part.
fn examples(config: &LlamaConfig) -> Examples {
    let example = |i: usize| {
        let tokens = 2 + i * i * 13 % 39;
        let ids: Vec<u32> = (0..tokens).map(|j| ((i * 37 + j * j * 11) % config.vocab_size) as u32).collect();
        let label = |(j, &id): (usize, &u32)| if j < i % 3 { IGNORE } else { i64::from(id) };
        Example { labels: ids.iter().enumerate().map(label).collect(), ids }
    };
    Examples::of(&(0..23).map(example).collect::<Vec<_>>()).unwrap()
}

/// Loss and gradients of an epoch, and how many micro-batches it took.
fn epoch(llama: &Llama, examples: &Examples, settings: &Settings) -> (f64, Gradients, usize) {
    let deal = Deal::new(examples, settings).unwrap();
    let (mut loss, mut grads, mut batches) = (0.0, Gradients::new(), 0);
    for batch in (0..deal.total).flat_map(|step| deal.batches(step).unwrap()) {
        loss += llama.train(packed(&batch), 0.01, None, &mut grads).unwrap().sum().unwrap();
        batches += 1;
    }
    (loss, grads, batches)
}

fn packed_training_is_the_sum_of_the_examples(device: Device) {
    let llama = llama(device);
    let examples = examples(&llama.config);
    let one = Settings { batch_size: 1, grad_accum: 1, ..Settings::default() };
    let pack = Settings { batch_size: 2, grad_accum: 1, seq_len: 48, pack: true, seed: 7, ..Settings::default() };
    let (expected_loss, expected, batches) = epoch(&llama, &examples, &one);
    assert_eq!(batches, 23);
    let (loss, found, batches) = epoch(&llama, &examples, &pack);
    let tokens: usize = examples.known().tokens as usize;
    assert_eq!(batches, tokens.div_ceil(96), "{tokens} tokens");
    assert!((loss / expected_loss - 1.0).abs() < 1e-6, "loss {loss}, one by one {expected_loss}");
    for (id, name, _) in llama.parameters() {
        let values = |grads: &Gradients| {
            let grad = grads.get(id).unwrap().unwrap().into_device(Device::Cpu, Tag::Workspace).unwrap();
            grad.to_f32().unwrap().into_owned()
        };
        let (found, expected) = (values(&found), values(&expected));
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let error = norm(&mut found.iter().zip(&expected).map(|(f, e)| f - e));
        let size = norm(&mut expected.iter().copied());
        assert!(size > 0.0 && error < 1e-5 * size, "{name}: {}", error / size);
    }
}

#[test]
fn on_the_cpu() {
    packed_training_is_the_sum_of_the_examples(Device::Cpu);
}

#[test]
fn on_a_gpu() {
    nibble_runtime::cuda::device_for_tests().into_iter().for_each(packed_training_is_the_sum_of_the_examples);
}
