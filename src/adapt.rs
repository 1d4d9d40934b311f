//! What a run trains: adapters by its settings, or every weight.

use crate::{
    model::Model,
    settings::{Method, Settings},
};
use anyhow::{Context, Result, ensure};
use nibble_kernels::linear::{self, Weight};
use nibble_models::{
    files::{
        atomic::atomic_folder,
        peft::{ALL_LINEAR, AdapterConfig, TargetModules},
    },
    llama::Init,
    tokenizer::Tokenizer,
};
use nibble_runtime::{DType, cuda::Gpu};
use std::path::Path;

/// Makes parameters trainable, and says how many.
pub fn attach(model: &mut Model, settings: &Settings) -> Result<Option<AdapterConfig>> {
    let config = match (settings.method, &settings.adapter_init) {
        (Method::Full, _) => {
            model.llama.train_all()?;
            None
        }
        (_, Some(dir)) => Some(model.attach(dir)?),
        (_, None) => Some(new_adapter(model, settings)?),
    };
    keep(model, settings)?;
    let parameters = model.llama.parameters();
    let count: usize = parameters.iter().map(|(_, _, value)| value.numel()).sum();
    crate::note!(
        "trains   {:.2}M parameters in {} tensors by {}",
        count as f64 / 1e6,
        parameters.len(),
        settings.method
    );
    Ok(config)
}

/// What layers keep, by the settings.
///
/// # Errors
/// This device has no use for dequantized weights, or no memory.
pub fn keep(model: &mut Model, settings: &Settings) -> Result<()> {
    let (llama, layers) = (&mut model.llama, settings.dequantized_layers);
    llama.activations = settings.activations.clone();
    llama.feed_forward_rows = settings.feed_forward_rows.unwrap_or(usize::MAX);
    if layers > 0 {
        let chip = Gpu::of(llama.device()).ok().map(Gpu::chip).filter(|_| llama.dtype != DType::F32);
        let mut linears = llama.layers.iter().flat_map(|layer| layer.linears());
        ensure!(
            linears.any(|linear| matches!(linear.weight, Weight::Quantized(_))),
            "--dequantized-layers {layers}: no weight is in 4 bits; give 0"
        );
        ensure!(
            chip.is_some_and(|chip| linear::dequantizes(chip, usize::MAX)),
            "--dequantized-layers {layers}: only products in 16 bits on Hopper GPUs dequantize weights as a whole; give 0"
        );
    }
    llama.hold_dequantized(layers)?;
    Ok(())
}

fn new_adapter(model: &mut Model, settings: &Settings) -> Result<AdapterConfig> {
    if !settings.new_tokens.is_empty() {
        model.add_tokens(&settings.new_tokens)?;
    }
    let Model { llama, checkpoint, .. } = model;
    let config = wanted(settings, llama.config.tie_word_embeddings);
    llama.add_lora(&config, settings.init, checkpoint.as_ref(), settings.seed)?;
    Ok(config)
}

/// The new adapter that the settings ask for, for a model whose embedding is its head or not.
pub fn wanted(settings: &Settings, tied: bool) -> AdapterConfig {
    let mut whole = settings.modules_to_save.clone();
    if !settings.new_tokens.is_empty() {
        // New rows are nothing before they are trained, on both sides.
        let needed: &[&str] = if tied { &["embed_tokens"] } else { &["embed_tokens", "lm_head"] };
        whole.extend(
            needed.iter().filter(|name| !settings.modules_to_save.iter().any(|n| n == *name)).map(|n| n.to_string()),
        );
    }
    let names = |names: &[String]| match names {
        [word] if word == ALL_LINEAR => TargetModules::Pattern(word.clone()),
        names => TargetModules::Names(names.to_vec()),
    };
    let stays_tied =
        tied && whole.iter().any(|name| name == "embed_tokens") && !whole.iter().any(|name| name == "lm_head");
    AdapterConfig {
        r: settings.rank,
        lora_alpha: settings.alpha,
        // Through text, so that 0.1 is written as 0.1 and not as the f32 nearest to it.
        lora_dropout: settings.dropout.to_string().parse().unwrap_or(0.0),
        use_rslora: settings.rslora,
        use_dora: settings.dora,
        target_modules: Some(match &settings.target_pattern {
            Some(pattern) => TargetModules::Pattern(pattern.clone()),
            None => names(&settings.targets),
        }),
        rank_pattern: settings.rank_pattern.clone(),
        alpha_pattern: settings.alpha_pattern.clone(),
        modules_to_save: (!whole.is_empty()).then_some(whole),
        ensure_weight_tying: stays_tied,
        base_model_name_or_path: settings.model.as_ref().map(|path| path.display().to_string()),
        ..AdapterConfig::default()
    }
}

/// Whether the adapter goes with another base than the model that it was made on: one that gave the adapter a part of its
/// weights and was quantized after that. (What a base that is not quantized gave is given back when the adapter is saved.)
pub fn changes_base(model: &Model, settings: &Settings) -> bool {
    let quantized = |weight: &Weight| matches!(weight, Weight::Quantized(_));
    settings.init != Init::Lora
        && model.llama.layers.iter().flat_map(|layer| layer.linears()).any(|linear| quantized(&linear.weight))
}

/// Writes that base as a 4-bit folder, which other programs need beside the adapter. Does nothing if it is there.
pub fn save_base(model: &Model, tokenizer: Option<&Tokenizer>, folder: &Path) -> Result<()> {
    if folder.exists() {
        return Ok(());
    }
    let dtype = model.stored_dtype()?;
    let write = |folder: &Path| -> Result<()> {
        model.llama.save(folder, dtype)?;
        tokenizer.map_or(Ok(()), |tokenizer| Ok(tokenizer.save(folder)?))
    };
    atomic_folder(folder, write)
        .with_context(|| format!("writing the base that the adapter is for, {}", folder.display()))
}
