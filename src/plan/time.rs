//! How long a training step takes: work by part, at the rates that the parts were measured at on an H100. An estimate.

use super::job::Job;
use nibble_models::llama::Extent;
use nibble_optim::StateBits;

/// Attention by the length of sequences: `peak · length / (length + half)`, since short ones leave more of each tile masked.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    peak: f64,
    half: f64,
}

impl Attention {
    fn rate(self, length: usize) -> f64 {
        self.peak * length as f64 / (length as f64 + self.half)
    }
}

/// What a GPU does a second in the kernels of a step: FLOP, or bytes read and written.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Large 16-bit products.
    products: f64,
    /// Those with the head, a chunk of rows at a time.
    head: f64,
    /// The same by fewer than [`SMALL_HEAD_ROWS`].
    small_head: f64,
    /// Gradients of weights.
    weight_grads: f64,
    /// The adapters' own products, beside the bytes that they read.
    adapters: f64,
    /// Whether Hopper's kernels take together what others take one by one: adapters on one input, u and dB of few ranks, SwiGLU
    /// and the product beside it.
    together: bool,
    attention: [Attention; 2],
    /// Passes over memory.
    bytes: f64,
    /// Pages in host memory, both ways together.
    bus: f64,
    /// What layers keep in host memory, one way.
    link: f64,
    /// Seconds between two kernels.
    gap: f64,
    /// Seconds that dropout takes more for an element of an adapter's input: for `t`, for `dA` and for `dx`.
    dropout: [f64; 3],
}

/// From so many rows on a product with the head fills a GPU.
const SMALL_HEAD_ROWS: usize = 512;
/// Kernels of a linear with an adapter, forward, from `t` on, and backward.
const KERNELS: [f64; 3] = [3.0, 2.0, 6.0];
/// A layer's own, forward and backward.
const OWN_KERNELS: [f64; 2] = [7.0, 12.0];

/// Forward and backward, of the kernels that every GPU has: docs/measurements/2026-11-25-h100.md, heads of 128.
const PLAIN: [Attention; 2] = [Attention { peak: 425e12, half: 330.0 }, Attention { peak: 262e12, half: 210.0 }];
/// Of Hopper's own: docs/measurements/2026-11-25-hopper-attention.md.
const HOPPER: [Attention; 2] = [Attention { peak: 720e12, half: 520.0 }, Attention { peak: 565e12, half: 1250.0 }];

/// An H100 SXM, from the same pages. In a step products run at some 0.9 of what one alone reaches (745 to 790 TFLOP/s), passes
/// over memory at 0.85 to 0.9 of a copy. The adapters' own products are those of docs/measurements/2026-11-28-step-kernels.md,
/// each by itself: whole steps with them have been measured on an H200 alone.
const H100: Rates = Rates {
    products: 680e12,
    head: 620e12,
    // 590 TFLOP/s forward, 331 backward at 256 rows.
    small_head: 424e12,
    weight_grads: 330e12,
    adapters: 400e12,
    together: true,
    attention: HOPPER,
    bytes: 2.6e12,
    bus: 81e9,
    // What was left of 8 layers' copies beside their work: docs/measurements/2026-11-28-memory-for-time.md.
    link: 56e9,
    // 1.3 % of a step of 717 ms, in 5,000 launches.
    gap: 1.9e-6,
    // lora_down_drop, lora_grad_drop and lora_dropped_add at 8192 x 14336: 131, 156 and 255 µs.
    dropout: [1.1e-12, 1.3e-12, 2.2e-12],
};

/// An H200 SXM, from profiles of steps of 8192 tokens: docs/measurements/2026-11-29-step.md, 2026-11-29-stores.md. Its
/// multiprocessors are an H100's.
const H200: Rates = Rates { products: 690e12, head: 660e12, bytes: 3.1e12, ..H100 };

/// Passes over a row of the feed-forward block that SwiGLU takes forward and backward, by itself and within products: there what
/// these take longer.
const SWIGLU: [f64; 2] = [3.0, 6.0];
const SWIGLU_WITHIN: [f64; 2] = [0.7, 1.4];

/// Adapters' products of the kernels that every GPU has, from whole steps of ranks 16 and 64.
const ONE_BY_ONE: f64 = 90e12;

/// The largest rank of which u and dB are made together.
const FEW_RANKS: f64 = 32.0;

