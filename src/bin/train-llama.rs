//! The command-line program: parse, run, print.
//!
//! Exit codes: 0, 1 for every mistake and failure, and 130 for a run that the user stopped.

use clap::Parser;

/// Lets blocks of a megabyte and more go back to the system when they are freed. By itself glibc stops doing so after the
/// first large one, and holds a tenth more memory than a training step has in use.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn give_back_large_blocks() {
    // SAFETY: this sets a parameter of the allocator, which is defined at any time.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_back_large_blocks() {}

fn main() {
    give_back_large_blocks();
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
