//! Activation checkpointing: no value changes, each segment runs as often as documented, and nests of any depth end in
//! gradients or an error.

use std::{cell::Cell, rc::Rc, thread};

use crate::common::device;
use crate::rules::{grid, leaf, square, sum_of, values, vector};
use x_transformers::{
    DType, Error, ErrorKind, Gradcheck, Init, Param, ParamStore, Result, Tape, Tensor, checkpoint, gradcheck,
};

/// Some layers with parameters; optionally recomputes the middle ones.
fn layers(store: &ParamStore, x: &Tensor, recompute: bool) -> Result<Tensor> {
    let params = store.params();
    let weight = |name: &str| params.get(name).unwrap().clone();
    let (first, second) = (weight("first"), weight("second"));
    let block = move |x: &[Tensor]| -> Result<Tensor> {
        let y = sum_of(&square(&x[0])?, &first.tensor().expand(*x[0].shape())?.contiguous()?)?.softmax()?;
        sum_of(&y.transpose(0, 1)?.contiguous()?.transpose(0, 1)?.contiguous()?, &second.tensor())
    };
    let hidden = x.affine(0.5, 0.1)?;
    let output = if recompute { checkpoint(block, &[&hidden])? } else { block(&[hidden])? };
    square(&output)?.sum(&[])
}

fn layer_store() -> ParamStore {
    let store = ParamStore::new(5, DType::F64, device());
    store.param("first", [6], Init::Normal(1.0)).unwrap();
    store.param("second", [4, 6], Init::Normal(1.0)).unwrap();
    store
}

#[test]
fn checkpoint_changes_no_value() -> Result<()> {
    let (store, x) = (layer_store(), grid(4, 6).requires_grad()?);
    let run = |recompute: bool| -> Result<_> {
        let mut tape = Tape::train(9);
        let loss = layers(&store, &x, recompute)?;
        let nodes = tape.len();
        let grads = tape.backward(&loss)?;
        assert!(grads.unused(&store.params()).is_empty());
        let mut bits = vec![loss.item()?];
        bits.extend(grads.get(&x).unwrap().to_f64_vec()?);
        for (_, param) in store.params().iter() {
            bits.extend(grads.param(param).unwrap().to_f64_vec()?);
        }
        Ok((nodes, bits))
    };
    let ((plain_nodes, plain), (nodes, recomputed)) = (run(false)?, run(true)?);
    assert_eq!(plain, recomputed);
    assert_eq!(nodes, 4, "affine, checkpoint, square, sum");
    assert!(plain_nodes > nodes);
    // Outside of a tape it is a plain call.
    assert_eq!(layers(&store, &x, true)?.item()?, plain[0]);
    Ok(())
}

#[test]
fn checkpoints_nest() -> Result<()> {
    let x = grid(2, 3);
    let nested = |x: &[Tensor]| -> Result<Tensor> {
        let inner = |x: &[Tensor]| -> Result<Tensor> {
            let y = checkpoint(|x: &[Tensor]| square(&x[0])?.softmax(), &[&x[0]])?;
            square(&y)
        };
        let y = square(&x[0])?;
        let z = checkpoint(inner, &[&y])?;
        sum_of(&z, &checkpoint(inner, &[&z])?)
    };
    let report = gradcheck(|x| checkpoint(nested, &[&x[0]]), &[x], Gradcheck::default())?;
    assert!(report.passed(), "{report}");
    Ok(())
}

#[test]
fn checkpoint_tracks_parameters_under_constant_inputs() -> Result<()> {
    let weight = Param::new(vector(&[1.0, 2.0]))?;
    let inside = weight.clone();
    let mut tape = Tape::grad();
    let loss = checkpoint(move |x| square(&sum_of(&x[0], &inside.tensor())?), &[&vector(&[1.0, 1.0])])?.sum(&[])?;
    assert_eq!(values(tape.backward(&loss)?.param(&weight).unwrap()), [4.0, 6.0]);
    Ok(())
}

#[test]
fn checkpoint_adds_to_gradients_from_outside() -> Result<()> {
    let weight = Param::new(vector(&[1.0, 2.0]))?;
    let (x, inside) = (leaf(&[3.0, 4.0]), weight.clone());
    let mut tape = Tape::grad();
    let y = checkpoint(move |x| square(&sum_of(&x[0], &inside.tensor())?), &[&x])?;
    let loss = sum_of(&sum_of(&y, &square(&weight.tensor())?)?, &square(&x)?)?.sum(&[])?;
    let grads = tape.backward(&loss)?;
    assert_eq!(values(grads.param(&weight).unwrap()), [2.0 * 4.0 + 2.0, 2.0 * 6.0 + 4.0]);
    assert_eq!(values(grads.get(&x).unwrap()), [2.0 * 4.0 + 6.0, 2.0 * 6.0 + 8.0]);
    Ok(())
}

