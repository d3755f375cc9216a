//! The tape: recorded ops, errors, and gradients that add up.

mod wrong;

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
};

use crate::common::device;
use crate::rules::{grid, leaf, square, sum_of, values, vector};
use x_transformers::{
    Backward, DType, Device, Error, ErrorKind, GradSlice, Gradcheck, Init, InputGrad, InputGrads, Param, ParamStore,
    Result, Shape, Tape, Tensor, checkpoint, discrete, gradcheck, record,
};

/// `2 x`, whose backward adds to the gradient of `x` accumulated so far.
fn doubled(x: &Tensor) -> Result<Tensor> {
    record("doubled", x.detach().affine(2.0, 0.0)?, &[x], |_| AddingBackward { sum: None })
}

struct AddingBackward {
    sum: Option<Tensor>,
}

impl Backward for AddingBackward {
    fn name(&self) -> &'static str {
        "doubled"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let own = grad.affine(2.0, 0.0)?;
        self.sum.map_or_else(|| Ok(own.clone()), |sum| sum.add(&own)).map(InputGrads::one)
    }

    fn accumulate_into(&mut self, sum: Tensor) -> Option<Tensor> {
        self.sum.replace(sum)
    }
}

#[test]
fn rules_may_add_to_the_gradient_so_far() -> Result<()> {
    let x = leaf(&[1.0, -3.0]);
    for later in [false, true] {
        let mut tape = Tape::grad();
        let y = x.affine(10.0, 0.0)?;
        let before = if later { None } else { Some(y.square()?) };
        let doubled = doubled(&y)?;
        let square = before.map_or_else(|| y.square(), Ok)?;
        let grads = tape.backward(&doubled.add(&square)?.sum(&[])?)?;
        // d(2 y + y²)/dx with y = 10 x, whichever comes first.
        assert_eq!(values(grads.get(&x).unwrap()), [220.0, -580.0]);
        // A leaf has no accumulated sum to offer.
        let mut tape = Tape::grad();
        let grads = tape.backward(&self::doubled(&x)?.add(&x.square()?)?.sum(&[])?)?;
        assert_eq!(values(grads.get(&x).unwrap()), [4.0, -4.0]);
    }
    Ok(())
}

/// A dense layer adds to the gradient accumulated for its input, in the type of its sums, and never to a gradient that
/// others hold.
#[test]
fn dense_layers_add_to_the_gradient_so_far() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        let whole = |shape: &[usize], shift: usize| {
            Tensor::generate(Shape::new(shape)?, dtype, device(), |i| ((i * 7 + shift) % 5) as f64 - 2.0)
        };
        let x = whole(&[2, 3, 4], 1)?.requires_grad()?;
        let weights = [whole(&[4, 4], 2)?, whole(&[4, 4], 3)?];
        let cotangent = whole(&[2, 3, 4], 4)?;
        let mut tape = Tape::grad();
        let y = x.affine(1.0, 0.0)?;
        // The sum gives the same tensor to `y` and to the other layer.
        let dense = sum_of(&y, &y.linear(&weights[0], None)?)?;
        let both = dense.add(&y.transpose(0, 1)?.linear(&weights[1], None)?.transpose(0, 1)?)?;
        let grads = tape.backward_with(&both, &cotangent)?;
        let expected = cotangent.add(&cotangent.matmul(&weights[0])?)?.add(&cotangent.matmul(&weights[1])?)?;
        // Small integers: exact in every dtype and order.
        assert_eq!(grads.get(&x).unwrap().to_f64_vec()?, expected.to_f64_vec()?, "{dtype}");
        assert_eq!(cotangent.to_f64_vec()?, whole(&[2, 3, 4], 4)?.to_f64_vec()?, "{dtype}");
    }
    Ok(())
}

/// An identity whose backward applies `give` to the gradient.
fn giving<F: Fn(Tensor) -> Result<InputGrads> + 'static>(x: &Tensor, give: F) -> Result<Tensor> {
    struct Giving<F>(F);
    impl<F: Fn(Tensor) -> Result<InputGrads>> Backward for Giving<F> {
        fn name(&self) -> &'static str {
            "giving"
        }
        fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
            (self.0)(grad)
        }
    }
    record("giving", x.detach(), &[x], |_| Giving(give))
}

