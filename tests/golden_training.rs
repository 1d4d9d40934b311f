//! The reference stack (transformers, peft, bitsandbytes) in f32 on a small Llama: logits, loss, every gradient, and 30
//! QLoRA training steps. `tests/golden/gqa_llama3rope` holds its outputs.

#[macro_use]
mod devices;

use nibble::{cli::DTypeChoice, settings::Settings, train::train};
use nibble_kernels::quantize::{QuantType, ScaleRounding};
use nibble_models::{
    Llama,
    files::{checkpoint::Checkpoint, peft::read_adapter, safetensors::SafetensorsFile},
    llama::{LoadOptions, Packed, Quantization},
};
use nibble_optim::Gradients;
use nibble_runtime::{DType, Device, DeviceRequest, Tag, Tensor};
use std::{
    io::Write,
    path::{Path, PathBuf},
};

fn golden(name: &str) -> PathBuf {
    Path::new("tests/golden/gqa_llama3rope").join(name)
}

fn tensor(name: &str) -> Tensor {
    SafetensorsFile::open(&golden("golden.safetensors")).unwrap().tensor(name, Tag::Workspace).unwrap()
}

fn integers(name: &str) -> Vec<i32> {
    tensor(name).as_slice::<i64>().unwrap().iter().map(|&x| x as i32).collect()
}

fn doubles(name: &str) -> Vec<f64> {
    let file = SafetensorsFile::open(&golden("golden.safetensors")).unwrap();
    let bytes = file.view(name).unwrap().bytes;
    bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
}

/// As the golden model was quantized: on a CPU.
const NF4: Quantization =
    Quantization { quant_type: QuantType::Nf4, block_size: 64, double_quant: Some(ScaleRounding::Stepped) };

fn load(folder: &str, quantization: Option<Quantization>, device: Device) -> Llama {
    let checkpoint = Checkpoint::open(&golden(folder)).unwrap();
    Llama::load(
        &checkpoint,
        LoadOptions { quantization, dtype: DType::F32, device, tables_in_8_bits: false },
        |_, _| {},
    )
    .unwrap()
    .0
}

on_every_device!(
    logits_loss_and_every_full_gradient,
    nf4_logits_and_every_lora_gradient,
    nf4_logits_of_our_own_quantization,
    thirty_training_steps_on_the_base_of_bitsandbytes,
    thirty_training_steps_on_a_base_quantized_here,
    a_quantized_folder_is_that_of_transformers_and_bitsandbytes_to_the_byte,
);

/// The values of a tensor on any device.
fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_device(Device::Cpu, Tag::Workspace).unwrap().to_f32().unwrap().into_owned()
}

const LENGTHS: [usize; 2] = [48, 48];

/// Labels moved by one: what each position predicts.
fn shifted(labels: &[i32]) -> Vec<i32> {
    labels.chunks(48).flat_map(|row| row[1..].iter().copied().chain([-100])).collect()
}

fn largest_difference(found: &Tensor, expected: &Tensor) -> f32 {
    let (found, expected) = (values(found), values(expected));
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected.iter()).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max)
}

#[track_caller]
fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f32) {
    let worst = largest_difference(found, expected);
    assert!(worst <= tolerance, "differs by {worst}");
}

fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    let (found, expected) = (values(found), values(expected));
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut found.iter().zip(expected.iter()).map(|(&f, &e)| f64::from(f) - f64::from(e)));
    error / norm(&mut expected.iter().map(|&e| f64::from(e)))
}

/// Gradients of the mean loss over the labelled tokens; returns the loss too.
fn gradients(llama: &Llama, ids: &[i32], labels: &[i32]) -> (f64, Gradients) {
    let labels = shifted(labels);
    let count = labels.iter().filter(|&&label| label != -100).count();
    let mut grads = Gradients::new();
    let batch = Packed { ids, labels: &labels, lengths: &LENGTHS };
    let out = llama.train(batch, 1.0 / count as f32, None, &mut grads).unwrap();
    (out.sum().unwrap() / count as f64, grads)
}

fn logits_loss_and_every_full_gradient(device: Device) {
    let mut llama = load("model", None, device);
    assert_close(&llama.logits(&integers("ids"), &LENGTHS).unwrap(), &tensor("logits"), 1e-4);
    llama.train_all().unwrap();
    let (loss, grads) = gradients(&llama, &integers("ids"), &integers("labels"));
    let expected = f64::from(tensor("loss").to_f32().unwrap()[0]);
    assert!((loss - expected).abs() < 1e-5, "loss {loss}, expected {expected}");
    let parameters = llama.parameters();
    assert_eq!(parameters.len(), 3 * 9 + 3);
    for (id, name, _) in parameters {
        let error = relative_error(&grads.get(id).unwrap().unwrap(), &tensor(&format!("grad.{name}")));
        assert!(error < 1e-4, "{name}: {error}");
    }
}

