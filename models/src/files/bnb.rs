//! 4-bit weights as bitsandbytes stores them in safetensors, and the part of `config.json` that announces them.
//!
//! Beside `<name>` (u8 `[bytes, 1]`) lie `<name>.absmax`, `.quant_map`, for double quantization `.nested_absmax` and
//! `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON as a u8 tensor.

use super::shards::Shards;
use crate::{Error, Result, config::dtype_name};
use nibble_kernels::quantize::{Absmax, QuantTensor, QuantType};
use nibble_runtime::{DType, Device, Tag, Tensor};
use serde::Deserialize;
use serde_json::{Value, json};

/// The JSON beside a weight.
#[derive(Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

fn state_key(name: &str, quant_type: QuantType) -> String {
    format!("{name}.quant_state.bitsandbytes__{quant_type}")
}

/// The code book of a 4-bit weight; `None` if the tensor is not one.
pub fn quant_type(shards: &Shards, name: &str) -> Option<QuantType> {
    [QuantType::Nf4, QuantType::Fp4].into_iter().find(|&quant_type| shards.has(&state_key(name, quant_type)))
}

/// How the 4-bit weight `name` is quantized, for people to read; `None` if the tensor is not one.
///
/// # Errors
/// [`Error::File`]: the JSON beside it is malformed.
pub fn describe(shards: &Shards, name: &str) -> Result<Option<String>> {
    let Some(quant_type) = quant_type(shards, name) else { return Ok(None) };
    let state = read_state(shards, name, quant_type)?;
    let scales = match state.nested_blocksize {
        Some(block_size) => format!("double quantization in blocks of {block_size}"),
        None => "scales in f32".into(),
    };
    Ok(Some(format!("{quant_type} in blocks of {}, {scales}", state.blocksize)))
}

fn bad(shards: &Shards, name: &str, what: String) -> Error {
    match shards.file_of(name) {
        Ok(file) => Error::file(file.path(), format!("4-bit weight \"{name}\": {what}")),
        Err(error) => error,
    }
}

fn read_state(shards: &Shards, name: &str, quant_type: QuantType) -> Result<QuantState> {
    let state = shards.view(&state_key(name, quant_type))?.bytes;
    serde_json::from_slice(state).map_err(|e| bad(shards, name, format!("its quant_state: {e}")))
}

/// Reads the 4-bit weight `name`.
///
/// # Errors
/// [`Error::Mismatch`]: a part is missing. [`Error::File`]: a part has the wrong type or length, the JSON is malformed,
/// or a scale is not finite. [`Error::Unsupported`]: another code book than the one the type stands for.
pub fn read_quantized(shards: &Shards, name: &str, tag: Tag) -> Result<QuantTensor> {
    let path = shards.file_of(name)?.path();
    let bad = |what: String| bad(shards, name, what);
    let quant_type = quant_type(shards, name).ok_or_else(|| bad("its quant_state is missing".into()))?;
    let state = read_state(shards, name, quant_type)?;
    if state.quant_type != quant_type.to_string() {
        return Err(bad(format!("its quant_state says \"{}\" and its name {quant_type}", state.quant_type)));
    }
    let dtype = match state.dtype.as_str() {
        "float32" => DType::F32,
        "float16" => DType::F16,
        "bfloat16" => DType::BF16,
        other => return Err(bad(format!("dtype \"{other}\"; expected float32, float16 or bfloat16"))),
    };
    let part = |suffix: &str, dtype: DType| -> Result<Tensor> {
        let key = format!("{name}.{suffix}");
        let view = shards.view(&key)?;
        if view.dtype() != Some(dtype) {
            return Err(bad(format!("its {suffix} holds {}; expected {dtype}", view.format)));
        }
        // Some writers store vectors as [n, 1].
        let length = view.bytes.len() / dtype.size();
        Ok(Tensor::from_bytes(view.bytes, dtype, &[length], tag)?)
    };
    let map = part("quant_map", DType::F32)?;
    if map.as_slice::<f32>()? != quant_type.quant_map() {
        let what = format!("\"{name}\" uses a code book of its own, which is not the {quant_type} that nibble runs");
        return Err(Error::unsupported(path, what));
    }
    let absmax = if shards.has(&format!("{name}.nested_absmax")) {
        if state.nested_dtype.as_deref().is_some_and(|dtype| dtype != "float32") {
            return Err(bad(format!("nested_dtype {:?}; expected float32", state.nested_dtype)));
        }
        let offset = state.nested_offset.ok_or_else(|| bad("its quant_state lacks nested_offset".into()))?;
        Absmax::Double {
            codes: part("absmax", DType::U8)?,
            absmax2: part("nested_absmax", DType::F32)?,
            code: part("nested_quant_map", DType::F32)?,
            offset: Tensor::from_slice(&[offset as f32], &[1], tag)?,
            block_size: state.nested_blocksize.ok_or_else(|| bad("its quant_state lacks nested_blocksize".into()))?,
        }
    } else {
        Absmax::Single(part("absmax", DType::F32)?)
    };
    // Whatever type the bytes are stored as (bnb_4bit_quant_storage), they are the packed codes.
    let bytes = shards.view(name)?.bytes;
    let packed = Tensor::from_bytes(bytes, DType::U8, &[bytes.len()], tag)?;
    shards.file_of(name)?.release_tensor(name);
    QuantTensor::new_checked(packed, absmax, quant_type, state.blocksize, state.shape, dtype)
        .map_err(|e| bad(e.to_string()))
}

