//! CPU attention: for each sequence and key/value head, blocks of [`ROWS`] queries against all keys before them.

use super::{Heads, Segment};
use crate::{
    linear::matrix::{Matrix, MatrixMut, product},
    math::{dot, exp, exp_sum, max, vectorized},
};
use rayon::prelude::*;

/// Queries that share a scratch block of scores `[ROWS, keys]`.
const ROWS: usize = 64;

pub(super) struct Inputs<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub heads: Heads,
    pub segments: &'a [Segment],
}

pub(super) struct Outputs<'a> {
    pub o: &'a [f32],
    pub lse: &'a [f32],
    pub grad: &'a [f32],
}

/// A block of query rows of one head, with the keys that any of them sees.
#[derive(Clone, Copy)]
struct Block {
    /// Query head.
    head: usize,
    /// First row within the segment.
    first: usize,
    /// Rows.
    rows: usize,
    /// Keys that the last row sees.
    keys: usize,
}

impl Block {
    /// Keys that row `i` of the block sees.
    fn visible(&self, i: usize) -> usize {
        self.keys - (self.rows - 1 - i)
    }
}

impl Inputs<'_> {
    /// Independent pieces of work: (segment, key/value head).
    fn tasks(&self) -> Vec<(Segment, usize)> {
        self.segments.iter().flat_map(|&segment| (0..self.heads.kv).map(move |kv| (segment, kv))).collect()
    }

    /// Blocks of the query heads that read key/value head `kv`.
    fn blocks(&self, segment: Segment, kv: usize) -> impl Iterator<Item = Block> {
        let group = self.heads.query / self.heads.kv;
        (kv * group..(kv + 1) * group).flat_map(move |head| {
            (0..segment.queries).step_by(ROWS).map(move |first| {
                let rows = ROWS.min(segment.queries - first);
                Block { head, first, rows, keys: segment.keys - segment.queries + first + rows }
            })
        })
    }

    /// Rows of a `[T, heads·dim]` matrix: one head, `rows` tokens from `first` on.
    fn head<'a>(&self, data: &'a [f32], heads: usize, head: usize, first: usize, rows: usize) -> Matrix<'a> {
        let (dim, width) = (self.heads.dim, heads * self.heads.dim);
        Matrix::strided(&data[first * width + head * dim..], rows, dim, width)
    }

    fn queries<'a>(&self, data: &'a [f32], segment: Segment, block: Block) -> Matrix<'a> {
        self.head(data, self.heads.query, block.head, segment.query + block.first, block.rows)
    }

    fn keys<'a>(&self, data: &'a [f32], segment: Segment, kv: usize, keys: usize) -> Matrix<'a> {
        self.head(data, self.heads.kv, kv, segment.key, keys)
    }

    /// `scale · Q·Kᵀ` of a block into `scores` `[rows, keys]`.
    fn scores(&self, segment: Segment, kv: usize, block: Block, scores: &mut [f32]) {
        let q = self.queries(self.q, segment, block);
        let k = self.keys(self.k, segment, kv, block.keys);
        product(q, k.t(), self.heads.scale(), MatrixMut::new(scores, block.rows, block.keys), false, false);
    }
}

/// Copies the columns of one head from `[rows, dim]` into rows `first..` of `[T, heads·dim]`.
fn scatter(part: &[f32], out: &mut [f32], heads: Heads, count: usize, head: usize, first: usize) {
    let rows = out.chunks_exact_mut(count * heads.dim).skip(first);
    for (row, part) in rows.zip(part.chunks_exact(heads.dim)) {
        row[head * heads.dim..][..heads.dim].copy_from_slice(part);
    }
}

pub(super) fn forward(inputs: &Inputs, o: &mut [f32], lse: &mut [f32]) {
    let heads = inputs.heads;
    let total = lse.len() / heads.query;
    let run = |&(segment, kv): &(Segment, usize)| {
        let mut scores = Vec::new();
        let part = |block: Block| {
            scores.resize(block.rows * block.keys, 0.0);
            inputs.scores(segment, kv, block, &mut scores);
            let mut sums = vec![0.0; block.rows];
            vectorized(
                #[inline(always)]
                || softmax(&mut scores, block, &mut sums),
            );
            let mut part = vec![0.0; block.rows * heads.dim];
            let p = Matrix::new(&scores, block.rows, block.keys);
            let v = inputs.keys(inputs.v, segment, kv, block.keys);
            product(p, v, 1.0, MatrixMut::new(&mut part, block.rows, heads.dim), false, false);
            (block, part, sums)
        };
        inputs.blocks(segment, kv).map(part).collect::<Vec<_>>()
    };
    let tasks = inputs.tasks();
    let results: Vec<_> = tasks.par_iter().map(run).collect();
    for ((segment, _), blocks) in tasks.iter().zip(results) {
        for (block, part, sums) in blocks {
            let first = segment.query + block.first;
            scatter(&part, o, heads, heads.query, block.head, first);
            lse[block.head * total + first..][..block.rows].copy_from_slice(&sums);
        }
    }
}

