//! Records of a data file, one by one, whatever the file's kind; nothing is held but the record at hand.
//!
//! The name's ending says the kind: `.parquet`, `.csv`, `.tsv`, `.txt`, and JSON otherwise, which is one object a line or
//! one list of objects. Text kinds may be compressed: `.gz`, `.zst`.

use super::error::{DataError, Result};
use super::parquet::ParquetRows;
use serde_json::{Map, Value};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// What a data file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Objects: one a line, or a list of them.
    Json,
    /// Columns under names in the first line.
    Csv {
        delimiter: u8,
    },
    Parquet,
    /// Text without rows.
    Text,
}

impl Kind {
    /// The kind that a path's ending names, if it names one.
    pub fn named(path: &Path) -> Option<Kind> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let plain = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
        match plain.rsplit_once('.')?.1 {
            "jsonl" | "ndjson" | "json" => Some(Kind::Json),
            "csv" => Some(Kind::Csv { delimiter: b',' }),
            "tsv" => Some(Kind::Csv { delimiter: b'\t' }),
            "parquet" => (plain == name).then_some(Kind::Parquet),
            "txt" => Some(Kind::Text),
            _ => None,
        }
    }

    /// The kind of a file that a user names.
    pub fn of(path: &Path) -> Kind {
        Kind::named(path).unwrap_or(Kind::Json)
    }
}

/// Whether the ending of a path's name is that of a data file.
pub fn names_data(path: &Path) -> bool {
    Kind::named(path).is_some()
}

/// One record, as far as reading it in order has to go.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// The text of a JSON object, not parsed yet.
    Json(Vec<u8>),
    Fields(Map<String, Value>),
}

/// The records of a file that has rows: an iterator of (line or, in Parquet, row number from 1; record).
pub struct Records {
    path: PathBuf,
    inner: Inner,
    read: Arc<AtomicU64>,
    /// Whether the file cannot be read on.
    broken: bool,
}

enum Inner {
    Lines { text: Text, line: usize },
    List { text: Text, line: usize },
    Csv { reader: Box<csv::Reader<Text>>, names: Vec<String>, record: csv::StringRecord },
    Parquet(ParquetRows),
}

/// Decompressed text.
pub type Text = Box<dyn BufRead + Send>;

impl Records {
    /// Opens `path`, which must not be plain text.
    ///
    /// # Errors
    /// It cannot be read, or is not of the kind that its name says.
    pub fn open(path: &Path) -> Result<Self> {
        let read = Arc::new(AtomicU64::new(0));
        let inner = match Kind::of(path) {
            Kind::Parquet => {
                let file = File::open(path).map_err(DataError::io(path))?;
                let bytes = file.metadata().map_err(DataError::io(path))?.len();
                Inner::Parquet(ParquetRows::open(file, bytes).map_err(|what| DataError::file(path, what))?)
            }
            Kind::Csv { delimiter } => {
                let text = open_text(path, &read)?;
                let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(text);
                let header = reader.headers().map_err(|error| csv_error(path, &error))?;
                let names = header.iter().map(|name| name.trim_start_matches('\u{feff}').trim().to_owned()).collect();
                Inner::Csv { reader: Box::new(reader), names, record: csv::StringRecord::new() }
            }
            Kind::Json | Kind::Text => {
                let mut text = open_text(path, &read)?;
                let mut line = 1;
                match first_byte(&mut text, &mut line).map_err(DataError::io(path))? {
                    Some(b'[') => {
                        text.consume(1);
                        Inner::List { text, line }
                    }
                    _ => Inner::Lines { text, line: line - 1 },
                }
            }
        };
        Ok(Records { path: path.to_path_buf(), inner, read, broken: false })
    }

    /// Bytes of the file that have been read, for a progress bar.
    pub fn bytes_read(&self) -> u64 {
        match &self.inner {
            Inner::Parquet(rows) => (rows.row as f64 * rows.bytes_a_row) as u64,
            _ => self.read.load(Ordering::Relaxed),
        }
    }
}

/// One more record, or none; the error is of the file as a whole, unless it says that only this record is wrong.
type Next = Result<Option<(usize, Record)>>;

impl Iterator for Records {
    /// A [`DataError::Row`] is followed by the next record; any other error is the last item.
    type Item = Result<(usize, Record)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.broken {
            return None;
        }
        let path = &self.path;
        let found = match &mut self.inner {
            Inner::Lines { text, line } => next_line(path, text, line),
            Inner::List { text, line } => next_in_list(text, line)
                .map(|found| found.map(|(line, bytes)| (line, Record::Json(bytes))))
                .map_err(|what| DataError::file(path, format!("line {line}: {what}"))),
            Inner::Csv { reader, names, record } => next_csv(path, reader, names, record),
            Inner::Parquet(rows) => rows
                .next_row()
                .map(|found| found.map(|fields| (rows.row, Record::Fields(fields))))
                .map_err(|what| DataError::file(path, what)),
        };
        self.broken = matches!(&found, Err(error) if !matches!(error, DataError::Row { .. }));
        found.transpose()
    }
}

