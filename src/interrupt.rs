//! Ctrl-C: the first asks the work to stop at the next safe point, the second ends the program.

use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Exit code of a run that the user stopped, as shells use it for SIGINT.
pub const EXIT_CODE: i32 = 130;

/// Listens for SIGINT and SIGTERM from now on.
pub fn listen() -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(EXIT_CODE);
        }
        eprintln!("\nstopping after this step; press Ctrl-C again to stop at once");
    })
}

/// Whether the user has asked to stop.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
