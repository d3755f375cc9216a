//! AdamW against a scalar reference, on every float type, and its errors.

use std::collections::BTreeMap;

use x_transformers::{
    DType, Error, ErrorKind, Gradients, Init, Param, ParamStore, Philox, Result, Tape, Tensor,
    train::{AdamW, AdamWOptions, Optimizer, Schedule},
};

use crate::common::device;

const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];

/// Normal numbers rounded to eight bits, so that every float type holds them exactly.
fn numbers(stream: u64, count: usize, scale: f64) -> Vec<f64> {
    let random = Philox::new(5, stream);
    (0..count).map(|i| half::bf16::from_f64(scale * random.normal(i as u64)).to_f64()).collect()
}

/// Gradients with these values: those of `Σ p ⊙ g`.
fn gradients(given: &[(&Param, Tensor)]) -> Result<Gradients> {
    let mut tape = Tape::grad();
    let mut loss: Option<Tensor> = None;
    for (param, grad) in given {
        let term = param.tensor().mul(grad)?.to_dtype(DType::F64)?.sum(&[])?;
        loss = Some(match loss {
            Some(loss) => loss.add(&term)?,
            None => term,
        });
    }
    tape.backward(&loss.expect("at least one gradient"))
}

/// Rounds to the nearest number of a half type; returns the others unchanged.
fn round(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => half::bf16::from_f32(x as f32).to_f64(),
        DType::F16 => half::f16::from_f32(x as f32).to_f64(),
        _ => x,
    }
}

fn largest_error(actual: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let scale = expected.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    actual.iter().zip(expected).map(|(a, e)| (a - e).abs() / scale).fold(0.0, f64::max)
}

/// AdamW of PyTorch, one scalar at a time, in f64.
struct Reference {
    weight: Vec<f64>,
    mean: Vec<f64>,
    square: Vec<f64>,
    step: i32,
}

impl Reference {
    fn new(weight: &[f64]) -> Self {
        let zeros = vec![0.0; weight.len()];
        Self { weight: weight.to_vec(), mean: zeros.clone(), square: zeros, step: 0 }
    }

    fn step(&mut self, grad: &[f64], factor: f64, lr: f64, o: AdamWOptions) {
        self.step += 1;
        for (i, g) in grad.iter().enumerate() {
            let g = g * factor;
            self.weight[i] *= 1.0 - lr * o.weight_decay;
            self.mean[i] = o.beta1 * self.mean[i] + (1.0 - o.beta1) * g;
            self.square[i] = o.beta2 * self.square[i] + (1.0 - o.beta2) * g * g;
            let (c1, c2) = (1.0 - o.beta1.powi(self.step), 1.0 - o.beta2.powi(self.step));
            self.weight[i] -= lr / c1 * self.mean[i] / (self.square[i].sqrt() / c2.sqrt() + o.eps);
        }
    }
}

