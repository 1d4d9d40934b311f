//! What a GGUF file says about a Llama: its configuration, and its tensors under Hugging Face names.

use super::{GgufFile, metadata::shown};
use crate::{Error, LlamaConfig, Result};
use nibble_kernels::rotary::{RopeConfig, RopeScaling};
use nibble_runtime::{Tag, Tensor};

/// Tensors of a layer: `(Hugging Face, GGUF)`, without their prefixes.
const LAYER_NAMES: [(&str, &str); 9] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
];

/// Tensors outside of the layers: `(Hugging Face, GGUF)`.
const MODEL_NAMES: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// Per-frequency divisors of the rotary embedding: how GGUF stores Llama 3's scaling.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// Layer number and the rest of a name such as `blk.3.attn_q.weight`.
fn split_layer<'a>(name: &'a str, prefix: &str) -> Option<(usize, &'a str)> {
    let (layer, rest) = name.strip_prefix(prefix)?.split_once('.')?;
    let number = layer.parse::<usize>().ok()?;
    (number.to_string() == layer).then_some((number, rest))
}

/// GGUF's name of a Hugging Face Llama tensor.
pub fn gguf_name(name: &str) -> Option<String> {
    if let Some((layer, rest)) = split_layer(name, "model.layers.") {
        let (_, gguf) = LAYER_NAMES.iter().find(|(hf, _)| *hf == rest)?;
        return Some(format!("blk.{layer}.{gguf}"));
    }
    MODEL_NAMES.iter().find(|(hf, _)| *hf == name).map(|(_, gguf)| gguf.to_string())
}

/// Hugging Face's name of a GGUF Llama tensor.
pub fn hf_name(name: &str) -> Option<String> {
    if let Some((layer, rest)) = split_layer(name, "blk.") {
        let (hf, _) = LAYER_NAMES.iter().find(|(_, gguf)| *gguf == rest)?;
        return Some(format!("model.layers.{layer}.{hf}"));
    }
    MODEL_NAMES.iter().find(|(_, gguf)| *gguf == name).map(|(hf, _)| hf.to_string())
}

