//! The commands that make text: one continuation, or a conversation.

use crate::{
    cli::{AdapterChoice, ChatArgs, GenerateArgs, SamplingArgs},
    commands::{load, print},
    model::Model,
};
use anyhow::{Context, Result, ensure};
use nibble_models::{
    batch::{Request, generate_batch},
    chat::{ChatTemplate, Message},
    generate::{Limits, Sequence},
    sampling::Sampling,
    stream::TextStream,
    tokenizer::Tokenizer,
};
use serde::Deserialize;
use serde_json::json;
use std::{
    io::{BufRead, IsTerminal, Write},
    path::Path,
    time::Instant,
};

/// What writes text: settings and tokenizer of one command.
struct Writer<'a> {
    args: &'a SamplingArgs,
    sampling: Sampling,
    tokenizer: &'a Tokenizer,
    /// Tokens that end a text.
    end: Vec<u32>,
}

impl<'a> Writer<'a> {
    fn new(args: &'a SamplingArgs, sampling: Sampling, model: &Model, tokenizer: &'a Tokenizer) -> Self {
        Writer { args, sampling, tokenizer, end: model.stop_ids(tokenizer) }
    }

    /// Prints what follows `prompt` while it is made, and returns it.
    fn write(&self, model: &Model, sequence: &mut Sequence, prompt: &[u32]) -> Result<String> {
        let mut stream = TextStream::new(self.tokenizer, prompt, &self.args.stop);
        let mut text = String::new();
        let mut show = |new: &str| {
            text.push_str(new);
            if new.is_empty() { Ok(()) } else { print(new) }
        };
        let mut failure = None;
        let limits = Limits { max_new: self.args.max_tokens, stop: &self.end };
        sequence.continue_with(&model.llama, prompt, limits, self.sampling, |token| {
            if self.end.contains(&token) {
                return false;
            }
            let shown = stream.push(token).map_err(Into::into).and_then(|new| show(&new));
            shown.map_err(|error| failure = Some(error)).is_ok() && !stream.stopped()
        })?;
        if let Some(failure) = failure {
            return Err(failure);
        }
        show(&stream.finish())?;
        print("\n")?;
        Ok(text)
    }
}

fn template(tokenizer: &Tokenizer, hint: &str) -> Result<ChatTemplate> {
    tokenizer.chat()?.with_context(|| format!("this model has no chat template; {hint}"))
}

/// Continues a prompt, with each of the adapters.
pub fn generate_command(args: &GenerateArgs) -> Result<()> {
    let sampling = args.sampling.sampling()?;
    let mut model = load(&args.model)?;
    let tokenizer = model.needs_tokenizer()?;
    if let Some(path) = &args.prompts {
        return generate_all(args, path, &model, &tokenizer, sampling);
    }
    let prompt = encode(&tokenizer, &args.prompt, args.chat)?;
    let writer = Writer::new(&args.sampling, sampling, &model, &tokenizer);
    for adapter in choices(&args.model.adapter) {
        model.llama.switch_adapter(adapter.key())?;
        if args.model.adapter.len() > 1 {
            print(&format!("== {}\n", adapter.name))?;
        }
        if !args.chat {
            print(&args.prompt)?;
        }
        let mut sequence = Sequence::with_capacity(&model.llama, prompt.len() + args.sampling.max_tokens)?;
        writer.write(&model, &mut sequence, &prompt)?;
    }
    Ok(())
}

fn encode(tokenizer: &Tokenizer, prompt: &str, chat: bool) -> Result<Vec<u32>> {
    if !chat {
        return Ok(tokenizer.encode(prompt, true)?);
    }
    let text = template(tokenizer, "leave --chat out")?.render(&[Message::new("user", prompt)], true)?;
    // The template writes the special tokens itself.
    Ok(tokenizer.encode(&text, false)?)
}

/// A line of a file of prompts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Prompt {
    prompt: String,
    /// The first of the command line's if it is missing; "none" is the base.
    adapter: Option<String>,
}

/// Continues all prompts of a file in one batch.
fn generate_all(
    args: &GenerateArgs,
    path: &Path,
    model: &Model,
    tokenizer: &Tokenizer,
    sampling: Sampling,
) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let given = choices(&args.model.adapter);
    let first = given.first().map_or(AdapterChoice::NONE, |choice| &choice.name);
    let (mut prompts, mut requests) = (Vec::new(), Vec::new());
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = || format!("{}, line {}", path.display(), number + 1);
        let Prompt { prompt, adapter } = serde_json::from_str(line).with_context(at)?;
        let name = adapter.unwrap_or_else(|| first.to_string());
        let known = name == AdapterChoice::NONE || given.iter().any(|choice| choice.name == name);
        ensure!(known, "{}: no --adapter is named \"{name}\"", at());
        let tokens = encode(tokenizer, &prompt, args.chat).with_context(at)?;
        let limit = model.llama.config.max_position_embeddings;
        ensure!(
            tokens.len() + args.sampling.max_tokens <= limit,
            "{}: {} tokens and --max-tokens are more than the {limit} that the model reads",
            at(),
            tokens.len()
        );
        let adapter = (name != AdapterChoice::NONE).then(|| name.clone());
        requests.push(Request { prompt: tokens, adapter });
        prompts.push((prompt, name));
    }
    ensure!(!requests.is_empty(), "{} holds no prompt", path.display());
    let end = model.stop_ids(tokenizer);
    let mut streams: Vec<(TextStream, String)> = requests
        .iter()
        .map(|request| (TextStream::new(tokenizer, &request.prompt, &args.sampling.stop), String::new()))
        .collect();
    let mut failure = None;
    generate_batch(&model.llama, &requests, args.sampling.max_tokens, &end, sampling, |row, token| {
        let (stream, text) = &mut streams[row];
        if end.contains(&token) || failure.is_some() {
            return false;
        }
        match stream.push(token) {
            Ok(new) => text.push_str(&new),
            Err(error) => failure = Some(error),
        }
        failure.is_none() && !stream.stopped()
    })?;
    if let Some(failure) = failure {
        return Err(failure.into());
    }
    for ((prompt, adapter), (stream, mut text)) in prompts.iter().zip(streams) {
        text.push_str(&stream.finish());
        print(&format!("{}\n", json!({"prompt": prompt, "adapter": adapter, "text": text})))?;
    }
    Ok(())
}