fn next_line(path: &Path, text: &mut Text, line: &mut usize) -> Next {
    loop {
        let mut bytes = Vec::new();
        let read = text.read_until(b'\n', &mut bytes);
        let read = read.map_err(|error| DataError::file(path, format!("after line {line}: {error}")))?;
        *line += 1;
        if read == 0 {
            return Ok(None);
        }
        if !bytes.trim_ascii().is_empty() {
            return Ok(Some((*line, Record::Json(bytes))));
        }
    }
}

fn next_csv(path: &Path, reader: &mut csv::Reader<Text>, names: &[String], record: &mut csv::StringRecord) -> Next {
    if !reader.read_record(record).map_err(|error| csv_error(path, &error))? {
        return Ok(None);
    }
    let line = record.position().map_or(0, |position| position.line() as usize);
    let fields = names.iter().zip(record.iter()).map(|(name, value)| (name.clone(), cell(name, value)));
    Ok(Some((line, Record::Fields(fields.collect()))))
}

/// Opens a file as text, decompressing it by the ending of its name; `read` counts the bytes of the file.
pub fn open_text(path: &Path, read: &Arc<AtomicU64>) -> Result<Text> {
    let file = File::open(path).map_err(DataError::io(path))?;
    let file = Counted { file, read: Arc::clone(read) };
    Ok(match path.extension().and_then(|extension| extension.to_str()) {
        Some("gz") => Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(file))),
        Some("zst") => Box::new(BufReader::new(zstd::Decoder::new(file).map_err(DataError::io(path))?)),
        _ => Box::new(BufReader::with_capacity(1 << 18, file)),
    })
}

struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.read.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// A cell of a table of text. What is a list in other kinds of files is JSON in a cell.
fn cell(name: &str, value: &str) -> Value {
    let list = ["messages", "conversations", "input_ids", "labels", "choices"].contains(&name);
    let parsed = (list && value.trim_start().starts_with('[')).then(|| serde_json::from_str(value).ok()).flatten();
    parsed.unwrap_or_else(|| Value::String(value.to_owned()))
}

fn csv_error(path: &Path, error: &csv::Error) -> DataError {
    let line = error.position().map_or(1, |position| position.line() as usize);
    match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => DataError::row(
            path,
            line,
            format!("{len} values under {expected_len} names; quote values that hold a comma"),
        ),
        csv::ErrorKind::Utf8 { err, .. } => DataError::row(path, line, format!("not UTF-8: {err}")),
        _ => DataError::file(path, error.to_string()),
    }
}

/// The first byte that is not white space, not consumed; a byte order mark before it is, and so is white space.
fn first_byte(text: &mut Text, line: &mut usize) -> io::Result<Option<u8>> {
    if text.fill_buf()?.starts_with(b"\xEF\xBB\xBF") {
        text.consume(3);
    }
    loop {
        let Some(&byte) = text.fill_buf()?.first() else { return Ok(None) };
        if !byte.is_ascii_whitespace() {
            return Ok(Some(byte));
        }
        *line += usize::from(byte == b'\n');
        text.consume(1);
    }
}

/// The text of the next item of a JSON list, of which the bracket has been read; the line where it starts.
fn next_in_list(text: &mut Text, line: &mut usize) -> std::result::Result<Option<(usize, Vec<u8>)>, String> {
    let mut item = Vec::new();
    let (mut depth, mut in_string, mut escaped, mut start) = (0usize, false, false, 0);
    loop {
        let buffer = text.fill_buf().map_err(|error| error.to_string())?;
        if buffer.is_empty() {
            return Err("the list is not closed with ]".to_owned());
        }
        let mut used = 0;
        for &byte in buffer {
            used += 1;
            *line += usize::from(byte == b'\n');
            if in_string {
                in_string = escaped || byte != b'"';
                escaped = !escaped && byte == b'\\';
            } else {
                match byte {
                    b'"' => in_string = true,
                    b'{' | b'[' => depth += 1,
                    b'}' if depth > 0 => depth -= 1,
                    b']' if depth > 0 => depth -= 1,
                    b',' | b']' if depth == 0 => {
                        text.consume(if byte == b']' { used - 1 } else { used });
                        let blank = item.is_empty();
                        return match byte {
                            b']' if blank => Ok(None),
                            b',' if blank => Err("a comma without an item before it".to_owned()),
                            _ => Ok(Some((start, item))),
                        };
                    }
                    _ => {}
                }
            }
            if !item.is_empty() || !byte.is_ascii_whitespace() {
                if item.is_empty() {
                    start = *line;
                }
                item.push(byte);
            }
        }
        text.consume(used);
    }
}
