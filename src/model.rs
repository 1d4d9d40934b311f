//! From a path to a model that is ready to run, with its tokenizer.

use crate::{
    cli::{DTypeChoice, EmbeddingBits, ModelArgs, QuantChoice},
    default_task, hub, report,
};
use anyhow::{Context, Result, ensure};
use nibble_kernels::{
    linear::Weight,
    quantize::{Absmax, QuantType, ScaleRounding},
    table::Table,
};
use nibble_models::{
    Llama, LlamaConfig,
    files::{
        atomic::{read_json_object, read_text},
        checkpoint::{Checkpoint, CheckpointKind, CheckpointTensor},
        peft,
    },
    llama::{Footprint, LoadOptions, Quantization},
    tokenizer::Tokenizer,
};
use nibble_runtime::{DType, Device, DeviceRequest, Tag, Tensor};
use sha2::{Digest, Sha256};
use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// Which model to load, and how.
#[derive(Clone, Debug)]
pub struct ModelSource {
    /// `None` for the embedded model.
    pub path: Option<PathBuf>,
    pub quant: QuantChoice,
    /// Whether the user chose it. A folder that is quantized already is otherwise taken as it is.
    pub quant_chosen: bool,
    pub double_quant: bool,
    pub block_size: usize,
    pub embedding_bits: EmbeddingBits,
    pub dtype: DTypeChoice,
    pub device: DeviceRequest,
}

impl From<&ModelArgs> for ModelSource {
    fn from(args: &ModelArgs) -> Self {
        ModelSource {
            path: args.model.clone(),
            quant: args.quant.unwrap_or(QuantChoice(Some(QuantType::Nf4))),
            quant_chosen: args.quant.is_some(),
            double_quant: !args.no_double_quant,
            block_size: args.block_size,
            embedding_bits: args.embedding_bits,
            dtype: args.dtype,
            device: args.device,
        }
    }
}

/// A model and what comes with it.
pub struct Model {
    pub llama: Llama,
    pub footprint: Footprint,
    /// What the user calls the model.
    pub name: String,
    /// `None` for a random model.
    pub checkpoint: Option<Checkpoint>,
    /// What an adapter adds to the vocabulary.
    own_tokens: Option<OwnTokens>,
    /// The unpacked embedded model, for as long as its files are mapped.
    _unpacked: Option<TempDir>,
}

/// Tokens that come with an adapter.
enum OwnTokens {
    /// To be trained.
    New(Vec<String>),
    /// In the tokenizer beside the adapter.
    Beside(PathBuf),
}

impl Model {
    /// Loads the model, saying on standard error what it is and where it runs.
    pub fn load(source: &ModelSource) -> Result<Model> {
        Self::load_in(source, None)
    }

    /// As [`Model::load`], computing in the type that the checkpoint's weights have (bf16 for a GGUF).
    pub fn load_as_stored(source: &ModelSource) -> Result<Model> {
        Self::load_in(source, Some(|checkpoint| Ok(checkpoint.dtype()?)))
    }

    fn load_in(source: &ModelSource, dtype: Option<fn(&Checkpoint) -> Result<DType>>) -> Result<Model> {
        let (device, why_cpu) = source.device.resolve()?;
        crate::note!("device   {}", report::device(device, why_cpu.as_deref())?);
        let options = |dtype, as_it_is: bool| LoadOptions {
            quantization: source.quant.0.filter(|_| !as_it_is).map(|quant_type| Quantization {
                quant_type,
                block_size: source.block_size,
                double_quant: source.double_quant.then_some(ScaleRounding::default()),
            }),
            dtype,
            device,
            tables_in_8_bits: source.embedding_bits == EmbeddingBits::Bits8,
        };
        if let Some((path, shape)) = source.path.as_ref().and_then(|path| Some((path, random_shape(path)?))) {
            let config = LlamaConfig::shape(shape)?;
            let options = options(source.dtype.resolve(device), false);
            let bar = report::bar("make", config.num_layers);
            let (llama, footprint) =
                Llama::random(config, path, RANDOM_SEED, options, |done, _| bar.set_position(done as u64))?;
            bar.finish_and_clear();
            return Ok(Model::new(llama, footprint, path.display().to_string(), None, None));
        }
        let (checkpoint, unpacked) = open(source)?;
        let as_it_is = checkpoint.kind() == CheckpointKind::Bitsandbytes && !source.quant_chosen;
        let dtype = dtype.map_or_else(|| Ok(source.dtype.resolve(device)), |dtype| dtype(&checkpoint))?;
        let bar = report::bar("load", checkpoint.config().num_layers);
        let (llama, footprint) =
            Llama::load(&checkpoint, options(dtype, as_it_is), |done, _| bar.set_position(done as u64))?;
        bar.finish_and_clear();
        let name = match &source.path {
            None => "the embedded model".to_string(),
            Some(path) => path.display().to_string(),
        };
        Ok(Model::new(llama, footprint, name, Some(checkpoint), unpacked))
    }

