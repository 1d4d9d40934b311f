//! Model and adapter folders: configurations, bitsandbytes weights, PEFT adapters.

use nibble_kernels::{
    quantize::{Absmax, QuantTensor, QuantType, ScaleRounding, dequantize, quantize},
    rotary::{RopeConfig, RopeScaling},
};
use nibble_models::{
    Error, LlamaConfig,
    files::{
        checkpoint::{Checkpoint, CheckpointKind, CheckpointTensor, write_checkpoint},
        inspect::describe,
        peft::{AdapterConfig, Factors, TargetModules, read_adapter, write_adapter},
        safetensors::{SafetensorsFile, write_safetensors},
    },
};
use nibble_runtime::{DType, Tag, Tensor};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new("../tests/golden/gqa_llama3rope").join(name)
}

fn golden_json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(golden(name)).unwrap()).unwrap()
}

/// A minimal configuration after a change.
fn config_of(change: impl FnOnce(&mut Value)) -> Result<LlamaConfig, Error> {
    let mut json = json!({"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4});
    change(&mut json);
    LlamaConfig::from_json(&json.to_string(), Path::new("config.json"))
}

#[test]
fn the_golden_configuration_is_read_in_full() {
    let text = std::fs::read_to_string(golden("model/config.json")).unwrap();
    let config = LlamaConfig::from_json(&text, Path::new("config.json")).unwrap();
    let scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 64 };
    let expected = LlamaConfig {
        vocab_size: 512,
        hidden_size: 128,
        intermediate_size: 384,
        num_layers: 3,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 32,
        rms_norm_eps: 1e-5,
        rope: RopeConfig { theta: 500_000.0, scaling },
        tie_word_embeddings: false,
        max_position_embeddings: 512,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    };
    assert_eq!(config, expected);
    let written = config.to_json(DType::BF16);
    // Every setting of the reference's file that says something about the model, to the letter.
    for (key, value) in golden_json("model/config.json").as_object().unwrap() {
        if !["pad_token_id", "pretraining_tp", "transformers_version", "initializer_range"].contains(&key.as_str()) {
            assert_eq!(&written[key], value, "{key}");
        }
    }
}

#[test]
fn configurations_round_trip_in_both_spellings() {
    let scalings = [
        RopeScaling::Default,
        RopeScaling::Linear { factor: 2.5 },
        RopeScaling::Dynamic { factor: 4.0, original_max_position: 2048 },
        RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 8192 },
    ];
    for (scaling, eos) in scalings.into_iter().zip([vec![], vec![3], vec![3, 4], vec![0]]) {
        let mut config = config_of(|_| {}).unwrap();
        config.rope = RopeConfig { theta: 123_456.0, scaling };
        config.eos_token_ids = eos;
        let json = config.to_json(DType::F32);
        for dropped in [&["rope_parameters"][..], &["rope_scaling", "rope_theta"], &[]] {
            let mut json = json.clone();
            dropped.iter().for_each(|key| drop(json.as_object_mut().unwrap().remove(*key)));
            let read = LlamaConfig::from_json(&json.to_string(), Path::new("config.json")).unwrap();
            assert_eq!(read, config, "without {dropped:?}");
        }
    }
}

#[test]
fn absent_settings_take_transformers_defaults() {
    let config = config_of(|_| {}).unwrap();
    assert_eq!((config.head_dim, config.num_kv_heads, config.max_position_embeddings), (16, 4, 2048));
    assert_eq!(config.rope, RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default });
    assert_eq!((config.rms_norm_eps, config.tie_word_embeddings), (1e-6, false));
    let old = config_of(|c| c["rope_scaling"] = json!({"type": "linear", "factor": 2})).unwrap();
    assert_eq!(old.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    let mistral = |window: Value| {
        config_of(|c| {
            c["model_type"] = json!("mistral");
            c["sliding_window"] = window;
        })
    };
    assert!(mistral(Value::Null).is_ok());
    assert!(mistral(json!(4096)).unwrap_err().to_string().contains("sliding_window"));
}

