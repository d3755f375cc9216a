//! Several threads: gradients that would be lost are errors, nothing deadlocks, and results are bit-identical to those
//! of one thread.

mod common;
#[path = "threads/sharing.rs"]
mod sharing;

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use common::device;
use rayon::prelude::*;
use x_transformers::{
    Backward, DType, Error, ErrorKind, Gradients, Init, InputGrads, Param, ParamMap, ParamStore, Philox, Result, Tape,
    Tensor, checkpoint,
    config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    discrete, io,
    models::{AutoregressiveWrapper, ForwardOptions, GenerateOptions},
    record,
    train::{AdamW, AdamWOptions, Optimizer},
};

/// Table of the public types that are `Send` and `Sync`, from the book's page on embedding, checked by the compiler.
mod table {
    use std::collections::BTreeMap;

    use x_transformers::{
        config::*, device::*, io::*, models::*, nn::*, ops::*, pretrained::*, profile::*, train::*, *,
    };

    /// Does not compile if a type lacks the trait.
    macro_rules! has {
        ($trait:ident: $($type:ty),+) => {$({
            fn check<T: $trait>() {}
            check::<$type>();
        })+};
    }

    /// Does not compile if a type has the trait: two impls fit then, and `_` could be either.
    macro_rules! lacks {
        ($trait:ident: $($type:ty),+) => {$({
            trait Ambiguous<A> {
                fn item() {}
            }
            impl<T: ?Sized> Ambiguous<()> for T {}
            struct Has;
            impl<T: ?Sized + $trait> Ambiguous<Has> for T {}
            let _ = <$type as Ambiguous<_>>::item;
        })+};
    }

    /// Enters types into the table after a check of both traits.
    macro_rules! types {
        ($table:ident, $send:ident Send, $sync:ident Sync: $($type:ty),+ $(,)?) => {
            $send!(Send: $($type),+);
            $sync!(Sync: $($type),+);
            $($table.insert(stringify!($type), (stringify!($send) == "has", stringify!($sync) == "has"));)+
        };
    }

    fn compiled() -> BTreeMap<&'static str, (bool, bool)> {
        let mut table = BTreeMap::new();
        types!(table, has Send, has Sync: Tensor, Gradients, Shape, DType, Device, Error, Param, ParamMap, ParamStore, Init,
            LeafId, Philox, RawKernel, MemoryStats, Level, Precision);
        types!(table, has Send, has Sync: TransformerWrapper, AutoregressiveWrapper, ContinuousTransformerWrapper,
            ContinuousAutoregressiveWrapper, XTransformer, ViTransformerWrapper, SentenceEncoder, Model, Output,
            RunOptions, ForwardOptions, GenerateOptions, AttentionLayers, Attention, FeedForward, Linear, Embedding,
            Residual, AttentionInput, AttentionOutput, LayersOutput, PositionBias, RelativePositionBias, AbsolutePositionalEmbedding,
            PackedMatrix, Config);
        types!(table, has Send, has Sync: DecodeCache, LayersCache, TokenStream);
        types!(table, has Send, has Sync: AdamW, Sgd, Lion, Adafactor, Muon, Ema, Swapped, GradScaler, Checkpoint, Schedule,
            TrainOptions, StepReport);
        types!(table, has Send, has Sync: ByteText, TokenBatch, TokenData, TokenFile, TokenWriter, Sequences,
            Mixture<TokenBatch>);
        types!(table, has Send, has Sync: TensorFile, Pretrained, Report);
        types!(table, has Send, lacks Sync: Trainer);
        types!(table, lacks Send, lacks Sync: Tape, Profile);
        #[cfg(feature = "cuda")]
        {
            use x_transformers::{Graph, device::CudaDevice};
            types!(table, has Send, has Sync: CudaDevice);
            types!(table, has Send, lacks Sync: RecordedStep, RecordedDecode);
            has!(Send: Graph<Tensor>);
            lacks!(Sync: Graph<Tensor>);
        }
        table.insert("Graph", (true, false));
        table
    }

    #[test]
    fn types_are_send_and_sync_as_documented() {
        let (compiled, text) = (compiled(), include_str!("../docs/src/embedding.md"));
        let text = text.split("\n## ").find(|section| section.starts_with("Threads\n")).unwrap();
        let mut rows = 0;
        for row in text.lines().filter(|line| line.starts_with("| ")).skip(1) {
            let columns: Vec<&str> = row.split('|').map(str::trim).collect();
            let said = (columns[2] == "yes", columns[3] == "yes");
            for name in columns[1].split('`').skip(1).step_by(2) {
                let gpu = !cfg!(feature = "cuda") && name.starts_with("Recorded");
                assert!(
                    gpu || compiled.get(name) == Some(&said),
                    "{name} is {:?}, the table says {said:?}",
                    compiled.get(name)
                );
                rows += 1;
            }
        }
        assert!(rows >= 30, "the table has {rows} types");
    }
}

