//! The command-line program: parse, run, print.

use clap::Parser;

fn main() {
    let code = match nibble::commands::run(nibble::cli::Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            1
        }
    };
    std::process::exit(code);
}
