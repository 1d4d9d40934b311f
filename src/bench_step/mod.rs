//! Times warm training steps: the same step as training's, on random tokens or on the first micro-batch of data.

mod outcome;

use crate::{
    cli::BenchStepArgs,
    commands::print,
    data::{Batch, DataSpec},
    deal::Deal,
    default_task, hub, input,
    model::Model,
    page_trace,
    paging::Paging,
    plan, profile, report,
    settings::{Settings, TrainArgs},
    step::{Step, Stepper},
    train::{attach, source},
};
use anyhow::{Context, Result, bail, ensure};
use nibble_kernels::cuda::target;
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
use outcome::{Decoding, Outcome, Rows, Steps};
use std::{fmt::Display, time::Instant};

/// Tokens of the prompt of a generation.
const PROMPT: usize = 128;

/// [`Stream::purpose`] of the random tokens.
const PURPOSE: u32 = 0xBE7C;

/// Times steps of `batch_size` sequences of `seq_len` random tokens each, all of them labelled; with data, of the first
/// micro-batch that training would get.
pub fn run(args: &BenchStepArgs) -> Result<()> {
    // What is missing is found missing before a model is loaded.
    let data = args.train.data.as_ref().map(|data| hub::data(data, false)).transpose()?;
    // A model wants data, even where no file is read because the tokens are random.
    let random = || std::path::PathBuf::from("random tokens").into();
    let train = TrainArgs { data: Some(data.clone().unwrap_or_else(random)), ..args.train.clone() };
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
    let gpu = Gpu::of(device).ok();
    device.synchronize()?;
    crate::note!("ready    after {:.2} s", clock.elapsed().as_secs_f64());
    memory::reset_peak_of(device);

    let batch = match data {
        None => random_batch(&model.llama.config, settings.batch_size, settings.seq_len),
        Some(data) => first_batch(&model, &settings, &data)?,
    };
    let mut stepper = Stepper::new(&model.llama, &settings)?;
    let steps = time_steps(args, &settings, &mut model.llama, &mut stepper, &batch)?;
    let mut outcome = Outcome {
        model: model.name,
        device: gpu.map_or("cpu", Gpu::name).to_string(),
        target: gpu.map(|_| target().to_string()),
        steps,
        peak: memory::usage_of(device),
        host_peak: memory::process_peak(),
        driver: None,
        pages: stepper.paging().map(Paging::figures),
        decoding: None,
        rows: None,
    };
    say(args, &outcome.steps)?;
    say(args, report::memory_line(device))?;
    outcome.pages.map_or(Ok(()), |pages| say(args, pages))?;
    if args.decode > 0 {
        let decoding = decode(&model.llama, &batch, args.decode)?;
        say(args, &decoding)?;
        outcome.decoding = Some(decoding);
    }
    if let (true, Some(config)) = (args.rows > 0, adapter) {
        let rows = mixed(&mut model.llama, config, args.rows, args.decode.max(1))?;
        say(args, &rows)?;
        outcome.rows = Some(rows);
    }
    if let Some(gpu) = gpu {
        let driver = gpu.total_memory() - gpu.free_memory()?;
        say(args, format_args!("driver: {} in use on the whole GPU", report::bytes(driver)))?;
        outcome.driver = Some(driver);
    }
    if args.train.json {
        print(&(serde_json::to_string(&outcome)? + "\n"))?;
    }
    Ok(())
}

/// Says a line for people: on standard output, or beside the JSON that goes there.
fn say(args: &BenchStepArgs, line: impl Display) -> Result<()> {
    if !args.train.json {
        return print(&format!("{line}\n"));
    }
    crate::note!("{line}");
    Ok(())
}

