//! Adapters side by side, for a batch whose rows belong to different ones ([`nibble_kernels::mixed`]).

use super::{Linear, Llama, Lora, Param};
use crate::{Error, Result};
use nibble_kernels::{cast::cast, mixed, table};
use nibble_runtime::{Tag, Tensor};
use std::collections::BTreeMap;

/// Adapters of a model, side by side.
#[derive(Debug)]
pub struct Mixture {
    /// By [`Linear::index`].
    sides: BTreeMap<u32, mixed::Adapters>,
    names: Vec<String>,
}

impl Mixture {
    /// The number of an adapter, as [`super::Pass`] takes the owners of rows; −1 for the base.
    ///
    /// # Errors
    /// It is none of the mixture's.
    pub fn owner(&self, name: Option<&str>) -> Result<i32> {
        let Some(name) = name else { return Ok(-1) };
        let found = self.names.iter().position(|known| known == name);
        found.map(|number| number as i32).ok_or_else(|| Error::Invalid(format!("no adapter is named \"{name}\"")))
    }

    pub(crate) fn side(&self, linear: u32) -> Option<&mixed::Adapters> {
        self.sides.get(&linear)
    }
}

impl Llama {
    /// The adapters `names` (or that on the layers among them) side by side.
    ///
    /// # Errors
    /// There is none of that name, or one has an embedding or head of its own, which rows of a batch share.
    pub fn mixture(&self, names: &[&str]) -> Result<Mixture> {
        let linears: Vec<&Linear> = self.layers.iter().flat_map(|layer| layer.linears()).collect();
        let mut parts: Vec<Vec<(i32, &Lora)>> = linears.iter().map(|_| Vec::new()).collect();
        for (number, name) in (0..).zip(names) {
            if self.adapters.has_tables(name, self)? {
                let what = format!("{name} has an embedding or head of its own: run its prompts by themselves");
                return Err(Error::Invalid(what));
            }
            for (parts, lora) in parts.iter_mut().zip(self.loras_of(name)?) {
                parts.extend(lora.map(|lora| (number, lora)));
            }
        }
        let mut sides = BTreeMap::new();
        for (linear, parts) in linears.iter().zip(parts) {
            if !parts.is_empty() {
                sides.insert(linear.index, self.side(linear, &parts, names.len())?);
            }
        }
        Ok(Mixture { sides, names: names.iter().map(|name| name.to_string()).collect() })
    }

    /// What is on the layers, as adapter 0 of a mixture of one.
    pub(crate) fn own_mixture(&self) -> Result<Mixture> {
        let mut sides = BTreeMap::new();
        for linear in self.layers.iter().flat_map(|layer| layer.linears()) {
            if let Some(lora) = &linear.lora {
                sides.insert(linear.index, self.side(linear, &[(0, lora)], 1)?);
            }
        }
        Ok(Mixture { sides, names: Vec::new() })
    }

    fn side(&self, linear: &Linear, parts: &[(i32, &Lora)], adapters: usize) -> Result<mixed::Adapters> {
        let ((n, k), device) = (linear.weight.dims()?, self.device());
        let rank = |lora: &Lora| lora.a.value.shape()[0];
        let total = parts.iter().map(|(_, lora)| rank(lora)).sum();
        let empty = |shape: &[usize]| Tensor::empty(shape, self.dtype, device, Tag::Adapters);
        let (mut a, mut b) = (empty(&[total, k])?, empty(&[n, total])?);
        let (mut columns, mut scales) = (Vec::new(), Vec::new());
        let dora = parts.iter().any(|(_, lora)| lora.magnitude.is_some());
        let there = |values: &[f32], shape: &[usize]| {
            Tensor::from_slice(values, shape, Tag::Adapters)?.into_device(device, Tag::Adapters)
        };
        let mut gains = dora.then(|| there(&vec![1.0; adapters * n], &[adapters, n])).transpose()?;
        for &(number, lora) in parts {
            let narrow = |param: &Param| cast(&param.value, self.dtype, Tag::Workspace);
            a.copy_from(columns.len() * k, &narrow(&lora.a)?)?;
            table::columns(&narrow(&lora.b)?, 0, &mut b, columns.len(), rank(lora))?;
            columns.extend(std::iter::repeat_n(number, rank(lora)));
            scales.extend(std::iter::repeat_n(lora.scale, rank(lora)));
            if let (Some(gains), Some((_, of_lora))) = (&mut gains, linear.gains_of(lora)?) {
                gains.copy_from(number as usize * n, of_lora)?;
            }
        }
        let scales = there(&scales, &[total])?;
        let columns = Tensor::from_slice(&columns, &[total], Tag::Adapters)?.into_device(device, Tag::Adapters)?;
        Ok(mixed::Adapters { a, b, columns, scales, gains })
    }
}