fn vector(values: &[f64]) -> Tensor {
    Tensor::from_slice(values, [values.len()], device()).unwrap()
}

fn leaf(values: &[f64]) -> Tensor {
    vector(values).requires_grad().unwrap()
}

fn gradient(grads: &Gradients, leaf: &Tensor) -> Vec<f64> {
    grads.get(leaf).unwrap().to_f64_vec().unwrap()
}

/// Runs `f` on another thread, which has no tape.
fn elsewhere<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| scope.spawn(f).join().unwrap())
}

/// Fails if `f` takes minutes, because a test that hangs does not say why.
fn in_time<R: Send + 'static>(f: impl FnOnce() -> R + Send + 'static) -> R {
    let (done, wait) = mpsc::channel();
    let thread = thread::spawn(move || done.send(f()));
    match wait.recv_timeout(Duration::from_secs(300)) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("deadlock"),
        Err(mpsc::RecvTimeoutError::Disconnected) => panic!("{:?}", thread.join().map(drop)),
    }
}

/// An identity that a user wrote.
fn identity(x: &Tensor) -> Result<Tensor> {
    struct Identity;
    impl Backward for Identity {
        fn name(&self) -> &'static str {
            "identity"
        }
        fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
            Ok(InputGrads::one(grad))
        }
    }
    record("identity", x.detach(), &[x], |_| Identity)
}

type Op = fn(&Tensor) -> Result<Tensor>;

/// Ways for a matrix to enter an op, and the op that is named.
const OPS: [(&str, Op); 25] = [
    ("mul", |x| x.mul(x)),
    ("add", |x| x.detach().add(x)),
    ("exp", |x| x.exp()),
    ("affine", |x| x.affine(2.0, 0.0)),
    ("matmul", |x| x.matmul(&x.detach())),
    ("matmul", |x| x.detach().matmul(x)),
    ("linear", |x| x.detach().linear(x, None)),
    ("sum", |x| x.sum(&[])),
    ("softmax", |x| x.softmax()),
    ("narrow", |x| x.narrow(0, 0, 1)),
    ("transpose", |x| x.transpose(0, 1)),
    ("reshape", |x| x.reshape([4])),
    ("expand", |x| x.unsqueeze(0)?.expand([2, 2, 2])),
    ("cat", |x| Tensor::cat(&[&x.detach(), x], 0)),
    ("to_dtype", |x| x.to_dtype(DType::F32)),
    ("to_dtype", |x| x.to_dtype(DType::I64)),
    ("argmax", |x| x.argmax(-1)),
    ("gt", |x| x.gt(&x.detach())),
    ("where_cond", |x| Tensor::ones([2, 2], DType::Bool, device())?.where_cond(x, &x.detach())),
    ("contiguous", |x| x.detach().transpose(0, 1)?.add(&x.transpose(0, 1)?.contiguous()?)),
    ("max", |x| x.max(0)),
    ("checkpoint", |x| checkpoint(|x| x[0].exp(), &[x])),
    ("identity", identity),
    ("mine", |x| discrete("mine", &[x]).map(|()| x.detach())),
    ("layer_norm", |x| x.layer_norm(None, None, 1e-5)),
];

fn matrix() -> Tensor {
    Tensor::from_slice(&[1.0, 2.0, 3.0, 4.0], [2, 2], device()).unwrap()
}

