use super::*;
use crate::testing::{close, numeric_gradient, random, wide};
use proptest::prelude::*;

fn on_cpu(segments: Vec<Segment>) -> Layout {
    Layout::new(segments, Device::Cpu).unwrap()
}

/// The definition in f64.
fn reference(q: &[f64], k: &[f64], v: &[f64], heads: Heads, segments: &[Segment]) -> Vec<f64> {
    let (dim, group) = (heads.dim, heads.query / heads.kv);
    let mut out = vec![0.0; q.len()];
    for segment in segments {
        for i in 0..segment.queries {
            for head in 0..heads.query {
                let at = ((segment.query + i) * heads.query + head) * dim;
                let key = |j: usize| ((segment.key + j) * heads.kv + head / group) * dim;
                let visible = segment.keys - segment.queries + i + 1;
                let score = |j| (0..dim).map(|d| q[at + d] * k[key(j) + d]).sum::<f64>() / (dim as f64).sqrt();
                let scores: Vec<f64> = (0..visible).map(score).collect();
                let top = scores.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                for (j, score) in scores.iter().enumerate() {
                    let p = (score - top).exp() / sum;
                    (0..dim).for_each(|d| out[at + d] += p * v[key(j) + d]);
                }
            }
        }
    }
    out
}

fn inputs(queries: usize, keys: usize, heads: Heads, seed: u64) -> [Tensor; 3] {
    [(queries, heads.query, 1), (keys, heads.kv, 2), (keys, heads.kv, 3)]
        .map(|(rows, count, salt)| random(&[rows, count * heads.dim], seed ^ salt))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn matches_f64_and_finite_differences(
        lengths in prop::collection::vec(1usize..7, 1..4), kv in 1usize..3, group in 1usize..4, dim in 1usize..6, seed: u64
    ) {
        let (heads, tokens) = (Heads { query: kv * group, kv, dim }, lengths.iter().sum());
        let segments = Segment::packed(&lengths);
        let layout = on_cpu(segments.clone());
        let [q, k, v] = inputs(tokens, tokens, heads, seed);
        let (qs, ks, vs) = (wide(&q), wide(&k), wide(&v));
        let (o, lse) = forward(&q, &k, &v, heads, &layout).unwrap();
        close(&o, &reference(&qs, &ks, &vs, heads, &segments), 2e-6);
        let grad = random(q.shape(), seed ^ 4);
        let grads = wide(&grad);
        let loss = |q: &[f64], k: &[f64], v: &[f64]| {
            reference(q, k, v, heads, &segments).iter().zip(&grads).map(|(o, g)| o * g).sum::<f64>()
        };
        let saved = Saved { q: &q, k: &k, v: &v, o: &o, lse: &lse };
        let (dq, dk, dv) = backward(&saved, &grad, heads, &layout, None).unwrap();
        // With one key a row's softmax is constant, so that a gradient can be exactly zero: compare all three at once.
        let scale = numeric_gradient(&vs, |v| loss(&qs, &ks, v));
        close(&dv, &scale, 1e-5);
        let norm = scale.iter().map(|x| x * x).sum::<f64>().sqrt();
        for (found, expected) in [
            (dq, numeric_gradient(&qs, |q| loss(q, &ks, &vs))),
            (dk, numeric_gradient(&ks, |k| loss(&qs, k, &vs))),
        ] {
            let error = wide(&found).iter().zip(&expected).map(|(f, e)| (f - e).powi(2)).sum::<f64>().sqrt();
            prop_assert!(error <= 1e-5 * norm, "{error} against {norm}");
        }
    }
}

