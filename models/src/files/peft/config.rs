//! `adapter_config.json`: what nibble uses of it, what it refuses, and what it writes.

use super::patterns;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, path::Path};

/// Which modules carry adapters.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetModules {
    /// Those whose path ends with one of these names.
    Names(Vec<String>),
    /// Those whose whole path matches a regular expression, or the word [`ALL_LINEAR`].
    Pattern(String),
}

/// The word for every linear layer but the head.
pub const ALL_LINEAR: &str = "all-linear";

/// Settings of a LoRA adapter. Fields are named as in PEFT's file.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// Rank.
    pub r: usize,
    /// α: the adapter's output is scaled by α/r, or by α/√r with `use_rslora`.
    pub lora_alpha: f64,
    /// Probability of dropping an element of the adapter's input, in training.
    pub lora_dropout: f64,
    /// Scale by α/√r.
    pub use_rslora: bool,
    /// Modules with adapters; absent in some files, where the tensors tell.
    pub target_modules: Option<TargetModules>,
    /// Modules that `target_modules` would take, but shall not.
    pub exclude_modules: Option<TargetModules>,
    /// Name or path of the model that the adapter was made for.
    pub base_model_name_or_path: Option<String>,
    /// "CAUSAL_LM".
    pub task_type: Option<String>,
    /// Ranks of modules that have another than `r`; for the keys see [`AdapterConfig::rank_of`].
    pub rank_pattern: BTreeMap<String, usize>,
    /// α of modules that have another than `lora_alpha`.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Only these layers carry adapters.
    pub layers_to_transform: Option<Vec<usize>>,
    /// The adapted weights' rows have lengths of their own (DoRA).
    pub use_dora: bool,
    /// Modules that are saved whole, by the ends of their paths: embedding and head.
    pub modules_to_save: Option<Vec<String>>,
    /// Embedding and head of a tied model stay one weight, where it is saved whole.
    pub ensure_weight_tying: bool,
    /// Which biases were trained: "none", "all" or "lora_only". Llama's linear layers have none.
    pub bias: String,
}

impl Default for AdapterConfig {
    /// PEFT's defaults.
    fn default() -> Self {
        AdapterConfig {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: None,
            exclude_modules: None,
            base_model_name_or_path: None,
            task_type: Some("CAUSAL_LM".into()),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            layers_to_transform: None,
            use_dora: false,
            modules_to_save: None,
            ensure_weight_tying: false,
            bias: "none".into(),
        }
    }
}