/// Ceilings of data sheets: a word of the name, dense bf16 FLOP/s and bytes/s of memory. The first that fits counts.
const SHEETS: [(&str, f64, f64); 11] = [
    ("H100 80GB HBM3", 989e12, 3352e9),
    ("H100 PCIe", 756e12, 2039e9),
    ("H100 NVL", 835e12, 3938e9),
    ("H200", 989e12, 4800e9),
    ("A100-SXM4-80GB", 312e12, 2039e9),
    ("A100 80GB PCIe", 312e12, 1935e9),
    ("A100", 312e12, 1555e9),
    ("L40S", 362e12, 864e9),
    ("RTX 6000 Ada", 364e12, 960e9),
    ("RTX 4090", 165e12, 1008e9),
    ("RTX 3090", 71e12, 936e9),
];

/// A linear of a layer: `[n, k]`, the adapter's rank, and the part of the layers that have one; both on average.
#[derive(Clone, Copy)]
struct Linear {
    n: f64,
    k: f64,
    rank: f64,
    share: f64,
}

/// What a step's work depends on, of a layer on average.
#[derive(Clone, Copy)]
struct Work {
    linears: [Linear; 7],
    /// Tokens, and bytes of an element.
    t: f64,
    w: f64,
    d: f64,
    f: f64,
    q: f64,
    kv: f64,
    heads: f64,
    /// Bytes that are read and written for an element of a weight before its product.
    converted: f64,
    all: bool,
    dora: bool,
    dropout: bool,
}

impl Work {
    fn of(job: &Job) -> Work {
        let (c, trains) = (&job.config, job.trains());
        let layers = c.num_layers as f64;
        let shapes = c.linear_shapes();
        let linears = std::array::from_fn(|i| {
            let ranks = || trains.ranks.iter().map(|ranks| ranks[i]);
            let [n, k] = shapes[i].map(|size| size as f64);
            let share = ranks().filter(|&rank| rank > 0).count() as f64 / layers;
            Linear { n, k, rank: ranks().sum::<usize>() as f64 / layers, share }
        });
        let converted = match (job.quantized, trains.all) {
            (Some(_), _) => 2.516,
            (None, true) => 6.0,
            (None, false) => 0.0,
        };
        Work {
            linears,
            t: job.tokens() as f64,
            w: job.dtype.size() as f64,
            d: c.hidden_size as f64,
            f: c.intermediate_size as f64,
            q: (c.num_heads * c.head_dim) as f64,
            kv: (c.num_kv_heads * c.head_dim) as f64,
            heads: c.num_heads as f64,
            converted,
            all: trains.all,
            dora: trains.dora,
            dropout: trains.dropout,
        }
    }

    /// Bytes that a layer keeps.
    fn kept(&self, extent: Extent) -> f64 {
        let mut row = self.w * (self.d + self.linears.iter().map(|linear| linear.rank).sum::<f64>());
        if extent >= Extent::Attention {
            row += self.w * (2.0 * self.q + 2.0 * self.kv + self.d) + 4.0 * self.heads;
        }
        if extent == Extent::All {
            row += self.w * 2.0 * self.f;
        }
        self.t * row
    }
}

impl Rates {
    /// Those of a GPU of this name, and where they are from; `None` where nothing is known of it.
    pub fn of(name: &str, hopper: bool) -> Option<(Rates, &'static str)> {
        let (sheet, flops, bytes) = SHEETS.iter().find(|(word, ..)| name.contains(word) && !name.contains("Laptop"))?;
        match *sheet {
            "H100 80GB HBM3" => return Some((H100, "estimate: rates measured on an H100")),
            "H200" => return Some((H200, "estimate: rates measured on an H200")),
            _ => {}
        }
        let (flops, bytes) = (flops / SHEETS[0].1, bytes / SHEETS[0].2);
        let attention = if hopper { HOPPER } else { PLAIN };
        let attention = attention.map(|part| Attention { peak: flops * part.peak, ..part });
        let scaled = Rates {
            products: flops * H100.products,
            head: flops * H100.head,
            small_head: flops * H100.small_head,
            weight_grads: flops * H100.weight_grads,
            adapters: flops * if hopper { H100.adapters } else { ONE_BY_ONE },
            together: hopper,
            attention,
            bytes: bytes * H100.bytes,
            bus: H100.bus,
            link: H100.link,
            gap: H100.gap,
            dropout: H100.dropout.map(|seconds| seconds / flops),
        };
        Some((scaled, "rough estimate: an H100's rates, scaled by data sheets; not measured on this GPU"))
    }

    /// Those of an H100, to compare steps by where nothing is known of the device.
    pub fn reference() -> Rates {
        H100
    }

