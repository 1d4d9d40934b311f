//! Head and loss on the GPU.

use super::{Output, Wanted};
use crate::{
    cast::cast,
    cuda::{entry, hopper, size},
    elementwise::add_assign,
    embedding::cuda::{gather, upload},
    linear::weight_grad,
    table::{Table, input_grad, project},
};
use nibble_runtime::{
    DType, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "cross_entropy",
    ptx: include_str!("../../ptx/cross_entropy.ptx"),
    entries: &[
        Entry { name: "cross_entropy_rows", floats: true, params: ROWS },
        Entry { name: "cross_entropy_scatter", floats: true, params: &[8, 8, 8, 4] },
    ],
};

/// Where a cluster of blocks takes a row (Hopper).
pub(crate) static HOPPER: Module = Module {
    name: "cross_entropy_hopper_sm90a",
    ptx: include_str!("../../ptx/cross_entropy_hopper_sm90a.ptx"),
    entries: &[Entry { name: "cross_entropy_cluster", floats: true, params: ROWS }],
};

const ROWS: &[usize] = &[8, 8, 8, 8, 4, 8, 8, 4, 4];
const OP: &str = "cross-entropy";

/// Blocks of a cluster and their threads, as in the kernel.
const CLUSTER: u32 = 8;
const THREADS: u32 = 512;
/// Rows from this many logits on are a cluster's: of shorter ones the second-level cache holds all that blocks work on.
const LONG: usize = 64 << 10;

/// Logits held at a time, in f32 and as a gradient: 256 rows of 128 Ki tokens, so that a chunk's products cost several
/// times what reading the head once more does.
const CHUNK: usize = 32 << 20;
/// As many times that as there are so many tokens, up to [`MOST_CHUNKS`]: a product of 1,024 rows fills a large GPU, and what
/// a layer's pass takes for these tokens is more.
const TOKENS_PER_CHUNK: usize = 2048;
const MOST_CHUNKS: usize = 4;

/// Rows of a chunk of a batch of `tokens`: whole tiles of a matrix product where there are that many.
pub(super) fn chunk_rows(vocab: usize, tokens: usize) -> usize {
    let logits = CHUNK * (tokens / TOKENS_PER_CHUNK).clamp(1, MOST_CHUNKS);
    let rows = (logits / vocab.max(1)).clamp(1, 8192);
    if rows < 128 { rows } else { rows / 128 * 128 }
}

/// Labelled rows of a batch, on the device.
pub(super) struct Labels {
    /// Tokens to predict, i32 `[R]`.
    pub labels: Tensor,
    /// The rows that they belong to, i32 `[R]`.
    pub rows: Tensor,
}

/// The loss of the `labelled` rows of `hidden` `[T, D]`; labels and shapes were checked.
pub(super) fn head_loss(
    hidden: &Tensor,
    head: &Table,
    labels: &[i32],
    labelled: &[usize],
    scale: f32,
    wanted: Wanted,
) -> Result<Output> {
    let ((count, width), (vocab, _)) = (hidden.dims2(OP)?, head.dims()?);
    let (device, dtype) = (hidden.device(), hidden.dtype());
    size(OP, count)?;
    let numbers = |f: &dyn Fn(usize) -> i32| upload(&labelled.iter().map(|&row| f(row)).collect::<Vec<_>>(), device);
    let all = Labels { labels: numbers(&|row| labels[row])?, rows: numbers(&|row| row as i32)? };
    let mut output = Output {
        nll: Tensor::zeros(&[count], DType::F32, device, Tag::Workspace)?,
        correct: Tensor::from_slice(&vec![1u8; count], &[count], Tag::Workspace)?.to_device(device, Tag::Workspace)?,
        dhidden: if wanted.hidden {
            Some(Tensor::zeros(&[count, width], dtype, device, Tag::Workspace)?)
        } else {
            None
        },
        dhead: None,
    };
    let narrow;
    let head = match head {
        // One that trains: the chunks' products take it in the type of the hidden states.
        Table::Dense(value) if value.dtype() == DType::F32 && dtype != DType::F32 => {
            narrow = Table::Dense(cast(value, dtype, Tag::Workspace)?);
            &narrow
        }
        _ => head,
    };
    let step = chunk_rows(vocab, count.min(wanted.at_once.unwrap_or(usize::MAX)));
    for first in (0..labelled.len()).step_by(step) {
        let rows = step.min(labelled.len() - first);
        let chunk = Labels { labels: all.labels.rows(first, rows)?, rows: all.rows.rows(first, rows)? };
        let part = gather(&chunk.rows, hidden, dtype, Tag::Workspace)?;
        let logits = project(&part, head)?;
        let Some(grad) = loss(logits, &chunk, (wanted.hidden || wanted.head).then_some(dtype), scale, &mut output)?
        else {
            continue;
        };
        if let Some(dhidden) = &mut output.dhidden {
            scatter(&input_grad(&grad, head)?, &chunk.rows, dhidden)?;
        }
        if wanted.head {
            let grad = weight_grad(&grad, &part, 1.0)?;
            match &mut output.dhead {
                None => output.dhead = Some(grad),
                Some(sum) => add_assign(sum, &grad)?,
            }
        }
    }
    if wanted.head && output.dhead.is_none() {
        output.dhead = Some(Tensor::zeros(&[vocab, width], DType::F32, device, Tag::Gradients)?);
    }
    Ok(output)
}