#[test]
fn checkpoint_of_integers_and_several_inputs() -> Result<()> {
    let (x, y, tokens) = (leaf(&[1.0, 2.0]), leaf(&[5.0, 6.0]), Tensor::arange(2, device())?);
    let mut tape = Tape::grad();
    let z = checkpoint(|t| sum_of(&sum_of(&square(&t[0])?, &t[1].to_dtype(DType::F64)?)?, &t[2]), &[&x, &tokens, &y])?;
    assert_eq!(values(&z), [6.0, 11.0]);
    let grads = tape.backward_with(&z, &vector(&[1.0, 10.0]))?;
    assert_eq!(values(grads.get(&x).unwrap()), [2.0, 40.0]);
    assert_eq!(values(grads.get(&y).unwrap()), [1.0, 10.0]);
    Ok(())
}

#[test]
fn checkpoint_may_return_its_input_or_a_constant() -> Result<()> {
    let x = leaf(&[3.0]);
    let mut tape = Tape::grad();
    let same = checkpoint(|x| Ok(x[0].clone()), &[&square(&x)?])?;
    assert_eq!(values(tape.backward(&same)?.get(&x).unwrap()), [6.0]);
    let mut tape = Tape::grad();
    let constant = checkpoint(|_| Ok(vector(&[1.0])), &[&x])?;
    assert!(matches!(tape.backward(&constant).map_err(Error::into_kind), Err(ErrorKind::NotTracked)));
    assert!(tape.is_empty());
    Ok(())
}

#[test]
fn checkpoint_refuses_captured_tensors_of_the_outer_tape() -> Result<()> {
    let x = leaf(&[3.0]);
    let _tape = Tape::grad();
    let outer = square(&x)?;
    let captured = outer.clone();
    let used = checkpoint(move |x| sum_of(&x[0], &captured), &[&x]);
    assert!(matches!(used.as_ref().map_err(Error::kind), Err(ErrorKind::StaleTape { op: "sum_of" })), "{used:?}");
    let captured = outer.clone();
    let returned = checkpoint(move |_| Ok(captured.clone()), &[&x]);
    assert!(
        matches!(returned.as_ref().map_err(Error::kind), Err(ErrorKind::StaleTape { op: "checkpoint" })),
        "{returned:?}"
    );
    // A captured leaf is fine.
    let free = x.clone();
    let _ = checkpoint(move |t| sum_of(&t[0], &free), &[&outer])?;
    Ok(())
}

#[test]
fn checkpoint_passes_errors_on() -> Result<()> {
    let x = leaf(&[3.0]);
    let mut tape = Tape::grad();
    assert!(matches!(
        checkpoint(|x| x[0].narrow(0, 4, 1), &[&x]).map_err(Error::into_kind),
        Err(ErrorKind::Shape { op: "narrow", .. })
    ));
    let y = square(&x)?;
    assert_eq!(tape.len(), 1, "nothing is left of the failed segment");
    assert_eq!(values(tape.backward(&y)?.get(&x).unwrap()), [6.0]);
    Ok(())
}

// Nests.

/// Levels whose segments keep only their inputs, and run once more for each level around them.
const SHALLOW: usize = 8;

/// Function that a level of a nest applies before and after the level below.
type Part = fn(&Tensor) -> Result<Tensor>;

fn same(x: &Tensor) -> Result<Tensor> {
    Ok(x.clone())
}

/// A nest of `depth` segments, each of which calls the next `calls` times. Counts the runs of each level.
fn nest(
    level: usize,
    depth: usize,
    calls: usize,
    parts: [Part; 2],
    runs: &Rc<Vec<Cell<usize>>>,
    x: &Tensor,
) -> Result<Tensor> {
    if level == depth {
        return x.affine(1.25, 0.5);
    }
    let counted = runs.clone();
    let segment = move |x: &[Tensor]| {
        counted[level].set(counted[level].get() + 1);
        let mut x = parts[0](&x[0])?;
        for _ in 0..calls {
            x = nest(level + 1, depth, calls, parts, &counted, &x)?;
        }
        parts[1](&x)
    };
    checkpoint(segment, &[x])
}

/// The same without checkpoints.
fn plain(level: usize, depth: usize, calls: usize, parts: [Part; 2], x: &Tensor) -> Result<Tensor> {
    if level == depth {
        return x.affine(1.25, 0.5);
    }
    let mut x = parts[0](x)?;
    for _ in 0..calls {
        x = plain(level + 1, depth, calls, parts, &x)?;
    }
    parts[1](&x)
}

