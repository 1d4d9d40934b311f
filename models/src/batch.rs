//! Text generation of many sequences at once, each with its own adapter.

use crate::{
    Error, Llama, Result,
    llama::{self, Decoder, LayerCache, Mixture, Pass},
    sampling::Sampling,
};
use nibble_kernels::rotary::RotaryTable;
use nibble_runtime::Tensor;
use std::sync::Arc;

/// A text to continue.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its tokens.
    pub prompt: Vec<u32>,
    /// Name of its adapter; `None` for the base.
    pub adapter: Option<String>,
}

/// A sequence on its way.
struct Row {
    text: Vec<u32>,
    /// Tokens of the prompt.
    start: usize,
    /// Tokens in the cache.
    read: usize,
    owner: i32,
    done: bool,
}

/// Continues every prompt by up to `max_new` tokens, as [`crate::generate::generate`] does each alone (to rounding): a step
/// makes one token of every text that goes on, reading the weights once. Texts end after a token of `stop`, or when
/// `on_token` answers false to the number of a request and its next token.
///
/// # Errors
/// A prompt is empty or holds an id outside of the vocabulary; an adapter is not loaded, or has an embedding or head of its
/// own.
pub fn generate_batch(
    llama: &Llama,
    requests: &[Request],
    max_new: usize,
    stop: &[u32],
    sampling: Sampling,
    mut on_token: impl FnMut(usize, u32) -> bool,
) -> Result<Vec<Vec<u32>>> {
    if requests.iter().any(|request| request.prompt.is_empty()) {
        return Err(Error::Invalid("a prompt holds no token; give a text".into()));
    }
    let mut names: Vec<&str> = requests.iter().filter_map(|request| request.adapter.as_deref()).collect();
    names.sort_unstable();
    names.dedup();
    let mixture = Arc::new(llama.mixture(&names)?);
    let row = |request: &Request| -> Result<Row> {
        let owner = mixture.owner(request.adapter.as_deref())?;
        Ok(Row { text: request.prompt.clone(), start: request.prompt.len(), read: 0, owner, done: max_new == 0 })
    };
    let mut rows: Vec<Row> = requests.iter().map(row).collect::<Result<_>>()?;
    let capacity = rows.iter().map(|row| row.start).max().unwrap_or(0) + max_new;
    let mut batch = Batch {
        llama,
        decoder: llama.decoder(&mixture)?,
        mixture,
        capacity,
        cache: llama.cache(capacity * rows.len())?,
        rope: llama.config.rope.table(llama.config.head_dim, capacity)?.to_device(llama.device())?,
    };
    while rows.iter().any(|row| !row.done) {
        let logits = batch.next(&mut rows)?;
        let texts: Vec<&[u32]> = rows.iter().filter(|row| !row.done).map(|row| &row.text[..]).collect();
        let mut tokens = sampling.choose_each(logits, &texts)?.into_iter();
        for (number, row) in rows.iter_mut().enumerate().filter(|(_, row)| !row.done) {
            let token = tokens.next().ok_or_else(|| Error::Invalid("a sequence has no logits".into()))?;
            row.text.push(token);
            let more = on_token(number, token) && !stop.contains(&token);
            row.done = !more || row.text.len() >= row.start + max_new;
        }
    }
    Ok(rows.into_iter().map(|mut row| row.text.split_off(row.start)).collect())
}

struct Batch<'a> {
    llama: &'a Llama,
    mixture: Arc<Mixture>,
    /// For steps that give every row one token.
    decoder: Option<Decoder>,
    /// Tokens of a sequence at most.
    capacity: usize,
    /// Sequence `i` has the rows from `i · capacity` on.
    cache: Vec<LayerCache>,
    rope: RotaryTable,
}

impl Batch<'_> {
    /// The next token's logits f32 of every row that goes on. What they have not read yet is read in one pass.
    fn next(&mut self, rows: &mut [Row]) -> Result<Tensor> {
        let (mut ids, mut owners, mut spans, mut last) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (number, row) in rows.iter_mut().enumerate().filter(|(_, row)| !row.done) {
            let new = &row.text[row.read..];
            ids.extend(new.iter().map(|&id| i32::try_from(id).unwrap_or(i32::MAX)));
            owners.extend(std::iter::repeat_n(row.owner, new.len()));
            spans.push((number * self.capacity, row.read, new.len()));
            last.push(ids.len() - 1);
            row.read = row.text.len();
        }
        let one_each = ids.len() == spans.len();
        if let Some(decoder) = self.decoder.as_mut().filter(|decoder| one_each && decoder.takes(ids.len())) {
            let row =
                |(&(first, position, _), &owner): (&(usize, usize, usize), &i32)| llama::Row { position, first, owner };
            let rows: Vec<llama::Row> = spans.iter().zip(&owners).map(row).collect();
            return Ok(decoder.logits(self.llama, &ids, &rows, &self.rope, &mut self.cache)?);
        }
        let pass = Pass::batched(&self.llama.config, &spans, &self.rope)?;
        let pass = pass.mixed(Arc::clone(&self.mixture), &owners)?.to_device(self.llama.device())?;
        self.llama.last_logits(&ids, &pass, &last, &mut self.cache)
    }
}