#[test]
fn a_leaf_used_many_times_accumulates() -> Result<()> {
    let x = leaf(&[1.0, -2.0, 3.0]);
    let mut tape = Tape::grad();
    let parts = [square(&x)?, x.affine(10.0, 0.0)?, x.clone(), square(&x)?];
    let loss = Tensor::cat(&parts.iter().collect::<Vec<_>>(), 0)?.sum(&[])?;
    let grads = tape.backward(&loss)?;
    assert_eq!(values(grads.get(&x).unwrap()), [15.0, 3.0, 23.0]);
    assert_eq!(grads.len(), 1);
    Ok(())
}

#[test]
fn an_intermediate_used_many_times_accumulates() -> Result<()> {
    let x = leaf(&[1.0, -2.0]);
    let mut tape = Tape::grad();
    let y = square(&x)?;
    let loss = Tensor::cat(&[&square(&y)?, &y, &y.affine(3.0, 0.0)?], 0)?.sum(&[])?;
    // d(x⁴ + 4x²)/dx = 4x³ + 8x
    assert_eq!(values(tape.backward(&loss)?.get(&x).unwrap()), [12.0, -48.0]);
    Ok(())
}

#[test]
fn gradients_of_views() {
    type Chain = fn(&Tensor) -> Result<Tensor>;
    let chains: [(&str, Chain); 17] = [
        ("narrow", |x| x.narrow(1, 1, 3)),
        ("narrow of nothing", |x| Tensor::cat(&[&x.narrow(0, 2, 0)?, x], 0)),
        ("narrow of a narrow", |x| x.narrow(0, 1, 3)?.narrow(1, 2, 2)?.narrow(0, 1, 1)),
        ("overlapping narrows", |x| Tensor::cat(&[&x.narrow(0, 0, 3)?, &x.narrow(0, 1, 3)?, &x.narrow(0, 1, 2)?], 0)),
        ("chunk", |x| Tensor::cat(&x.chunk(3, -1)?.iter().rev().collect::<Vec<_>>(), 0)),
        ("one chunk of three", |x| Ok(x.chunk(3, 1)?.swap_remove(1))),
        ("split", |x| Ok(x.split(&[1, 0, 5], 1)?.swap_remove(2))),
        ("select", |x| x.select(0, 2)),
        ("select the last dim", |x| x.select(-1, 0)),
        ("transpose", |x| x.transpose(0, 1)),
        ("reshape of a transposed view", |x| x.transpose(0, 1)?.reshape([3, 8])),
        ("permute of a reshape", |x| x.reshape([2, 2, 6])?.permute(&[2, 0, 1])?.narrow(0, 1, 4)),
        ("expand", |x| x.unsqueeze(1)?.expand([4, 3, 6])),
        ("expand in front", |x| x.expand([2, 3, 4, 6])?.transpose(0, 3)?.flatten(1, 2)),
        ("expand and narrow", |x| x.narrow(1, 4, 1)?.expand([4, 9])?.narrow(1, 3, 5)),
        ("squeeze", |x| x.narrow(0, 3, 1)?.squeeze(0)?.unsqueeze(-1)?.expand([6, 2])),
        ("contiguous", |x| x.transpose(0, 1)?.narrow(0, 1, 4)?.contiguous()?.flatten(0, -1)),
    ];
    for (name, chain) in chains {
        // Squared, so that a gradient that lands on the wrong element shows.
        let report = gradcheck(|x| square(&chain(&x[0])?), &[grid(4, 6)], Gradcheck::default()).unwrap();
        assert!(report.passed(), "{name}\n{report}");
    }
}

#[test]
fn overlapping_narrows_count() -> Result<()> {
    let x = leaf(&[1.0, 2.0, 3.0, 4.0]);
    let mut tape = Tape::grad();
    let loss = Tensor::cat(&[&x.narrow(0, 0, 3)?, &x.narrow(0, 1, 3)?], 0)?.sum(&[])?;
    assert_eq!(values(tape.backward(&loss)?.get(&x).unwrap()), [1.0, 2.0, 2.0, 1.0]);
    Ok(())
}