fn counters(depth: usize) -> Rc<Vec<Cell<usize>>> {
    Rc::new((0..depth).map(|_| Cell::new(0)).collect())
}

/// Runs of all levels, as documented, for one call of the first.
fn documented(depth: usize, calls: usize) -> Vec<usize> {
    (0..depth).map(|level| calls.pow(level as u32) * if level < SHALLOW { level + 2 } else { 2 }).collect()
}

#[test]
fn a_nest_takes_time_linear_in_its_depth() -> Result<()> {
    let parts: [[Part; 2]; 3] =
        [[same, same], [same, |x| x.affine(0.5, 0.0)], [|x| x.tanh(), |x| x.sigmoid()?.dropout(0.5)]];
    for (depth, calls) in [(1, 1), (2, 3), (3, 4), (9, 1), (10, 2), (200, 1)] {
        for parts in parts {
            let x = leaf(&[0.3, -0.7, 1.1]);
            let mut tape = Tape::train(5);
            let y = plain(0, depth, calls, parts, &x)?;
            let after = Tensor::ones([64], DType::F64, device())?.dropout(0.5)?;
            let expected = (values(&y), values(tape.backward(&y.sum(&[])?)?.get(&x).unwrap()), values(&after));
            let runs = counters(depth);
            let mut tape = Tape::train(5);
            let y = nest(0, depth, calls, parts, &runs, &x)?;
            let after = Tensor::ones([64], DType::F64, device())?.dropout(0.5)?;
            assert_eq!(tape.len(), 1);
            let grads = tape.backward(&y.sum(&[])?)?;
            assert_eq!((values(&y), values(grads.get(&x).unwrap()), values(&after)), expected, "depth {depth}");
            let runs: Vec<usize> = runs.iter().map(Cell::get).collect();
            assert_eq!(runs, documented(depth, calls), "depth {depth}, {calls} calls");
        }
    }
    Ok(())
}

/// Parameters at every level, under one name and under several, get the gradients of the plain program.
#[test]
fn parameters_of_a_deep_nest() -> Result<()> {
    fn level(params: &[Param], shared: &Param, x: &Tensor, nested: bool) -> Result<Tensor> {
        let Some((first, rest)) = params.split_first() else { return x.mul(&shared.tensor()) };
        let (first, rest, shared) = (first.clone(), rest.to_vec(), shared.clone());
        let f = move |x: &[Tensor]| {
            let y = level(&rest, &shared, &x[0].mul(&first.tensor())?, nested)?;
            y.add(&shared.tensor())?.tanh()
        };
        if nested { checkpoint(f, &[x]) } else { f(std::slice::from_ref(x)) }
    }
    let params: Vec<Param> = (0..30).map(|i| Param::new(vector(&[1.0 + 0.01 * i as f64, 0.9])).unwrap()).collect();
    let (shared, x) = (Param::new(vector(&[0.2, -0.1]))?, leaf(&[0.5, 2.0]));
    let gradients = |nested: bool| -> Result<Vec<Vec<f64>>> {
        let mut tape = Tape::grad();
        let y = level(&params, &shared, &x, nested)?;
        let grads = tape.backward(&y.sum(&[])?)?;
        let of_params = params.iter().chain([&shared]).map(|param| values(grads.param(param).unwrap()));
        Ok(of_params.chain([values(grads.get(&x).unwrap())]).collect())
    };
    assert_eq!(gradients(true)?, gradients(false)?);
    Ok(())
}

/// A segment that fails deep inside, and whose caller continues without it, does so in each run.
#[test]
fn a_nest_may_go_on_after_a_failure() -> Result<()> {
    fn level(n: usize, x: &Tensor) -> Result<Tensor> {
        if n == 0 {
            return x.square();
        }
        let f = move |x: &[Tensor]| {
            // Fails after an inner segment, so that entries of a failed one are skipped.
            let failed = checkpoint(|x| checkpoint(|x| x[0].exp(), &[&x[0]])?.narrow(0, 9, 9), &[&x[0]]);
            assert!(failed.is_err());
            level(n - 1, &x[0].affine(1.0, 0.25)?)
        };
        checkpoint(f, &[x])
    }
    for depth in [3, 12, 20] {
        let x = leaf(&[1.0, 2.0]);
        let mut tape = Tape::grad();
        let loss = level(depth, &x)?.sum(&[])?;
        let moved = 0.25 * depth as f64;
        assert_eq!(values(tape.backward(&loss)?.get(&x).unwrap()), [2.0 * (1.0 + moved), 2.0 * (2.0 + moved)]);
    }
    Ok(())
}