#[test]
fn adamw_follows_the_reference() -> Result<()> {
    let options = AdamWOptions { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
    // Longer than a chunk, odd, a scalar, and nothing at all.
    let shapes: [&[usize]; 4] = [&[137, 151], &[7], &[], &[0, 3]];
    for dtype in FLOATS {
        let store = ParamStore::new(0, dtype, device());
        let mut params = Vec::new();
        let mut references = Vec::new();
        for (index, shape) in shapes.iter().enumerate() {
            let param = store.param(&format!("p{index}"), *shape, Init::Constant(0.0))?;
            let start = numbers(index as u64, shape.iter().product(), 1.0);
            param.set(Tensor::from_slice(&start, *shape, device())?.to_dtype(dtype)?)?;
            references.push(Reference::new(&start));
            params.push(param);
        }
        // One that never gets a gradient keeps its value: no weight decay either.
        let idle = store.param("idle", [3], Init::Constant(2.0))?;
        let mut optimizer = AdamW::new(options)?;
        let schedule = Schedule { lr: 1e-2, warmup: 5, steps: 60, final_ratio: 0.1 };
        for step in 0..60 {
            let lr = schedule.at(step);
            let values: Vec<Vec<f64>> = shapes
                .iter()
                .enumerate()
                // Gradients of very different sizes from step to step.
                .map(|(i, shape)| {
                    numbers(100 + step * 10 + i as u64, shape.iter().product(), 0.1 * (1 << (step % 7)) as f64)
                })
                .collect();
            let norm = values.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
            let clip = (step % 3 != 0).then_some(1.5);
            let factor = clip.map_or(1.0, |clip| (clip / (norm + 1e-6)).min(1.0));
            let given = params
                .iter()
                .zip(&shapes)
                .zip(&values)
                .map(|((param, shape), values)| {
                    Ok((param, Tensor::from_slice(values, *shape, device())?.to_dtype(dtype)?))
                })
                .collect::<Result<Vec<_>>>()?;
            let info = optimizer.step(&store.params(), &gradients(&given)?, lr, clip)?;
            assert_eq!(info.updated, params.len());
            assert!((info.grad_norm - norm).abs() <= 1e-12 * norm, "{} {norm}", info.grad_norm);
            for (reference, values) in references.iter_mut().zip(&values) {
                reference.step(values, factor, lr, options);
            }
        }
        assert_eq!(idle.tensor().to_f64_vec()?, [2.0; 3]);
        let state = optimizer.state_dict()?;
        for (index, (param, reference)) in params.iter().zip(&references).enumerate() {
            let value = param.tensor();
            // The exact weight is the master of a half type; f32 rounds each of 60 steps.
            let exact = state.get(&format!("master.p{index}")).unwrap_or(&value);
            let allowed = if dtype == DType::F64 { 1e-13 } else { 2e-6 };
            let error = largest_error(&exact.to_f64_vec()?, &reference.weight);
            assert!(error <= allowed, "{dtype} p{index}: {error:e}");
            for (kind, expected) in [("exp_avg", &reference.mean), ("exp_avg_sq", &reference.square)] {
                let tensor = &state[&format!("{kind}.p{index}")];
                assert_eq!(tensor.dtype(), if dtype == DType::F64 { DType::F64 } else { DType::F32 });
                let error = largest_error(&tensor.to_f64_vec()?, expected);
                assert!(error <= allowed, "{dtype} {kind} p{index}: {error:e}");
            }
            // And the parameter is the master, rounded.
            let rounded = exact.to_f64_vec()?.into_iter().map(|x| round(x, dtype)).collect::<Vec<_>>();
            assert!(value.to_f64_vec()? == rounded, "{dtype} p{index}");
            assert_eq!(state[&format!("step.p{index}")].to_vec::<i64>()?, [60]);
        }
        assert!(!state.contains_key("exp_avg.idle"));
        assert_eq!(state.contains_key("master.p0"), matches!(dtype, DType::BF16 | DType::F16));
    }
    Ok(())
}

/// Updates far below the spacing of bf16 numbers add up.
#[test]
fn adamw_half_types_keep_small_updates() -> Result<()> {
    let store = ParamStore::new(0, DType::BF16, device());
    let param = store.param("p", [4], Init::Constant(1.0))?;
    let mut optimizer = AdamW::new(AdamWOptions { weight_decay: 0.0, ..Default::default() })?;
    let one = Tensor::ones([4], DType::BF16, device())?;
    for _ in 0..1000 {
        optimizer.step(&store.params(), &gradients(&[(&param, one.clone())])?, 1e-4, None)?;
    }
    assert!((param.tensor().to_f64_vec()?[0] - 0.9).abs() < 0.002);
    // A value set from outside counts from then on.
    param.set(Tensor::full([4], 3.0, DType::BF16, device())?)?;
    optimizer.step(&store.params(), &gradients(&[(&param, one)])?, 1e-4, None)?;
    assert!((optimizer.state_dict()?["master.p"].to_f64_vec()?[0] - 2.9999).abs() < 1e-6);
    Ok(())
}

fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(f)
}