    /// Says what the model is.
    fn new(
        llama: Llama,
        footprint: Footprint,
        name: String,
        checkpoint: Option<Checkpoint>,
        unpacked: Option<TempDir>,
    ) -> Model {
        let c = &llama.config;
        crate::note!(
            "model    {name}: Llama, {} layers, hidden {}, {} heads ({} for keys and values), vocabulary {}",
            c.num_layers,
            c.hidden_size,
            c.num_heads,
            c.num_kv_heads,
            c.vocab_size
        );
        let (before, after) = (report::bytes(footprint.bytes_before), report::bytes(footprint.bytes_after));
        let (bits, other) = (footprint.bits_per_weight(), report::bytes(footprint.other_bytes));
        let tables = match llama.embedding.value {
            Table::Dense(_) => "embedding, head and norms",
            Table::Rows8(_) => "embedding, head (both in 8 bits) and norms",
        };
        crate::note!(
            "weights  {:.1}M in linear layers, {}: {before} -> {after}, {bits:.3} bits a weight; {tables} {other}; \
             computing in {}",
            footprint.weights as f64 / 1e6,
            QuantChoice(quant_type(&llama)),
            llama.dtype
        );
        Model { llama, footprint, name, checkpoint, own_tokens: None, _unpacked: unpacked }
    }

