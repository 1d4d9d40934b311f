//! LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

mod config;
mod patterns;

pub use config::{ALL_LINEAR, AdapterConfig, TargetModules};

use super::{
    atomic::{atomic_write, read_text},
    safetensors::{SafetensorsFile, write_safetensors},
};
use crate::{Error, Result};
use nibble_runtime::{DType, Tag, Tensor};
use std::{collections::BTreeMap, path::Path};

/// File of the settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// File of the tensors.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// What PEFT puts before a module's path.
const PREFIX: &str = "base_model.model.";

/// What adapts one linear layer, in f32.
#[derive(Clone, Debug)]
pub struct Factors {
    /// `[r, in]`.
    pub a: Tensor,
    /// `[out, r]`.
    pub b: Tensor,
    /// Lengths of the adapted weight's rows, `[out]`, in DoRA.
    pub magnitude: Option<Tensor>,
}

/// A LoRA adapter.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// Settings.
    pub config: AdapterConfig,
    /// By module, such as `model.layers.0.self_attn.q_proj`.
    pub factors: BTreeMap<String, Factors>,
    /// Takes the place of the model's embedding, f32 `[V, D]`.
    pub embedding: Option<Tensor>,
    /// Takes the place of the head, f32 `[V, D]`.
    pub head: Option<Tensor>,
}

/// Ends of names of embedding and head that PEFT writes where the vocabulary was resized.
const COPIES: [&str; 2] = [".modules_to_save.weight", ".original_module.weight"];

/// Names of embedding and head in the file, after the prefix.
const TABLES: [&str; 2] = ["model.embed_tokens.weight", "lm_head.weight"];

/// What the product of B and A is multiplied by.
pub(crate) fn scale(alpha: f64, rank: usize, rslora: bool) -> f32 {
    let rank = rank as f64;
    (if rslora { alpha / rank.sqrt() } else { alpha / rank }) as f32
}

impl Adapter {
    /// What `B·A` of a module is multiplied by; 0 for one that it does not adapt.
    pub fn scale(&self, module: &str) -> f32 {
        let Some(Factors { a, .. }) = self.factors.get(module) else { return 0.0 };
        scale(self.config.alpha_of(module), a.shape()[0], self.config.use_rslora)
    }
}

/// Reads an adapter folder. Tensors of 16 bits are widened to f32.
///
/// # Errors
/// [`Error::Io`], [`Error::File`]: a file is missing, truncated or malformed. [`Error::Unsupported`]: an adapter of
/// another kind, or with a feature that nibble does not run. [`Error::Mismatch`]: an A without its B, or ranks that
/// contradict each other or the settings.
pub fn read_adapter(folder: &Path) -> Result<Adapter> {
    let settings = folder.join(CONFIG_FILE);
    if !settings.is_file() {
        return Err(Error::file(folder, format!("the folder has no {CONFIG_FILE}; expected a PEFT adapter")));
    }
    let config = AdapterConfig::from_json(&read_text(&settings)?, &settings)?;
    let path = folder.join(TENSORS_FILE);
    if !path.is_file() {
        let hint = match folder.join("adapter_model.bin").is_file() {
            true => "; it has a PyTorch pickle, which nibble does not read: save it with safe_serialization=True",
            false => "",
        };
        return Err(Error::file(folder, format!("the folder has no {TENSORS_FILE}{hint}")));
    }
    read_tensors(&SafetensorsFile::open(&path)?, config)
}

/// The suffixes of A, B and the magnitude.
const PARTS: [&str; 3] = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"];

/// A tensor of the file with `dims` dimensions, in f32.
fn read_tensor(file: &SafetensorsFile, key: &str, dims: usize) -> Result<Tensor> {
    let tensor = file.tensor(key, Tag::Adapters)?;
    if !tensor.dtype().is_float() || tensor.shape().len() != dims {
        let (dtype, shape, kind) = (tensor.dtype(), tensor.shape(), ["vector", "matrix"][dims - 1]);
        return Err(Error::mismatch(
            file.path(),
            format!("tensor \"{key}\" is {dtype} {shape:?}; expected a float {kind}"),
        ));
    }
    let tensor = tensor.into_dtype(DType::F32, Tag::Adapters)?;
    if tensor.as_slice::<f32>()?.iter().any(|x| !x.is_finite()) {
        return Err(Error::file(file.path(), format!("tensor \"{key}\" holds NaN or infinity")));
    }
    Ok(tensor)
}

