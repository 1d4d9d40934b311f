//! Models of known shapes with random weights, made on the device: for measuring speed and memory without a checkpoint.

use crate::{Error, LlamaConfig, Result};
use nibble_kernels::{
    random::normal,
    rotary::{RopeConfig, RopeScaling},
};
use nibble_runtime::{DType, Device, Tag, Tensor};

/// Standard deviation of the weights, as Llama's initializer has it.
const STD: f32 = 0.02;

/// Names of the shapes: `random:NAME` in place of a checkpoint's path.
pub const SHAPES: [&str; 6] = ["llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-70b", "smollm2-135m", "tiny"];

impl LlamaConfig {
    /// The shape of a known model.
    ///
    /// # Errors
    /// [`Error::Invalid`]: the name is none of [`SHAPES`].
    pub fn shape(name: &str) -> Result<LlamaConfig> {
        // Hidden, feed-forward, layers, heads, heads for keys and values, head size, tied, vocabulary, theta.
        let (d, f, layers, heads, kv, head, tied, vocab, theta) = match name {
            "llama-3.1-8b" => (4096, 14336, 32, 32, 8, 128, false, 128_256, 5e5),
            "llama-3.2-1b" => (2048, 8192, 16, 32, 8, 64, true, 128_256, 5e5),
            "llama-3.2-3b" => (3072, 8192, 28, 24, 8, 128, true, 128_256, 5e5),
            "llama-3.1-70b" => (8192, 28672, 80, 64, 8, 128, false, 128_256, 5e5),
            "smollm2-135m" => (576, 1536, 30, 9, 3, 64, true, 49_152, 1e5),
            "tiny" => (256, 704, 4, 8, 2, 32, true, 4096, 1e4),
            _ => {
                return Err(Error::Invalid(format!("no shape is named \"{name}\"; choose from {}", SHAPES.join(", "))));
            }
        };
        let llama3 = |factor| {
            let (low_freq_factor, high_freq_factor, original_max_position) = (1.0, 4.0, 8192);
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position }
        };
        let scaling = match name {
            "smollm2-135m" | "tiny" => RopeScaling::Default,
            "llama-3.2-1b" | "llama-3.2-3b" => llama3(32.0),
            _ => llama3(8.0),
        };
        Ok(LlamaConfig {
            vocab_size: vocab,
            hidden_size: d,
            intermediate_size: f,
            num_layers: layers,
            num_heads: heads,
            num_kv_heads: kv,
            head_dim: head,
            rms_norm_eps: 1e-5,
            rope: RopeConfig { theta, scaling },
            tie_word_embeddings: tied,
            max_position_embeddings: 131_072,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        })
    }
}

/// Weight `number` of a random model: normal numbers, or ones for a norm. On the device, in `dtype`.
pub(super) fn weight(shape: &[usize], dtype: DType, device: Device, seed: u64, number: u32) -> Result<Tensor> {
    if let &[width] = shape {
        let ones = Tensor::from_slice(&vec![1f32; width], shape, Tag::Weights)?;
        return Ok(ones.cast(dtype, Tag::Weights)?.into_device(device, Tag::Weights)?);
    }
    Ok(normal(shape, dtype, device, STD, seed, number, Tag::Weights)?)
}
