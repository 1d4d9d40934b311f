//! Times warm training steps: the same step as training's, on random tokens.

use crate::{
    cli::BenchStepArgs,
    data::Batch,
    default_task,
    model::Model,
    page_trace, plan, profile, report,
    settings::{Settings, TrainArgs},
    step::{Step, Stepper},
    train::{attach, source},
};
use anyhow::{Result, bail, ensure};
use nibble_models::{
    Llama, LlamaConfig,
    batch::{Request, generate_batch},
    files::peft::AdapterConfig,
    generate::generate,
    sampling::Sampling,
};
use nibble_runtime::{
    cuda::Gpu,
    memory,
    rng::{Philox, Stream},
};
use std::time::Instant;

/// Tokens of the prompt of a generation.
const PROMPT: usize = 128;

/// [`Stream::purpose`] of the random tokens.
const PURPOSE: u32 = 0xBE7C;

/// Times steps of `batch_size` sequences of `seq_len` random tokens each, all of them labelled.
pub fn run(args: &BenchStepArgs) -> Result<()> {
    // No file is read: the tokens are random.
    let train = TrainArgs { data: Some(std::path::PathBuf::from("random tokens").into()), ..args.train.clone() };
    let settings = Settings::resolve(&train, default_task::RECIPE)?;
    // One micro-batch a step.
    let settings = Settings { grad_accum: 1, ..settings };
    let settings = plan::within(plan::budget(&settings)?, &settings, settings.seq_len)?;
    ensure!(args.timed > 0, "--timed must be at least 1");
    let clock = Instant::now();
    let mut model = Model::load(&source(&settings))?;
    profile::check(settings.profile.as_deref(), model.llama.device())?;
    let adapter = attach(&mut model, &settings)?;
    let device = model.llama.device();
    device.synchronize()?;
    crate::note!("ready    after {:.2} s", clock.elapsed().as_secs_f64());
    memory::reset_peak_of(device);

    let batch = random_batch(&model.llama.config, settings.batch_size, settings.seq_len);
    let mut stepper = Stepper::new(&model.llama, &settings)?;
    let mut seconds = Vec::new();
    let total = args.warm + args.timed;
    // The step with a profile comes after those that count: marks between kernels take time.
    let profiled = u32::from(settings.profile.is_some());
    for number in 0..total + profiled {
        let picture = settings.trace.as_deref().filter(|_| number + 1 == total);
        let profile = settings.profile.as_deref().filter(|_| number == total);
        page_trace::begin(picture, stepper.paging());
        profile::begin(profile, device)?;
        let clock = Instant::now();
        let Step { loss, grad_norm, fault } =
            stepper.step(&mut model.llama, std::slice::from_ref(&batch), number, settings.lr)?;
        ensure!(fault.is_none(), "step {}: {}", number + 1, fault.unwrap_or_default());
        let elapsed = clock.elapsed().as_secs_f64();
        let warm = match number {
            number if number < args.warm => " (warm-up)",
            number if number == total => " (profiled)",
            _ => "",
        };
        println!("step {:>3}  {elapsed:.4} s  loss {loss:.4}  gradient norm {grad_norm:.4}{warm}", number + 1);
        if (args.warm..total).contains(&number) {
            seconds.push(elapsed);
        }
        page_trace::finish(picture, stepper.paging());
        profile::finish(profile, device, model.llama.dtype)?;
    }
    if let Some(fault) = stepper.finish(&mut model.llama)? {
        bail!("step {total}: {fault}");
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let tokens = batch.ids.len() as f64;
    let flops = flops(&model.llama.config, settings.batch_size, settings.seq_len);
    let rows = settings.feed_forward_rows.map_or(String::new(), |rows| format!(", {rows} feed-forward rows at a time"));
    println!("{} x {} tokens, kept: {}{rows}", settings.batch_size, settings.seq_len, settings.activations);
    println!("median {median:.4} s  {:.0} tok/s  {:.1} model TFLOP/s", tokens / median, flops / median / 1e12);
    println!("{}", report::memory_line(device));
    if let Some(paging) = stepper.paging() {
        println!("{}", paging.line());
    }
    if args.decode > 0 {
        let prompt: Vec<u32> = batch.ids.iter().cycle().take(PROMPT).map(|&id| id.unsigned_abs()).collect();
        let decode = |count| generate(&model.llama, &prompt, count, &[], Sampling::GREEDY, |_| true).map(drop);
        decode(2)?;
        let clock = Instant::now();
        decode(1)?;
        let first = clock.elapsed().as_secs_f64();
        let clock = Instant::now();
        decode(args.decode + 1)?;
        let rest = clock.elapsed().as_secs_f64() - first;
        println!("decoding: {:.1} tok/s after a prompt of {PROMPT} in {first:.4} s", args.decode as f64 / rest);
    }
    if let (true, Some(config)) = (args.rows > 0, adapter) {
        mixed(&mut model.llama, config, args.rows, args.decode.max(1))?;
    }
    if let Ok(gpu) = Gpu::of(device) {
        println!("driver: {} in use on the whole GPU", report::bytes(gpu.total_memory() - gpu.free_memory()?));
    }
    Ok(())
}

/// Times batches of `rows` texts: all of one adapter, and each of its own. And switching from one to another.
fn mixed(llama: &mut Llama, config: AdapterConfig, rows: usize, tokens: usize) -> Result<()> {
    let adapter = llama.adapter(config)?;
    let names: Vec<String> = (0..rows).map(|i| i.to_string()).collect();
    for name in &names {
        llama.add_adapter(name, &adapter, "the trained adapter".as_ref())?;
    }
    let mut switch = Vec::new();
    for name in names.iter().cycle().take(4 * rows) {
        let clock = Instant::now();
        llama.switch_adapter(Some(name))?;
        switch.push(clock.elapsed().as_secs_f64());
    }
    let run = |distinct: usize, tokens: usize| {
        let request = |i: usize| Request { prompt: vec![1 + i as u32], adapter: Some(names[i % distinct].clone()) };
        let requests: Vec<Request> = (0..rows).map(request).collect();
        let clock = Instant::now();
        generate_batch(llama, &requests, tokens, &[], Sampling::GREEDY, |_, _| true)?;
        anyhow::Ok(clock.elapsed().as_secs_f64())
    };
    // In turns, so that what else the machine does falls on both alike. The first token pays for the adapters' way in.
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..5 {
        for (rates, distinct) in rates.iter_mut().zip([1, rows]) {
            let rest = run(distinct, tokens + 1)? - run(distinct, 1)?;
            rates.push((rows * tokens) as f64 / rest);
        }
    }
    let [one, each] = rates.map(|mut rates| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    });
    println!(
        "{rows} rows: {one:.1} tok/s with one adapter, {each:.1} tok/s with {rows} ({:.2} of it); switching takes at most \
         {:.4} ms",
        each / one,
        1e3 * switch.into_iter().fold(0.0, f64::max)
    );
    Ok(())
}

/// Floating-point operations of a step: forward products and input gradients of every linear layer and the head, and
/// attention (causal, so half of it); no recomputation and no gradients of frozen weights.
fn flops(c: &LlamaConfig, batch: usize, seq_len: usize) -> f64 {
    let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
    let layer = c.hidden_size * (2 * q + 2 * kv) + 3 * c.hidden_size * c.intermediate_size;
    let weights = (c.num_layers * layer + c.vocab_size * c.hidden_size) as f64;
    let tokens = (batch * seq_len) as f64;
    // Two products of T x T x head forward and five backward, halved.
    let attention = 7.0 * (c.num_layers * q) as f64 * seq_len as f64;
    tokens * (4.0 * weights + attention)
}

fn random_batch(config: &LlamaConfig, rows: usize, length: usize) -> Batch {
    let rng = Philox::new(0, Stream { purpose: PURPOSE, step: 0, layer: 0 });
    let ids: Vec<i32> = (0..(rows * length) as u64).map(|i| rng.below(i, config.vocab_size as u32) as i32).collect();
    let mut labels: Vec<i32> = ids[1..].to_vec();
    labels.push(ids[0]);
    Batch { ids, labels, lengths: vec![length; rows] }
}
