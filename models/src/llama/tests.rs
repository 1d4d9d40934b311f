//! Hand-written backward = tape of primitives = finite differences of an f64 layer.

use super::{composed, layer::LayerNode, *};
use crate::files::peft::{ALL_LINEAR, AdapterConfig, TargetModules};
use nibble_kernels::{
    linear::Weight,
    quantize::{QuantType, ScaleRounding, quantize},
    rotary::{RopeConfig, RopeScaling},
    table::Rows8,
};
use nibble_runtime::rng::{Philox, Stream};
use proptest::prelude::*;
use std::collections::BTreeMap;

mod decoding;

fn random(shape: &[usize], seed: u64, scale: f32) -> Tensor {
    let rng = Philox::new(seed, Stream { purpose: 99, step: 0, layer: 0 });
    let values: Vec<f32> = (0..shape.iter().product::<usize>() as u64).map(|i| scale * rng.normal(i)).collect();
    Tensor::from_slice(&values, shape, Tag::Workspace).unwrap()
}

fn config(kv: usize, group: usize, half: usize, hidden: usize, ffn: usize) -> LlamaConfig {
    LlamaConfig {
        vocab_size: 11,
        hidden_size: hidden,
        intermediate_size: ffn,
        num_layers: 2,
        num_heads: kv * group,
        num_kv_heads: kv,
        head_dim: 2 * half,
        rms_norm_eps: 1e-5,
        rope: RopeConfig { theta: 100.0, scaling: RopeScaling::Default },
        tie_word_embeddings: false,
        max_position_embeddings: 64,
        bos_token_id: None,
        eos_token_ids: vec![],
    }
}

/// A plain adapter of every linear layer.
fn everywhere(rank: usize, dropout: f32) -> AdapterConfig {
    AdapterConfig {
        r: rank,
        lora_alpha: 3.0,
        lora_dropout: f64::from(dropout),
        use_rslora: rank > 2,
        target_modules: Some(TargetModules::Pattern(ALL_LINEAR.into())),
        ..AdapterConfig::default()
    }
}

/// A model with random weights (linears in NF4 if `quantized`), adapters whose B is not zero, and dropout.
fn model(config: LlamaConfig, quantized: bool, lora: Option<(usize, f32)>, seed: u64) -> Llama {
    model_with(config, quantized, lora.map(|(rank, dropout)| everywhere(rank, dropout)), seed)
}