#[test]
fn adamw_same_bits_for_any_number_of_threads() -> Result<()> {
    let run = || -> Result<(Vec<u64>, u64)> {
        let store = ParamStore::new(1, DType::F32, device());
        let params = [store.param("a", [300, 333], Init::Normal(1.0))?, store.param("b", [5], Init::Normal(1.0))?];
        let mut optimizer = AdamW::new(AdamWOptions::default())?;
        let mut norm = 0.0;
        for step in 0..3 {
            let given = params
                .iter()
                .map(|param| {
                    let shape = *param.tensor().shape();
                    let random = Philox::new(9, step);
                    Ok((param, Tensor::generate(shape, DType::F32, device(), |i| random.normal(i as u64))?))
                })
                .collect::<Result<Vec<_>>>()?;
            norm = optimizer.step(&store.params(), &gradients(&given)?, 0.01, Some(1.0))?.grad_norm;
        }
        let mut bits = Vec::new();
        for tensor in store.params().state_dict().values().chain(optimizer.state_dict()?.values()) {
            bits.extend(tensor.to_f64_vec()?.into_iter().map(f64::to_bits));
        }
        Ok((bits, norm.to_bits()))
    };
    let one = with_threads(1, run)?;
    for threads in [2, 3, 7] {
        assert!(with_threads(threads, run)? == one, "{threads} threads give other bits than one");
    }
    Ok(())
}

/// Optimizers of several threads on one device do not interfere.
#[test]
fn adamw_on_several_threads() -> Result<()> {
    let run = |seed: u64| -> Result<Vec<f64>> {
        let store = ParamStore::new(seed, DType::F32, device());
        let param = store.param("p", [5000], Init::Normal(1.0))?;
        let mut optimizer = AdamW::new(AdamWOptions::default())?;
        for step in 0..20 {
            let grad = Tensor::from_slice(&numbers(step, 5000, 1.0), [5000], device())?.to_dtype(DType::F32)?;
            optimizer.step(&store.params(), &gradients(&[(&param, grad)])?, 0.01, Some(1.0))?;
        }
        param.tensor().to_f64_vec()
    };
    let alone = (0..4).map(run).collect::<Result<Vec<_>>>()?;
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|seed| scope.spawn(move || run(seed))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Result<_>>()
    })?;
    assert!(alone == together);
    Ok(())
}

/// A holder of the old tensor keeps its values; a tied parameter is updated once.
#[test]
fn adamw_tied_and_shared_parameters() -> Result<()> {
    let store = ParamStore::new(0, DType::F32, device());
    let base = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], device())?;
    let param = store.param("a", [3, 2], Init::Constant(0.0))?;
    // A strided view as value.
    param.set(base.transpose(0, 1)?)?;
    store.tie("z", &param)?;
    let before = param.tensor();
    let mut optimizer = AdamW::new(AdamWOptions { weight_decay: 0.0, ..Default::default() })?;
    let grads = gradients(&[(&param, Tensor::ones([3, 2], DType::F32, device())?)])?;
    let info = optimizer.step(&store.params(), &grads, 0.5, None)?;
    assert_eq!(info.updated, 1);
    assert_eq!(before.to_vec::<f32>()?, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    assert_eq!(base.to_vec::<f32>()?, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert!(largest_error(&param.tensor().to_f64_vec()?, &[0.5, 3.5, 1.5, 4.5, 2.5, 5.5]) < 1e-7);
    Ok(())
}

#[test]
fn adamw_refuses_non_finite_gradients_and_changes_nothing() -> Result<()> {
    let store = ParamStore::new(0, DType::F32, device());
    let params: Vec<Param> =
        ["a", "b", "c"].iter().map(|name| store.param(name, [3], Init::Constant(1.0))).collect::<Result<_>>()?;
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    let fine = Tensor::ones([3], DType::F32, device())?;
    let mut step = |b: f32, lr: f64, clip: Option<f64>| {
        let bad = Tensor::from_slice(&[1.0, b, 1.0], [3], device())?;
        let given = [(&params[0], fine.clone()), (&params[1], bad.clone()), (&params[2], bad)];
        optimizer.step(&store.params(), &gradients(&given)?, lr, clip)
    };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        match step(bad, 0.1, Some(1.0)).map_err(Error::into_kind) {
            Err(ErrorKind::NonFinite { step: 0, what }) => assert_eq!(what, "gradient of b"),
            other => panic!("{other:?}"),
        }
    }
    for lr in [f64::NAN, f64::INFINITY, -0.1] {
        assert!(
            matches!(step(1.0, lr, None).map_err(Error::into_kind), Err(ErrorKind::Option { key, .. }) if key == "lr")
        );
    }
    for clip in [f64::NAN, 0.0, -1.0] {
        assert!(
            matches!(step(1.0, 0.1, Some(clip)).map_err(Error::into_kind), Err(ErrorKind::Option { key, .. }) if key == "clip")
        );
    }
    // An infinite clip does not clip; large gradients do not overflow the norm.
    let info = step(f32::MAX, 0.0, Some(f64::INFINITY))?;
    assert!(info.grad_norm.is_finite());
    for param in &params {
        assert_eq!(param.tensor().to_vec::<f32>()?, [1.0; 3]);
    }
    for options in [
        AdamWOptions { beta1: 1.0, ..Default::default() },
        AdamWOptions { beta2: -0.1, ..Default::default() },
        AdamWOptions { eps: f64::NAN, ..Default::default() },
        AdamWOptions { weight_decay: f64::INFINITY, ..Default::default() },
    ] {
        assert!(matches!(AdamW::new(options).map_err(Error::into_kind), Err(ErrorKind::Option { .. })), "{options:?}");
    }
    Ok(())
}

