//! What a file or folder holds, for people to read.

use super::{
    checkpoint::{Checkpoint, CheckpointKind},
    gguf::GgufFile,
    peft::{self, Factors, TargetModules, read_adapter},
    safetensors::SafetensorsFile,
};
use crate::{Error, LlamaConfig, Result};
use std::{
    collections::BTreeMap,
    fmt::{Display, Write},
    path::Path,
};

/// Describes a Hugging Face folder, an adapter folder, a GGUF or a safetensors file, in lines of `name  value`.
///
/// # Errors
/// As the reader of what it is; [`Error::Unsupported`] if it is none of them.
pub fn describe(path: &Path) -> Result<String> {
    let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
    let mut lines = Lines(String::new());
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension {
        _ if metadata.is_dir() && path.join(peft::CONFIG_FILE).is_file() => describe_adapter(path, &mut lines)?,
        _ if metadata.is_dir() => describe_folder(path, &mut lines)?,
        Some("gguf") => describe_gguf(path, &mut lines)?,
        Some("safetensors") => describe_safetensors(path, &mut lines)?,
        _ => {
            let what = "expected a model or adapter folder, a .gguf or a .safetensors file";
            return Err(Error::unsupported(path, what));
        }
    }
    Ok(lines.0)
}

/// Lines of a report, with the values in a column.
struct Lines(String);

impl Lines {
    fn add(&mut self, name: &str, value: impl Display) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{name:<14} {value}");
    }

    fn tensors(&mut self, tally: &Tally) {
        self.add("tensors", tally.count);
        for (kind, (count, bytes)) in &tally.by_type {
            self.add(&format!("  {kind}"), format!("{count} tensors, {}", human_bytes(*bytes)));
        }
    }
}

/// Tensors and their bytes, by element type.
#[derive(Default)]
struct Tally {
    count: usize,
    by_type: BTreeMap<String, (usize, usize)>,
}

impl Tally {
    fn add(&mut self, kind: impl Display, bytes: usize) {
        self.count += 1;
        let entry = self.by_type.entry(kind.to_string()).or_default();
        *entry = (entry.0 + 1, entry.1 + bytes);
    }

    fn add_file(&mut self, file: &SafetensorsFile) -> Result<()> {
        for name in file.names() {
            let view = file.view(&name)?;
            self.add(view.format, view.bytes.len());
        }
        Ok(())
    }
}

/// `3.2 MiB` and the like.
fn human_bytes(bytes: usize) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64 / 1024.0;
    if value < 1.0 {
        return format!("{bytes} bytes");
    }
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", units[unit])
}

fn describe_config(config: &LlamaConfig, lines: &mut Lines) {
    let c = config;
    lines.add("vocabulary", c.vocab_size);
    lines.add("hidden", format!("{} (feed-forward {})", c.hidden_size, c.intermediate_size));
    lines.add("layers", c.num_layers);
    lines.add("heads", format!("{} of {} dimensions, {} for keys and values", c.num_heads, c.head_dim, c.num_kv_heads));
    lines.add("rotary", format!("theta {}, {:?}", c.rope.theta, c.rope.scaling));
    lines.add("positions", c.max_position_embeddings);
    lines.add("norm epsilon", c.rms_norm_eps);
    lines.add("head", if c.tie_word_embeddings { "tied to the embedding" } else { "its own matrix" });
    lines.add("parameters", parameters(c));
    let bos = c.bos_token_id.map_or("none".to_string(), |id| id.to_string());
    lines.add("bos, eos", format!("{bos}, {:?}", c.eos_token_ids));
}

/// Weights of a model, the tied head counted once. Sizes have been checked to be small enough for the products.
fn parameters(c: &LlamaConfig) -> u64 {
    let (d, f, v) = (c.hidden_size as u64, c.intermediate_size as u64, c.vocab_size as u64);
    let (q, kv) = ((c.num_heads * c.head_dim) as u64, (c.num_kv_heads * c.head_dim) as u64);
    let layer = 2 * d * q + 2 * d * kv + 3 * d * f + 2 * d;
    let tables = if c.tie_word_embeddings { 1 } else { 2 };
    c.num_layers as u64 * layer + tables * v * d + d
}

