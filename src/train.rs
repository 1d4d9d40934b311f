//! A training run, in the order in which data walks through it.

use crate::{
    data::{self, Example, Sampler, collate},
    default_task,
    eval::{EvalResult, answers, evaluate, packed},
    interrupt,
    loss_scale::LossScale,
    model::{Model, ModelSource},
    report::{self, StepLog, StepMetrics},
    run_dir::RunDir,
    settings::{Method, Settings},
};
use anyhow::{Context, Result, bail, ensure};
use nibble_kernels::adamw::{AdamWConfig, DecayOrder};
use nibble_models::{
    files::{atomic::write_json, peft},
    llama::{DropoutKey, LoraConfig},
    tokenizer::Tokenizer,
};
use nibble_optim::{AdamW, Gradients, Update, clip_scale};
use nibble_runtime::{Saving, Tag, Tensor};
use serde::Serialize;
use std::{path::PathBuf, time::Instant};

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The run's folder; not made if the user stopped before the first step.
    pub dir: PathBuf,
    /// Whether the user stopped it.
    pub interrupted: bool,
    /// On the held-out examples, where there are any.
    pub before: Option<EvalResult>,
    pub after: Option<EvalResult>,
}

/// Fine-tunes a model: load → attach adapters → data → loop {forward, loss, backward, clip, update} → save.
pub fn train(settings: &Settings) -> Result<Outcome> {
    let started = Instant::now();
    let run = RunDir::plan(settings)?;
    let mut model = Model::load(&source(settings))?;
    let tokenizer = model.tokenizer()?;
    let adapter_config = attach(&mut model, settings)?;
    let (examples, held_out) = load_data(&model, tokenizer.as_ref(), settings)?;

    let before = evaluate_and_show("before", &model, tokenizer.as_ref(), &held_out)?;
    if interrupt::requested() {
        eprintln!("stopped before the first step; nothing was written");
        return Ok(Outcome { dir: run.path().to_path_buf(), interrupted: true, before, after: None });
    }
    run.create(settings)?;
    let (log, interrupted) = optimize(&mut model, &examples, settings, &run, &adapter_config, tokenizer.as_ref())?;
    save(&model, &run, &adapter_config, tokenizer.as_ref())?;
    report::loss_curve(&run.join("loss.svg"), &log, &format!("training loss of {}", run.path().display()))?;
    let after = match interrupted {
        true => None,
        false => evaluate_and_show("after", &model, tokenizer.as_ref(), &held_out)?,
    };

    let seconds = started.elapsed().as_secs_f64();
    write_json(&run.join("summary.json"), &Summary { before, after, steps: log.len(), interrupted, seconds })?;
    eprintln!("{}", report::memory_line());
    if let (Some(before), Some(after)) = (before, after) {
        eprintln!("held-out before: {before}\nheld-out after:  {after}");
    }
    let how = if interrupted { "stopped" } else { "finished" };
    eprintln!("{how} after {} steps and {seconds:.1} s; results are in {}", log.len(), run.path().display());
    let trained = if settings.method == Method::Full { "model/" } else { "adapter/" };
    eprintln!("  {trained}  metrics.jsonl  loss.svg  settings.toml  summary.json");
    Ok(Outcome { dir: run.path().to_path_buf(), interrupted, before, after })
}

/// `summary.json`.
#[derive(Serialize)]
struct Summary {
    before: Option<EvalResult>,
    after: Option<EvalResult>,
    steps: usize,
    interrupted: bool,
    seconds: f64,
}

fn source(settings: &Settings) -> ModelSource {
    ModelSource {
        path: settings.model.clone(),
        quant: settings.quantization(),
        quant_chosen: settings.quant.is_some(),
        double_quant: !settings.no_double_quant,
        block_size: settings.block_size,
        dtype: settings.dtype,
        device: settings.device,
    }
}

