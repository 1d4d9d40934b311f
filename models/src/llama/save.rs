//! A model as a Hugging Face folder.

use super::{Layer, Llama};
use crate::{
    Error, Result,
    files::checkpoint::{CheckpointTensor, write_checkpoint},
};
use nibble_kernels::{cast::into_dtype, linear::Weight, table::Table};
use nibble_runtime::{DType, Tag, Tensor};
use std::path::Path;

impl Llama {
    /// Writes the base weights (adapters apart) into `dir` as transformers reads them: quantized linears in bitsandbytes'
    /// format, everything else in `dtype`.
    ///
    /// # Errors
    /// Embedding and head are held in 8 bits, for which there is no format; or a file cannot be written.
    pub fn save(&self, dir: &Path, dtype: DType) -> Result<()> {
        let cast = |tensor: &Tensor| -> Result<CheckpointTensor> {
            Ok(CheckpointTensor::Dense(into_dtype(tensor.clone(), dtype, Tag::Workspace)?))
        };
        let table = |table: &Table| match table {
            Table::Dense(tensor) => cast(tensor),
            Table::Rows8(_) => Err(Error::Invalid("a model whose embedding is held in 8 bits cannot be saved".into())),
        };
        let mut weights = vec![("model.embed_tokens.weight".to_string(), table(&self.embedding.value)?)];
        for (i, layer) in self.layers.iter().enumerate() {
            let Layer { input_norm, post_norm, .. } = layer;
            let norms = [("input_layernorm", input_norm), ("post_attention_layernorm", post_norm)];
            for (name, norm) in norms {
                weights.push((format!("model.layers.{i}.{name}.weight"), cast(&norm.value)?));
            }
            for linear in layer.linears() {
                let weight = match &linear.weight {
                    Weight::Dense(tensor) => cast(tensor)?,
                    Weight::Quantized(quantized) => CheckpointTensor::Quantized(quantized.clone()),
                };
                weights.push((format!("{}.weight", linear.name), weight));
            }
        }
        weights.push(("model.norm.weight".into(), cast(&self.norm.value)?));
        // A tied model whose head an adapter has untied is still tied without it.
        if let Some(head) = self.head.as_ref().filter(|_| !self.config.tie_word_embeddings) {
            weights.push(("lm_head.weight".into(), table(&head.value)?));
        }
        write_checkpoint(dir, &self.config, dtype, &weights)
    }
}