/// Turns scores into probabilities, zero beyond the diagonal, and stores each row's log-sum-exp.
#[inline(always)]
fn softmax(scores: &mut [f32], block: Block, lse: &mut [f32]) {
    for (i, (row, lse)) in scores.chunks_exact_mut(block.keys).zip(lse).enumerate() {
        let (seen, hidden) = row.split_at_mut(block.visible(i));
        let top = max(seen);
        let sum = exp_sum(seen, top);
        let inverse = 1.0 / sum;
        seen.iter_mut().for_each(|p| *p *= inverse);
        hidden.fill(0.0);
        *lse = top + sum.ln();
    }
}

pub(super) fn backward(inputs: &Inputs, outputs: &Outputs, dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]) {
    let heads = inputs.heads;
    let (dim, scale) = (heads.dim, heads.scale());
    let total = outputs.lse.len() / heads.query;
    let run = |&(segment, kv): &(Segment, usize)| {
        let (mut p, mut ds) = (Vec::new(), Vec::new());
        let (mut dk, mut dv) = (vec![0.0; segment.keys * dim], vec![0.0; segment.keys * dim]);
        let part = |block: Block| {
            let (rows, keys) = (block.rows, block.keys);
            p.resize(rows * keys, 0.0);
            ds.resize(rows * keys, 0.0);
            inputs.scores(segment, kv, block, &mut p);
            let grad = inputs.queries(outputs.grad, segment, block);
            let v = inputs.keys(inputs.v, segment, kv, keys);
            product(grad, v.t(), 1.0, MatrixMut::new(&mut ds, rows, keys), false, false);
            let first = segment.query + block.first;
            let lse = &outputs.lse[block.head * total + first..][..rows];
            let row_of = |i: usize| ((first + i) * heads.query + block.head) * dim..;
            vectorized(
                #[inline(always)]
                || {
                    for (i, &lse) in lse.iter().enumerate() {
                        let d = dot(&outputs.grad[row_of(i)][..dim], &outputs.o[row_of(i)][..dim]);
                        let row = i * keys..(i + 1) * keys;
                        softmax_backward(&mut p[row.clone()], &mut ds[row], block.visible(i), lse, d);
                    }
                },
            );
            let mut part = vec![0.0; rows * dim];
            let (p, ds) = (Matrix::new(&p, rows, keys), Matrix::new(&ds, rows, keys));
            let k = inputs.keys(inputs.k, segment, kv, keys);
            let q = inputs.queries(inputs.q, segment, block);
            product(ds, k, scale, MatrixMut::new(&mut part, rows, dim), false, false);
            product(ds.t(), q, scale, MatrixMut::new(&mut dk[..keys * dim], keys, dim), true, false);
            product(p.t(), grad, 1.0, MatrixMut::new(&mut dv[..keys * dim], keys, dim), true, false);
            (block, part)
        };
        let parts: Vec<_> = inputs.blocks(segment, kv).map(part).collect();
        (parts, dk, dv)
    };
    let tasks = inputs.tasks();
    let results: Vec<_> = tasks.par_iter().map(run).collect();
    for (&(segment, kv), (parts, dk_part, dv_part)) in tasks.iter().zip(results) {
        for (block, part) in parts {
            scatter(&part, dq, heads, heads.query, block.head, segment.query + block.first);
        }
        scatter(&dk_part, dk, heads, heads.kv, kv, segment.key);
        scatter(&dv_part, dv, heads, heads.kv, kv, segment.key);
    }
}

/// A row of scores becomes `P`, and a row of `dP` becomes `dS = P ∘ (dP − D)`; both zero beyond the diagonal.
#[inline(always)]
fn softmax_backward(p: &mut [f32], ds: &mut [f32], visible: usize, lse: f32, d: f32) {
    for (p, ds) in p[..visible].iter_mut().zip(&mut ds[..visible]) {
        *p = exp(*p - lse);
        *ds = *p * (*ds - d);
    }
    p[visible..].fill(0.0);
    ds[visible..].fill(0.0);
}
