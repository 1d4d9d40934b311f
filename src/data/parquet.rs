//! Rows of Parquet files. The crate that decodes them panics on some damaged files; here these are errors too.

use parquet::{
    errors::ParquetError,
    file::{reader::FileReader, serialized_reader::SerializedFileReader},
    record::reader::RowIter,
};
use serde_json::{Map, Value};
use std::{
    cell::Cell,
    fs::File,
    panic::{self, AssertUnwindSafe},
    sync::Once,
};

/// The rows of a file, from the first to the last.
pub struct ParquetRows {
    rows: RowIter<'static>,
    /// Rows read.
    pub row: usize,
    /// Bytes of the file for each row, on average.
    pub bytes_a_row: f64,
}

impl ParquetRows {
    /// The rows of `file`, which has `bytes` bytes.
    ///
    /// # Errors
    /// It is not a Parquet file, or a damaged one.
    pub fn open(file: File, bytes: u64) -> Result<Self, String> {
        guarded(|| {
            let reader = SerializedFileReader::new(file)?;
            let count = reader.metadata().file_metadata().num_rows().max(1);
            let rows = RowIter::from_file_into(Box::new(reader));
            Ok(ParquetRows { rows, row: 0, bytes_a_row: bytes as f64 / count as f64 })
        })
    }

    /// The next row: its columns' names and values.
    ///
    /// # Errors
    /// The file is damaged there.
    pub fn next_row(&mut self) -> Result<Option<Map<String, Value>>, String> {
        self.row += 1;
        let found = guarded(|| Ok(self.rows.next().transpose()?.map(|found| found.to_json_value())));
        Ok(match found.map_err(|what| format!("row {}: {what}", self.row))? {
            Some(Value::Object(fields)) => Some(fields),
            _ => None,
        })
    }
}

thread_local! {
    /// Whether a panic of this thread is about to be caught.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// What `work` returns; a panic of it is an error, about which nothing is printed.
fn guarded<T>(work: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !CAUGHT.get() {
                usual(panic);
            }
        }));
    });
    CAUGHT.set(true);
    // A reader that panicked is not used again.
    let done = panic::catch_unwind(AssertUnwindSafe(work));
    CAUGHT.set(false);
    match done {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("not Parquet, or damaged".to_owned()),
    }
}
