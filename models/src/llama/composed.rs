//! The layer composed of primitive tape operations: what the hand-written backward pass is tested against.

use super::{Layer, Linear, Magnitude, NormNode, Pass};
use nibble_kernels::{
    attention, dropout,
    dropout::Mask,
    elementwise::add_assign,
    linear::{Weight, forward, input_grad, weight_grad},
    rotary::{self, Direction},
    swiglu,
};
use nibble_runtime::{Function, Result, Tag, Tape, Tensor, Var};

/// `x·wᵀ` of two inputs.
struct Product;

impl Function for Product {
    type Saved = ();
    fn forward(&self, inputs: &[Tensor]) -> Result<(Tensor, ())> {
        Ok((forward(&inputs[0], &Weight::Dense(inputs[1].clone()), Tag::Activations)?, ()))
    }
    fn backward(&self, inputs: &[Tensor], (): (), grad: Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let dx = input_grad(&grad, &Weight::Dense(inputs[1].clone()), 1.0)?;
        Ok(vec![Some(dx), Some(weight_grad(&grad, &inputs[0], 1.0)?)])
    }
}

/// `x·Wᵀ` with a weight that does not train.
struct Frozen<'a>(&'a Weight);

impl Function for Frozen<'_> {
    type Saved = ();
    fn forward(&self, inputs: &[Tensor]) -> Result<(Tensor, ())> {
        Ok((forward(&inputs[0], self.0, Tag::Activations)?, ()))
    }
    fn backward(&self, _: &[Tensor], (): (), grad: Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(input_grad(&grad, self.0, 1.0)?)])
    }
}

/// `x·diag(m·inverse norms)`, the norms being constants. Inputs: `x` and `m`.
struct Lengths(Vec<f32>);

impl Lengths {
    fn each(&self, x: &Tensor, by: impl Fn(usize, f32) -> f32) -> Result<Tensor> {
        let values: Vec<f32> = x.to_f32()?.iter().enumerate().map(|(i, &x)| by(i, x)).collect();
        Tensor::from_slice(&values, x.shape(), Tag::Workspace)
    }
}

impl Function for Lengths {
    type Saved = ();
    fn forward(&self, inputs: &[Tensor]) -> Result<(Tensor, ())> {
        let (m, n) = (inputs[1].to_f32()?.into_owned(), self.0.len());
        Ok((self.each(&inputs[0], |i, x| x * m[i % n] * self.0[i % n])?, ()))
    }
    fn backward(&self, inputs: &[Tensor], (): (), grad: Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let (m, n) = (inputs[1].to_f32()?.into_owned(), self.0.len());
        let dx = self.each(&grad, |i, g| g * m[i % n] * self.0[i % n])?;
        let mut dm = vec![0.0; n];
        for (i, (g, x)) in grad.to_f32()?.iter().zip(inputs[0].to_f32()?.iter()).enumerate() {
            dm[i % n] += g * x * self.0[i % n];
        }
        Ok(vec![Some(dx), Some(Tensor::from_slice(&dm, &[n], Tag::Workspace)?)])
    }
}

/// `a + scale · b`.
struct AddScaled(f32);

impl AddScaled {
    fn scaled(&self, x: &Tensor) -> Result<Tensor> {
        let values: Vec<f32> = x.to_f32()?.iter().map(|x| x * self.0).collect();
        Tensor::from_slice(&values, x.shape(), Tag::Workspace)
    }
}

impl Function for AddScaled {
    type Saved = ();
    fn forward(&self, inputs: &[Tensor]) -> Result<(Tensor, ())> {
        let mut sum = self.scaled(&inputs[1])?;
        add_assign(&mut sum, &inputs[0])?;
        Ok((sum, ()))
    }
    fn backward(&self, _: &[Tensor], (): (), grad: Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(grad.clone()), Some(self.scaled(&grad)?)])
    }
}

struct Drop(Mask);

impl Function for Drop {
    type Saved = ();
    fn forward(&self, inputs: &[Tensor]) -> Result<(Tensor, ())> {
        Ok((dropout::apply(&inputs[0], self.0)?, ()))
    }
    fn backward(&self, _: &[Tensor], (): (), grad: Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(dropout::apply(&grad, self.0)?)])
    }
}

struct Turn<'a>(&'a Pass);

impl Function for Turn<'_> {
    type Saved = ();
    fn forward(&self, inputs: &[Tensor]) -> Result<(Tensor, ())> {
        Ok((rotary::apply(inputs[0].clone(), &self.0.positions, &self.0.rope, Direction::Forward)?, ()))
    }
    fn backward(&self, _: &[Tensor], (): (), grad: Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(rotary::apply(grad, &self.0.positions, &self.0.rope, Direction::Backward)?)])
    }
}

/// Attention of q, k, v.
struct Attend<'a>(&'a Pass);