    /// Tokens a second.
    pub fn speed(&self, job: &Job) -> f64 {
        let batches = job.settings.grad_accum as f64;
        let pass = self.pass(job);
        batches * job.tokens() as f64 / (batches * pass + self.update(job, pass))
    }

    /// Seconds of a micro-batch, forward and backward.
    fn pass(&self, job: &Job) -> f64 {
        let (c, settings) = (&job.config, &job.settings);
        let work = Work::of(job);
        let mut seconds = self.head(job, &work);
        let layers = [false, true].map(|held| {
            let work = if held { Work { converted: 0.0, ..work } } else { work };
            (work, self.forward(job, &work), self.backward(job, &work))
        });
        for layer in 0..c.num_layers {
            let keeping = settings.activations.of(layer);
            let (work, forward, backward) = &layers[usize::from(job.holds_dequantized(layer))];
            let (parts, back_parts) = match settings.feed_forward_rows {
                Some(rows) if keeping.extent < Extent::All => self.parts(work, job.tokens().div_ceil(rows)),
                _ => (0.0, 0.0),
            };
            let there = forward + parts;
            let back = backward + back_parts + self.again(job, work, keeping.extent);
            seconds += there + back;
            if keeping.on_host {
                // A copy has the time of the layer before or behind it.
                let copy = work.kept(keeping.extent) / self.link;
                seconds += (copy - there).max(0.0) + (copy - back).max(0.0);
            }
        }
        seconds
    }

    /// A product with a layer's weight, the adapter's branch within; the weight is dequantized or cast before.
    fn product(&self, work: &Work, linear: &Linear) -> f64 {
        let Linear { n, k, rank, .. } = *linear;
        2.0 * work.t * (n * k + rank * (n + k) / 2.0) / self.products + n * k * work.converted / self.bytes
    }

    /// Elements of a row of what the adapters of a layer read forward, and backward for dA.
    fn inputs(&self, work: &Work) -> f64 {
        let alone: Vec<f64> = work.linears.iter().map(|linear| linear.share * linear.k).collect();
        if !self.together || work.dropout {
            return alone.iter().sum();
        }
        // q, k, v; o; gate, up; down.
        [0..3, 3..4, 4..6, 6..7].into_iter().map(|group| alone[group].iter().copied().fold(0.0, f64::max)).sum()
    }

    /// Passes that SwiGLU takes forward and backward.
    fn swiglu(&self) -> [f64; 2] {
        if self.together { SWIGLU_WITHIN } else { SWIGLU }
    }

    /// Attention: two products forward, five backward, over half of the pairs.
    fn attention(&self, job: &Job, work: &Work) -> [f64; 2] {
        let length = job.settings.seq_len;
        let pair = 2.0 * work.t * (length as f64 / 2.0) * work.q;
        let [forward, backward] = self.attention.map(|part| part.rate(length));
        [pair * 2.0 / forward, pair * 5.0 / backward]
    }

    /// A layer's forward pass.
    fn forward(&self, job: &Job, work: &Work) -> f64 {
        let (mut seconds, [attention, _]) = (0.0, self.attention(job, work));
        for linear in &work.linears {
            let Linear { n, k, rank, share } = *linear;
            seconds += self.product(work, linear) + self.gap * KERNELS[0];
            // The adapter's `t`.
            seconds += work.t * rank * (n + k) / self.adapters;
            if work.dora {
                // Norms of all weights in f32; each output once more.
                seconds += share * n * k * (2.0 * work.t / self.products + 24.0 / self.bytes);
                seconds += 2.0 * share * n * work.t * work.w / self.bytes;
            }
            if work.dropout {
                seconds += share * k * work.t * self.dropout[0];
            }
        }
        // Adapters' inputs, norms, rotary and SwiGLU: elements read and written.
        let elements = self.inputs(work) + 4.0 * work.d + 2.0 * (work.q + work.kv) + self.swiglu()[0] * work.f;
        seconds + attention + self.gap * OWN_KERNELS[0] + work.t * work.w * elements / self.bytes
    }