#[test]
fn a_segment_that_does_something_else_is_refused() -> Result<()> {
    type Change = fn(bool, &Tensor) -> Result<Tensor>;
    let changes: [Change; 5] = [
        |again, x| if again { x.reshape([2, 1]) } else { x.exp() },
        |again, x| if again { x.to_dtype(DType::F32) } else { x.exp() },
        |again, x| if again { Ok(x.detach()) } else { x.exp() },
        |again, x| if again { x.exp() } else { checkpoint(|x| x[0].exp(), &[x]) },
        |again, x| if again { checkpoint(|x| x[0].exp(), &[x])?.exp() } else { x.exp() },
    ];
    for (index, change) in changes.into_iter().enumerate() {
        for around in [0, 10] {
            let runs = Rc::new(Cell::new(0));
            let x = leaf(&[1.0, 2.0]);
            let mut tape = Tape::grad();
            let loss = wrapped(around, change, &runs, &x)?.sum(&[])?;
            match tape.backward(&loss).map_err(Error::into_kind) {
                Err(ErrorKind::Argument { op: "checkpoint", message }) => {
                    assert!(message.contains("rerun"), "{message}")
                }
                // A shallow inner segment leaves no trace: it may come and go.
                Ok(_) if index >= 3 && around == 0 => {}
                other => panic!("{index} below {around}: {other:?}"),
            }
        }
    }
    Ok(())
}

/// `change` as a segment below others, which is told whether it has run before.
fn wrapped(
    around: usize,
    change: fn(bool, &Tensor) -> Result<Tensor>,
    runs: &Rc<Cell<usize>>,
    x: &Tensor,
) -> Result<Tensor> {
    let counted = runs.clone();
    if around > 0 {
        return checkpoint(move |x| wrapped(around - 1, change, &counted, &x[0]), &[x]);
    }
    let f = move |x: &[Tensor]| {
        counted.set(counted.get() + 1);
        change(counted.get() > 1, &x[0])
    };
    checkpoint(f, &[x])
}

/// A nest works or is an error on any thread; it never overflows the stack.
#[test]
fn a_nest_fits_its_thread_or_is_refused() {
    fn down(n: usize, x: &Tensor) -> Result<Tensor> {
        if n == 0 {
            return x.square();
        }
        checkpoint(move |x| down(n - 1, &x[0]), &[x])
    }
    let on = |kib: usize, depth: usize, taped: bool| -> Result<Vec<f64>> {
        let run = move || {
            let x = leaf(&[3.0]);
            if !taped {
                return Ok(values(&down(depth, &x)?));
            }
            let mut tape = Tape::grad();
            let y = down(depth, &x)?;
            Ok(values(tape.backward(&y)?.get(&x).unwrap()))
        };
        thread::Builder::new().stack_size(kib << 10).spawn(run).unwrap().join().unwrap()
    };
    for (taped, expected) in [(true, 6.0), (false, 9.0)] {
        for (kib, depth, fits) in [
            (1024, 8, Some(true)),
            (2048, 200, Some(true)),
            (2048, 1000, None),
            (64 << 10, 3000, Some(true)),
            (2048, 50_000, Some(false)),
            (1024, 50_000, Some(false)),
        ] {
            match on(kib, depth, taped).map_err(Error::into_kind) {
                Ok(value) => assert!(fits != Some(false) && value == [expected], "{depth} on {kib} KiB: {value:?}"),
                Err(ErrorKind::Argument { op: "checkpoint", message }) => {
                    assert!(fits != Some(true) && message.contains("stack_size"), "{depth} on {kib} KiB: {message}");
                }
                Err(error) => panic!("{depth} on {kib} KiB: {error}"),
            }
        }
    }
}

/// A chain of ops that are recomputed in the backward pass does not recurse either.
#[test]
fn long_chains_of_cheap_ops() -> Result<()> {
    let (x, weight) = (grid(2, 4).requires_grad()?, grid(4, 4).requires_grad()?);
    let mut tape = Tape::train(1);
    let mut y = x.tanh()?;
    for _ in 0..20_000 {
        y = y.dropout(1e-9)?;
    }
    let loss = y.linear(&weight, None)?.sum(&[])?;
    drop(y);
    let grads = tape.backward(&loss)?;
    let expected: Vec<f64> = values(&x.tanh()?.sum(&[0])?);
    for row in values(grads.get(&weight).unwrap()).chunks(4) {
        assert!(row.iter().zip(&expected).all(|(got, want)| (got - want).abs() < 1e-4), "{row:?} {expected:?}");
    }
    Ok(())
}