/// Writes the loss of a chunk's logits, f32 `[R, V]`, into `output`. Their scaled gradient is returned in the type that it
/// is `wanted` in, f32 in the place of the logits.
pub(super) fn loss(
    mut logits: Tensor,
    chunk: &Labels,
    wanted: Option<DType>,
    scale: f32,
    output: &mut Output,
) -> Result<Option<Tensor>> {
    let (rows, vocab) = logits.dims2(OP)?;
    let mut grad = match wanted {
        None | Some(DType::F32) => None,
        Some(dtype) => Some(Tensor::empty(&[rows, vocab], dtype, logits.device(), Tag::Workspace)?),
    };
    let args = Args::new().output(&mut logits).input(&chunk.labels).input(&chunk.rows).output_opt(grad.as_mut());
    let args = args.u32(wanted.is_some().into()).output(&mut output.nll).output(&mut output.correct);
    let args = args.u32(size(OP, vocab)?).f32(scale);
    let (gpu, dtype) = (Gpu::of(logits.device())?, wanted.unwrap_or(DType::F32));
    let shared = cluster_shared(vocab);
    // Addresses of 16 bytes: of whole tensors, and rows of a multiple of 8.
    if hopper(gpu.chip()) && vocab >= LONG && vocab.is_multiple_of(8) && shared <= gpu.shared_per_block() {
        let (name, grid) = (entry("cross_entropy_cluster", dtype)?, size(OP, rows * CLUSTER as usize)?);
        gpu.launch(&HOPPER, &name, [grid, 1, 1], [THREADS, 1, 1], shared, args.cluster(CLUSTER))?;
    } else {
        // Sixteen logits a thread and turn.
        let threads = size(OP, vocab.div_ceil(16).next_multiple_of(32).min(1024))?;
        let name = entry("cross_entropy_rows", dtype)?;
        gpu.launch(&MODULE, &name, [size(OP, rows)?, 1, 1], [threads, 1, 1], 0, args)?;
    }
    Ok(wanted.map(|_| grad.unwrap_or(logits)))
}

/// Shared memory of a block of a cluster: what the blocks send one another, barriers, and its part of the logits.
fn cluster_shared(vocab: usize) -> usize {
    let blocks = CLUSTER as usize;
    blocks * 16 + 6 * 8 + vocab.div_ceil(8 * blocks) * 8 * size_of::<f32>()
}

/// Writes row i of `from` into row `rows[i]` of `into`, which has the same type.
fn scatter(from: &Tensor, rows: &Tensor, into: &mut Tensor) -> Result<()> {
    let (count, width) = from.dims2(OP)?;
    let (name, grid) = (entry("cross_entropy_scatter", from.dtype())?, [size(OP, count)?, 1, 1]);
    let gpu = Gpu::of(into.device())?;
    let args = Args::new().input(from).input(rows).output(into).moves(2 * from.size_bytes()).u32(size(OP, width)?);
    gpu.launch(&MODULE, &name, grid, [128, 1, 1], 0, args)
}
