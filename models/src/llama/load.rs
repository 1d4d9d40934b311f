//! From a checkpoint to a model: tensor by tensor, quantized as they stream by.

use super::{Activations, Adapters, Angles, Layer, Linear, Llama, Param, random};
use crate::{
    Error, LlamaConfig, Result,
    files::checkpoint::{Checkpoint, CheckpointKind, CheckpointTensor},
};
use nibble_kernels::{
    cast::into_dtype,
    linear::Weight,
    quantize::{QuantType, ScaleRounding, quantize},
    table::{Rows8, Table},
};
use nibble_runtime::{DType, Device, Stash, Tag, Tensor};
use std::{
    panic::resume_unwind,
    path::Path,
    thread::{self, Scope},
};

/// How to quantize the linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// Code book.
    pub quant_type: QuantType,
    /// Elements that share a scale.
    pub block_size: usize,
    /// By which rule the scales are quantized too; `None` leaves them in f32.
    pub double_quant: Option<ScaleRounding>,
}

/// How to load a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// `None` leaves the weights as the checkpoint has them.
    pub quantization: Option<Quantization>,
    /// Type of activations, and of weights that are not quantized where it is a 16-bit type.
    pub dtype: DType,
    /// Where the model lives.
    pub device: Device,
    /// Whether to hold embedding and head in 8 bits.
    pub tables_in_8_bits: bool,
}

/// What the linear layers take, before and after quantization.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Weights in linear layers.
    pub weights: usize,
    /// Their bytes as 16-bit (or, in an f32 checkpoint, 32-bit) numbers.
    pub bytes_before: usize,
    /// Their bytes as held.
    pub bytes_after: usize,
    /// Bytes of embedding, head and norms.
    pub other_bytes: usize,
}

impl Footprint {
    /// Bits a weight takes in the linear layers, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.bytes_after as f64 / self.weights.max(1) as f64
    }
}

/// Where the tensors come from.
enum Source<'a> {
    Checkpoint(&'a Checkpoint),
    /// Random numbers.
    Random {
        seed: u64,
        /// Tensors made so far: each has its own stream.
        made: u32,
    },
}

struct Loader<'a> {
    source: Source<'a>,
    config: LlamaConfig,
    /// What the user calls the model, for messages.
    path: &'a Path,
    options: LoadOptions,
    footprint: Footprint,
    /// Linears loaded so far.
    index: u32,
}

impl<'a> Loader<'a> {
    /// The next tensor, on the device.
    fn weight(&mut self, name: &str, shape: &[usize]) -> Result<CheckpointTensor> {
        match &mut self.source {
            Source::Checkpoint(checkpoint) => checkpoint.weight_on(name, shape, self.options.device, Tag::Weights),
            Source::Random { seed, made } => {
                *made += 1;
                let (dtype, device) = (self.options.dtype, self.options.device);
                let dtype = if dtype == DType::F32 { DType::BF16 } else { dtype };
                Ok(CheckpointTensor::Dense(random::weight(shape, dtype, device, *seed, *made)?))
            }
        }
    }

