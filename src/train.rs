//! A training run, in the order in which data walks through it.

use crate::{
    data::{self, Example, Sampler, collate},
    default_task,
    eval::{EvalResult, answers, evaluate},
    interrupt,
    model::{Model, ModelSource},
    page_trace,
    report::{self, StepLog, StepMetrics},
    run_dir::RunDir,
    settings::{Method, Settings},
    step::{Step, Stepper},
};
use anyhow::{Context, Result, anyhow, ensure};
use nibble_models::{
    files::{atomic::write_json, peft},
    llama::LoraConfig,
    tokenizer::Tokenizer,
};
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
    eprintln!("{}", report::memory_line(model.llama.device()));
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

/// The model that a run is to load, and how.
pub fn source(settings: &Settings) -> ModelSource {
    ModelSource {
        path: settings.model.clone(),
        quant: settings.quantization(),
        quant_chosen: settings.quant.is_some(),
        double_quant: !settings.no_double_quant,
        block_size: settings.block_size,
        embedding_bits: settings.embedding_bits,
        dtype: settings.dtype,
        device: settings.device,
    }
}

/// Makes parameters trainable, and says how many.
pub fn attach(model: &mut Model, settings: &Settings) -> Result<Option<peft::AdapterConfig>> {
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
    model.llama.recomputed = settings.recompute.0;
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
    let mut stepper = Stepper::new(&model.llama, settings)?;
    let mut log = StepLog::create(run.path(), total, model.llama.device())?;
    let (mut interrupted, mut done) = (false, 0);
    for step in 0..total {
        if interrupt::requested() {
            interrupted = true;
            break;
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
        let tokens: usize = batches.iter().map(|batch| batch.ids.len()).sum();
        ensure!(
            batches.iter().any(|batch| batch.unmasked() > 0),
            "step {}: no token of its examples is labelled",
            step + 1
        );
        let lr = settings.lr * settings.schedule.factor(step, settings.warmup, total);
        let picture = settings.trace.as_deref().filter(|_| step + 1 == total);
        page_trace::begin(picture, stepper.paging());
        let Step { loss, grad_norm, fault } = stepper.step(&mut model.llama, &batches, first as u32, lr)?;
        if let Some(fault) = fault {
            save(model, run, adapter_config, tokenizer)?;
            return Err(broken(step + 1, &fault, run));
        }
        let tok_s = tokens as f64 / clock.elapsed().as_secs_f64();
        log.push(StepMetrics { step: step + 1, loss, grad_norm, lr, tokens, tok_s })?;
        page_trace::finish(picture, stepper.paging());
        done = step + 1;
    }
    if let Some(fault) = stepper.finish(&mut model.llama)? {
        save(model, run, adapter_config, tokenizer)?;
        return Err(broken(done, &fault, run));
    }
    Ok((log.finish(), interrupted))
}

/// The error of a step that broke the model, whose last good parameters have been saved.
fn broken(step: u32, fault: &str, run: &RunDir) -> anyhow::Error {
    anyhow!(
        "step {step}: {fault}; stopped. {} holds the last good parameters, from before the last update. Try a lower --lr \
         or a longer --warmup",
        run.path().display()
    )
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
