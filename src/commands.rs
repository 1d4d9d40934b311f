//! The commands besides training.

use crate::{
    bench_step,
    cli::{AdapterChoice, Cli, Command, DTypeChoice, EmbeddingBits, EvalArgs, LogitsArgs, QuantChoice, QuantizeArgs},
    compare::compare_command,
    data, default_task,
    eval::{self, EvalResult},
    export, hub, input, interrupt,
    model::{Model, ModelSource},
    plan, report,
    run_dir::RunDir,
    settings::{Settings, TrainArgs},
    show, text, train,
};
use anyhow::{Context, Result, bail, ensure};
use clap::CommandFactory;
use nibble_kernels::{cuda::set_target, quantize::QuantType};
use nibble_models::files::{atomic::read_json_object, inspect, safetensors::write_safetensors};
use nibble_runtime::DeviceRequest;
use std::{io::Write, path::Path};

/// Runs what the command line asks for; the exit code of the program.
pub fn run(cli: Cli) -> Result<i32> {
    if cli.quiet {
        report::be_quiet();
    }
    set_target(cli.target);
    match cli.command {
        None => train_command(&cli.train),
        Some(Command::Train(args)) => train_command(&args),
        Some(Command::Generate(args)) => text::generate_command(&args).map(|()| 0),
        Some(Command::Chat(args)) => text::chat_command(&args).map(|()| 0),
        Some(Command::Eval(args)) => eval_command(&args),
        Some(Command::Logits(args)) => logits_command(&args).map(|()| 0),
        Some(Command::Quantize(args)) => quantize_command(&args).map(|()| 0),
        Some(Command::Merge(args)) => export::merge_command(&args).map(|()| 0),
        Some(Command::ExportGguf(args)) => export::export_gguf_command(&args).map(|()| 0),
        Some(Command::Plan(args)) => plan::plan_command(&args).map(|()| 0),
        Some(Command::BenchStep(args)) => bench_step::run(&args).map(|()| 0),
        Some(Command::Completions { shell }) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "train-llama", &mut script);
            print(&String::from_utf8_lossy(&script)).map(|()| 0)
        }
        Some(Command::Compare(args)) => compare_command(&args).map(|()| 0),
        Some(Command::Inspect { path }) => inspect_command(&path).map(|()| 0),
    }
}

fn train_command(args: &TrainArgs) -> Result<i32> {
    let outcome = match &args.resume {
        None => {
            let settings = Settings::resolve(args, default_task::RECIPE)?;
            if let Some(count) = args.show_batch {
                return show::show_batches(&settings, count).map(|()| 0);
            }
            interrupt::listen().context("listening for Ctrl-C")?;
            train::train(&settings)?
        }
        Some(path) => {
            let run = RunDir::open(path.as_deref())?;
            let settings = Settings::resume(args, &run.settings())?;
            if let Some(steps) = run.finished() {
                crate::note!("{} is finished, after {steps} steps; there is nothing to continue", run.path().display());
                return Ok(0);
            }
            interrupt::listen().context("listening for Ctrl-C")?;
            train::resume(&settings, run)?
        }
    };
    if args.json {
        let mut summary = read_json_object(&outcome.dir.join("summary.json")).unwrap_or_default();
        summary.insert("run".into(), outcome.dir.display().to_string().into());
        print(&(serde_json::Value::Object(summary).to_string() + "\n"))?;
    }
    Ok(if outcome.interrupted { interrupt::EXIT_CODE } else { 0 })
}

/// The model with its adapters, of which the first is on the layers.
pub(crate) fn load(args: &crate::cli::ModelArgs) -> Result<Model> {
    let mut model = Model::load(&ModelSource::from(args))?;
    for adapter in &args.adapter {
        if let Some(dir) = &adapter.dir {
            model.add_adapter(&adapter.name, dir)?;
        }
    }
    model.llama.switch_adapter(args.adapter.first().and_then(AdapterChoice::key))?;
    Ok(model)
}

