//! LoRA adapters on chosen linear layers: new ones, those of a file, and back to one.

use super::{
    Init, Linear, Llama, Lora, Param,
    adapters::Mounted,
    init::Start,
    linear::Magnitude,
    tables::{EMBEDDING, HEAD},
};
use crate::{
    Error, Result,
    files::{
        checkpoint::{Checkpoint, CheckpointTensor},
        peft::{Adapter, AdapterConfig, Factors, TargetModules, scale},
    },
};
use nibble_kernels::{
    cast::{cast, into_dtype},
    dora,
    linear::Weight,
    quantize::dequantize,
    table::Table,
};
use nibble_runtime::{
    DType, Device, ParamId, Tag, Tensor,
    rng::{Philox, Stream},
};
use std::path::Path;

/// Names of the linear layers that an adapter can sit on.
pub const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// [`Stream::purpose`] of adapter initialization.
const INIT_PURPOSE: u32 = 2;

/// Gives out ids in turn.
#[derive(Default)]
pub(super) struct Ids(usize);

impl Ids {
    pub(super) fn next(&mut self) -> Option<ParamId> {
        self.0 += 1;
        Some(ParamId(self.0 - 1))
    }
}

impl Llama {
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.layers.iter_mut().flat_map(|layer| layer.linears_mut())
    }

    /// Puts new adapters on the layers that `config` names, and makes embedding and head trainable where it says so.
    /// A plain one ([`Init::Lora`]) has A uniform in ±1/√K and B zero, so that the model's output does not change; others
    /// change the base weight: they start from the weights of `checkpoint`, or, without one, from those that the layers
    /// have.
    ///
    /// # Errors
    /// No layer is meant, or none by one of the names; the rank is 0 or more than a layer's weight has; embedding and head
    /// are to train and are held in 8 bits; `init` does not go with the base or with DoRA.
    pub fn add_lora(
        &mut self,
        config: &AdapterConfig,
        init: Init,
        checkpoint: Option<&Checkpoint>,
        seed: u64,
    ) -> Result<()> {
        config.check_patterns().map_err(Error::Invalid)?;
        if config.use_dora && init != Init::Lora {
            return Err(Error::Invalid(format!("DoRA starts from plain adapters, not from {init}")));
        }
        if let Some(TargetModules::Names(names)) = &config.target_modules {
            let alone = |name: &String| TargetModules::Names(vec![name.clone()]);
            let meant = |name: &String| {
                let one = AdapterConfig { target_modules: Some(alone(name)), ..AdapterConfig::default() };
                self.layers.iter().flat_map(|layer| layer.linears()).any(|linear| one.adapts(&linear.name))
            };
            if let Some(bad) = names.iter().find(|name| !meant(name)) {
                let what = format!("no linear layer is named {bad}; choose from {}", TARGETS.join(", "));
                return Err(Error::Invalid(what));
            }
        }
        let (device, mut ids, mut count) = (self.device(), Ids::default(), 0);
        for linear in self.linears_mut().filter(|linear| config.adapts(&linear.name)) {
            let rank = config.rank_of(&linear.name);
            if rank == 0 {
                return Err(Error::Invalid(format!("{}: LoRA needs a rank of at least 1", linear.name)));
            }
            let scale = scale(config.alpha_of(&linear.name), rank, config.use_rslora);
            let (mut factors, taken) = match init {
                Init::Lora => (plain(linear, rank, device, seed)?, None),
                _ => {
                    let start = linear.start(init, &original(linear, checkpoint)?, rank, scale);
                    let Start { a, b, weight } =
                        start.map_err(|error| Error::Invalid(format!("{}: {error}", linear.name)))?;
                    let own = |tensor: &Tensor| tensor.copy(Tag::Adapters)?.into_device(device, Tag::Adapters);
                    let factors = Factors { a: own(&a)?, b: own(&b)?, magnitude: None };
                    let dense = matches!(weight, Weight::Dense(_));
                    linear.weight = weight;
                    (factors, dense.then_some((a, b)))
                }
            };
            if config.use_dora {
                factors.magnitude = Some(lengths(&linear.dense()?)?);
            }
            let lora = Lora::new(&linear.name, factors, scale, config.lora_dropout as f32, &mut ids);
            linear.lora = Some(Lora { taken, ..lora });
            count += 1;
        }
        if count == 0 {
            let names = TARGETS.join(", ");
            let what = format!("the targets name none of the model's linear layers, which are {names} of each layer");
            return Err(Error::Invalid(what));
        }
        self.train_tables(config, &mut ids)
    }

    /// Puts the adapters of a PEFT folder on the layers that it names, ready for use or for more training.
    ///
    /// # Errors
    /// The adapter names a layer that the model lacks, or its shapes do not fit: it was made for another model.
    pub fn set_adapter(&mut self, adapter: &Adapter, path: &Path) -> Result<()> {
        let mounted = self.mounted(adapter, path)?;
        self.mount(mounted);
        Ok(())
    }

    /// What an adapter puts on the model.
    pub(super) fn mounted(&self, adapter: &Adapter, path: &Path) -> Result<Mounted> {
        let mut left: Vec<&str> = adapter.factors.keys().map(String::as_str).collect();
        let model = self.source.display().to_string();
        let other =
            |what: String| Error::mismatch(path, format!("{what}; is the adapter for another model than {model}?"));
        let (device, mut ids) = (self.device(), Ids::default());
        let own = |tensor: &Tensor| cast(tensor, DType::F32, Tag::Adapters)?.into_device(device, Tag::Adapters);
        let mut loras = Vec::new();
        for linear in self.layers.iter().flat_map(|layer| layer.linears()) {
            let Some(Factors { a, b, magnitude }) = adapter.factors.get(&linear.name) else {
                loras.push(None);
                continue;
            };
            let (n, k) = linear.weight.dims()?;
            let rank = a.shape().first().copied().unwrap_or(0);
            let lengths = magnitude.as_ref().is_none_or(|magnitude| magnitude.shape() == [n]);
            if a.shape() != [rank, k] || b.shape() != [n, rank] || rank == 0 || !lengths {
                let (a, b) = (a.shape(), b.shape());
                return Err(other(format!("{}: A {a:?} and B {b:?} do not fit a layer [{n}, {k}]", linear.name)));
            }
            let (scale, dropout) = (adapter.scale(&linear.name), adapter.config.lora_dropout as f32);
            let magnitude = magnitude.as_ref().map(own).transpose()?;
            let factors = Factors { a: own(a)?, b: own(b)?, magnitude };
            loras.push(Some(Lora::new(&linear.name, factors, scale, dropout, &mut ids)));
            left.retain(|name| *name != linear.name);
        }
        if let Some(name) = left.first() {
            return Err(other(format!("the model has no layer {name}")));
        }
        let Mounted { mut embedding, mut head, mut vocab, .. } = self.base();
        let width = self.config.hidden_size;
        let tables = [("the embedding", &adapter.embedding), ("the head", &adapter.head)];
        if let Some((what, table)) = tables.into_iter().find_map(|(what, table)| {
            table
                .as_ref()
                .filter(|table| table.dims2("table").is_ok_and(|(_, found)| found != width))
                .map(|t| (what, t))
        }) {
            return Err(other(format!("{what} is {:?} and the model's are {width} wide", table.shape())));
        }
        if adapter.embedding.is_some() || adapter.head.is_some() {
            let tied = head.is_none();
            let of = |name: &str, table: &Tensor, ids: &mut Ids| -> Result<Param<Table>> {
                Ok(Param { name: name.into(), id: ids.next(), value: Table::Dense(own(table)?) })
            };
            if tied && !(adapter.config.ensure_weight_tying && adapter.embedding.is_some()) {
                head = Some(Param { name: HEAD.into(), id: None, value: embedding.value.clone() });
            }
            if let Some(table) = &adapter.embedding {
                embedding = of(EMBEDDING, table, &mut ids)?;
            }
            if let (Some(table), Some(param)) = (&adapter.head, &mut head) {
                *param = of(HEAD, table, &mut ids)?;
            }
            let rows = embedding.value.dims()?.0;
            let of_head = head.as_ref().map_or(Ok(rows), |head| head.value.dims().map(|(rows, _)| rows))?;
            if rows != of_head {
                return Err(other(format!("embedding and head have {rows} and {of_head} tokens")));
            }
            vocab = rows;
        }
        Ok(Mounted { loras, embedding, head, vocab })
    }

    /// The adapters as PEFT tensors, beside a configuration. What an adapter took out of a base that is not quantized is
    /// given back: it becomes one of twice the rank for the base as it was, as peft converts it.
    ///
    /// # Errors
    /// The device is lost.
    pub fn adapter(&self, config: AdapterConfig) -> Result<Adapter> {
        let mut adapter = Adapter { config, factors: Default::default(), embedding: None, head: None };
        let mut converted = false;
        for linear in self.layers.iter().flat_map(|layer| layer.linears()) {
            let Some(Lora { a, b, magnitude, taken, .. }) = &linear.lora else { continue };
            let magnitude = magnitude.as_ref().map(|magnitude| magnitude.param.value.clone());
            let mut factors = Factors { a: a.value.clone(), b: b.value.clone(), magnitude };
            if let Some((a, b)) = taken {
                let host = |tensor: &Tensor| tensor.to_device(Device::Cpu, Tag::Workspace);
                (factors.a, factors.b) = given_back([&host(&factors.a)?, &host(&factors.b)?], [a, b])?;
                converted = true;
            }
            adapter.factors.insert(linear.name.clone(), factors);
        }
        if converted {
            adapter.config.double_rank();
        }
        fn trained(param: &Param<Table>) -> Option<Tensor> {
            match (&param.value, param.id) {
                (Table::Dense(value), Some(_)) => Some(value.clone()),
                _ => None,
            }
        }
        adapter.embedding = trained(&self.embedding);
        adapter.head = self.head.as_ref().and_then(trained);
        if self.head.is_none() && adapter.config.ensure_weight_tying {
            adapter.head = adapter.embedding.clone();
        }
        Ok(adapter)
    }
}

