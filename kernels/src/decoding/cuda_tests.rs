//! The launches of a decoding step against the operations that they stand for, which the CPU does one by one.

use super::*;
use crate::{
    attention::{self, Layout, Segment},
    linear::Weight,
    mixed::{self, Adapters},
    quantize::{QuantType, ScaleRounding, quantize},
    rms_norm,
    rotary::{self, Direction, RopeConfig, RopeScaling, RotaryTable},
    swiglu,
    testing::{gpu, random, random_as, same},
};
use nibble_runtime::{DType, Device, Tag};
use proptest::prelude::*;

const TAG: Tag = Tag::Workspace;

/// A layer's weight with adapters beside it, on the CPU.
struct Side {
    weight: QuantTensor,
    adapters: Adapters,
}

fn side(n: usize, k: usize, ranks: &[usize], fp4: bool, dora: bool, dtype: DType, seed: u64) -> Side {
    let kind = if fp4 { QuantType::Fp4 } else { QuantType::Nf4 };
    let weight = quantize(&random(&[n, k], seed), kind, 64, Some(ScaleRounding::Exact), dtype, TAG).unwrap();
    let rank = ranks.iter().sum();
    let whose: Vec<i32> = (0..).zip(ranks).flat_map(|(i, &rank)| std::iter::repeat_n(i, rank)).collect();
    let adapters = Adapters {
        a: random_as(&[rank, k], dtype, seed ^ 1),
        b: random_as(&[n, rank], dtype, seed ^ 2),
        columns: Tensor::from_slice(&whose, &[rank], TAG).unwrap(),
        scales: random(&[rank], seed ^ 3),
        gains: dora.then(|| random(&[ranks.len(), n], seed ^ 4)),
    };
    Side { weight, adapters }
}

/// What the launches take, on the GPU.
struct There {
    weights: Vec<QuantTensor>,
    bs: Vec<Tensor>,
    gains: Vec<Option<Tensor>>,
    factors: Factors,
    tokens: Tensor,
    t: Tensor,
}

fn stacked(tensors: &[&Tensor]) -> Tensor {
    let width: usize = tensors[0].shape()[1..].iter().product();
    let rows = tensors.iter().map(|tensor| tensor.shape()[0]).sum();
    let shape: Vec<usize> = std::iter::once(rows).chain(tensors[0].shape()[1..].iter().copied()).collect();
    let mut all = Tensor::empty(&shape, tensors[0].dtype(), Device::Cpu, TAG).unwrap();
    let mut row = 0;
    for tensor in tensors {
        all.copy_from(row * width, tensor).unwrap();
        row += tensor.shape()[0];
    }
    all
}

impl There {
    fn new(sides: &[Side], rows: &[[i32; 4]], dtype: DType, gpu: Device) -> There {
        let on = |tensor: &Tensor| tensor.to_device(gpu, TAG).unwrap();
        let all = |part: fn(&Side) -> &Tensor| on(&stacked(&sides.iter().map(part).collect::<Vec<_>>()));
        let factors = Factors {
            a: all(|s| &s.adapters.a),
            owners: all(|s| &s.adapters.columns),
            scales: all(|s| &s.adapters.scales),
        };
        let columns = factors.a.shape()[0];
        There {
            weights: sides.iter().map(|side| side.weight.to_device(gpu, TAG).unwrap()).collect(),
            bs: sides.iter().map(|side| on(&side.adapters.b)).collect(),
            gains: sides.iter().map(|side| side.adapters.gains.as_ref().map(on)).collect(),
            factors,
            tokens: on(&Tensor::from_slice(rows.as_flattened(), &[rows.len(), 4], TAG).unwrap()),
            t: Tensor::empty(&[rows.len(), columns], dtype, gpu, TAG).unwrap(),
        }
    }

    fn parts<const N: usize>(&self) -> [Part<'_>; N] {
        let mut column = 0;
        std::array::from_fn(|i| {
            column += self.bs[i].shape()[1];
            let column = column - self.bs[i].shape()[1];
            Part { weight: &self.weights[i], b: Some(&self.bs[i]), gains: self.gains[i].as_ref(), column }
        })
    }
}

