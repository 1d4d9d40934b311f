//! Several adapters of one model by name, of which one is on the layers.

use super::{Llama, Lora, Param};
use crate::{Error, Result, files::peft::Adapter};
use nibble_kernels::table::Table;
use std::{collections::BTreeMap, path::Path};

/// What an adapter puts on a model, or what a model has without any.
#[derive(Debug)]
pub(super) struct Mounted {
    /// For each linear layer in order.
    pub loras: Vec<Option<Lora>>,
    /// The tables share memory with the base's where the adapter has none of its own.
    pub embedding: Param<Table>,
    pub head: Option<Param<Table>>,
    /// Tokens.
    pub vocab: usize,
}

/// The adapters that wait, by name. `None` names what the model has without any: nothing, or adapters that train.
#[derive(Debug, Default)]
pub struct Adapters {
    waiting: BTreeMap<Option<String>, Mounted>,
    active: Option<String>,
}

impl Adapters {
    /// The adapter on the layers; `None` for the base.
    pub fn active(&self) -> Option<&str> {
        self.active.as_deref()
    }

    /// Whether the adapter `name` brings an embedding or head.
    pub(super) fn has_tables(&self, name: &str, llama: &Llama) -> Result<bool> {
        let trains = |embedding: &Param<Table>, head: &Option<Param<Table>>| {
            embedding.id.is_some() || head.as_ref().is_some_and(|head| head.id.is_some())
        };
        if self.active() == Some(name) {
            return Ok(trains(&llama.embedding, &llama.head));
        }
        let waiting = self.waiting.get(&Some(name.to_string()));
        let Mounted { embedding, head, .. } =
            waiting.ok_or_else(|| Error::Invalid(format!("no adapter is named \"{name}\"")))?;
        Ok(trains(embedding, head))
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
        let mounted = self.mounted(adapter, path)?;
        self.adapters.waiting.insert(Some(name.to_string()), mounted);
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
        let before = self.mount(next);
        let before_name = std::mem::replace(&mut self.adapters.active, name);
        self.adapters.waiting.insert(before_name, before);
        Ok(())
    }

    /// What the adapter `name` puts on each linear layer, in their order.
    pub(super) fn loras_of(&self, name: &str) -> Result<Vec<Option<&Lora>>> {
        if self.adapters.active() == Some(name) {
            let linears = self.layers.iter().flat_map(|layer| layer.linears());
            return Ok(linears.map(|linear| linear.lora.as_ref()).collect());
        }
        let waiting = self.adapters.waiting.get(&Some(name.to_string()));
        let waiting = waiting.ok_or_else(|| Error::Invalid(format!("no adapter is named \"{name}\"")))?;
        Ok(waiting.loras.iter().map(Option::as_ref).collect())
    }

    /// Puts `next` on the model and returns what it had.
    pub(super) fn mount(&mut self, next: Mounted) -> Mounted {
        let put = |(linear, next)| std::mem::replace(linear, next);
        Mounted {
            loras: self.linears_mut().map(|linear| &mut linear.lora).zip(next.loras).map(put).collect(),
            embedding: std::mem::replace(&mut self.embedding, next.embedding),
            head: std::mem::replace(&mut self.head, next.head),
            vocab: std::mem::replace(&mut self.config.vocab_size, next.vocab),
        }
    }

    /// The tables without any adapter.
    pub(super) fn base(&self) -> Mounted {
        match self.adapters.waiting.get(&None) {
            Some(Mounted { embedding, head, vocab, .. }) => {
                Mounted { loras: Vec::new(), embedding: embedding.clone(), head: head.clone(), vocab: *vocab }
            }
            None => Mounted {
                loras: Vec::new(),
                embedding: self.embedding.clone(),
                head: self.head.clone(),
                vocab: self.config.vocab_size,
            },
        }
    }
}
