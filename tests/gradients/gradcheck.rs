//! The numeric gradient check must find errors and say where they are.

use x_transformers::{
    Backward, DType, Device, Error, ErrorKind, Gradcheck, InputGrads, QuantType, Result, Tape, Tensor, gradcheck,
    ops::PackedMatrix, record,
};

const CPU: Device = Device::Cpu;

fn input(shape: &[usize]) -> Tensor {
    Tensor::generate(shape, DType::F64, &CPU, |i| (i as f64 * 1.3).sin() + 0.1).unwrap()
}

/// `a² + 3b`, with a backward that `spoil` may change: it gets the right gradients of `a` and `b`.
fn spoiled(a: &Tensor, b: &Tensor, spoil: fn(&mut Vec<f64>, &mut Vec<f64>)) -> Result<Tensor> {
    struct Spoiled {
        a: Tensor,
        spoil: fn(&mut Vec<f64>, &mut Vec<f64>),
    }
    impl Backward for Spoiled {
        fn name(&self) -> &'static str {
            "spoiled"
        }
        fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
            let (a, g) = (self.a.to_f64_vec()?, grad.to_f64_vec()?);
            let mut for_a: Vec<f64> = a.iter().zip(&g).map(|(a, g)| 2.0 * a * g).collect();
            let mut for_b: Vec<f64> = g.iter().map(|g| 3.0 * g).collect();
            (self.spoil)(&mut for_a, &mut for_b);
            let tensor = |values: &[f64]| Tensor::from_slice(values, *self.a.shape(), &CPU);
            Ok(InputGrads::whole([Some(tensor(&for_a)?), Some(tensor(&for_b)?)]))
        }
    }
    let values: Vec<f64> = a.to_f64_vec()?.iter().zip(b.to_f64_vec()?).map(|(a, b)| a * a + 3.0 * b).collect();
    let (saved, output) = (a.detach(), Tensor::from_slice(&values, *a.shape(), &CPU)?);
    record("spoiled", output, &[a, b], |_| Spoiled { a: saved, spoil })
}

#[test]
fn a_correct_backward_passes() -> Result<()> {
    let report =
        gradcheck(|x| spoiled(&x[0], &x[1], |_, _| {}), &[input(&[3, 4]), input(&[3, 4])], Gradcheck::default())?;
    assert!(report.passed(), "{report}");
    assert_eq!(report.inputs.len(), 2);
    assert!(report.inputs.iter().all(|input| input.checked == 12 && input.error < 1e-10));
    Ok(())
}

#[test]
fn a_wrong_backward_is_found_where_it_is() -> Result<()> {
    type Spoil = fn(&mut Vec<f64>, &mut Vec<f64>);
    let spoils: [(Spoil, usize, Option<usize>); 7] = [
        (|_, b| b[5] += 1e-3, 1, Some(5)),
        (|a, _| a[11] += 1e-5, 0, Some(11)),
        (|a, _| a[0] = f64::NAN, 0, Some(0)),
        (|_, b| b[7] = f64::INFINITY, 1, None),
        (|a, _| a.iter_mut().for_each(|a| *a *= 1.001), 0, None),
        (|_, b| b.fill(0.0), 1, None),
        (|a, _| a.rotate_left(1), 0, None),
    ];
    for (index, (spoil, at_input, at_element)) in spoils.into_iter().enumerate() {
        let inputs = [input(&[3, 4]), input(&[3, 4])];
        let report = gradcheck(|x| spoiled(&x[0], &x[1], spoil), &inputs, Gradcheck::default())?;
        assert!(!report.passed(), "spoil {index} was not found\n{report}");
        for (position, input) in report.inputs.iter().enumerate() {
            let wrong = !(input.error <= report.tolerance);
            assert_eq!(wrong, position == at_input, "spoil {index}\n{report}");
        }
        if let Some(element) = at_element {
            assert_eq!(report.inputs[at_input].worst, element, "spoil {index}\n{report}");
        }
    }
    Ok(())
}

#[test]
fn the_report_reads_well() -> Result<()> {
    let inputs = [input(&[3, 4]), input(&[3, 4])];
    let report = gradcheck(|x| spoiled(&x[0], &x[1], |_, b| b[5] += 1.0), &inputs, Gradcheck::default())?;
    let text = report.to_string();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(lines[0].starts_with("ok   input 0: error "), "{text}");
    assert!(
        lines[1].starts_with("FAIL input 1: error ") && lines[1].contains("over 12 elements; worst at 5:"),
        "{text}"
    );
    let (backward, differences) = (report.inputs[1].analytic, report.inputs[1].numeric);
    assert!((backward - differences - 1.0).abs() < 1e-9, "{text}");
    assert!(lines[1].contains(&format!("backward {backward:.10e}, differences {differences:.10e}")), "{text}");
    Ok(())
}

#[test]
fn a_gradient_of_another_shape_is_an_error() {
    struct Misshapen;
    impl Backward for Misshapen {
        fn name(&self) -> &'static str {
            "shape mismatch"
        }
        fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
            grad.narrow(0, 0, 1).map(InputGrads::one)
        }
    }
    let f = |x: &[Tensor]| record("shape mismatch", x[0].detach(), &[&x[0]], |_| Misshapen);
    let message = gradcheck(f, &[input(&[3])], Gradcheck::default()).unwrap_err().to_string();
    assert!(message.contains("shape mismatch") && message.contains("[1]") && message.contains("[3]"), "{message}");
}

#[test]
fn a_detached_path_is_found() -> Result<()> {
    // Values flow, the gradient does not.
    let f = |x: &[Tensor]| spoiled(&x[0], &x[1].detach(), |_, _| {});
    let report = gradcheck(f, &[input(&[2]), input(&[2])], Gradcheck::default())?;
    assert!(report.inputs[0].error < 1e-9 && report.inputs[1].error > 1.0, "{report}");
    Ok(())
}

