//! A training run, in the order in which data walks through it.

pub use crate::adapt::attach;
use crate::{
    adapt,
    best::{Best, Evaluations},
    checkpoint::{Checkpoint, Origin, Saver, State},
    cli::DTypeChoice,
    data::{DataSpec, Examples},
    deal::Deal,
    default_task,
    eval::{Answer, EvalResult, answers, evaluate},
    hub, input, interrupt,
    loss_scale::LossScale,
    model::{Model, ModelSource},
    page_trace, plan, profile,
    report::{
        self, StepLog, StepMetrics, curves,
        html::{self, Samples},
    },
    run_dir::RunDir,
    settings::{Method, Settings},
    step::{Step, Stepper},
};
use anyhow::{Context, Result, anyhow, ensure};
use nibble_models::{
    files::{
        atomic::{atomic_folder, atomic_write, read_text, write_json},
        peft,
    },
    tokenizer::Tokenizer,
};
use serde::Serialize;
use std::{
    path::{Path, PathBuf},
    time::Instant,
};

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
    run(settings, RunDir::plan(settings)?, None, true)
}

/// Continues a run from its last whole checkpoint, or from the beginning if it has none.
pub fn resume(settings: &Settings, dir: RunDir) -> Result<Outcome> {
    let checkpoint = Checkpoint::latest(&dir)?;
    let path = dir.path().display();
    match &checkpoint {
        Some(Checkpoint { state, .. }) => {
            settings.refuse_changes(&state.settings)?;
            crate::note!("resume   {path} from the checkpoint of step {}", state.step);
        }
        None => crate::note!("resume   {path} from the beginning: it has no whole checkpoint"),
    }
    run(settings, dir, checkpoint, false)
}

fn run(settings: &Settings, dir: RunDir, checkpoint: Option<Checkpoint>, new: bool) -> Result<Outcome> {
    let started = Instant::now();
    // A continued run computes in the type that it began in, whatever the device's usual one is.
    let dtype = checkpoint.as_ref().map_or(settings.dtype, |checkpoint| checkpoint.state.dtype);
    let budget = plan::budget(settings)?;
    // What is missing is found missing before a model is loaded.
    let data = Settings {
        data: settings.data.as_ref().map(|data| hub::data(data, false)).transpose()?,
        eval_data: settings.eval_data.as_ref().map(|data| hub::data(data, true)).transpose()?,
        ..settings.clone()
    };
    let mut model = Model::load(&ModelSource { dtype, ..source(settings) })?;
    profile::check(settings.profile.as_deref(), model.llama.device())?;
    let digest = model.digest()?;
    let mut adapter_config = attach(&mut model, settings)?;
    let tokenizer = model.tokenizer()?;
    let stopped = |before| {
        crate::note!("stopped before the first step; nothing was written");
        Ok(Outcome { dir: dir.path().to_path_buf(), interrupted: true, before, after: None })
    };
    let Some((examples, held_out)) = load_data(&model, tokenizer.as_ref(), &data)? else { return stopped(None) };
    let longest = match settings.pack {
        true => settings.seq_len,
        false => examples.lengths()?.iter().copied().max().unwrap_or(0) as usize,
    };
    let planned = plan::within(budget, &Settings { dtype, ..settings.clone() }, longest)?;
    let settings = &Settings { dtype: settings.dtype, ..planned };
    adapt::keep(&mut model, settings)?;
    let origin = Origin {
        model: digest,
        adapter: adapter_config.as_ref().map_or(String::new(), |config| config.to_json().to_string()),
        data: examples.known().digest.clone(),
        eval_data: held_out.known().digest.clone(),
    };
    let base = adapt::changes_base(&model, settings).then(|| dir.join("base"));
    if let (Some(base), Some(config)) = (&base, &mut adapter_config) {
        config.base_model_name_or_path = Some(base.display().to_string());
    }
    let deal = Deal::new(&examples, &data)?;
    let setup = Setup { settings, dir: dir.clone(), new, adapter_config, tokenizer, deal, held_out };
    let Setup { tokenizer, held_out, .. } = &setup;

    let mut samples = Samples::default();
    let before = match &checkpoint {
        Some(Checkpoint { state, .. }) => {
            origin.refuse_other(&state.origin)?;
            // Only for the report: a run without them goes on.
            let read = read_text(&dir.join(SAMPLES)).ok().and_then(|text| serde_json::from_str(&text).ok());
            samples = read.unwrap_or_default();
            state.before
        }
        None => evaluate_and_show("before", &model, tokenizer.as_ref(), held_out, &mut samples.before)?,
    };
    if checkpoint.is_none() && interrupt::requested() {
        return stopped(before);
    }
    if new {
        dir.create(settings)?;
        write_json(&dir.join(SAMPLES), &samples)?;
    }
    if let Some(base) = &base {
        adapt::save_base(&model, tokenizer.as_ref(), base)?;
    }
    let Optimized { log, interrupted, evaluations, after } =
        optimize(&mut model, &setup, checkpoint, origin, before, &mut samples.after)?;

    let (seconds, best) = (started.elapsed().as_secs_f64(), evaluations.best());
    let summary = Summary { before, after, best, steps: log.len(), interrupted, seconds };
    write_json(&dir.join("summary.json"), &summary)?;
    write_json(&dir.join(SAMPLES), &samples)?;
    write_report(&model, &setup, &log, &summary, &samples)?;
    crate::note!("{}", report::memory_line(model.llama.device()));
    if let (Some(before), Some(after)) = (before, after) {
        crate::note!("held-out before: {before}\nheld-out after:  {after}");
    }
    if let Some(Best { step, nll }) = best {
        crate::note!("best:            nll {nll:.4} after step {step}, in best/");
    }
    let (how, path) = (if interrupted { "stopped" } else { "finished" }, dir.path().display());
    crate::note!("{how} after {} steps and {seconds:.1} s; results are in {path}", log.len());
    crate::note!(
        "  {}/  metrics.jsonl  report.html  loss.svg  settings.toml  summary.json  tensorboard/",
        setup.trained()
    );
    if base.is_some() {
        crate::note!(
            "  base/  what the adapter is for, instead of the model: --model {path}/base --adapter {path}/adapter"
        );
    }
    if interrupted {
        crate::note!("--resume {path} continues");
    }
    Ok(Outcome { dir: dir.path().to_path_buf(), interrupted, before, after })
}