/// The same, with this adapter: the whole model trains if there is none.
fn model_with(config: LlamaConfig, quantized: bool, lora: Option<AdapterConfig>, seed: u64) -> Llama {
    let c = config.clone();
    let (d, f, q, kv) = (c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
    let mut salt = seed;
    let mut next = |shape: &[usize], scale: f32| {
        salt = salt.wrapping_mul(6364136223846793005).wrapping_add(1);
        random(shape, salt, scale)
    };
    let param = |name: &str, value| Param { name: name.into(), id: None, value };
    let layers = (0..c.num_layers).map(|i| {
        let mut norm = || {
            let mut weight = next(&[d], 0.2);
            weight.as_mut_slice::<f32>().unwrap().iter_mut().for_each(|w| *w += 1.0);
            param("norm", weight)
        };
        let (input_norm, post_norm) = (norm(), norm());
        let mut index = 7 * i as u32;
        let mut linear = |name: &str, n: usize, k: usize| {
            let dense = next(&[n, k], 1.0 / (k as f32).sqrt());
            let weight = match quantized {
                false => Weight::Dense(dense),
                true => {
                    let quantized =
                        quantize(&dense, QuantType::Nf4, 64, Some(ScaleRounding::Stepped), DType::F32, Tag::Weights);
                    Weight::Quantized(quantized.unwrap())
                }
            };
            index += 1;
            Linear { name: format!("model.layers.{i}.{name}"), index: index - 1, weight, id: None, lora: None }
        };
        Layer {
            input_norm,
            q: linear("self_attn.q_proj", q, d),
            k: linear("self_attn.k_proj", kv, d),
            v: linear("self_attn.v_proj", kv, d),
            o: linear("self_attn.o_proj", d, q),
            post_norm,
            gate: linear("mlp.gate_proj", f, d),
            up: linear("mlp.up_proj", f, d),
            down: linear("mlp.down_proj", d, f),
            eps: c.rms_norm_eps,
        }
    });
    let layers = layers.collect();
    let table = [c.vocab_size, d];
    let mut table = |name: &str| Param { name: name.into(), id: None, value: Table::Dense(next(&table, 1.0)) };
    let (embedding, head) = (table("model.embed_tokens.weight"), Some(table("lm_head.weight")));
    let norm = param("model.norm.weight", next(&[d], 1.0));
    let source = PathBuf::from("random");
    let (dtype, adapters) = (DType::F32, Adapters::default());
    let mut llama = Llama {
        config,
        source,
        embedding,
        layers,
        norm,
        head,
        dtype,
        activations: Activations::default(),
        feed_forward_rows: usize::MAX,
        stash: Stash::default(),
        adapters,
        angles: Angles::default(),
    };
    match lora {
        None => llama.train_all().unwrap(),
        Some(lora) => {
            llama.add_lora(&lora, Init::Lora, None, seed).unwrap();
            for (id, value) in llama.parameters_mut() {
                if value.as_slice::<f32>().unwrap().iter().all(|&x| x == 0.0) {
                    *value = random(value.shape(), seed ^ id.0 as u64, 0.5);
                }
            }
        }
    }
    llama
}

#[derive(Default)]
struct Collected(BTreeMap<ParamId, Tensor>);

impl GradSink for Collected {
    fn parameter(&mut self, id: ParamId, grad: Tensor) -> nibble_runtime::Result<()> {
        let sum = match self.0.remove(&id) {
            None => grad,
            Some(sum) => self.add(sum, grad)?,
        };
        self.0.insert(id, sum);
        Ok(())
    }
    fn add(&mut self, into: Tensor, grad: Tensor) -> nibble_runtime::Result<Tensor> {
        let mut sum = into.copy(Tag::Workspace)?;
        nibble_kernels::elementwise::add_assign(&mut sum, &grad)?;
        Ok(sum)
    }
}

fn wide(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f32().unwrap().iter().map(|&x| f64::from(x)).collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn error(found: &[f64], expected: &[f64]) -> f64 {
    norm(&found.iter().zip(expected).map(|(f, e)| f - e).collect::<Vec<_>>())
}

fn distance(found: &[f64], expected: &[f64]) -> f64 {
    error(found, expected) / norm(expected).max(1e-9)
}

/// The error of a gradient by its norm. A parameter may hardly matter (attention to one token has no gradient by q and k,
/// and then f32 leaves rounding noise of about 1e-6 of the largest gradient): then by a part of that one's.
fn error_of(found: &[f64], expected: &[f64], largest: f64) -> f64 {
    error(found, expected) / norm(expected).max(0.05 * largest)
}

/// The largest gain of a layer's outputs, with DoRA: what its adapter takes out of a row of its weight.
fn largest_gain(linear: &Linear) -> f64 {
    linear.gains().unwrap().map_or(0.0, |(_, gains)| wide(gains).into_iter().fold(0.0, f64::max))
}

/// Output of a layer for `x`, and the gradients of `x` and of every parameter for the output gradient `dy`.
type Gradients = (Vec<f64>, Vec<f64>, BTreeMap<ParamId, Vec<f64>>);

fn differentiate(llama: &Llama, pass: &Pass, x: &Tensor, dy: &Tensor, by_hand: bool) -> Gradients {
    let layer = &llama.layers[1];
    let mut tape = Tape::new();
    let input = tape.input(x.clone());
    let y = if by_hand {
        let mut inputs = vec![input];
        layer.visit(&mut |id, _, value| inputs.push(tape.parameter(id, value)));
        let inputs: Vec<&Var> = inputs.iter().collect();
        tape.apply(LayerNode { layer, pass, keeping: Keeping::default(), stash: &llama.stash }, &inputs).unwrap()
    } else {
        composed::layer(&mut tape, layer, &input, pass).unwrap()
    };
    let mut sink = Collected::default();
    let dx = tape.backward(&y, dy.clone(), &mut sink).unwrap().remove(0).unwrap();
    let grads = sink.0.iter().map(|(&id, grad)| (id, wide(grad))).collect();
    (wide(&y.value), wide(&dx), grads)
}

/// A layer in f64, straight from its definition, with the parameters in `values` by id where they train.
struct Reference<'a> {
    layer: &'a Layer,
    pass: &'a Pass,
    values: BTreeMap<ParamId, Vec<f64>>,
}

impl Reference<'_> {
    fn value(&self, id: Option<ParamId>, frozen: impl Fn() -> Vec<f64>) -> Vec<f64> {
        id.map_or_else(frozen, |id| self.values[&id].clone())
    }

    fn product(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
        let row = |x: &[f64]| w.chunks(k).map(|w| x.iter().zip(w).map(|(x, w)| x * w).sum()).collect::<Vec<f64>>();
        x.chunks(k).flat_map(row).collect()
    }

    fn linear(&self, linear: &Linear, x: &[f64]) -> Vec<f64> {
        let (n, k) = linear.weight.dims().unwrap();
        let weight = self.value(linear.id, || {
            let mut values = vec![0.0; n * k];
            linear.weight.read_f32(0, &mut values).unwrap();
            values.iter().map(|&x| f64::from(x)).collect()
        });
        let mut y = Self::product(x, &weight, k);
        if let Some(lora) = &linear.lora {
            // The mask as factors: dropout of ones.
            let ones = Tensor::from_slice(&vec![1f32; x.len()], &[x.len() / k, k], Tag::Workspace).unwrap();
            let mask = self.pass.mask(lora.dropout, linear.index);
            let factors = mask.map_or(ones.clone(), |mask| nibble_kernels::dropout::apply(&ones, mask).unwrap());
            let dropped: Vec<f64> = x.iter().zip(wide(&factors)).map(|(x, m)| x * m).collect();
            let [a, b] = [&lora.a, &lora.b].map(|param| self.values[&param.id.unwrap()].clone());
            let delta = Self::product(&Self::product(&dropped, &a, k), &b, a.len() / k);
            y.iter_mut().zip(delta).for_each(|(y, delta)| *y += f64::from(lora.scale) * delta);
            if let Some(Magnitude { param, .. }) = &lora.magnitude {
                // Norms are constants: of the values that the layer has, not of those that are tried.
                let [a, b] = [&lora.a, &lora.b].map(|param| wide(&param.value));
                let (m, r) = (&self.values[&param.id.unwrap()], a.len() / k);
                let v = |at: usize| {
                    let low_rank: f64 = (0..r).map(|i| b[at / k * r + i] * a[i * k + at % k]).sum();
                    weight[at] + f64::from(lora.scale) * low_rank
                };
                let norm = |row: usize| (0..k).map(|i| v(row * k + i).powi(2)).sum::<f64>().sqrt();
                let norms: Vec<f64> = (0..n).map(norm).collect();
                y.iter_mut().enumerate().for_each(|(i, y)| *y *= m[i % n] / norms[i % n]);
            }
        }
        y
    }

    fn norm(&self, param: &Param, x: &[f64]) -> Vec<f64> {
        let w = self.value(param.id, || wide(&param.value));
        let eps = f64::from(self.layer.eps);
        let row = |x: &[f64]| {
            let rstd = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / w.len() as f64 + eps).sqrt();
            x.iter().zip(&w).map(|(x, w)| x * rstd * w).collect::<Vec<_>>()
        };
        x.chunks(w.len()).flat_map(row).collect()
    }

    fn turn(&self, x: &[f64]) -> Vec<f64> {
        let (dim, half) = (self.pass.heads.dim, self.pass.heads.dim / 2);
        let positions = self.pass.positions.as_slice::<i32>().unwrap();
        let width = x.len() / positions.len();
        let mut y = x.to_vec();
        for (at, y) in y.iter_mut().enumerate() {
            let (position, i) = (f64::from(positions[at / width]), at % dim);
            let (sin, cos) = (position * 100f64.powf(-((i % half) as f64) / half as f64)).sin_cos();
            *y = if i < half { x[at] * cos - x[at + half] * sin } else { x[at] * cos + x[at - half] * sin };
        }
        y
    }

    fn attend(&self, q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
        let heads = self.pass.heads;
        let (dim, group) = (heads.dim, heads.query / heads.kv);
        let mut out = vec![0.0; q.len()];
        for segment in self.pass.layout.segments() {
            for (i, head) in (0..segment.queries).flat_map(|i| (0..heads.query).map(move |head| (i, head))) {
                let at = ((segment.query + i) * heads.query + head) * dim;
                let key = |j: usize| ((segment.key + j) * heads.kv + head / group) * dim;
                let score = |j| (0..dim).map(|e| q[at + e] * k[key(j) + e]).sum::<f64>() / (dim as f64).sqrt();
                let weights: Vec<f64> = (0..=i).map(|j| score(j).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for (j, weight) in weights.iter().enumerate() {
                    (0..dim).for_each(|e| out[at + e] += weight / sum * v[key(j) + e]);
                }
            }
        }
        out
    }

    fn forward(&self, x: &[f64]) -> Vec<f64> {
        let add = |a: &[f64], b: Vec<f64>| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<_>>();
        let l = self.layer;
        let n1 = self.norm(&l.input_norm, x);
        let (q, k) = (self.turn(&self.linear(&l.q, &n1)), self.turn(&self.linear(&l.k, &n1)));
        let o = self.attend(&q, &k, &self.linear(&l.v, &n1));
        let h = add(x, self.linear(&l.o, &o));
        let n2 = self.norm(&l.post_norm, &h);
        let (gate, up) = (self.linear(&l.gate, &n2), self.linear(&l.up, &n2));
        let a: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        add(&h, self.linear(&l.down, &a))
    }
}