/// Keys that change nothing for a finished adapter, with what PEFT writes by default.
fn inert() -> [(&'static str, Value); 13] {
    [
        ("auto_mapping", Value::Null),
        ("corda_config", Value::Null),
        ("eva_config", Value::Null),
        ("inference_mode", json!(true)),
        ("layers_pattern", Value::Null),
        ("loftq_config", json!({})),
        ("lora_ga_config", Value::Null),
        ("megatron_config", Value::Null),
        ("megatron_core", json!("megatron.core")),
        ("monteclora_config", Value::Null),
        ("peft_version", json!("0.21.2")),
        ("qalora_group_size", json!(16)),
        ("revision", Value::Null),
    ]
}

/// Keys of features that nibble does not run: any other value than PEFT's default (or null, an empty list or object,
/// false) is refused.
fn refused() -> [(&'static str, Value); 11] {
    [
        ("alora_invocation_tokens", Value::Null),
        ("arrow_config", Value::Null),
        ("fan_in_fan_out", json!(false)),
        ("kasa_config", Value::Null),
        ("layer_replication", Value::Null),
        ("lora_bias", json!(false)),
        ("target_parameters", Value::Null),
        ("trainable_token_indices", Value::Null),
        ("use_bdlora", Value::Null),
        ("use_qalora", json!(false)),
        ("velora_config", Value::Null),
    ]
}

/// Whether a value stands for "not used".
fn is_off(value: &Value, default: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        other => other == default,
    }
}

impl AdapterConfig {
    /// Reads the text of an `adapter_config.json`; `path` is for messages. Only `peft_type` must be there. Unknown keys
    /// are ignored with a warning.
    ///
    /// # Errors
    /// [`Error::File`]: not a JSON object, or a value of the wrong type or out of range. [`Error::Unsupported`]: not a
    /// LoRA, or a LoRA with a feature that nibble does not run.
    pub fn from_json(text: &str, path: &Path) -> Result<AdapterConfig> {
        let values: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| Error::file(path, format!("not a JSON object: {e}")))?;
        match values.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            Some(other) => {
                return Err(Error::unsupported(path, format!("an adapter of type \"{other}\"; nibble runs \"LORA\"")));
            }
            None => return Err(Error::file(path, "\"peft_type\" is missing; expected \"LORA\"")),
        }
        let refused = refused();
        let known: Vec<&str> = inert().map(|(key, _)| key).into_iter().chain(refused.each_ref().map(|r| r.0)).collect();
        let mut config = AdapterConfig { task_type: None, ..AdapterConfig::default() };
        for (key, value) in &values {
            if value.is_null() {
                continue;
            }
            if !config.set(key, value, path)? && !known.contains(&key.as_str()) {
                tracing::warn!("{}: the unknown setting \"{key}\" is ignored", path.display());
            }
        }
        if let Some((key, _)) =
            refused.iter().find(|(key, default)| values.get(*key).is_some_and(|v| !is_off(v, default)))
        {
            let value: String = values[*key].to_string().chars().take(80).collect();
            return Err(Error::unsupported(
                path,
                format!("the adapter has {key} = {value}, which nibble does not run"),
            ));
        }
        config.check(path)?;
        Ok(config)
    }

    /// Takes one setting; returns whether the key is one of the fields'.
    fn set(&mut self, key: &str, value: &Value, path: &Path) -> Result<bool> {
        let wrong = |expected: &str| {
            let found: String = value.to_string().chars().take(80).collect();
            Error::file(path, format!("\"{key}\" is {found}; expected {expected}"))
        };
        let size = |value: &Value| value.as_u64().and_then(|size| usize::try_from(size).ok());
        let number = || value.as_f64().ok_or_else(|| wrong("a number"));
        let text = || value.as_str().map(str::to_string).ok_or_else(|| wrong("a string"));
        let flag = || value.as_bool().ok_or_else(|| wrong("true or false"));
        let names = |value: &Value| -> Option<Vec<String>> {
            value.as_array()?.iter().map(|name| name.as_str().map(str::to_string)).collect()
        };
        match key {
            "peft_type" => {}
            "r" => self.r = size(value).ok_or_else(|| wrong("a whole number"))?,
            "lora_alpha" => self.lora_alpha = number()?,
            "lora_dropout" => self.lora_dropout = number()?,
            "use_rslora" => self.use_rslora = flag()?,
            "use_dora" => self.use_dora = flag()?,
            "ensure_weight_tying" => self.ensure_weight_tying = flag()?,
            "modules_to_save" => self.modules_to_save = Some(names(value).ok_or_else(|| wrong("a list of names"))?),
            "bias" => {
                self.bias = text()?;
                if !["none", "all", "lora_only"].contains(&&self.bias[..]) {
                    return Err(wrong("none, all or lora_only"));
                }
            }
            "base_model_name_or_path" => self.base_model_name_or_path = Some(text()?),
            "task_type" => self.task_type = Some(text()?),
            "target_modules" | "exclude_modules" => {
                let modules = match value {
                    Value::String(pattern) => Some(TargetModules::Pattern(pattern.clone())),
                    list => names(list).map(TargetModules::Names),
                };
                let modules = Some(modules.ok_or_else(|| wrong("a list of names or a pattern"))?);
                match key {
                    "target_modules" => self.target_modules = modules,
                    _ => self.exclude_modules = modules,
                }
            }
            "rank_pattern" => {
                let entries = value.as_object().ok_or_else(|| wrong("an object"))?;
                let entry = |(key, value): (&String, &Value)| Some((key.clone(), size(value)?));
                let entries: Option<_> = entries.iter().map(entry).collect();
                self.rank_pattern = entries.ok_or_else(|| wrong("whole numbers by module"))?;
            }
            "alpha_pattern" => {
                let entries = value.as_object().ok_or_else(|| wrong("an object"))?;
                let entry = |(key, value): (&String, &Value)| Some((key.clone(), value.as_f64()?));
                let entries: Option<_> = entries.iter().map(entry).collect();
                self.alpha_pattern = entries.ok_or_else(|| wrong("numbers by module"))?;
            }
            "layers_to_transform" => {
                let layers = match value {
                    Value::Array(layers) => layers.iter().map(size).collect(),
                    one => size(one).map(|layer| vec![layer]),
                };
                self.layers_to_transform = Some(layers.ok_or_else(|| wrong("layer numbers"))?);
            }
            // These start from a changed base model, which PEFT makes anew when it loads the adapter.
            "init_lora_weights" => {
                let harmless = ["gaussian", "eva", "orthogonal"];
                if value.as_str().is_some_and(|kind| !harmless.contains(&kind)) {
                    let what = format!(
                        "the adapter has init_lora_weights = {value}, which changes the base model; convert it to a plain LoRA"
                    );
                    return Err(Error::unsupported(path, what));
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn check(&self, path: &Path) -> Result<()> {
        const MAX_RANK: usize = 1 << 16;
        let ranks = self.rank_pattern.values().chain([&self.r]);
        if let Some(rank) = ranks.copied().find(|rank| !(1..=MAX_RANK).contains(rank)) {
            return Err(Error::file(path, format!("a rank of {rank}; expected 1 to {MAX_RANK}")));
        }
        if let Some(alpha) = self.alpha_pattern.values().chain([&self.lora_alpha]).find(|alpha| !alpha.is_finite()) {
            return Err(Error::file(path, format!("an alpha of {alpha}")));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(Error::file(path, format!("lora_dropout is {}; expected 0 to below 1", self.lora_dropout)));
        }
        if let Some(name) = self.modules_to_save.iter().flatten().find(|name| whole(name).is_none()) {
            let what = format!("the adapter saves the module \"{name}\" whole; nibble knows embed_tokens and lm_head");
            return Err(Error::unsupported(path, what));
        }
        self.check_patterns().map_err(|what| Error::file(path, what))
    }

    /// Checks what is a regular expression. The message names the one that is wrong.
    pub(crate) fn check_patterns(&self) -> std::result::Result<(), String> {
        for modules in [&self.target_modules, &self.exclude_modules].into_iter().flatten() {
            if let TargetModules::Pattern(pattern) = modules
                && pattern != ALL_LINEAR
            {
                patterns::check(pattern)?;
            }
        }
        self.rank_pattern.keys().chain(self.alpha_pattern.keys()).try_for_each(|key| patterns::check(key))
    }

    /// Rank of a module: that of the first key in `rank_pattern` which, as a regular expression, is its path or the end of
    /// it, from a dot on; or `r`.
    pub fn rank_of(&self, module: &str) -> usize {
        patterns::find(&self.rank_pattern, module).unwrap_or(self.r)
    }

    /// α of a module, found as [`AdapterConfig::rank_of`] does.
    pub fn alpha_of(&self, module: &str) -> f64 {
        patterns::find(&self.alpha_pattern, module).unwrap_or(self.lora_alpha)
    }

    /// Doubles every rank and keeps every scale: what an adapter is that took a part of the base when it was made, and
    /// gives it back.
    pub(crate) fn double_rank(&mut self) {
        let by = if self.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        self.r *= 2;
        self.lora_alpha *= by;
        self.rank_pattern.values_mut().for_each(|rank| *rank *= 2);
        self.alpha_pattern.values_mut().for_each(|alpha| *alpha *= by);
    }

    /// Whether a linear layer, such as `model.layers.0.self_attn.q_proj`, carries an adapter.
    pub fn adapts(&self, module: &str) -> bool {
        let matches = |modules: &TargetModules| match modules {
            TargetModules::Pattern(word) if word == ALL_LINEAR => true,
            TargetModules::Pattern(pattern) => patterns::is(pattern, module),
            TargetModules::Names(names) => names.iter().any(|name| patterns::ends(module, name)),
        };
        let excluded = self.exclude_modules.as_ref().is_some_and(matches);
        // As in PEFT, layer numbers count where targets are names.
        let layer = || module.split('.').find_map(|part| part.parse::<usize>().ok());
        let in_layers = match (&self.target_modules, &self.layers_to_transform) {
            (Some(TargetModules::Names(_)), Some(layers)) if !layers.is_empty() => {
                layer().is_some_and(|layer| layers.contains(&layer))
            }
            _ => true,
        };
        !excluded && in_layers && self.target_modules.as_ref().is_some_and(matches)
    }

    /// Whether the embedding is saved whole, and whether the head is.
    pub fn saves(&self) -> [bool; 2] {
        let wanted: Vec<Whole> = self.modules_to_save.iter().flatten().filter_map(|name| whole(name)).collect();
        [wanted.contains(&Whole::Embedding), wanted.contains(&Whole::Head)]
    }

    /// The file's contents: sorted keys, the same ones that PEFT writes.
    pub fn to_json(&self) -> Value {
        let modules = |modules: &Option<TargetModules>| match modules {
            None => Value::Null,
            Some(TargetModules::Names(names)) => json!(names),
            Some(TargetModules::Pattern(pattern)) => json!(pattern),
        };
        let alphas: Map<String, Value> = self.alpha_pattern.iter().map(|(k, &v)| (k.clone(), number(v))).collect();
        let mut json = json!({
            "alpha_pattern": alphas,
            "base_model_name_or_path": self.base_model_name_or_path,
            "exclude_modules": modules(&self.exclude_modules),
            "init_lora_weights": true,
            "layers_to_transform": self.layers_to_transform,
            "lora_alpha": number(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "target_modules": modules(&self.target_modules),
            "task_type": self.task_type,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "modules_to_save": self.modules_to_save,
            "ensure_weight_tying": self.ensure_weight_tying,
            "bias": self.bias,
        });
        for (key, value) in inert().into_iter().chain(refused()) {
            json[key] = value;
        }
        json.sort_all_objects();
        json
    }
}

/// A number as PEFT writes it: without a fraction if it has none.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

/// A weight that may be saved whole.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whole {
    Embedding,
    Head,
}

/// The weight that a name in `modules_to_save` stands for.
fn whole(name: &str) -> Option<Whole> {
    match name {
        "embed_tokens" | "model.embed_tokens" => Some(Whole::Embedding),
        "lm_head" => Some(Whole::Head),
        _ => None,
    }
}
