//! Ownership of the memory that a CUDA graph reads and writes: graphs outlive the tensors and models that they were
//! recorded with, tensors outlive graphs, and a failed recording leaves the device unchanged.
//!
//! Runs on the device that `XT_TEST_DEVICE` names, like `tests/cuda.rs`. On the emulated driver a use after free is an
//! error; on a card the same mistake gives foreign values.

#![cfg(feature = "cuda")]

#[path = "graphs/changes.rs"]
mod changes;
#[path = "common/gpu.rs"]
mod common;
#[path = "graphs/threads.rs"]
mod threads;
#[path = "graphs/trainer.rs"]
mod trainer;

use std::{
    cell::{Cell, RefCell},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use common::{Gpu, alive, count, emulated, fail, gpu, is_emulated};
use x_transformers::{
    DType, Error, ErrorKind, Graph, Init, Param, ParamMap, ParamStore, QuantType, Result, Tape, Tensor,
    config::{AttentionLayersConfig, SamplingConfig, TransformerWrapperConfig},
    models::{DecodeCache, ForwardOptions, RecordedDecode, TransformerWrapper, sample_tokens},
    nn::{Branch, Past},
    train::{AdamW, AdamWOptions, Optimizer, RecordedStep},
};

fn full(n: usize, value: f64, gpu: &Gpu) -> Result<Tensor> {
    Tensor::full([n], value, DType::F32, gpu)
}

fn none() -> ParamMap {
    ParamMap::default()
}

/// Runs a test with a pool that keeps freed blocks for the next tensor, and with one that frees them at once.
fn with_every_pool(gpu: &Gpu, test: impl Fn() -> Result<()>) -> Result<()> {
    gpu.trim();
    test()?;
    // Tables and constants are there now.
    let live = gpu.memory().live;
    gpu.trim();
    gpu.set_cache_limit(0);
    test()?;
    assert_eq!(gpu.memory().live, live, "memory is left over");
    Ok(())
}

/// Takes every free block of these sizes, which nobody may write to any more.
struct Victims(Vec<(Tensor, f32)>);

impl Victims {
    fn new(sizes: &[usize], gpu: &Gpu) -> Result<Self> {
        let tensor = |(i, &n): (usize, &usize)| Ok((full(n, 100.0 + i as f64, gpu)?, 100.0 + i as f32));
        sizes.iter().cycle().take(6 * sizes.len()).enumerate().map(tensor).collect::<Result<_>>().map(Self)
    }

    fn check(&self) -> Result<()> {
        for (tensor, value) in &self.0 {
            assert!(tensor.to_vec::<f32>()?.iter().all(|x| x == value), "a graph has written to memory of others");
        }
        Ok(())
    }
}

/// Everything that the closure captured is dropped when the recording ends, and the graph still reads it.
#[test]
fn captured_tensors_live_as_long_as_the_graph() -> Result<()> {
    let Some(gpu) = gpu("captured_tensors_live_as_long_as_the_graph") else { return Ok(()) };
    with_every_pool(&gpu, || {
        let x = full(1000, 1.0, &gpu)?;
        let whole = full(1000, 2.0, &gpu)?;
        // Views: of the middle of a tensor, and with other strides.
        let middle = Tensor::generate([3000], DType::F32, &gpu, |i| if i / 1000 == 1 { 3.0 } else { 50.0 })?;
        let middle = middle.narrow(0, 1000, 1000)?;
        let turned = Tensor::generate([10, 100], DType::F32, &gpu, |i| (i % 100) as f64)?.transpose(0, 1)?;
        // Whole numbers: a product of cuBLAS that is exact.
        let matrix = Tensor::generate([1000, 2], DType::F32, &gpu, |i| (i % 2) as f64)?;
        let mut graph = Graph::capture(std::slice::from_ref(&x), &none(), move |i| {
            let sum = i[0].mul(&whole)?.add(&middle)?.add(&turned.reshape([1000])?)?;
            Ok((sum, i[0].reshape([1, 1000])?.matmul(&matrix)?))
        })?;
        let victims = Victims::new(&[1000, 2000, 3000], &gpu)?;
        gpu.trim();
        for value in [1.0, 4.0] {
            let (sum, product) = graph.replay(&[full(1000, value, &gpu)?])?;
            let expected: Vec<f32> = (0..1000).map(|i| (value * 2.0 + 3.0 + (i / 10) as f64) as f32).collect();
            assert_eq!(sum.to_vec::<f32>()?, expected);
            assert_eq!(product.to_vec::<f32>()?, [0.0, 1000.0 * value as f32]);
        }
        victims.check()
    })
}

/// A recorded graph has no gradient: a tracked input is an error, not silently detached.
#[test]
fn tracked_inputs_are_refused() -> Result<()> {
    let Some(gpu) = gpu("tracked_inputs_are_refused") else { return Ok(()) };
    let x = full(2, 1.0, &gpu)?.requires_grad()?;
    let mut graph = Graph::capture(std::slice::from_ref(&x), &none(), |i| i[0].exp())?;
    let foreign = std::thread::scope(|scope| scope.spawn(|| x.exp()).join().expect("a tensor"))?;
    let _tape = Tape::grad();
    assert!(matches!(
        graph.replay(&[x.square()?]).map_err(Error::into_kind),
        Err(ErrorKind::NoGradient { op: "graph" })
    ));
    assert!(matches!(
        graph.replay(&[foreign]).map_err(Error::into_kind),
        Err(ErrorKind::OtherThread { op: "graph", .. })
    ));
    // Any recording is refused while a tape records.
    let taped = Graph::capture(&[x.square()?], &none(), |i| i[0].exp());
    assert!(matches!(taped.map_err(Error::into_kind), Err(ErrorKind::Argument { op: "graph", .. })));
    graph.replay(&[x.detach()])?;
    Ok(())
}

/// A tensor that the closure stores elsewhere is dropped while the graph still writes to it.
#[test]
fn tensors_that_escape_belong_to_their_graph() -> Result<()> {
    let Some(gpu) = gpu("tensors_that_escape_belong_to_their_graph") else { return Ok(()) };
    with_every_pool(&gpu, || {
        let x = full(3333, 1.0, &gpu)?;
        let side = RefCell::new(None);
        let mut graph = Graph::capture(std::slice::from_ref(&x), &none(), |i| {
            let h = i[0].exp()?;
            *side.borrow_mut() = Some(h.narrow(0, 5, 100)?);
            h.neg()
        })?;
        drop(side.take());
        gpu.trim();
        let victims = Victims::new(&[3333], &gpu)?;
        for value in [0.0, 1.0] {
            let y = graph.replay(&[full(3333, value, &gpu)?])?.to_vec::<f32>()?;
            assert!(y.iter().all(|y| (f64::from(*y) + value.exp()).abs() < 1e-5), "{}", y[0]);
        }
        victims.check()
    })
}

/// Two graphs use one tensor that nobody else holds, and are dropped in either order.
#[test]
fn two_graphs_share_what_they_captured() -> Result<()> {
    let Some(gpu) = gpu("two_graphs_share_what_they_captured") else { return Ok(()) };
    for first_goes_first in [true, false] {
        with_every_pool(&gpu, || {
            let x = full(2000, 3.0, &gpu)?;
            let weight = full(2000, 2.0, &gpu)?;
            let product = |i: &[Tensor]| i[0].mul(&weight)?.exp();
            let sum = |i: &[Tensor]| i[0].add(&weight)?.neg();
            let first = Graph::capture(std::slice::from_ref(&x), &none(), product)?;
            let second = Graph::capture(std::slice::from_ref(&x), &none(), sum)?;
            drop(weight);
            gpu.trim();
            let victims = Victims::new(&[2000], &gpu)?;
            let mut left: [Option<Graph<Tensor>>; 2] = [Some(first), Some(second)];
            for round in 0..2 {
                for (graph, expected) in left.iter_mut().zip([6f32.exp(), -5.0]) {
                    let Some(graph) = graph else { continue };
                    let y = graph.replay(std::slice::from_ref(&x))?.to_vec::<f32>()?;
                    assert!(y.iter().all(|y| (y - expected).abs() <= 1e-5 * expected.abs()), "{round}: {}", y[0]);
                }
                victims.check()?;
                left[usize::from(!first_goes_first)] = None;
                gpu.trim();
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// The output lives as long as somebody holds it, with the values of the last replay.
#[test]
fn outputs_outlive_their_graph() -> Result<()> {
    let Some(gpu) = gpu("outputs_outlive_their_graph") else { return Ok(()) };
    with_every_pool(&gpu, || {
        let x = full(700, 1.0, &gpu)?;
        let mut graph = Graph::capture(std::slice::from_ref(&x), &none(), |i| Ok([i[0].neg()?, i[0].clone()]))?;
        let [y, input] = graph.replay(std::slice::from_ref(&x))?.clone();
        assert_eq!(y.to_vec::<f32>()?, [-1.0; 700]);
        graph.replay(&[full(700, 2.0, &gpu)?])?;
        assert_eq!(y.to_vec::<f32>()?, [-2.0; 700], "the memory of the output is the same each time");
        drop(graph);
        gpu.trim();
        let victims = Victims::new(&[700], &gpu)?;
        assert_eq!((y.to_vec::<f32>()?, input.to_vec::<f32>()?), (vec![-2.0; 700], vec![2.0; 700]));
        victims.check()
    })
}

/// The closure drops its tensors, trims the pool and changes its limit between the runs, which decides whether blocks
/// are rounded up; it returns a tensor that it has captured, and an empty one.
#[test]
fn closures_may_free_memory() -> Result<()> {
    let Some(gpu) = gpu("closures_may_free_memory") else { return Ok(()) };
    for [first, second] in [[usize::MAX, 0], [0, usize::MAX]] {
        gpu.set_cache_limit(first);
        let (x, calls, w) = (full(3001, 1.0, &gpu)?, Cell::new(0), RefCell::new(Some(full(3001, 2.0, &gpu)?)));
        let kept = full(5, 7.0, &gpu)?;
        let mut graph = Graph::capture(&[x, Tensor::zeros([0], DType::F32, &gpu)?], &none(), |i| {
            calls.set(calls.get() + 1);
            let weight = w.borrow().clone().expect("the recording is the last call");
            let y = i[0].mul(&weight)?;
            drop(weight);
            if calls.get() == 2 {
                drop(w.take());
            }
            gpu.trim();
            let y = y.neg()?.exp()?.ln()?;
            gpu.set_cache_limit(second);
            Ok([y, kept.clone(), i[1].exp()?])
        })?;
        drop(kept);
        let victims = Victims::new(&[3001, 5], &gpu)?;
        for value in [0.5, 2.0] {
            let inputs = [full(3001, value, &gpu)?, Tensor::zeros([0], DType::F32, &gpu)?];
            let [y, kept, empty] = graph.replay(&inputs)?;
            assert!(y.to_vec::<f32>()?.iter().all(|y| (f64::from(*y) + 2.0 * value).abs() < 1e-5));
            assert_eq!((kept.to_vec::<f32>()?, empty.numel()), (vec![7.0; 5], 0));
        }
        victims.check()?;
    }
    Ok(())
}

fn model(packed: bool, alibi: bool, dtype: DType, gpu: &Gpu) -> Result<(TransformerWrapper, ParamMap)> {
    let mut layers = AttentionLayersConfig { heads: 2, ..AttentionLayersConfig::decoder(32, 1) };
    layers.attn.dim_head = 32;
    layers.alibi_pos_bias = alibi;
    layers.rotary_pos_emb = !alibi;
    let config =
        TransformerWrapperConfig { num_tokens: 32, max_seq_len: 16, attn_layers: layers, ..Default::default() };
    let store = ParamStore::new(7, dtype, gpu);
    let mut model = TransformerWrapper::new(&config, &store)?;
    if packed {
        model.quantize(QuantType::Q4_0)?;
    }
    Ok((model, store.params()))
}

fn filled(model: &TransformerWrapper, gpu: &Gpu) -> Result<DecodeCache> {
    let mut cache = model.cache(2, 12, &ForwardOptions::default())?;
    let prompt: Vec<i64> = (0..12).map(|i| (i * 7 + 3) % 32).collect();
    let _ = model.extend(&Tensor::from_slice(&prompt, [2, 6], gpu)?, &[6, 4], None, &mut cache)?;
    Ok(cache)
}

fn sampling() -> SamplingConfig {
    SamplingConfig { temperature: 2.0, ..SamplingConfig::default() }
}

/// The model is dropped before its recorded step runs, with packed weights that are in no map of parameters, and with an
/// empty map.
#[test]
fn a_recorded_decode_outlives_its_model() -> Result<()> {
    let Some(gpu) = gpu("a_recorded_decode_outlives_its_model") else { return Ok(()) };
    let first = Tensor::from_slice(&[5i64, 9], [2], &gpu)?;
    for (packed, alibi) in [(true, true), (false, false)] {
        with_every_pool(&gpu, || {
            let (model, params) = model(packed, alibi, DType::F32, &gpu)?;
            let (mut cache, mut next, mut expected) = (filled(&model, &gpu)?, first.clone(), Vec::new());
            for step in 0..4i64 {
                let hidden = model.extend(&next.reshape([2, 1])?, &[1, 1], None, &mut cache)?;
                let logits = model.logits(&hidden.select(1, 0)?)?.detach();
                next = sample_tokens(&logits, &sampling(), 3, &Tensor::scalar(step, &gpu)?)?;
                expected.push(next.to_vec::<i64>()?);
            }
            drop(cache);
            let params = if packed { params } else { none() };
            let mut decode = RecordedDecode::new(&model, &params, filled(&model, &gpu)?, &sampling(), 3)?;
            drop((model, params));
            gpu.trim();
            let victims = Victims::new(&[16, 32, 512, 1024, 4096], &gpu)?;
            let mut next = first.clone();
            for (step, expected) in expected.iter().enumerate() {
                next = decode.step(&next, step as u64)?;
                assert_eq!(next.to_vec::<i64>()?, *expected, "step {step}");
            }
            victims.check()
        })?;
    }
    Ok(())
}

/// A convolution over the last three positions, and a recurrence of its sums, each with its own slot.
#[derive(Debug)]
struct Mixed {
    taps: Param,
    decay: Param,
}

impl Branch for Mixed {
    fn forward(&self, x: &Tensor, past: &mut Past<'_>) -> Result<Tensor> {
        let (n, taps) = (x.dim(1)?, self.taps.tensor());
        let window = past.window(0, x, 2)?;
        let tap = |k: usize| window.narrow(1, k, n)?.mul(&taps.narrow(0, k, 1)?);
        let sums = tap(0)?.add(&tap(1)?)?.add(&tap(2)?)?;
        let mut state = past.before(1, 1, x.dim(2)?, x)?;
        let mut states = Vec::new();
        for at in 0..n {
            state = state.mul(&self.decay.tensor())?.add(&sums.narrow(1, at, 1)?)?;
            states.push(state.clone());
        }
        let states = Tensor::cat(&states.iter().collect::<Vec<_>>(), 1)?;
        past.keep(1, &states)?;
        Ok(states)
    }
}

/// One recording writes the rows of a custom branch at the end of each sequence, step after step: the tokens are those
/// of plain decoding, and so are the logits of a later step that is not recorded.
#[test]
fn a_recorded_decode_runs_custom_branches() -> Result<()> {
    let Some(gpu) = gpu("a_recorded_decode_runs_custom_branches") else { return Ok(()) };
    with_every_pool(&gpu, || {
        let layers = AttentionLayersConfig { heads: 2, rotary_pos_emb: true, ..AttentionLayersConfig::decoder(32, 2) };
        let config = TransformerWrapperConfig::new(64, 24, layers);
        let store = ParamStore::new(5, DType::F32, &gpu);
        // In place of both feedforwards.
        let model = TransformerWrapper::with_branches(&config, &store, |index, _, store| {
            if index % 2 == 0 {
                return Ok(None);
            }
            let taps = store.param("taps", [3, 32], Init::Normal(0.5))?;
            Ok(Some(Arc::new(Mixed { taps, decay: store.param("decay", [32], Init::Constant(0.75))? })))
        })?;
        let (params, first) = (store.params(), Tensor::from_slice(&[5i64, 9], [2], &gpu)?);
        let next_logits = |tokens: &Tensor, cache: &mut DecodeCache| {
            let hidden = model.extend(&tokens.reshape([2, 1])?, &[1, 1], None, cache)?;
            Ok::<_, Error>(model.logits(&hidden.select(1, 0)?)?.detach())
        };
        let (mut cache, mut next, mut expected) = (filled(&model, &gpu)?, first.clone(), Vec::new());
        for step in 0..5i64 {
            next = sample_tokens(&next_logits(&next, &mut cache)?, &sampling(), 3, &Tensor::scalar(step, &gpu)?)?;
            expected.push(next.to_vec::<i64>()?);
        }
        assert_ne!(expected[3], expected[4], "tokens that change");
        let logits = next_logits(&next, &mut cache)?.to_vec::<f32>()?;
        drop(cache);
        let mut decode = RecordedDecode::new(&model, &params, filled(&model, &gpu)?, &sampling(), 3)?;
        let mut next = first;
        for (step, expected) in expected.iter().enumerate() {
            next = decode.step(&next, step as u64)?;
            assert_eq!(next.to_vec::<i64>()?, *expected, "step {step}");
        }
        let mut cache = decode.into_cache();
        assert_eq!(next_logits(&next, &mut cache)?.to_vec::<f32>()?, logits);
        Ok(())
    })
}

#[test]
fn a_recorded_decode_refuses_a_cache_with_a_clone() -> Result<()> {
    let Some(gpu) = gpu("a_recorded_decode_refuses_a_cache_with_a_clone") else { return Ok(()) };
    let (model, params) = model(false, false, DType::F32, &gpu)?;
    let mut decode = RecordedDecode::new(&model, &params, filled(&model, &gpu)?, &sampling(), 3)?;
    let mut next = decode.step(&Tensor::from_slice(&[5i64, 9], [2], &gpu)?, 0)?;
    let clone = decode.cache().clone();
    let error = decode.step(&next, 1).unwrap_err();
    assert!(error.to_string().contains("a clone shares"), "{error}");
    assert_eq!((decode.cache().lengths(), clone.lengths()), (&[7, 5][..], &[7, 5][..]));
    drop(clone);
    next = decode.step(&next, 1)?;
    assert_eq!((decode.cache().lengths(), next.to_vec::<i64>()?.len()), (&[8, 6][..], 2));
    Ok(())
}

/// Class weights dropped with the closure, a model dropped after the recording, and the optimizer's state.
#[test]
fn a_recorded_step_outlives_its_model() -> Result<()> {
    let Some(gpu) = gpu("a_recorded_step_outlives_its_model") else { return Ok(()) };
    with_every_pool(&gpu, || {
        let batch = |step: u64| full(500, 1.0 + step as f64, &gpu);
        let run = |recorded: bool| -> Result<(Vec<f64>, Vec<f32>)> {
            let store = ParamStore::new(0, DType::F32, &gpu);
            let weight = store.param("weight", [500], Init::Constant(3.0))?;
            let params = store.params();
            let class_weights = Tensor::generate([500], DType::F32, &gpu, |i| (i % 4) as f64 / 500.0)?;
            let (kept, mut losses) = (weight.clone(), Vec::new());
            let loss = move |i: &[Tensor]| weight.tensor().sub(&i[0])?.square()?.mul(&class_weights)?.sum(&[]);
            let mut optimizer = AdamW::new(AdamWOptions::default())?;
            if recorded {
                let mut step = RecordedStep::new(optimizer, &params, &[batch(9)?], None, loss)?;
                drop((store, params));
                gpu.trim();
                let victims = Victims::new(&[500, 8, 1], &gpu)?;
                for number in 0..3 {
                    losses.push(step.step(&[batch(number)?], 1e-2, 1.0)?.loss.item()?);
                    victims.check()?;
                }
            } else {
                for number in 0..3 {
                    let mut tape = Tape::train(0);
                    let output = loss(&[batch(number)?])?;
                    let grads = tape.backward(&output)?;
                    optimizer.step(&params, &grads, 1e-2, None)?;
                    losses.push(output.item()?);
                }
            }
            Ok((losses, kept.tensor().to_vec::<f32>()?))
        };
        assert_eq!(run(true)?, run(false)?);
        Ok(())
    })
}

/// An error or a panic in either run ends the recording without a trace, and the device keeps working.
#[test]
fn a_failed_recording_leaves_the_device_as_it_was() -> Result<()> {
    let Some(gpu) = gpu("a_failed_recording_leaves_the_device_as_it_was") else { return Ok(()) };
    let graphs = || if is_emulated() { (alive("graph"), alive("executable")) } else { (0, 0) };
    with_every_pool(&gpu, || {
        let (x, before) = (full(100, 1.0, &gpu)?, graphs());
        for (fails_at, panics) in [(1, true), (2, true), (1, false), (2, false)] {
            let calls = Cell::new(0);
            let captured = full(100, 3.0, &gpu)?;
            let escaped = RefCell::new(None);
            let record = |i: &[Tensor]| {
                calls.set(calls.get() + 1);
                let h = i[0].mul(&captured)?.exp()?;
                *escaped.borrow_mut() = Some(i[0].neg()?);
                if calls.get() == fails_at {
                    assert!(!panics, "on purpose");
                    return Err(Error::new(ErrorKind::Argument { op: "test", message: "on purpose".into() }));
                }
                Ok(h)
            };
            let capture = || Graph::capture(std::slice::from_ref(&x), &none(), record).map(drop);
            match catch_unwind(AssertUnwindSafe(capture)) {
                Ok(outcome) => assert!(!panics && outcome.unwrap_err().to_string().contains("on purpose")),
                Err(_) => assert!(panics),
            }
            assert_eq!(graphs(), before, "run {fails_at} failed");
            drop(captured);
            gpu.trim();
            // Uploads, kernels, read-backs and recordings work.
            let y = Tensor::from_slice(&[2.0f32; 100], [100], &gpu)?.add(&x)?;
            assert_eq!(y.to_vec::<f32>()?, [3.0; 100]);
            let mut graph = Graph::capture(std::slice::from_ref(&x), &none(), |i| i[0].neg())?;
            assert_eq!(graph.replay(&[y])?.to_vec::<f32>()?, [-3.0; 100]);
        }
        // Refused while it is recorded: a step of dropout.
        let dropout = |i: &[Tensor]| {
            let _tape = Tape::train(0);
            i[0].exp()?.dropout(0.5)
        };
        assert!(Graph::capture(std::slice::from_ref(&x), &none(), dropout).is_err());
        assert_eq!(graphs(), before);
        Ok(())
    })
}

#[test]
fn graphs_do_not_nest() -> Result<()> {
    let Some(gpu) = gpu("graphs_do_not_nest") else { return Ok(()) };
    let x = full(50, 1.0, &gpu)?;
    let inner = RefCell::new(Graph::capture(std::slice::from_ref(&x), &none(), |i| i[0].neg())?);
    let (calls, dropped) = (Cell::new(0), RefCell::new(vec![]));
    for _ in 0..2 {
        dropped.borrow_mut().push(Graph::capture(std::slice::from_ref(&x), &none(), |i| i[0].exp())?);
    }
    let mut outer = Graph::capture(std::slice::from_ref(&x), &none(), |i| {
        calls.set(calls.get() + 1);
        let nested = Graph::capture(i, &none(), |i| i[0].exp()).unwrap_err();
        assert!(nested.to_string().contains("while recording another"), "{nested}");
        let replayed = inner.borrow_mut().replay(std::slice::from_ref(&x)).err().map(|error| error.to_string());
        let refused = replayed.is_some_and(|error| error.contains("cannot be part of a graph"));
        assert_eq!(refused, calls.get() == 2, "the run before the recording may replay graphs");
        // One dies in each run.
        dropped.borrow_mut().pop();
        i[0].square()
    })?;
    assert_eq!(outer.replay(&[full(50, 3.0, &gpu)?])?.to_vec::<f32>()?, [9.0; 50]);
    assert_eq!(inner.borrow_mut().replay(std::slice::from_ref(&x))?.to_vec::<f32>()?, [-1.0; 50]);
    Ok(())
}

/// A fault reported by a replay's kernel is an error, even if the graph was dropped meanwhile; and the graph can be
/// replayed.
#[test]
fn faults_of_a_replay_are_reported() -> Result<()> {
    let Some(gpu) = gpu("faults_of_a_replay_are_reported") else { return Ok(()) };
    let table = Tensor::ones([4, 3], DType::F32, &gpu)?;
    let tokens = |index: i64| Tensor::from_slice(&[0, index], [2], &gpu);
    let capture = || Graph::capture(&[tokens(3)?], &none(), |i| table.embedding(&i[0]));
    let mut graph = capture()?;
    let y = graph.replay(&[tokens(7)?])?.clone();
    drop(graph);
    assert!(matches!(y.to_vec::<f32>().map_err(Error::into_kind), Err(ErrorKind::Index { index: 7, limit: 4, .. })));
    let mut graph = capture()?;
    assert!(graph.replay(&[tokens(-1)?])?.to_vec::<f32>().is_err());
    assert_eq!(graph.replay(&[tokens(2)?])?.to_vec::<f32>()?, [1.0; 6]);
    // Rejected inputs leave those of the graph unchanged.
    assert!(graph.replay(&[]).is_err());
    assert!(graph.replay(&[Tensor::ones([2], DType::F32, &gpu)?]).is_err());
    assert_eq!(graph.output().to_vec::<f32>()?, [1.0; 6]);
    Ok(())
}

/// The driver fails in a replay, and in every call of a recording.
#[test]
fn a_driver_that_fails_costs_one_call() -> Result<()> {
    let Some(gpu) = emulated("a_driver_that_fails_costs_one_call") else { return Ok(()) };
    with_every_pool(&gpu, || {
        let (x, weight) = (full(90, 1.0, &gpu)?, full(90, 2.0, &gpu)?);
        let before = (alive("graph"), alive("executable"));
        let capture = || Graph::capture(std::slice::from_ref(&x), &none(), |i| i[0].mul(&weight)?.neg());
        let mut graph = capture()?;
        fail("launch", 1);
        assert!(graph.replay(std::slice::from_ref(&x)).is_err());
        fail("launch", 0);
        assert_eq!(graph.replay(std::slice::from_ref(&x))?.to_vec::<f32>()?, [-2.0; 90]);
        drop(graph);
        for kind in ["alloc+", "launch", "copy"] {
            let mut n = 1;
            loop {
                gpu.trim();
                let (calls, live) = (count(kind), gpu.memory().live);
                fail(kind, n);
                let outcome = capture().map(drop);
                fail(kind, 0);
                assert_eq!(gpu.memory().live, live, "{kind} {n}");
                assert_eq!((alive("graph"), alive("executable")), before, "{kind} {n}");
                if count(kind) - calls < n {
                    outcome?;
                    break;
                }
                assert!(outcome.is_err(), "{kind} {n}");
                n += 1;
            }
            assert!(n > 1, "{kind}");
        }
        assert_eq!(capture()?.replay(std::slice::from_ref(&x))?.to_vec::<f32>()?, [-2.0; 90]);
        Ok(())
    })
}

/// `set` to a view that begins at the same byte, or elsewhere in the same storage, replaces a parameter.
#[test]
fn a_parameter_that_became_another_view_is_noticed() -> Result<()> {
    let Some(gpu) = gpu("a_parameter_that_became_another_view_is_noticed") else { return Ok(()) };
    let storage = Tensor::generate([2, 4, 4], DType::F32, &gpu, |i| i as f64)?;
    let (first, second) = (storage.select(0, 0)?, storage.select(0, 1)?);
    let store = ParamStore::new(0, DType::F32, &gpu);
    let weight = store.param("weight", [4, 4], Init::Constant(2.0))?;
    weight.set(first.clone())?;
    let x = Tensor::ones([4, 4], DType::F32, &gpu)?;
    let mut graph = Graph::capture(std::slice::from_ref(&x), &store.params(), |i| i[0].mul(&weight.tensor()))?;
    let expected = first.to_vec::<f32>()?;
    assert_eq!(graph.replay(std::slice::from_ref(&x))?.to_vec::<f32>()?, expected);
    for other in [second, first.transpose(0, 1)?] {
        weight.set(other)?;
        let error = graph.replay(std::slice::from_ref(&x)).unwrap_err();
        assert!(error.to_string().contains("`weight` was replaced"), "{error}");
    }
    weight.set(first)?;
    assert_eq!(graph.replay(std::slice::from_ref(&x))?.to_vec::<f32>()?, expected);
    Ok(())
}

/// An optimizer used along with graphs of its parameters still updates in place: graphs hold memory, not tensors.
#[test]
fn parameters_are_updated_in_place_beside_graphs() -> Result<()> {
    let Some(gpu) = gpu("parameters_are_updated_in_place_beside_graphs") else { return Ok(()) };
    with_every_pool(&gpu, || {
        let store = ParamStore::new(0, DType::F32, &gpu);
        let weight = store.param("weight", [64], Init::Constant(2.0))?;
        let x = full(64, 1.0, &gpu)?;
        let record = |i: &[Tensor]| i[0].mul(&weight.tensor());
        // One graph knows its parameters, the other was not told.
        let capture = |map: ParamMap| Graph::capture(std::slice::from_ref(&x), &map, record);
        let mut graphs = [capture(store.params())?, capture(none())?];
        let mut optimizer = AdamW::new(AdamWOptions { weight_decay: 0.0, ..Default::default() })?;
        for _ in 0..2 {
            let mut tape = Tape::grad();
            let grads = tape.backward(&weight.tensor().sum(&[])?)?;
            optimizer.step(&store.params(), &grads, 0.5, None)?;
            drop(grads);
            let expected = weight.tensor().to_vec::<f32>()?;
            for graph in &mut graphs {
                assert_eq!(graph.replay(std::slice::from_ref(&x))?.to_vec::<f32>()?, expected);
            }
        }
        assert!((weight.tensor().to_vec::<f32>()?[0] - 1.0).abs() < 1e-4);
        Ok(())
    })
}