/// A node of a tape is an error on any other thread, even after its tape is dropped.
#[test]
fn a_node_on_another_thread_is_refused() -> Result<()> {
    let x = matrix().requires_grad()?;
    let mut tape = Tape::grad();
    let y = x.square()?;
    let dropped = {
        let _other = Tape::grad();
        x.square()?
    };
    let refused = |node: &Tensor, taped: bool| {
        for (name, op) in OPS {
            let result = elsewhere(|| {
                let _tape = taped.then(Tape::grad);
                op(node)
            });
            let Err(ErrorKind::OtherThread { op, by: None }) = result.as_ref().map_err(Error::kind) else {
                panic!("{name} with a tape: {taped}: {result:?}");
            };
            // Views that come first refuse first.
            assert!(*op == name || ["expand", "contiguous", "transpose"].contains(&name), "{name}: {op}");
            let message = result.unwrap_err().to_string();
            assert!(message.contains("thread") && message.contains(".detach()"), "{message}");
            let _ = elsewhere(|| op_of(name)(&node.detach())).unwrap();
        }
    };
    refused(&y, false);
    refused(&y, true);
    refused(&dropped, false);
    // Values may be read anywhere.
    let read =
        elsewhere(|| (y.to_f64_vec().unwrap(), format!("{y} {y:?}"), y.detach().sum(&[]).unwrap().item().unwrap()));
    assert_eq!((read.0, read.2), (vec![1.0, 4.0, 9.0, 16.0], 30.0));
    let grads = tape.backward(&y.sum(&[])?)?;
    assert_eq!(gradient(&grads, &x), [2.0, 4.0, 6.0, 8.0], "refusals cost the tape nothing");
    refused(&y, false);
    Ok(())
}

fn op_of(name: &str) -> Op {
    OPS.iter().find(|(other, _)| *other == name).unwrap().1
}

/// The leaf itself is free on other threads (that is inference), but its result must not enter a tape of this one.
#[test]
fn values_computed_from_a_leaf_on_another_thread_are_refused() -> Result<()> {
    let x = leaf(&[1.0, 2.0]);
    let made = |op: Op| elsewhere(|| op(&x)).unwrap();
    let squared = made(|x| x.square());
    assert_eq!(squared.to_f64_vec()?, [1.0, 4.0]);
    let chain =
        made(|x| x.square()?.exp()?.reshape([2, 1])?.transpose(0, 1)?.narrow(1, 0, 1)?.sum(&[0])?.add(&vector(&[1.0])));
    let passed = elsewhere(|| elsewhere(|| squared.exp()).unwrap().neg()).unwrap();
    let by = |result: Result<Tensor>| match result.map_err(Error::into_kind) {
        Err(ErrorKind::OtherThread { op, by: Some(by) }) => (op, by),
        other => panic!("{other:?}"),
    };
    let mut tape = Tape::grad();
    assert_eq!(by(squared.exp()), ("exp", "square"));
    assert_eq!(by(x.add(&squared)), ("add", "square"));
    assert_eq!(by(chain.exp()), ("exp", "square"));
    assert_eq!(by(passed.exp()), ("exp", "square"));
    assert_eq!(by(squared.narrow(0, 0, 1)), ("narrow", "square"));
    assert_eq!(by(squared.argmax(0)), ("argmax", "square"));
    assert_eq!(by(squared.to_dtype(DType::I64)), ("to_dtype", "square"));
    assert_eq!(by(identity(&squared)), ("identity", "square"));
    assert_eq!(by(checkpoint(|x| x[0].exp(), &[&squared])), ("checkpoint", "square"));
    let captured = squared.clone();
    assert_eq!(by(checkpoint(move |x| x[0].mul(&captured), &[&x])), ("mul", "square"));
    let captured = squared.clone();
    assert_eq!(by(checkpoint(move |_| Ok(captured.clone()), &[&x])), ("checkpoint", "square"));
    assert_eq!(by(tape.backward(&chain).map(|_| x.clone())), ("backward", "square"));
    let message = x.add(&squared).unwrap_err().to_string();
    assert!(message.starts_with("add: ") && message.contains("`square`") && message.contains(".detach()"), "{message}");
    // Explicitly detached tensors are values.
    let loss = x.mul(&squared.detach())?.sum(&[])?;
    assert_eq!(gradient(&tape.backward_with(&loss, &Tensor::scalar(1.0, device())?)?, &x), [1.0, 4.0]);
    Ok(())
}

