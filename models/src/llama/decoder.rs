//! One more token of up to 16 sequences by the kernels of [`nibble_kernels::decoding`]: nine launches a layer, which are
//! recorded once and run for every token.

use super::{Layer, LayerCache, Linear, Llama, Mixture};
use nibble_kernels::{
    attention::Heads,
    decoding::{self, Factors, MOST_ROWS, Part, Scratch},
    quantize::QuantTensor,
    rms_norm,
    rotary::RotaryTable,
    table,
};
use nibble_runtime::{
    DType, Device, Error, Result, Tag, Tensor,
    cuda::{Gpu, Graph},
};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

const OP: &str = "decoding step";

/// A row of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// Position of its token.
    pub position: usize,
    /// First row of its sequence in the cache.
    pub first: usize,
    /// Its adapter in the mixture; −1 for none.
    pub owner: i32,
}

/// Makes steps of a model with adapters that stay as they are.
#[derive(Debug)]
pub(crate) struct Decoder {
    mixture: Arc<Mixture>,
    layers: Vec<LayerFactors>,
    heads: Heads,
    step: Option<Step>,
}

/// A's of weights with one input, and how wide `t` is.
#[derive(Debug)]
struct LayerFactors {
    qkv: Option<Factors>,
    o: Option<Factors>,
    gate_up: Option<Factors>,
    down: Option<Factors>,
}

/// What a step of so many rows works in, and the record of its launches.
#[derive(Debug)]
struct Step {
    rows: usize,
    /// i32 `[T, 4]`, as the kernels read it.
    tokens: Tensor,
    x: Tensor, // [T, D]
    h: Tensor, // [T, D]
    n: Tensor, // [T, D]
    q: Tensor, // [T, H·d]
    o: Tensor, // [T, H·d]
    a: Tensor, // [T, F]
    /// `t` `[T, R]`, by R.
    t: BTreeMap<usize, Tensor>,
    scratch: Scratch,
    /// Recorded for this cache and these angles; `None` before the first step, whose kernels are still to be loaded.
    record: Option<(Graph, [u64; 2])>,
}

impl Llama {
    /// A decoder for the adapters of `mixture`, or `None` where its kernels do not run the model: it is on the CPU or in f32,
    /// a weight is not of 4 bits as they take it, or a size is odd.
    ///
    /// # Errors
    /// The device is out of memory.
    pub(crate) fn decoder(&self, mixture: &Arc<Mixture>) -> Result<Option<Decoder>> {
        let config = &self.config;
        let heads = Heads { query: config.num_heads, kv: config.num_kv_heads, dim: config.head_dim };
        let fits = self.device() != Device::Cpu
            && self.dtype != DType::F32
            && decoding::fits_heads(heads)
            && config.hidden_size.is_multiple_of(16)
            && self.layers.iter().flat_map(Layer::linears).all(|linear| mixture.suits_decoding(linear));
        if !fits {
            return Ok(None);
        }
        let factors = |layer: &Layer| {
            let of = |linears: &[&Linear]| mixture.factors(linears);
            Ok(LayerFactors {
                qkv: of(&[&layer.q, &layer.k, &layer.v])?,
                o: of(&[&layer.o])?,
                gate_up: of(&[&layer.gate, &layer.up])?,
                down: of(&[&layer.down])?,
            })
        };
        let layers = self.layers.iter().map(factors).collect::<Result<_>>()?;
        Ok(Some(Decoder { mixture: Arc::clone(mixture), layers, heads, step: None }))
    }
}

impl Mixture {
    /// Whether the linear, with the adapters it has here, is one for the kernels of decoding.
    fn suits_decoding(&self, linear: &Linear) -> bool {
        let even = |side: &nibble_kernels::mixed::Adapters| side.a.shape()[0].is_multiple_of(2);
        decoding::fits(&linear.weight).is_some() && self.side(linear.index).is_none_or(even)
    }

