//! How long a training step takes: work by part, at the rates that the parts were measured at on an H100. An estimate.

use super::job::Job;
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
    /// Gradients of weights.
    weight_grads: f64,
    /// The adapters' own products, beside the bytes that they read.
    adapters: f64,
    /// Products of 16-bit rows with an f32 head.
    mixed: f64,
    attention: [Attention; 2],
    /// Passes over memory.
    bytes: f64,
    /// Pages in host memory, both ways together.
    bus: f64,
    /// Seconds between two kernels.
    gap: f64,
    /// Seconds that dropout takes more for an element of an adapter's input: for `t`, for `dA` and for `dx`.
    dropout: [f64; 3],
}

/// Kernels of a layer forward and backward: those of its own, and of each linear with an adapter.
const KERNELS: [f64; 2] = [6.0 + 7.0 * 5.0, 11.0 + 7.0 * 9.0];

/// Forward and backward, of the kernels that every GPU has: docs/measurements/2026-11-25-h100.md, heads of 128.
const PLAIN: [Attention; 2] = [Attention { peak: 425e12, half: 330.0 }, Attention { peak: 262e12, half: 210.0 }];
/// Of Hopper's own: docs/measurements/2026-11-25-hopper-attention.md.
const HOPPER: [Attention; 2] = [Attention { peak: 720e12, half: 520.0 }, Attention { peak: 565e12, half: 1250.0 }];

/// An H100 SXM, from the same pages. In a step products run at some 0.9 of what one alone reaches (745 to 790 TFLOP/s), passes
/// over memory at 0.85 to 0.9 of a copy. What the two kinds of products that no page has a rate of reach was taken from whole
/// steps: the adapters' from ranks 16 and 64, those with an f32 head from full fine-tuning of a 1B.
const H100: Rates = Rates {
    products: 680e12,
    head: 620e12,
    weight_grads: 330e12,
    adapters: 90e12,
    mixed: 7.5e12,
    attention: HOPPER,
    bytes: 2.6e12,
    bus: 81e9,
    // 1.3 % of a step of 717 ms, in 5,000 launches.
    gap: 1.9e-6,
    // lora_down_drop, lora_grad_drop and lora_dropped_add at 8192 x 14336: 131, 156 and 255 µs.
    dropout: [1.1e-12, 1.3e-12, 2.2e-12],
};

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