/// Central differences of `Σ dy·y` along every coordinate of `x`.
fn slope(x: &[f64], mut loss: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    let (mut at, step) = (x.to_vec(), 1e-5);
    let mut one = |i: usize| {
        at[i] = x[i] + step;
        let above = loss(&at);
        at[i] = x[i] - step;
        let below = loss(&at);
        at[i] = x[i];
        (above - below) / (2.0 * step)
    };
    (0..x.len()).map(&mut one).collect()
}

/// The loss of a step and its gradients, the second time: over host memory that was used before.
fn gradients(llama: &mut Llama, lengths: &[usize], seed: u64, activations: &str, rows: usize) -> (f64, Vec<Same>) {
    let tokens: usize = lengths.iter().sum();
    let ids: Vec<i32> = (0..tokens as i32).map(|i| i % 11).collect();
    let labels: Vec<i32> = (0..tokens as i32).map(|i| if i % 3 == 2 { -100 } else { (i + 1) % 11 }).collect();
    (llama.activations, llama.feed_forward_rows) = (activations.parse().unwrap(), rows);
    let step = || {
        let batch = Packed { ids: &ids, labels: &labels, lengths };
        let mut sink = Collected::default();
        let out = llama.train(batch, 0.25, Some(DropoutKey { seed, step: 1 }), &mut sink).unwrap();
        (out.sum().unwrap(), sink.0.into_values().map(Same).collect())
    };
    step();
    step()
}

