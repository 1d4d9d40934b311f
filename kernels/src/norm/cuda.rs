//! CUDA launches of the norm: a partial sum for each piece, then one block that adds them up.

use crate::tensor_list::TensorList;
use nibble_runtime::{
    DType, Device, Error, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "norm",
    ptx: include_str!("../../ptx/norm.ptx"),
    entries: &[
        Entry { name: "norm_pieces", floats: false, params: &[8, 4, 8] },
        Entry { name: "norm_clip", floats: false, params: &[8, 4, 8, 4, 8] },
    ],
};

/// Elements that a block sums, as in norm.cu.
const PIECE: usize = 1 << 14;
const THREADS: u32 = 256;

/// See [`super::Clip::new`]: norm, factor, whether the norm is finite, and 1 for the parameters; f32 `[4]`.
pub(super) fn clip(grads: &[&Tensor], device: Device, max_norm: f64, loss_scale: f32) -> Result<Tensor> {
    let gpu = Gpu::of(device)?;
    let mut list = TensorList::new(PIECE);
    for grad in grads {
        let kind = match grad.dtype() {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 2,
            found => return Err(Error::DType { op: "norm", expected: "float".into(), found }),
        };
        list.push(&[grad.device_pointer()?], grad.numel(), kind)?;
    }
    // Doubles, in a tensor of 64-bit words.
    let mut partial = Tensor::empty(&[list.pieces() as usize], DType::I64, device, Tag::Workspace)?;
    let mut clip = Tensor::empty(&[4], DType::F32, device, Tag::Workspace)?;
    let table = list.upload(device)?;
    let args = Args::new().input(&table).u32(list.count()).output(&mut partial);
    gpu.launch(&MODULE, "norm_pieces", [list.pieces(), 1, 1], [THREADS, 1, 1], 0, args)?;
    let args = Args::new().input(&partial).u32(list.pieces()).u64(max_norm.to_bits()).f32(loss_scale).output(&mut clip);
    gpu.launch(&MODULE, "norm_clip", [1, 1, 1], [THREADS, 1, 1], 0, args)?;
    Ok(clip)
}
