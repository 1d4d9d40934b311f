//! Tensors: an element type, a shape and a piece of storage. Always contiguous, row-major.
//!
//! Clones share storage. Nothing is copied or converted unless the call says so, and a tensor can be written only
//! while no other refers to its storage.

use crate::{
    DType, Device, Element, Error, Float, Result, Tag,
    cuda::{self, DeviceBuffer, Event, Gpu, Stream},
    memory::{Buffer, HostPage},
    pager::Lease,
};
use half::{bf16, f16};
use rayon::prelude::*;
use std::{borrow::Cow, fmt, sync::Arc};

enum Storage {
    Host(Buffer),
    /// Host memory that belongs to the pager.
    Page(HostPage),
    Cuda(DeviceBuffer),
}

impl Storage {
    fn device(&self) -> Device {
        match self {
            Storage::Host(_) | Storage::Page(_) => Device::Cpu,
            Storage::Cuda(buffer) => buffer.gpu().device(),
        }
    }

    fn set_tag(&mut self, tag: Tag) {
        match self {
            Storage::Host(buffer) => buffer.set_tag(tag),
            Storage::Page(_) => {}
            Storage::Cuda(buffer) => buffer.set_tag(tag),
        }
    }

    /// The bytes, if they are in host memory.
    fn host_bytes(&self) -> Option<&[u8]> {
        match self {
            Storage::Host(buffer) => Some(buffer.bytes()),
            Storage::Page(page) => Some(page.bytes()),
            Storage::Cuda(_) => None,
        }
    }

    /// The bytes, to write, if they are in host memory.
    fn host_bytes_mut(&mut self) -> Option<&mut [u8]> {
        match self {
            Storage::Host(buffer) => Some(buffer.bytes_mut()),
            Storage::Page(page) => Some(page.bytes_mut()),
            Storage::Cuda(_) => None,
        }
    }
}

/// A contiguous row-major array on a device.
#[derive(Clone)]
pub struct Tensor {
    storage: Arc<Storage>,
    dtype: DType,
    shape: Vec<usize>,
    /// First element, counted in elements from the start of the storage.
    offset: usize,
}

/// Conversions run in parallel from this many elements on.
const PARALLEL_FROM: usize = 1 << 16;

impl Tensor {
    /// A tensor whose contents are unspecified until written.
    ///
    /// # Errors
    /// The device cannot be used or is out of memory, or the size overflows.
    pub fn empty(shape: &[usize], dtype: DType, device: Device, tag: Tag) -> Result<Self> {
        let bytes = shape
            .iter()
            .try_fold(dtype.size(), |bytes, &dim| bytes.checked_mul(dim))
            .ok_or_else(|| Error::shape("empty", format!("shape {shape:?} of {dtype} is larger than memory")))?;
        let storage = match device {
            Device::Cpu => Storage::Host(Buffer::new(bytes, tag)),
            Device::Cuda(_) => Storage::Cuda(DeviceBuffer::new(Gpu::of(device)?, bytes, tag)?),
        };
        Ok(Tensor { storage: Arc::new(storage), dtype, shape: shape.to_vec(), offset: 0 })
    }

    /// A tensor of zeros.
    pub fn zeros(shape: &[usize], dtype: DType, device: Device, tag: Tag) -> Result<Self> {
        let mut tensor = Self::empty(shape, dtype, device, tag)?;
        match Arc::get_mut(&mut tensor.storage) {
            Some(Storage::Cuda(buffer)) => buffer.fill(0)?,
            Some(storage) => storage.host_bytes_mut().into_iter().for_each(|bytes| bytes.fill(0)),
            None => return Err(Error::Shared { op: "zeros" }),
        }
        Ok(tensor)
    }

    /// A tensor in memory of the pager, which `lease` keeps in place.
    ///
    /// # Safety
    /// As long as the lease lives, `address` is that of `bytes` initialized bytes, aligned for `dtype`, which `device` can
    /// use there and nobody else does.
    pub(crate) unsafe fn in_pages(
        lease: &Arc<Lease>,
        device: Device,
        address: u64,
        bytes: usize,
        dtype: DType,
        shape: &[usize],
    ) -> Result<Self> {
        let lease = Arc::clone(lease);
        let storage = match device {
            // SAFETY: the caller's promise.
            Device::Cpu => Storage::Page(unsafe { HostPage::new(lease, address, bytes) }),
            Device::Cuda(_) => Storage::Cuda(DeviceBuffer::in_pages(Gpu::of(device)?, lease, address, bytes)?),
        };
        Ok(Tensor { storage: Arc::new(storage), dtype, shape: shape.to_vec(), offset: 0 })
    }

