use super::*;
use crate::{
    rotary::{RopeConfig, RopeScaling},
    testing::{gpu, random_as, same, wide},
};
use half::bf16;
use proptest::prelude::*;

const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F32 { 1e-5 } else { 1e-2 }
}

/// q, k, v and a gradient on the host. Scores vary more than those of standard normals: some rows are peaked.
fn inputs(queries: usize, keys: usize, heads: Heads, dtype: DType, seed: u64) -> [Tensor; 4] {
    let rows = [(queries, heads.query), (keys, heads.kv), (keys, heads.kv), (queries, heads.query)];
    let mut salt = 0;
    rows.map(|(rows, count)| {
        salt += 1;
        let x = crate::testing::random(&[rows, count * heads.dim], seed ^ salt);
        let peaked = if salt == 1 { 3.0 } else { 1.0 };
        let values: Vec<f32> = x.as_slice::<f32>().unwrap().iter().map(|x| x * peaked).collect();
        Tensor::from_slice(&values, x.shape(), Tag::Workspace).unwrap().into_dtype(dtype, Tag::Workspace).unwrap()
    })
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    tensor.to_device(Device::Cpu, Tag::Workspace).unwrap().bytes().unwrap().to_vec()
}

/// ‖found − expected‖ against ‖expected‖, and against rounding noise of `scale`: with one key a row's softmax is constant,
/// and gradients of queries and keys are exactly zero.
#[track_caller]
fn same_gradient(found: &Tensor, expected: &Tensor, scale: &Tensor) {
    let (found, expected) = (wide(&found.to_device(Device::Cpu, Tag::Workspace).unwrap()), wide(expected));
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&found.iter().zip(&expected).map(|(f, e)| f - e).collect::<Vec<_>>());
    let limit = tolerance(scale.dtype()) * norm(&expected) + 1e-6 * norm(&wide(scale));
    assert!(error <= limit, "error {error:.3e} of {:.3e}, limit {limit:.3e}", norm(&expected));
}

/// Forward, and for whole sequences backward, on both devices; by Hopper's own kernels too, where they are for this.
fn compare(gpu: Device, segments: Vec<Segment>, heads: Heads, dtype: DType, seed: u64) {
    hopper::tests::FORBIDDEN.set(false);
    compare_once(gpu, segments.clone(), heads, dtype, seed);
    if heads.dim == 128 && dtype != DType::F32 {
        hopper::tests::FORBIDDEN.set(true);
        compare_once(gpu, segments, heads, dtype, seed);
        hopper::tests::FORBIDDEN.set(false);
    }
}

fn compare_once(gpu: Device, segments: Vec<Segment>, heads: Heads, dtype: DType, seed: u64) {
    let queries = segments.iter().map(|s| s.queries).sum();
    let keys = segments.iter().map(|s| s.key + s.keys).max().unwrap_or(0);
    let whole = segments.iter().all(|s| s.queries == s.keys && s.query == s.key);
    let host = inputs(queries, keys, heads, dtype, seed);
    let device = host.each_ref().map(|x| x.to_device(gpu, Tag::Workspace).unwrap());
    let on_cpu = Layout::new(segments.clone(), Device::Cpu).unwrap();
    let on_gpu = Layout::new(segments, gpu).unwrap();

    let [q, k, v, grad] = &device;
    let (o, lse) = forward(q, k, v, heads, &on_gpu).unwrap();
    let expected = forward(&host[0], &host[1], &host[2], heads, &on_cpu).unwrap();
    same(&o, &expected.0, tolerance(dtype));
    same(&lse, &expected.1, 1e-5);
    let (again, lse_again) = forward(q, k, v, heads, &on_gpu).unwrap();
    assert_eq!((bytes(&again), bytes(&lse_again)), (bytes(&o), bytes(&lse)), "two runs differ");
    if !whole {
        return;
    }
    // From the same output: its rounding is not this kernel's.
    let [host_o, host_lse] = [&o, &lse].map(|x| x.to_device(Device::Cpu, Tag::Workspace).unwrap());
    let saved = Saved { q: &host[0], k: &host[1], v: &host[2], o: &host_o, lse: &host_lse };
    let positions: Vec<i32> = (0..queries as i32).map(|i| i * 7 % 40).collect();
    let positions = Tensor::from_slice(&positions, &[queries], Tag::Workspace).unwrap();
    let rope = RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default };
    // Heads of an odd size do not turn.
    let turns: Vec<_> = std::iter::once(None).chain(rope.table(heads.dim, 40).ok().map(Some)).collect();
    for table in &turns {
        let there = table.as_ref().map(|table| {
            let to = |x: &Tensor| x.to_device(gpu, Tag::Workspace).unwrap();
            (to(&positions), table.to_device(gpu).unwrap())
        });
        let turn = there.as_ref().map(|(positions, table)| Turn { positions, table });
        let run = || backward(&Saved { q, k, v, o: &o, lse: &lse }, grad, heads, &on_gpu, turn).unwrap();
        let (dq, dk, dv) = run();
        let turn = table.as_ref().map(|table| Turn { positions: &positions, table });
        let expected = backward(&saved, &host[3], heads, &on_cpu, turn).unwrap();
        same(&dv, &expected.2, tolerance(dtype));
        same_gradient(&dq, &expected.0, &expected.2);
        same_gradient(&dk, &expected.1, &expected.2);
        let again = run();
        for (first, second) in [(&dq, &again.0), (&dk, &again.1), (&dv, &again.2)] {
            assert_eq!(bytes(first), bytes(second), "two runs differ");
        }
    }
}