/// The product of each side by the operations, on the CPU, and `x` normalized before.
fn products(x: &Tensor, norm: Option<&Tensor>, sides: &[Side], rows: &[[i32; 4]]) -> (Tensor, Vec<Tensor>) {
    let n = norm.map_or_else(|| x.clone(), |norm| rms_norm::forward(x, norm, 1e-5).unwrap().0);
    let owners: Vec<i32> = rows.iter().map(|row| row[2]).collect();
    let owners = Tensor::from_slice(&owners, &[rows.len()], TAG).unwrap();
    let product = |side: &Side| {
        mixed::forward(&n, &Weight::Quantized(side.weight.clone()), &side.adapters, &owners, None, TAG).unwrap()
    };
    let products = sides.iter().map(product).collect();
    (n, products)
}

fn rope(head: usize, length: usize) -> RotaryTable {
    RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default }.table(head, length).unwrap()
}

/// Owners from −1 on, and positions in sequences of so many rows of a cache.
fn rows(count: usize, adapters: usize, capacity: usize, seed: u64) -> Vec<[i32; 4]> {
    let number = |i: usize, below: usize| (seed.rotate_left(7 * i as u32) % below as u64) as i32;
    (0..count).map(|i| [number(i, capacity), (i * capacity) as i32, number(i + 3, adapters + 1) - 1, 0]).collect()
}

fn halves() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F16), Just(DType::BF16)]
}

/// Blocks of 64 of an inner dimension: any; and what Hopper's own kernel takes, which may be too few for its warps, or for a
/// cluster.
fn inner(most: usize) -> impl Strategy<Value = usize> {
    let quads = |range: std::ops::Range<usize>| range.prop_map(|quads| 4 * quads);
    prop_oneof![1..most, quads(1..17), quads(17..65)]
}

fn ranks() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec((1usize..20).prop_map(|half| 2 * half), 1..6)
}

