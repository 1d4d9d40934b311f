//! The shape of a Llama.

use crate::{Error, Result};
use nibble_kernels::rotary::{RopeConfig, RopeScaling};
use nibble_runtime::DType;
use serde_json::{Map, Value, json};
use std::path::Path;

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

impl LlamaConfig {
    /// Reads a `config.json` of transformers, with its defaults for what is absent. `path` is for messages.
    ///
    /// # Errors
    /// [`Error::File`]: not JSON, a setting is missing, of the wrong type or out of range.
    /// [`Error::Unsupported`]: not a Llama, or a Llama with something that nibble does not run.
    pub fn from_json(text: &str, path: &Path) -> Result<LlamaConfig> {
        let root: Value = serde_json::from_str(text).map_err(|e| Error::file(path, format!("not valid JSON: {e}")))?;
        let root = root.as_object().ok_or_else(|| Error::file(path, "expected a JSON object"))?;
        let settings = Settings { values: root, path };
        settings.refuse_other_models()?;

        let hidden_size = settings.size("hidden_size")?;
        let num_heads = settings.size("num_attention_heads")?;
        let head_dim = match settings.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if num_heads > 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => {
                let what = format!("hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}");
                return Err(Error::file(path, what));
            }
        };
        let max_position_embeddings = settings.optional_size("max_position_embeddings")?.unwrap_or(2048);
        let config = LlamaConfig {
            vocab_size: settings.size("vocab_size")?,
            hidden_size,
            intermediate_size: settings.size("intermediate_size")?,
            num_layers: settings.size("num_hidden_layers")?,
            num_heads,
            num_kv_heads: settings.optional_size("num_key_value_heads")?.unwrap_or(num_heads),
            head_dim,
            rms_norm_eps: settings.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope: settings.rope(max_position_embeddings)?,
            tie_word_embeddings: settings.flag("tie_word_embeddings")?,
            max_position_embeddings,
            bos_token_id: settings.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: settings.token_ids("eos_token_id")?,
        };
        config.validate(path)?;
        Ok(config)
    }

    /// Shapes `[outputs, inputs]` of a layer's linears: q, k, v, o, gate, up, down.
    pub fn linear_shapes(&self) -> [[usize; 2]; 7] {
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        [[q, d], [kv, d], [kv, d], [d, q], [f, d], [f, d], [d, f]]
    }

    /// Names and shapes of all weights, in the order of the forward pass.
    pub fn weights(&self) -> Vec<(String, Vec<usize>)> {
        let (d, vocab) = (self.hidden_size, self.vocab_size);
        let [q, k, v, o, gate, up, down] = self.linear_shapes().map(Vec::from);
        let layer: [(&str, Vec<usize>); 9] = [
            ("input_layernorm", vec![d]),
            ("self_attn.q_proj", q),
            ("self_attn.k_proj", k),
            ("self_attn.v_proj", v),
            ("self_attn.o_proj", o),
            ("post_attention_layernorm", vec![d]),
            ("mlp.gate_proj", gate),
            ("mlp.up_proj", up),
            ("mlp.down_proj", down),
        ];
        let mut all = vec![("model.embed_tokens.weight".to_string(), vec![vocab, d])];
        for i in 0..self.num_layers {
            let of_layer = layer.iter().cloned();
            all.extend(of_layer.map(|(name, shape)| (format!("model.layers.{i}.{name}.weight"), shape)));
        }
        all.push(("model.norm.weight".into(), vec![d]));
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".into(), vec![vocab, d]));
        }
        all
    }

    /// A `config.json` that transformers loads, for weights stored as `dtype`. Rotary settings and the type are in both
    /// spellings, the one of transformers 4 and the one of 5.
    pub fn to_json(&self, dtype: DType) -> Value {
        let eos = match self.eos_token_ids[..] {
            [] => Value::Null,
            [one] => json!(one),
            ref many => json!(many),
        };
        let scaling = rope_json(&self.rope.scaling);
        let mut parameters =
            scaling.clone().unwrap_or_else(|| Map::from_iter([("rope_type".into(), json!("default"))]));
        parameters.insert("rope_theta".into(), json!(self.rope.theta));
        let dtype = dtype_name(dtype);
        json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "dtype": dtype,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": shortest(self.rms_norm_eps),
            "rope_parameters": parameters,
            "rope_scaling": scaling,
            "rope_theta": self.rope.theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }

    /// Checks that the sizes are sane and fit together; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::File`] names the setting, its value and what it should be.
    pub fn validate(&self, path: &Path) -> Result<()> {
        // Far above any Llama there is, and low enough that no product of them overflows.
        let bounded = [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", self.hidden_size, 1 << 18),
            ("intermediate_size", self.intermediate_size, 1 << 20),
            ("num_hidden_layers", self.num_layers, 1 << 12),
            ("num_attention_heads", self.num_heads, 1 << 12),
            ("num_key_value_heads", self.num_kv_heads, 1 << 12),
            ("head_dim", self.head_dim, 1 << 12),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 30),
        ];
        for (name, value, limit) in bounded {
            if value == 0 || value > limit {
                return Err(Error::file(path, format!("{name} is {value}; expected 1 to {limit}")));
            }
        }
        let bad = |what: String| Err(Error::file(path, what));
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let (heads, kv_heads) = (self.num_heads, self.num_kv_heads);
            return bad(format!("{heads} attention heads cannot share {kv_heads} key-value heads evenly"));
        }
        if self.head_dim % 2 == 1 {
            return bad(format!("head_dim is {}; rotary embedding needs an even one", self.head_dim));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            return bad(format!("rms_norm_eps is {}; expected a small positive number", self.rms_norm_eps));
        }
        let positive = |x: f64| x.is_finite() && x > 0.0;
        if !positive(self.rope.theta) {
            return bad(format!("rope_theta is {}; expected a positive number", self.rope.theta));
        }
        let sane = match self.rope.scaling {
            RopeScaling::Default => true,
            RopeScaling::Linear { factor } => positive(factor),
            RopeScaling::Dynamic { factor, original_max_position } => positive(factor) && original_max_position > 0,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                positive(factor)
                    && positive(low_freq_factor)
                    && high_freq_factor.is_finite()
                    && high_freq_factor > low_freq_factor
                    && original_max_position > 0
            }
        };
        if !sane {
            return bad(format!("rotary scaling {:?} is out of range", self.rope.scaling));
        }
        let ids = self.bos_token_id.iter().chain(&self.eos_token_ids);
        match ids.copied().find(|&id| id as usize >= self.vocab_size) {
            Some(id) => bad(format!("token id {id} is outside of the vocabulary of {}", self.vocab_size)),
            None => Ok(()),
        }
    }
}

