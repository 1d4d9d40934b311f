//! Launch of RMSNorm.

use crate::{
    cast::cuda::code,
    cuda::{check_dtype, entry, size},
};
use nibble_runtime::{
    DType, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "rms_norm",
    ptx: include_str!("../../ptx/rms_norm.ptx"),
    entries: &[
        Entry { name: "rms_norm_forward", floats: true, params: &[8, 8, 4, 8, 8, 4, 4] },
        Entry { name: "rms_norm_apply", floats: true, params: &[8, 8, 4, 8, 8, 4] },
        Entry { name: "rms_norm_backward", floats: true, params: &[8, 8, 4, 8, 8, 8, 8, 4] },
        Entry { name: "rms_norm_weight_partial", floats: true, params: &[8, 8, 8, 8, 4, 4, 4] },
        Entry { name: "rms_norm_weight_sum", floats: false, params: &[8, 8, 4, 4] },
    ],
};

/// Rows that one partial sum of the weight's gradient covers.
const GROUP: usize = 64;

/// Sizes of a launch over the rows of `x`.
struct Rows {
    width: u32,
    grid: [u32; 3],
    block: [u32; 3],
}

impl Rows {
    /// A block for each row, and a thread for 16 of its elements.
    fn of(x: &Tensor) -> Result<Rows> {
        let (rows, width) = x.dims2("rms_norm")?;
        // `MAX_THREADS` of the kernels.
        let most = 2048 / x.dtype().size();
        let threads = width.div_ceil(16).next_multiple_of(32).min(most) as u32;
        let (rows, width) = (size("rms_norm", rows)?, size("rms_norm", width)?);
        Ok(Rows { width, grid: [rows, 1, 1], block: [threads, 1, 1] })
    }
}

pub(super) fn forward(x: &Tensor, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let gpu = Gpu::of(x.device())?;
    let Rows { width, grid, block } = Rows::of(x)?;
    let mut y = Tensor::empty(x.shape(), x.dtype(), x.device(), Tag::Workspace)?;
    let mut rstd = Tensor::empty(&[grid[0] as usize], DType::F32, x.device(), Tag::Activations)?;
    let args = Args::new().input(x).input(weight).u32(code(weight.dtype())?).output(&mut y).output(&mut rstd);
    let args = args.u32(width).f32(eps);
    gpu.launch(&MODULE, &entry("rms_norm_forward", x.dtype())?, grid, block, 0, args)?;
    Ok((y, rstd))
}

pub(super) fn apply(x: &Tensor, weight: &Tensor, rstd: &Tensor) -> Result<Tensor> {
    let gpu = Gpu::of(x.device())?;
    let Rows { width, grid, block } = Rows::of(x)?;
    let mut y = Tensor::empty(x.shape(), x.dtype(), x.device(), Tag::Workspace)?;
    let args = Args::new().input(x).input(weight).u32(code(weight.dtype())?).input(rstd).output(&mut y);
    let args = args.u32(width);
    gpu.launch(&MODULE, &entry("rms_norm_apply", x.dtype())?, grid, block, 0, args)?;
    Ok(y)
}

/// `last`: the gradient, and where the norm's output goes again, if it is to go anywhere.
fn backward([x, weight, rstd]: [&Tensor; 3], dx: &mut Tensor, last: impl FnOnce(Args) -> Args) -> Result<()> {
    let gpu = Gpu::of(x.device())?;
    let Rows { width, grid, block } = Rows::of(x)?;
    let args = Args::new().input(x).input(weight).u32(code(weight.dtype())?).input(rstd).in_place(dx);
    let args = last(args).u32(width);
    gpu.launch(&MODULE, &entry("rms_norm_backward", x.dtype())?, grid, block, 0, args)
}

pub(super) fn backward_add(x: &Tensor, weight: &Tensor, rstd: &Tensor, grad: &Tensor, dx: &mut Tensor) -> Result<()> {
    check_dtype("rms_norm backward", x.dtype(), &[grad, dx])?;
    backward([x, weight, rstd], dx, |args| args.input(grad).input_opt(None))
}

/// The output of the norm, in the place of `grad`.
pub(super) fn backward_and_apply(
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    grad: Tensor,
    dx: &mut Tensor,
) -> Result<Tensor> {
    check_dtype("rms_norm backward", x.dtype(), &[&grad, dx])?;
    let mut y = if grad.is_unique() { grad } else { grad.copy(Tag::Workspace)? };
    backward([x, weight, rstd], dx, |args| args.input(&y).output(&mut y))?;
    Ok(y)
}

/// Rows of a group, of which there are at most as many as a grid's second axis takes blocks.
fn group_rows(rows: usize) -> usize {
    GROUP.max(rows.div_ceil(65_535))
}

/// Bytes of the groups' sums of a weight's gradient.
pub(super) fn workspace(rows: usize, width: usize) -> usize {
    rows.div_ceil(group_rows(rows)) * width * size_of::<f32>()
}

/// Gradient of the weight, f32 `[D]`: sums over groups of rows, then over the groups, both in a fixed order.
pub(super) fn weight_grad(x: &Tensor, rstd: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let op = "rms_norm weight gradient";
    check_dtype(op, x.dtype(), &[grad])?;
    let (gpu, device) = (Gpu::of(x.device())?, x.device());
    let (rows, width) = x.dims2(op)?;
    let group_rows = group_rows(rows);
    let groups = rows.div_ceil(group_rows);
    let mut partial = Tensor::empty(&[groups, width], DType::F32, device, Tag::Workspace)?;
    let mut dw = Tensor::empty(&[width], DType::F32, device, Tag::Gradients)?;
    let columns = size(op, (width * x.dtype().size()).div_ceil(128 * 16))?;
    let (rows, width, groups, group_rows) =
        (size(op, rows)?, size(op, width)?, size(op, groups)?, size(op, group_rows)?);
    let args = Args::new().input(x).input(rstd).input(grad).output(&mut partial).u32(rows).u32(width).u32(group_rows);
    let name = entry("rms_norm_weight_partial", x.dtype())?;
    gpu.launch(&MODULE, &name, [columns, groups, 1], [128, 1, 1], 0, args)?;
    let args = Args::new().input(&partial).output(&mut dw).u32(groups).u32(width);
    gpu.launch(&MODULE, "rms_norm_weight_sum", [width.div_ceil(32), 1, 1], [32, 8, 1], 0, args)?;
    Ok(dw)
}
