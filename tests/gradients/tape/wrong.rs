//! Rules that give wrong gradients are named.

use super::*;

#[test]
fn wrong_gradients_are_named() -> Result<()> {
    let refused = |give: fn(Tensor) -> Result<InputGrads>| {
        let x = grid(2, 3).requires_grad().unwrap();
        let mut tape = Tape::grad();
        // Below a view, so that a wrong gradient would be passed on before a leaf could notice.
        let y = giving(&x.transpose(0, 1).unwrap(), give).unwrap().sum(&[]).unwrap();
        let message = tape.backward(&y).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("giving"), "{message}");
        message
    };
    let message = refused(|_| Tensor::zeros([2, 2], DType::F64, device()).map(InputGrads::one));
    assert!(message.contains("[2, 2]") && message.contains("[3, 2]"), "{message}");
    let message = refused(|_| Tensor::zeros([3, 2], DType::F32, device()).map(InputGrads::one));
    assert!(message.contains("f32") && message.contains("f64"), "{message}");
    let message = refused(|grad| Ok(InputGrads::whole([Some(grad.clone()), Some(grad)])));
    assert!(message.contains("2 gradients for 1 input"), "{message}");
    for part in [
        GradSlice { dim: 2, start: 0, len: 1 },
        GradSlice { dim: 0, start: 3, len: 1 },
        GradSlice { dim: 1, start: usize::MAX, len: 2 },
        GradSlice { dim: 0, start: 0, len: 2 },
    ] {
        // The value has one row; the last part asks for two.
        let x = grid(3, 2).requires_grad()?;
        let mut tape = Tape::grad();
        let y = giving(&x, move |grad| {
            let value = grad.narrow(0, 0, 1)?;
            Ok(InputGrads::new(vec![InputGrad::Slice { shape: *grad.shape(), part, value }]))
        })?;
        assert!(tape.backward(&y.sum(&[])?).is_err(), "{part:?}");
    }
    Ok(())
}

/// A sum that a rule has taken over comes back as a gradient of the same kind, or names the op.
#[test]
fn wrong_sums_are_named() -> Result<()> {
    struct Sum(Option<Tensor>);
    impl Backward for Sum {
        fn name(&self) -> &'static str {
            "sum_of_mine"
        }
        fn backward(self: Box<Self>, _grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
            Ok(InputGrads::new(vec![InputGrad::None]))
        }
        fn accumulate_into(&mut self, _sum: Tensor) -> Option<Tensor> {
            self.0.take()
        }
    }
    let (x, saved) = (grid(2, 3).requires_grad()?, leaf(&[0.0; 6]).reshape([2, 3])?);
    let gradient = |returned: Option<Tensor>| -> Result<_> {
        let mut tape = Tape::grad();
        let y = square(&x)?;
        let other = record("sum_of_mine", y.detach(), &[&y], |_| Sum(returned))?;
        // The first of them backwards is the one that gives `y` a gradient.
        let loss = sum_of(&other, &square(&y)?)?.sum(&[])?;
        tape.backward(&loss)
    };
    let zeros = |shape: &[usize], dtype| Tensor::zeros(Shape::new(shape)?, dtype, device());
    for wrong in [zeros(&[1], DType::F64)?, zeros(&[3, 2], DType::F64)?, zeros(&[2, 3], DType::F32)?] {
        let message = gradient(Some(wrong.clone())).unwrap_err().to_string();
        let expected =
            format!("sum_of_mine: its accumulate_into returned a gradient {:?} {}", wrong.shape(), wrong.dtype());
        assert!(message.starts_with(&expected) && message.contains("[2, 3] f64"), "{message}");
    }
    // A rule may keep the sum, or return something that is not a constant.
    assert!(gradient(None)?.get(&x).is_none());
    assert_eq!(values(gradient(Some(saved))?.get(&x).unwrap()), [0.0; 6]);
    Ok(())
}

/// Gradients are on the device of their tensors. The CPU is a single device, with nothing to mix up.
#[test]
fn gradients_of_other_devices_are_named() -> Result<()> {
    let other = Device::Cpu;
    if *device() == other {
        return Ok(());
    }
    let x = grid(2, 3).requires_grad()?;
    let elsewhere = Tensor::ones([2, 3], DType::F64, &other)?;
    let refused = |result: Result<_>, op: &str| {
        let message = result.map(|_: x_transformers::Gradients| ()).unwrap_err().to_string();
        assert!(message.starts_with(op) && message.contains("cpu") && message.contains("cuda"), "{message}");
    };
    let mut tape = Tape::grad();
    let y = x.exp()?;
    refused(tape.backward_with(&y, &elsewhere), "backward: ");
    let given = elsewhere.clone();
    refused(tape.backward(&giving(&y, move |_| Ok(InputGrads::one(given.clone())))?.sum(&[])?), "giving: ");
    let mut tape = Tape::grad();
    let part = move |grad: Tensor| {
        let value = Tensor::ones([1, 3], DType::F64, &Device::Cpu)?;
        let part = GradSlice { dim: 0, start: 0, len: 1 };
        Ok(InputGrads::new(vec![InputGrad::Slice { shape: *grad.shape(), part, value }]))
    };
    refused(tape.backward(&giving(&x.exp()?, part)?.sum(&[])?), "giving: ");
    Ok(())
}

#[test]
fn a_rule_without_a_gradient_ends_its_branch() -> Result<()> {
    let (x, y) = (leaf(&[1.0]), leaf(&[2.0]));
    let mut tape = Tape::grad();
    let z = Tensor::cat(&[&giving(&square(&x)?, |_| Ok(InputGrads::new(vec![InputGrad::None])))?, &y], 0)?;
    let grads = tape.backward(&z.sum(&[])?)?;
    assert!(grads.get(&x).is_none());
    assert_eq!(values(grads.get(&y).unwrap()), [1.0]);
    Ok(())
}