    /// What a layer that has kept so much makes again.
    fn again(&self, job: &Job, work: &Work, extent: Extent) -> f64 {
        let (linears, elements, attention) = match extent {
            Extent::All => return 0.0,
            Extent::Attention => (4..6, 2.0 * work.d, 0.0),
            Extent::Inputs => (0..6, 4.0 * work.d + 2.0 * (work.q + work.kv), self.attention(job, work)[0]),
        };
        let kernels = OWN_KERNELS[0] / 2.0 + linears.len() as f64 * KERNELS[1];
        let linears = &work.linears[linears];
        let mut seconds: f64 = linears.iter().map(|linear| self.product(work, linear)).sum();
        if work.dora {
            seconds +=
                linears.iter().map(|linear| 2.0 * linear.share * linear.n).sum::<f64>() * work.t * work.w / self.bytes;
        }
        seconds + attention + self.gap * kernels + work.t * work.w * elements / self.bytes
    }

    /// A layer's backward pass, from all that the forward pass made.
    fn backward(&self, job: &Job, work: &Work) -> f64 {
        let (mut seconds, [_, attention]) = (0.0, self.attention(job, work));
        for linear in &work.linears {
            let Linear { n, k, rank, share } = *linear;
            seconds += self.product(work, linear) + self.gap * KERNELS[2];
            if work.all {
                seconds += 2.0 * work.t * n * k / self.weight_grads;
            }
            // The adapter's `u` and dB.
            let reads = if self.together && rank <= FEW_RANKS * share { 1.0 } else { 2.0 };
            seconds += share * reads * n * work.t * work.w / self.bytes;
            seconds += 3.0 * work.t * rank * (n + k) / self.adapters;
            if work.dora {
                seconds += 5.0 * share * n * work.t * work.w / self.bytes;
            }
            if work.dropout {
                seconds += share * k * work.t * (self.dropout[1] + self.dropout[2]);
            }
        }
        let elements =
            self.inputs(work) + self.swiglu()[1] * work.f + 12.0 * work.d + 2.0 * (work.q + work.kv) + 2.0 * work.q;
        seconds + attention + self.gap * OWN_KERNELS[1] + work.t * work.w * elements / self.bytes
    }

    /// What a feed-forward block in so many parts takes more, forward and backward: weights dequantized, and rows copied.
    fn parts(&self, work: &Work, parts: usize) -> (f64, f64) {
        let weight = work.linears[4].n * work.linears[4].k * work.converted / self.bytes;
        let (more, rows) = (parts.saturating_sub(1) as f64, 2.0 * work.d * work.t * work.w / self.bytes);
        (more * 3.0 * weight + rows, more * 5.0 * weight + 2.0 * rows)
    }

    /// The head, its loss and the embedding.
    fn head(&self, job: &Job, work: &Work) -> f64 {
        let (vocab, rows) = (job.config.vocab_size as f64, job.head_rows());
        let product = 2.0 * work.t * vocab * work.d;
        // A product of few rows does not fill the GPU.
        let rate = if rows < SMALL_HEAD_ROWS { self.small_head } else { self.head };
        let products = match job.trains().head {
            false => 2.0 * product / rate,
            true => 2.0 * product / rate + product / self.weight_grads + 6.0 * vocab * work.d / self.bytes,
        };
        // Codes are read and weights written for each chunk, forward and backward.
        let chunks = job.tokens().div_ceil(rows) as f64;
        let dequantized = if job.tables_in_8_bits() { 2.0 * chunks * vocab * work.d * (1.0 + work.w) } else { 0.0 };
        products + (work.t * vocab * (4.0 + 4.0 + work.w) + dequantized) / self.bytes
    }

    /// Seconds of an update: gradient, value, its copy and moments, read or written. Pages cross the bus beside the next forward
    /// pass, a quarter of `pass` or more.
    fn update(&self, job: &Job, pass: f64) -> f64 {
        let numel = job.trained() as f64;
        let moments = if job.settings.optimizer_bits == StateBits::F32 { 16.0 } else { 4.1 };
        let away = match job.pages() {
            Ok(Some(pages)) => ((pages.count - pages.resident) * pages.bytes) as f64,
            _ => 0.0,
        };
        // Of pages in host memory gradients and moments come, and moments go.
        let crossing = away * (4.0 + moments) / (4.0 + moments / 2.0);
        numel * (20.0 + moments) / self.bytes + (crossing / self.bus - pass / 4.0).max(0.0)
    }
}

#[cfg(test)]
impl Rates {
    /// An H100 whose adapters' products are made one by one; with the attention kernels of sm_80 and heads in chunks of 256 rows
    /// where `small`. What measured steps ran with.
    pub(super) fn before(small: bool) -> Rates {
        let one_by_one = Rates { adapters: ONE_BY_ONE, together: false, ..H100 };
        if small { Rates { attention: PLAIN, head: H100.small_head, ..one_by_one } } else { one_by_one }
    }
}