    /// What was read is held in its final form now; the file's pages would only count as resident memory. To give a
    /// gigabyte back takes some 60 ms, in which the next tensors are read.
    fn release<'s>(&self, scope: &'s Scope<'s, '_>)
    where
        'a: 's,
    {
        if let Source::Checkpoint(checkpoint) = self.source {
            scope.spawn(|| checkpoint.release_pages());
        }
    }

    /// The next tensor, which is none of a linear layer.
    fn dense(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match self.weight(name, shape)? {
            CheckpointTensor::Dense(tensor) => Ok(tensor),
            CheckpointTensor::Quantized(_) => {
                let what = format!("{name} is quantized; nibble expects embedding, head and norms in 16 or 32 bits");
                Err(Error::unsupported(self.path, what))
            }
        }
    }

    /// A norm.
    fn param(&mut self, name: &str, shape: &[usize]) -> Result<Param> {
        let tensor = self.dense(name, shape)?;
        let value = self.stored(tensor)?;
        self.footprint.other_bytes += value.size_bytes();
        Ok(Param { name: name.to_string(), id: None, value })
    }

    /// Embedding or head.
    fn table(&mut self, name: &str) -> Result<Param<Table>> {
        let tensor = self.dense(name, &[self.config.vocab_size, self.config.hidden_size])?;
        let value = match self.options.tables_in_8_bits {
            true => Table::Rows8(Rows8::quantize(&tensor, Tag::Weights)?),
            false => Table::Dense(self.stored(tensor)?),
        };
        self.footprint.other_bytes += value.size_bytes();
        Ok(Param { name: name.to_string(), id: None, value })
    }

    /// In the type that the model holds it in: a 16-bit computation holds 16-bit weights, and a GGUF that is about to be
    /// quantized counts as the bf16 checkpoint that it was made from.
    fn stored(&self, tensor: Tensor) -> Result<Tensor> {
        let gguf = matches!(self.source, Source::Checkpoint(checkpoint) if checkpoint.kind() == CheckpointKind::Gguf);
        let from_gguf = gguf && self.options.quantization.is_some();
        let dtype = match self.options.dtype {
            DType::F32 if from_gguf => DType::BF16,
            DType::F32 => tensor.dtype(),
            half => half,
        };
        Ok(into_dtype(tensor, dtype, Tag::Weights)?)
    }

    fn linear(&mut self, layer: usize, module: &str, shape: [usize; 2]) -> Result<Linear> {
        let name = format!("model.layers.{layer}.{module}");
        let weights = shape[0] * shape[1];
        let wanted = self.options.quantization;
        let weight = match (self.weight(&format!("{name}.weight"), &shape)?, wanted) {
            (CheckpointTensor::Dense(tensor), Some(q)) => {
                let tensor = self.stored(tensor)?;
                self.footprint.bytes_before += tensor.size_bytes();
                let dtype = self.options.dtype;
                Weight::Quantized(quantize(&tensor, q.quant_type, q.block_size, q.double_quant, dtype, Tag::Weights)?)
            }
            (CheckpointTensor::Dense(tensor), None) => {
                let tensor = self.stored(tensor)?;
                self.footprint.bytes_before += tensor.size_bytes();
                Weight::Dense(tensor)
            }
            (CheckpointTensor::Quantized(quantized), wanted) => {
                if let Some(q) = wanted.filter(|q| q.quant_type != quantized.quant_type) {
                    let what = format!(
                        "{name} is already quantized to {}; run with --quant {} or --quant none, not {}",
                        quantized.quant_type, quantized.quant_type, q.quant_type
                    );
                    return Err(Error::mismatch(self.path, what));
                }
                self.footprint.bytes_before += 2 * weights;
                Weight::Quantized(quantized)
            }
        };
        self.footprint.weights += weights;
        self.footprint.bytes_after += weight.size_bytes();
        self.index += 1;
        Ok(Linear { name, index: self.index - 1, weight, id: None, lora: None })
    }

    fn layer(&mut self, i: usize) -> Result<Layer> {
        let c = self.config.clone();
        let d = c.hidden_size;
        let [q, k, v, o, gate, up, down] = c.linear_shapes();
        Ok(Layer {
            input_norm: self.param(&format!("model.layers.{i}.input_layernorm.weight"), &[d])?,
            q: self.linear(i, "self_attn.q_proj", q)?,
            k: self.linear(i, "self_attn.k_proj", k)?,
            v: self.linear(i, "self_attn.v_proj", v)?,
            o: self.linear(i, "self_attn.o_proj", o)?,
            post_norm: self.param(&format!("model.layers.{i}.post_attention_layernorm.weight"), &[d])?,
            gate: self.linear(i, "mlp.gate_proj", gate)?,
            up: self.linear(i, "mlp.up_proj", up)?,
            down: self.linear(i, "mlp.down_proj", down)?,
            eps: c.rms_norm_eps,
        })
    }
}

impl Llama {
    /// Reads a model, quantizing its linear layers one by one; `progress` is told the layers done and their number.
    ///
    /// # Errors
    /// The checkpoint lacks a tensor, has one of another shape, or is quantized otherwise than asked for.
    pub fn load(
        checkpoint: &Checkpoint,
        options: LoadOptions,
        progress: impl FnMut(usize, usize),
    ) -> Result<(Llama, Footprint)> {
        let (config, path) = (checkpoint.config().clone(), checkpoint.path());
        Loader {
            source: Source::Checkpoint(checkpoint),
            config,
            path,
            options,
            footprint: Footprint::default(),
            index: 0,
        }
        .model(progress)
    }

    /// A model of this shape with random weights, made on the device; `name` is for messages.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn random(
        config: LlamaConfig,
        name: &Path,
        seed: u64,
        options: LoadOptions,
        progress: impl FnMut(usize, usize),
    ) -> Result<(Llama, Footprint)> {
        let source = Source::Random { seed, made: 0 };
        Loader { source, config, path: name, options, footprint: Footprint::default(), index: 0 }.model(progress)
    }
}

impl Loader<'_> {
    fn model(mut self, mut progress: impl FnMut(usize, usize)) -> Result<(Llama, Footprint)> {
        let config = self.config.clone();
        let (source, dtype, device) = (self.path.to_path_buf(), self.options.dtype, self.options.device);
        let mut embedding = self.table("model.embed_tokens.weight")?;
        let (layers, norm, head) = thread::scope(|scope| {
            // A step reads one row a token: across the bus that takes about a millisecond, and a gigabyte of an 8B model
            // does not take device memory. To pin so much takes a second, in which the layers are loaded.
            let table = &mut embedding.value;
            let across = device != Device::Cpu && !config.tie_word_embeddings;
            let pinned = across.then(|| scope.spawn(move || table.to_pinned(device).map(|pinned| *table = pinned)));
            let mut layers = Vec::new();
            for i in 0..config.num_layers {
                layers.push(self.layer(i)?);
                self.release(scope);
                progress(i + 1, config.num_layers);
            }
            let norm = self.param("model.norm.weight", &[config.hidden_size])?;
            let head = if config.tie_word_embeddings { None } else { Some(self.table("lm_head.weight")?) };
            self.release(scope);
            pinned.map_or(Ok(()), |pinned| pinned.join().unwrap_or_else(|panic| resume_unwind(panic)))?;
            Ok::<_, Error>((layers, norm, head))
        })?;
        nibble_runtime::memory::trim();
        nibble_runtime::memory::trim_of(device)?;
        let llama = Llama {
            config,
            source,
            embedding,
            layers,
            norm,
            head,
            dtype,
            activations: Activations::default(),
            feed_forward_rows: usize::MAX,
            stash: Stash::default(),
            adapters: Adapters::default(),
            angles: Angles::default(),
        };
        Ok((llama, self.footprint))
    }
}