    /// A host tensor holding a copy of `values`.
    pub fn from_slice<T: Element>(values: &[T], shape: &[usize], tag: Tag) -> Result<Self> {
        if shape.iter().product::<usize>() != values.len() {
            return Err(Error::shape("from_slice", format!("{} values do not fill shape {shape:?}", values.len())));
        }
        let mut tensor = Self::empty(shape, T::DTYPE, Device::Cpu, tag)?;
        tensor.as_mut_slice::<T>()?.copy_from_slice(values);
        Ok(tensor)
    }

    /// A host tensor from raw little-endian bytes.
    pub fn from_bytes(bytes: &[u8], dtype: DType, shape: &[usize], tag: Tag) -> Result<Self> {
        Self::from_bytes_on(bytes, dtype, shape, Device::Cpu, tag)
    }

    /// A tensor on `device` from raw little-endian bytes, without another copy of them in host memory.
    pub fn from_bytes_on(bytes: &[u8], dtype: DType, shape: &[usize], device: Device, tag: Tag) -> Result<Self> {
        Self::from_bytes_for(None, bytes, dtype, shape, device, tag)
    }

    /// As [`Tensor::from_bytes_on`], for use by another stream of the GPU than the compute stream, which is not made to wait
    /// for the copy. To be kept until that stream is done with it.
    pub fn from_bytes_for(
        stream: Option<Stream>,
        bytes: &[u8],
        dtype: DType,
        shape: &[usize],
        device: Device,
        tag: Tag,
    ) -> Result<Self> {
        let mut tensor = Self::empty(shape, dtype, device, tag)?;
        if tensor.size_bytes() != bytes.len() {
            let found = (bytes.len(), tensor.size_bytes());
            let what = format!("{} bytes do not fill {dtype} {shape:?} ({} bytes)", found.0, found.1);
            return Err(Error::shape("from_bytes", what));
        }
        match Arc::get_mut(&mut tensor.storage) {
            Some(Storage::Cuda(buffer)) => {
                cuda::upload_on(stream.unwrap_or(buffer.gpu().stream()), buffer, 0, bytes)?;
            }
            Some(storage) => storage.host_bytes_mut().into_iter().for_each(|into| into.copy_from_slice(bytes)),
            None => return Err(Error::Shared { op: "from_bytes" }),
        }
        Ok(tensor)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes of the dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the elements.
    pub fn size_bytes(&self) -> usize {
        self.numel() * self.dtype.size()
    }

    /// Where the elements are.
    pub fn device(&self) -> Device {
        self.storage.device()
    }

    /// Rows and columns of a matrix.
    pub fn dims2(&self, op: &'static str) -> Result<(usize, usize)> {
        match self.shape[..] {
            [rows, columns] => Ok((rows, columns)),
            _ => Err(Error::shape(op, format!("expected a matrix, found shape {:?}", self.shape))),
        }
    }

    fn byte_range(&self) -> std::ops::Range<usize> {
        let size = self.dtype.size();
        self.offset * size..(self.offset + self.numel()) * size
    }

    /// The elements as bytes.
    ///
    /// # Errors
    /// The tensor is on a GPU: [`Tensor::to_device`] fetches it.
    pub fn bytes(&self) -> Result<&[u8]> {
        match self.storage.host_bytes() {
            Some(bytes) => Ok(&bytes[self.byte_range()]),
            None => Err(Error::invalid("read", "the tensor is on a GPU, not in host memory")),
        }
    }

    /// The elements as bytes, to write.
    ///
    /// # Errors
    /// The tensor is on a GPU, or its storage is shared.
    pub fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        let range = self.byte_range();
        match Arc::get_mut(&mut self.storage).map(Storage::host_bytes_mut) {
            Some(Some(bytes)) => Ok(&mut bytes[range]),
            Some(None) => Err(Error::invalid("write", "the tensor is on a GPU, not in host memory")),
            None => Err(Error::Shared { op: "write" }),
        }
    }

