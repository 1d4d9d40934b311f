//! A QLoRA training step on the CPU: forward, loss, backward, clipping, AdamW; in tokens a second.
//!
//! Without more, the embedded model. With `NIBBLE_SMOLLM2` set to SmolLM2-135M-Instruct.Q4_1.gguf also that, batch 4 × 256
//! tokens, rank 16 on all linear layers.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nibble::default_task;
use nibble_kernels::{
    adamw::AdamWConfig,
    quantize::{QuantType, ScaleRounding},
};
use nibble_models::{
    Llama,
    files::checkpoint::Checkpoint,
    files::peft::{ALL_LINEAR, AdapterConfig, TargetModules},
    llama::{Init, LoadOptions, Packed, Quantization},
};
use nibble_optim::{AdamW, Gradients, StateBits, Update};
use nibble_runtime::{
    DType, Device,
    rng::{Philox, Stream},
};
use std::path::Path;

const NF4: Quantization =
    Quantization { quant_type: QuantType::Nf4, block_size: 64, double_quant: Some(ScaleRounding::Stepped) };

fn load(path: &Path) -> Llama {
    let checkpoint = Checkpoint::open(path).expect("a checkpoint");
    let options =
        LoadOptions { quantization: Some(NF4), dtype: DType::F32, device: Device::Cpu, tables_in_8_bits: false };
    let (mut llama, _) = Llama::load(&checkpoint, options, |_, _| {}).expect("a Llama");
    let target_modules = Some(TargetModules::Pattern(ALL_LINEAR.into()));
    let config = AdapterConfig { r: 16, lora_alpha: 16.0, target_modules, ..AdapterConfig::default() };
    llama.add_lora(&config, Init::Lora, None, 0).expect("targets");
    llama
}

fn step(criterion: &mut Criterion, name: &str, mut llama: Llama, lengths: &[usize]) {
    let tokens: usize = lengths.iter().sum();
    let rng = Philox::new(1, Stream { purpose: 99, step: 0, layer: 0 });
    let vocab = llama.config.vocab_size as u32;
    let ids: Vec<i32> = (0..tokens as u64).map(|i| rng.below(i, vocab) as i32).collect();
    let mut optimizer = AdamW::new(AdamWConfig::default(), StateBits::F32).expect("sound settings");
    let mut group = criterion.benchmark_group("step");
    group.sample_size(10).throughput(Throughput::Elements(tokens as u64));
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            let mut grads = Gradients::new();
            let batch = Packed { ids: &ids, labels: &ids, lengths };
            llama.train(batch, 1.0 / tokens as f32, None, &mut grads).expect("a step");
            let mut clip = grads.clip(1.0, 1.0).expect("a norm");
            let parameters = llama.parameters_mut().into_iter();
            let update = |(id, value)| Update { id, value, decay: true, rate: 1.0, previous: None };
            let mut updates: Vec<Update> = parameters.map(update).collect();
            optimizer.step(&mut updates, &grads, 1e-4, &mut clip).expect("an update");
        });
    });
    group.finish();
}

fn steps(criterion: &mut Criterion) {
    let unpacked = default_task::unpack().expect("a temporary folder");
    step(criterion, "embedded model, 16 x 64", load(&unpacked.path().join(default_task::MODEL)), &[64; 16]);
    match std::env::var_os("NIBBLE_SMOLLM2") {
        Some(path) => step(criterion, "SmolLM2-135M, 4 x 256", load(Path::new(&path)), &[256; 4]),
        None => eprintln!("SmolLM2-135M left out: set NIBBLE_SMOLLM2 to SmolLM2-135M-Instruct.Q4_1.gguf"),
    }
}

criterion_group!(benches, steps);
criterion_main!(benches);
