//! What timing steps came to, for people and for programs.

use crate::{paging::PageFigures, report, settings::as_text};
use nibble_models::llama::Activations;
use nibble_runtime::memory::Usage;
use serde::Serialize;
use std::fmt;

/// What `--json` prints: bytes and seconds, and null for what there is not.
#[derive(Serialize)]
pub struct Outcome {
    pub model: String,
    /// The GPU's name, or cpu.
    pub device: String,
    /// Which kernels the GPU got: native or sm_80.
    pub target: Option<String>,
    #[serde(flatten)]
    pub steps: Steps,
    /// Of the steps, by tag.
    #[serde(serialize_with = "report::peaks")]
    pub peak: Usage,
    /// Of the whole process up to the last step, in host memory.
    pub host_peak: Option<usize>,
    /// In use on the whole GPU at the end.
    pub driver: Option<usize>,
    pub pages: Option<PageFigures>,
    pub decoding: Option<Decoding>,
    pub rows: Option<Rows>,
}

/// The timed steps; as text, what they were and how fast.
#[derive(Serialize)]
pub struct Steps {
    /// Sequences,
    pub batch_size: usize,
    /// and tokens of the longest.
    pub seq_len: usize,
    #[serde(with = "as_text")]
    pub activations: Activations,
    pub feed_forward_rows: Option<usize>,
    pub dequantized_layers: usize,
    /// Of a step, the median.
    pub seconds: f64,
    pub tok_s: f64,
    pub model_tflop_s: f64,
    /// Of the last one, as its gradient norm.
    pub loss: f64,
    pub grad_norm: f64,
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.feed_forward_rows.map_or(String::new(), |rows| format!(", {rows} feed-forward rows at a time"));
        let dense = match self.dequantized_layers {
            0 => String::new(),
            layers => format!(", {layers} layers dequantized"),
        };
        writeln!(f, "{} x {} tokens, kept: {}{rows}{dense}", self.batch_size, self.seq_len, self.activations)?;
        let Steps { seconds, tok_s, model_tflop_s, .. } = self;
        write!(f, "median {seconds:.4} s  {tok_s:.0} tok/s  {model_tflop_s:.1} model TFLOP/s")
    }
}

/// Generation of `tokens` tokens, one by one.
#[derive(Serialize)]
pub struct Decoding {
    /// Tokens of the prompt,
    pub prompt: usize,
    /// and the time until the first token after it.
    pub prompt_seconds: f64,
    pub tokens: usize,
    pub tok_s: f64,
}

impl fmt::Display for Decoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Decoding { prompt, prompt_seconds, tok_s, .. } = self;
        write!(f, "decoding: {tok_s:.1} tok/s after a prompt of {prompt} in {prompt_seconds:.4} s")
    }
}

/// Generation of a batch, `tokens` tokens a row; tokens a second are those of all rows.
#[derive(Serialize)]
pub struct Rows {
    pub rows: usize,
    pub tokens: usize,
    /// All rows with one adapter,
    pub one_adapter_tok_s: f64,
    /// and each with its own.
    pub own_adapters_tok_s: f64,
    /// The longest that switching took.
    pub switch_seconds: f64,
}

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rows { rows, one_adapter_tok_s: one, own_adapters_tok_s: own, switch_seconds, .. } = self;
        write!(
            f,
            "{rows} rows: {one:.1} tok/s with one adapter, {own:.1} tok/s with {rows} ({:.2} of it); switching takes at most \
             {:.4} ms",
            own / one,
            1e3 * switch_seconds
        )
    }
}