    /// Address of the first element in device memory, to read.
    ///
    /// # Errors
    /// The tensor is in host memory.
    pub fn device_pointer(&self) -> Result<u64> {
        self.device_pointer_on(None)
    }

    /// As [`Tensor::device_pointer`], for use by another stream, which waits until the tensor may be used.
    ///
    /// # Errors
    /// The tensor is in host memory.
    pub fn device_pointer_on(&self, stream: Option<Stream>) -> Result<u64> {
        match &*self.storage {
            Storage::Cuda(buffer) => {
                buffer.ready(stream.unwrap_or(buffer.gpu().stream()))?;
                Ok(buffer.pointer() + self.byte_range().start as u64)
            }
            _ => Err(Error::invalid("launch", "a tensor is in host memory, not on the GPU")),
        }
    }

    /// Lets the compute stream wait for `mark` before it uses the tensor's storage, or gives it to others: for what another
    /// stream uses, after all that used it before. Nobody needs to know of it but who made the mark.
    pub fn use_after(&self, mark: &Arc<Event>) {
        if let Storage::Cuda(buffer) = &*self.storage {
            buffer.use_after(mark);
        }
    }

    /// Address of the first element for the device that the tensor is on, to read.
    pub(crate) fn address(&self) -> Result<u64> {
        match self.device() {
            Device::Cpu => Ok(self.bytes()?.as_ptr().expose_provenance() as u64),
            Device::Cuda(_) => self.device_pointer(),
        }
    }

    /// Address of the first element in device memory, to write.
    ///
    /// # Errors
    /// The tensor is in host memory, or its storage is shared.
    pub fn device_pointer_mut(&mut self) -> Result<u64> {
        if !self.is_unique() {
            return Err(Error::Shared { op: "launch" });
        }
        self.device_pointer()
    }

    /// The same elements in pinned host memory that GPU `device` uses in place, across the bus. The tensor counts as on that
    /// GPU.
    ///
    /// # Errors
    /// The device is none or cannot be used, or the host is out of memory that can be pinned.
    pub fn to_pinned(&self, device: Device) -> Result<Self> {
        let buffer = DeviceBuffer::in_host_memory(Gpu::of(device)?, self.size_bytes())?;
        let storage = Arc::new(Storage::Cuda(buffer));
        let mut out = Tensor { storage, dtype: self.dtype, shape: self.shape.clone(), offset: 0 };
        out.copy_from(0, self)?;
        Ok(out)
    }

    /// The same elements on `device`, counted under `tag`. To a GPU the copy is queued on its compute stream; to the host
    /// the stream is waited for.
    ///
    /// # Errors
    /// The device cannot be used or is out of memory; a kernel that ran before has failed.
    pub fn to_device(&self, device: Device, tag: Tag) -> Result<Self> {
        let mut out = Self::empty(&self.shape, self.dtype, device, tag)?;
        out.copy_from(0, self)?;
        Ok(out)
    }

    /// This tensor on `device`: itself if it is there, a copy by [`Tensor::to_device`] otherwise.
    pub fn into_device(self, device: Device, tag: Tag) -> Result<Self> {
        if self.device() == device { Ok(self) } else { self.to_device(device, tag) }
    }

    /// Overwrites the elements from flat index `start` on by those of `source`, on any device.
    ///
    /// # Errors
    /// Types differ, the elements do not fit, or the storage is shared.
    pub fn copy_from(&mut self, start: usize, source: &Tensor) -> Result<()> {
        let op = "copy";
        if source.dtype != self.dtype {
            return Err(Error::DType { op, expected: self.dtype.to_string(), found: source.dtype });
        }
        if start.checked_add(source.numel()).is_none_or(|end| end > self.numel()) {
            let what = format!("elements {start}..+{} of a tensor of {}", source.numel(), self.numel());
            return Err(Error::shape(op, what));
        }
        let (from, count) = (source.byte_range().start, source.size_bytes());
        let to = (self.offset + start) * self.dtype.size();
        match (Arc::get_mut(&mut self.storage).ok_or(Error::Shared { op })?, &*source.storage) {
            (Storage::Cuda(target), Storage::Cuda(source)) => cuda::copy(target, to, source, from, count),
            (Storage::Cuda(target), _) => cuda::upload(target, to, source.bytes()?),
            (target, from_storage) => {
                let target = target.host_bytes_mut().ok_or(Error::Shared { op })?;
                let target = &mut target[to..to + count];
                match from_storage {
                    Storage::Cuda(source) => cuda::download(source, from, target),
                    _ => {
                        target.copy_from_slice(source.bytes()?);
                        Ok(())
                    }
                }
            }
        }
    }