/// Makes the steps, those that are not timed among them, and says each.
fn time_steps(
    args: &BenchStepArgs,
    settings: &Settings,
    llama: &mut Llama,
    stepper: &mut Stepper,
    batch: &Batch,
) -> Result<Steps> {
    let device = llama.device();
    let (mut seconds, mut last) = (Vec::new(), (f64::NAN, f64::NAN));
    let total = args.warm + args.timed;
    // The step with a profile comes after those that count: marks between kernels take time.
    let profiled = u32::from(settings.profile.is_some());
    for number in 0..total + profiled {
        let picture = settings.trace.as_deref().filter(|_| number + 1 == total);
        let profile = settings.profile.as_deref().filter(|_| number == total);
        page_trace::begin(picture, stepper.paging());
        profile::begin(profile, device)?;
        let clock = Instant::now();
        let Step { loss, grad_norm, fault } = stepper.step(llama, std::slice::from_ref(batch), number, settings.lr)?;
        ensure!(fault.is_none(), "step {}: {}", number + 1, fault.unwrap_or_default());
        let elapsed = clock.elapsed().as_secs_f64();
        let warm = match number {
            number if number < args.warm => " (warm-up)",
            number if number == total => " (profiled)",
            _ => "",
        };
        let line =
            format!("step {:>3}  {elapsed:.4} s  loss {loss:.4}  gradient norm {grad_norm:.4}{warm}", number + 1);
        say(args, line)?;
        if (args.warm..total).contains(&number) {
            seconds.push(elapsed);
            last = (loss, grad_norm);
        }
        page_trace::finish(picture, stepper.paging());
        profile::finish(profile, device, llama.dtype)?;
    }
    if let Some(fault) = stepper.finish(llama)? {
        bail!("step {total}: {fault}");
    }
    let seconds = median(seconds);
    Ok(Steps {
        batch_size: batch.lengths.len(),
        seq_len: batch.lengths.iter().copied().max().unwrap_or(0),
        activations: settings.activations.clone(),
        feed_forward_rows: settings.feed_forward_rows,
        dequantized_layers: settings.dequantized_layers,
        seconds,
        tok_s: batch.ids.len() as f64 / seconds,
        model_tflop_s: flops(&llama.config, &batch.lengths) / seconds / 1e12,
        loss: last.0,
        grad_norm: last.1,
    })
}

/// Times the generation of `tokens` tokens after a prompt.
fn decode(llama: &Llama, batch: &Batch, tokens: usize) -> Result<Decoding> {
    let prompt: Vec<u32> = batch.ids.iter().cycle().take(PROMPT).map(|&id| id.unsigned_abs()).collect();
    let run = |count| -> Result<f64> {
        let clock = Instant::now();
        generate(llama, &prompt, count, &[], Sampling::GREEDY, |_| true)?;
        Ok(clock.elapsed().as_secs_f64())
    };
    run(2)?;
    let prompt_seconds = run(1)?;
    let rest = run(tokens + 1)? - prompt_seconds;
    Ok(Decoding { prompt: PROMPT, prompt_seconds, tokens, tok_s: tokens as f64 / rest })
}

/// Times batches of `rows` texts: all of one adapter, and each of its own. And switching from one to another.
fn mixed(llama: &mut Llama, config: AdapterConfig, rows: usize, tokens: usize) -> Result<Rows> {
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
    let [one_adapter_tok_s, own_adapters_tok_s] = rates.map(median);
    let switch_seconds = switch.into_iter().fold(0.0, f64::max);
    Ok(Rows { rows, tokens, one_adapter_tok_s, own_adapters_tok_s, switch_seconds })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Floating-point operations of a step on sequences of these lengths: forward products and input gradients of every linear
/// layer and the head, and attention (causal, so half of it); no recomputation and no gradients of frozen weights.
fn flops(c: &LlamaConfig, lengths: &[usize]) -> f64 {
    let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
    let layer = c.hidden_size * (2 * q + 2 * kv) + 3 * c.hidden_size * c.intermediate_size;
    let weights = (c.num_layers * layer + c.vocab_size * c.hidden_size) as f64;
    // Two products of T x T x head forward and five backward, halved.
    let attention = 7.0 * (c.num_layers * q) as f64;
    lengths.iter().map(|&tokens| tokens as f64 * (4.0 * weights + attention * tokens as f64)).sum()
}

fn random_batch(config: &LlamaConfig, rows: usize, length: usize) -> Batch {
    let rng = Philox::new(0, Stream { purpose: PURPOSE, step: 0, layer: 0 });
    let ids: Vec<i32> = (0..(rows * length) as u64).map(|i| rng.below(i, config.vocab_size as u32) as i32).collect();
    let mut labels: Vec<i32> = ids[1..].to_vec();
    labels.push(ids[0]);
    Batch { ids, labels, lengths: vec![length; rows] }
}

/// The first micro-batch of a run with these settings, whose data is `data`.
fn first_batch(model: &Model, settings: &Settings, data: &DataSpec) -> Result<Batch> {
    let options = settings.data_options(model.llama.config.vocab_size);
    let examples = input::read("data", data, model.tokenizer()?.as_ref(), &options)?.context("stopped")?;
    let batches = Deal::new(&examples, settings)?.batches(0)?;
    batches.into_iter().next().context("a run of no steps has no micro-batch")
}
