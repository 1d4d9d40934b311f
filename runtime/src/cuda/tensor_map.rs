//! Matrices as the tensor memory accelerator of Hopper reads them.

use super::driver::check;
use crate::{DType, Error, Result, Tensor};
use cudarc::driver::sys;

/// A matrix, and the boxes of it that a kernel copies to shared memory.
#[derive(Debug)]
#[repr(transparent)]
pub(super) struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// `tensor` `[rows, columns]` in boxes of `box_rows` × `box_columns`, with zeros outside of it.
    ///
    /// It holds the address of `tensor` and nothing that keeps it alive, as all arguments of kernels do.
    ///
    /// # Errors
    /// What [`super::Args::tensor_map`] says.
    pub fn new(tensor: &Tensor, box_rows: u32, box_columns: u32) -> Result<TensorMap> {
        let op = "tensor map";
        let (rows, columns) = tensor.dims2(op)?;
        use sys::{CUtensorMapDataType as Kind, CUtensorMapSwizzle as Swizzle};
        // 16-byte chunks are swizzled over a row of a box.
        let (kind, swizzle, row) = match tensor.dtype() {
            DType::BF16 => (Kind::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, Swizzle::CU_TENSOR_MAP_SWIZZLE_128B, 128),
            DType::F16 => (Kind::CU_TENSOR_MAP_DATA_TYPE_FLOAT16, Swizzle::CU_TENSOR_MAP_SWIZZLE_128B, 128),
            DType::U8 => (Kind::CU_TENSOR_MAP_DATA_TYPE_UINT8, Swizzle::CU_TENSOR_MAP_SWIZZLE_32B, 32),
            found => return Err(Error::DType { op, expected: "f16, bf16 or u8".into(), found }),
        };
        let size = tensor.dtype().size();
        let (address, pitch, width) = (tensor.device_pointer()?, columns * size, box_columns as usize * size);
        let fits = address % 16 == 0
            && pitch % 16 == 0
            && rows > 0
            && columns > 0
            && width % 16 == 0
            && (1..=row).contains(&width)
            && (1..=256).contains(&box_rows);
        if !fits {
            let what = format!("{:?} at {address:#x} in boxes of {box_rows} x {box_columns}", tensor.shape());
            return Err(Error::invalid(op, what));
        }
        let (sizes, strides) = ([columns as u64, rows as u64], [pitch as u64]);
        let (boxes, steps) = ([box_columns, box_rows], [1u32, 1]);
        let mut map = TensorMap(sys::CUtensorMap_st { opaque: [0; 16] });
        // SAFETY: the map is 64-byte aligned, and the arrays have an entry for each of the two dimensions (one fewer for
        // the strides, which leave out the innermost). The driver checks the rest; it does not read the matrix.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map.0,
                kind,
                2,
                std::ptr::with_exposed_provenance_mut(address as usize),
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", status)?;
        Ok(map)
    }
}
