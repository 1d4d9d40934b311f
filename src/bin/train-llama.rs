//! The command-line program: parse, run, print.
//!
//! Exit codes: 0, 1 for every mistake and failure, and 130 for a run that the user stopped.

use clap::Parser;

fn main() {
    let cli = nibble::cli::Cli::try_parse().unwrap_or_else(|message| {
        // Help and the version are messages too, those for standard output.
        let code = i32::from(message.use_stderr());
        let printed = message.print();
        std::process::exit(if printed.is_ok() { code } else { 1 });
    });
    let code = match nibble::commands::run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            1
        }
    };
    std::process::exit(code);
}
