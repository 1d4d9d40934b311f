//! The operations that are bound by memory, at the sizes of an 8B model; each byte is counted once.

use crate::Bench;
use nibble_kernels::{
    cast,
    cross_entropy::{Wanted, head_loss},
    dropout::{self, Mask},
    elementwise, embedding, rms_norm,
    rotary::{self, Direction, RopeConfig, RopeScaling},
    swiglu,
    table::{Rows8, Table, input_grad, project},
};
use nibble_runtime::{DType, Result, Tag, Tensor};
use std::cell::RefCell;

const HIDDEN: usize = 4096;
const FFN: usize = 14_336;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const VOCAB: usize = 128_256;
const TYPE: DType = DType::BF16;

pub fn run(bench: &Bench) -> Result<()> {
    for tokens in [8192, 2048, 1] {
        norms(bench, tokens)?;
        rotaries(bench, tokens)?;
        swiglus(bench, tokens)?;
        others(bench, tokens)?;
    }
    heads(bench, 512)?;
    heads(bench, 2048)
}

fn shape(x: &Tensor) -> String {
    format!("{:?} {}", x.shape(), x.dtype())
}

fn norms(bench: &Bench, tokens: usize) -> Result<()> {
    let make = |seed| bench.random(&[tokens, HIDDEN], TYPE, seed);
    let (x, grad, mut dx, w) = (make(1)?, make(2)?, make(3)?, bench.random(&[HIDDEN], TYPE, 4)?);
    let (bytes, shape) = (x.size_bytes(), shape(&x));
    let (_, rstd) = rms_norm::forward(&x, &w, 1e-5)?;
    bench.time("rms_norm forward", &shape, 2 * bytes, 0.0, || rms_norm::forward(&x, &w, 1e-5).map(drop))?;
    bench.time("rms_norm apply", &shape, 2 * bytes, 0.0, || rms_norm::apply(&x, &w, &rstd).map(drop))?;
    let mut backward = |want| rms_norm::backward_add(&x, &w, &rstd, &grad, &mut dx, want).map(drop);
    bench.time("rms_norm backward", &shape, 4 * bytes, 0.0, || backward(false))?;
    bench.time("rms_norm backward and weight", &shape, 6 * bytes, 0.0, || backward(true))
}

fn rotaries(bench: &Bench, tokens: usize) -> Result<()> {
    let config = RopeConfig { theta: 500_000.0, scaling: RopeScaling::Default };
    let table = config.table(HEAD_DIM, 2048)?.to_device(bench.device())?;
    let positions: Vec<i32> = (0..tokens as i32).map(|i| i % 2048).collect();
    let positions =
        Tensor::from_slice(&positions, &[tokens], Tag::Workspace)?.to_device(bench.device(), Tag::Workspace)?;
    for (name, heads) in [("rotary q", HEADS), ("rotary k", KV_HEADS)] {
        let x = bench.random(&[tokens, heads * HEAD_DIM], TYPE, 1)?;
        let (bytes, shape) = (2 * x.size_bytes(), shape(&x));
        let x = RefCell::new(Some(x));
        bench.time(name, &shape, bytes, 0.0, || {
            // Taken and put back, so that it is turned in place.
            let Some(mine) = x.take() else { return Ok(()) };
            x.replace(Some(rotary::apply(mine, &positions, &table, Direction::Forward)?));
            Ok(())
        })?;
    }
    Ok(())
}

fn swiglus(bench: &Bench, tokens: usize) -> Result<()> {
    let make = |seed| bench.random(&[tokens, FFN], TYPE, seed);
    let (gate, up, grad) = (make(1)?, make(2)?, make(3)?);
    let (bytes, shape) = (gate.size_bytes(), shape(&gate));
    bench.time("swiglu forward", &shape, 3 * bytes, 0.0, || swiglu::forward(&gate, &up).map(drop))?;
    let all = RefCell::new(Some((gate, up, grad)));
    bench.time("swiglu backward", &shape, 6 * bytes, 0.0, || {
        let Some((gate, up, grad)) = all.take() else { return Ok(()) };
        let made = swiglu::backward(gate, up, grad)?;
        all.replace(Some((made.gate, made.up, made.output)));
        Ok(())
    })
}

fn others(bench: &Bench, tokens: usize) -> Result<()> {
    let (x, mut sum) = (bench.random(&[tokens, HIDDEN], TYPE, 1)?, bench.random(&[tokens, HIDDEN], TYPE, 2)?);
    let (bytes, text) = (x.size_bytes(), shape(&x));
    let mask = Mask { probability: 0.05, seed: 1, step: 2, layer: 3 };
    bench.time("dropout", &text, 2 * bytes, 0.0, || dropout::apply(&x, mask).map(drop))?;
    bench.time("add_assign", &text, 3 * bytes, 0.0, || elementwise::add_assign(&mut sum, &x))?;
    bench.time("cast to f32", &text, 3 * bytes, 0.0, || cast::cast(&x, DType::F32, Tag::Workspace).map(drop))?;
    let wide = cast::cast(&x, DType::F32, Tag::Workspace)?;
    bench.time("cast to bf16", &text, 3 * bytes, 0.0, || cast::cast(&wide, TYPE, Tag::Workspace).map(drop))?;
    let table = bench.random(&[VOCAB, HIDDEN], TYPE, 3)?;
    let ids: Vec<i32> = (0..tokens).map(|i| (i * 40_503 % VOCAB) as i32).collect();
    bench.time("embedding forward", &text, 2 * bytes, 0.0, || embedding::forward(&ids, &table, TYPE).map(drop))
}

/// Head and loss; with the products alone beside them, at the size of one chunk, what the rest takes shows as the
/// difference.
fn heads(bench: &Bench, tokens: usize) -> Result<()> {
    let (hidden, head) = (bench.random(&[tokens, HIDDEN], TYPE, 1)?, bench.random(&[VOCAB, HIDDEN], TYPE, 2)?);
    let grad = bench.random(&[tokens.min(512), VOCAB], TYPE, 3)?;
    let (eight, head) = (Table::Rows8(Rows8::quantize(&head, Tag::Weights)?), Table::Dense(head));
    let labels: Vec<i32> = (0..tokens).map(|i| (i * 40_503 % VOCAB) as i32).collect();
    let (bytes, product) = (head.size_bytes(), 2.0 * (tokens * HIDDEN) as f64 * VOCAB as f64);
    let (text, wanted) = (shape(&hidden), Wanted { hidden: true, ..Wanted::default() });
    let loss = |head: &Table, wanted| head_loss(&hidden, head, &labels, 1e-3, wanted).map(drop);
    bench.time("head and loss", &text, bytes, product, || loss(&head, Wanted::default()))?;
    bench.time("head, loss and gradient", &text, 2 * bytes, 2.0 * product, || loss(&head, wanted))?;
    bench.time("head in 8 bits, loss and gradient", &text, 2 * eight.size_bytes(), 2.0 * product, || {
        loss(&eight, wanted)
    })?;
    if tokens <= 512 {
        let logits = || project(&hidden, &head).map(drop);
        bench.time("head alone", &text, bytes, product, logits)?;
        bench.time("head gradient alone", &text, bytes, product, || input_grad(&grad, &head).map(drop))?;
    }
    Ok(())
}