/// File of the answers before and after.
const SAMPLES: &str = "samples.json";

/// Writes the loss curve and the page about the run.
fn write_report(model: &Model, setup: &Setup, log: &[StepMetrics], summary: &Summary, samples: &Samples) -> Result<()> {
    let Setup { settings, dir, deal, .. } = setup;
    let title = format!("training loss of {}", dir.path().display());
    let picture = curves::draw(&title, "loss (nats a token)", &curves::losses(log))?;
    atomic_write(&dir.join("loss.svg"), |out| out.write_all(picture.as_bytes()))?;
    let tokens: usize = log.iter().map(|step| step.tokens).sum();
    let mut facts = vec![
        ("model", model.name.clone()),
        ("method", settings.method.to_string()),
        ("data", settings.data.as_ref().map_or("the embedded task".into(), |data| data.to_string())),
        ("steps", format!("{} of {}, {tokens} tokens", log.len(), deal.total)),
        ("time", format!("{:.1} s", summary.seconds)),
    ];
    facts.extend(deal.packing(settings).map(|packing| ("packing", packing)));
    facts.extend(summary.best.map(|Best { step, nll }| ("best", format!("nll {nll:.4} after step {step}"))));
    let page = html::report(&html::Report {
        name: dir.path().display().to_string(),
        facts,
        steps: log,
        before: summary.before,
        after: summary.after,
        device: model.llama.device(),
        samples,
        settings: toml::to_string(settings)?,
    })?;
    atomic_write(&dir.join("report.html"), |out| out.write_all(page.as_bytes()))?;
    Ok(())
}

/// What a run works with, besides the model.
struct Setup<'a> {
    settings: &'a Settings,
    dir: RunDir,
    /// Whether the folder is a new one.
    new: bool,
    /// `None` for full fine-tuning.
    adapter_config: Option<peft::AdapterConfig>,
    tokenizer: Option<Tokenizer>,
    deal: Deal<'a>,
    held_out: Examples,
}

impl Setup<'_> {
    /// The folder of what was trained.
    fn trained(&self) -> &'static str {
        if self.settings.method == Method::Full { "model" } else { "adapter" }
    }
}