impl GgufFile {
    /// The model's configuration.
    ///
    /// # Errors
    /// [`Error::Unsupported`]: not a Llama, or a Llama with something that nibble does not run.
    /// [`Error::File`]: a key is missing or its value out of range.
    pub fn llama_config(&self) -> Result<LlamaConfig> {
        self.refuse_other_models()?;
        let hidden_size = self.size("llama.embedding_length")?;
        let num_heads = self.heads("llama.attention.head_count")?;
        let num_kv_heads = match self.has_key("llama.attention.head_count_kv") {
            true => self.heads("llama.attention.head_count_kv")?,
            false => num_heads,
        };
        let head_dim = match self.get_u32("llama.attention.key_length") {
            Some(length) => length as usize,
            None if num_heads > 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => {
                let what = format!("embedding_length {hidden_size} is not a multiple of head_count {num_heads}");
                return Err(Error::file(self.path(), what));
            }
        };
        for key in ["llama.attention.value_length", "llama.rope.dimension_count"] {
            if let Some(found) = self.get_u32(key).filter(|&found| found as usize != head_dim) {
                let what = format!("{key} is {found} and heads have {head_dim} dimensions; nibble runs equal ones");
                return Err(Error::unsupported(self.path(), what));
            }
        }
        let eps = self
            .get_f32("llama.attention.layer_norm_rms_epsilon")
            .ok_or_else(|| Error::file(self.path(), "the key \"llama.attention.layer_norm_rms_epsilon\" is missing"))?;
        let mut eos_token_ids: Vec<u32> = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
            eos_token_ids.extend(self.get_u32(key).filter(|id| !eos_token_ids.contains(id)));
        }
        let config = LlamaConfig {
            vocab_size: self.vocab_size()?,
            hidden_size,
            intermediate_size: self.size("llama.feed_forward_length")?,
            num_layers: self.size("llama.block_count")?,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: eps,
            rope: self.rope(head_dim)?,
            tie_word_embeddings: self.tensor_info("output.weight").is_none(),
            max_position_embeddings: self.size("llama.context_length")?,
            bos_token_id: self.get_u32("tokenizer.ggml.bos_token_id"),
            eos_token_ids,
        };
        config.validate(self.path())?;
        Ok(config)
    }

    /// Shape of a tensor by its Hugging Face name.
    pub fn weight_shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.tensor_info(&gguf_name(name)?)?.shape)
    }

    /// A tensor by its Hugging Face name, as f32, with the rows of q and k in Hugging Face's order: GGUF interleaves the
    /// two halves of every head, `file[2i + half] = weight[half · head_dim/2 + i]`.
    ///
    /// # Errors
    /// [`Error::Mismatch`]: no such tensor, or one whose rows are not those of the configuration's heads.
    /// [`Error::Unsupported`]: its type is not converted.
    pub fn weight(&self, config: &LlamaConfig, name: &str, tag: Tag) -> Result<Tensor> {
        let missing = || Error::mismatch(self.path(), format!("the file has no tensor for \"{name}\""));
        let file_name = gguf_name(name).ok_or_else(missing)?;
        let shape = &self.tensor_info(&file_name).ok_or_else(missing)?.shape;
        let heads = match name.rsplit_once("self_attn.") {
            Some((_, "q_proj.weight")) => config.num_heads,
            Some((_, "k_proj.weight")) => config.num_kv_heads,
            _ => return self.tensor(&file_name, tag),
        };
        let dim = config.head_dim;
        if shape.len() != 2 || shape[0] != heads * dim || dim % 2 == 1 {
            let what = format!("tensor \"{file_name}\" has shape {shape:?}; expected {heads} heads of {dim} rows");
            return Err(Error::mismatch(self.path(), what));
        }
        self.tensor_by_rows(&file_name, tag, |row| {
            let (head, within) = (row / dim, row % dim);
            let (half, i) = (within / (dim / 2), within % (dim / 2));
            head * dim + 2 * i + half
        })
    }

    fn refuse_other_models(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::unsupported(self.path(), what));
        if let Some(kind) = self.get_str("general.type").filter(|kind| *kind != "model") {
            return refuse(format!("this GGUF holds \"{}\"; expected a model", shown(kind)));
        }
        match self.get_str("general.architecture") {
            Some("llama") => {}
            Some(other) => {
                return refuse(format!("architecture \"{}\"; nibble runs \"llama\" models", shown(other)));
            }
            None => return Err(Error::file(self.path(), "the key \"general.architecture\" is missing")),
        }
        if let Some(experts) = self.get_u32("llama.expert_count").filter(|&experts| experts > 0) {
            return refuse(format!("a mixture of {experts} experts; nibble runs dense Llamas"));
        }
        if self.get_u32("split.count").is_some_and(|count| count > 1) {
            return refuse("one part of a split GGUF; merge the parts first (llama-gguf-split --merge)".into());
        }
        match self.tensors().find(|(name, _)| *name != ROPE_FREQS && hf_name(name).is_none()) {
            Some((name, _)) => refuse(format!("tensor \"{}\" is not part of the Llamas that nibble runs", shown(name))),
            None => Ok(()),
        }
    }

    fn size(&self, key: &str) -> Result<usize> {
        match self.get_u32(key) {
            Some(size) => Ok(size as usize),
            None => Err(Error::file(self.path(), format!("the key \"{key}\" is missing or not a whole number"))),
        }
    }

    /// A number of heads, which files may give layer by layer.
    fn heads(&self, key: &str) -> Result<usize> {
        let Some(layers) = self.get_i32_array(key) else { return self.size(key) };
        match layers.split_first() {
            Some((&first, rest)) if first > 0 && rest.iter().all(|&other| other == first) => Ok(first as usize),
            _ => Err(Error::unsupported(self.path(), format!("{key} differs between layers"))),
        }
    }

    fn vocab_size(&self) -> Result<usize> {
        let shape = self.tensor_info("token_embd.weight").map(|tensor| &tensor.shape[..]);
        let Some(&[rows, _]) = shape else {
            return Err(Error::mismatch(self.path(), "the file has no matrix \"token_embd.weight\""));
        };
        match self.array_len("tokenizer.ggml.tokens").filter(|&tokens| tokens > rows) {
            Some(tokens) => {
                Err(Error::mismatch(self.path(), format!("{tokens} tokens, but token_embd.weight has {rows} rows")))
            }
            None => Ok(rows),
        }
    }

    fn rope(&self, head_dim: usize) -> Result<RopeConfig> {
        let theta = f64::from(self.get_f32("llama.rope.freq_base").unwrap_or(10_000.0));
        let old_linear = self.get_f32("llama.rope.scale_linear").filter(|&factor| factor != 1.0);
        let kind =
            self.get_str("llama.rope.scaling.type").unwrap_or(if old_linear.is_some() { "linear" } else { "none" });
        let mut scaling = match kind {
            "none" => RopeScaling::Default,
            "linear" => {
                let factor = self.get_f32("llama.rope.scaling.factor").or(old_linear).ok_or_else(|| {
                    Error::file(self.path(), "linear rotary scaling without \"llama.rope.scaling.factor\"")
                })?;
                RopeScaling::Linear { factor: f64::from(factor) }
            }
            other => {
                let what = format!("rotary scaling type \"{}\"; nibble runs none, linear and Llama 3's", shown(other));
                return Err(Error::unsupported(self.path(), what));
            }
        };
        if self.tensor_info(ROPE_FREQS).is_some() {
            if scaling != RopeScaling::Default {
                return Err(Error::unsupported(self.path(), format!("{ROPE_FREQS} on top of linear rotary scaling")));
            }
            let divisors = self.tensor(ROPE_FREQS, Tag::Workspace)?;
            scaling = llama3_from_divisors(divisors.as_slice()?, theta, head_dim).ok_or_else(|| {
                let what = format!("the divisors in {ROPE_FREQS} are not those of Llama 3's rotary scaling");
                Error::unsupported(self.path(), what)
            })?;
        }
        Ok(RopeConfig { theta, scaling })
    }
}