    /// The A's of linears with one input, one below the other.
    fn factors(&self, linears: &[&Linear]) -> Result<Option<Factors>> {
        let sides: Vec<_> = linears.iter().filter_map(|linear| self.side(linear.index)).collect();
        let Some(first) = sides.first() else { return Ok(None) };
        let (columns, k) = (sides.iter().map(|side| side.a.shape()[0]).sum(), first.a.shape()[1]);
        let empty = |shape: &[usize], like: &Tensor| Tensor::empty(shape, like.dtype(), like.device(), Tag::Adapters);
        let mut factors = Factors {
            a: empty(&[columns, k], &first.a)?,
            owners: empty(&[columns], &first.columns)?,
            scales: empty(&[columns], &first.scales)?,
        };
        let mut column = 0;
        for side in sides {
            factors.a.copy_from(column * k, &side.a)?;
            factors.owners.copy_from(column, &side.columns)?;
            factors.scales.copy_from(column, &side.scales)?;
            column += side.a.shape()[0];
        }
        Ok((columns > 0).then_some(factors))
    }

    /// The linears as parts of one launch: their columns of `t` lie in the order of [`Mixture::factors`].
    fn parts<'a, const N: usize>(&'a self, linears: [&'a Linear; N]) -> Result<[Part<'a>; N]> {
        let mut column = 0;
        let mut part = |linear: &'a Linear| -> Result<Part<'a>> {
            let side = self.side(linear.index);
            let own = side.map_or(0, |side| side.a.shape()[0]);
            column += own;
            Ok(Part {
                weight: quantized(linear)?,
                b: side.filter(|_| own > 0).map(|side| &side.b),
                gains: side.and_then(|side| side.gains.as_ref()),
                column: column - own,
            })
        };
        let parts: Vec<Part> = linears.into_iter().map(&mut part).collect::<Result<_>>()?;
        parts.try_into().map_err(|_| Error::invalid(OP, "a layer has other linears"))
    }
}

fn quantized(linear: &Linear) -> Result<&QuantTensor> {
    let misfit = || Error::invalid(OP, format!("{} is not in 4 bits any more", linear.name));
    decoding::fits(&linear.weight).ok_or_else(misfit)
}

impl Step {
    fn new(llama: &Llama, rows: usize, heads: Heads) -> Result<Self> {
        let config = &llama.config;
        let empty = |width| Tensor::empty(&[rows, width], llama.dtype, llama.device(), Tag::Workspace);
        let (d, q) = (config.hidden_size, heads.query * heads.dim);
        Ok(Step {
            rows,
            tokens: Tensor::empty(&[rows, 4], DType::I32, llama.device(), Tag::Workspace)?,
            x: empty(d)?,
            h: empty(d)?,
            n: empty(d)?,
            q: empty(q)?,
            o: empty(q)?,
            a: empty(config.intermediate_size)?,
            t: BTreeMap::new(),
            scratch: Scratch::new(rows, heads, llama.device())?,
            record: None,
        })
    }

    /// Where a step works: a record holds for as long as this is the same.
    fn place(rope: &RotaryTable, cache: &[LayerCache]) -> Result<[u64; 2]> {
        let first = cache.first().map_or(Ok(0), |cache| cache.keys.device_pointer())?;
        Ok([first, rope.device_pointer()?])
    }
}

impl Decoder {
    /// Whether a step may have so many rows.
    pub(crate) fn takes(&self, rows: usize) -> bool {
        (1..=MOST_ROWS).contains(&rows)
    }

    /// Logits f32 `[T, V]` after one token `ids` more at each of `rows`; their keys and values go to the cache.
    ///
    /// # Errors
    /// A row is outside of the cache or of `rope`; the device is out of memory.
    pub(crate) fn logits(
        &mut self,
        llama: &Llama,
        ids: &[i32],
        rows: &[Row],
        rope: &RotaryTable,
        cache: &mut [LayerCache],
    ) -> Result<Tensor> {
        let capacity = cache.first().map_or(0, |cache| cache.keys.shape()[0]);
        let outside = |row: &&Row| row.first + row.position >= capacity || row.position >= rope.len();
        if let Some(row) = rows.iter().find(outside) {
            return Err(Error::invalid(OP, format!("{row:?} does not fit a cache of {capacity}")));
        }
        let mut step = match self.step.take() {
            Some(step) if step.rows == rows.len() => step,
            _ => Step::new(llama, rows.len(), self.heads)?,
        };
        let table: Vec<i32> =
            rows.iter().flat_map(|row| [row.position as i32, row.first as i32, row.owner, 0]).collect();
        step.tokens.copy_from(0, &Tensor::from_slice(&table, &[rows.len(), 4], Tag::Workspace)?)?;
        step.x.copy_from(0, &table::gather(ids, &llama.embedding.value, llama.dtype)?)?;
        self.run(llama, &mut step, rope, cache)?;
        let (hidden, _) = rms_norm::forward(&step.x, &llama.norm.value, llama.config.rms_norm_eps)?;
        self.step = Some(step);
        table::project(&hidden, &llama.head_param().value)
    }