/// Makes parameters trainable, and says how many.
fn attach(model: &mut Model, settings: &Settings) -> Result<Option<peft::AdapterConfig>> {
    let lora = LoraConfig {
        rank: settings.rank,
        alpha: settings.alpha,
        dropout: settings.dropout,
        rslora: settings.rslora,
        targets: settings.targets.clone(),
    };
    let config = match (settings.method, &settings.adapter_init) {
        (Method::Full, _) => {
            model.llama.train_all()?;
            None
        }
        (_, Some(dir)) => Some(model.attach(dir)?),
        (_, None) => {
            model.llama.add_lora(&lora, settings.seed)?;
            let base = settings.model.as_ref().map(|path| path.display().to_string());
            Some(lora.to_peft(base))
        }
    };
    model.llama.saving = if settings.recompute { Saving::Recompute } else { Saving::Keep };
    let parameters = model.llama.parameters();
    let count: usize = parameters.iter().map(|(_, _, value)| value.numel()).sum();
    eprintln!("trains   {:.2}M parameters in {} tensors by {}", count as f64 / 1e6, parameters.len(), settings.method);
    Ok(config)
}

/// The training and the held-out examples.
fn load_data(
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    settings: &Settings,
) -> Result<(Vec<Example>, Vec<Example>)> {
    let embedded = match settings.data {
        None => Some(default_task::unpack().context("unpacking the embedded task")?),
        Some(_) => None,
    };
    let inside = |name: &str| embedded.as_ref().map(|dir| dir.path().join(name));
    let train = settings.data.clone().or_else(|| inside(default_task::TRAIN));
    let held_out = settings.eval_data.clone().or_else(|| inside(default_task::EVAL));
    let options = data::DataOptions { seq_len: settings.seq_len, vocab_size: model.llama.config.vocab_size };
    let load = |path: Option<PathBuf>| match path {
        None => Ok(Vec::new()),
        Some(path) => data::load_examples(&path, tokenizer, &options),
    };
    let (train, held_out) = (load(train)?, load(held_out)?);
    let tokens: usize = train.iter().map(|example| example.ids.len()).sum();
    eprintln!("data     {} examples, {tokens} tokens; {} held out", train.len(), held_out.len());
    Ok((train, held_out))
}

/// Evaluates on the held-out examples and shows a few answers.
fn evaluate_and_show(
    when: &str,
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    held_out: &[Example],
) -> Result<Option<EvalResult>> {
    if held_out.is_empty() {
        return Ok(None);
    }
    let Some(result) = evaluate(model, held_out)? else { return Ok(None) };
    eprintln!("\n{when} training: {result}");
    let shown = tokenizer.map_or(Ok(Vec::new()), |tokenizer| answers(model, tokenizer, held_out, 3))?;
    for answer in shown {
        eprintln!("  prompt   {:?}\n  expected {:?}\n  answer   {:?}", answer.prompt, answer.expected, answer.found);
    }
    eprintln!();
    Ok(Some(result))
}

