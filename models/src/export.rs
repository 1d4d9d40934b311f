//! A model as a GGUF file that llama.cpp loads.

use crate::{
    Error, LlamaConfig, Result,
    files::gguf::{Entry, GgmlType, MetaValue, gguf_name, quantize, quants, write_gguf},
    merge::{Loss, Merged},
    tokenizer::GgufVocab,
};
use nibble_kernels::rotary::{RopeConfig, RopeScaling};
use nibble_runtime::{Tag, Tensor};
use std::path::Path;

/// The types of matrices that can be written, with llama.cpp's number of a file of them.
pub const KINDS: [(GgmlType, u32); 8] = [
    (GgmlType::F32, 0),
    (GgmlType::F16, 1),
    (GgmlType::BF16, 32),
    (GgmlType::Q8_0, 7),
    (GgmlType::Q6_K, 18),
    (GgmlType::Q5_0, 8),
    (GgmlType::Q4_K, 14),
    (GgmlType::Q4_0, 2),
];

/// Writes `merged` to `path` with matrices of type `kind` and norms in f32; `progress` is told the tensors done. Embedding
/// and head have more bits: Q8_0 in a file of Q4_0 or Q5_0, Q6_K in one of Q4_K. Matrices whose rows are no whole blocks
/// are Q5_0 instead of Q4_K, Q8_0 instead of Q6_K, and else F16.
///
/// # Errors
/// The model's rotary scaling has no form in GGUF, the vocabulary is larger than the model's, `kind` is none of [`KINDS`],
/// or the file cannot be written.
pub fn export_gguf(
    merged: &Merged,
    vocab: &GgufVocab,
    kind: GgmlType,
    path: &Path,
    mut progress: impl FnMut(usize),
) -> Result<Loss> {
    let config = merged.config();
    let name =
        merged.checkpoint().path().file_stem().map_or("model".into(), |name| name.to_string_lossy().into_owned());
    let keys = keys(config, kind, name, vocab)?;
    let mut entries = Vec::new();
    let mut sources = Vec::new();
    for (name, shape) in merged.weights() {
        let file_name = gguf_name(&name).ok_or_else(|| Error::Invalid(format!("{name} has no name in GGUF")))?;
        entries.push(Entry { name: file_name, kind: kind_of(&name, &shape, kind), shape: shape.clone() });
        sources.push((name, shape));
    }
    let divisors = divisors(&config.rope, config.head_dim);
    if let Some(divisors) = &divisors {
        entries.push(Entry { name: "rope_freqs.weight".into(), kind: GgmlType::F32, shape: vec![divisors.len()] });
    }
    let mut loss = Loss::default();
    let mut sources = sources.into_iter();
    let mut done = 0;
    write_gguf(path, &keys, &entries, |entry| {
        let encode = |values: &[f32]| {
            quantize(entry.kind, values).ok_or_else(|| Error::Invalid(format!("{} is not written", entry.kind)))
        };
        let Some((name, shape)) = sources.next() else { return encode(divisors.as_deref().unwrap_or_default()) };
        let mut exact = merged.weight(&name, &shape)?;
        let heads = match name.rsplit_once("self_attn.") {
            Some((_, "q_proj.weight")) => Some(config.num_heads),
            Some((_, "k_proj.weight")) => Some(config.num_kv_heads),
            _ => None,
        };
        if let Some(heads) = heads {
            exact.value = interleave(&exact.value, heads)?;
        }
        let mut bytes = Vec::new();
        loss.add_parts(&exact, |_, values| {
            let part = encode(values)?;
            let mut written = vec![0.0; values.len()];
            if !quants::dequantize(entry.kind, &part, &mut written) {
                return Err(Error::Invalid(format!("{name} cannot be read back as {}", entry.kind)));
            }
            bytes.extend(part);
            Ok(written)
        })?;
        done += 1;
        progress(done);
        Ok(bytes)
    })?;
    Ok(loss)
}

fn kind_of(name: &str, shape: &[usize], kind: GgmlType) -> GgmlType {
    let table = name == "lm_head.weight" || name == "model.embed_tokens.weight";
    let kind = match kind {
        GgmlType::Q4_0 | GgmlType::Q5_0 if table => GgmlType::Q8_0,
        GgmlType::Q4_K if table => GgmlType::Q6_K,
        kind => kind,
    };
    match *shape {
        [_, columns] if columns.is_multiple_of(kind.block) => kind,
        [_, columns] if columns.is_multiple_of(32) && kind == GgmlType::Q4_K => GgmlType::Q5_0,
        [_, columns] if columns.is_multiple_of(32) && kind == GgmlType::Q6_K => GgmlType::Q8_0,
        [_, _] => GgmlType::F16,
        _ => GgmlType::F32,
    }
}

/// The rows of q or k in GGUF's order: the two halves of each head alternate.
pub(crate) fn interleave(weight: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, columns) = weight.dims2("q or k")?;
    let (half, width) = (rows / heads / 2, columns * weight.dtype().size());
    let bytes = weight.bytes()?;
    let mut out = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        let (head, within) = (row / (2 * half), row % (2 * half));
        let source = head * 2 * half + within % 2 * half + within / 2;
        out.extend_from_slice(&bytes[source * width..(source + 1) * width]);
    }
    Ok(Tensor::from_bytes(&out, weight.dtype(), weight.shape(), Tag::Workspace)?)
}

