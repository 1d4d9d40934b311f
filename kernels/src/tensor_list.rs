//! Tables of many tensors, for kernels that work on all of them in one launch (`tensor_list.cuh`).

use crate::cuda::size;
use nibble_runtime::{DType, Device, Result, Tag, Tensor, cuda::Stream};

/// A table under construction: entries of 64-bit and 32-bit words, each with the number of its first piece.
pub(crate) struct TensorList {
    bytes: Vec<u8>,
    count: u32,
    pieces: u32,
    piece: usize,
}

impl TensorList {
    /// An empty table whose tensors are cut into pieces of `piece` elements.
    pub(crate) fn new(piece: usize) -> Self {
        TensorList { bytes: Vec::new(), count: 0, pieces: 0, piece }
    }

    /// Appends a tensor of `numel` elements: its pointers (or 0), `numel`, the number of its first piece, and `flags`.
    /// One without elements is left out.
    pub(crate) fn push(&mut self, pointers: &[u64], numel: usize, flags: u32) -> Result<()> {
        if numel == 0 {
            return Ok(());
        }
        for word in pointers.iter().copied().chain([numel as u64]) {
            self.bytes.extend(word.to_le_bytes());
        }
        for word in [self.pieces, flags] {
            self.bytes.extend(word.to_le_bytes());
        }
        self.count += 1;
        self.pieces = size("tensor list", self.pieces as usize + numel.div_ceil(self.piece))?;
        Ok(())
    }

    /// Tensors in the table.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Pieces of all tensors: the blocks to launch.
    pub(crate) fn pieces(&self) -> u32 {
        self.pieces
    }

    /// The table's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The table on the device, for a stream (`None`: the compute stream; else it is kept until that one is done).
    pub(crate) fn upload(&self, device: Device, stream: Option<Stream>) -> Result<Tensor> {
        let (bytes, shape) = (&self.bytes, [self.bytes.len()]);
        Tensor::from_bytes_for(stream, bytes, DType::U8, &shape, device, Tag::Workspace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_those_of_one_launch() {
        let mut list = TensorList::new(4096);
        list.push(&[0], 4097, 0).unwrap();
        list.push(&[0], 0, 0).unwrap();
        assert_eq!((list.count(), list.pieces()), (1, 2));
        assert!(list.push(&[0], 1 << 43, 0).is_err(), "2^31 pieces");
    }
}
