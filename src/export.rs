//! Models for other programs: adapters merged into a Hugging Face folder, and GGUF files.

use crate::{
    cli::{AdapterPart, DTypeChoice, ExportGgufArgs, MergeArgs},
    hub, report,
};
use anyhow::{Context, Result, bail, ensure};
use nibble_kernels::quantize::{ScaleRounding, dequantize, quantize};
use nibble_models::{
    export::{KINDS, export_gguf},
    files::{
        atomic::{atomic_write, write_json},
        checkpoint::{Checkpoint, CheckpointTensor, write_checkpoint},
        gguf::GgmlType,
        peft::read_adapter,
        safetensors::stream_shards,
    },
    lora_gguf::export_lora_gguf,
    merge::{Combination, Loss, Merged, Part},
    tokenizer::{GgufVocab, Tokenizer},
};
use nibble_runtime::{DType, Tag};
use std::path::Path;

/// Files of a folder that tell how to use its model.
const COMPANIONS: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.model",
];

fn parts(adapters: &[AdapterPart]) -> Result<Vec<Part>> {
    let read = |part: &AdapterPart| {
        Ok(Part { path: part.dir.clone(), adapter: read_adapter(&part.dir)?, weight: part.weight })
    };
    adapters.iter().map(read).collect()
}

/// Writes a model with adapters merged into it as a Hugging Face folder.
pub fn merge_command(args: &MergeArgs) -> Result<()> {
    let out = &args.out;
    if out.join("config.json").exists() || out.is_file() {
        bail!("{} already holds a model; choose another --out or move it away", out.display());
    }
    let checkpoint = Checkpoint::open(&hub::model(&args.model)?)?;
    let dtype = match args.dtype {
        DTypeChoice(Some(dtype)) => dtype,
        DTypeChoice(None) => checkpoint.dtype()?,
    };
    let combination = Combination { rule: args.combine, density: args.density, seed: args.seed };
    let merged = Merged::new(&checkpoint, parts(&args.adapter)?, combination)?;
    let loss = match args.quant {
        None => write_dense(&merged, dtype, args.max_shard.map_or(usize::MAX, |most| most.0), out)?,
        Some(_) => write_quantized(&merged, dtype, args)?,
    };
    companions(&merged, out)?;
    let form = args.quant.map_or(dtype.to_string(), |quant| quant.to_string());
    report_loss(&loss, &form);
    crate::note!("wrote {}", out.display());
    Ok(())
}

/// Weight by weight, then the configuration.
fn write_dense(merged: &Merged, dtype: DType, most: usize, out: &Path) -> Result<Loss> {
    let weights = merged.weights();
    let outlines: Vec<_> = weights.iter().map(|(name, shape)| (name.clone(), dtype, shape.clone())).collect();
    std::fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
    let bar = report::bar("merge", weights.len());
    let mut loss = Loss::default();
    stream_shards(out, &outlines, &[("format", "pt")], most, |i| {
        let (name, shape) = &weights[i];
        let exact = merged.weight(name, shape)?;
        let written = exact.value.clone().into_dtype(dtype, Tag::Workspace)?;
        loss.add(&exact, &written)?;
        bar.inc(1);
        Ok(written)
    })?;
    bar.finish_and_clear();
    write_json(&out.join("config.json"), &merged.config().to_json(dtype))?;
    Ok(loss)
}

/// As `quantize` writes a folder: linear weights in 4 bits, the others as they are.
fn write_quantized(merged: &Merged, dtype: DType, args: &MergeArgs) -> Result<Loss> {
    let quant_type = args.quant.context("a merged model is quantized if --quant says so")?;
    let (tag, block_size) = (Tag::Weights, args.block_size);
    let scales = (!args.no_double_quant).then(ScaleRounding::default);
    let all = merged.weights();
    let bar = report::bar("merge", all.len());
    let mut loss = Loss::default();
    let mut weights = Vec::new();
    for (name, shape) in all {
        let exact = merged.weight(&name, &shape)?;
        let dense = exact.value.clone().into_dtype(dtype, tag)?;
        let (weight, written) = match name.ends_with("_proj.weight") {
            true => {
                let quantized = quantize(&dense, quant_type, block_size, scales, dtype, tag)?;
                let written = dequantize(&quantized, Tag::Workspace)?;
                (CheckpointTensor::Quantized(quantized), written)
            }
            false => (CheckpointTensor::Dense(dense.clone()), dense),
        };
        loss.add(&exact, &written)?;
        weights.push((name, weight));
        bar.inc(1);
    }
    bar.finish_and_clear();
    write_checkpoint(&args.out, merged.config(), dtype, &weights)?;
    Ok(loss)
}