/// torch's name of a type.
pub(crate) fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::U8 => "uint8",
        DType::I8 => "int8",
        DType::I32 => "int32",
        DType::I64 => "int64",
    }
}

/// The f64 with the fewest digits that rounds to `x`: 1e-5 rather than 9.999999747e-6.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

fn rope_json(scaling: &RopeScaling) -> Option<Map<String, Value>> {
    let value = match *scaling {
        RopeScaling::Default => return None,
        RopeScaling::Linear { factor } => json!({"factor": factor, "rope_type": "linear"}),
        RopeScaling::Dynamic { factor, .. } => json!({"factor": factor, "rope_type": "dynamic"}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => json!({
            "factor": factor,
            "high_freq_factor": high_freq_factor,
            "low_freq_factor": low_freq_factor,
            "original_max_position_embeddings": original_max_position,
            "rope_type": "llama3",
        }),
    };
    value.as_object().cloned()
}

/// A JSON object of settings, with the file it came from.
struct Settings<'a> {
    values: &'a Map<String, Value>,
    path: &'a Path,
}

impl<'a> Settings<'a> {
    /// The value, unless it is absent or null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    fn wrong<T>(&self, key: &str, expected: &str) -> Result<T> {
        let found = match self.get(key) {
            None => "missing".to_string(),
            Some(value) => value.to_string().chars().take(80).collect(),
        };
        Err(Error::file(self.path, format!("\"{key}\" is {found}; expected {expected}")))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|value| usize::try_from(value).ok()) {
            None => self.wrong(key, "a whole number"),
            size => Ok(size),
        }
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.map_or_else(|| self.wrong(key, "a whole number"), Ok)
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            None => self.wrong(key, "a number"),
            number => Ok(number),
        }
    }

    fn required_number(&self, key: &str) -> Result<f64> {
        self.number(key)?.map_or_else(|| self.wrong(key, "a number"), Ok)
    }

    /// A bool that is false if absent.
    fn flag(&self, key: &str) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value.as_bool().map_or_else(|| self.wrong(key, "true or false"), Ok)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map_or_else(|| self.wrong(key, "a string"), |text| Ok(Some(text)))
    }

    /// An id, a list of ids, or nothing.
    fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.get(key) {
            None => Some(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(one) => id(one).map(|id| vec![id]),
        };
        ids.map_or_else(|| self.wrong(key, "a token id or a list of them"), Ok)
    }

    fn refuse_other_models(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::unsupported(self.path, what));
        match self.text("model_type")? {
            Some("llama") => {}
            // Without its attention window, Mistral's layers are Llama's.
            Some("mistral") if self.get("sliding_window").is_none() => {}
            Some("mistral") => return refuse("this Mistral has a sliding_window, which nibble does not run".into()),
            Some(other) => return refuse(format!("model_type \"{other}\"; nibble runs \"llama\" models")),
            None => return self.wrong("model_type", "\"llama\""),
        }
        for key in ["attention_bias", "mlp_bias"] {
            if self.flag(key)? {
                return refuse(format!("{key} is true; nibble runs Llamas without biases"));
            }
        }
        match self.text("hidden_act")? {
            None | Some("silu") => Ok(()),
            Some(other) => refuse(format!("hidden_act \"{other}\"; nibble runs \"silu\"")),
        }
    }

    /// Rotary settings, in whichever spelling. A `rope_scaling` wins over `rope_parameters`, as in transformers.
    fn rope(&self, max_position_embeddings: usize) -> Result<RopeConfig> {
        let object = |key: &str| match self.get(key) {
            None => Ok(None),
            Some(Value::Object(values)) if values.is_empty() => Ok(None),
            Some(Value::Object(values)) => Ok(Some(Settings { values, path: self.path })),
            Some(_) => self.wrong(key, "an object"),
        };
        let old_theta = self.number("rope_theta")?;
        let Some(rope) = object("rope_scaling")?.map_or_else(|| object("rope_parameters"), |rope| Ok(Some(rope)))?
        else {
            self.whole_head(self)?;
            return Ok(RopeConfig { theta: old_theta.unwrap_or(10_000.0), scaling: RopeScaling::Default });
        };
        self.whole_head(self)?;
        self.whole_head(&rope)?;
        let inner_theta = match (rope.number("rope_theta")?, object("rope_parameters")?) {
            (None, Some(parameters)) => parameters.number("rope_theta")?,
            (theta, _) => theta,
        };
        let theta = inner_theta.or(old_theta).unwrap_or(10_000.0);
        let kind = rope.text("rope_type")?.map_or_else(|| rope.text("type"), |kind| Ok(Some(kind)))?;
        let scaling = match kind.unwrap_or("default") {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: rope.required_number("factor")? },
            // transformers lets the base grow from max_position_embeddings on, whatever else the file says.
            "dynamic" => RopeScaling::Dynamic {
                factor: rope.required_number("factor")?,
                original_max_position: max_position_embeddings,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: rope.required_number("factor")?,
                low_freq_factor: rope.required_number("low_freq_factor")?,
                high_freq_factor: rope.required_number("high_freq_factor")?,
                original_max_position: rope
                    .optional_size("original_max_position_embeddings")?
                    .unwrap_or(max_position_embeddings),
            },
            other => {
                let what = format!("rotary scaling type \"{other}\"; nibble runs default, linear, dynamic and llama3");
                return Err(Error::unsupported(self.path, what));
            }
        };
        Ok(RopeConfig { theta, scaling })
    }

    fn whole_head(&self, settings: &Settings) -> Result<()> {
        match settings.number("partial_rotary_factor")? {
            Some(part) if part != 1.0 => {
                Err(Error::unsupported(self.path, format!("partial_rotary_factor {part}; nibble rotates whole heads")))
            }
            _ => Ok(()),
        }
    }
}
