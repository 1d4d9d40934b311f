//! Several adapters of one model by name, of which one is on the layers.

use super::{Llama, Lora};
use crate::{Error, Result, files::peft::Adapter};
use std::{collections::BTreeMap, path::Path};

/// The adapters that wait, by name: for each linear layer in order, what goes onto it. `None` names what the layers have
/// without any: nothing, or adapters that train.
#[derive(Debug, Default)]
pub struct Adapters {
    waiting: BTreeMap<Option<String>, Vec<Option<Lora>>>,
    active: Option<String>,
}

impl Adapters {
    /// The adapter on the layers; `None` for the base.
    pub fn active(&self) -> Option<&str> {
        self.active.as_deref()
    }

    /// All names, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.waiting.keys().flatten().chain(&self.active).map(String::as_str).collect();
        names.sort_unstable();
        names
    }
}

impl Llama {
    /// Takes an adapter into memory under `name`, without putting it on the layers.
    ///
    /// # Errors
    /// The name is taken, or the adapter is for another model (see [`Llama::set_adapter`]).
    pub fn add_adapter(&mut self, name: &str, adapter: &Adapter, path: &Path) -> Result<()> {
        if self.adapters.names().contains(&name) {
            return Err(Error::Invalid(format!("two adapters are named \"{name}\"; name them apart: NAME=DIR")));
        }
        let loras = self.loras(adapter, path)?;
        self.adapters.waiting.insert(Some(name.to_string()), loras);
        Ok(())
    }

    /// Puts the adapter `name`, or none, on the layers. Nothing is copied: layers and waiting adapters exchange pointers.
    /// KV caches made before are of the adapter before.
    ///
    /// # Errors
    /// There is no adapter of this name.
    pub fn switch_adapter(&mut self, name: Option<&str>) -> Result<()> {
        let name = name.map(str::to_string);
        if name == self.adapters.active {
            return Ok(());
        }
        let Some(next) = self.adapters.waiting.remove(&name) else {
            let (name, all) = (name.unwrap_or_default(), self.adapters.names().join(", "));
            let all = if all.is_empty() { "none is loaded".to_string() } else { format!("loaded are: {all}") };
            return Err(Error::Invalid(format!("no adapter is named \"{name}\"; {all}")));
        };
        let put = |(linear, next)| std::mem::replace(linear, next);
        let before = self.linears_mut().map(|linear| &mut linear.lora).zip(next).map(put).collect();
        let before_name = std::mem::replace(&mut self.adapters.active, name);
        self.adapters.waiting.insert(before_name, before);
        Ok(())
    }
}