#[test]
fn bad_configurations_name_the_setting() {
    let unsupported = [
        ("model_type", json!("qwen2")),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("hidden_act", json!("gelu")),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0})),
        ("rope_parameters", json!({"rope_type": "longrope"})),
        ("partial_rotary_factor", json!(0.5)),
    ];
    for (key, value) in unsupported {
        let error = config_of(|c| c[key] = value.clone()).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{key}: {error}");
    }
    assert!(config_of(|c| c["rope_scaling"] = json!({"type": "yarn"})).unwrap_err().to_string().contains("yarn"));
    let wrong = [
        ("hidden_size", json!(null)),
        ("hidden_size", json!(0)),
        ("hidden_size", json!(66)),
        ("hidden_size", json!(1u64 << 62)),
        ("hidden_size", json!("64")),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(3)),
        ("num_key_value_heads", json!(0)),
        ("head_dim", json!(15)),
        ("vocab_size", json!(-1)),
        ("rms_norm_eps", json!(0.0)),
        ("rope_theta", json!(-1)),
        ("rope_scaling", json!({"type": "linear"})),
        ("rope_scaling", json!({"type": "linear", "factor": 0})),
        ("rope_scaling", json!("linear")),
        ("eos_token_id", json!(100)),
        ("eos_token_id", json!([1, "2"])),
        ("tie_word_embeddings", json!("yes")),
        ("model_type", json!(null)),
    ];
    for (key, value) in wrong {
        let error = config_of(|c| c[key] = value.clone()).unwrap_err();
        assert!(
            matches!(error, Error::File { .. }) && error.to_string().starts_with("config.json: "),
            "{key}: {error}"
        );
    }
    for text in ["", "[]", "{", "{\"hidden_size\": NaN}"] {
        assert!(matches!(LlamaConfig::from_json(text, Path::new("c")), Err(Error::File { .. })), "{text}");
    }
}

/// All weights of a checkpoint, in their shapes.
fn weights(checkpoint: &Checkpoint) -> Vec<(String, CheckpointTensor)> {
    let c = checkpoint.config();
    let shape = |name: &str| match name {
        _ if name.contains("q_proj") => vec![c.num_heads * c.head_dim, c.hidden_size],
        _ if name.contains("k_proj") || name.contains("v_proj") => vec![c.num_kv_heads * c.head_dim, c.hidden_size],
        _ if name.contains("o_proj") => vec![c.hidden_size, c.num_heads * c.head_dim],
        _ if name.contains("down_proj") => vec![c.hidden_size, c.intermediate_size],
        _ if name.contains("_proj") => vec![c.intermediate_size, c.hidden_size],
        _ if name.contains("norm") => vec![c.hidden_size],
        _ => vec![c.vocab_size, c.hidden_size],
    };
    let read = |name: String| {
        let tensor = checkpoint.weight(&name, &shape(&name), Tag::Weights).unwrap();
        assert_eq!(tensor.shape(), shape(&name));
        (name, tensor)
    };
    checkpoint.names().into_iter().map(read).collect()
}

fn copy_golden(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(golden(name)).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    folder
}

#[test]
fn a_bitsandbytes_folder_written_again_is_the_same_to_the_byte() {
    let checkpoint = Checkpoint::open(&golden("model-bnb4")).unwrap();
    assert_eq!(checkpoint.kind(), CheckpointKind::Bitsandbytes);
    let weights = weights(&checkpoint);
    let quantized = weights.iter().filter(|(_, w)| matches!(w, CheckpointTensor::Quantized(_))).count();
    assert_eq!((quantized, weights.len()), (21, 30));
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("new/folder");
    write_checkpoint(&out, checkpoint.config(), DType::F32, &weights).unwrap();
    let (old, new) = (golden("model-bnb4/model.safetensors"), out.join("model.safetensors"));
    let (a, b) = (SafetensorsFile::open(&old).unwrap(), SafetensorsFile::open(&new).unwrap());
    assert_eq!((a.names(), a.metadata()), (b.names(), b.metadata()));
    for name in a.names() {
        let (a, b) = (a.view(&name).unwrap(), b.view(&name).unwrap());
        assert_eq!((a.format, a.shape, a.bytes), (b.format, b.shape, b.bytes), "{name}");
    }
    assert!(std::fs::read(&old).unwrap() == std::fs::read(&new).unwrap());
    let json: Value = serde_json::from_str(&std::fs::read_to_string(out.join("config.json")).unwrap()).unwrap();
    let expected = &golden_json("model-bnb4/config.json")["quantization_config"];
    assert_eq!(json["quantization_config"].to_string(), expected.to_string());
    let again = Checkpoint::open(&new).unwrap();
    assert_eq!((again.kind(), again.config()), (CheckpointKind::Bitsandbytes, checkpoint.config()));
}

