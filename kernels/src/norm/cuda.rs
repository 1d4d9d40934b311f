//! CUDA launches of the norm: a partial sum for each piece, then one block that adds them up.

use super::PIECE;
use crate::{cuda::size, tensor_list::TensorList};
use nibble_runtime::{
    DType, Error, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "norm",
    ptx: include_str!("../../ptx/norm.ptx"),
    entries: &[
        Entry { name: "norm_pieces", floats: false, params: &[8, 4, 8] },
        Entry { name: "norm_clip", floats: false, params: &[8, 4, 8, 4, 8, 8] },
    ],
};

const THREADS: u32 = 256;

/// See [`super::Squares::put`].
pub(super) fn put(partial: &mut Tensor, parts: &[(usize, &Tensor)]) -> Result<()> {
    let device = partial.device();
    let mut list = TensorList::new(PIECE);
    for (first, values) in parts {
        let kind = match values.dtype() {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 2,
            found => return Err(Error::DType { op: "norm", expected: "float".into(), found }),
        };
        list.push(&[values.device_pointer()?, *first as u64], values.numel(), kind)?;
    }
    let table = list.upload(device, None)?;
    let args = Args::new().input(&table).u32(list.count()).output(partial);
    Gpu::of(device)?.launch(&MODULE, "norm_pieces", [list.pieces(), 1, 1], [THREADS, 1, 1], 0, args)
}

/// See [`super::Squares::clip`]: norm, factor, whether the norm is finite, and 1 for the parameters; f32 `[4]`.
pub(super) fn clip(partial: &Tensor, max_norm: f64, loss_scale: f32, before: Option<&Tensor>) -> Result<Tensor> {
    let mut clip = Tensor::empty(&[4], DType::F32, partial.device(), Tag::Workspace)?;
    let args = Args::new().input(partial).u32(size("norm", partial.numel())?);
    let args = args.u64(max_norm.to_bits()).f32(loss_scale).input_opt(before).output(&mut clip);
    Gpu::of(partial.device())?.launch(&MODULE, "norm_clip", [1, 1, 1], [THREADS, 1, 1], 0, args)?;
    Ok(clip)
}
