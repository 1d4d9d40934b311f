//! A model's weights and configuration, whatever kind of file they are in.

use super::{
    atomic::{read_text, write_json},
    bnb,
    gguf::{self, GgufFile},
    safetensors::write_safetensors,
    shards::Shards,
};
use crate::{Error, LlamaConfig, Result};
use nibble_kernels::quantize::QuantTensor;
use nibble_runtime::{DType, Device, Tag, Tensor};
use serde_json::Value;
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// The kinds of checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointKind {
    /// A folder of config.json and safetensors in floating point.
    HuggingFace,
    /// The same, with linear layers in bitsandbytes' 4 bits.
    Bitsandbytes,
    /// A GGUF file.
    Gguf,
}

impl fmt::Display for CheckpointKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CheckpointKind::HuggingFace => "Hugging Face",
            CheckpointKind::Bitsandbytes => "bitsandbytes 4-bit",
            CheckpointKind::Gguf => "GGUF",
        })
    }
}

/// A weight as a checkpoint holds it.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "one exists at a time, or a few hundred that are written")]
pub enum CheckpointTensor {
    /// Floating point, in the file's type; f32 from a GGUF.
    Dense(Tensor),
    /// 4-bit.
    Quantized(QuantTensor),
}

impl CheckpointTensor {
    /// Shape of the weight: `[N, K]` of a quantized one.
    pub fn shape(&self) -> &[usize] {
        match self {
            CheckpointTensor::Dense(tensor) => tensor.shape(),
            CheckpointTensor::Quantized(tensor) => &tensor.shape,
        }
    }
}

#[derive(Debug)]
enum Source {
    Folder(Shards),
    Gguf(GgufFile),
}

/// An open checkpoint of a Llama. Tensors are named as Hugging Face does.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    kind: CheckpointKind,
    config: LlamaConfig,
    source: Source,
}

impl Checkpoint {
    /// Opens a folder, a safetensors file in such a folder, or a `.gguf` file; reads headers, no tensors.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`]: something is missing, truncated or malformed. [`Error::Unsupported`]: not a Llama,
    /// or quantized in a way that nibble does not read.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
        if metadata.is_dir() {
            return Self::open_folder(path);
        }
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("gguf") => Self::open_gguf(path),
            Some("safetensors") => Self::open_folder(match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            }),
            _ => {
                let what = "expected a folder with config.json and safetensors, or a .gguf file";
                Err(Error::unsupported(path, what))
            }
        }
    }

    fn open_gguf(path: &Path) -> Result<Checkpoint> {
        let file = GgufFile::open(path)?;
        let config = file.llama_config()?;
        Ok(Checkpoint { path: path.to_path_buf(), kind: CheckpointKind::Gguf, config, source: Source::Gguf(file) })
    }

    fn open_folder(path: &Path) -> Result<Checkpoint> {
        let settings = path.join("config.json");
        if !settings.is_file() {
            let what = match path.join("adapter_config.json").is_file() {
                true => {
                    "this is an adapter, not a model: give its base model as --model and this folder as the adapter"
                }
                false => "the folder has no config.json; expected a Hugging Face model folder",
            };
            return Err(Error::file(path, what));
        }
        let text = read_text(&settings)?;
        let config = LlamaConfig::from_json(&text, &settings)?;
        let kind = quantization_kind(&text, &settings)?;
        let source = Source::Folder(Shards::open(path)?);
        Ok(Checkpoint { path: path.to_path_buf(), kind, config, source })
    }

    /// The model's configuration.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The folder, or the GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What kind of checkpoint this is.
    pub fn kind(&self) -> CheckpointKind {
        self.kind
    }

    /// The type of the weights that are not quantized, told by the embedding; bf16 for a GGUF, which was made from it.
    ///
    /// # Errors
    /// [`Error::Mismatch`]: there is no embedding.
    pub fn dtype(&self) -> Result<DType> {
        match &self.source {
            Source::Gguf(_) => Ok(DType::BF16),
            Source::Folder(shards) => {
                let view = shards.view("model.embed_tokens.weight")?;
                let what = || format!("the embedding holds {}; expected F32, F16 or BF16", view.format);
                view.dtype().filter(|dtype| dtype.is_float()).ok_or_else(|| Error::unsupported(&self.path, what()))
            }
        }
    }

    /// The GGUF file, if it is one: for its tokenizer and chat template.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.source {
            Source::Gguf(file) => Some(file),
            Source::Folder(_) => None,
        }
    }

    /// The tensor files, if it is a folder.
    pub fn shards(&self) -> Option<&Shards> {
        match &self.source {
            Source::Gguf(_) => None,
            Source::Folder(shards) => Some(shards),
        }
    }

    /// Names of the weights, sorted; without the parts of quantized ones.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = match &self.source {
            Source::Gguf(file) => file.tensors().filter_map(|(name, _)| gguf::hf_name(name)).collect(),
            Source::Folder(shards) => {
                shards.names().filter(|name| name.ends_with(".weight")).map(str::to_string).collect()
            }
        };
        names.sort();
        names
    }

    /// Whether there is a weight of this name.
    pub fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::Gguf(file) => file.weight_shape(name).is_some(),
            Source::Folder(shards) => shards.has(name),
        }
    }

    /// The weight `name` in host memory; see [`Checkpoint::weight_on`].
    pub fn weight(&self, name: &str, shape: &[usize], tag: Tag) -> Result<CheckpointTensor> {
        self.weight_on(name, shape, Device::Cpu, tag)
    }

    /// The weight `name`, which must have this shape, on `device`; its memory is counted under `tag`.
    ///
    /// # Errors
    /// [`Error::Mismatch`]: missing, or of another shape. [`Error::Unsupported`]: of a type that nibble does not read.
    /// [`Error::File`]: the parts of a quantized weight do not fit together.
    pub fn weight_on(&self, name: &str, shape: &[usize], device: Device, tag: Tag) -> Result<CheckpointTensor> {
        if !self.has(name) {
            let what = format!("the checkpoint has no tensor \"{name}\"; config and file do not belong together");
            return Err(Error::mismatch(&self.path, what));
        }
        match &self.source {
            Source::Gguf(file) => {
                check_shape(file.path(), name, file.weight_shape(name).unwrap_or_default(), shape)?;
                Ok(CheckpointTensor::Dense(file.weight(&self.config, name, tag)?.into_device(device, tag)?))
            }
            Source::Folder(shards) if bnb::quant_type(shards, name).is_some() => {
                let path = shards.file_of(name)?.path();
                let tensor = bnb::read_quantized(shards, name, tag)?.to_device(device, tag)?;
                check_shape(path, name, &tensor.shape, shape)?;
                Ok(CheckpointTensor::Quantized(tensor))
            }
            Source::Folder(shards) => {
                let file = shards.file_of(name)?;
                let view = file.view(name)?;
                if !view.dtype().is_some_and(DType::is_float) {
                    let what = format!("tensor \"{name}\" holds {}; expected F32, F16 or BF16", view.format);
                    return Err(Error::unsupported(file.path(), what));
                }
                check_shape(file.path(), name, view.shape, shape)?;
                Ok(CheckpointTensor::Dense(file.tensor_on(name, device, tag)?))
            }
        }
    }

    /// Gives the pages of the files that were read back to the system, so that they do not count as resident memory.
    pub fn release_pages(&self) {
        match &self.source {
            Source::Gguf(file) => file.release(),
            Source::Folder(shards) => shards.release(),
        }
    }
}

