//! Launch of gathering rows and of summing their gradients.

use crate::{
    cast::cuda::code,
    cuda::{entry, size},
};
use nibble_runtime::{
    DType, Device, Result, Tag, Tensor,
    cuda::{Args, Entry, Gpu, Module},
};

pub(crate) static MODULE: Module = Module {
    name: "embedding",
    ptx: include_str!("../../ptx/embedding.ptx"),
    entries: &[
        Entry { name: "embedding_forward", floats: true, params: &[8, 8, 4, 8, 4, 4] },
        Entry { name: "embedding_backward", floats: true, params: &[8, 8, 8, 8, 8, 4] },
    ],
};

/// Host numbers as a tensor on `device`.
pub(crate) fn upload(values: &[i32], device: Device) -> Result<Tensor> {
    Tensor::from_slice(values, &[values.len()], Tag::Workspace)?.to_device(device, Tag::Workspace)
}

/// Rows of `table` `[V, D]`, of any float type, for `ids` i32 `[T]` on the same device: `[T, D]` in `dtype`. The caller has
/// checked the ids; one outside of the table gives a row of NaN.
pub(crate) fn gather(ids: &Tensor, table: &Tensor, dtype: DType, tag: Tag) -> Result<Tensor> {
    let op = "embedding";
    let ((vocab, width), tokens) = (table.dims2(op)?, ids.numel());
    let mut out = Tensor::empty(&[tokens, width], dtype, table.device(), tag)?;
    let args = Args::new().input(ids).input(table).u32(code(table.dtype())?).output(&mut out);
    // Of the table a row a token.
    let args = args.moves(ids.size_bytes() + tokens * width * (table.dtype().size() + dtype.size()));
    let args = args.u32(size(op, vocab)?).u32(size(op, width)?);
    let grid = [size(op, tokens)?, 1, 1];
    Gpu::of(table.device())?.launch(&MODULE, &entry("embedding_forward", dtype)?, grid, [128, 1, 1], 0, args)?;
    Ok(out)
}

/// Tokens by id: the distinct ids, where the tokens of each start, and the tokens, those of one id in their order.
fn by_id(ids: &[i32]) -> (Vec<i32>, Vec<i32>, Vec<i32>) {
    let mut tokens: Vec<i32> = (0..ids.len() as i32).collect();
    tokens.sort_by_key(|&token| ids[token as usize]);
    let (mut distinct, mut starts) = (Vec::new(), Vec::new());
    for (start, &token) in tokens.iter().enumerate() {
        let id = ids[token as usize];
        if distinct.last() != Some(&id) {
            distinct.push(id);
            starts.push(start as i32);
        }
    }
    starts.push(tokens.len() as i32);
    (distinct, starts, tokens)
}

/// Gradient of the table, f32 `[vocab, D]`; ids were checked.
pub(super) fn backward(ids: &[i32], grad: &Tensor, vocab: usize) -> Result<Tensor> {
    let op = "embedding backward";
    let (device, (tokens, width)) = (grad.device(), grad.dims2(op)?);
    size(op, tokens)?;
    let mut table = Tensor::zeros(&[vocab, width], DType::F32, device, Tag::Gradients)?;
    let (distinct, starts, tokens) = by_id(ids);
    let columns = size(op, (width * grad.dtype().size()).div_ceil(128 * 16))?;
    let grid = [size(op, distinct.len())?, columns.min(65_535), 1];
    let (distinct, starts, tokens) = (upload(&distinct, device)?, upload(&starts, device)?, upload(&tokens, device)?);
    let args = Args::new().input(&distinct).input(&starts).input(&tokens).input(grad).output(&mut table);
    let args = args.u32(size(op, width)?);
    Gpu::of(device)?.launch(&MODULE, &entry("embedding_backward", grad.dtype())?, grid, [128, 1, 1], 0, args)?;
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_an_id_keep_their_order() {
        let (distinct, starts, tokens) = by_id(&[7, 2, 7, 0, 2, 7]);
        assert_eq!((distinct, starts), (vec![0, 2, 7], vec![0, 1, 3, 6]));
        assert_eq!(tokens, [3, 1, 4, 0, 2, 5]);
        assert_eq!(by_id(&[]), (vec![], vec![0], vec![]));
    }
}
