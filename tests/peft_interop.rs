//! Adapters written by peft, read here: `tests/golden/peft_interop` holds them with the logits that peft gave on the model of
//! `tests/golden/gqa_llama3rope`, or on the tiny tied one beside them. `scripts/check_peft.py golden` made them, and its
//! `adapter` and `merged` check the other direction.

#[macro_use]
mod devices;

use nibble_kernels::{
    linear::Weight,
    quantize::{QuantType, dequantize},
};
use nibble_models::{
    Llama,
    batch::{Request, generate_batch},
    files::{
        checkpoint::Checkpoint,
        peft::{Adapter, AdapterConfig, TargetModules, read_adapter, write_adapter},
        safetensors::SafetensorsFile,
    },
    generate::generate,
    llama::{Init, LoadOptions, Packed, Quantization},
    merge::{Combination, Merged, Part},
    sampling::Sampling,
};
use nibble_optim::Gradients;
use nibble_runtime::{DType, Device, Tag};
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new("tests/golden").join(name)
}

fn values(file: &SafetensorsFile, name: &str) -> Vec<f32> {
    file.tensor(name, Tag::Workspace).unwrap().to_f32().unwrap().into_owned()
}

fn ids(file: &SafetensorsFile) -> Vec<i32> {
    file.tensor("ids", Tag::Workspace).unwrap().as_slice::<i64>().unwrap().iter().map(|&id| id as i32).collect()
}

fn load(path: &Path, quantization: Option<Quantization>, device: Device) -> Llama {
    let options = LoadOptions { quantization, dtype: DType::F32, device, tables_in_8_bits: false };
    Llama::load(&Checkpoint::open(path).unwrap(), options, |_, _| {}).unwrap().0
}

fn logits(llama: &Llama, ids: &[i32]) -> Vec<f32> {
    llama
        .logits(ids, &[ids.len()])
        .unwrap()
        .into_device(Device::Cpu, Tag::Workspace)
        .unwrap()
        .to_f32()
        .unwrap()
        .into_owned()
}

#[track_caller]
fn largest(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(x, e)| (x - e).abs()).fold(0.0, f32::max)
}