fn nf4_logits_and_every_lora_gradient(device: Device) {
    let mut llama = load("model-bnb4", None, device);
    let ids = integers("ids");
    assert_close(&llama.logits(&ids, &LENGTHS).unwrap(), &tensor("logits_nf4"), 1e-4);
    let dir = golden("adapter-init");
    llama.set_adapter(&read_adapter(&dir).unwrap(), &dir).unwrap();
    let first = &integers("train.ids")[..96];
    let (_, grads) = gradients(&llama, first, first);
    let parameters = llama.parameters();
    assert_eq!(parameters.len(), 3 * 7 * 2);
    for (id, name, _) in parameters {
        let expected = tensor(&format!("lora_grad.base_model.model.{name}"));
        let found = grads.get(id).unwrap().unwrap();
        if expected.to_f32().unwrap().iter().all(|&x| x == 0.0) {
            assert!(values(&found).iter().all(|&x| x == 0.0), "{name} should be zero"); // B = 0
        } else {
            let error = relative_error(&found, &expected);
            assert!(error < 1e-4, "{name}: {error}");
        }
    }
    let dir = golden("adapter-final");
    llama.set_adapter(&read_adapter(&dir).unwrap(), &dir).unwrap();
    assert_close(&llama.logits(&ids, &LENGTHS).unwrap(), &tensor("logits_final"), 1e-4);
}

fn nf4_logits_of_our_own_quantization(device: Device) {
    let llama = load("model", Some(NF4), device);
    assert_close(&llama.logits(&integers("ids"), &LENGTHS).unwrap(), &tensor("logits_nf4"), 1e-4);
}

/// Thirty steps through the whole program, data file in, metrics and adapter out: loss and gradient norm of each step.
fn thirty_training_steps(dir: &Path, folder: &str, device: Device, dtype: DType) -> Vec<(f64, f64)> {
    let data = dir.join("train.jsonl");
    let mut file = std::fs::File::create(&data).unwrap();
    for row in integers("train.ids").chunks(48) {
        writeln!(file, "{{\"input_ids\": {row:?}}}").unwrap();
    }
    drop(file);
    let settings = Settings {
        model: Some(golden(folder)),
        data: Some(data.into()),
        adapter_init: Some(golden("adapter-init")),
        out: Some(dir.join("run")),
        device: DeviceRequest::Exactly(device),
        dtype: DTypeChoice(Some(dtype)),
        steps: Some(30),
        batch_size: 2,
        grad_accum: 1,
        lr: 1e-3,
        weight_decay: 0.01,
        max_grad_norm: 1.0,
        dropout: 0.0,
        no_shuffle: true,
        ..Settings::default()
    };
    train(&settings).unwrap();
    let metrics = std::fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let steps: Vec<_> = lines.map(|l| (l["loss"].as_f64().unwrap(), l["grad_norm"].as_f64().unwrap())).collect();
    assert_eq!(steps.len(), 30);
    steps
}

/// Thirty steps follow the reference's, and so do the logits of the trained model.
fn training_follows_the_reference(folder: &str, quantization: Option<Quantization>, device: Device) {
    let dir = tempfile::tempdir().unwrap();
    let steps = thirty_training_steps(dir.path(), folder, device, DType::F32);
    let (losses, norms) = (doubles("train.losses"), doubles("train.grad_norms"));
    for (step, ((found, found_norm), (loss, norm))) in steps.iter().zip(losses.iter().zip(&norms)).enumerate() {
        assert!((found - loss).abs() < 1e-3, "step {step}: loss {found}, expected {loss}");
        assert!((found_norm / norm - 1.0).abs() < 0.01, "step {step}: norm {found_norm}, expected {norm}");
    }
    let mut llama = load(folder, quantization, device);
    let adapter = dir.path().join("run/adapter");
    llama.set_adapter(&read_adapter(&adapter).unwrap(), &adapter).unwrap();
    assert_close(&llama.logits(&integers("ids"), &LENGTHS).unwrap(), &tensor("logits_final"), 5e-3);
}

fn thirty_training_steps_on_the_base_of_bitsandbytes(device: Device) {
    training_follows_the_reference("model-bnb4", None, device);
}

fn thirty_training_steps_on_a_base_quantized_here(device: Device) {
    training_follows_the_reference("model", Some(NF4), device);
}

/// 16-bit types follow f32: the losses of all thirty steps within 1 %; and two runs give the same bits.
#[test]
fn gpu_training_in_16_bits() {
    let Some(device) = nibble_runtime::cuda::device_for_tests() else { return };
    let run = |dtype| {
        let dir = tempfile::tempdir().unwrap();
        let steps = thirty_training_steps(dir.path(), "model", device, dtype);
        (steps, std::fs::read(dir.path().join("run/adapter/adapter_model.safetensors")).unwrap())
    };
    let (wide, _) = run(DType::F32);
    for dtype in [DType::BF16, DType::F16] {
        let (steps, adapter) = run(dtype);
        for (step, ((found, _), (expected, _))) in steps.iter().zip(&wide).enumerate() {
            assert!((found / expected - 1.0).abs() < 0.01, "{dtype}, step {step}: loss {found}, in f32 {expected}");
        }
        let (again, same) = run(dtype);
        assert!(again == steps && same == adapter, "two runs in {dtype} differ");
    }
}

/// What `quantize` does, in the type that the golden folder was written in.
fn a_quantized_folder_is_that_of_transformers_and_bitsandbytes_to_the_byte(device: Device) {
    let dir = tempfile::tempdir().unwrap();
    load("model", Some(NF4), device).save(dir.path(), DType::F32).unwrap();
    let read = |path: PathBuf| std::fs::read(path).unwrap();
    assert!(read(dir.path().join("model.safetensors")) == read(golden("model-bnb4/model.safetensors")));
}