/// Many blocks of rows, and a sum of blocks in the gradients of keys and values.
#[test]
fn long_sequences_cross_blocks() {
    let heads = Heads { query: 4, kv: 2, dim: 16 };
    let segments = Segment::packed(&[150, 3, 64, 65]);
    let layout = on_cpu(segments.clone());
    let [q, k, v] = inputs(282, 282, heads, 9);
    let (o, lse) = forward(&q, &k, &v, heads, &layout).unwrap();
    close(&o, &reference(&wide(&q), &wide(&k), &wide(&v), heads, &segments), 2e-6);
    // Directional derivative along a random change of everything.
    let grad = random(q.shape(), 10);
    let (dq, dk, dv) = backward(&Saved { q: &q, k: &k, v: &v, o: &o, lse: &lse }, &grad, heads, &layout, None).unwrap();
    let along: Vec<Tensor> = [&q, &k, &v].iter().enumerate().map(|(i, x)| random(x.shape(), 20 + i as u64)).collect();
    let dot = |a: &Tensor, b: &Tensor| wide(a).iter().zip(wide(b)).map(|(a, b)| a * b).sum::<f64>();
    let slope = dot(&dq, &along[0]) + dot(&dk, &along[1]) + dot(&dv, &along[2]);
    let loss = |step: f64| {
        let moved = |x: &Tensor, i: usize| -> Vec<f64> {
            wide(x).iter().zip(wide(&along[i])).map(|(x, a)| x + step * a).collect()
        };
        let out = reference(&moved(&q, 0), &moved(&k, 1), &moved(&v, 2), heads, &segments);
        out.iter().zip(wide(&grad)).map(|(o, g)| o * g).sum::<f64>()
    };
    let numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5;
    assert!((slope - numeric).abs() <= 1e-4 * numeric.abs(), "{slope} against {numeric}");
}

/// Decoding token by token over a growing cache gives the same rows as the whole sequence at once.
#[test]
fn a_cache_gives_the_same_rows() {
    let heads = Heads { query: 4, kv: 2, dim: 8 };
    let [q, k, v] = inputs(70, 70, heads, 5);
    let (whole, _) = forward(&q, &k, &v, heads, &on_cpu(Segment::packed(&[70]))).unwrap();
    for i in [0, 1, 40, 69] {
        let layout = on_cpu(vec![Segment { query: 0, queries: 1, key: 0, keys: i + 1 }]);
        let (row, _) = forward(&q.rows(i, 1).unwrap(), &k, &v, heads, &layout).unwrap();
        close(&row, &wide(&whole.rows(i, 1).unwrap()), 1e-6);
    }
}

#[test]
fn misfits_are_errors() {
    let heads = Heads { query: 4, kv: 2, dim: 8 };
    let [q, k, v] = inputs(6, 6, heads, 1);
    for bad in [&[6, 1][..], &[5], &[7]] {
        assert!(forward(&q, &k, &v, heads, &on_cpu(Segment::packed(bad))).is_err(), "{bad:?}");
    }
    let beyond = on_cpu(vec![Segment { query: 0, queries: 6, key: 1, keys: 6 }]);
    assert!(forward(&q, &k, &v, heads, &beyond).is_err());
    let whole = on_cpu(Segment::packed(&[6]));
    assert!(forward(&q, &k, &v, Heads { query: 3, ..heads }, &whole).is_err());
    let cached = on_cpu(vec![Segment { query: 0, queries: 5, key: 0, keys: 6 }]);
    let q = q.rows(0, 5).unwrap();
    let (o, lse) = forward(&q, &k, &v, heads, &cached).unwrap();
    assert!(backward(&Saved { q: &q, k: &k, v: &v, o: &o, lse: &lse }, &o, heads, &cached, None).is_err());
}

#[test]
fn segments_that_do_not_follow_one_another_are_errors() {
    let first = Segment { query: 0, queries: 3, key: 0, keys: 3 };
    for second in [
        Segment { query: 4, queries: 2, key: 3, keys: 2 },
        Segment { query: 3, queries: 2, key: 3, keys: 1 },
        Segment { query: 3, queries: 2, key: usize::MAX, keys: 2 },
        Segment { query: 3, queries: 2, key: i32::MAX as usize, keys: 2 },
    ] {
        assert!(Layout::new(vec![first, second], Device::Cpu).is_err(), "{second:?}");
    }
}
