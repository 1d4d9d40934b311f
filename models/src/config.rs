//! The shape of a Llama.

use nibble_kernels::rotary::RopeConfig;

/// Hyper-parameters of a Llama, as `config.json` or a GGUF header gives them.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f32,
    pub rope: RopeConfig,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    pub max_position_embeddings: usize,
    pub bos_token_id: Option<u32>,
    /// Any of these ends a generation; empty if the file names none.
    pub eos_token_ids: Vec<u32>,
}