proptest! {
    #![proptest_config(crate::testing::cases(32))]

    /// Inner sizes that leave warps without work, with a part of a chunk, and with several.
    #[test]
    fn norm_and_products_are_those_of_the_operations(
        dtype in halves(), ranks in ranks(), tokens in 1usize..17, n in 1usize..120, blocks in inner(90), kind: (bool, bool),
        normed: bool, wide_norm: bool, residual: bool, seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let (k, (fp4, dora)) = (64 * blocks, kind);
        let rows = rows(tokens, ranks.len(), 50, seed);
        let sides = [side(n, k, &ranks, fp4, dora, dtype, seed)];
        let (x, rest) = (random_as(&[tokens, k], dtype, seed ^ 5), random_as(&[tokens, n], dtype, seed ^ 6));
        let norm = normed.then(|| random_as(&[k], if wide_norm { DType::F32 } else { dtype }, seed ^ 7));
        let (normalized, ys) = products(&x, norm.as_ref(), &sides, &rows);

        let on = |tensor: &Tensor| tensor.to_device(gpu, TAG).unwrap();
        let mut there = There::new(&sides, &rows, dtype, gpu);
        let (x, weight, rest_there) = (on(&x), norm.as_ref().map(on), residual.then(|| on(&rest)));
        let mut made = Tensor::empty(&[tokens, k], dtype, gpu, TAG).unwrap();
        let mut y = Tensor::empty(&[tokens, n], dtype, gpu, TAG).unwrap();
        let norm = weight.as_ref().map(|weight| (weight, 1e-5, &mut made));
        low_rank(&x, norm, Some((&there.factors, &mut there.t)), &there.tokens).unwrap();
        let input = if weight.is_some() { &made } else { &x };
        let [part] = there.parts();
        add(input, part, Some(&there.t), rest_there.as_ref(), &there.tokens, &mut y).unwrap();
        if normed {
            same(&made, &normalized, 1e-2);
        }
        let mut expected = ys[0].copy(TAG).unwrap();
        if residual {
            crate::elementwise::add_assign(&mut expected, &rest).unwrap();
        }
        same(&y, &expected, 1e-2);
    }

    /// The same bits for a row alone and among others.
    #[test]
    fn rows_do_not_depend_on_their_batch(
        dtype in halves(), tokens in 2usize..17, n in 1usize..120, blocks in inner(90), seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let k = 64 * blocks;
        let sides = [side(n, k, &[8], false, false, dtype, seed)];
        let x = random_as(&[tokens, k], dtype, seed ^ 5).to_device(gpu, TAG).unwrap();
        let product = |x: &Tensor| {
            let rows = vec![[0, 0, 0, 0]; x.shape()[0]];
            let mut there = There::new(&sides, &rows, dtype, gpu);
            low_rank(x, None, Some((&there.factors, &mut there.t)), &there.tokens).unwrap();
            let [part] = there.parts();
            let mut y = Tensor::empty(&[rows.len(), n], dtype, gpu, TAG).unwrap();
            add(x, part, Some(&there.t), None, &there.tokens, &mut y).unwrap();
            y.to_device(Device::Cpu, TAG).unwrap()
        };
        let together = product(&x);
        for row in 0..tokens {
            let alone = product(&x.rows(row, 1).unwrap());
            same(&alone, &together.rows(row, 1).unwrap(), 0.0);
        }
    }

    #[test]
    fn gate_and_up(
        dtype in halves(), ranks in ranks(), tokens in 1usize..17, width in 1usize..150, blocks in inner(40), dora: bool,
        seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let k = 64 * blocks;
        let rows = rows(tokens, ranks.len(), 50, seed);
        // Products of the size that a layer's have, where SwiGLU is not all zeros and ones.
        let sides = [1u64, 2].map(|i| side(width, k, &ranks, false, dora, dtype, seed ^ i << 8));
        let x = random(&[tokens, k], seed ^ 5);
        let scaled: Vec<f32> = x.as_slice::<f32>().unwrap().iter().map(|x| x / (k as f32).sqrt()).collect();
        let x = Tensor::from_slice(&scaled, &[tokens, k], TAG).unwrap().into_dtype(dtype, TAG).unwrap();
        let (_, ys) = products(&x, None, &sides, &rows);
        let expected = swiglu::forward(&ys[0], &ys[1]).unwrap();

        let x = x.to_device(gpu, TAG).unwrap();
        let mut there = There::new(&sides, &rows, dtype, gpu);
        let mut a = Tensor::empty(&[tokens, width], dtype, gpu, TAG).unwrap();
        low_rank(&x, None, Some((&there.factors, &mut there.t)), &there.tokens).unwrap();
        gate(&x, there.parts(), Some(&there.t), &there.tokens, &mut a).unwrap();
        same(&a, &expected, 1.5e-2);
    }

    /// Queries, turned, and new keys and values in their places; every other row of the cache is as it was.
    #[test]
    fn queries_turn_and_keys_and_values_go_to_the_cache(
        dtype in halves(), ranks in ranks(), tokens in 1usize..17, heads in (1usize..4, 1usize..5), dim in 1usize..9,
        blocks in inner(20), seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let ((kv, group), dim, k, capacity) = (heads, 16 * dim, 64 * blocks, 30);
        let rows = rows(tokens, ranks.len(), capacity, seed);
        let widths = [kv * group * dim, kv * dim, kv * dim];
        let sides = [0, 1, 2].map(|i| side(widths[i], k, &ranks, false, false, dtype, seed ^ (i as u64) << 8));
        let x = random_as(&[tokens, k], dtype, seed ^ 5);
        let (_, mut ys) = products(&x, None, &sides, &rows);
        let positions: Vec<i32> = rows.iter().map(|row| row[0]).collect();
        let positions = Tensor::from_slice(&positions, &[tokens], TAG).unwrap();
        let table = rope(dim, capacity);
        let (v, keys, q) = (ys.pop().unwrap(), ys.pop().unwrap(), ys.pop().unwrap());
        let [q, keys] = [q, keys].map(|x| rotary::apply(x, &positions, &table, Direction::Forward).unwrap());
        let before = random_as(&[tokens * capacity, kv * dim], dtype, seed ^ 6);
        let placed = |new: &Tensor| {
            let mut cache = before.copy(TAG).unwrap();
            for (i, row) in rows.iter().enumerate() {
                cache.copy_from((row[0] + row[1]) as usize * kv * dim, &new.rows(i, 1).unwrap()).unwrap();
            }
            cache
        };

        let x = x.to_device(gpu, TAG).unwrap();
        let mut there = There::new(&sides, &rows, dtype, gpu);
        let mut found = Tensor::empty(&[tokens, widths[0]], dtype, gpu, TAG).unwrap();
        let [mut of_keys, mut of_values] = [(); 2].map(|()| before.to_device(gpu, TAG).unwrap());
        low_rank(&x, None, Some((&there.factors, &mut there.t)), &there.tokens).unwrap();
        let table = table.to_device(gpu).unwrap();
        let cache = (&mut of_keys, &mut of_values);
        turn(&x, there.parts(), Some(&there.t), &there.tokens, &table, &mut found, cache).unwrap();
        same(&found, &q, 1e-2);
        same(&of_keys, &placed(&keys), 1e-2);
        same(&of_values, &placed(&v), 1e-2);
    }

    /// Twice with one scratch: the first leaves it ready for the second.
    #[test]
    fn attention_to_the_cache(
        dtype in halves(), tokens in 1usize..17, kv in 1usize..4, group in 1usize..17, dim in 1usize..9, capacity in 1usize..700,
        seed: u64,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let heads = Heads { query: kv * group, kv, dim: 16 * dim };
        let rows = rows(tokens, 0, capacity, seed);
        let q = random_as(&[tokens, heads.query * heads.dim], dtype, seed);
        let [keys, values] = [1, 2].map(|i| random_as(&[tokens * capacity, kv * heads.dim], dtype, seed ^ i));
        let segment = |(i, row): (usize, &[i32; 4])| Segment {
            query: i,
            queries: 1,
            key: row[1] as usize,
            keys: row[0] as usize + 1,
        };
        let layout = Layout::new(rows.iter().enumerate().map(segment).collect(), Device::Cpu).unwrap();
        let (expected, _) = attention::forward(&q, &keys, &values, heads, &layout).unwrap();

        let on = |tensor: &Tensor| tensor.to_device(gpu, TAG).unwrap();
        let (q, keys, values) = (on(&q), on(&keys), on(&values));
        let table = on(&Tensor::from_slice(rows.as_flattened(), &[tokens, 4], TAG).unwrap());
        let mut scratch = Scratch::new(tokens, heads, gpu).unwrap();
        for _ in 0..2 {
            let mut o = Tensor::empty(q.shape(), dtype, gpu, TAG).unwrap();
            attend(&q, (&keys, &values), &table, heads, &mut scratch, &mut o).unwrap();
            same(&o, &expected, 1e-2);
        }
    }
}

#[test]
fn misfits_are_refused() {
    let Some(gpu) = gpu() else { return };
    let sides = [side(32, 128, &[4], false, false, DType::BF16, 1)];
    let there = There::new(&sides, &[[0, 0, 0, 0]], DType::BF16, gpu);
    let [part] = there.parts();
    let empty = |shape: &[usize], dtype| Tensor::empty(shape, dtype, gpu, TAG).unwrap();
    let run = |x: Tensor, part: Part, mut y: Tensor| add(&x, part, Some(&there.t), None, &there.tokens, &mut y);
    let (x, y) = (|| empty(&[1, 128], DType::BF16), || empty(&[1, 32], DType::BF16));
    assert!(run(x(), part, y()).is_ok());
    assert!(run(empty(&[1, 64], DType::BF16), part, y()).is_err());
    assert!(run(empty(&[1, 128], DType::F32), part, empty(&[1, 32], DType::F32)).is_err());
    assert!(run(x(), part, empty(&[1, 31], DType::BF16)).is_err());
    assert!(run(x(), Part { column: 2, ..part }, y()).is_err());
    assert!(run(empty(&[2, 128], DType::BF16), part, empty(&[2, 32], DType::BF16)).is_err());
}