    /// All layers, from `x` to `x`: as recorded; or by launches, and on record for the next step.
    fn run(&self, llama: &Llama, step: &mut Step, rope: &RotaryTable, cache: &mut [LayerCache]) -> Result<()> {
        let (gpu, place) = (Gpu::of(llama.device())?, Step::place(rope, cache)?);
        match &step.record {
            Some((graph, of)) if *of == place && gpu.can_record() => graph.launch(),
            _ => {
                self.launch(llama, step, rope, cache)?;
                if gpu.can_record() {
                    let graph = Graph::record(gpu, || self.launch(llama, step, rope, cache))?;
                    step.record = Some((graph, place));
                }
                Ok(())
            }
        }
    }

    fn launch(&self, llama: &Llama, step: &mut Step, rope: &RotaryTable, cache: &mut [LayerCache]) -> Result<()> {
        for ((layer, factors), cache) in llama.layers.iter().zip(&self.layers).zip(cache) {
            self.layer(layer, factors, step, rope, cache)?;
        }
        Ok(())
    }

    fn layer(
        &self,
        layer: &Layer,
        factors: &LayerFactors,
        step: &mut Step,
        rope: &RotaryTable,
        cache: &mut LayerCache,
    ) -> Result<()> {
        let Step { tokens, x, h, n, q, o, a, t, scratch, .. } = step;
        let qkv = self.mixture.parts([&layer.q, &layer.k, &layer.v])?;
        let gate_up = self.mixture.parts([&layer.gate, &layer.up])?;
        let ([of_o], [of_down]) = (self.mixture.parts([&layer.o])?, self.mixture.parts([&layer.down])?);
        let norms = [&layer.input_norm, &layer.post_norm].map(|norm| &norm.value);

        let made = low_rank(x, Some((norms[0], layer.eps, n)), factors.qkv.as_ref(), tokens, t)?;
        decoding::turn(n, qkv, made, tokens, rope, q, (&mut cache.keys, &mut cache.values))?;
        decoding::attend(q, (&cache.keys, &cache.values), tokens, self.heads, scratch, o)?;
        let made = low_rank(o, None, factors.o.as_ref(), tokens, t)?;
        decoding::add(o, of_o, made, Some(x), tokens, h)?;
        let made = low_rank(h, Some((norms[1], layer.eps, n)), factors.gate_up.as_ref(), tokens, t)?;
        decoding::gate(n, gate_up, made, tokens, a)?;
        let made = low_rank(a, None, factors.down.as_ref(), tokens, t)?;
        decoding::add(a, of_down, made, Some(h), tokens, x)
    }
}

/// [`decoding::low_rank`] into the `t` of its width, which is made at the first step.
fn low_rank<'a>(
    x: &Tensor,
    norm: Option<(&Tensor, f32, &mut Tensor)>,
    factors: Option<&Factors>,
    tokens: &Tensor,
    made: &'a mut BTreeMap<usize, Tensor>,
) -> Result<Option<&'a Tensor>> {
    let Some(factors) = factors else {
        decoding::low_rank(x, norm, None, tokens)?;
        return Ok(None);
    };
    let (rows, columns) = (x.shape()[0], factors.a.shape()[0]);
    let t = match made.entry(columns) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => entry.insert(Tensor::empty(&[rows, columns], x.dtype(), x.device(), Tag::Workspace)?),
    };
    decoding::low_rank(x, norm, Some((factors, t)), tokens)?;
    Ok(Some(t))
}
