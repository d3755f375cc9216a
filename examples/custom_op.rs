//! A new op with its own gradient: compute the value, record it with a backward rule, and check the rule numerically.
//!
//!     cargo run --release --example custom_op
//!
//! The op is the snake activation with a learned frequency, `y = x + sin²(a x) / a` (Ziyin et al.,
//! <https://arxiv.org/abs/2006.08195>). Its gradients are `dy/dx = 1 + sin(2 a x)` and
//! `dy/da = (x sin(2 a x) - sin²(a x) / a) / a`.

use x_transformers::{Backward, Device, Error, Gradcheck, InputGrads, Philox, Result, Tape, Tensor, gradcheck, record};

/// `x + sin²(a x) / a` for `x` of any shape and `a` of one element.
fn snake(x: &Tensor, a: &Tensor) -> Result<Tensor> {
    let frequency = a.item()?;
    if frequency == 0.0 {
        return Err(Error::Argument { op: "snake", message: "the frequency must not be 0".into() });
    }
    let y = each(x, |x| x + (frequency * x).sin().powi(2) / frequency)?;
    // Outside of a tape the closure does not run, and nothing is saved.
    record("snake", y, &[x, a], |_| SnakeBackward { x: x.detach(), a: a.detach() })
}

/// What the backward pass needs: the two inputs.
struct SnakeBackward {
    x: Tensor,
    a: Tensor,
}

impl Backward for SnakeBackward {
    fn name(&self) -> &'static str {
        "snake"
    }

    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let a = self.a.item()?;
        let dx = if need[0] { Some(grad.mul(&each(&self.x, |x| 1.0 + (2.0 * a * x).sin())?)?) } else { None };
        let da = if need[1] {
            let slope = each(&self.x, |x| (x * (2.0 * a * x).sin() - (a * x).sin().powi(2) / a) / a)?;
            Some(grad.mul(&slope)?.sum(&[])?.reshape(*self.a.shape())?)
        } else {
            None
        };
        Ok(InputGrads::whole([dx, da]))
    }
}

/// Applies a function to every element.
fn each(x: &Tensor, f: impl Fn(f64) -> f64) -> Result<Tensor> {
    let values = x.to_f64_vec()?;
    Tensor::generate(*x.shape(), x.dtype(), x.device(), |i| f(values[i]))
}

fn main() -> Result<()> {
    let device = Device::Cpu;
    let random = Philox::new(7, 0);
    let x = Tensor::generate([4, 5], x_transformers::DType::F64, &device, |i| random.normal(i as u64))?;
    let a = Tensor::from_slice(&[1.5f64], [1], &device)?;

    // The backward rule against differences of the forward pass.
    let report = gradcheck(|inputs| snake(&inputs[0], &inputs[1]), &[x.clone(), a.clone()], Gradcheck::default())?;
    print!("{report}");
    if !report.passed() {
        return Err(Error::Argument { op: "snake", message: "the gradient is wrong".into() });
    }

    // In use: find the frequency that made some data.
    let target = snake(&x, &a)?;
    let mut guess = 1.0f64;
    for step in 0..=60 {
        let a = Tensor::from_slice(&[guess], [1], &device)?.requires_grad()?;
        let mut tape = Tape::grad();
        let loss = snake(&x, &a)?.sub(&target)?.square()?.mean(&[])?;
        let grads = tape.backward(&loss)?;
        if step % 20 == 0 {
            println!("step {step:2}: frequency {guess:.4}, loss {:.2e}", loss.item()?);
        }
        guess -= 0.5 * grads.get(&a).map_or(Ok(0.0), Tensor::item)?;
    }
    Ok(())
}
