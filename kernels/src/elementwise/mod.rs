//! Element-wise sums.

mod cpu;

use nibble_runtime::{Device, Error, Result, Tensor};

/// `into += x`, element by element, added in f32 and rounded to the type of `into`. Overwrites `into`.
///
/// # Errors
/// The shapes differ, one of the tensors does not hold floats, or the storage of `into` is shared.
pub fn add_assign(into: &mut Tensor, x: &Tensor) -> Result<()> {
    let op = "add_assign";
    if into.shape() != x.shape() {
        return Err(Error::shape(op, format!("cannot add shape {:?} to shape {:?}", x.shape(), into.shape())));
    }
    match into.device() {
        Device::Cpu => cpu::add_assign(into, x),
        device => Err(Error::NoKernel { op, device }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nibble_runtime::{DType, Tag};
    use proptest::prelude::*;

    fn tensor(values: &[f32], dtype: DType) -> Tensor {
        Tensor::from_slice(values, &[values.len()], Tag::Workspace).unwrap().cast(dtype, Tag::Workspace).unwrap()
    }

    #[test]
    fn misuse_is_an_error() {
        let mut into = tensor(&[1.0; 6], DType::F32);
        assert!(add_assign(&mut into, &tensor(&[1.0; 5], DType::F32)).is_err());
        assert!(add_assign(&mut into, &tensor(&[1.0; 6], DType::F32).reshape(&[2, 3]).unwrap()).is_err());
        assert!(add_assign(&mut into, &Tensor::from_slice(&[0u8; 6], &[6], Tag::Workspace).unwrap()).is_err());
        let shared = into.clone();
        assert!(matches!(add_assign(&mut into, &shared), Err(Error::Shared { .. })));
        assert_eq!(shared.as_slice::<f32>().unwrap(), [1.0; 6]);
    }

    proptest! {
        #[test]
        fn rounds_the_f32_sum_once(
            pairs in prop::collection::vec((-1e3f32..1e3, -1e3f32..1e3), 0..200),
            (of_into, of_x) in (0usize..3, 0usize..3),
            repeat in prop_oneof![Just(1usize), Just(1000)],
        ) {
            let dtypes = [DType::F32, DType::F16, DType::BF16];
            let column = |pick: fn(&(f32, f32)) -> f32| pairs.iter().map(pick).collect::<Vec<_>>().repeat(repeat);
            let (a, b) = (tensor(&column(|p| p.0), dtypes[of_into]), tensor(&column(|p| p.1), dtypes[of_x]));
            let sums: Vec<f32> = a.to_f32().unwrap().iter().zip(&*b.to_f32().unwrap()).map(|(a, b)| a + b).collect();
            let mut into = a.copy(Tag::Workspace).unwrap();
            add_assign(&mut into, &b).unwrap();
            prop_assert!(into.bytes() == tensor(&sums, dtypes[of_into]).bytes());
        }
    }
}