#[test]
fn a_shared_gradient_is_not_corrupted() -> Result<()> {
    let (x, y) = (leaf(&[1.0, 2.0]), leaf(&[3.0, 4.0]));
    let cotangent = vector(&[1.0, 10.0]);
    let mut tape = Tape::grad();
    // x and the inner sum get one tensor; x's copy is then added to, while y still waits for it.
    let total = sum_of(&sum_of(&x, &y)?, &x)?;
    let total = sum_of(&total, &y.affine(1.0, 0.0)?)?;
    let grads = tape.backward_with(&total, &cotangent)?;
    assert_eq!(values(grads.get(&x).unwrap()), [2.0, 20.0]);
    assert_eq!(values(grads.get(&y).unwrap()), [2.0, 20.0]);
    assert_eq!(values(&cotangent), [1.0, 10.0], "the caller's cotangent is not the tape's to write to");
    Ok(())
}

#[test]
fn a_gradient_shared_with_one_leaf_twice() -> Result<()> {
    let x = leaf(&[1.0, 2.0]);
    let mut tape = Tape::grad();
    let grads = {
        let total = sum_of(&x, &x)?;
        tape.backward_with(&sum_of(&total, &total)?, &vector(&[1.0, 10.0]))?
    };
    assert_eq!(values(grads.get(&x).unwrap()), [4.0, 40.0]);
    Ok(())
}

#[test]
fn accumulating_into_strided_and_partial_sums() -> Result<()> {
    // The first contribution is a transposed view, then an expanded one, then parts, then a packed one.
    let x = grid(3, 3).requires_grad()?;
    let mut tape = Tape::grad();
    let pieces = [
        square(&x)?,
        x.narrow(1, 1, 2)?.narrow(0, 0, 1)?.expand([9, 2])?.narrow(0, 0, 9)?.reshape([6, 3])?,
        x.narrow(0, 1, 1)?,
        x.sum(&[0])?.expand([2, 3])?,
        x.transpose(0, 1)?,
    ];
    let loss = Tensor::cat(&pieces.iter().collect::<Vec<_>>(), 0)?;
    let weights = Tensor::generate(*loss.shape(), DType::F64, device(), |i| i as f64)?;
    let grads = tape.backward_with(&loss, &weights)?;
    let got = values(grads.get(&x).unwrap());
    let (values, w) = (values(&x), values(&weights));
    let mut expected = vec![0.0; 9];
    for row in 0..3 {
        for column in 0..3 {
            let at = row * 3 + column;
            expected[at] += 2.0 * values[at] * w[at];
            if row == 0 && column > 0 {
                // Element `column - 1` of each of the nine rows of two.
                expected[at] += (0..9).map(|r| w[9 + r * 2 + column - 1]).sum::<f64>();
            }
            if row == 1 {
                expected[at] += w[27 + column];
            }
            expected[at] += w[30 + column] + w[33 + column];
            expected[at] += w[36 + column * 3 + row];
        }
    }
    for (got, expected) in got.iter().zip(&expected) {
        assert!((got - expected).abs() < 1e-12, "{got} {expected}");
    }
    Ok(())
}

#[test]
fn backward_refusals() -> Result<()> {
    let x = leaf(&[1.0, 2.0]);
    let mut tape = Tape::grad();
    let y = square(&x)?;
    let constant = vector(&[3.0]);
    assert!(matches!(tape.backward(&y).map_err(Error::into_kind), Err(ErrorKind::NotScalar { shape }) if shape == [2]));
    assert!(matches!(tape.backward(&constant).map_err(Error::into_kind), Err(ErrorKind::NotTracked)));
    assert!(matches!(tape.backward_with(&y, &vector(&[1.0])).map_err(Error::into_kind), Err(ErrorKind::Shape { .. })));
    let single = Tensor::from_slice(&[1.0f32, 1.0], [2], device())?;
    assert!(tape.backward_with(&y, &single).is_err(), "a cotangent of another dtype");
    // An error has no effect: the tape still works.
    let loss = y.sum(&[])?;
    assert_eq!(values(tape.backward(&loss)?.get(&x).unwrap()), [2.0, 4.0]);
    assert!(matches!(tape.backward(&loss).map_err(Error::into_kind), Err(ErrorKind::BackwardTwice)));
    assert!(matches!(tape.backward_with(&y, &y).map_err(Error::into_kind), Err(ErrorKind::BackwardTwice)));
    Ok(())
}