/// The tensors that stand for the 4-bit weight `name` in a file.
///
/// # Errors
/// The parts of `weight` do not fit together.
pub fn quantized_parts(name: &str, weight: &QuantTensor) -> Result<Vec<(String, Tensor)>> {
    let tag = Tag::Workspace;
    let weight = &weight.to_device(Device::Cpu, tag)?;
    weight.validate()?;
    let quant_map = Tensor::from_slice(&weight.quant_type.quant_map(), &[16], tag)?;
    // Spelled as Python's json.dumps does, so that the files are the reference's to the byte.
    let [rows, columns] = weight.shape[..] else {
        return Err(Error::Invalid(format!("{name}: a quantized weight of shape {:?}", weight.shape)));
    };
    let mut state = format!(
        "{{\"quant_type\": \"{}\", \"blocksize\": {}, \"dtype\": \"{}\", \"shape\": [{rows}, {columns}]",
        weight.quant_type,
        weight.block_size,
        dtype_name(weight.dtype),
    );
    let mut parts = Vec::new();
    let mut part = |suffix: &str, tensor: Tensor| parts.push((format!("{name}.{suffix}"), tensor));
    match &weight.absmax {
        Absmax::Single(absmax) => part("absmax", absmax.clone()),
        Absmax::Double { codes, absmax2, code, offset, block_size } => {
            part("absmax", codes.clone());
            part("nested_absmax", absmax2.clone());
            part("nested_quant_map", code.clone());
            let offset = offset.to_f32()?.first().copied().map_or(Value::Null, |offset| json!(f64::from(offset)));
            state += &format!(
                ", \"nested_blocksize\": {block_size}, \"nested_dtype\": \"float32\", \"nested_offset\": {offset}"
            );
        }
    }
    part("quant_map", quant_map);
    state.push('}');
    parts.push((state_key(name, weight.quant_type), Tensor::from_slice(state.as_bytes(), &[state.len()], tag)?));
    parts.push((name.to_string(), weight.packed.reshape(&[weight.packed.numel(), 1])?));
    Ok(parts)
}

/// `quantization_config` of `config.json` for weights like `weight`.
pub fn quantization_config(weight: &QuantTensor) -> Value {
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": dtype_name(weight.dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": weight.quant_type.to_string(),
        "bnb_4bit_use_double_quant": matches!(weight.absmax, Absmax::Double { .. }),
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}