/// The weight that a layer was loaded from, f32 in host memory: the checkpoint's, before it was quantized here.
fn original(linear: &Linear, checkpoint: Option<&Checkpoint>) -> Result<Tensor> {
    let dense = match checkpoint {
        None => linear.dense()?,
        Some(checkpoint) => {
            let (n, k) = linear.weight.dims()?;
            match checkpoint.weight(&format!("{}.weight", linear.name), &[n, k], Tag::Workspace)? {
                CheckpointTensor::Dense(tensor) => tensor,
                CheckpointTensor::Quantized(quantized) => dequantize(&quantized, Tag::Workspace)?,
            }
        }
    };
    Ok(into_dtype(dense, DType::F32, Tag::Workspace)?.into_device(Device::Cpu, Tag::Workspace)?)
}

/// A uniform in ±1/√K, and B zero.
fn plain(linear: &Linear, rank: usize, device: Device, seed: u64) -> Result<Factors> {
    let (n, k) = linear.weight.dims()?;
    let rng = Philox::new(seed, Stream { purpose: INIT_PURPOSE, step: 0, layer: linear.index });
    let bound = 1.0 / (k as f32).sqrt();
    let a: Vec<f32> = (0..(rank * k) as u64).map(|i| bound * (2.0 * rng.uniform(i) - 1.0)).collect();
    let a = Tensor::from_slice(&a, &[rank, k], Tag::Adapters)?.into_device(device, Tag::Adapters)?;
    Ok(Factors { a, b: Tensor::zeros(&[n, rank], DType::F32, device, Tag::Adapters)?, magnitude: None })
}

