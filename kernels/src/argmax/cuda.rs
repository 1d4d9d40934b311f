//! Launch of the search.

use crate::cuda::size;
use nibble_runtime::{
    DType, Device, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "argmax",
    ptx: include_str!("../../ptx/argmax.ptx"),
    entries: &[Entry { name: "argmax_rows", floats: false, params: &[8, 8, 4] }],
};

pub(super) fn rows(x: &Tensor) -> Result<Vec<u32>> {
    let (rows, width) = x.dims2("argmax")?;
    let mut places = Tensor::empty(&[rows], DType::I32, x.device(), Tag::Workspace)?;
    let (grid, args) = ([size("argmax", rows)?, 1, 1], Args::new().input(x).output(&mut places));
    Gpu::of(x.device())?.launch(&MODULE, "argmax_rows", grid, [1024, 1, 1], 0, args.u32(size("argmax", width)?))?;
    let places = places.into_device(Device::Cpu, Tag::Workspace)?;
    Ok(places.as_slice::<i32>()?.iter().map(|place| place.unsigned_abs()).collect())
}