#[test]
fn the_golden_model_quantizes_to_the_golden_checkpoint() {
    let model = Checkpoint::open(&golden("model")).unwrap();
    assert_eq!(model.kind(), CheckpointKind::HuggingFace);
    for (name, weight) in weights(&Checkpoint::open(&golden("model-bnb4")).unwrap()) {
        let CheckpointTensor::Quantized(expected) = weight else { continue };
        let CheckpointTensor::Dense(dense) = model.weight(&name, &expected.shape, Tag::Weights).unwrap() else {
            panic!("{name} is dense");
        };
        let stepped = Some(ScaleRounding::Stepped);
        let found = quantize(&dense, QuantType::Nf4, 64, stepped, DType::F32, Tag::Weights).unwrap();
        assert!(found.packed.bytes().unwrap() == expected.packed.bytes().unwrap(), "{name}");
        match (&found.absmax, &expected.absmax) {
            (
                Absmax::Double { codes: a, absmax2: a2, offset: a_offset, .. },
                Absmax::Double { codes: b, absmax2: b2, offset: b_offset, .. },
            ) => {
                let same = |a: &Tensor, b: &Tensor| a.bytes().unwrap() == b.bytes().unwrap();
                assert!(same(a, b) && same(a2, b2), "{name}");
                assert!(same(a_offset, b_offset), "{name}");
            }
            _ => panic!("{name} is not double-quantized"),
        }
    }
}

#[test]
fn single_scales_and_fp4_round_trip() {
    let values: Vec<f32> = (0..33 * 7).map(|i| (i as f32 * 0.37).sin() * 1e-4).collect();
    let matrix = Tensor::from_slice(&values, &[33, 7], Tag::Weights).unwrap();
    for (quant_type, block, double, dtype) in [
        (QuantType::Fp4, 32, None, DType::BF16),
        (QuantType::Nf4, 128, None, DType::F16),
        (QuantType::Fp4, 64, Some(ScaleRounding::Exact), DType::F32),
    ] {
        let quantized = quantize(&matrix, quant_type, block, double, dtype, Tag::Weights).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let name = "model.layers.0.self_attn.q_proj.weight";
        let weights = [(name.to_string(), CheckpointTensor::Quantized(quantized.clone()))];
        write_checkpoint(folder.path(), &config_of(|_| {}).unwrap(), dtype, &weights).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let CheckpointTensor::Quantized(read) = checkpoint.weight(name, &[33, 7], Tag::Weights).unwrap() else {
            panic!("it was quantized");
        };
        assert_eq!((read.quant_type, read.block_size, read.dtype), (quant_type, block, dtype));
        let values = |q| dequantize(q, Tag::Weights).unwrap();
        assert_eq!(values(&read).bytes().unwrap(), values(&quantized).bytes().unwrap());
        let broken = QuantTensor { shape: vec![34, 7], ..quantized.clone() };
        let weights = [(name.to_string(), CheckpointTensor::Quantized(broken))];
        assert!(write_checkpoint(folder.path(), checkpoint.config(), dtype, &weights).is_err());
        if let (Absmax::Double { offset: a, .. }, Absmax::Double { offset: b, .. }) = (&read.absmax, &quantized.absmax)
        {
            assert_eq!(a.bytes().unwrap(), b.bytes().unwrap());
        }
    }
}