/// Tokenizer, chat template and generation settings: as they are from a folder, made from a GGUF's header. The tokenizer of
/// an adapter that has tokens of its own is that beside it.
fn companions(merged: &Merged, out: &Path) -> Result<()> {
    let checkpoint = merged.checkpoint();
    if let Some(folder) = merged.tokenizer_folder() {
        return Ok(Tokenizer::from_folder(folder)?.save(out)?);
    }
    if let Some(gguf) = checkpoint.gguf() {
        return Ok(Tokenizer::from_gguf(gguf)?.save(out)?);
    }
    let folder = checkpoint.shards().map_or(checkpoint.path(), |shards| shards.folder());
    for name in COMPANIONS {
        let path = folder.join(name);
        if path.is_file() {
            let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            atomic_write(&out.join(name), |file| file.write_all(&bytes))?;
        }
    }
    if !out.join("tokenizer.json").exists() {
        eprintln!("warning: {} has no tokenizer.json, so none was written", folder.display());
    }
    Ok(())
}

/// Writes a model, with adapters merged into it if there are any, as a GGUF file.
pub fn export_gguf_command(args: &ExportGgufArgs) -> Result<()> {
    let out = &args.out;
    ensure!(!out.exists(), "{} exists already; choose another --out or move it away", out.display());
    let wanted = args.r#type.to_uppercase();
    let kind = KINDS.into_iter().map(|(kind, _)| kind).find(|kind| kind.to_string() == wanted);
    let kind = kind.with_context(|| {
        let known: Vec<String> = KINDS.iter().map(|(kind, _)| kind.to_string().to_lowercase()).collect();
        format!("--type: expected one of {}, not {}", known.join(", "), args.r#type)
    })?;
    let checkpoint = Checkpoint::open(&hub::model(&args.model)?)?;
    if args.lora {
        return export_adapter(args, kind, &checkpoint);
    }
    let merged = Merged::new(&checkpoint, parts(&args.adapter)?, Combination::default())?;
    let vocab = match (merged.tokenizer_folder(), checkpoint.gguf()) {
        (Some(folder), _) => GgufVocab::from_tokenizer(&Tokenizer::from_folder(folder)?)?,
        (None, Some(gguf)) => GgufVocab::read(gguf)?,
        (None, None) => {
            let folder = checkpoint.shards().map_or(checkpoint.path(), |shards| shards.folder());
            GgufVocab::from_tokenizer(&Tokenizer::from_folder(folder)?)?
        }
    };
    let bar = report::bar("export", merged.weights().len());
    let loss = export_gguf(&merged, &vocab, kind, out, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    report_loss(&loss, &kind.to_string());
    crate::note!("wrote {}", out.display());
    Ok(())
}

/// Writes one adapter as a GGUF file of its own.
fn export_adapter(args: &ExportGgufArgs, kind: GgmlType, checkpoint: &Checkpoint) -> Result<()> {
    let [part] = &args.adapter[..] else { bail!("--lora writes one adapter: give one --adapter") };
    ensure!(part.weight == 1.0, "--lora writes the adapter as it is; llama.cpp takes a weight when it loads it");
    let adapter = read_adapter(&part.dir)?;
    // That it is for this model: the order of the rows of q and k depends on the heads.
    let merged = Merged::new(checkpoint, parts(&args.adapter)?, Combination::default())?;
    let name = part.dir.file_name().map_or("adapter".into(), |name| name.to_string_lossy());
    let loss = export_lora_gguf(&adapter, merged.config(), &name, kind, &args.out)?;
    report_loss(&loss, &kind.to_string());
    crate::note!("wrote {}", args.out.display());
    Ok(())
}

fn report_loss(loss: &Loss, form: &str) {
    let change = loss.of_change().map_or(String::new(), |of| format!(", {of:.3e} of what the adapters changed"));
    crate::note!(
        "lossy    weights as {form} differ by at most {:.3e}, by {:.3e} of their norm{change}",
        loss.largest,
        loss.relative()
    );
    if loss.of_change().is_some_and(|of| of > 0.5) {
        eprintln!("warning: rounding to {form} is about as large as what the adapters learned; compare with eval");
    }
}
