//! Writes the default model's text, task, tokenizer and random start; `train-llama --method full` then trains the base.

use std::path::PathBuf;

use clap::Parser;

/// Generates the files of assets/default that are not trained, and what training the base model needs
#[derive(Parser)]
struct Arguments {
    /// Where the tokenizer, config.json, train.jsonl and eval.jsonl go
    #[arg(long, default_value = "assets/default")]
    assets: PathBuf,
    /// Where pretrain.jsonl and the untrained model folder init/ go
    #[arg(long, default_value = "target/default-base")]
    work: PathBuf,
    /// Every random choice follows from it
    #[arg(long, default_value_t = nibble::default_task::SEED)]
    seed: u64,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    nibble::default_task::write(&arguments.assets, &arguments.work, arguments.seed)?;
    println!("wrote {} and {}", arguments.assets.display(), arguments.work.display());
    Ok(())
}
