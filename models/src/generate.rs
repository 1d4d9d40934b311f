//! Text generation: one sequence and its KV cache, which a conversation's turns share.

use crate::{
    Error, Llama, Result,
    llama::{Decoder, LayerCache, Row},
    sampling::Sampling,
};
use nibble_kernels::rotary::RotaryTable;
use nibble_runtime::Tensor;
use std::sync::Arc;

/// When to stop, and what to choose.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// Tokens to generate at most.
    pub max_new: usize,
    /// A token of these ends the text, of which it is part.
    pub stop: &'a [u32],
}

/// Continues `prompt` by up to `max_new` tokens. Stops after a token of `stop` (which is part of the result), or when
/// `on_token` answers false.
///
/// # Errors
/// The prompt is empty or holds an id outside of the vocabulary.
pub fn generate(
    llama: &Llama,
    prompt: &[u32],
    max_new: usize,
    stop: &[u32],
    sampling: Sampling,
    on_token: impl FnMut(u32) -> bool,
) -> Result<Vec<u32>> {
    let mut sequence = Sequence::with_capacity(llama, prompt.len() + max_new)?;
    sequence.continue_with(llama, prompt, Limits { max_new, stop }, sampling, on_token)
}

/// The tokens that a model has read, with the keys and values that it made of them.
///
/// They are of one model with one adapter: after a switch, start with a new one.
#[derive(Debug)]
pub struct Sequence {
    /// Tokens in the cache.
    read: Vec<u32>,
    capacity: usize,
    cache: Vec<LayerCache>,
    rope: RotaryTable,
    /// For tokens that come one by one: asked for by the first, `None` inside where the model has none.
    decoder: Option<Option<Decoder>>,
}

/// Room of a sequence whose length is not known: at least this, and doubled as needed.
const ROOM: usize = 1024;

impl Sequence {
    /// Room for `capacity` tokens.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn with_capacity(llama: &Llama, capacity: usize) -> Result<Self> {
        let rope = llama.config.rope.table(llama.config.head_dim, capacity)?.to_device(llama.device())?;
        Ok(Sequence { read: Vec::new(), capacity, cache: llama.cache(capacity)?, rope, decoder: None })
    }

    /// Room for what a conversation usually takes; it grows.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(llama: &Llama) -> Result<Self> {
        Self::with_capacity(llama, ROOM)
    }

    /// Continues `text`, as [`generate`] does. The tokens at its beginning that are those of the last call are not read
    /// again.
    ///
    /// # Errors
    /// As [`generate`].
    pub fn continue_with(
        &mut self,
        llama: &Llama,
        text: &[u32],
        limits: Limits,
        sampling: Sampling,
        mut on_token: impl FnMut(u32) -> bool,
    ) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Err(Error::Invalid("the prompt holds no token; give a text".into()));
        }
        let needed = text.len() + limits.max_new;
        if needed > self.capacity {
            let decoder = self.decoder.take();
            *self = Sequence { decoder, ..Self::with_capacity(llama, needed.next_power_of_two())? };
        }
        // The last token is always read: its logits are what comes next.
        let same = self.read.iter().zip(text).take_while(|(a, b)| a == b).count().min(text.len() - 1);
        self.read.truncate(same);
        let mut text = text.to_vec();
        let start = text.len();
        while text.len() < start + limits.max_new {
            let past = self.read.len();
            let next: Vec<i32> = text[past..].iter().map(|&id| i32::try_from(id).unwrap_or(i32::MAX)).collect();
            let logits = self.logits(llama, &next)?;
            self.read.extend(&text[past..]);
            let token = sampling.choose_each(logits, &[&text])?[0];
            text.push(token);
            if !on_token(token) || limits.stop.contains(&token) {
                break;
            }
        }
        Ok(text.split_off(start))
    }

    /// Logits f32 `[1, V]` after `next`, which follow what has been read.
    fn logits(&mut self, llama: &Llama, next: &[i32]) -> Result<Tensor> {
        let past = self.read.len();
        if next.len() == 1 {
            let decoder = match &mut self.decoder {
                Some(decoder) => decoder,
                None => self.decoder.insert(llama.decoder(&Arc::new(llama.own_mixture()?))?),
            };
            if let Some(decoder) = decoder {
                let row = Row { position: past, first: 0, owner: 0 };
                return Ok(decoder.logits(llama, next, &[row], &self.rope, &mut self.cache)?);
            }
        }
        llama.next_logits(next, past, &self.rope, &mut self.cache)
    }
}