fn read_tensors(file: &SafetensorsFile, config: AdapterConfig) -> Result<Adapter> {
    let mut modules: BTreeMap<String, [Option<Tensor>; 3]> = BTreeMap::new();
    let mut tables = [None, None];
    for key in file.names() {
        let rest = key.strip_prefix(PREFIX).unwrap_or_default();
        if let Some(which) = TABLES.iter().position(|name| *name == rest) {
            tables[which] = Some(read_tensor(file, &key, 2)?);
            continue;
        }
        // Beside a table PEFT may save how it holds it in memory: the same once more, and that of the base.
        if TABLES.iter().any(|name| COPIES.iter().any(|copy| rest == name.replace(".weight", copy))) {
            continue;
        }
        let split = |(part, suffix)| rest.strip_suffix(suffix)?.strip_suffix('.').map(|module| (module, part));
        let Some((module, part)) = PARTS.into_iter().enumerate().find_map(split) else {
            let what = format!("tensor \"{key}\" is not part of a LoRA ({PREFIX}….{})", PARTS.join(", …."));
            return Err(Error::unsupported(file.path(), what));
        };
        let tensor = read_tensor(file, &key, if part == 2 { 1 } else { 2 })?;
        modules.entry(module.to_string()).or_default()[part] = Some(tensor);
    }
    let [embedding, head] = tables;
    if modules.is_empty() && embedding.is_none() && head.is_none() {
        return Err(Error::file(file.path(), "the adapter holds no tensors"));
    }
    let mut factors = BTreeMap::new();
    for (module, parts) in modules {
        let [Some(a), Some(b), magnitude] = parts else {
            return Err(Error::mismatch(file.path(), format!("{module} has only one of lora_A and lora_B")));
        };
        let (rank, expected) = (a.shape()[0], config.rank_of(&module));
        if rank != b.shape()[1] || rank != expected {
            let (a, b) = (a.shape(), b.shape());
            let what =
                format!("{module}: A is {a:?} and B {b:?}; the settings say rank {expected}, [r, in] and [out, r]");
            return Err(Error::mismatch(file.path(), what));
        }
        if magnitude.is_some() != config.use_dora || magnitude.as_ref().is_some_and(|m| m.numel() != b.shape()[0]) {
            let found = magnitude.map_or("none".into(), |m| format!("{:?}", m.shape()));
            let what = format!(
                "{module}: the settings say use_dora = {}, and the magnitude vector is {found} beside B {:?}",
                config.use_dora,
                b.shape()
            );
            return Err(Error::mismatch(file.path(), what));
        }
        factors.insert(module, Factors { a, b, magnitude });
    }
    Ok(Adapter { config, factors, embedding, head })
}

/// Writes an adapter folder, which is made if it does not exist; each of the two files is replaced in one step.
///
/// # Errors
/// [`Error::Io`]: the folder cannot be written. [`Error::Invalid`]: the adapter has no tensors, or not f32 ones.
pub fn write_adapter(folder: &Path, adapter: &Adapter) -> Result<()> {
    let mut tensors = Vec::new();
    for (module, Factors { a, b, magnitude }) in &adapter.factors {
        for (part, tensor) in PARTS.into_iter().zip([Some(a), Some(b), magnitude.as_ref()]) {
            tensors.extend(tensor.map(|tensor| (format!("{PREFIX}{module}.{part}"), tensor.clone())));
        }
    }
    for (name, table) in TABLES.into_iter().zip([&adapter.embedding, &adapter.head]) {
        tensors.extend(table.as_ref().map(|table| (format!("{PREFIX}{name}"), table.clone())));
    }
    if let Some((name, tensor)) = tensors.iter().find(|(_, tensor)| tensor.dtype() != DType::F32) {
        return Err(Error::Invalid(format!("{name} of an adapter is {}; expected f32", tensor.dtype())));
    }
    if tensors.is_empty() {
        return Err(Error::Invalid(format!("{}: an adapter without tensors cannot be written", folder.display())));
    }
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    write_safetensors(&folder.join(TENSORS_FILE), &tensors, &[("format", "pt")])?;
    let text = serde_json::to_string_pretty(&adapter.config.to_json())
        .map_err(|e| Error::Invalid(format!("{}: {e}", folder.display())))?;
    // PEFT's files have no newline at their end.
    atomic_write(&folder.join(CONFIG_FILE), |file| file.write_all(text.as_bytes()))
}