/// Segments with `more` keys before those of the queries, and unused rows between segments.
fn cached(parts: &[(usize, usize)]) -> Vec<Segment> {
    let (mut query, mut key) = (0, 2);
    let segment = |&(queries, more): &(usize, usize)| {
        let segment = Segment { query, queries, key, keys: queries + more };
        query += queries;
        key += queries + more + 3;
        segment
    };
    parts.iter().map(segment).collect()
}

/// Sizes of heads: those of the tensor-core kernels, padded ones, and those that take the simple path in 16 bits.
fn dims() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => prop::sample::select(vec![8usize, 16, 32, 64, 80, 96, 128]),
        1 => prop::sample::select(vec![1usize, 6, 10, 50, 72, 100, 104, 136, 200, 256]),
    ]
}

fn groups() -> impl Strategy<Value = Heads> {
    (prop::sample::select(vec![1usize, 2, 4, 8]), 1usize..3, dims()).prop_map(|(group, kv, dim)| Heads {
        query: group * kv,
        kv,
        dim,
    })
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![1usize..301, 1usize..20], 1..5)
}

proptest! {
    #![proptest_config(crate::testing::cases(24))]

    #[test]
    fn gpu_whole_sequences(
        lengths in lengths(), heads in groups(), dtype in prop::sample::select(FLOATS.to_vec()), seed: u64
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        compare(gpu, Segment::packed(&lengths), heads, dtype, seed);
    }

    #[test]
    fn gpu_caches(
        parts in prop::collection::vec((1usize..200, 0usize..200), 1..4), heads in groups(),
        dtype in prop::sample::select(FLOATS.to_vec()), seed: u64
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        compare(gpu, cached(&parts), heads, dtype, seed);
    }

    #[test]
    fn gpu_decoding(
        parts in prop::collection::vec((1usize..17, 0usize..900), 1..4), heads in groups(),
        dtype in prop::sample::select(FLOATS.to_vec()), seed: u64
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        compare(gpu, cached(&parts), heads, dtype, seed);
    }
}

/// Each tensor-core kernel at a size that fills it, with several tiles and no tail.
#[test]
fn gpu_full_tiles() {
    let Some(gpu) = gpu() else { return };
    for dim in [64, 96, 128] {
        for dtype in FLOATS {
            compare(gpu, Segment::packed(&[384, 128]), Heads { query: 4, kv: 2, dim }, dtype, 7);
        }
    }
}

/// Several blocks of keys that add to the same queries' gradient, over and over: the order must be theirs, not time's.
#[test]
fn gpu_blocks_in_turn() {
    let Some(gpu) = gpu() else { return };
    let heads = Heads { query: 4, kv: 1, dim: 128 };
    let lengths = [1100, 700, 129, 64, 1];
    compare(gpu, Segment::packed(&lengths), heads, DType::BF16, 21);
    let rows: usize = lengths.iter().sum();
    let [q, k, v, grad] = inputs(rows, rows, heads, DType::BF16, 22).map(|x| x.to_device(gpu, Tag::Workspace).unwrap());
    let layout = Layout::packed(&lengths, gpu).unwrap();
    let (o, lse) = forward(&q, &k, &v, heads, &layout).unwrap();
    let run = || {
        let (dq, dk, dv) =
            backward(&Saved { q: &q, k: &k, v: &v, o: &o, lse: &lse }, &grad, heads, &layout, None).unwrap();
        [bytes(&dq), bytes(&dk), bytes(&dv)]
    };
    let first = run();
    assert!((0..20).all(|_| run() == first), "two runs differ");
}

