//! What trains: LoRA adapters on chosen linear layers, or the whole model.

use super::{Linear, Llama, Lora, Param};
use crate::{
    Error, Result,
    files::peft::{Adapter, AdapterConfig, TargetModules, scale},
};
use nibble_kernels::{
    cast::{cast, into_dtype},
    linear::Weight,
    quantize::dequantize,
    table::Table,
};
use nibble_runtime::{
    DType, ParamId, Tag, Tensor,
    rng::{Philox, Stream},
};
use std::path::Path;

/// Names of the linear layers that an adapter can sit on.
pub const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// [`Stream::purpose`] of adapter initialization.
const INIT_PURPOSE: u32 = 2;

/// Settings of new adapters.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank r.
    pub rank: usize,
    /// α: the adapter's output is scaled by α/r.
    pub alpha: f64,
    /// Probability of dropping an element of the adapter's input.
    pub dropout: f32,
    /// Scale by α/√r instead (Kalajdzievski, "rsLoRA", arXiv 2312.03732).
    pub rslora: bool,
    /// Last parts of the names of the layers to adapt, out of [`TARGETS`].
    pub targets: Vec<String>,
}

impl LoraConfig {
    /// The settings in PEFT's form, for a base model of this name.
    pub fn to_peft(&self, base: Option<String>) -> AdapterConfig {
        AdapterConfig {
            r: self.rank,
            lora_alpha: self.alpha,
            // Through text, so that 0.1 is written as 0.1 and not as the f32 nearest to it.
            lora_dropout: self.dropout.to_string().parse().unwrap_or(0.0),
            use_rslora: self.rslora,
            target_modules: Some(TargetModules::Names(self.targets.clone())),
            base_model_name_or_path: base,
            ..AdapterConfig::default()
        }
    }
}