impl Rates {
    /// Those of a GPU of this name, and where they are from; `None` where nothing is known of it.
    pub fn of(name: &str, hopper: bool) -> Option<(Rates, &'static str)> {
        let (sheet, flops, bytes) = SHEETS.iter().find(|(word, ..)| name.contains(word) && !name.contains("Laptop"))?;
        if *sheet == SHEETS[0].0 {
            return Some((H100, "estimate: rates measured on an H100"));
        }
        let (flops, bytes) = (flops / SHEETS[0].1, bytes / SHEETS[0].2);
        let attention = if hopper { HOPPER } else { PLAIN };
        let attention = attention.map(|part| Attention { peak: flops * part.peak, ..part });
        let scaled = Rates {
            products: flops * H100.products,
            head: flops * H100.head,
            weight_grads: flops * H100.weight_grads,
            adapters: flops * H100.adapters,
            mixed: flops * H100.mixed,
            attention,
            bytes: bytes * H100.bytes,
            bus: H100.bus,
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
        batches * job.tokens() as f64 / (batches * self.pass(job) + self.update(job))
    }

    /// Seconds of a micro-batch, forward and backward.
    fn pass(&self, job: &Job) -> f64 {
        let (c, s) = (&job.config, &job.settings);
        let (t, w) = (job.tokens() as f64, job.dtype.size() as f64);
        let (layers, again) = (c.num_layers as f64, job.recomputed() as f64);
        let (d, f, vocab) = (c.hidden_size as f64, c.intermediate_size as f64, c.vocab_size as f64);
        let (q, kv) = ((c.num_heads * c.head_dim) as f64, (c.num_kv_heads * c.head_dim) as f64);
        let trains = job.trains();
        let shapes = c.linear_shapes().map(|[n, k]| (n as f64, k as f64));
        let weights: f64 = shapes.iter().map(|(n, k)| n * k).sum();
        // A layer that runs again leaves its last product out.
        let passes = 2.0 * layers + again * (1.0 - shapes[6].0 * shapes[6].1 / weights);

        // Products with the layers' weights, adapters' branches within; dequantized or cast before each.
        // Of adapters, what a layer has on average.
        let on_linears = |f: &dyn Fn(f64, f64, f64) -> f64| -> f64 {
            let of_layer = |ranks: &[usize; 7]| -> f64 {
                shapes
                    .iter()
                    .zip(ranks)
                    .filter(|(_, rank)| **rank > 0)
                    .map(|((n, k), rank)| f(*n, *k, *rank as f64))
                    .sum()
            };
            trains.ranks.iter().map(of_layer).sum::<f64>() / layers
        };
        let branches = on_linears(&|n, k, r| r * (n + k));
        let mut seconds = passes * 2.0 * t * (weights + branches / 2.0) / self.products;
        let converted = match (job.quantized, trains.all) {
            (Some(_), _) => 2.516,
            (None, true) => 6.0,
            (None, false) => 0.0,
        };
        seconds += passes * weights * converted / self.bytes;
        if trains.all {
            seconds += layers * 2.0 * t * weights / self.weight_grads;
        }

        // The adapters' own: t and u, dB and dA. Each reads an input or a gradient.
        let (of_inputs, of_grads) = (on_linears(&|_, k, _| k), on_linears(&|n, _, _| n));
        let reads = (layers + again) * of_inputs + layers * (2.0 * of_grads + of_inputs);
        let work = (layers + again) * branches / 2.0 + layers * 1.5 * branches;
        seconds += t * w * reads / self.bytes + 2.0 * t * work / self.adapters;

        // Attention: two products forward, five backward, over half of the pairs.
        let pair = 2.0 * t * (s.seq_len as f64 / 2.0) * q;
        let [forward, backward] = self.attention.map(|part| part.rate(s.seq_len));
        seconds += pair * ((layers + again) * 2.0 / forward + layers * 5.0 / backward);

        if trains.dora {
            // Norms of all weights in f32; each output once more; lengths applied on the way out and back.
            seconds += layers * on_linears(&|n, k, _| n * k) * (2.0 * t / self.products + 24.0 / self.bytes);
            seconds += t * w * (2.0 * (layers + again) + 5.0 * layers) * of_grads / self.bytes;
        }
        if trains.dropout {
            let [down, weight, input] = self.dropout;
            seconds += t * of_inputs * ((layers + again) * down + layers * (weight + input));
        }
        seconds += self.gap * ((layers + again) * KERNELS[0] + layers * KERNELS[1]);

        // Norms, rotary and SwiGLU: elements read and written.
        let ahead = 4.0 * d + 2.0 * (q + kv) + 3.0 * f;
        let back = 8.0 * f + 12.0 * d + 2.0 * (q + kv) + 2.0 * q;
        seconds += t * w * ((layers + again) * ahead + layers * back) / self.bytes;

        // The head, its loss and the embedding.
        let head = 2.0 * t * vocab * d;
        seconds += match trains.head {
            false => 2.0 * head / self.head,
            true => 2.0 * head / self.mixed + head / self.weight_grads,
        };
        seconds += t * vocab * (4.0 + 4.0 + w) / self.bytes;
        seconds
    }

    /// Seconds of an update: gradient, value, its copy and moments, read or written.
    fn update(&self, job: &Job) -> f64 {
        let numel = job.trained() as f64;
        let moments = if job.settings.optimizer_bits == StateBits::F32 { 16.0 } else { 4.1 };
        let away = match job.pages() {
            Ok(Some(pages)) => ((pages.count - pages.resident) * pages.bytes) as f64,
            _ => 0.0,
        };
        // Of pages in host memory gradients and moments come, and moments go.
        let crossing = away * (4.0 + moments) / (4.0 + moments / 2.0);
        numel * (20.0 + moments) / self.bytes + crossing / self.bus
    }
}

#[cfg(test)]
impl Rates {
    /// An H100 with the attention kernels of sm_80, and heads in chunks of 256 rows where `small` (590 TFLOP/s forward, 331
    /// backward): what some measured steps ran with.
    pub(super) fn before(small: bool) -> Rates {
        Rates { attention: PLAIN, head: if small { 424e12 } else { H100.head }, ..H100 }
    }
}
