//! Use of pages: as long as a lease lives they do not move.

use super::Pager;
use crate::{DType, Device, Error, Result, Tensor};
use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

/// Pages in use. Views of them are tensors; each keeps the lease.
pub struct Lease {
    pager: Pager,
    pages: Range<usize>,
    address: u64,
    bytes: usize,
    device: Device,
    /// Bytes that views were made of, by their start. No two views overlap, so that each may be written.
    taken: Mutex<BTreeMap<usize, usize>>,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease(pages {:?})", self.pages)
    }
}

impl Lease {
    pub(super) fn new(pager: Pager, pages: Range<usize>, address: u64, bytes: usize, device: Device) -> Self {
        Lease { pager, pages, address, bytes, device, taken: Mutex::default() }
    }

    /// A view of the bytes from `offset` on as a tensor, on the device that computes on the pages.
    ///
    /// # Errors
    /// The bytes are not all in the page, are not aligned for the type, or another view was made of some of them.
    pub fn tensor(self: &Arc<Self>, offset: usize, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        Self::view(self, self.device, self.address, offset, dtype, shape)
    }

    pub(super) fn view(
        lease: &Arc<Lease>,
        device: Device,
        address: u64,
        offset: usize,
        dtype: DType,
        shape: &[usize],
    ) -> Result<Tensor> {
        let bytes = shape.iter().try_fold(dtype.size(), |bytes, &dim| bytes.checked_mul(dim));
        let end = bytes.and_then(|bytes| offset.checked_add(bytes));
        let (Some(bytes), Some(end)) = (bytes, end) else {
            return Err(Error::shape("page", format!("{dtype} {shape:?} is larger than memory")));
        };
        if end > lease.bytes || !offset.is_multiple_of(dtype.size()) {
            return Err(Error::shape("page", format!("{dtype} {shape:?} at byte {offset} does not fit the page")));
        }
        let mut taken = lease.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let before = taken.range(..end).next_back();
        if bytes > 0 && before.is_some_and(|(_, &taken)| taken > offset) {
            return Err(Error::Shared { op: "page" });
        }
        if bytes > 0 {
            taken.insert(offset, end);
        }
        drop(taken);
        // SAFETY: the bytes lie in pages that stay where they are while the lease lives, which the tensor keeps; they are
        // at an address of `device`, hold initialized bytes (fresh pages are zeros), are aligned (pages are, to more than
        // any type, and the offset was checked), and no other view has any of them.
        unsafe { Tensor::in_pages(lease, device, address + offset as u64, bytes, dtype, shape) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.pager.unpin(self.pages.clone());
    }
}
