//! Reverse-mode differentiation: a tape of nodes, each a [`Function`] with what it saved.
//!
//! The tape knows no operation, and holds for a node what its function says: its inputs, and what its forward pass saved.

use crate::{Error, Result, Tensor};

/// A differentiable operation with one output.
pub trait Function {
    /// What the backward pass needs besides the inputs.
    type Saved;
    /// Whether the tape holds the inputs for the backward pass, which gets none otherwise: what it needs of them is saved.
    const HOLDS_INPUTS: bool = true;

    /// The output, and what to save for the backward pass.
    fn forward(&self, inputs: &[Tensor]) -> Result<(Tensor, Self::Saved)>;

    /// The output alone, where no backward pass will follow.
    fn output(&self, inputs: &[Tensor]) -> Result<Tensor> {
        Ok(self.forward(inputs)?.0)
    }

    /// Gradients of the inputs, in their order, from the gradient of the output; `None` where there is none.
    /// Only entries of `wanted` need be computed.
    fn backward(
        &self,
        inputs: &[Tensor],
        saved: Self::Saved,
        grad: Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>>;
}

/// Names a trainable parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(pub usize);

/// Receives the gradients that a backward pass makes.
pub trait GradSink {
    /// Takes a gradient of parameter `id`; called once for each use of the parameter.
    fn parameter(&mut self, id: ParamId, grad: Tensor) -> Result<()>;
    /// Takes the gradients that one function made, in their order.
    fn parameters(&mut self, grads: Vec<(ParamId, Tensor)>) -> Result<()> {
        grads.into_iter().try_for_each(|(id, grad)| self.parameter(id, grad))
    }
    /// `into += grad`, for values that are used more than once.
    fn add(&mut self, into: Tensor, grad: Tensor) -> Result<Tensor>;
}

/// A value on the tape.
#[derive(Clone, Debug)]
pub struct Var {
    /// The value.
    pub value: Tensor,
    node: Option<usize>,
}

impl Var {
    /// A value through which no gradient flows.
    pub fn constant(value: Tensor) -> Self {
        Var { value, node: None }
    }
}

type Backward<'a> = Box<dyn FnOnce(Tensor) -> Result<Vec<Option<Tensor>>> + 'a>;

enum Node<'a> {
    Parameter(ParamId),
    /// A value whose gradient the caller reads after the backward pass.
    Input,
    Function {
        inputs: Vec<Option<usize>>,
        backward: Backward<'a>,
    },
}

/// The record of a forward pass.
pub struct Tape<'a> {
    nodes: Vec<Node<'a>>,
    recording: bool,
}

impl<'a> Tape<'a> {
    /// A tape that records, for training.
    pub fn new() -> Self {
        Tape { nodes: Vec::new(), recording: true }
    }

    /// A tape that records nothing: every saved value is dropped at once. For evaluation.
    pub fn inference() -> Self {
        Tape { nodes: Vec::new(), recording: false }
    }

    /// Whether a backward pass can follow.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    fn push(&mut self, value: Tensor, node: Node<'a>) -> Var {
        if !self.recording {
            return Var::constant(value);
        }
        self.nodes.push(node);
        Var { value, node: Some(self.nodes.len() - 1) }
    }

    /// A trainable parameter; its gradient goes to the sink.
    pub fn parameter(&mut self, id: ParamId, value: &Tensor) -> Var {
        self.push(value.clone(), Node::Parameter(id))
    }

    /// A value whose gradient [`Tape::backward`] returns.
    pub fn input(&mut self, value: Tensor) -> Var {
        self.push(value, Node::Input)
    }

    /// Runs `function` and records it.
    pub fn apply<F: Function + 'a>(&mut self, function: F, inputs: &[&Var]) -> Result<Var> {
        let mut values: Vec<Tensor> = inputs.iter().map(|var| var.value.clone()).collect();
        let nodes: Vec<Option<usize>> = inputs.iter().map(|var| var.node).collect();
        if !self.recording || nodes.iter().all(Option::is_none) {
            return Ok(Var::constant(function.output(&values)?));
        }
        let (output, saved) = function.forward(&values)?;
        if !F::HOLDS_INPUTS {
            values.clear();
        }
        let wanted: Vec<bool> = nodes.iter().map(Option::is_some).collect();
        let backward: Backward<'a> = Box::new(move |grad| function.backward(&values, saved, grad, &wanted));
        Ok(self.push(output, Node::Function { inputs: nodes, backward }))
    }

    /// Walks the tape backward from `output`, whose gradient is `grad`. Parameter gradients go to `sink`; the gradients
    /// of the tape's inputs are returned, in the order in which they were made. Each node is freed once it is done.
    pub fn backward(self, output: &Var, grad: Tensor, sink: &mut impl GradSink) -> Result<Vec<Option<Tensor>>> {
        let root = output.node.ok_or_else(|| Error::invalid("backward", "the output depends on nothing recorded"))?;
        let mut grads: Vec<Option<Tensor>> = vec![None; self.nodes.len()];
        let (mut of_inputs, mut of_parameters) = (Vec::new(), Vec::new());
        grads[root] = Some(grad);
        for (index, node) in self.nodes.into_iter().enumerate().rev() {
            let grad = grads[index].take();
            match (node, grad) {
                (Node::Input, grad) => of_inputs.push(grad),
                (_, None) => {}
                (Node::Parameter(id), Some(grad)) => of_parameters.push((id, grad)),
                (Node::Function { inputs, backward }, Some(grad)) => {
                    // None is held while the next function works.
                    sink.parameters(std::mem::take(&mut of_parameters))?;
                    for (input, grad) in inputs.into_iter().zip(backward(grad)?) {
                        let (Some(input), Some(grad)) = (input, grad) else { continue };
                        grads[input] = Some(match grads[input].take() {
                            None => grad,
                            Some(sum) => sink.add(sum, grad)?,
                        });
                    }
                }
            }
        }
        sink.parameters(of_parameters)?;
        of_inputs.reverse();
        Ok(of_inputs)
    }
}