impl Function for Attend<'_> {
    type Saved = (Tensor, Tensor);
    fn forward(&self, inputs: &[Tensor]) -> Result<(Tensor, Self::Saved)> {
        let (o, lse) = attention::forward(&inputs[0], &inputs[1], &inputs[2], self.0.heads, &self.0.layout)?;
        Ok((o.clone(), (o, lse)))
    }
    fn backward(&self, x: &[Tensor], (o, lse): Self::Saved, grad: Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let saved = attention::Saved { q: &x[0], k: &x[1], v: &x[2], o: &o, lse: &lse };
        let (dq, dk, dv) = attention::backward(&saved, &grad, self.0.heads, &self.0.layout, None)?;
        Ok(vec![Some(dq), Some(dk), Some(dv)])
    }
}

/// SwiGLU of gate and up.
struct Gated;

impl Function for Gated {
    type Saved = ();
    fn forward(&self, inputs: &[Tensor]) -> Result<(Tensor, ())> {
        Ok((swiglu::forward(&inputs[0], &inputs[1])?, ()))
    }
    fn backward(&self, inputs: &[Tensor], (): (), grad: Tensor, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let swiglu::Backward { gate: dgate, up: dup, .. } =
            swiglu::backward(inputs[0].clone(), inputs[1].clone(), grad)?;
        Ok(vec![Some(dgate), Some(dup)])
    }
}

fn linear<'a>(tape: &mut Tape<'a>, linear: &'a Linear, x: &Var, pass: &'a Pass) -> Result<Var> {
    let y = match (&linear.weight, linear.id) {
        (Weight::Dense(weight), Some(id)) => {
            let weight = tape.parameter(id, weight);
            tape.apply(Product, &[x, &weight])?
        }
        (weight, _) => tape.apply(Frozen(weight), &[x])?,
    };
    let Some(lora) = &linear.lora else { return Ok(y) };
    let mut dropped = x.clone();
    if let Some(mask) = pass.mask(lora.dropout, linear.index) {
        dropped = tape.apply(Drop(mask), &[x])?;
    }
    let [a, b] = [&lora.a, &lora.b].map(|param| tape.parameter(param.id.unwrap(), &param.value));
    let t = tape.apply(Product, &[&dropped, &a])?;
    let delta = tape.apply(Product, &[&t, &b])?;
    let z = tape.apply(AddScaled(lora.scale), &[&y, &delta])?;
    let Some(Magnitude { param, .. }) = &lora.magnitude else { return Ok(z) };
    let (weight, a, b) = (linear.dense()?, lora.a.value.to_f32()?, lora.b.value.to_f32()?);
    let (w, k, r) = (weight.to_f32()?, weight.shape()[1], a.len() / weight.shape()[1]);
    let inverse = |n: usize| {
        let v = |k0: usize| w[n * k + k0] + lora.scale * (0..r).map(|r0| b[n * r + r0] * a[r0 * k + k0]).sum::<f32>();
        (0..k).map(|k0| v(k0) * v(k0)).sum::<f32>().sqrt().recip()
    };
    let m = tape.parameter(param.id.unwrap(), &param.value);
    tape.apply(Lengths((0..weight.shape()[0]).map(inverse).collect()), &[&z, &m])
}

/// The output of `layer` for `x`, through primitive nodes.
pub(super) fn layer<'a>(tape: &mut Tape<'a>, layer: &'a Layer, x: &Var, pass: &'a Pass) -> Result<Var> {
    let norm = |tape: &mut Tape<'a>, x: &Var, param: &'a super::Param| {
        let weight = match param.id {
            Some(id) => tape.parameter(id, &param.value),
            None => Var::constant(param.value.clone()),
        };
        tape.apply(NormNode { eps: layer.eps }, &[x, &weight])
    };
    let n1 = norm(tape, x, &layer.input_norm)?;
    let q = linear(tape, &layer.q, &n1, pass)?;
    let k = linear(tape, &layer.k, &n1, pass)?;
    let v = linear(tape, &layer.v, &n1, pass)?;
    let q = tape.apply(Turn(pass), &[&q])?;
    let k = tape.apply(Turn(pass), &[&k])?;
    let o = tape.apply(Attend(pass), &[&q, &k, &v])?;
    let o = linear(tape, &layer.o, &o, pass)?;
    let h = tape.apply(AddScaled(1.0), &[x, &o])?;
    let n2 = norm(tape, &h, &layer.post_norm)?;
    let gate = linear(tape, &layer.gate, &n2, pass)?;
    let up = linear(tape, &layer.up, &n2, pass)?;
    let a = tape.apply(Gated, &[&gate, &up])?;
    let down = linear(tape, &layer.down, &a, pass)?;
    tape.apply(AddScaled(1.0), &[&h, &down])
}