/// The lengths of a weight's rows, from which DoRA's magnitudes start.
fn lengths(weight: &Tensor) -> Result<Tensor> {
    let inverse = dora::inverse_norms(weight)?;
    let inverse_host = inverse.to_device(Device::Cpu, Tag::Workspace)?;
    let lengths: Vec<f32> = inverse_host.as_slice::<f32>()?.iter().map(|x| x.recip()).collect();
    Ok(Tensor::from_slice(&lengths, inverse.shape(), Tag::Adapters)?.into_device(weight.device(), Tag::Adapters)?)
}

/// A and B of twice the rank whose product is `B·A − B₀·A₀`.
fn given_back([a, b]: [&Tensor; 2], [a0, b0]: [&Tensor; 2]) -> Result<(Tensor, Tensor)> {
    let (r, k) = a.dims2("A")?;
    let n = b.dims2("B")?.0;
    let both_a = [a.as_slice::<f32>()?, a0.as_slice::<f32>()?].concat();
    let rows = b.as_slice::<f32>()?.chunks(r).zip(b0.as_slice::<f32>()?.chunks(r));
    let both_b: Vec<f32> = rows.flat_map(|(b, b0)| b.iter().copied().chain(b0.iter().map(|x| -x))).collect();
    let tag = Tag::Workspace;
    Ok((Tensor::from_slice(&both_a, &[2 * r, k], tag)?, Tensor::from_slice(&both_b, &[n, 2 * r], tag)?))
}

impl Lora {
    /// The adapter of the linear layer `name`; its parameters take the next ids.
    fn new(name: &str, factors: Factors, scale: f32, dropout: f32, ids: &mut Ids) -> Lora {
        let Factors { a, b, magnitude } = factors;
        let mut param = |part: &str, value| Param { name: format!("{name}.{part}"), id: ids.next(), value };
        let (a, b) = (param("lora_A.weight", a), param("lora_B.weight", b));
        let magnitude = magnitude.map(|value| Magnitude::new(param("lora_magnitude_vector", value)));
        Lora { a, b, scale, dropout, magnitude, taken: None }
    }
}