/// Results that a thread computes before its tape are constants to the tape, on one thread as on many.
#[test]
fn results_from_before_the_tape_are_constants() -> Result<()> {
    let x = leaf(&[3.0]);
    let target = x.square()?;
    let mut tape = Tape::grad();
    let loss = x.mul(&target)?;
    assert_eq!(gradient(&tape.backward(&loss)?, &x), [9.0]);
    assert!(matches!(Tape::grad().backward(&target).map_err(Error::into_kind), Err(ErrorKind::NotTracked)));
    elsewhere(|| {
        let target = x.square()?;
        let mut tape = Tape::grad();
        let grads = tape.backward(&x.mul(&target)?)?;
        assert_eq!(gradient(&grads, &x), [9.0]);
        // From here, `target` is foreign.
        let mine = tape_of(|| elsewhere(|| target.exp()).and_then(|y| y.exp()));
        assert!(matches!(mine, Ok(Ok(_))), "it comes back to its own thread: {mine:?}");
        Ok::<_, Error>(())
    })?;
    // A history on two threads is foreign to the tapes of both.
    let both = elsewhere(|| x.exp()).and_then(|there| x.exp()?.add(&there))?;
    let _tape = Tape::grad();
    assert!(matches!(both.exp().map_err(Error::into_kind), Err(ErrorKind::OtherThread { op: "exp", by: Some(_) })));
    Ok(())
}

fn tape_of<R>(f: impl FnOnce() -> R) -> Result<R> {
    let _tape = Tape::grad();
    Ok(f())
}

/// Results without a gradient carry no history: tokens that one thread samples are data for another.
#[test]
fn integers_and_cotangents_are_free() -> Result<()> {
    let x = leaf(&[1.0, 5.0, 2.0]);
    let index = elsewhere(|| x.exp()?.argmax(0))?;
    let weights = elsewhere(|| x.exp())?;
    let mut tape = Tape::grad();
    let y = x.mul(&index.to_dtype(DType::F64)?.expand([3])?)?;
    let grads = tape.backward_with(&y, &weights)?;
    assert_eq!(gradient(&grads, &x), weights.to_f64_vec()?);
    Ok(())
}

/// Tapes on two threads, and tensors that go back and forth.
#[test]
fn tapes_on_two_threads_do_not_mix() -> Result<()> {
    let weight = Param::new(vector(&[2.0, 3.0]))?;
    let mut tape = Tape::grad();
    let here = weight.tensor().square()?;
    let (there, grads) = elsewhere(|| {
        let mut tape = Tape::grad();
        let there = weight.tensor().exp()?;
        assert!(matches!(
            there.add(&here).map_err(Error::into_kind),
            Err(ErrorKind::OtherThread { op: "add", by: None })
        ));
        assert!(matches!(
            tape.backward_with(&here, &here).map_err(Error::into_kind),
            Err(ErrorKind::OtherThread { op: "backward", by: None })
        ));
        Ok::<_, Error>((there.clone(), tape.backward(&there.sum(&[])?)?))
    })?;
    assert!(matches!(here.add(&there).map_err(Error::into_kind), Err(ErrorKind::OtherThread { op: "add", by: None })));
    assert!(matches!(
        tape.backward_with(&there, &there).map_err(Error::into_kind),
        Err(ErrorKind::OtherThread { op: "backward", by: None })
    ));
    let mut own = tape.backward(&here.sum(&[])?)?;
    // Gradients are values: they may be added up wherever they come from.
    own.accumulate(grads)?;
    let sum = own.param(&weight).unwrap().to_f64_vec()?;
    assert_eq!(sum, [4.0 + 2f64.exp(), 6.0 + 3f64.exp()]);
    Ok(())
}

