//! Launch of the conversions.

use crate::cuda::{entry, size};
use nibble_runtime::{
    DType, Error, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "cast",
    ptx: include_str!("../../ptx/cast.ptx"),
    entries: &[
        Entry { name: "cast", floats: true, params: &[8, 4, 8, 8] },
        Entry { name: "cast_all", floats: true, params: &ARRAYS },
    ],
};

/// Most arrays of `cast_all`: A and B of a layer's seven linears, or their gradients, some of which lie in two pages.
const MOST: usize = 20;
/// The type, then two pointers and the elements of each array.
const ARRAYS: [usize; 1 + 3 * MOST] = {
    let mut params = [8; 1 + 3 * MOST];
    let mut i = 0;
    while i <= 3 * MOST {
        if i % 3 == 0 {
            params[i] = 4;
        }
        i += 1;
    }
    params
};

/// Bytes of the result that a block makes: 256 threads, two runs of 16 bytes.
const BLOCK: usize = 2 * 256 * 16;

/// The number by which kernels know a float type (`FloatType` in `runs.cuh`).
///
/// # Errors
/// It is not a float.
pub(crate) fn code(dtype: DType) -> Result<u32> {
    match dtype {
        DType::F32 => Ok(0),
        DType::F16 => Ok(1),
        DType::BF16 => Ok(2),
        found => Err(Error::DType { op: "launch", expected: "float".into(), found }),
    }
}

pub(super) fn cast(x: &Tensor, dtype: DType, tag: Tag) -> Result<Tensor> {
    let (name, type_) = (entry("cast", dtype)?, code(x.dtype())?);
    let mut out = Tensor::empty(x.shape(), dtype, x.device(), tag)?;
    let (grid, n) = (size("cast", out.size_bytes().div_ceil(BLOCK))?, out.numel() as u64);
    let args = Args::new().input(x).u32(type_).output(&mut out).u64(n);
    Gpu::of(x.device())?.launch(&MODULE, &name, [grid, 1, 1], [256, 1, 1], 0, args)?;
    Ok(out)
}

/// Tensors of one type in another, each in storage of its own.
pub(super) fn cast_all(tensors: &[&Tensor], dtype: DType, tag: Tag) -> Result<Vec<Tensor>> {
    let empty = |x: &&Tensor| Tensor::empty(x.shape(), dtype, x.device(), tag);
    let mut outs = tensors.iter().map(empty).collect::<Result<Vec<_>>>()?;
    cast_into(tensors, &mut outs)?;
    Ok(outs)
}

/// See [`super::cast_into`]; there is a tensor, and all fit.
pub(super) fn cast_into(tensors: &[&Tensor], into: &mut [Tensor]) -> Result<()> {
    let (name, type_) = (entry("cast_all", into[0].dtype())?, code(tensors[0].dtype())?);
    let gpu = Gpu::of(into[0].device())?;
    for (tensors, into) in tensors.chunks(MOST).zip(into.chunks_mut(MOST)) {
        let (mut args, mut blocks) = (Args::new().u32(type_), 0);
        for (x, out) in tensors.iter().zip(into.iter_mut()) {
            blocks += out.size_bytes().div_ceil(BLOCK);
            args = args.input(x).output(out).u32(size("cast", x.numel())?);
        }
        for _ in tensors.len()..MOST {
            args = args.input_opt(None).output_opt(None).u32(0);
        }
        gpu.launch(&MODULE, &name, [size("cast", blocks)?, 1, 1], [256, 1, 1], 0, args)?;
    }
    Ok(())
}