/// The optimizer steps. Returns their metrics, and whether the user stopped them.
fn optimize(
    model: &mut Model,
    examples: &[Example],
    settings: &Settings,
    run: &RunDir,
    adapter_config: &Option<peft::AdapterConfig>,
    tokenizer: Option<&Tokenizer>,
) -> Result<(Vec<StepMetrics>, bool)> {
    let sampler = Sampler::new(examples.len(), settings.batch_size, settings.seed, !settings.no_shuffle)?;
    let window = settings.grad_accum;
    let epochs = settings.epochs.unwrap_or(1) as usize;
    let total = match settings.steps {
        Some(steps) => steps,
        None => u32::try_from((epochs * sampler.steps_per_epoch()).div_ceil(window)).context("too many steps")?,
    };
    let config = AdamWConfig {
        beta1: settings.betas[0],
        beta2: settings.betas[1],
        eps: settings.eps,
        weight_decay: settings.weight_decay,
        decay_order: DecayOrder::Before,
        ..AdamWConfig::default()
    };
    let mut optimizer = AdamW::new(config, settings.optimizer_bits)?;
    let mut grads = Gradients::new();
    let mut scaling = LossScale::new(model.llama.dtype);
    let mut log = StepLog::create(run.path(), total)?;
    let mut good = snapshot(model)?;
    for step in 0..total {
        if interrupt::requested() {
            return Ok((log.finish(), true));
        }
        let clock = Instant::now();
        // The window's batches; the last one of an epochs-long run may be short.
        let last =
            settings.steps.map_or(epochs * sampler.steps_per_epoch(), |steps| (steps as usize).saturating_mul(window));
        let first = (step as usize).saturating_mul(window);
        let batches: Vec<_> = (first..first.saturating_add(window).min(last))
            .map(|index| {
                let chosen: Vec<&Example> = sampler.batch_indices(index).into_iter().map(|i| &examples[i]).collect();
                collate(&chosen)
            })
            .collect();
        let labelled: usize = batches.iter().map(|batch| batch.unmasked()).sum();
        let tokens: usize = batches.iter().map(|batch| batch.ids.len()).sum();
        ensure!(labelled > 0, "step {}: no token of its examples is labelled", step + 1);

        // Forward and backward; gradients of the mean over all labelled tokens of the window.
        let mut outputs = Vec::new();
        for (i, batch) in batches.iter().enumerate() {
            let key = DropoutKey { seed: settings.seed, step: (first + i) as u32 };
            let scale = scaling.factor() / labelled as f32;
            outputs.push(model.llama.train(packed(batch), scale, Some(key), &mut grads)?);
        }
        // Read now, so that the device is waited for once.
        let nll = outputs.iter().try_fold(0.0, |nll, output| output.sum().map(|sum| nll + sum))?;
        let loss = nll / labelled as f64;
        let grad_norm = grads.global_norm()? / f64::from(scaling.factor());
        let lr = settings.lr * settings.schedule.factor(step, settings.warmup, total);

        if !loss.is_finite() || (!grad_norm.is_finite() && !scaling.is_dynamic()) {
            restore(model, &good)?;
            save(model, run, adapter_config, tokenizer)?;
            bail!(
                "step {}: the loss is {loss} and the gradient norm {grad_norm}; stopped. {} holds the last good \
                 parameters, from before the last update. Try a lower --lr or a longer --warmup",
                step + 1,
                run.path().display()
            );
        }
        // Clip and update; a step whose scaled gradients overflowed is left out.
        if scaling.update(grad_norm.is_finite()) {
            remember(model, &mut good)?;
            let scale = clip_scale(grad_norm, settings.max_grad_norm) / scaling.applied();
            let mut parameters: Vec<Update> = model
                .llama
                .parameters_mut()
                .into_iter()
                .map(|(id, value)| Update { id, decay: value.shape().len() > 1, value })
                .collect();
            optimizer.step(&mut parameters, &grads, lr, scale)?;
            if !is_finite(model)? {
                restore(model, &good)?;
                save(model, run, adapter_config, tokenizer)?;
                bail!(
                    "step {}: the update with learning rate {lr} made parameters infinite; stopped. {} holds those from \
                     before it. Try a lower --lr",
                    step + 1,
                    run.path().display()
                );
            }
        }
        grads.clear();
        let tok_s = tokens as f64 / clock.elapsed().as_secs_f64();
        log.push(StepMetrics { step: step + 1, loss, grad_norm, lr, tokens, tok_s })?;
    }
    Ok((log.finish(), false))
}

/// A copy of every trainable parameter, for when an update turns out to have broken the model.
fn snapshot(model: &Model) -> Result<Vec<Tensor>> {
    let copies = model.llama.parameters().into_iter().map(|(_, _, value)| value.copy(Tag::Adapters));
    Ok(copies.collect::<Result<_, _>>()?)
}

/// Brings a [`snapshot`] up to date, in its own memory.
fn remember(model: &Model, snapshot: &mut [Tensor]) -> Result<()> {
    for (copy, (_, _, value)) in snapshot.iter_mut().zip(model.llama.parameters()) {
        copy.copy_from(0, value)?;
    }
    Ok(())
}

fn restore(model: &mut Model, snapshot: &[Tensor]) -> Result<()> {
    for ((_, value), copy) in model.llama.parameters_mut().into_iter().zip(snapshot) {
        value.copy_from(0, copy)?;
    }
    Ok(())
}

/// Whether every trainable parameter is a number.
fn is_finite(model: &Model) -> Result<bool> {
    for (_, _, value) in model.llama.parameters() {
        if value.as_slice::<f32>()?.iter().any(|x| !x.is_finite()) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Writes what was trained: `adapter/`, or `model/` after full fine-tuning.
fn save(
    model: &Model,
    run: &RunDir,
    adapter_config: &Option<peft::AdapterConfig>,
    tokenizer: Option<&Tokenizer>,
) -> Result<()> {
    match adapter_config {
        Some(config) => peft::write_adapter(&run.join("adapter"), &model.llama.adapter(config.clone()))?,
        None => {
            let dir = run.join("model");
            model.llama.save(&dir, model.stored_dtype()?)?;
            if let Some(tokenizer) = tokenizer {
                tokenizer.save(&dir)?;
            }
        }
    }
    Ok(())
}