impl Default for Tape<'_> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tag;
    use std::cell::Cell;

    /// Element-wise product of two vectors that counts how often its forward pass runs, and keeps its inputs by itself.
    struct Product<'a>(&'a Cell<usize>);

    fn vector(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, &[values.len()], Tag::Workspace).unwrap()
    }

    fn zip(a: &Tensor, b: &Tensor, f: impl Fn(f32, f32) -> f32) -> Tensor {
        let (a, b) = (a.as_slice::<f32>().unwrap(), b.as_slice::<f32>().unwrap());
        vector(&a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect::<Vec<_>>())
    }

    impl Function for Product<'_> {
        type Saved = Vec<Tensor>;
        const HOLDS_INPUTS: bool = false;
        fn forward(&self, inputs: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
            self.0.set(self.0.get() + 1);
            Ok((zip(&inputs[0], &inputs[1], |a, b| a * b), inputs.to_vec()))
        }
        fn backward(
            &self,
            held: &[Tensor],
            inputs: Vec<Tensor>,
            grad: Tensor,
            wanted: &[bool],
        ) -> Result<Vec<Option<Tensor>>> {
            assert!(held.is_empty());
            let of = |i: usize| wanted[i].then(|| zip(&grad, &inputs[1 - i], |g, x| g * x));
            Ok(vec![of(0), of(1)])
        }
    }

    /// Gradients of parameters, and how many came together.
    #[derive(Default)]
    struct Sum(Vec<(ParamId, Vec<f32>)>, Vec<usize>);

    impl GradSink for Sum {
        fn parameter(&mut self, id: ParamId, grad: Tensor) -> Result<()> {
            self.0.push((id, grad.as_slice::<f32>()?.to_vec()));
            Ok(())
        }
        fn parameters(&mut self, grads: Vec<(ParamId, Tensor)>) -> Result<()> {
            self.1.push(grads.len());
            grads.into_iter().try_for_each(|(id, grad)| self.parameter(id, grad))
        }
        fn add(&mut self, into: Tensor, grad: Tensor) -> Result<Tensor> {
            Ok(zip(&into, &grad, |a, b| a + b))
        }
    }

    /// y = (x·w)·x, so dy/dx = 2·w·x and dy/dw = x².
    #[test]
    fn gradients_add_up_over_uses() {
        let count = Cell::new(0);
        let mut tape = Tape::new();
        let x = tape.input(vector(&[2., 3.]));
        let w = tape.parameter(ParamId(5), &vector(&[10., 20.]));
        let xw = tape.apply(Product(&count), &[&x, &w]).unwrap();
        let y = tape.apply(Product(&count), &[&xw, &x]).unwrap();
        let mut sink = Sum::default();
        let grads = tape.backward(&y, vector(&[1., 1.]), &mut sink).unwrap();
        assert_eq!(grads[0].as_ref().unwrap().as_slice::<f32>().unwrap(), [40., 120.]);
        assert_eq!(sink.0, [(ParamId(5), vec![4., 9.])]);
        assert_eq!(count.get(), 2);
    }

    /// (v·w)·u: the last function's gradient goes to the sink before the next one is asked for its own.
    #[test]
    fn gradients_of_a_function_come_together() {
        let count = Cell::new(0);
        let mut tape = Tape::new();
        let [v, w] = [0, 1].map(|id| tape.parameter(ParamId(id), &vector(&[2.])));
        let vw = tape.apply(Product(&count), &[&v, &w]).unwrap();
        let u = tape.parameter(ParamId(2), &vector(&[3.]));
        let y = tape.apply(Product(&count), &[&vw, &u]).unwrap();
        let mut sink = Sum::default();
        tape.backward(&y, vector(&[1.]), &mut sink).unwrap();
        assert_eq!(sink.0, [(ParamId(2), vec![4.]), (ParamId(1), vec![6.]), (ParamId(0), vec![6.])]);
        assert_eq!(sink.1, [0, 1, 2]);
    }

    #[test]
    fn an_inference_tape_records_nothing() {
        let count = Cell::new(0);
        let mut tape = Tape::inference();
        let x = tape.input(vector(&[2.]));
        let y = tape.apply(Product(&count), &[&x, &x]).unwrap();
        assert_eq!(y.value.as_slice::<f32>().unwrap(), [4.]);
        assert!(tape.backward(&y, vector(&[1.]), &mut Sum::default()).is_err());
    }
}