fn check_shape(path: &Path, name: &str, found: &[usize], expected: &[usize]) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::mismatch(path, format!("tensor \"{name}\" has shape {found:?}; the configuration needs {expected:?}")))
}

/// What the `quantization_config` of a `config.json`, already known to be an object, says.
fn quantization_kind(text: &str, path: &Path) -> Result<CheckpointKind> {
    let json: Value = serde_json::from_str(text).map_err(|e| Error::file(path, format!("not valid JSON: {e}")))?;
    let Some(quantization) = json.get("quantization_config").filter(|value| !value.is_null()) else {
        return Ok(CheckpointKind::HuggingFace);
    };
    let method = quantization.get("quant_method").and_then(Value::as_str);
    let four_bit = quantization.get("load_in_4bit").and_then(Value::as_bool).unwrap_or(false);
    match method {
        None | Some("bitsandbytes") if four_bit => Ok(CheckpointKind::Bitsandbytes),
        None | Some("bitsandbytes") => {
            Err(Error::unsupported(path, "quantized by bitsandbytes to 8 bits; nibble reads its 4-bit checkpoints"))
        }
        Some(other) => {
            let what = format!(
                "quantized with \"{other}\"; nibble reads bitsandbytes 4-bit checkpoints, or give the original"
            );
            Err(Error::unsupported(path, what))
        }
    }
}

/// Writes a model folder that transformers loads: `model.safetensors`, then `config.json`, each in one step.
/// `dtype` is what the configuration names as the model's type. The folder is made if it does not exist.
///
/// # Errors
/// [`Error::Io`]: the folder cannot be written. [`Error::Invalid`]: quantized weights of different kinds.
pub fn write_checkpoint(
    folder: &Path,
    config: &LlamaConfig,
    dtype: DType,
    weights: &[(String, CheckpointTensor)],
) -> Result<()> {
    let mut settings = config.to_json(dtype);
    let mut tensors = Vec::new();
    let mut announced = None;
    for (name, weight) in weights {
        match weight {
            CheckpointTensor::Dense(tensor) => tensors.push((name.clone(), tensor.clone())),
            CheckpointTensor::Quantized(tensor) => {
                let announcement = bnb::quantization_config(tensor);
                if announced.get_or_insert_with(|| announcement.clone()) != &announcement {
                    return Err(Error::Invalid(format!("{name} is quantized otherwise than the weights before it")));
                }
                tensors.extend(bnb::quantized_parts(name, tensor)?);
            }
        }
    }
    if let Some(announced) = announced {
        settings["quantization_config"] = announced;
        settings.sort_all_objects();
    }
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    write_safetensors(&folder.join("model.safetensors"), &tensors, &[("format", "pt")])?;
    write_json(&folder.join("config.json"), &settings)
}
