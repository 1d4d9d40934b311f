//! Launch of the conversions.

use crate::cuda::{entry, size};
use nibble_runtime::{
    DType, Error, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "cast",
    ptx: include_str!("../../ptx/cast.ptx"),
    entries: &[Entry { name: "cast", floats: true, params: &[8, 4, 8, 8] }],
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