fn describe_folder(path: &Path, lines: &mut Lines) -> Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    lines.add("kind", format!("Llama, {} folder", checkpoint.kind()));
    describe_config(checkpoint.config(), lines);
    let mut tally = Tally::default();
    if let Some(shards) = checkpoint.shards() {
        lines.add("files", shards.files().len());
        shards.files().iter().try_for_each(|file| tally.add_file(file))?;
        if checkpoint.kind() == CheckpointKind::Bitsandbytes {
            let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
            for name in shards.names() {
                if let Some(kind) = super::bnb::describe(shards, name)? {
                    *kinds.entry(kind).or_default() += 1;
                }
            }
            for (kind, count) in kinds {
                lines.add("4-bit weights", format!("{count}: {kind}"));
            }
        }
    }
    lines.tensors(&tally);
    Ok(())
}

fn describe_gguf(path: &Path, lines: &mut Lines) -> Result<()> {
    let file = GgufFile::open(path)?;
    lines.add("kind", format!("GGUF version {}", file.version()));
    for (label, key) in [("architecture", "general.architecture"), ("name", "general.name")] {
        if let Some(value) = file.get_str(key) {
            lines.add(label, one_line(value));
        }
    }
    match file.llama_config() {
        Ok(config) => describe_config(&config, lines),
        Err(error) => lines.add("not runnable", error),
    }
    if let Some(kind) = file.get_str("tokenizer.ggml.model") {
        let tokens = file.array_len("tokenizer.ggml.tokens").unwrap_or(0);
        lines.add("tokenizer", format!("{} with {tokens} tokens", one_line(kind)));
    }
    lines.add("chat template", if file.get_str("tokenizer.chat_template").is_some() { "yes" } else { "no" });
    let mut tally = Tally::default();
    for (_, tensor) in file.tensors() {
        let note = if tensor.kind.is_readable() { "" } else { " (not readable)" };
        tally.add(format!("{}{note}", tensor.kind), tensor.size_bytes());
    }
    lines.tensors(&tally);
    Ok(())
}

fn describe_adapter(path: &Path, lines: &mut Lines) -> Result<()> {
    let adapter = read_adapter(path)?;
    let config = &adapter.config;
    lines.add("kind", "LoRA adapter (PEFT)");
    lines.add("base model", config.base_model_name_or_path.as_deref().map_or("not named".into(), one_line));
    let rslora = if config.use_rslora { ", scaled by alpha/sqrt(r)" } else { "" };
    lines.add("rank, alpha", format!("{}, {}{rslora}", config.r, config.lora_alpha));
    lines.add("dropout", config.lora_dropout);
    match &config.target_modules {
        Some(TargetModules::Names(names)) => lines.add("targets", one_line(&names.join(", "))),
        Some(TargetModules::Pattern(pattern)) => lines.add("targets", one_line(pattern)),
        None => {}
    }
    if config.use_dora {
        lines.add("kind of adapter", "DoRA");
    }
    lines.add("modules", adapter.factors.len());
    let modules = adapter.factors.values();
    let tensors = modules.flat_map(|Factors { a, b, magnitude }| [Some(a), Some(b), magnitude.as_ref()]);
    let tensors = tensors.chain([adapter.embedding.as_ref(), adapter.head.as_ref()]).flatten();
    let parameters: usize = tensors.map(|tensor| tensor.numel()).sum();
    lines.add("parameters", parameters);
    let mut tally = Tally::default();
    tally.add_file(&SafetensorsFile::open(&path.join(peft::TENSORS_FILE))?)?;
    lines.tensors(&tally);
    Ok(())
}

fn describe_safetensors(path: &Path, lines: &mut Lines) -> Result<()> {
    let file = SafetensorsFile::open(path)?;
    lines.add("kind", "safetensors file");
    for (key, value) in file.metadata() {
        lines.add("metadata", format!("{} = {}", one_line(&key), one_line(&value)));
    }
    let mut tally = Tally::default();
    tally.add_file(&file)?;
    lines.tensors(&tally);
    for name in file.names() {
        let view = file.view(&name)?;
        lines.add("", format!("{}  {} {:?}", one_line(&name), view.format, view.shape));
    }
    Ok(())
}

/// Text from a file, without line breaks or control characters, and not endless.
fn one_line(text: &str) -> String {
    let shown: String = text.chars().take(200).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(200).is_some() { format!("{shown}...") } else { shown }
}