    /// The tokenizer that comes with the checkpoint; `None` for a folder without a `tokenizer.json`.
    ///
    /// # Errors
    /// It cannot be read, or has more tokens than the model.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        let Some(checkpoint) = &self.checkpoint else { return Ok(None) };
        match &self.own_tokens {
            // Whether it fits is known where its adapter is in use.
            Some(OwnTokens::Beside(dir)) => Ok(Some(Tokenizer::from_folder(dir)?)),
            Some(OwnTokens::New(tokens)) => {
                let tokenizer = tokenizer_of(checkpoint)?.map(|tokenizer| tokenizer.with_new_tokens(tokens));
                let tokenizer = tokenizer.transpose()?;
                tokenizer.iter().try_for_each(|own| fits(own, self.llama.config.vocab_size, checkpoint.path()))?;
                Ok(tokenizer)
            }
            None => tokenizer_of(checkpoint),
        }
    }

    /// The tokenizer of a model that is not loaded, and the size of its vocabulary.
    ///
    /// # Errors
    /// As [`Model::tokenizer`].
    pub fn tokenizer_without_weights(source: &ModelSource) -> Result<(Option<Tokenizer>, usize)> {
        if let Some(shape) = source.path.as_deref().and_then(random_shape) {
            return Ok((None, LlamaConfig::shape(shape)?.vocab_size));
        }
        let (checkpoint, _unpacked) = open(source)?;
        Ok((tokenizer_of(&checkpoint)?, checkpoint.config().vocab_size))
    }

    /// As [`Model::tokenizer`], for work that cannot do without.
    pub fn needs_tokenizer(&self) -> Result<Tokenizer> {
        let path = &self.name;
        self.tokenizer()?.with_context(|| format!("{path} has no tokenizer.json, which reading and writing text needs"))
    }

    /// The type of the weights in the checkpoint.
    pub fn stored_dtype(&self) -> Result<DType> {
        Ok(self.checkpoint.as_ref().map_or(Ok(DType::BF16), Checkpoint::dtype)?)
    }

    /// A digest of what the model was loaded as: its shape and its first layer, in which another model differs.
    ///
    /// # Errors
    /// The device is lost.
    pub fn digest(&self) -> Result<String> {
        let mut sum = Sha256::new();
        sum.update(format!("{:?}", self.llama.config));
        let mut add = |tensor: &Tensor| -> Result<()> {
            let tensor = tensor.clone().into_device(Device::Cpu, Tag::Workspace)?;
            sum.update(tensor.bytes()?);
            Ok(())
        };
        for layer in self.llama.layers.iter().take(1) {
            add(&layer.input_norm.value)?;
            add(&layer.post_norm.value)?;
            for linear in layer.linears() {
                match &linear.weight {
                    Weight::Dense(tensor) => add(tensor)?,
                    Weight::Quantized(quantized) => add(&quantized.packed)?,
                }
            }
        }
        Ok(format!("{:x}", sum.finalize()))
    }

    /// Adds tokens to the vocabulary, and rows for them to embedding and head.
    ///
    /// # Errors
    /// There is no tokenizer, or it has one of them; embedding and head are held in 8 bits.
    pub fn add_tokens(&mut self, tokens: &[String]) -> Result<()> {
        let vocab = self.needs_tokenizer()?.with_new_tokens(tokens)?.vocab_size();
        self.llama.grow_vocabulary(vocab)?;
        self.own_tokens = Some(OwnTokens::New(tokens.to_vec()));
        Ok(())
    }

    /// Whether an adapter has tokens that the model lacks: it is saved with its tokenizer.
    pub fn has_own_tokens(&self) -> bool {
        self.own_tokens.is_some()
    }

    /// Notes that an adapter has a tokenizer of its own, where it has tokens of its own.
    fn note_tokens(&mut self, adapter: &peft::Adapter, dir: &Path) -> Result<()> {
        let base = self.checkpoint.as_ref().map(|checkpoint| checkpoint.config().vocab_size);
        let own = adapter.embedding.as_ref().is_some_and(|table| Some(table.shape()[0]) != base);
        if own && dir.join("tokenizer.json").is_file() {
            let other = |own: &OwnTokens| matches!(own, OwnTokens::Beside(beside) if beside != dir);
            ensure!(
                !self.own_tokens.as_ref().is_some_and(other),
                "{}: another adapter has tokens of its own already, and one tokenizer is used at a time",
                dir.display()
            );
            self.own_tokens = Some(OwnTokens::Beside(dir.to_path_buf()));
        }
        Ok(())
    }

    /// Puts a PEFT adapter on the model.
    pub fn attach(&mut self, dir: &Path) -> Result<peft::AdapterConfig> {
        let adapter = peft::read_adapter(dir)?;
        self.llama.set_adapter(&adapter, dir)?;
        self.note_tokens(&adapter, dir)?;
        crate::note!("adapter  {}: {}", dir.display(), described(&adapter));
        Ok(adapter.config)
    }

    /// Loads a PEFT adapter under a name; see [`Llama::switch_adapter`].
    pub fn add_adapter(&mut self, name: &str, dir: &Path) -> Result<()> {
        let adapter = peft::read_adapter(dir)?;
        self.llama.add_adapter(name, &adapter, dir)?;
        self.note_tokens(&adapter, dir)?;
        crate::note!("adapter  {name}: {}", described(&adapter));
        Ok(())
    }

    /// Ids that end a text: those of the tokenizer, then those of the model's configuration.
    pub fn stop_ids(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let mut ids = tokenizer.eos_ids().to_vec();
        ids.extend(&self.llama.config.eos_token_ids);
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

/// The checkpoint of a model, and the folder of the embedded one, to be kept as long as its files are mapped.
fn open(source: &ModelSource) -> Result<(Checkpoint, Option<TempDir>)> {
    match &source.path {
        Some(path) => Ok((Checkpoint::open(&hub::model(path)?)?, None)),
        None => {
            let unpacked = default_task::unpack().context("unpacking the embedded model")?;
            Ok((Checkpoint::open(&unpacked.path().join(default_task::MODEL))?, Some(unpacked)))
        }
    }
}

fn tokenizer_of(checkpoint: &Checkpoint) -> Result<Option<Tokenizer>> {
    let path = checkpoint.path();
    let tokenizer = match checkpoint.gguf() {
        Some(gguf) => Tokenizer::from_gguf(gguf)?,
        None if !path.join("tokenizer.json").exists() => return Ok(None),
        None => Tokenizer::from_folder(path)?,
    };
    fits(&tokenizer, checkpoint.config().vocab_size, path)?;
    Ok(Some(tokenizer))
}

/// Refuses a tokenizer that has more tokens than the model.
fn fits(tokenizer: &Tokenizer, vocab: usize, path: &Path) -> Result<()> {
    let (tokens, path) = (tokenizer.vocab_size(), path.display());
    ensure!(
        tokens <= vocab,
        "{path}: the tokenizer has {tokens} tokens and the model {vocab}; they do not belong together"
    );
    Ok(())
}

fn described(adapter: &peft::Adapter) -> String {
    let mut ranks: Vec<usize> = adapter.factors.values().map(|factors| factors.a.shape()[0]).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let ranks: Vec<String> = ranks.iter().map(usize::to_string).collect();
    let kind = if adapter.config.use_dora { "DoRA of rank" } else { "rank" };
    let tables = [("embedding", &adapter.embedding), ("head", &adapter.head)];
    let whole: String =
        tables.iter().filter(|(_, table)| table.is_some()).map(|(name, _)| format!(", {name}")).collect();
    format!("{kind} {} on {} layers{whole}", ranks.join(" and "), adapter.factors.len())
}

/// What can be said of a model before it is loaded.
#[derive(Clone, Debug)]
pub struct Outline {
    pub config: LlamaConfig,
    /// The type in which an f32 computation holds weights that are not quantized.
    pub stored: DType,
    /// Weights that share a scale, and whether scales are quantized too, in a checkpoint that is quantized already.
    pub quantized: Option<(usize, bool)>,
}

impl Outline {
    /// Reads the headers of a checkpoint, and of one that is quantized its first linear; of a model by name its `config.json`
    /// alone, where that says enough.
    ///
    /// # Errors
    /// It is no checkpoint of a Llama; no shape is named so.
    pub fn read(source: &ModelSource) -> Result<Outline> {
        if let Some(shape) = source.path.as_deref().and_then(random_shape) {
            return Ok(Outline { config: LlamaConfig::shape(shape)?, stored: DType::BF16, quantized: None });
        }
        if let Some(path) = source.path.as_deref().map(hub::config).transpose()?.flatten() {
            let text = read_text(&path)?;
            let config = LlamaConfig::from_json(&text, &path)?;
            let json = read_json_object(&path)?;
            if json.get("quantization_config").is_none_or(serde_json::Value::is_null) {
                let dtype = json.get("torch_dtype").or(json.get("dtype")).and_then(serde_json::Value::as_str);
                let stored = match dtype {
                    Some("float32") => DType::F32,
                    Some("float16") => DType::F16,
                    _ => DType::BF16,
                };
                return Ok(Outline { config, stored, quantized: None });
            }
        }
        let (checkpoint, _unpacked) = open(source)?;
        let config = checkpoint.config().clone();
        let [first, ..] = config.linear_shapes();
        let quantized = match checkpoint.kind() {
            CheckpointKind::Bitsandbytes => {
                match checkpoint.weight("model.layers.0.self_attn.q_proj.weight", &first, Tag::Workspace)? {
                    CheckpointTensor::Quantized(weight) => {
                        Some((weight.block_size, matches!(weight.absmax, Absmax::Double { .. })))
                    }
                    CheckpointTensor::Dense(_) => None,
                }
            }
            _ => None,
        };
        let stored = match checkpoint.kind() {
            CheckpointKind::Gguf if source.quant.0.is_none() => DType::F32,
            _ => checkpoint.dtype()?,
        };
        Ok(Outline { config, stored, quantized })
    }
}

/// Seed of the weights of random models.
const RANDOM_SEED: u64 = 0;

/// The shape that a path like `random:tiny` names.
fn random_shape(path: &Path) -> Option<&str> {
    path.to_str()?.strip_prefix("random:")
}

/// The code book of the linear layers; `None` if they are not quantized.
fn quant_type(llama: &Llama) -> Option<QuantType> {
    llama.layers.iter().flat_map(|layer| layer.linears()).find_map(|linear| match &linear.weight {
        Weight::Quantized(weight) => Some(weight.quant_type),
        Weight::Dense(_) => None,
    })
}

/// Whether standard output is a person's terminal.
pub fn on_terminal() -> bool {
    std::io::stdout().is_terminal()
}
