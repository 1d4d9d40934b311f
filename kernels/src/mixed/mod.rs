//! Rows of one batch that belong to different adapters.
//!
//! The A's and B's of all adapters of a layer lie side by side: A `[R, K]` and B `[N, R]`, with R the sum of the ranks. One
//! product makes `t = x·Aᵀ` `[T, R]` of every row with every adapter; [`keep_own`] leaves each row what is its adapter's;
//! one product more adds `t·Bᵀ`. So a batch is as many launches with eight adapters as with one, nobody asks which row is
//! whose, and weights are read once. The products with other rows' adapters are in vain, and small beside the layer's own.
//! With DoRA [`scale_own`] gives each row its adapter's gains.
//!
//! `owners` i32 `[T]` is each row's adapter, −1 for none; `columns` i32 `[R]` that of each column of `t`.

pub(crate) mod cuda;

use nibble_runtime::{DType, Device, Error, Result, Tag, Tensor};

fn check(tensor: &Tensor, dtype: DType, shape: &[usize]) -> Result<()> {
    if tensor.dtype() != dtype || tensor.shape() != shape {
        let what = format!("{} {:?}; expected {dtype} {shape:?}", tensor.dtype(), tensor.shape());
        return Err(Error::shape("mixed adapters", what));
    }
    Ok(())
}

/// In f32, by row and column, rounded once.
fn each(matrix: &mut Tensor, value: impl Fn(usize, usize, f32) -> f32) -> Result<()> {
    let (dtype, width) = (matrix.dtype(), matrix.dims2("mixed adapters")?.1);
    let mut wide = matrix.cast(DType::F32, Tag::Workspace)?;
    for (row, values) in wide.as_mut_slice::<f32>()?.chunks_mut(width.max(1)).enumerate() {
        values.iter_mut().enumerate().for_each(|(column, x)| *x = value(row, column, *x));
    }
    *matrix = wide.into_dtype(dtype, Tag::Activations)?;
    Ok(())
}

/// `t` `[T, R]` in place: times `scales` `[R]` where the column is of the row's adapter, zero elsewhere.
///
/// # Errors
/// Types or shapes do not fit; on a GPU, the storage of `t` is shared.
pub fn keep_own(t: &mut Tensor, owners: &Tensor, columns: &Tensor, scales: &Tensor) -> Result<()> {
    let (rows, width) = t.dims2("mixed adapters")?;
    check(owners, DType::I32, &[rows])?;
    check(columns, DType::I32, &[width])?;
    check(scales, DType::F32, &[width])?;
    match t.device() {
        Device::Cpu => {
            let (owners, columns) = (owners.as_slice::<i32>()?, columns.as_slice::<i32>()?);
            let scales = scales.as_slice::<f32>()?;
            each(t, |row, column, x| if owners[row] == columns[column] { x * scales[column] } else { 0.0 })
        }
        Device::Cuda(_) => cuda::keep_own(t, owners, columns, scales),
    }
}

/// `y` `[T, N]` in place: each row times its adapter's row of `gains` f32 `[adapters, N]`. Rows of no adapter stay. No owner
/// may be beyond the last adapter.
///
/// # Errors
/// Types or shapes do not fit; an owner is beyond the last adapter (on the CPU); on a GPU, the storage of `y` is shared.
pub fn scale_own(y: &mut Tensor, owners: &Tensor, gains: &Tensor) -> Result<()> {
    let (rows, width) = y.dims2("mixed adapters")?;
    check(owners, DType::I32, &[rows])?;
    let adapters = gains.dims2("mixed adapters")?.0;
    check(gains, DType::F32, &[adapters, width])?;
    match y.device() {
        Device::Cpu => {
            let (owners, gains) = (owners.as_slice::<i32>()?, gains.as_slice::<f32>()?);
            if let Some(bad) = owners.iter().find(|&&owner| owner >= adapters as i32) {
                return Err(Error::invalid("mixed adapters", format!("a row of adapter {bad}, of {adapters}")));
            }
            let of = |owner: i32, column: usize| usize::try_from(owner).map_or(1.0, |o| gains[o * width + column]);
            each(y, |row, column, x| x * of(owners[row], column))
        }
        Device::Cuda(_) => cuda::scale_own(y, owners, gains),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FLOATS, gpu, random, random_as, same};
    use nibble_runtime::rng::{Philox, Stream};
    use proptest::prelude::*;

    fn whole(values: &[i32]) -> Tensor {
        Tensor::from_slice(values, &[values.len()], Tag::Workspace).unwrap()
    }

    fn adapters(count: usize, least: i32, most: i32, seed: u64) -> Tensor {
        let rng = Philox::new(seed, Stream { purpose: 99, step: 1, layer: 0 });
        let range = (most - least + 1) as u32;
        whole(&(0..count as u64).map(|i| least + (rng.bits(i) % range) as i32).collect::<Vec<_>>())
    }

    #[test]
    fn each_row_keeps_its_own() {
        let ones =
            |shape: &[usize]| Tensor::from_slice(&vec![1f32; shape.iter().product()], shape, Tag::Workspace).unwrap();
        let scales = Tensor::from_slice(&[2f32, 3.0, 5.0], &[3], Tag::Workspace).unwrap();
        let mut t = ones(&[3, 3]);
        keep_own(&mut t, &whole(&[1, -1, 0]), &whole(&[0, 1, 1]), &scales).unwrap();
        assert_eq!(t.as_slice::<f32>().unwrap(), [0.0, 3.0, 5.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0]);
        let mut y = ones(&[3, 2]);
        let gains = Tensor::from_slice(&[2f32, 3.0, 5.0, 7.0], &[2, 2], Tag::Workspace).unwrap();
        scale_own(&mut y, &whole(&[1, -1, 0]), &gains).unwrap();
        assert_eq!(y.as_slice::<f32>().unwrap(), [5.0, 7.0, 1.0, 1.0, 2.0, 3.0]);
        assert!(scale_own(&mut y, &whole(&[1, 2, 0]), &gains).is_err());
        assert!(keep_own(&mut t, &whole(&[1, 1]), &whole(&[0, 1, 1]), &scales).is_err());
    }

    proptest! {
        #![proptest_config(crate::testing::cases(24))]

        #[test]
        fn gpu_mixes_as_the_cpu(rows in 1usize..70, width in 1usize..700, count in 1i32..9, kind in 0usize..3, seed: u64) {
            let Some(gpu) = gpu() else { return Ok(()) };
            let on = |tensor: &Tensor| tensor.to_device(gpu, Tag::Workspace).unwrap();
            let x = random_as(&[rows, width], FLOATS[kind], seed);
            let (owners, columns) = (adapters(rows, -1, count - 1, seed), adapters(width, 0, count - 1, seed ^ 1));
            let (scales, gains) = (random(&[width], seed ^ 2), random(&[count as usize, width], seed ^ 3));
            let (mut host, mut there) = (x.copy(Tag::Workspace).unwrap(), on(&x));
            keep_own(&mut host, &owners, &columns, &scales).unwrap();
            keep_own(&mut there, &on(&owners), &on(&columns), &on(&scales)).unwrap();
            same(&there, &host, 0.0);
            let (mut host, mut there) = (x.copy(Tag::Workspace).unwrap(), on(&x));
            scale_own(&mut host, &owners, &gains).unwrap();
            scale_own(&mut there, &on(&owners), &on(&gains)).unwrap();
            same(&there, &host, 0.0);
        }
    }
}
