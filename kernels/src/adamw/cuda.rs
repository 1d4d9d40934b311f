//! CUDA launch of AdamW: one kernel over a table of all parameters.

use super::{
    Coefficients,
    list::{Job, MomentsMut, Part},
};
use crate::{dynamic8, norm::Clip, tensor_list::TensorList};
use nibble_runtime::{
    DType, Device, Error, Result, Tensor,
    cuda::{Args, Entry, Gpu, Module, Stream},
};

pub(crate) static MODULE: Module = Module {
    name: "adamw",
    ptx: include_str!("../../ptx/adamw.ptx"),
    entries: &[Entry {
        name: "adamw_step",
        floats: false,
        params: &[8 * WORDS * FEW, 8, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 8, 8, 8],
    }],
};

/// Elements that a block updates, as in adamw.cu.
const PIECE: usize = 8192;
/// Tensors of a launch whose table is among its parameters, and the 64-bit words of each in it; as in adamw.cu.
const FEW: usize = 32;
const WORDS: usize = 9;
const THREADS: u32 = 256;

/// See [`super::list::step_on`]; everything has been checked, that what is written is not shared too, but where the tensors
/// are.
pub(super) fn step_on(
    jobs: &mut [Job],
    c: &Coefficients,
    clip: &mut Clip,
    device: Device,
    stream: Option<Stream>,
) -> Result<Vec<Tensor>> {
    let gpu = Gpu::of(device)?;
    let mut list = TensorList::new(PIECE);
    for job in &mut *jobs {
        let Job { param, decay, previous, parts, .. } = job;
        let param = param.device_pointer_on(stream)?;
        let previous = previous.as_ref().map_or(Ok(0), |previous| previous.device_pointer_on(stream))?;
        for Part { start, grad, moments } in parts {
            let of_grad = match grad.dtype() {
                DType::F32 => 0,
                DType::F16 => 4,
                DType::BF16 => 8,
                found => return Err(Error::DType { op: "adamw", expected: "float".into(), found }),
            };
            let (m, v, m_absmax, v_absmax, eight) = match moments {
                MomentsMut::F32 { m, v } => (m.device_pointer_on(stream)?, v.device_pointer_on(stream)?, 0, 0, 0),
                MomentsMut::Bits8 { m, v } => (
                    m.codes.device_pointer_on(stream)?,
                    v.codes.device_pointer_on(stream)?,
                    m.absmax.device_pointer_on(stream)?,
                    v.absmax.device_pointer_on(stream)?,
                    2,
                ),
            };
            let skip = 4 * *start as u64;
            let previous = if previous == 0 { 0 } else { previous + skip };
            let pointers = [param + skip, grad.device_pointer_on(stream)?, m, v, m_absmax, v_absmax, previous];
            list.push(&pointers, grad.numel(), u32::from(*decay) | eight | of_grad)?;
        }
    }
    let (signed, unsigned) = (dynamic8::signed_map_on(device)?, dynamic8::unsigned_map_on(device)?);
    // A copy of the table would cost the host, and the stream before it can start, about as much as the launch.
    let few = list.count() as usize <= FEW;
    let table = if few { None } else { Some(list.upload(device, stream)?) };
    let args = Args::new()
        .words(if few { list.bytes() } else { &[] }, WORDS * FEW)
        .input_opt(table.as_ref())
        .u32(list.count())
        .f32(c.beta1)
        .f32(c.one_minus_beta1)
        .f32(c.beta2)
        .f32(c.one_minus_beta2)
        .f32(c.step_size)
        .f32(c.root_scale)
        .f32(c.eps)
        .f32(c.decay_before)
        .f32(c.decay_after)
        .u64(clip.state_mut().device_pointer_on(stream)?)
        .input(&signed)
        .input(&unsigned);
    let on = stream.unwrap_or(gpu.stream());
    gpu.launch(&MODULE, "adamw_step", [list.pieces(), 1, 1], [THREADS, 1, 1], 0, args.on(on))?;
    Ok(table.into_iter().chain([signed, unsigned]).collect())
}