#[test]
fn a_loss_without_leaves_is_not_tracked() -> Result<()> {
    let weight = leaf(&[1.0]);
    let before = square(&weight)?;
    let mut tape = Tape::grad();
    let loss = square(&vector(&[2.0]))?;
    assert!(matches!(tape.backward(&loss).map_err(Error::into_kind), Err(ErrorKind::NotTracked)));
    assert!(
        matches!(tape.backward(&before).map_err(Error::into_kind), Err(ErrorKind::NotTracked)),
        "made before the tape"
    );
    assert!(matches!(tape.backward(&square(&weight.detach())?).map_err(Error::into_kind), Err(ErrorKind::NotTracked)));
    Ok(())
}

#[test]
fn the_gradient_of_a_leaf_itself() -> Result<()> {
    let x = leaf(&[5.0]);
    let grads = Tape::grad().backward(&x)?;
    assert_eq!(values(grads.get(&x).unwrap()), [1.0]);
    Ok(())
}

#[test]
fn stale_tensors_are_refused() -> Result<()> {
    let x = leaf(&[1.0, 2.0]);
    let (finished, dropped) = {
        let mut tape = Tape::grad();
        let y = square(&x)?;
        let _ = tape.backward(&y.sum(&[])?)?;
        let other = Tape::grad();
        let z = square(&x)?;
        drop(other);
        (y, z)
    };
    let tape = Tape::grad();
    for stale in [&finished, &dropped] {
        assert!(matches!(square(stale).map_err(Error::into_kind), Err(ErrorKind::StaleTape { op: "square" })));
        assert!(matches!(stale.sum(&[]).map_err(Error::into_kind), Err(ErrorKind::StaleTape { .. })));
        assert!(matches!(stale.narrow(0, 0, 1).map_err(Error::into_kind), Err(ErrorKind::StaleTape { op: "narrow" })));
        assert!(matches!(
            Tensor::cat(&[&x, stale], 0).map_err(Error::into_kind),
            Err(ErrorKind::StaleTape { op: "cat" })
        ));
        assert!(matches!(
            stale.to_dtype(DType::I64).map_err(Error::into_kind),
            Err(ErrorKind::StaleTape { op: "to_dtype" })
        ));
        assert!(matches!(
            checkpoint(|t| square(&t[0]), &[stale]).map_err(Error::into_kind),
            Err(ErrorKind::StaleTape { op: "checkpoint" })
        ));
        // Its value may be used.
        let _ = square(&stale.detach())?;
    }
    drop(tape);
    // Outside of a tape a value is a value.
    assert_eq!(values(&square(&finished)?), [1.0, 16.0]);
    Ok(())
}

#[test]
fn ops_without_a_gradient_refuse_tracked_inputs() -> Result<()> {
    let x = leaf(&[1.0, 2.0]);
    let _tape = Tape::grad();
    for tracked in [x.clone(), square(&x)?] {
        assert!(matches!(
            tracked.to_dtype(DType::I64).map_err(Error::into_kind),
            Err(ErrorKind::NoGradient { op: "to_dtype" })
        ));
        assert!(matches!(
            tracked.to_dtype(DType::Bool).map_err(Error::into_kind),
            Err(ErrorKind::NoGradient { op: "to_dtype" })
        ));
        assert!(matches!(
            discrete("argsort", &[&tracked]).map_err(Error::into_kind),
            Err(ErrorKind::NoGradient { op: "argsort" })
        ));
        assert_eq!(tracked.detach().to_dtype(DType::I64)?.dtype(), DType::I64);
    }
    discrete("argsort", &[&vector(&[1.0])])?;
    Ok(())
}

