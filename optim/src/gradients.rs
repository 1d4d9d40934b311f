//! Accumulated gradients: a sink of the backward pass.

use nibble_kernels::{cast::cast, elementwise::add_assign, norm::Clip};
use nibble_runtime::{DType, Error, GradSink, ParamId, Result, Tag, Tensor};
use std::collections::BTreeMap;

/// The f32 gradients of the trainable parameters, summed over the backward passes since the last [`Gradients::clear`].
/// Memory is counted as [`Tag::Gradients`].
#[derive(Debug, Default)]
pub struct Gradients {
    sums: BTreeMap<ParamId, Tensor>,
}

impl Gradients {
    /// No gradients yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The gradient of a parameter, f32, if it has one.
    pub fn get(&self, id: ParamId) -> Option<&Tensor> {
        self.sums.get(&id)
    }

    /// All gradients in the order of their parameters.
    pub fn iter(&self) -> impl Iterator<Item = (ParamId, &Tensor)> {
        self.sums.iter().map(|(&id, grad)| (id, grad))
    }

    /// Number of parameters that have a gradient.
    pub fn len(&self) -> usize {
        self.sums.len()
    }

    /// Whether no parameter has a gradient.
    pub fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }

    /// Drops all gradients.
    pub fn clear(&mut self) {
        self.sums.clear();
    }

    /// What the gradients, which carry `loss_scale`, say about the update: see [`Clip::new`].
    ///
    /// # Errors
    /// There are none.
    pub fn clip(&self, max_norm: f64, loss_scale: f32) -> Result<Clip> {
        Clip::new(&self.sums.values().collect::<Vec<_>>(), max_norm, loss_scale)
    }
}

impl GradSink for Gradients {
    fn parameter(&mut self, id: ParamId, grad: Tensor) -> Result<()> {
        if let Some(sum) = self.sums.get_mut(&id) {
            return add_assign(sum, &grad);
        }
        let sum = match (grad.dtype(), grad.is_unique()) {
            (DType::F32, true) => grad.retag(Tag::Gradients),
            (DType::F32, false) => grad.copy(Tag::Gradients)?,
            (DType::F16 | DType::BF16, _) => cast(&grad, DType::F32, Tag::Gradients)?,
            (found, _) => return Err(Error::DType { op: "gradients", expected: "float".into(), found }),
        };
        self.sums.insert(id, sum);
        Ok(())
    }

    fn add(&mut self, mut into: Tensor, mut grad: Tensor) -> Result<Tensor> {
        if !into.is_unique() {
            if grad.is_unique() && grad.dtype() == into.dtype() {
                std::mem::swap(&mut into, &mut grad);
            } else {
                into = into.copy(Tag::Workspace)?;
            }
        }
        add_assign(&mut into, &grad)?;
        Ok(into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, &[values.len()], Tag::Workspace).unwrap()
    }

    fn values(tensor: &Tensor) -> &[f32] {
        tensor.as_slice().unwrap()
    }

    #[test]
    fn the_first_gradient_is_taken_over_and_the_next_are_added_in_place() {
        let mut grads = Gradients::new();
        let first = tensor(&[1.0, 2.0]);
        let address = first.bytes().unwrap().as_ptr();
        grads.parameter(ParamId(3), first).unwrap();
        let halves = tensor(&[0.5, -4.0]).cast(DType::BF16, Tag::Workspace).unwrap();
        grads.parameter(ParamId(3), halves).unwrap();
        let sum = grads.get(ParamId(3)).unwrap();
        assert_eq!((values(sum), sum.bytes().unwrap().as_ptr()), (&[1.5, -2.0][..], address));
        assert!(grads.parameter(ParamId(3), tensor(&[1.0])).is_err());
        assert!(grads.parameter(ParamId(4), Tensor::from_slice(&[1u8], &[1], Tag::Workspace).unwrap()).is_err());
        assert_eq!(grads.len(), 1);
        grads.clear();
        assert!(grads.is_empty() && grads.get(ParamId(3)).is_none());
    }

    #[test]
    fn a_tensor_that_others_see_is_never_written() {
        let mut grads = Gradients::new();
        let seen = tensor(&[1.0, 2.0]);
        grads.parameter(ParamId(0), seen.clone()).unwrap();
        grads.parameter(ParamId(0), tensor(&[1.0, 1.0])).unwrap();
        assert_eq!(values(grads.get(ParamId(0)).unwrap()), [2.0, 3.0]);
        for (a, b) in [(seen.clone(), tensor(&[5.0, 5.0])), (tensor(&[5.0, 5.0]), seen.clone())] {
            assert_eq!(values(&grads.add(a, b).unwrap()), [6.0, 7.0]);
        }
        assert_eq!(values(&grads.add(seen.clone(), seen.clone()).unwrap()), [2.0, 4.0]);
        assert_eq!(values(&seen), [1.0, 2.0]);
    }

    proptest! {
        #[test]
        fn the_norm_is_that_of_the_sums(
            passes in prop::collection::vec(prop::collection::vec(-2f32..2.0, 60), 1..4), max_norm in 0.01f64..10.0,
        ) {
            let mut grads = Gradients::new();
            let mut sums = vec![0.0; 60];
            for pass in &passes {
                for (id, part) in [(2, 0..7), (0, 7..10), (1, 10..60)] {
                    grads.parameter(ParamId(id), tensor(&pass[part])).unwrap();
                }
                sums.iter_mut().zip(pass).for_each(|(sum, x)| *sum += x);
            }
            let exact = sums.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
            let found = grads.clip(max_norm, 1.0).unwrap().read().unwrap();
            prop_assert!(found.gradients_finite && (found.norm - exact).abs() <= 1e-6 * exact);
            let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
            prop_assert_eq!(alone.install(|| grads.clip(max_norm, 1.0)).unwrap().read().unwrap(), found);
        }
    }
}