/// The last part of a module path.
fn leaf(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

impl Llama {
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.layers.iter_mut().flat_map(|layer| layer.linears_mut())
    }

    /// Puts new adapters on the chosen layers: A uniform in ±1/√K, B zero, so that the model's output does not change.
    ///
    /// # Errors
    /// A target is none of [`TARGETS`], there is none, or the rank is 0.
    pub fn add_lora(&mut self, config: &LoraConfig, seed: u64) -> Result<()> {
        if let Some(bad) = config.targets.iter().find(|target| !TARGETS.contains(&target.as_str())) {
            return Err(Error::Invalid(format!("no linear layer is named {bad}; choose from {}", TARGETS.join(", "))));
        }
        if config.rank == 0 || config.targets.is_empty() {
            return Err(Error::Invalid("LoRA needs a rank of at least 1 and at least one target layer".into()));
        }
        let (device, mut next) = (self.device(), 0);
        for linear in self.linears_mut().filter(|linear| config.targets.iter().any(|t| t == leaf(&linear.name))) {
            let (n, k) = linear.weight.dims()?;
            let rng = Philox::new(seed, Stream { purpose: INIT_PURPOSE, step: 0, layer: linear.index });
            let bound = 1.0 / (k as f32).sqrt();
            let count = (config.rank * k) as u64;
            let a: Vec<f32> = (0..count).map(|i| bound * (2.0 * rng.uniform(i) - 1.0)).collect();
            let a = Tensor::from_slice(&a, &[config.rank, k], Tag::Adapters)?.into_device(device, Tag::Adapters)?;
            let b = Tensor::zeros(&[n, config.rank], DType::F32, device, Tag::Adapters)?;
            let scale = scale(config.alpha, config.rank, config.rslora);
            linear.lora = Some(Lora::new(&linear.name, a, b, scale, config.dropout, &mut next));
        }
        Ok(())
    }

    /// Puts the adapters of a PEFT folder on the layers that it names, ready for use or for more training.
    ///
    /// # Errors
    /// The adapter names a layer that the model lacks, or its shapes do not fit: it was made for another model.
    pub fn set_adapter(&mut self, adapter: &Adapter, path: &Path) -> Result<()> {
        let loras = self.loras(adapter, path)?;
        self.linears_mut().zip(loras).for_each(|(linear, lora)| linear.lora = lora);
        Ok(())
    }

    /// What an adapter puts on each linear layer, in their order.
    pub(super) fn loras(&self, adapter: &Adapter, path: &Path) -> Result<Vec<Option<Lora>>> {
        let mut left: Vec<&str> = adapter.tensors.keys().map(String::as_str).collect();
        let model = self.source.display().to_string();
        let other =
            |what: String| Error::mismatch(path, format!("{what}; is the adapter for another model than {model}?"));
        let (device, mut next) = (self.device(), 0);
        let mut loras = Vec::new();
        for linear in self.layers.iter().flat_map(|layer| layer.linears()) {
            let Some((a, b)) = adapter.tensors.get(&linear.name) else {
                loras.push(None);
                continue;
            };
            let (n, k) = linear.weight.dims()?;
            let rank = a.shape().first().copied().unwrap_or(0);
            if a.shape() != [rank, k] || b.shape() != [n, rank] || rank == 0 {
                let (a, b) = (a.shape(), b.shape());
                return Err(other(format!("{}: A {a:?} and B {b:?} do not fit a layer [{n}, {k}]", linear.name)));
            }
            let (scale, dropout) = (adapter.scale(&linear.name), adapter.config.lora_dropout as f32);
            let own = |tensor: &Tensor| cast(tensor, DType::F32, Tag::Adapters)?.into_device(device, Tag::Adapters);
            loras.push(Some(Lora::new(&linear.name, own(a)?, own(b)?, scale, dropout, &mut next)));
            left.retain(|name| *name != linear.name);
        }
        match left.first() {
            Some(name) => Err(other(format!("the model has no layer {name}"))),
            None => Ok(loras),
        }
    }

    /// The adapters as PEFT tensors, beside a configuration.
    pub fn adapter(&self, config: AdapterConfig) -> Adapter {
        let linears = self.layers.iter().flat_map(|layer| layer.linears());
        let pair = |linear: &Linear| {
            let lora = linear.lora.as_ref()?;
            Some((linear.name.clone(), (lora.a.value.clone(), lora.b.value.clone())))
        };
        Adapter { config, tensors: linears.filter_map(pair).collect() }
    }

    /// Makes every weight trainable, in f32 (quantized linears are dequantized).
    ///
    /// # Errors
    /// Embedding and head are held in 8 bits.
    pub fn train_all(&mut self) -> Result<()> {
        let mut next = 0;
        let mut id = || {
            next += 1;
            Some(ParamId(next - 1))
        };
        fn whole(param: &mut Param, id: Option<ParamId>) -> Result<()> {
            param.value = into_dtype(param.value.clone(), DType::F32, Tag::Weights)?;
            param.id = id;
            Ok(())
        }
        fn table(param: &mut Param<Table>, id: Option<ParamId>) -> Result<()> {
            let Table::Dense(value) = &param.value else {
                return Err(Error::Invalid("embedding and head are held in 8 bits, and cannot train".into()));
            };
            param.value = Table::Dense(into_dtype(value.clone(), DType::F32, Tag::Weights)?);
            param.id = id;
            Ok(())
        }
        table(&mut self.embedding, id())?;
        for layer in &mut self.layers {
            whole(&mut layer.input_norm, id())?;
            whole(&mut layer.post_norm, id())?;
        }
        whole(&mut self.norm, id())?;
        if let Some(head) = &mut self.head {
            table(head, id())?;
        }
        for linear in self.layers.iter_mut().flat_map(|layer| layer.linears_mut()) {
            let dense = match &linear.weight {
                Weight::Dense(tensor) => tensor.clone(),
                Weight::Quantized(quantized) => dequantize(quantized, Tag::Weights)?,
            };
            linear.weight = Weight::Dense(into_dtype(dense, DType::F32, Tag::Weights)?);
            linear.id = id();
        }
        Ok(())
    }
}

impl Lora {
    /// The adapter of the linear layer `name`; its parameters take the next two ids.
    fn new(name: &str, a: Tensor, b: Tensor, scale: f32, dropout: f32, next: &mut usize) -> Lora {
        let mut param = |part: &str, value| {
            *next += 1;
            Param { name: format!("{name}.{part}.weight"), id: Some(ParamId(*next - 1)), value }
        };
        let (a, b) = (param("lora_A", a), param("lora_B", b));
        Lora { a, b, scale, dropout }
    }
}