#[test]
fn nothing_is_recorded_without_leaves() -> Result<()> {
    let x = vector(&[1.0, 2.0, 3.0, 4.0]);
    let tape = Tape::train(1);
    let y = square(&x)?.reshape([2, 2])?.transpose(0, 1)?.contiguous()?.softmax()?.to_dtype(DType::F32)?;
    let _ = Tensor::cat(&[&y, &y], 1)?.sum(&[0])?.mean(&[])?.affine(2.0, 1.0)?.to_dtype(DType::I64)?;
    let _ = checkpoint(|x| square(&x[0]), &[&x])?;
    assert_eq!(tape.len(), 0);
    assert!(tape.is_empty());
    Ok(())
}

#[test]
fn reading_values_records_nothing() -> Result<()> {
    let x = grid(2, 3).requires_grad()?;
    let tape = Tape::grad();
    let y = x.transpose(0, 1)?;
    let before = tape.len();
    let _ = (y.to_vec::<f64>()?, y.to_f64_vec()?, y.narrow(0, 0, 1)?.detach().sum(&[])?.item()?);
    let _ = (format!("{y}"), format!("{y:?}"));
    assert_eq!(tape.len(), before + 1, "the narrow alone");
    Ok(())
}

#[test]
fn an_op_records_one_node() -> Result<()> {
    // Copies that an op makes for itself are not on the tape twice.
    let x = grid(2, 3).requires_grad()?;
    let tape = Tape::grad();
    let y = x.transpose(0, 1)?;
    assert_eq!(tape.len(), 1);
    let _ = Tensor::cat(&[&y, &y], 0)?;
    assert_eq!(tape.len(), 2, "cat reads strided inputs in one step");
    let _ = y.sum(&[0])?;
    assert_eq!(tape.len(), 3, "so does sum");
    let _ = y.mean(&[1])?;
    assert_eq!(tape.len(), 4, "and mean");
    Ok(())
}

#[test]
fn unused_parameters_are_listed_by_name() -> Result<()> {
    let store = ParamStore::new(3, DType::F64, device());
    let used = store.at("layers").at(0).param("weight", [2], Init::Normal(1.0))?;
    store.at("layers").at(1).param("weight", [2], Init::Normal(1.0))?;
    store.param("bias", [2], Init::Constant(0.0))?;
    store.tie("again", &used)?;
    let mut tape = Tape::grad();
    let grads = tape.backward(&square(&used.tensor())?.sum(&[])?)?;
    assert_eq!(grads.unused(&store.params()), ["bias", "layers.1.weight"]);
    assert!(grads.param(&used).is_some());
    Ok(())
}

#[test]
fn gradients_of_micro_batches_add_up() -> Result<()> {
    let (x, y) = (leaf(&[1.0, 2.0]), leaf(&[7.0]));
    let step = |with_y: bool| -> Result<_> {
        let mut tape = Tape::grad();
        let loss = if with_y { Tensor::cat(&[&square(&x)?, &y], 0)? } else { square(&x)? };
        tape.backward(&loss.sum(&[])?)
    };
    let mut total = step(false)?;
    total.accumulate(step(true)?)?;
    total.accumulate(step(false)?)?;
    assert_eq!(values(total.get(&x).unwrap()), [6.0, 12.0]);
    assert_eq!(values(total.get(&y).unwrap()), [1.0]);
    assert_eq!(total.tensors().count(), 2);
    Ok(())
}

#[test]
fn gradients_come_back_as_constants() -> Result<()> {
    let x = leaf(&[1.0, 2.0]);
    let mut tape = Tape::grad();
    // A rule that returns a saved tensor without detaching it.
    let y = x.affine(1.0, 0.0)?;
    let saved = y.clone();
    let z = giving(&y, move |_| Ok(InputGrads::one(saved.clone())))?;
    let grads = tape.backward(&z.sum(&[])?)?;
    let grad = grads.get(&x).unwrap();
    let next = Tape::grad();
    let _ = square(grad)?;
    assert!(next.is_empty());
    Ok(())
}