#[test]
fn adamw_state_comes_back_or_is_refused() -> Result<()> {
    for dtype in FLOATS {
        let store = ParamStore::new(3, dtype, device());
        let params = [store.param("a", [4, 3], Init::Normal(1.0))?, store.param("b", [2], Init::Normal(1.0))?];
        let grads = |step: u64| -> Result<Gradients> {
            let g = |param: &Param| {
                Tensor::from_slice(&numbers(step, param.tensor().numel(), 1.0), *param.tensor().shape(), device())?
                    .to_dtype(dtype)
            };
            gradients(&[(&params[0], g(&params[0])?), (&params[1], g(&params[1])?)])
        };
        let mut first = AdamW::new(AdamWOptions::default())?;
        first.step(&store.params(), &grads(0)?, 0.1, None)?;
        let (dict, weights) = (first.state_dict()?, store.params().state_dict());
        first.step(&store.params(), &grads(1)?, 0.1, None)?;
        let expected = store.params().state_dict();
        // From the state again.
        store.params().load(&weights)?;
        let mut second = AdamW::new(AdamWOptions::default())?;
        second.load_state_dict(&store.params(), &dict)?;
        assert_eq!(second.steps(), 1);
        second.step(&store.params(), &grads(1)?, 0.1, None)?;
        for (name, tensor) in store.params().state_dict() {
            assert_eq!(tensor.to_f64_vec()?, expected[&name].to_f64_vec()?, "{dtype} {name}");
        }

        let refused = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
            let mut changed = dict.clone();
            change(&mut changed);
            let mut optimizer = second.clone();
            let error = optimizer.load_state_dict(&store.params(), &changed).unwrap_err();
            assert_eq!(optimizer.steps(), 2, "nothing is changed");
            error.to_string()
        };
        let scalar = Tensor::scalar(-1i64, device())?;
        let message = refused(&|dict| drop(dict.remove("exp_avg.a")));
        assert!(message.contains("missing") && message.contains("exp_avg.a"), "{message}");
        let message = refused(&|dict| drop(dict.insert("exp_avg.x".into(), scalar.clone())));
        assert!(message.contains("unused") && message.contains("exp_avg.x"), "{message}");
        let message = refused(&|dict| drop(dict.insert("exp_avg.a".into(), scalar.clone())));
        assert!(message.contains("shape mismatch"), "{message}");
        let message = refused(&|dict| drop(dict.insert("step.a".into(), scalar.clone())));
        assert!(message.contains("negative"), "{message}");
        let bools = Tensor::zeros([4, 3], DType::Bool, device())?;
        let message = refused(&|dict| drop(dict.insert("exp_avg.a".into(), bools.clone())));
        assert!(message.contains("bool"), "{message}");
        let message = refused(&|dict| drop(dict.remove("steps")));
        assert!(message.contains("steps"), "{message}");
    }
    Ok(())
}
