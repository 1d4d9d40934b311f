//! Adapters side by side, for a batch whose rows belong to different ones ([`nibble_kernels::mixed`]).

use super::{Linear, Llama, Lora};
use crate::{Error, Result};
use nibble_kernels::{cast::cast, mixed};
use nibble_runtime::{DType, Device, Tag, Tensor};
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

    fn side(&self, linear: &Linear, parts: &[(i32, &Lora)], adapters: usize) -> Result<mixed::Adapters> {
        let (n, k) = linear.weight.dims()?;
        let (mut a, mut columns, mut scales) = (Vec::new(), Vec::new(), Vec::new());
        let host = |tensor: &Tensor| tensor.to_device(Device::Cpu, Tag::Workspace);
        let mut b: Vec<Vec<f32>> = vec![Vec::new(); n];
        let mut gains = vec![1f32; adapters * n];
        for (number, lora) in parts {
            let rank = lora.a.value.shape()[0];
            a.extend_from_slice(host(&lora.a.value)?.as_slice::<f32>()?);
            let of_b = host(&lora.b.value)?;
            b.iter_mut().zip(of_b.as_slice::<f32>()?.chunks(rank)).for_each(|(row, part)| row.extend_from_slice(part));
            columns.extend(std::iter::repeat_n(*number, rank));
            scales.extend(std::iter::repeat_n(lora.scale, rank));
            if let Some((_, of_lora)) = linear.gains_of(lora)? {
                let start = *number as usize * n;
                gains[start..start + n].copy_from_slice(host(of_lora)?.as_slice::<f32>()?);
            }
        }
        let device = self.device();
        let own = |values: &[f32], shape: &[usize], dtype: DType| -> Result<Tensor> {
            let tensor = Tensor::from_slice(values, shape, Tag::Adapters)?.into_device(device, Tag::Adapters)?;
            Ok(cast(&tensor, dtype, Tag::Adapters)?)
        };
        let dora = parts.iter().any(|(_, lora)| lora.magnitude.is_some());
        Ok(mixed::Adapters {
            a: own(&a, &[columns.len(), k], self.dtype)?,
            b: own(&b.concat(), &[n, columns.len()], self.dtype)?,
            scales: own(&scales, &[columns.len()], DType::F32)?,
            gains: dora.then(|| own(&gains, &[adapters, n], DType::F32)).transpose()?,
            columns: Tensor::from_slice(&columns, &[columns.len()], Tag::Adapters)?
                .into_device(device, Tag::Adapters)?,
        })
    }
}