fn eval_command(args: &EvalArgs) -> Result<i32> {
    interrupt::listen().context("listening for Ctrl-C")?;
    let data = hub::data(&args.data, true)?;
    let mut model = load(&args.model)?;
    let tokenizer = model.tokenizer()?;
    let options = args.read.options(args.seq_len, model.llama.config.vocab_size);
    let Some(examples) = input::read_held_out(&data, tokenizer.as_ref(), &options)? else {
        return Ok(interrupt::EXIT_CODE);
    };
    for adapter in text::choices(&args.model.adapter) {
        model.llama.switch_adapter(adapter.key())?;
        let Some(result) = eval::evaluate(&model, &examples)? else { return Ok(interrupt::EXIT_CODE) };
        let several = args.model.adapter.len() > 1;
        print(&evaluation(&result, several.then_some(&adapter.name), args.json)?)?;
    }
    crate::note!("{}", report::memory_line(model.llama.device()));
    Ok(0)
}

/// A result for people or for programs; with the adapter's name where there are several.
fn evaluation(result: &EvalResult, adapter: Option<&String>, json: bool) -> Result<String> {
    if json {
        let mut value = serde_json::to_value(result)?;
        if let Some(name) = adapter {
            value["adapter"] = name.as_str().into();
        }
        return Ok(value.to_string() + "\n");
    }
    let name = adapter.map_or(String::new(), |name| format!("== {name}\n"));
    let EvalResult { examples, tokens, nll, perplexity, exact_match, choice } = result;
    let choice = choice.map_or(String::new(), |choice| {
        let (plain, by_length) = (100.0 * choice.accuracy, 100.0 * choice.accuracy_by_length);
        format!("choice       {plain:.2} % of {} (by length {by_length:.2} %)\n", choice.questions)
    });
    Ok(format!(
        "{name}examples     {examples}\ntokens       {tokens}\nmean NLL     {nll:.6}\n\
         perplexity   {perplexity:.4}\nexact match  {:.2} %\n{choice}",
        100.0 * exact_match
    ))
}

fn logits_command(args: &LogitsArgs) -> Result<()> {
    ensure!(args.model.adapter.len() <= 1, "logits are of one model: give --adapter once");
    let model = load(&args.model)?;
    let vocab = model.llama.config.vocab_size;
    if let Some(bad) = args.ids.iter().find(|&&id| id as usize >= vocab) {
        bail!("id {bad} is outside of the model's vocabulary of {vocab}");
    }
    let ids: Vec<i32> = args.ids.iter().map(|&id| id as i32).collect();
    let logits = model.llama.logits(&ids, &[ids.len()])?.reshape(&[1, ids.len(), vocab])?;
    write_safetensors(&args.out, &[("logits".to_string(), logits)], &[])?;
    crate::note!("wrote logits [1, {}, {vocab}] f32 to {}", ids.len(), args.out.display());
    Ok(())
}

fn quantize_command(args: &QuantizeArgs) -> Result<()> {
    if args.out.join("config.json").exists() || args.out.is_file() {
        bail!("{} already holds a model; choose another --out or move it away", args.out.display());
    }
    let source = ModelSource {
        path: Some(args.model.clone()),
        quant: QuantChoice(Some(args.quant.unwrap_or(QuantType::Nf4))),
        quant_chosen: args.quant.is_some(),
        double_quant: !args.no_double_quant,
        block_size: args.block_size,
        // They are written as they were read.
        embedding_bits: EmbeddingBits::Stored,
        dtype: DTypeChoice(None),
        device: DeviceRequest::Auto,
    };
    let model = Model::load_as_stored(&source)?;
    let tokenizer = model.tokenizer()?;
    model.llama.save(&args.out, model.llama.dtype)?;
    match tokenizer {
        Some(tokenizer) => tokenizer.save(&args.out)?,
        None => eprintln!("warning: {} has no tokenizer.json, so none was written", args.model.display()),
    }
    crate::note!("wrote {}", args.out.display());
    Ok(())
}

fn inspect_command(path: &Path) -> Result<()> {
    // What is neither a folder nor a file of tensors is read as data, by the rule that training reads it by.
    let tensors = path.extension().is_some_and(|extension| extension == "gguf" || extension == "safetensors");
    print(&if path.is_file() && !tensors { data::describe(path)? } else { inspect::describe(path)? })
}

/// Writes to standard output at once, where a reader that has gone away is an error and no panic.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("writing to standard output")
}
