//! A LoRA adapter as a GGUF file that llama.cpp loads beside its model (`--lora`).

use crate::{
    Error, LlamaConfig, Result,
    export::interleave,
    files::{
        gguf::{Entry, GgmlType, MetaValue, gguf_name, quantize, quants, write_gguf},
        peft::{Adapter, Factors},
    },
    merge::{Exact, Loss},
};
use nibble_runtime::{Tag, Tensor};
use std::path::Path;

/// The types that an adapter can be written in, with llama.cpp's number of a file of them.
pub const ADAPTER_KINDS: [(GgmlType, u32); 3] = [(GgmlType::F32, 0), (GgmlType::F16, 1), (GgmlType::BF16, 32)];

/// Writes `adapter`, made for a model of shape `config`, to `path` in type `kind`. llama.cpp multiplies `B·A` by α/r with
/// one α for all: where that is not a module's scale, B carries the difference.
///
/// # Errors
/// The adapter is a DoRA or has an embedding or head of its own, which the format has no place for; `kind` is none of
/// [`ADAPTER_KINDS`]; a module is none of the model's; the file cannot be written.
pub fn export_lora_gguf(
    adapter: &Adapter,
    config: &LlamaConfig,
    name: &str,
    kind: GgmlType,
    path: &Path,
) -> Result<Loss> {
    let reason = match adapter {
        Adapter { embedding: Some(_), .. } | Adapter { head: Some(_), .. } => Some("an embedding or head of its own"),
        Adapter { config, .. } if config.use_dora => Some("lengths of rows (DoRA)"),
        _ => None,
    };
    if let Some(reason) = reason {
        let what = format!("an adapter with {reason} has no form in GGUF; merge it: export-gguf without --lora");
        return Err(Error::Invalid(what));
    }
    let Some(&(_, file_type)) = ADAPTER_KINDS.iter().find(|(known, _)| *known == kind) else {
        return Err(Error::Invalid(format!("an adapter is written as f32, f16 or bf16, not {kind}")));
    };
    let alpha = adapter.config.lora_alpha as f32;
    let text = |text: &str| MetaValue::String(text.into());
    let keys = [
        ("general.architecture", text("llama")),
        ("general.type", text("adapter")),
        ("general.name", text(name)),
        ("general.file_type", MetaValue::U32(file_type)),
        ("general.quantization_version", MetaValue::U32(2)),
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", MetaValue::F32(alpha)),
    ];
    let keys: Vec<_> = keys.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
    let (mut entries, mut matrices) = (Vec::new(), Vec::new());
    for (module, Factors { a, b, .. }) in &adapter.factors {
        let name = gguf_name(&format!("{module}.weight"));
        let name = name.ok_or_else(|| Error::Invalid(format!("{module} has no name in GGUF")))?;
        let heads = match module.rsplit_once('.') {
            Some((_, "q_proj")) => Some(config.num_heads),
            Some((_, "k_proj")) => Some(config.num_kv_heads),
            _ => None,
        };
        let b = heads.map_or(Ok(b.clone()), |heads| interleave(b, heads))?;
        let carried = adapter.scale(module) * a.shape()[0] as f32 / alpha;
        for (part, matrix, by) in [("lora_a", a.clone(), 1.0), ("lora_b", b, carried)] {
            entries.push(Entry { name: format!("{name}.{part}"), kind, shape: matrix.shape().to_vec() });
            matrices.push((matrix, by));
        }
    }
    let mut loss = Loss::default();
    let mut matrices = matrices.into_iter();
    write_gguf(path, &keys, &entries, |entry| {
        let (matrix, by) = matrices.next().ok_or_else(|| Error::Invalid("more entries than matrices".into()))?;
        let values: Vec<f32> = matrix.as_slice::<f32>()?.iter().map(|x| x * by).collect();
        let bytes = quantize(kind, &values).ok_or_else(|| Error::Invalid(format!("{kind} is not written")))?;
        let mut written = vec![0.0; values.len()];
        if !quants::dequantize(kind, &bytes, &mut written) {
            return Err(Error::Invalid(format!("{} cannot be read back as {kind}", entry.name)));
        }
        let tensor = |values: &[f32]| Tensor::from_slice(values, &[values.len()], Tag::Workspace);
        loss.add(&Exact::unchanged(tensor(&values)?), &tensor(&written)?)?;
        Ok(bytes)
    })?;
    Ok(loss)
}
