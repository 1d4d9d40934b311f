//! Embedding and head beside adapters, and full fine-tuning: whole weights that train.

use super::{Llama, Param, adapter::Ids};
use crate::{Error, Result, files::peft::AdapterConfig};
use nibble_kernels::{cast::into_dtype, linear::Weight, quantize::dequantize, table::Table};
use nibble_runtime::{DType, Device, ParamId, Tag, Tensor};

/// Names of embedding and head in files.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const HEAD: &str = "lm_head.weight";

impl Llama {
    /// Makes embedding and head trainable, in f32, where `config` saves them whole.
    pub(super) fn train_tables(&mut self, config: &AdapterConfig, ids: &mut Ids) -> Result<()> {
        let [embedding, head] = config.saves();
        // The head of a tied model becomes one of its own, which starts as (or stays) what the embedding was.
        if self.head.is_none() && (head || (embedding && !config.ensure_weight_tying)) {
            self.head = Some(Param { name: HEAD.into(), id: None, value: self.embedding.value.clone() });
        }
        if embedding {
            train_table(&mut self.embedding, ids.next())?;
        }
        match &mut self.head {
            Some(param) if head => train_table(param, ids.next()),
            _ => Ok(()),
        }
    }

    /// Gives embedding and head rows for `vocab` tokens, if they have fewer: each the mean of those that there are.
    ///
    /// # Errors
    /// They are held in 8 bits.
    pub fn grow_vocabulary(&mut self, vocab: usize) -> Result<()> {
        if vocab <= self.config.vocab_size {
            return Ok(());
        }
        for Param { value, .. } in [Some(&mut self.embedding), self.head.as_mut()].into_iter().flatten() {
            let Table::Dense(rows) = value else {
                return Err(Error::Invalid("embedding and head are held in 8 bits, and cannot grow".into()));
            };
            let (count, width) = rows.dims2("table")?;
            let host = rows.to_device(Device::Cpu, Tag::Workspace)?;
            let mut all = host.to_f32()?.into_owned();
            let mut mean = vec![0.0f64; width];
            all.chunks(width).for_each(|row| mean.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x)));
            let mean: Vec<f32> = mean.iter().map(|sum| (sum / count as f64) as f32).collect();
            (count..vocab).for_each(|_| all.extend(&mean));
            let grown =
                Tensor::from_slice(&all, &[vocab, width], Tag::Weights)?.into_dtype(rows.dtype(), Tag::Weights)?;
            *value = Table::Dense(grown.into_device(rows.device(), Tag::Weights)?);
        }
        self.config.vocab_size = vocab;
        Ok(())
    }

    /// Lets the first `layers` layers hold their 4-bit weights dequantized too, in the type of activations, and the others not.
    /// Results are the same.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn hold_dequantized(&mut self, layers: usize) -> Result<()> {
        let dtype = self.dtype;
        for (number, layer) in self.layers.iter_mut().enumerate() {
            for linear in layer.linears_mut() {
                if let Weight::Quantized(weight) = &mut linear.weight {
                    weight.hold_dense((number < layers).then_some(dtype), Tag::Weights)?;
                }
            }
        }
        Ok(())
    }

    /// Makes every weight trainable, in f32 (quantized linears are dequantized).
    ///
    /// # Errors
    /// Embedding and head are held in 8 bits.
    pub fn train_all(&mut self) -> Result<()> {
        let mut ids = Ids::default();
        fn whole(param: &mut Param, id: Option<ParamId>) -> Result<()> {
            param.value = into_dtype(param.value.clone(), DType::F32, Tag::Weights)?;
            param.id = id;
            Ok(())
        }
        train_table(&mut self.embedding, ids.next())?;
        for layer in &mut self.layers {
            whole(&mut layer.input_norm, ids.next())?;
            whole(&mut layer.post_norm, ids.next())?;
        }
        whole(&mut self.norm, ids.next())?;
        if let Some(head) = &mut self.head {
            train_table(head, ids.next())?;
        }
        for linear in self.layers.iter_mut().flat_map(|layer| layer.linears_mut()) {
            let dense = match &linear.weight {
                Weight::Dense(tensor) => tensor.clone(),
                Weight::Quantized(quantized) => dequantize(quantized, Tag::Weights)?,
            };
            linear.weight = Weight::Dense(into_dtype(dense, DType::F32, Tag::Weights)?);
            linear.id = ids.next();
        }
        Ok(())
    }
}

/// Makes a table trainable: in f32, in storage of its own.
fn train_table(param: &mut Param<Table>, id: Option<ParamId>) -> Result<()> {
    let Table::Dense(value) = &param.value else {
        return Err(Error::Invalid("embedding and head are held in 8 bits, and cannot train".into()));
    };
    let value = into_dtype(value.clone(), DType::F32, Tag::Weights)?;
    let value = if value.is_unique() { value } else { value.copy(Tag::Weights)? };
    *param = Param { name: param.name.clone(), id, value: Table::Dense(value) };
    Ok(())
}