#[test]
fn damaged_quantized_weights_are_refused() {
    let golden = SafetensorsFile::open(&golden("model-bnb4/model.safetensors")).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let tensors: Vec<_> =
        golden.names().into_iter().map(|n| (n.clone(), golden.tensor(&n, Tag::Workspace).unwrap())).collect();
    let error_after = |suffix: &str, change: &dyn Fn(&Tensor) -> Option<Tensor>| {
        let folder = copy_golden("model-bnb4");
        let key = format!("{name}{suffix}");
        assert!(tensors.iter().any(|(n, _)| *n == key), "{key}");
        let changed: Vec<_> = tensors
            .iter()
            .filter_map(|(n, t)| Some((n.clone(), if *n == key { change(t)? } else { t.clone() })))
            .collect();
        write_safetensors(&folder.path().join("model.safetensors"), &changed, &[]).unwrap();
        Checkpoint::open(folder.path()).unwrap().weight(name, &[128, 128], Tag::Weights).unwrap_err()
    };
    let shorter = |t: &Tensor| t.rows(0, t.shape()[0] - 1).ok();
    let state = |from: &str, to: &str| {
        let (from, to) = (from.to_string(), to.to_string());
        move |t: &Tensor| {
            let text = std::str::from_utf8(t.bytes().unwrap()).unwrap().replace(&from, &to);
            assert_ne!(text.as_bytes(), t.bytes().unwrap());
            Some(Tensor::from_slice(text.as_bytes(), &[text.len()], Tag::Workspace).unwrap())
        }
    };
    for suffix in ["", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map"] {
        let error = error_after(suffix, &shorter);
        assert!(matches!(error, Error::File { .. } | Error::Unsupported { .. }), "{suffix}: {error}");
        assert!(error.to_string().contains(name), "{error}");
    }
    for suffix in [".absmax", ".nested_quant_map", ".quant_map"] {
        assert!(matches!(error_after(suffix, &|_| None), Error::Mismatch { .. }), "{suffix}");
    }
    assert!(matches!(error_after(".quant_state.bitsandbytes__nf4", &|_| None), Error::Unsupported { .. }));
    let nan =
        error_after(".nested_absmax", &|t| Some(Tensor::from_slice(&[f32::NAN], t.shape(), Tag::Workspace).unwrap()));
    assert!(matches!(nan, Error::File { .. }), "{nan}");
    for (from, to) in [
        ("nf4", "fp4"),
        ("float32", "int8"),
        ("[128, 128]", "[128, 127]"),
        ("[128, 128]", "[128, 128, 1]"),
        ("[128, 128]", "[18446744073709551615, 128]"),
        ("\"blocksize\": 64", "\"blocksize\": 0"),
        ("\"blocksize\": 64", "\"blocksize\": 63"),
        ("nested_blocksize\": 256", "nested_blocksize\": 0"),
        ("nested_offset", "offset"),
        ("{", "["),
    ] {
        let error = error_after(".quant_state.bitsandbytes__nf4", &state(from, to));
        assert!(matches!(error, Error::File { .. }), "{from} -> {to}: {error}");
    }
    let error = error_after(".quant_state.bitsandbytes__nf4", &state("[128, 128]", "[64, 256]"));
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
}

#[test]
fn folders_that_are_not_a_readable_model_say_why() {
    let folder = copy_golden("model");
    let config = folder.path().join("config.json");
    let error = || Checkpoint::open(folder.path()).map(|_| ()).unwrap_err();
    let quantized = |quantization: Value| {
        let mut json = golden_json("model/config.json");
        json["quantization_config"] = quantization;
        std::fs::write(&config, json.to_string()).unwrap();
        error()
    };
    for (quantization, part) in [
        (json!({"quant_method": "gptq", "bits": 4}), "gptq"),
        (json!({"quant_method": "awq"}), "awq"),
        (json!({"quant_method": "bitsandbytes", "load_in_8bit": true}), "8 bits"),
    ] {
        let error = quantized(quantization);
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(part), "{error}");
    }
    std::fs::copy(golden("model/config.json"), &config).unwrap();
    let checkpoint = Checkpoint::open(&folder.path().join("model.safetensors")).unwrap();
    assert_eq!(checkpoint.path(), folder.path());
    let missing = checkpoint.weight("model.layers.9.input_layernorm.weight", &[128], Tag::Weights).unwrap_err();
    assert!(matches!(missing, Error::Mismatch { .. }) && missing.to_string().contains("layers.9"), "{missing}");
    let shape = checkpoint.weight("model.norm.weight", &[64], Tag::Weights).unwrap_err();
    assert!(shape.to_string().contains("[128]") && shape.to_string().contains("[64]"), "{shape}");
    std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert!(error().to_string().contains("neither model.safetensors"));
    std::fs::remove_file(&config).unwrap();
    assert!(error().to_string().contains("no config.json"));
    assert!(matches!(Checkpoint::open(Path::new("/no/such/model")), Err(Error::Io { .. })));
    assert!(Checkpoint::open(&golden("adapter-init")).unwrap_err().to_string().contains("adapter"));
    assert!(Checkpoint::open(&golden("run.json")).is_err());
}

