//! The default model's shape and its random weights before training.

use std::path::Path;

use half::bf16;
use nibble_runtime::rng::{Philox, Stream};
use safetensors::tensor::{Dtype, SafeTensorError, TensorView};

use super::tokenizer::{BOS_ID, EOS_ID};

pub const VOCAB: usize = 768;
pub const HIDDEN: usize = 192;
pub const INTERMEDIATE: usize = 384;
pub const LAYERS: usize = 4;
pub const HEADS: usize = 6;
pub const KV_HEADS: usize = 3;
pub const HEAD_DIM: usize = 32;

/// Standard deviation of the weights, the one that Llama checkpoints name `initializer_range`.
const STD: f32 = 0.02;
/// The Philox purpose of initial weights.
const PURPOSE: u32 = 0x1417;

/// The default model's `config.json`.
pub fn config_json() -> serde_json::Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": null,
        "tie_word_embeddings": true,
        "attention_bias": false,
        "mlp_bias": false,
        "initializer_range": STD,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": "bfloat16",
    })
}

/// Every tensor's Hugging Face name, shape and standard deviation (0 for the norms, which start at one).
///
/// The projections that write into the residual stream start smaller by 1/√(2·layers), so that its variance does not
/// grow with depth (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3).
fn tensors() -> Vec<(String, Vec<usize>, f32)> {
    let into_residual = STD / (2.0 * LAYERS as f32).sqrt();
    let mut list = vec![("model.embed_tokens.weight".to_string(), vec![VOCAB, HIDDEN], STD)];
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: Vec<usize>, std: f32| {
            list.push((format!("model.layers.{layer}.{name}.weight"), shape, std));
        };
        add("input_layernorm", vec![HIDDEN], 0.0);
        add("self_attn.q_proj", vec![HEADS * HEAD_DIM, HIDDEN], STD);
        add("self_attn.k_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN], STD);
        add("self_attn.v_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN], STD);
        add("self_attn.o_proj", vec![HIDDEN, HEADS * HEAD_DIM], into_residual);
        add("post_attention_layernorm", vec![HIDDEN], 0.0);
        add("mlp.gate_proj", vec![INTERMEDIATE, HIDDEN], STD);
        add("mlp.up_proj", vec![INTERMEDIATE, HIDDEN], STD);
        add("mlp.down_proj", vec![HIDDEN, INTERMEDIATE], into_residual);
    }
    list.push(("model.norm.weight".to_string(), vec![HIDDEN], 0.0));
    list
}

/// Writes the initial weights of `seed` to `path` as bf16 safetensors.
///
/// # Errors
/// If the file cannot be written.
pub fn write_weights(path: &Path, seed: u64) -> Result<(), SafeTensorError> {
    let mut data: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (index, (name, shape, std)) in tensors().into_iter().enumerate() {
        let numbers = Philox::new(seed, Stream { purpose: PURPOSE, step: 0, layer: index as u32 });
        let value = |i| if std == 0.0 { 1.0 } else { std * numbers.normal(i) };
        let count: usize = shape.iter().product();
        let bytes: Vec<u8> = (0..count as u64).flat_map(|i| bf16::from_f32(value(i)).to_le_bytes()).collect();
        data.push((name, shape, bytes));
    }
    let views: Result<Vec<_>, SafeTensorError> = data
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::BF16, shape.clone(), bytes)?)))
        .collect();
    let metadata = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(views?, Some(metadata), path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_follow_the_seed_and_fit_the_budget() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, seed| {
            let path = dir.path().join(name);
            write_weights(&path, seed).unwrap();
            std::fs::read(path).unwrap()
        };
        let bytes = write("a", 1);
        assert_eq!(bytes, write("b", 1));
        assert_ne!(bytes, write("c", 2));
        assert!(bytes.len() < 3_200_000, "{}", bytes.len());

        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 2 + 9 * LAYERS);
        let values = |name: &str| -> Vec<f32> {
            let tensor = file.tensor(name).unwrap();
            tensor.data().chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        };
        let std = |name: &str| {
            let v = values(name);
            (v.iter().map(|x| x * x).sum::<f32>() / v.len() as f32).sqrt()
        };
        assert!((std("model.layers.1.mlp.up_proj.weight") - 0.02).abs() < 2e-4);
        assert!((std("model.layers.1.mlp.down_proj.weight") - 0.02 / 8f32.sqrt()).abs() < 1e-4);
        assert!(values("model.norm.weight").iter().all(|&x| x == 1.0));
    }
}
