//! The commands besides training.

use crate::{
    bench_step,
    cli::{Cli, Command, DTypeChoice, EmbeddingBits, EvalArgs, GenerateArgs, LogitsArgs, QuantChoice, QuantizeArgs},
    data, default_task,
    eval::{self, EvalResult},
    interrupt,
    model::{Model, ModelSource},
    report,
    run_dir::RunDir,
    settings::{Settings, TrainArgs},
    train,
};
use anyhow::{Context, Result, bail, ensure};
use nibble_kernels::quantize::QuantType;
use nibble_models::{
    chat::Message,
    files::{inspect, safetensors::write_safetensors},
    generate::{Sampling, generate},
    tokenizer::Tokenizer,
};
use nibble_runtime::DeviceRequest;
use std::{io::Write, path::Path};

/// More than any model is trained for; a larger number would only ask for the memory of its KV cache.
const MAX_NEW_TOKENS: usize = 1 << 20;

/// Runs what the command line asks for; the exit code of the program.
pub fn run(cli: Cli) -> Result<i32> {
    match cli.command {
        None => train_command(&cli.train),
        Some(Command::Train(args)) => train_command(&args),
        Some(Command::Generate(args)) => generate_command(&args).map(|()| 0),
        Some(Command::Eval(args)) => eval_command(&args),
        Some(Command::Logits(args)) => logits_command(&args).map(|()| 0),
        Some(Command::Quantize(args)) => quantize_command(&args).map(|()| 0),
        Some(Command::BenchStep(args)) => bench_step::run(&args).map(|()| 0),
        Some(Command::Inspect { path }) => inspect_command(&path).map(|()| 0),
    }
}

fn train_command(args: &TrainArgs) -> Result<i32> {
    let outcome = match &args.resume {
        None => {
            let settings = Settings::resolve(args, default_task::RECIPE)?;
            interrupt::listen().context("listening for Ctrl-C")?;
            train::train(&settings)?
        }
        Some(path) => {
            let run = RunDir::open(path.as_deref())?;
            let settings = Settings::resume(args, &run.settings())?;
            if let Some(steps) = run.finished() {
                eprintln!("{} is finished, after {steps} steps; there is nothing to continue", run.path().display());
                return Ok(0);
            }
            interrupt::listen().context("listening for Ctrl-C")?;
            train::resume(&settings, run)?
        }
    };
    Ok(if outcome.interrupted { interrupt::EXIT_CODE } else { 0 })
}

fn load(args: &crate::cli::ModelArgs) -> Result<Model> {
    let mut model = Model::load(&ModelSource::from(args))?;
    if let Some(dir) = &args.adapter {
        model.attach(dir)?;
    }
    Ok(model)
}

fn generate_command(args: &GenerateArgs) -> Result<()> {
    ensure!(args.temperature >= 0.0, "--temperature must not be negative");
    ensure!(args.top_p > 0.0 && args.top_p <= 1.0, "--top-p must be above 0 and at most 1");
    ensure!(args.max_new_tokens <= MAX_NEW_TOKENS, "--max-new-tokens must be at most {MAX_NEW_TOKENS}");
    let model = load(&args.model)?;
    let tokenizer = model.needs_tokenizer()?;
    let prompt = if args.chat {
        let template = tokenizer.chat()?.context("this model has no chat template; leave --chat out")?;
        // The template writes the special tokens itself.
        let text = template.render(&[Message::new("user", &args.prompt)], true)?;
        tokenizer.encode(&text, false)?
    } else {
        tokenizer.encode(&args.prompt, true)?
    };
    let stop = model.stop_ids(&tokenizer);
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let mut printed = Streaming::new(&tokenizer);
    if !args.chat {
        print(&args.prompt)?;
    }
    let mut failure = None;
    generate(&model.llama, &prompt, args.max_new_tokens, &stop, sampling, |token| {
        let result = if stop.contains(&token) { Ok(()) } else { printed.push(token) };
        result.map_err(|error| failure = Some(error)).is_ok()
    })?;
    print("\n")?;
    failure.map_or(Ok(()), Err)
}

/// Text that appears as its tokens come. A character may take several tokens, so only what can no longer change is shown.
struct Streaming<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    shown: usize,
}

impl<'a> Streaming<'a> {
    fn new(tokenizer: &'a Tokenizer) -> Self {
        Streaming { tokenizer, ids: Vec::new(), shown: 0 }
    }

    fn push(&mut self, token: u32) -> Result<()> {
        self.ids.push(token);
        let text = self.tokenizer.decode(&self.ids, true)?;
        let complete = text.trim_end_matches('\u{FFFD}');
        if let Some(new) = complete.get(self.shown..) {
            print(new)?;
            self.shown = complete.len();
        }
        Ok(())
    }
}

fn eval_command(args: &EvalArgs) -> Result<i32> {
    interrupt::listen().context("listening for Ctrl-C")?;
    let model = load(&args.model)?;
    let tokenizer = model.tokenizer()?;
    let options = data::DataOptions { seq_len: args.seq_len, vocab_size: model.llama.config.vocab_size };
    let examples = data::load_examples(&args.data, tokenizer.as_ref(), &options)?;
    let Some(result) = eval::evaluate(&model, &examples)? else { return Ok(interrupt::EXIT_CODE) };
    let EvalResult { examples, tokens, nll, perplexity, exact_match } = result;
    print(&match args.json {
        true => serde_json::to_string(&result)? + "\n",
        false => format!(
            "examples     {examples}\ntokens       {tokens}\nmean NLL     {nll:.6}\nperplexity   {perplexity:.4}\n\
             exact match  {:.2} %\n",
            100.0 * exact_match
        ),
    })?;
    eprintln!("{}", report::memory_line(model.llama.device()));
    Ok(0)
}

fn logits_command(args: &LogitsArgs) -> Result<()> {
    let model = load(&args.model)?;
    let vocab = model.llama.config.vocab_size;
    if let Some(bad) = args.ids.iter().find(|&&id| id as usize >= vocab) {
        bail!("id {bad} is outside of the model's vocabulary of {vocab}");
    }
    let ids: Vec<i32> = args.ids.iter().map(|&id| id as i32).collect();
    let logits = model.llama.logits(&ids, &[ids.len()])?.reshape(&[1, ids.len(), vocab])?;
    write_safetensors(&args.out, &[("logits".to_string(), logits)], &[])?;
    eprintln!("wrote logits [1, {}, {vocab}] f32 to {}", ids.len(), args.out.display());
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
    eprintln!("wrote {}", args.out.display());
    Ok(())
}

fn inspect_command(path: &Path) -> Result<()> {
    // What is neither a folder nor a file of tensors is read as data, by the rule that training reads it by.
    let tensors = path.extension().is_some_and(|extension| extension == "gguf" || extension == "safetensors");
    print(&if path.is_file() && !tensors { data::describe(path)? } else { inspect::describe(path)? })
}

/// Writes to standard output, where a reader that has gone away is an error and no panic.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("writing to standard output")
}