/// A weight under two names, used by a tape and by another thread at once.
#[test]
fn a_tied_parameter_is_one_leaf_on_every_thread() -> Result<()> {
    let store = ParamStore::new(0, DType::F64, device());
    let first = store.param("first", [2], Init::Constant(3.0))?;
    let second = store.tie("second", &first)?;
    let mut tape = Tape::grad();
    let other = elsewhere(|| second.tensor().square())?;
    assert!(matches!(
        first.tensor().add(&other).map_err(Error::into_kind),
        Err(ErrorKind::OtherThread { op: "add", by: Some("square") })
    ));
    let loss = first.tensor().mul(&second.tensor())?.sum(&[])?;
    assert_eq!(tape.backward(&loss)?.param(&second).unwrap().to_f64_vec()?, [6.0, 6.0]);
    Ok(())
}

/// `rayon` moves closures to other threads as it likes: a gradient is whole or an error, never a part.
#[test]
fn rayon_gives_the_whole_gradient_or_an_error() -> Result<()> {
    let x = leaf(&[1.0, 2.0, 3.0]);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let whole_or_refused = |grads: Result<Gradients>, expected: &[f64]| match grads {
        Ok(grads) => assert_eq!(gradient(&grads, &x), expected),
        Err(error) => assert!(matches!(error.kind(), ErrorKind::OtherThread { .. }), "{error}"),
    };
    for round in 0..100 {
        whole_or_refused(
            pool.install(|| {
                let mut tape = Tape::grad();
                let half = || {
                    thread::sleep(Duration::from_micros(50 * (round % 2)));
                    x.square()?.sum(&[])
                };
                let (a, b) = rayon::join(half, half);
                tape.backward(&a?.add(&b?)?)
            }),
            &[4.0, 8.0, 12.0],
        );
        whole_or_refused(
            pool.install(|| {
                let mut tape = Tape::grad();
                let y = x.square()?;
                let parts: Vec<_> = (0..3).into_par_iter().map(|i| y.narrow(0, i, 1)).collect::<Result<_>>()?;
                tape.backward(&Tensor::cat(&parts.iter().collect::<Vec<_>>(), 0)?.sum(&[])?)
            }),
            &[2.0, 4.0, 6.0],
        );
    }
    // From a thread that is not of the pool, all of it is elsewhere.
    let mut tape = Tape::grad();
    let parts: Vec<_> = (0..3).into_par_iter().map(|i| x.narrow(0, i, 1)).collect::<Result<_>>()?;
    let whole = Tensor::cat(&parts.iter().collect::<Vec<_>>(), 0);
    assert!(
        matches!(whole.as_ref().map_err(Error::kind), Err(ErrorKind::OtherThread { op: "cat", by: Some("narrow") })),
        "{whole:?}"
    );
    // A tape for each closure is how batches are spread over threads.
    let batches = (0..4).into_par_iter().map(|scale| {
        let mut tape = Tape::grad();
        let loss = x.affine(scale as f64, 0.0)?.sum(&[])?;
        tape.backward(&loss)
    });
    let mut total = Gradients::default();
    batches.collect::<Result<Vec<_>>>()?.into_iter().try_for_each(|grads| total.accumulate(grads))?;
    assert_eq!(gradient(&total, &x), [6.0; 3]);
    assert!(matches!(tape.backward(&x.sum(&[])?), Ok(grads) if gradient(&grads, &x) == [1.0; 3]));
    Ok(())
}

// Waiting.

/// Runs `f` on a thread of a pool that also answers requests from outside, as fast as they come.
fn beside_requests(request: impl Fn() + Send + Sync + 'static, f: impl FnOnce() + Send) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let (request, done) = (Arc::new(request), AtomicBool::new(false));
    let open = Arc::new(AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if open.load(Ordering::Relaxed) < 100 {
                    let (request, open) = (request.clone(), open.clone());
                    open.fetch_add(1, Ordering::Relaxed);
                    pool.spawn(move || {
                        request();
                        open.fetch_sub(1, Ordering::Relaxed);
                    });
                }
                thread::sleep(Duration::from_micros(20));
            }
        });
        // A panic of `f` must end the scope too.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.install(f)));
        done.store(true, Ordering::Relaxed);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// A thread of the pool that waits inside an op runs no other jobs, which would be recorded on its tape.