/// What Llama 3's scaling divides each frequency by, which is how GGUF stores it.
fn divisors(rope: &RopeConfig, head_dim: usize) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { .. } = rope.scaling else { return None };
    let plain = RopeConfig { scaling: RopeScaling::Default, ..*rope };
    let (plain, scaled) = (plain.inverse_frequencies(head_dim, 1), rope.inverse_frequencies(head_dim, 1));
    Some(plain.iter().zip(scaled).map(|(plain, scaled)| plain / scaled).collect())
}

fn keys(c: &LlamaConfig, kind: GgmlType, name: String, vocab: &GgufVocab) -> Result<Vec<(String, MetaValue)>> {
    use MetaValue::{F32, F32s, I32s, String as Text, Strings, U32};
    let number = |value: usize| {
        u32::try_from(value).map(U32).map_err(|_| Error::Invalid(format!("{value} is more than a GGUF key holds")))
    };
    let (_, file_type) = *KINDS
        .iter()
        .find(|(known, _)| *known == kind)
        .ok_or_else(|| Error::Invalid(format!("nibble does not write {kind}")))?;
    let mut keys = vec![
        ("general.architecture", Text("llama".into())),
        ("general.type", Text("model".into())),
        ("general.name", Text(name)),
        ("general.file_type", U32(file_type)),
        ("general.quantization_version", U32(2)),
        ("llama.vocab_size", number(c.vocab_size)?),
        ("llama.context_length", number(c.max_position_embeddings)?),
        ("llama.embedding_length", number(c.hidden_size)?),
        ("llama.block_count", number(c.num_layers)?),
        ("llama.feed_forward_length", number(c.intermediate_size)?),
        ("llama.attention.head_count", number(c.num_heads)?),
        ("llama.attention.head_count_kv", number(c.num_kv_heads)?),
        ("llama.attention.key_length", number(c.head_dim)?),
        ("llama.attention.value_length", number(c.head_dim)?),
        ("llama.attention.layer_norm_rms_epsilon", F32(c.rms_norm_eps)),
        ("llama.rope.dimension_count", number(c.head_dim)?),
        ("llama.rope.freq_base", F32(c.rope.theta as f32)),
    ];
    match c.rope.scaling {
        RopeScaling::Default | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            keys.push(("llama.rope.scaling.type", Text("linear".into())));
            keys.push(("llama.rope.scaling.factor", F32(factor as f32)));
        }
        RopeScaling::Dynamic { .. } => {
            return Err(Error::Invalid("dynamic rotary scaling has no form in GGUF".into()));
        }
    }
    let GgufVocab { mut tokens, mut token_types, mut scores, .. } = vocab.clone();
    if tokens.len() > c.vocab_size {
        let what = format!("the tokenizer has {} tokens and the model {}", tokens.len(), c.vocab_size);
        return Err(Error::Invalid(what));
    }
    // llama.cpp wants a token for every row of the embedding.
    token_types.resize(tokens.len(), GgufVocab::NORMAL);
    token_types.resize(c.vocab_size, GgufVocab::UNUSED);
    tokens.extend((tokens.len()..c.vocab_size).map(|id| format!("[PAD{id}]")));
    keys.push(("tokenizer.ggml.model", Text(vocab.model.clone())));
    keys.push(("tokenizer.ggml.tokens", Strings(tokens)));
    keys.push(("tokenizer.ggml.token_type", I32s(token_types)));
    // Byte-level vocabularies have merges, maybe none; SentencePiece's have scores.
    if vocab.model == "gpt2" || !vocab.merges.is_empty() {
        keys.push(("tokenizer.ggml.merges", Strings(vocab.merges.clone())));
    }
    if !scores.is_empty() {
        scores.resize(c.vocab_size, -1000.0);
        keys.push(("tokenizer.ggml.scores", F32s(scores)));
    }
    let texts = [("tokenizer.ggml.pre", &vocab.pre), ("tokenizer.chat_template", &vocab.chat_template)];
    keys.extend(texts.into_iter().filter_map(|(key, text)| Some((key, Text(text.clone()?)))));
    let ids = [
        ("tokenizer.ggml.bos_token_id", vocab.bos),
        ("tokenizer.ggml.eos_token_id", vocab.eos),
        ("tokenizer.ggml.eot_token_id", vocab.eot),
        ("tokenizer.ggml.padding_token_id", vocab.pad),
        ("tokenizer.ggml.unknown_token_id", vocab.unk),
    ];
    keys.extend(ids.into_iter().filter_map(|(key, id)| Some((key, U32(id?)))));
    let flags = [
        ("tokenizer.ggml.add_bos_token", vocab.add_bos),
        ("tokenizer.ggml.add_eos_token", vocab.add_eos),
        ("tokenizer.ggml.add_space_prefix", vocab.add_space_prefix),
    ];
    keys.extend(flags.into_iter().filter_map(|(key, flag)| Some((key, MetaValue::Bool(flag?)))));
    Ok(keys.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
}