/// More chunks of keys than fit the smallest size of chunk.
#[test]
fn gpu_a_long_cache() {
    let Some(gpu) = gpu() else { return };
    for (queries, more) in [(1, 9000), (3, 20_000)] {
        compare(gpu, cached(&[(queries, more), (1, 0)]), Heads { query: 8, kv: 2, dim: 128 }, DType::BF16, 11);
    }
}

/// A row's largest score comes late and is far above those before: the running maximum must rescale.
#[test]
fn gpu_scores_that_grow() {
    let Some(gpu) = gpu() else { return };
    let heads = Heads { query: 2, kv: 1, dim: 64 };
    let rows = 300;
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        let grow = |count: usize, by: f32| {
            let width = count * heads.dim;
            let values = (0..rows * width).map(|i| if i % 64 == 0 { by * (i / width) as f32 } else { 0.1 });
            Tensor::from_slice(&values.collect::<Vec<_>>(), &[rows, width], Tag::Workspace).unwrap()
        };
        let [q, k] = [(heads.query, 0.005), (heads.kv, 1.0)].map(|(count, by)| grow(count, by));
        let v = random_as(k.shape(), dtype, 3);
        let [q, k] = [q, k].map(|x| x.into_dtype(dtype, Tag::Workspace).unwrap());
        let expected = forward(&q, &k, &v, heads, &Layout::packed(&[rows], Device::Cpu).unwrap()).unwrap();
        let [q, k, v] = [q, k, v].map(|x| x.to_device(gpu, Tag::Workspace).unwrap());
        let (o, lse) = forward(&q, &k, &v, heads, &Layout::packed(&[rows], gpu).unwrap()).unwrap();
        same(&o, &expected.0, tolerance(dtype));
        same(&lse, &expected.1, 1e-5);
    }
}

#[test]
fn gpu_nothing_and_misfits() {
    let Some(gpu) = gpu() else { return };
    let heads = Heads { query: 2, kv: 1, dim: 64 };
    let empty =
        |rows: usize, count: usize, dtype| Tensor::zeros(&[rows, count * 64], dtype, gpu, Tag::Workspace).unwrap();
    let (q, k) = (empty(0, 2, DType::BF16), empty(0, 1, DType::BF16));
    let none = Layout::packed(&[], gpu).unwrap();
    let (o, lse) = forward(&q, &k, &k, heads, &none).unwrap();
    assert_eq!((o.shape(), lse.shape()), (&[0, 128][..], &[2, 0][..]));
    backward(&Saved { q: &q, k: &k, v: &k, o: &o, lse: &lse }, &q, heads, &none, None).unwrap();

    let (q, k) = (empty(3, 2, DType::BF16), empty(3, 1, DType::BF16));
    assert!(forward(&q, &k, &k, heads, &Layout::packed(&[3], Device::Cpu).unwrap()).is_err());
    let layout = Layout::packed(&[3], gpu).unwrap();
    assert!(forward(&q, &k, &empty(3, 1, DType::F16), heads, &layout).is_err());
    let big = Heads { query: 2, kv: 1, dim: 320 };
    let wide = |count: usize| Tensor::zeros(&[3, count * 320], DType::BF16, gpu, Tag::Workspace).unwrap();
    assert!(forward(&wide(2), &wide(1), &wide(1), big, &layout).is_err());
    // Rows that do not start at a multiple of 16 bytes take another path.
    let odd = |count: usize| {
        let x =
            Tensor::from_slice(&vec![bf16::ONE; 3 * count * 64 + 1], &[3 * count * 64 + 1], Tag::Workspace).unwrap();
        x.to_device(gpu, Tag::Workspace).unwrap().rows(1, 3 * count * 64).unwrap().reshape(&[3, count * 64]).unwrap()
    };
    let (o, _) = forward(&odd(2), &odd(1), &odd(1), heads, &layout).unwrap();
    assert!(wide_ones(&o));
}

fn wide_ones(tensor: &Tensor) -> bool {
    wide(&tensor.to_device(Device::Cpu, Tag::Workspace).unwrap()).iter().all(|&x| x == 1.0)
}