#[test]
fn random_cotangents_see_what_sums_hide() -> Result<()> {
    // Softmax rows add up to 1: under a plain sum, a backward of zero would pass.
    struct Zero;
    impl Backward for Zero {
        fn name(&self) -> &'static str {
            "zero"
        }
        fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
            Tensor::zeros(*grad.shape(), DType::F64, &CPU).map(InputGrads::one)
        }
    }
    let f = |x: &[Tensor]| record("zero", x[0].detach().softmax()?, &[&x[0]], |_| Zero);
    assert!(!gradcheck(f, &[input(&[2, 5])], Gradcheck::default())?.passed());
    Ok(())
}

#[test]
fn integers_are_passed_through() -> Result<()> {
    let f = |x: &[Tensor]| {
        assert_eq!((x[0].dtype(), x[2].dtype()), (DType::I64, DType::Bool));
        spoiled(&x[1], &x[0].to_dtype(DType::F64)?, |_, _| {})
    };
    let inputs = [Tensor::arange(3, &CPU)?, input(&[3]), Tensor::from_slice(&[true], [1], &CPU)?];
    let report = gradcheck(f, &inputs, Gradcheck::default())?;
    assert!(report.passed() && report.inputs.len() == 1 && report.inputs[0].input == 1, "{report}");
    Ok(())
}

#[test]
fn strided_and_empty_inputs() -> Result<()> {
    let inputs = [input(&[4, 3]).transpose(0, 1)?, input(&[3]).unsqueeze(1)?.expand([3, 4])?];
    let report = gradcheck(|x| spoiled(&x[0], &x[1], |_, _| {}), &inputs, Gradcheck::default())?;
    assert!(report.passed(), "{report}");
    let report = gradcheck(|x| x[0].softmax(), &[input(&[0, 3])], Gradcheck::default())?;
    assert!(report.passed() && report.inputs[0].checked == 0, "{report}");
    let report = gradcheck(|x| x[0].sum(&[]), &[input(&[])], Gradcheck::default())?;
    assert!(report.passed() && report.inputs[0].checked == 1, "{report}");
    Ok(())
}

#[test]
fn few_elements_of_many_are_spread() -> Result<()> {
    let f = |x: &[Tensor]| spoiled(&x[0], &x[1], |a, _| a.iter_mut().skip(63).step_by(64).for_each(|a| *a += 1.0));
    let options = Gradcheck { max_elements: 100, ..Gradcheck::default() };
    // Only the last column of 64 is wrong: strides of a power of two would never reach it.
    let report = gradcheck(f, &[input(&[100, 64]), input(&[100, 64])], options)?;
    assert_eq!(report.inputs[0].checked, 100);
    assert!(!report.passed(), "{report}");
    let none = Gradcheck { max_elements: 0, ..Gradcheck::default() };
    assert_eq!(gradcheck(|x| x[0].softmax(), &[input(&[5])], none)?.inputs[0].checked, 1);
    Ok(())
}

#[test]
fn wrong_calls_are_refused() -> Result<()> {
    let single = input(&[2]).to_dtype(DType::F32)?;
    let message = gradcheck(|x| x[0].softmax(), &[single], Gradcheck::default()).unwrap_err().to_string();
    assert!(message.contains("f64") && message.contains("f32"), "{message}");
    let to_single = |x: &[Tensor]| x[0].to_dtype(DType::F32);
    assert!(matches!(
        gradcheck(to_single, &[input(&[2])], Gradcheck::default()).map_err(Error::into_kind),
        Err(ErrorKind::DType { .. })
    ));
    let constant = |_: &[Tensor]| Tensor::scalar(1.0f64, &CPU);
    assert!(matches!(
        gradcheck(constant, &[input(&[2])], Gradcheck::default()).map_err(Error::into_kind),
        Err(ErrorKind::NotTracked)
    ));
    let failing = |x: &[Tensor]| x[0].reshape([7]);
    assert!(matches!(
        gradcheck(failing, &[input(&[2])], Gradcheck::default()).map_err(Error::into_kind),
        Err(ErrorKind::Shape { .. })
    ));
    let tape = Tape::grad();
    let _ = input(&[2]).requires_grad()?.sum(&[])?;
    assert_eq!(tape.len(), 1, "no tape of a failed check is left behind");
    Ok(())
}

/// Gradients of the inputs and the bias pass through packed weights; in f32 they are those of the dequantised weights.
#[test]
fn packed_weights_pass_gradients_on() -> Result<()> {
    for kind in [QuantType::Q8_0, QuantType::Q4_1, QuantType::Q6K] {
        let matrix = PackedMatrix::quantize(&input(&[5, 256]), kind)?;
        let (x, bias) = (input(&[2, 3, 256]), input(&[5]));
        let run = |x: &[Tensor]| matrix.linear(&x[0], Some(&x[1]))?.square()?.sum(&[]);
        let report = gradcheck(run, &[x.clone(), bias.clone()], Gradcheck::default())?;
        assert!(report.passed(), "{kind}\n{report}");
        let gradient = |linear: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<Vec<f64>> {
            let x = x.to_dtype(DType::F32)?.requires_grad()?;
            let mut tape = Tape::grad();
            let loss = linear(&x)?.sum(&[])?;
            let grads = tape.backward(&loss)?;
            grads.get(&x).expect("a gradient").to_f64_vec()
        };
        let wide = matrix.dequantize(DType::F32)?;
        assert_eq!(gradient(&|x| matrix.linear(x, None))?, gradient(&|x| x.linear(&wide, None))?, "{kind}");
    }
    Ok(())
}