#[test]
fn other_jobs_stay_off_the_tape_of_a_pool_thread() {
    let x = Tensor::ones([300_000], DType::F32, device()).unwrap();
    let weight = Param::new(Tensor::ones([1], DType::F32, device()).unwrap()).unwrap();
    in_time(move || {
        let (theirs, taped) = (weight.clone(), Arc::new(AtomicUsize::new(0)));
        let seen = taped.clone();
        let request = move || {
            // Refused if there is a tape, though this job has none.
            let answer = theirs.tensor().exp().and_then(|y| y.argmax(0));
            seen.fetch_add(usize::from(answer.is_err()), Ordering::Relaxed);
        };
        beside_requests(request, || {
            for seed in 0..200 {
                let tape = Tape::train(seed);
                let _ = x.mul(&weight.tensor()).unwrap();
                assert_eq!(tape.len(), 1, "ops of another task are on this tape");
            }
        });
        assert_eq!(taped.load(Ordering::Relaxed), 0);
    });
}

/// Parameters and gradients of ones.
fn ones(names: usize, elements: usize) -> (ParamMap, Gradients) {
    let store = ParamStore::new(0, DType::F32, device());
    let params: Vec<Param> =
        (0..names).map(|i| store.param(&format!("p{i:03}"), [elements], Init::Constant(1.0)).unwrap()).collect();
    let mut tape = Tape::grad();
    let sums: Vec<Tensor> = params.iter().map(|param| param.tensor().sum(&[]).unwrap().reshape([1]).unwrap()).collect();
    let loss = Tensor::cat(&sums.iter().collect::<Vec<_>>(), 0).unwrap().sum(&[]).unwrap();
    (store.params(), tape.backward(&loss).unwrap())
}

/// Jobs of a server read the model while a thread of the same pool trains it.
#[test]
fn a_pool_that_serves_while_it_trains_does_not_deadlock() {
    let (params, grads) = ones(2, 200_000);
    in_time(move || {
        let reader = params.get("p001").unwrap().clone();
        beside_requests(
            move || drop(std::hint::black_box(reader.tensor())),
            || {
                let mut optimizer = AdamW::new(AdamWOptions::default()).unwrap();
                for _ in 0..100 {
                    optimizer.step(&params, &grads, 1e-3, None).unwrap();
                }
            },
        );
    });
}

/// Two optimizers that know the same parameters by other names lock them in one order.
#[test]
fn two_optimizers_of_the_same_parameters_do_not_deadlock() {
    let (params, grads) = ones(60, 8);
    let renamed = ParamStore::new(0, DType::F32, device());
    for (index, (_, param)) in params.iter().enumerate() {
        renamed.tie(&format!("q{:03}", 99 - index), param).unwrap();
    }
    in_time(move || {
        thread::scope(|scope| {
            for params in [params, renamed.params()] {
                let grads = &grads;
                scope.spawn(move || {
                    let mut optimizer = AdamW::new(AdamWOptions::default()).unwrap();
                    for _ in 0..300 {
                        optimizer.step(&params, grads, 1e-3, None).unwrap();
                    }
                });
            }
        });
    });
}

/// A state dict that is taken while another thread trains has the weights of one step.
#[test]
fn a_state_dict_is_of_one_step() {
    let (params, grads) = ones(40, 4);
    in_time(move || {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut optimizer = AdamW::new(AdamWOptions::default()).unwrap();
                for _ in 0..300 {
                    optimizer.step(&params, &grads, 1e-3, None).unwrap();
                }
                done.store(true, Ordering::Relaxed);
            });
            // All parameters have the same values at every step.
            while !done.load(Ordering::Relaxed) {
                let values: Vec<_> = params.state_dict().into_values().map(|p| p.to_vec::<f32>().unwrap()).collect();
                assert!(values.iter().all(|value| *value == values[0]), "weights of two steps");
            }
        });
    });
}

/// A scope whose threads all have to succeed.
fn in_scope<'e>(f: impl for<'s> FnOnce(&'s thread::Scope<'s, 'e>)) {
    thread::scope(|scope| f(scope));
}
