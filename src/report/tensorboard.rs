//! Event files for TensorBoard: records of a length, its checksum, an `Event` message of protocol buffers, its checksum.

use super::StepMetrics;
use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
    time::SystemTime,
};

/// Folder of the event file in a run's folder.
pub const FOLDER: &str = "tensorboard";
/// TensorBoard reads files whose names contain `tfevents`.
const FILE: &str = "events.out.tfevents.0.nibble";

/// An event file that grows with the run.
pub struct Events(File);

impl Events {
    /// Writes the file of the run in `dir` anew, with the steps so far.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(dir: &Path, steps: &[StepMetrics]) -> io::Result<Self> {
        let folder = dir.join(FOLDER);
        fs::create_dir_all(&folder)?;
        let mut events = Events(File::create(folder.join(FILE))?);
        let mut version = Message::default();
        version.double(1, seconds());
        version.bytes(3, b"brain.Event:2");
        events.0.write_all(&record(&version.0))?;
        let so_far: Vec<u8> = steps.iter().flat_map(|step| record(&event(step, seconds()))).collect();
        events.0.write_all(&so_far)?;
        Ok(events)
    }

    /// Adds a step.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn push(&mut self, step: &StepMetrics) -> io::Result<()> {
        self.0.write_all(&record(&event(step, seconds())))
    }
}

fn seconds() -> f64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |since| since.as_secs_f64())
}

/// The message `Event` of a step.
fn event(step: &StepMetrics, time: f64) -> Vec<u8> {
    let scalars = [
        ("train/loss", Some(step.loss)),
        ("train/grad_norm", Some(step.grad_norm)),
        ("train/lr", Some(step.lr)),
        ("train/tokens_per_second", Some(step.tok_s)),
        ("eval/nll", step.eval_nll),
        ("eval/perplexity", step.eval_perplexity),
        ("eval/exact_match", step.eval_exact_match),
        ("eval/choice_accuracy", step.eval_choice_accuracy),
    ];
    let mut summary = Message::default();
    for (tag, value) in scalars.into_iter().filter_map(|(tag, value)| Some((tag, value?))) {
        let mut scalar = Message::default();
        scalar.bytes(1, tag.as_bytes());
        scalar.float(2, value as f32);
        summary.bytes(1, &scalar.0);
    }
    let mut event = Message::default();
    event.double(1, time);
    event.varint(2, u64::from(step.step));
    event.bytes(5, &summary.0);
    event.0
}

/// A message of protocol buffers: fields with their numbers.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.number(field << 3);
        self.number(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.number(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.number(field << 3 | 2);
        self.number(value.len() as u64);
        self.0.extend(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.number(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
    }
}

fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let sums = [&length[..], message].map(|bytes| masked(crc32c(bytes)).to_le_bytes());
    [&length[..], &sums[0], message, &sums[1]].concat()
}

/// As record files hold checksums, so that one of data that holds checksums is still a good one.
fn masked(sum: u32) -> u32 {
    sum.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The Castagnoli checksum (RFC 3720, appendix B.4), bit by bit: a step is a few hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    let next = |sum: u32, &byte: &u8| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| (sum >> 1) ^ if sum & 1 == 1 { 0x82f6_3b78 } else { 0 })
    };
    !bytes.iter().fold(!0, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_the_standards() {
        // RFC 3720, B.4: 32 bytes of zeros, 32 of ones, 32 that count up.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&std::array::from_fn::<u8, 32, _>(|i| i as u8)), 0x46dd_794e);
    }

    /// What TensorBoard 2.21 wrote for the same event (`EventFileWriter`), time 1.5.
    #[test]
    fn records_are_those_of_tensorboard() {
        let step = StepMetrics {
            step: 300,
            loss: 0.25,
            grad_norm: f64::INFINITY,
            lr: 1e-4,
            tokens: 8,
            tok_s: 1000.5,
            eval_nll: Some(2.0),
            eval_perplexity: None,
            eval_exact_match: None,
            eval_choice_accuracy: None,
        };
        let found: String = record(&event(&step, 1.5)).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, include_str!("../../tests/golden/tensorboard.hex").trim());
    }
}