#[test]
fn golden_adapters_round_trip_to_the_byte() {
    for name in ["adapter-init", "adapter-final"] {
        let adapter = read_adapter(&golden(name)).unwrap();
        assert_eq!((adapter.config.r, adapter.config.lora_alpha, adapter.factors.len()), (8, 16.0, 21));
        let Factors { a, b, .. } = &adapter.factors["model.layers.2.mlp.down_proj"];
        assert_eq!((a.shape(), b.shape()), (&[8, 384][..], &[128, 8][..]));
        let folder = copy_golden("adapter-init");
        write_adapter(folder.path(), &adapter).unwrap();
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let (old, new) = (golden(name).join(file), folder.path().join(file));
            assert!(std::fs::read(old).unwrap() == std::fs::read(new).unwrap(), "{name}/{file}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}

fn adapter_config(change: impl FnOnce(&mut Value)) -> Result<AdapterConfig, Error> {
    let mut json = golden_json("adapter-init/adapter_config.json");
    change(&mut json);
    AdapterConfig::from_json(&json.to_string(), Path::new("adapter_config.json"))
}

#[test]
fn adapter_settings_are_read_and_strange_ones_refused() {
    let least = AdapterConfig::from_json(r#"{"peft_type": "LORA"}"#, Path::new("c")).unwrap();
    assert_eq!(least, AdapterConfig { task_type: None, ..AdapterConfig::default() });
    let config = adapter_config(|c| {
        c["target_modules"] = json!("all-linear");
        c["exclude_modules"] = json!(["lm_head"]);
        c["use_rslora"] = json!(true);
        c["lora_alpha"] = json!(2.5);
        c["rank_pattern"] = json!({"q_proj": 4, "^model.layers.0.mlp.up_proj": 2});
        c["alpha_pattern"] = json!({"self_attn.q_proj": 1});
        c["layers_to_transform"] = json!(1);
        c["use_dora"] = json!(true);
        c["modules_to_save"] = json!(["model.embed_tokens", "lm_head"]);
        c["ensure_weight_tying"] = json!(true);
        c["bias"] = json!("lora_only");
        c["from_the_future"] = json!({"x": 1});
    })
    .unwrap();
    assert_eq!(config.target_modules, Some(TargetModules::Pattern("all-linear".into())));
    assert_eq!((config.rank_of("model.layers.1.self_attn.q_proj"), config.rank_of("xq_proj")), (4, 8));
    assert_eq!((config.rank_of("model.layers.0.mlp.up_proj"), config.rank_of("a.model.layers.0.mlp.up_proj")), (2, 8));
    assert_eq!((config.alpha_of("model.layers.0.self_attn.q_proj"), config.alpha_of("q_proj")), (1.0, 2.5));
    assert_eq!(AdapterConfig::from_json(&config.to_json().to_string(), Path::new("c")).unwrap(), config);
    assert_eq!(config.saves(), [true, true]);
    assert!(config.adapts("model.layers.0.mlp.up_proj") && !config.adapts("lm_head"));
    // As Python's re: whole paths for targets, ends of paths for ranks.
    let config = adapter_config(|c| {
        c["target_modules"] = json!(r"^(?!.*mlp).*\.[qk]_proj|model\.layers\.1\.mlp\.down_proj");
        c["rank_pattern"] = json!({r"layers\.1\..*": 4, "k_proj": 2});
    })
    .unwrap();
    let adapts = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"];
    let spares = ["model.layers.0.self_attn.v_proj", "model.layers.2.mlp.down_proj", "model.layers.1.mlp.down_proj.x"];
    assert!(adapts.iter().all(|module| config.adapts(module)) && !spares.iter().any(|module| config.adapts(module)));
    let k_proj = |layer: usize| config.rank_of(&format!("model.layers.{layer}.self_attn.k_proj"));
    assert_eq!((k_proj(0), k_proj(1), config.rank_of("model.layers.0.mlp.up_proj")), (2, 2, 8));
    assert_eq!(config.rank_of("model.layers.1.mlp.up_proj"), 4);
    let layers = adapter_config(|c| {
        c["target_modules"] = json!(["q_proj", "mlp.up_proj"]);
        c["layers_to_transform"] = json!([1]);
        c["exclude_modules"] = json!(".*up.*");
    })
    .unwrap();
    assert!(layers.adapts("model.layers.1.self_attn.q_proj"));
    assert!(!layers.adapts("model.layers.0.self_attn.q_proj") && !layers.adapts("model.layers.1.mlp.up_proj"));

    let unsupported = [
        ("peft_type", json!("IA3")),
        ("modules_to_save", json!(["norm"])),
        ("lora_bias", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("init_lora_weights", json!("pissa")),
        ("trainable_token_indices", json!([3])),
    ];
    for (key, value) in unsupported {
        let error = adapter_config(|c| c[key] = value).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{key}: {error}");
    }
    for (key, value) in [
        ("peft_type", json!(null)),
        ("r", json!(0)),
        ("r", json!(-3)),
        ("r", json!(1u64 << 40)),
        ("lora_alpha", json!("16")),
        ("lora_dropout", json!(1.0)),
        ("target_modules", json!([1])),
        ("rank_pattern", json!([])),
        ("rank_pattern", json!({"q_proj(": 4})),
        ("target_modules", json!("(?<!x")),
        ("bias", json!("some")),
        ("modules_to_save", json!("lm_head")),
    ] {
        let error = adapter_config(|c| c[key] = value).unwrap_err();
        assert!(matches!(error, Error::File { .. }), "{key}: {error}");
    }
}

#[test]
fn adapters_whose_tensors_do_not_fit_are_refused() {
    let source = SafetensorsFile::open(&golden("adapter-init/adapter_model.safetensors")).unwrap();
    let all: Vec<_> =
        source.names().into_iter().map(|n| (n.clone(), source.tensor(&n, Tag::Workspace).unwrap())).collect();
    let error_of = |tensors: &[(String, Tensor)]| {
        let folder = copy_golden("adapter-init");
        write_safetensors(&folder.path().join("adapter_model.safetensors"), tensors, &[]).unwrap();
        read_adapter(folder.path()).map(|_| ()).unwrap_err()
    };
    let missing = error_of(&all[1..]);
    assert!(matches!(missing, Error::Mismatch { .. }) && missing.to_string().contains("only one"), "{missing}");
    let mut rank = all.clone();
    rank[0].1 = rank[0].1.rows(0, 4).unwrap();
    assert!(matches!(error_of(&rank), Error::Mismatch { .. }));
    let mut dora = all.clone();
    let prefix = "base_model.model.model.layers.0.self_attn.q_proj";
    let vector = Tensor::from_slice(&[1f32], &[1], Tag::Workspace).unwrap();
    dora.push((format!("{prefix}.lora_magnitude_vector"), vector));
    assert!(matches!(error_of(&dora), Error::Mismatch { .. }));
    dora.last_mut().unwrap().0 = format!("{prefix}.lora_B.bias");
    assert!(matches!(error_of(&dora), Error::Unsupported { .. }));
    let mut nan = all.clone();
    nan[0].1 = Tensor::from_slice(&vec![f32::NAN; nan[0].1.numel()], nan[0].1.shape(), Tag::Workspace).unwrap();
    assert!(matches!(error_of(&nan), Error::File { .. }));
    assert!(matches!(error_of(&[]), Error::File { .. }));
    // All tensors agree with each other, but not with the settings.
    let folder = copy_golden("adapter-init");
    let mut settings = golden_json("adapter-init/adapter_config.json");
    settings["r"] = json!(4);
    std::fs::write(folder.path().join("adapter_config.json"), settings.to_string()).unwrap();
    let error = read_adapter(folder.path()).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }) && error.to_string().contains("rank 4"), "{error}");
    // 16-bit adapters are widened.
    let folder = copy_golden("adapter-init");
    let half: Vec<_> = all.iter().map(|(n, t)| (n.clone(), t.cast(DType::BF16, Tag::Workspace).unwrap())).collect();
    write_safetensors(&folder.path().join("adapter_model.safetensors"), &half, &[]).unwrap();
    assert!(
        read_adapter(folder.path())
            .unwrap()
            .factors
            .values()
            .all(|Factors { a, b, .. }| a.dtype() == DType::F32 && b.dtype() == DType::F32)
    );
    std::fs::remove_file(folder.path().join("adapter_model.safetensors")).unwrap();
    assert!(read_adapter(folder.path()).unwrap_err().to_string().contains("adapter_model.safetensors"));
    assert!(read_adapter(&golden("model")).unwrap_err().to_string().contains("adapter_config.json"));
}

#[test]
fn everything_can_be_described() {
    let text = describe(&golden("model-bnb4")).unwrap();
    assert!(text.contains("bitsandbytes") && text.contains("4-bit weights  21") && text.contains("U8"), "{text}");
    // Two tables of 512·128, and of each layer 128·(128 + 64 + 64 + 128 + 3·384 + 2); the last norm.
    let parameters = 2 * 512 * 128 + 3 * 128 * (128 + 64 + 64 + 128 + 3 * 384 + 2) + 128;
    assert!(describe(&golden("model")).unwrap().contains(&format!("parameters     {parameters}\n")));
    assert!(describe(&golden("adapter-final")).unwrap().contains("rank, alpha    8, 16\n"));
    assert!(describe(&golden("adapter-final/adapter_model.safetensors")).unwrap().contains("format = pt"));
    assert!(describe(&golden("run.json")).is_err() && describe(&golden("none")).is_err());
}