/// Llama 3's parameters from what they do to each frequency: low frequencies are divided by the factor, and for the blend
/// between, every context length that the models use is tried. `None` if nothing reproduces all divisors.
fn llama3_from_divisors(divisors: &[f32], theta: f64, head_dim: usize) -> Option<RopeScaling> {
    if divisors.len() != head_dim / 2 {
        return None;
    }
    if divisors.iter().all(|&divisor| divisor == 1.0) {
        return Some(RopeScaling::Default);
    }
    let factor = f64::from(*divisors.last()?);
    let (low, high) = (1.0, 4.0);
    let matches = |original: usize| {
        divisors.iter().enumerate().all(|(i, &divisor)| {
            let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
            let rotations = original as f64 / wavelength;
            let smooth = ((rotations - low) / (high - low)).clamp(0.0, 1.0);
            let expected = 1.0 / ((1.0 - smooth) / factor + smooth);
            // The file's divisors come from f32 arithmetic.
            (f64::from(divisor) - expected).abs() <= 1e-4 * expected
        })
    };
    // 8192 first: Llama 3.1 to 3.3.
    let original = std::iter::once(8192).chain((5..=17).map(|bits| 1 << bits)).find(|&original| matches(original))?;
    Some(RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_max_position: original })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_both_ways() {
        for (hf, gguf) in [
            ("model.layers.11.self_attn.q_proj.weight", "blk.11.attn_q.weight"),
            ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("lm_head.weight", "output.weight"),
        ] {
            assert_eq!(gguf_name(hf).as_deref(), Some(gguf));
            assert_eq!(hf_name(gguf).as_deref(), Some(hf));
        }
        for other in ["blk.x.attn_q.weight", "blk.01.attn_q.weight", "blk.0.attn_q.bias", "blk.0", "rope_freqs.weight"]
        {
            assert_eq!(hf_name(other), None, "{other}");
        }
    }

    /// Divisors as the converter of llama.cpp computes them: in f32, from wavelengths.
    fn divisors(factor: f32, original: f32, theta: f32, dim: usize) -> Vec<f32> {
        let one = |i: usize| {
            let wavelength = 2.0 * std::f32::consts::PI * theta.powf(2.0 * i as f32 / dim as f32);
            if wavelength < original / 4.0 {
                1.0
            } else if wavelength > original {
                factor
            } else {
                let smooth = (original / wavelength - 1.0) / 3.0;
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        };
        (0..dim / 2).map(one).collect()
    }

    #[test]
    fn llama3_parameters_are_recovered_from_divisors() {
        for (factor, original) in [(8.0, 8192), (32.0, 8192), (8.0, 4096)] {
            let expected = RopeScaling::Llama3 {
                factor,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position: original,
            };
            let divisors = divisors(factor as f32, original as f32, 500_000.0, 128);
            assert_eq!(llama3_from_divisors(&divisors, 500_000.0, 128), Some(expected));
        }
        let mut wrong = divisors(8.0, 8192.0, 500_000.0, 128);
        assert_eq!(llama3_from_divisors(&wrong, 10_000.0, 128), None);
        assert_eq!(llama3_from_divisors(&wrong, 500_000.0, 64), None);
        wrong[40] *= 1.01;
        assert_eq!(llama3_from_divisors(&wrong, 500_000.0, 128), None);
        assert_eq!(llama3_from_divisors(&[1.0; 64], 500_000.0, 128), Some(RopeScaling::Default));
    }
}