/// A tensor that is equal to one of the same bytes.
#[derive(Debug)]
struct Same(Tensor);

impl PartialEq for Same {
    fn eq(&self, other: &Self) -> bool {
        self.0.bytes().unwrap() == other.0.bytes().unwrap()
    }
}

impl std::ops::Deref for Same {
    type Target = Tensor;
    fn deref(&self) -> &Tensor {
        &self.0
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn by_hand_and_by_primitives_and_by_finite_differences(
        lengths in prop::collection::vec(1usize..5, 1..4), kv in 1usize..3, group in 1usize..4, half in 1usize..3,
        hidden in 3usize..8, ffn in 1usize..8, rank in 0usize..4, quantized: bool, dropout: bool, dora: bool, seed: u64,
    ) {
        // Rank 0 stands for full fine-tuning.
        let lora = everywhere(rank, if dropout { 0.3 } else { 0.0 });
        let lora = (rank > 0).then_some(AdapterConfig { use_dora: dora, ..lora });
        let llama = model_with(config(kv, group, half, hidden, ffn), quantized && rank > 0, lora, seed);
        let key = Some(DropoutKey { seed, step: 3 });
        let pass = {
            let rope = llama.config.rope.table(llama.config.head_dim, 32).unwrap();
            Pass::packed(&llama.config, &lengths, rope, key).unwrap()
        };
        // An adapter that takes most of a row out of its weight leaves few correct digits of it.
        prop_assume!(llama.layers[1].linears().iter().all(|linear| largest_gain(linear) < 10.0));
        let tokens = lengths.iter().sum();
        let (x, dy) = (random(&[tokens, hidden], seed ^ 5, 1.0), random(&[tokens, hidden], seed ^ 6, 1.0));

        let (y, dx, grads) = differentiate(&llama, &pass, &x, &dy, true);
        let (y2, dx2, grads2) = differentiate(&llama, &pass, &x, &dy, false);
        prop_assert!(distance(&y, &y2) < 1e-5 && distance(&dx, &dx2) < 1e-4);
        prop_assert_eq!(grads.len(), if rank == 0 { 9 } else if dora { 21 } else { 14 });
        prop_assert_eq!(grads.len(), grads2.len());

        let mut values = BTreeMap::new();
        llama.layers[1].visit(&mut |id, _, value| { values.insert(id, wide(value)); });
        let mut reference = Reference { layer: &llama.layers[1], pass: &pass, values };
        let (xs, dys) = (wide(&x), wide(&dy));
        let loss = |y: Vec<f64>| y.iter().zip(&dys).map(|(y, d)| y * d).sum::<f64>();
        prop_assert!(distance(&y, &reference.forward(&xs)) < 1e-5);
        prop_assert!(distance(&dx, &slope(&xs, |x| loss(reference.forward(x)))) < 1e-4);
        let largest = grads.values().map(|grad| norm(grad)).fold(0.0, f64::max);
        for (id, grad) in &grads {
            let start = reference.values[id].clone();
            let numeric = slope(&start, |value| {
                reference.values.insert(*id, value.to_vec());
                loss(reference.forward(&xs))
            });
            reference.values.insert(*id, start);
            for other in [&numeric, &grads2[id]] {
                let error = error_of(grad, other, largest);
                prop_assert!(error <= 1e-4, "{:?}: {} of {}", id, error, norm(other));
            }
        }
    }

    /// Loss and gradients are the same bits whatever is kept, wherever, step after step.
    #[test]
    fn what_is_kept_changes_no_bit(lengths in prop::collection::vec(1usize..9, 1..4), dora: bool, full: bool, seed: u64) {
        let lora = (!full).then(|| AdapterConfig { use_dora: dora, ..everywhere(4, 0.2) });
        let mut llama = model_with(config(2, 2, 2, 12, 10), !full, lora, seed);
        let kept = gradients(&mut llama, &lengths, seed, "all", usize::MAX);
        for activations in [
            "inputs", "attention", "inputs:1,all", "attention:1,all", "inputs@host", "attention@host", "all@host",
            "inputs@host:1,all", "attention@host:1,inputs", "all@host:1,attention@host",
        ] {
            prop_assert_eq!(&gradients(&mut llama, &lengths, seed, activations, usize::MAX), &kept, "{}", activations);
        }
    }

    /// A feed-forward block in parts sums its parameters' gradients in another order; all else is the same.
    #[test]
    fn a_feed_forward_block_in_parts_is_the_same(
        lengths in prop::collection::vec(1usize..9, 1..4), rows in 1usize..9, dora: bool, full: bool, seed: u64,
    ) {
        let lora = (!full).then(|| AdapterConfig { use_dora: dora, ..everywhere(4, 0.0) });
        let mut llama = model_with(config(2, 2, 2, 12, 10), !full, lora, seed);
        let (loss, whole) = gradients(&mut llama, &lengths, seed, "all", usize::MAX);
        let mut first = None;
        for activations in ["inputs", "attention@host"] {
            let (in_parts, parts) = gradients(&mut llama, &lengths, seed, activations, rows);
            prop_assert!((in_parts - loss).abs() <= 1e-5 * loss.abs());
            let largest = whole.iter().map(|grad| norm(&wide(grad))).fold(0.0, f64::max);
            for (whole, parts) in whole.iter().zip(&parts) {
                prop_assert!(error_of(&wide(parts), &wide(whole), largest) < 1e-4);
            }
            let bits: Vec<_> = parts.iter().map(|grad| grad.bytes().unwrap().to_vec()).collect();
            prop_assert_eq!(first.get_or_insert(bits.clone()), &bits);
        }
    }

    /// Packing isolates sequences: a batch of several is the sum of each alone.
    #[test]
    fn packed_sequences_do_not_see_each_other(lengths in prop::collection::vec(1usize..9, 2..4), seed: u64) {
        let llama = model(config(2, 2, 2, 12, 10), true, Some((4, 0.0)), seed);
        let tokens: usize = lengths.iter().sum();
        let ids: Vec<i32> = (0..tokens as i32).map(|i| (i * 7) % 11).collect();
        let all = wide(&llama.logits(&ids, &lengths).unwrap());
        let mut start = 0;
        for &length in &lengths {
            let alone = wide(&llama.logits(&ids[start..start + length], &[length]).unwrap());
            prop_assert!(distance(&alone, &all[start * 11..][..length * 11]) < 1e-5);
            start += length;
        }
    }
}

/// A model with tables in 8 bits is the one with the tables that they stand for: loss, gradients, decoding.
#[test]
fn tables_in_8_bits_are_the_tables_they_stand_for() {
    let mut llama = model(config(2, 2, 4, 12, 10), true, Some((4, 0.1)), 5);
    let (ids, lengths): (Vec<i32>, _) = ((0..14).map(|i| (i * 5) % 11).collect(), [9, 5]);
    let labels: Vec<i32> = (0..14).map(|i| if i % 4 == 1 { -100 } else { (i * 3) % 11 }).collect();
    let run = |llama: &Llama| {
        let mut sink = Collected::default();
        let batch = Packed { ids: &ids, labels: &labels, lengths: &lengths };
        let out = llama.train(batch, 0.25, Some(DropoutKey { seed: 1, step: 2 }), &mut sink).unwrap();
        let rope = llama.config.rope.table(llama.config.head_dim, 8).unwrap();
        let next = llama.next_logits(&ids[..6], 0, &rope, &mut llama.cache(8).unwrap()).unwrap();
        let mut all = vec![wide(&next), wide(&llama.logits(&ids, &lengths).unwrap())];
        all.push(out.nll().unwrap().into_iter().map(f64::from).collect());
        all.extend(sink.0.values().map(wide));
        all
    };
    let before = run(&llama);
    let eight = |param: &Param<Table>| match &param.value {
        Table::Dense(tensor) => Rows8::quantize(tensor, Tag::Weights).unwrap(),
        Table::Rows8(rows) => rows.clone(),
    };
    let (embedding, head) = (eight(&llama.embedding), eight(llama.head.as_ref().unwrap()));
    let mut with = |make: &dyn Fn(&Rows8) -> Table| {
        llama.embedding.value = make(&embedding);
        llama.head.as_mut().unwrap().value = make(&head);
        run(&llama)
    };
    let dense = with(&|rows| Table::Dense(rows.rows(0, 11, DType::F32, Tag::Weights).unwrap()));
    let coded = with(&|rows| Table::Rows8(rows.clone()));
    assert_eq!(dense.len(), 3 + 2 * 7 * 2);
    for (i, (coded, dense)) in coded.iter().zip(&dense).enumerate() {
        assert!(distance(coded, dense) < 1e-5, "{i}: {}", distance(coded, dense));
    }
    let change = distance(&coded[1], &before[1]);
    assert!(change > 1e-5 && change < 0.05, "{change}");
    // What has no trainable form says so.
    let error = llama.train_all().unwrap_err().to_string();
    assert!(error.contains("8 bits"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    assert!(llama.save(&dir.path().join("model"), DType::F32).unwrap_err().to_string().contains("8 bits"));
    assert!(!dir.path().join("model").exists());
}

#[test]
fn new_adapters_change_nothing() {
    let mut llama = model(config(2, 1, 2, 8, 8), false, None, 1);
    let before = llama.logits(&[1, 2, 3], &[3]).unwrap();
    let targets = |names: [&str; 2]| Some(TargetModules::Names(names.map(String::from).to_vec()));
    let lora = AdapterConfig { target_modules: targets(["q_proj", "down_proj"]), ..everywhere(3, 0.5) };
    llama.add_lora(&lora, Init::Lora, None, 1).unwrap();
    assert_eq!(llama.layers[0].linears().map(|l| l.lora.is_some()), [true, false, false, false, false, false, true]);
    assert_eq!(before.bytes().unwrap(), llama.logits(&[1, 2, 3], &[3]).unwrap().bytes().unwrap());
    let mut refused = |lora: AdapterConfig| llama.add_lora(&lora, Init::Lora, None, 1).unwrap_err().to_string();
    let error = refused(AdapterConfig { target_modules: targets(["q_proj", "lm_head"]), ..lora.clone() });
    assert!(error.contains("lm_head") && error.contains("q_proj"), "{error}");
    refused(AdapterConfig { r: 0, ..lora.clone() });
    let pattern = |text: &str| Some(TargetModules::Pattern(text.into()));
    assert!(refused(AdapterConfig { target_modules: pattern("q_("), ..lora.clone() }).contains("q_("));
    refused(AdapterConfig { target_modules: pattern("q_proj"), ..lora });
    // DoRA starts at the lengths that the rows have: nothing changes but roundings.
    let dora = AdapterConfig { use_dora: true, ..everywhere(3, 0.5) };
    llama.add_lora(&dora, Init::Lora, None, 1).unwrap();
    let after = llama.logits(&[1, 2, 3], &[3]).unwrap();
    assert!(distance(&wide(&after), &wide(&before)) < 1e-6);
}
