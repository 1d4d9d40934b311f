//! LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

mod config;

pub use config::{AdapterConfig, TargetModules};

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

/// A LoRA adapter.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// Settings.
    pub config: AdapterConfig,
    /// By module, such as `model.layers.0.self_attn.q_proj`: A, f32 `[r, in]`, and B, f32 `[out, r]`.
    pub tensors: BTreeMap<String, (Tensor, Tensor)>,
}

/// What the product of B and A is multiplied by.
pub(crate) fn scale(alpha: f64, rank: usize, rslora: bool) -> f32 {
    let rank = rank as f64;
    (if rslora { alpha / rank.sqrt() } else { alpha / rank }) as f32
}

impl Adapter {
    /// What `B·A` of a module is multiplied by; 0 for one that it does not adapt.
    pub fn scale(&self, module: &str) -> f32 {
        let Some((a, _)) = self.tensors.get(module) else { return 0.0 };
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
    let tensors = read_tensors(&SafetensorsFile::open(&path)?, &config)?;
    Ok(Adapter { config, tensors })
}

fn read_tensors(file: &SafetensorsFile, config: &AdapterConfig) -> Result<BTreeMap<String, (Tensor, Tensor)>> {
    let mut halves: BTreeMap<String, [Option<Tensor>; 2]> = BTreeMap::new();
    for key in file.names() {
        let module = key.strip_prefix(PREFIX).and_then(|rest| {
            let a = rest.strip_suffix(".lora_A.weight").map(|module| (module, 0));
            a.or_else(|| rest.strip_suffix(".lora_B.weight").map(|module| (module, 1)))
        });
        let Some((module, half)) = module else {
            let what =
                format!("tensor \"{key}\" is not part of a plain LoRA ({PREFIX}….lora_A.weight and .lora_B.weight)");
            return Err(Error::unsupported(file.path(), what));
        };
        let tensor = file.tensor(&key, Tag::Adapters)?;
        if !tensor.dtype().is_float() || tensor.shape().len() != 2 {
            let what = format!("tensor \"{key}\" is {} {:?}; expected a float matrix", tensor.dtype(), tensor.shape());
            return Err(Error::mismatch(file.path(), what));
        }
        let tensor = tensor.into_dtype(DType::F32, Tag::Adapters)?;
        if tensor.as_slice::<f32>()?.iter().any(|x| !x.is_finite()) {
            return Err(Error::file(file.path(), format!("tensor \"{key}\" holds NaN or infinity")));
        }
        halves.entry(module.to_string()).or_default()[half] = Some(tensor);
    }
    if halves.is_empty() {
        return Err(Error::file(file.path(), "the adapter holds no tensors"));
    }
    let mut tensors = BTreeMap::new();
    for (module, pair) in halves {
        let [Some(a), Some(b)] = pair else {
            let what = format!("{module} has only one of lora_A and lora_B");
            return Err(Error::mismatch(file.path(), what));
        };
        let (rank, expected) = (a.shape()[0], config.rank_of(&module));
        if rank != b.shape()[1] || rank != expected {
            let (a, b) = (a.shape(), b.shape());
            let what =
                format!("{module}: A is {a:?} and B {b:?}; the settings say rank {expected}, [r, in] and [out, r]");
            return Err(Error::mismatch(file.path(), what));
        }
        tensors.insert(module, (a, b));
    }
    Ok(tensors)
}

/// Writes an adapter folder, which is made if it does not exist; each of the two files is replaced in one step.
///
/// # Errors
/// [`Error::Io`]: the folder cannot be written. [`Error::Invalid`]: the adapter has no tensors, or not f32 ones.
pub fn write_adapter(folder: &Path, adapter: &Adapter) -> Result<()> {
    let mut tensors = Vec::new();
    for (module, (a, b)) in &adapter.tensors {
        for (half, tensor) in [("A", a), ("B", b)] {
            if tensor.dtype() != DType::F32 {
                return Err(Error::Invalid(format!("adapter of {module}: lora_{half} is {}", tensor.dtype())));
            }
            tensors.push((format!("{PREFIX}{module}.lora_{half}.weight"), tensor.clone()));
        }
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