    fn check_dtype<T: Element>(&self) -> Result<()> {
        if self.dtype == T::DTYPE {
            return Ok(());
        }
        Err(Error::DType { op: "read", expected: T::DTYPE.to_string(), found: self.dtype })
    }

    /// The elements.
    ///
    /// # Errors
    /// The tensor holds another type.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.check_dtype::<T>()?;
        Ok(bytemuck::cast_slice(self.bytes()?))
    }

    /// The elements, to write.
    ///
    /// # Errors
    /// The tensor holds another type, or its storage is shared.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        self.check_dtype::<T>()?;
        Ok(bytemuck::cast_slice_mut(self.bytes_mut()?))
    }

    /// The elements of a float tensor as f32: borrowed if they are, converted otherwise.
    pub fn to_f32(&self) -> Result<Cow<'_, [f32]>> {
        if self.dtype == DType::F32 {
            return Ok(Cow::Borrowed(self.as_slice()?));
        }
        let mut values = vec![0.0; self.numel()];
        self.read_f32(0, &mut values)?;
        Ok(Cow::Owned(values))
    }

    /// Converts the elements from flat index `start` on into `out`.
    ///
    /// # Errors
    /// The tensor does not hold floats, or has fewer elements.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<()> {
        if start.checked_add(out.len()).is_none_or(|end| end > self.numel()) {
            let what = format!("elements {start}..+{} of a tensor of {}", out.len(), self.numel());
            return Err(Error::shape("read_f32", what));
        }
        fn widen<T: Float>(values: &[T], out: &mut [f32]) {
            let one = |(out, &x): (&mut f32, &T)| *out = x.to_f32();
            if out.len() < PARALLEL_FROM {
                out.iter_mut().zip(values).for_each(one);
            } else {
                out.par_iter_mut().with_min_len(PARALLEL_FROM / 4).zip(values).for_each(one);
            }
        }
        let range = start..start + out.len();
        match self.dtype {
            DType::F32 => out.copy_from_slice(&self.as_slice()?[range]),
            DType::F16 => widen(&self.as_slice::<f16>()?[range], out),
            DType::BF16 => widen(&self.as_slice::<bf16>()?[range], out),
            found => return Err(Error::DType { op: "to_f32", expected: "float".into(), found }),
        }
        Ok(())
    }

    /// A copy in another float type (round to nearest even), counted under `tag`.
    pub fn cast(&self, dtype: DType, tag: Tag) -> Result<Self> {
        let mut out = Self::empty(&self.shape, dtype, self.device(), tag)?;
        fn narrow<T: Float>(values: &[f32], out: &mut [T]) {
            let one = |(out, &x): (&mut T, &f32)| *out = T::from_f32(x);
            if out.len() < PARALLEL_FROM {
                out.iter_mut().zip(values).for_each(one);
            } else {
                out.par_iter_mut().with_min_len(PARALLEL_FROM / 4).zip(values).for_each(one);
            }
        }
        match dtype {
            DType::F32 => self.read_f32(0, out.as_mut_slice()?)?,
            DType::F16 => narrow(&self.to_f32()?, out.as_mut_slice::<f16>()?),
            DType::BF16 => narrow(&self.to_f32()?, out.as_mut_slice::<bf16>()?),
            found => return Err(Error::DType { op: "cast", expected: "float".into(), found }),
        }
        Ok(out)
    }

    /// This tensor in `dtype`: itself if it has that type, a [`Tensor::cast`] otherwise.
    pub fn into_dtype(self, dtype: DType, tag: Tag) -> Result<Self> {
        if self.dtype == dtype { Ok(self) } else { self.cast(dtype, tag) }
    }

    /// A copy with its own storage.
    pub fn copy(&self, tag: Tag) -> Result<Self> {
        self.to_device(self.device(), tag)
    }

    /// The same elements under another shape; the storage is shared.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if shape.iter().product::<usize>() != self.numel() {
            return Err(Error::shape("reshape", format!("{:?} cannot become {shape:?}", self.shape)));
        }
        Ok(Tensor { shape: shape.to_vec(), ..self.clone() })
    }

    /// `count` entries of the outermost dimension from `start` on; the storage is shared.
    pub fn rows(&self, start: usize, count: usize) -> Result<Self> {
        let Some((&outer, inner)) = self.shape.split_first() else {
            return Err(Error::shape("rows", "a scalar has no rows"));
        };
        if start.checked_add(count).is_none_or(|end| end > outer) {
            return Err(Error::shape("rows", format!("rows {start}..+{count} of shape {:?}", self.shape)));
        }
        let stride: usize = inner.iter().product();
        let shape = std::iter::once(count).chain(inner.iter().copied()).collect();
        Ok(Tensor { shape, offset: self.offset + start * stride, ..self.clone() })
    }

    /// `count` elements in the order of memory from `start` on, as a vector; the storage is shared.
    pub fn elements(&self, start: usize, count: usize) -> Result<Self> {
        if start.checked_add(count).is_none_or(|end| end > self.numel()) {
            return Err(Error::shape("elements", format!("elements {start}..+{count} of shape {:?}", self.shape)));
        }
        let storage = Arc::clone(&self.storage);
        Ok(Tensor { storage, dtype: self.dtype, shape: vec![count], offset: self.offset + start })
    }

    /// Counts the storage under another tag, where this is its only tensor.
    pub fn retag(mut self, tag: Tag) -> Self {
        if let Some(storage) = Arc::get_mut(&mut self.storage) {
            storage.set_tag(tag);
        }
        self
    }

    /// Whether the storage belongs to the pager.
    pub(crate) fn is_paged(&self) -> bool {
        match &*self.storage {
            Storage::Host(_) => false,
            Storage::Page(_) => true,
            Storage::Cuda(buffer) => buffer.is_paged(),
        }
    }

    /// Whether no other tensor refers to the storage.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.storage) == 1
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {:?} on {})", self.dtype, self.shape, self.device())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn views_share_and_refuse_writes() {
        let mut tensor = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.], &[3, 2], Tag::Workspace).unwrap();
        let view = tensor.rows(1, 2).unwrap();
        assert_eq!(view.as_slice::<f32>().unwrap(), [3., 4., 5., 6.]);
        assert_eq!(view.reshape(&[4]).unwrap().rows(3, 1).unwrap().as_slice::<f32>().unwrap(), [6.]);
        assert!(matches!(tensor.as_mut_slice::<f32>(), Err(Error::Shared { .. })));
        drop(view);
        tensor.as_mut_slice::<f32>().unwrap()[0] = 9.0;
        assert_eq!(tensor.as_slice::<f32>().unwrap()[0], 9.0);
    }

    #[test]
    fn misuse_is_an_error() {
        let tensor = Tensor::from_slice(&[1u8, 2], &[2], Tag::Workspace).unwrap();
        assert!(tensor.as_slice::<f32>().is_err());
        assert!(tensor.to_f32().is_err());
        assert!(tensor.rows(1, 2).is_err());
        assert!(tensor.rows(usize::MAX, 2).is_err());
        assert!(tensor.reshape(&[3]).is_err());
        assert!(Tensor::from_bytes(&[0; 3], DType::F32, &[1], Tag::Workspace).is_err());
        assert!(Tensor::empty(&[usize::MAX, 4], DType::F32, Device::Cpu, Tag::Workspace).is_err());
    }

    proptest! {
        #[test]
        fn casts_round_to_nearest(values in prop::collection::vec(any::<f32>(), 0..300)) {
            let tensor = Tensor::from_slice(&values, &[values.len()], Tag::Workspace).unwrap();
            let halved = tensor.cast(DType::BF16, Tag::Workspace).unwrap();
            for (&x, &half) in values.iter().zip(halved.as_slice::<bf16>().unwrap()) {
                prop_assert!(half.to_bits() == bf16::from_f32(x).to_bits());
            }
            let back = halved.cast(DType::F32, Tag::Workspace).unwrap();
            prop_assert_eq!(back.cast(DType::BF16, Tag::Workspace).unwrap().bytes().unwrap().len(), 2 * values.len());
        }
    }
}