/// The model with `adapter` merged into it, through a folder.
fn merged(model: &Path, adapter: &Path) -> Llama {
    let checkpoint = Checkpoint::open(model).unwrap();
    let part = Part { path: adapter.to_path_buf(), adapter: read_adapter(adapter).unwrap(), weight: 1.0 };
    let merged = Merged::new(&checkpoint, vec![part], Combination::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let weights: Vec<_> = merged
        .weights()
        .into_iter()
        .map(|(name, shape)| {
            let value = merged.weight(&name, &shape).unwrap().value;
            (name, nibble_models::files::checkpoint::CheckpointTensor::Dense(value))
        })
        .collect();
    nibble_models::files::checkpoint::write_checkpoint(folder.path(), merged.config(), DType::F32, &weights).unwrap();
    load(folder.path(), None, Device::Cpu)
}

/// An adapter read from `dir`, after a way through our writer.
fn rewritten(dir: &Path) -> (tempfile::TempDir, Adapter) {
    let place = tempfile::tempdir().unwrap();
    write_adapter(place.path(), &read_adapter(dir).unwrap()).unwrap();
    let adapter = read_adapter(place.path()).unwrap();
    (place, adapter)
}

on_every_device!(
    rank_stabilized_on_a_subset,
    patterns_of_rank_and_alpha,
    dora_with_patterns,
    tables_of_a_tied_model_are_untied_where_one_is_saved,
    a_tied_table_with_new_tokens_stays_tied,
    gradients_are_those_of_the_cpu,
    a_mixed_batch_writes_what_each_row_writes_alone,
);

/// Logits with the adapter on the layers, switched on by name, and merged, against peft's.
fn agrees(folder: &str, model: &str, name: &str, parameters: usize, device: Device) {
    let file = SafetensorsFile::open(&golden(folder).join("golden.safetensors")).unwrap();
    let (model, dir, ids) = (golden(model), golden(folder).join(name), ids(&file));
    let (expected, mut llama) = (values(&file, &format!("logits.{name}")), load(&model, None, device));
    let adapter = rewritten(&dir).1;
    let ids: Vec<i32> = match name {
        "tokens" => ids.into_iter().map(|id| if id == 39 { 42 } else { id }).collect(),
        _ => ids,
    };
    let base = load(&model, None, device);
    llama.add_adapter("x", &adapter, &dir).unwrap();
    llama.switch_adapter(Some("x")).unwrap();
    assert_eq!(llama.parameters().len(), parameters);
    let error = largest(&logits(&llama, &ids), &expected);
    assert!(error < 1e-4, "{error}");
    llama.switch_adapter(None).unwrap();
    if name != "tokens" {
        let before = logits(&base, &ids);
        assert!(largest(&before, &expected) > 0.1, "the adapter hardly does anything");
        assert_eq!(logits(&llama, &ids), before);
    }
    let mut llama = load(&model, None, device);
    llama.set_adapter(&adapter, &dir).unwrap();
    let again = llama.adapter(adapter.config.clone()).unwrap();
    assert_eq!(
        (again.factors.len(), again.embedding.is_some(), again.head.is_some()),
        (adapter.factors.len(), adapter.embedding.is_some(), adapter.head.is_some())
    );
    let error = largest(&logits(&merged(&model, &dir), &ids), &expected);
    assert!(error < 1e-4, "merged: {error}");
}

const MODEL: &str = "gqa_llama3rope/model";
const TIED: &str = "peft_interop/tied";
const TIED_MODEL: &str = "peft_interop/tied/model";

/// α/√r with α 9 and r 3, on three of the seven linear layers.
fn rank_stabilized_on_a_subset(device: Device) {
    agrees("peft_interop", MODEL, "rslora", 18, device);
}

/// Layers chosen by a regular expression, of two ranks and two α.
fn patterns_of_rank_and_alpha(device: Device) {
    agrees("peft_interop", MODEL, "patterns", 12, device);
}

/// A, B and a magnitude on the four attention layers of two layers and on one more, by a pattern that looks ahead.
fn dora_with_patterns(device: Device) {
    agrees("peft_interop", MODEL, "dora", 27, device);
}

/// An embedding of its own: the head stays what it was. A head of its own. Both.
fn tables_of_a_tied_model_are_untied_where_one_is_saved(device: Device) {
    agrees(TIED, TIED_MODEL, "embedding", 3, device);
    agrees(TIED, TIED_MODEL, "head", 3, device);
    agrees(TIED, TIED_MODEL, "both", 4, device);
}

/// One table for both, with three more tokens.
fn a_tied_table_with_new_tokens_stays_tied(device: Device) {
    agrees(TIED, TIED_MODEL, "tokens", 3, device);
}

/// Of every parameter: A, B and magnitudes of the golden DoRA, and of a tied embedding that trains.
fn gradients_are_those_of_the_cpu(device: Device) {
    let gradients = |model: &str, adapter: &str, device: Device| {
        let mut llama = load(&golden(model), None, device);
        let dir = golden(adapter);
        llama.set_adapter(&read_adapter(&dir).unwrap(), &dir).unwrap();
        let (ids, labels): ([i32; 6], [i32; 6]) = ([1, 17, 39, 5, 8, 8], [17, 39, 5, -100, 8, 2]);
        let mut grads = Gradients::new();
        let batch = Packed { ids: &ids, labels: &labels, lengths: &[4, 2] };
        llama.train(batch, 1.0, None, &mut grads).unwrap();
        let names: Vec<String> = llama.parameters().into_iter().map(|(_, name, _)| name).collect();
        let host = |id| grads.get(id).unwrap().unwrap().into_device(Device::Cpu, Tag::Workspace).unwrap();
        let all: Vec<Vec<f32>> = grads.ids().into_iter().map(|id| host(id).to_f32().unwrap().into_owned()).collect();
        assert_eq!(names.len(), all.len());
        (names, all)
    };
    for (model, adapter) in [(MODEL, "peft_interop/dora"), (TIED_MODEL, "peft_interop/tied/tokens")] {
        let (names, expected) = gradients(model, adapter, Device::Cpu);
        let (_, found) = gradients(model, adapter, device);
        for ((name, found), expected) in names.iter().zip(&found).zip(&expected) {
            let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
            let error = norm(&mut found.iter().zip(expected).map(|(x, e)| x - e));
            let own = norm(&mut expected.iter().copied());
            assert!(own > 0.0 && error <= 1e-4 * own, "{name}: {error} of {own}");
        }
    }
}

/// The golden adapters and none, in one batch.
fn a_mixed_batch_writes_what_each_row_writes_alone(device: Device) {
    let mut llama = load(&golden(MODEL), Some(NF4), device);
    for name in ["dora", "rslora", "patterns"] {
        let dir = golden("peft_interop").join(name);
        llama.add_adapter(name, &read_adapter(&dir).unwrap(), &dir).unwrap();
    }
    let request = |prompt: &[u32], adapter: Option<&str>| Request {
        prompt: prompt.to_vec(),
        adapter: adapter.map(str::to_string),
    };
    let requests = [
        request(&[1, 17, 300], Some("rslora")),
        request(&[5, 42, 42, 7, 211, 99], Some("dora")),
        request(&[1, 17, 300], None),
        request(&[1], Some("patterns")),
        request(&[9, 9], Some("dora")),
    ];
    let mut alone = Vec::new();
    for Request { prompt, adapter } in &requests {
        llama.switch_adapter(adapter.as_deref()).unwrap();
        alone.push(generate(&llama, prompt, 12, &[], Sampling::GREEDY, |_| true).unwrap());
    }
    let found = generate_batch(&llama, &requests, 12, &[], Sampling::GREEDY, |_, _| true).unwrap();
    assert_eq!(found, alone);
    assert!(alone[0] != alone[2]);
}

/// New adapters of an initialisation, on the layers of the golden file.
fn start(init: Init, alpha: f64, quantization: Option<Quantization>) -> (Llama, AdapterConfig) {
    let mut llama = load(&golden(TIED_MODEL), quantization, Device::Cpu);
    let targets = ["v_proj", "down_proj"].map(String::from).to_vec();
    let config = AdapterConfig {
        r: 3,
        lora_alpha: alpha,
        target_modules: Some(TargetModules::Names(targets)),
        ..AdapterConfig::default()
    };
    let checkpoint = Checkpoint::open(&golden(TIED_MODEL)).unwrap();
    llama.add_lora(&config, init, Some(&checkpoint), 1).unwrap();
    (llama, config)
}

/// `B·A` row by row: singular vectors have no sign of their own.
fn product(a: &[f32], b: &[f32]) -> Vec<f32> {
    let k = a.len() / 3;
    b.chunks(3).flat_map(|b| (0..k).map(move |j| (0..3).map(|i| b[i] * a[i * k + j]).sum())).collect()
}

const NF4: Quantization = Quantization { quant_type: QuantType::Nf4, block_size: 64, double_quant: None };

#[test]
fn initialisations_are_those_of_peft() {
    let file = SafetensorsFile::open(&golden(TIED).join("golden.safetensors")).unwrap();
    let inits = [
        ("pissa", Init::Pissa, 6.0, None),
        ("olora", Init::Olora, 6.0, None),
        ("loftq", Init::Loftq { iterations: 2 }, 3.0, Some(NF4)),
    ];
    for (name, init, alpha, quantization) in inits {
        let (llama, _) = start(init, alpha, quantization);
        for linear in llama.layers[0].linears() {
            let Some(lora) = &linear.lora else { continue };
            let expected = ["lora_A", "lora_B"].map(|part| values(&file, &format!("{name}.{}.{part}", linear.name)));
            let found = [&lora.a, &lora.b].map(|param| param.value.to_f32().unwrap().into_owned());
            let error = largest(&product(&found[0], &found[1]), &product(&expected[0], &expected[1]));
            assert!(error < 2e-6, "{name} {}: {error}", linear.name);
            if init == Init::Olora {
                assert!(largest(&found[0], &expected[0]).max(largest(&found[1], &expected[1])) < 2e-6);
            }
        }
    }
}

/// What the adapter takes the base gives: the model is the same, and so is what the saved adapter makes of the base as it
/// was, before and after training.
#[test]
fn taken_parts_are_given_back() {
    let (base, ids) = (load(&golden(TIED_MODEL), None, Device::Cpu), [1, 17, 39, 5]);
    let before = logits(&base, &ids);
    for init in [Init::Pissa, Init::Olora] {
        let (mut llama, config) = start(init, 6.0, None);
        assert!(largest(&logits(&llama, &ids), &before) < 2e-5);
        for trained in [false, true] {
            if trained {
                for (_, value) in llama.parameters_mut() {
                    value.as_mut_slice::<f32>().unwrap().iter_mut().for_each(|x| *x += 0.1);
                }
                assert!(largest(&logits(&llama, &ids), &before) > 0.1);
            }
            let adapter = llama.adapter(config.clone()).unwrap();
            assert_eq!((adapter.config.r, adapter.config.lora_alpha), (6, 12.0));
            let mut other = load(&golden(TIED_MODEL), None, Device::Cpu);
            other.set_adapter(&adapter, Path::new("x")).unwrap();
            assert!(largest(&logits(&other, &ids), &logits(&llama, &ids)) < 2e-5, "{init}, trained: {trained}");
        }
    }
}

/// LoftQ is nearer to the weights than their quantization alone, and PiSSA's quantized rest is too.
#[test]
fn quantized_starts_are_nearer_to_the_weights() {
    let error = |llama: &Llama| -> f64 {
        let exact = load(&golden(TIED_MODEL), None, Device::Cpu);
        let mut sum = 0.0;
        for (linear, exact) in llama.layers[0].linears().into_iter().zip(exact.layers[0].linears()) {
            if !["v_proj", "down_proj"].iter().any(|name| linear.name.ends_with(name)) {
                continue;
            }
            let (Weight::Quantized(weight), Weight::Dense(exact)) = (&linear.weight, &exact.weight) else { panic!() };
            let mut sums = dequantize(weight, Tag::Workspace).unwrap();
            if let Some(lora) = &linear.lora {
                let a = Weight::Dense(lora.a.value.clone());
                nibble_kernels::linear::input_grad_add(&lora.b.value, &a, lora.scale, &mut sums).unwrap();
            }
            let pairs = sums.as_slice::<f32>().unwrap().iter().zip(exact.as_slice::<f32>().unwrap());
            sum += pairs.map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>();
        }
        sum.sqrt()
    };
    let plain = error(&load(&golden(TIED_MODEL), Some(NF4), Device::Cpu));
    for init in [Init::Pissa, Init::Loftq { iterations: 1 }, Init::Loftq { iterations: 5 }] {
        let found = error(&start(init, 6.0, Some(NF4)).0);
        assert!(found < 0.9 * plain, "{init}: {found} {plain}");
    }
    let (llama, config) = start(Init::Pissa, 6.0, Some(NF4));
    assert_eq!(llama.adapter(config).unwrap().config.r, 3, "a quantized base keeps what it gave");
}