/// The adapters that were given; the base if none was.
pub fn choices(given: &[AdapterChoice]) -> Vec<AdapterChoice> {
    match given {
        [] => vec![AdapterChoice { name: AdapterChoice::NONE.into(), dir: None }],
        given => given.to_vec(),
    }
}

/// Talks with a model until the input ends. Answers are all that goes to standard output.
pub fn chat_command(args: &ChatArgs) -> Result<()> {
    let sampling = args.sampling.sampling()?;
    let mut model = load(&args.model)?;
    let tokenizer = model.needs_tokenizer()?;
    let template = template(&tokenizer, "use generate")?;
    let writer = Writer::new(&args.sampling, sampling, &model, &tokenizer);
    let mut conversation = Conversation::new(&model, args.system.as_deref(), template)?;
    let prompts = std::io::stdin().is_terminal();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if prompts {
            eprint!("> ");
            std::io::stderr().flush().context("writing to standard error")?;
        }
        let Some(line) = lines.next() else { return Ok(()) };
        let line = line.context("reading standard input")?;
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (None, _) => {}
            (Some("/quit"), None) => return Ok(()),
            (Some("/reset"), None) => conversation.reset(),
            (Some("/adapter"), name) => switch(&mut model, &mut conversation, name)?,
            (Some(word), _) if word.starts_with('/') => {
                eprintln!("{word} is no command here; there are /reset, /adapter NAME and /quit");
            }
            _ => conversation.turn(&line, &writer, &model)?,
        }
    }
}

/// Puts another adapter on the model, or says which there are. The conversation goes on.
fn switch(model: &mut Model, conversation: &mut Conversation, name: Option<&str>) -> Result<()> {
    let Some(name) = name else {
        let adapters = &model.llama.adapters;
        let active = adapters.active().unwrap_or(AdapterChoice::NONE);
        let names = [&[AdapterChoice::NONE], &adapters.names()[..]].concat();
        eprintln!("adapters: {} (in use: {active})", names.join(", "));
        return Ok(());
    };
    let start = Instant::now();
    if let Err(error) = model.llama.switch_adapter((name != AdapterChoice::NONE).then_some(name)) {
        eprintln!("{error}");
        return Ok(());
    }
    crate::note!("adapter  {name}, switched in {:.3} ms", start.elapsed().as_secs_f64() * 1e3);
    // Keys and values are those of the adapter before.
    conversation.sequence = Sequence::new(&model.llama)?;
    Ok(())
}

struct Conversation {
    template: ChatTemplate,
    messages: Vec<Message>,
    /// Messages that /reset keeps: the system's.
    first: usize,
    sequence: Sequence,
}

impl Conversation {
    fn new(model: &Model, system: Option<&str>, template: ChatTemplate) -> Result<Self> {
        let messages: Vec<Message> = system.map(|text| Message::new("system", text)).into_iter().collect();
        Ok(Conversation { template, first: messages.len(), messages, sequence: Sequence::new(&model.llama)? })
    }

    fn reset(&mut self) {
        self.messages.truncate(self.first);
    }

    /// A message and its answer. One that does not fit the model is not kept.
    fn turn(&mut self, message: &str, writer: &Writer, model: &Model) -> Result<()> {
        self.messages.push(Message::new("user", message));
        match self.answer(writer, model)? {
            Some(answer) => self.messages.push(Message::new("assistant", answer)),
            None => drop(self.messages.pop()),
        }
        Ok(())
    }

    fn answer(&mut self, writer: &Writer, model: &Model) -> Result<Option<String>> {
        let prompt = writer.tokenizer.encode(&self.template.render(&self.messages, true)?, false)?;
        let (needed, limit) = (prompt.len() + writer.args.max_tokens, model.llama.config.max_position_embeddings);
        if needed > limit {
            let tokens = prompt.len();
            eprintln!(
                "the conversation has {tokens} tokens and the model reads {limit}, --max-tokens for the answer included; \
                 /reset starts anew"
            );
            ensure!(self.messages.len() > self.first + 1, "the first message is too long for this model");
            return Ok(None);
        }
        writer.write(model, &mut self.sequence, &prompt).map(Some)
    }
}