#[test]
fn need_tells_which_inputs_are_differentiated() -> Result<()> {
    struct Asserting;
    impl Backward for Asserting {
        fn name(&self) -> &'static str {
            "asserting"
        }
        fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
            assert_eq!(need, [false, true, true]);
            Ok(InputGrads::whole([None, Some(grad.clone()), Some(grad)]))
        }
    }
    let (constant, x) = (vector(&[1.0]), leaf(&[1.0]));
    let mut tape = Tape::grad();
    let y = square(&x)?;
    let z = record("asserting", constant.clone(), &[&constant, &x, &y], |_| Asserting)?;
    assert_eq!(values(tape.backward(&z)?.get(&x).unwrap()), [3.0]);
    Ok(())
}

#[test]
fn tapes_may_be_dropped_in_any_order() -> Result<()> {
    let x = leaf(&[3.0]);
    for _ in 0..3 {
        let _unused = Tape::train(1);
        let _ = square(&x)?;
    }
    let (mut first, second) = (Tape::grad(), Tape::grad());
    // The innermost tape records.
    let inner = square(&x)?;
    assert_eq!((first.len(), second.len()), (0, 1));
    assert!(matches!(first.backward(&inner).map_err(Error::into_kind), Err(ErrorKind::NotTracked)));
    drop(second);
    let outer = square(&x)?;
    assert_eq!(values(first.backward(&outer)?.get(&x).unwrap()), [6.0]);
    let (one, two) = (Tape::grad(), Tape::grad());
    drop(one);
    let _ = square(&x)?;
    assert_eq!(two.len(), 1);
    Ok(())
}

#[test]
fn a_panic_leaves_the_thread_usable() -> Result<()> {
    struct Panicking;
    impl Backward for Panicking {
        fn name(&self) -> &'static str {
            "panicking"
        }
        fn backward(self: Box<Self>, _grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
            panic!("in backward")
        }
    }
    let x = leaf(&[3.0]);
    let while_recording = catch_unwind(AssertUnwindSafe(|| {
        let _tape = Tape::grad();
        record("panicking", x.detach(), &[&x], |_| -> Panicking { panic!("while saving") })
    }));
    let in_backward = catch_unwind(AssertUnwindSafe(|| {
        let mut tape = Tape::grad();
        let y = record("panicking", x.detach(), &[&x], |_| Panicking)?;
        tape.backward(&y)
    }));
    let in_checkpoint = catch_unwind(AssertUnwindSafe(|| {
        let _tape = Tape::grad();
        checkpoint(|_| panic!("in checkpoint"), &[&x])
    }));
    assert!(while_recording.is_err() && in_backward.is_err() && in_checkpoint.is_err());
    assert!(square(&x)?.to_dtype(DType::I64).is_ok(), "no tape is left behind");
    let mut tape = Tape::grad();
    let y = square(&x)?;
    assert_eq!(values(tape.backward(&y)?.get(&x).unwrap()), [6.0]);
    Ok(())
}

#[test]
fn each_thread_has_its_tape() -> Result<()> {
    let weight = Param::new(vector(&[2.0, 3.0]))?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|scale| {
                let weight = &weight;
                scope.spawn(move || -> Result<Vec<f64>> {
                    let mut total = vec![];
                    for _ in 0..50 {
                        let mut tape = Tape::grad();
                        let loss = square(&weight.tensor())?.affine(scale as f64, 0.0)?.sum(&[])?;
                        assert_eq!(tape.len(), 3);
                        total = values(tape.backward(&loss)?.param(weight).unwrap());
                    }
                    Ok(total)
                })
            })
            .collect();
        for (scale, thread) in threads.into_iter().enumerate() {
            let scale = scale as f64;
            assert_eq!(thread.join().unwrap()?, [4.0 * scale, 6.0 * scale]);
        }
        Ok(())
    })
}

#[test]
fn a_tape_in_a_thread_local_may_die_with_its_thread() {
    thread_local! {
        static TAPE: Cell<Option<Tape>> = const { Cell::new(None) };
    }
    std::thread::spawn(|| {
        // Touched before and after the tape's own thread-local, so that either may be destroyed first.
        TAPE.set(None);
        let x = leaf(&[3.0]);
        TAPE.set(Some(Tape::grad()));
        let _ = square(&x).unwrap();
    })
    .join()
    .unwrap();
}