/// `summary.json`.
#[derive(Serialize)]
struct Summary {
    before: Option<EvalResult>,
    after: Option<EvalResult>,
    /// Of the evaluations while it trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    best: Option<Best>,
    steps: usize,
    interrupted: bool,
    /// Since it began, or was continued.
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

/// The training and the held-out examples; `None` if the user interrupted.
fn load_data(
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    settings: &Settings,
) -> Result<Option<(Examples, Examples)>> {
    let embedded = match settings.data {
        None => Some(default_task::unpack().context("unpacking the embedded task")?),
        Some(_) => None,
    };
    let inside = |name: &str| embedded.as_ref().map(|dir| DataSpec::from(dir.path().join(name)));
    let options = settings.data_options(model.llama.config.vocab_size);
    let train = settings.data.clone().or_else(|| inside(default_task::TRAIN)).context("no data to train on")?;
    let Some(train) = input::read("data", &train, tokenizer, &options)? else { return Ok(None) };
    let held_out = match settings.eval_data.clone().or_else(|| inside(default_task::EVAL)) {
        None => Some(Examples::none()),
        Some(spec) => input::read_held_out(&spec, tokenizer, &options)?,
    };
    Ok(held_out.map(|held_out| (train, held_out)))
}

/// Evaluates on the held-out examples and shows a few answers.
fn evaluate_and_show(
    when: &str,
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    held_out: &Examples,
    shown: &mut Vec<Answer>,
) -> Result<Option<EvalResult>> {
    if held_out.is_empty() {
        return Ok(None);
    }
    let Some(result) = evaluate(model, held_out)? else { return Ok(None) };
    crate::note!("\n{when} training: {result}");
    *shown = tokenizer.map_or(Ok(Vec::new()), |tokenizer| answers(model, tokenizer, held_out, 3))?;
    for answer in shown {
        crate::note!("  prompt   {:?}\n  expected {:?}\n  answer   {:?}", answer.prompt, answer.expected, answer.found);
    }
    crate::note!();
    Ok(Some(result))
}

/// What the optimizer steps came to.
struct Optimized {
    log: Vec<StepMetrics>,
    /// Whether the user stopped them.
    interrupted: bool,
    evaluations: Evaluations,
    /// On the held-out examples, where there are any, after a run that was not stopped.
    after: Option<EvalResult>,
}

/// The optimizer steps, from the first one or from a checkpoint on, and what they made.
fn optimize(
    model: &mut Model,
    setup: &Setup,
    checkpoint: Option<Checkpoint>,
    origin: Origin,
    before: Option<EvalResult>,
    samples: &mut Vec<Answer>,
) -> Result<Optimized> {
    let Setup { settings, dir, deal, .. } = setup;
    if let Some(packing) = deal.packing(settings) {
        crate::note!("packing  {packing}");
    }
    if let Some(checkpoint) = &checkpoint {
        checkpoint.load_parameters(&mut model.llama)?;
    }
    let mut stepper = Stepper::new(&model.llama, settings)?;
    if let Some(checkpoint) = &checkpoint {
        checkpoint.load_optimizer(&model.llama, &mut stepper)?;
    }
    let mut saver = Saver::new(dir, settings, checkpoint.as_ref().map(|checkpoint| checkpoint.state.step));
    let mut state = match checkpoint {
        Some(checkpoint) => checkpoint.state,
        None => State {
            step: 0,
            updates: 0,
            dtype: DTypeChoice(Some(model.llama.dtype)),
            loss_scale: LossScale::new(model.llama.dtype),
            before,
            unreported: None,
            evaluations: Evaluations::default(),
            origin,
            settings: (*settings).clone(),
        },
    };
    let (device, reported) = (model.llama.device(), state.step - u32::from(state.unreported.is_some()));
    let mut log = match setup.new {
        true => StepLog::create(dir.path(), deal.total, device)?,
        false => StepLog::resume(dir.path(), reported, deal.total, device).with_context(|| saver.advice(state.step))?,
    };
    // The log is this process's alone from here on: what is unfinished in the folder is of one that was killed.
    saver.clear()?;

    let interrupted = loop {
        // The step that was made last: evaluated, recorded, saved.
        if let Some(mut metrics) = state.unreported {
            if settings.eval_every.is_some_and(|every| metrics.step.is_multiple_of(every)) {
                sound(&mut stepper, model, setup, metrics.step)?;
                let Some(result) = evaluate(model, &setup.held_out)? else { break true };
                let best = state.evaluations.record(metrics.step, result.nll);
                log.say(&format!("step {}: {result}{}", metrics.step, if best { ", the best so far" } else { "" }));
                if best {
                    keep(model, setup, "best").with_context(|| saver.advice(metrics.step))?;
                }
                metrics.eval_nll = Some(result.nll);
                metrics.eval_perplexity = Some(result.perplexity);
                metrics.eval_exact_match = Some(result.exact_match);
                metrics.eval_choice_accuracy = result.choice.map(|choice| choice.accuracy);
            }
            log.push(metrics).with_context(|| saver.advice(metrics.step))?;
            state.unreported = None;
            if saver.due(metrics.step) {
                sound(&mut stepper, model, setup, metrics.step)?;
                save_state(&mut saver, &mut state, model, &stepper, &log)?;
            }
        }
        if state.step >= deal.total {
            break false;
        }
        if state.evaluations.exhausted(settings.patience) {
            log.say(&format!("step {}: no better evaluation for a while; training ends here", state.step));
            break false;
        }
        if interrupt::requested() {
            break true;
        }
        state.unreported = Some(one_step(model, &mut stepper, state.step, setup)?);
        state.step += 1;
    };
    sound(&mut stepper, model, setup, state.step)?;
    if interrupted {
        save_state(&mut saver, &mut state, model, &stepper, &log)?;
    }
    keep(model, setup, setup.trained()).with_context(|| saver.advice(state.step))?;
    let after = match interrupted {
        true => None,
        false => evaluate_and_show("after", model, setup.tokenizer.as_ref(), &setup.held_out, samples)?,
    };
    let interrupted = interrupted || (after.is_none() && !setup.held_out.is_empty());
    if interrupted {
        save_state(&mut saver, &mut state, model, &stepper, &log)?;
    }
    Ok(Optimized { log: log.finish(), interrupted, evaluations: state.evaluations, after })
}

/// Makes a checkpoint, if any step has been made since the last one.
fn save_state(saver: &mut Saver, state: &mut State, model: &Model, stepper: &Stepper, log: &StepLog) -> Result<()> {
    if state.step == 0 {
        return Ok(());
    }
    let saved = log.sync().and_then(|()| saver.save(state, &model.llama, stepper));
    saved.with_context(|| saver.advice(state.step))
}

/// Makes optimizer step `step`, counted from 0.
fn one_step(model: &mut Model, stepper: &mut Stepper, step: u32, setup: &Setup) -> Result<StepMetrics> {
    let Setup { settings, deal, .. } = setup;
    let clock = Instant::now();
    let batches = deal.batches(step)?;
    let tokens: usize = batches.iter().map(|batch| batch.ids.len()).sum();
    ensure!(
        batches.iter().any(|batch| batch.unmasked() > 0),
        "step {}: no token of its examples is labelled",
        step + 1
    );
    let lr = settings.lr * settings.schedule.factor(step, settings.warmup, deal.total);
    let picture = settings.trace.as_deref().filter(|_| step + 1 == deal.total);
    let profile = settings.profile.as_deref().filter(|_| step + 1 == deal.total);
    page_trace::begin(picture, stepper.paging());
    profile::begin(profile, model.llama.device())?;
    let Step { loss, grad_norm, fault } = stepper.step(&mut model.llama, &batches, deal.first(step) as u32, lr)?;
    if let Some(fault) = fault {
        return Err(broken(model, setup, step + 1, &fault));
    }
    let tok_s = tokens as f64 / clock.elapsed().as_secs_f64();
    page_trace::finish(picture, stepper.paging());
    profile::finish(profile, model.llama.device(), model.llama.dtype)?;
    Ok(StepMetrics {
        step: step + 1,
        loss,
        grad_norm,
        lr,
        tokens,
        tok_s,
        eval_nll: None,
        eval_perplexity: None,
        eval_exact_match: None,
        eval_choice_accuracy: None,
    })
}

/// Fails if the last update has broken the model in a part that was still under way when its step ended.
fn sound(stepper: &mut Stepper, model: &mut Model, setup: &Setup, step: u32) -> Result<()> {
    match stepper.finish(&mut model.llama)? {
        None => Ok(()),
        Some(fault) => Err(broken(model, setup, step, &fault)),
    }
}

/// Saves the last good parameters of a model that a step broke; the error of that step.
fn broken(model: &Model, setup: &Setup, step: u32, fault: &str) -> anyhow::Error {
    if let Err(error) = keep(model, setup, setup.trained()) {
        return error.context(format!("step {step}: {fault}; stopped, and could not save the last good parameters"));
    }
    anyhow!(
        "step {step}: {fault}; stopped. {} holds the last good parameters, from before the last update. Try a lower --lr \
         or a longer --warmup",
        setup.dir.path().display()
    )
}

/// Writes what was trained to the folder `name` of the run, in place of what was there.
fn keep(model: &Model, setup: &Setup, name: &str) -> Result<()> {
    atomic_folder(&setup.dir.join(name), |folder| save(model, setup, folder))
}

/// Writes what was trained to `folder`: an adapter, or a model after full fine-tuning.
fn save(model: &Model, setup: &Setup, folder: &Path) -> Result<()> {
    match &setup.adapter_config {
        Some(config) => {
            peft::write_adapter(folder, &model.llama.adapter(config.clone())?)?;
            if let Some(tokenizer) = setup.tokenizer.as_ref().filter(|_| model.has_own_tokens()) {
                tokenizer.save(folder)?;
            }
        }
        None => {
            model.llama.save(folder, model.stored_dtype()?)?;
            if let Some(tokenizer) = &setup.tokenizer {
                tokenizer.save(folder)?;
            }
        }
    }
    Ok(())
}
