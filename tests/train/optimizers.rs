//! Optimizers step by step against PyTorch (`optimizers/make.py`), parameter groups, resumed states, and errors.

use std::{collections::BTreeMap, path::Path};

use x_transformers::{
    DType, Error, ErrorKind, Gradients, Init, Param, ParamMap, ParamStore, Philox, Result, Tape, Tensor,
    io::read_safetensors,
    train::{
        AdafactorOptions, AdamW, AdamWOptions, AdjustLr, LionOptions, MuonOptions, Optimizer, OptimizerKind,
        OptimizerOptions, ParamGroup, SgdOptions, TrainOptions,
    },
};

use crate::common::device;

const STEPS: usize = 10;

/// Gradients with these values: those of `Σ p ⊙ g`.
fn gradients(params: &ParamMap, grad: impl Fn(&str, &Param) -> Result<Tensor>) -> Result<Gradients> {
    let mut tape = Tape::grad();
    let mut loss = Tensor::zeros((), DType::F64, device())?;
    for (name, param) in params.unique() {
        let value = param.tensor();
        let term = value.mul(&grad(name, param)?.to_device(device())?.to_dtype(value.dtype())?)?;
        loss = loss.add(&term.to_dtype(DType::F64)?.sum(&[])?)?;
    }
    tape.backward(&loss)
}

fn adamw(weight_decay: f64) -> AdamWOptions {
    AdamWOptions { weight_decay, ..Default::default() }
}

/// Name, rate of the first step, clip, optimizer, groups.
type Case = (&'static str, f64, Option<f64>, OptimizerOptions, Vec<ParamGroup>);

/// Cases of `make.py`.
fn cases() -> Vec<Case> {
    use OptimizerOptions::{Adafactor, AdamW, Lion, Muon, Sgd};
    let plain = SgdOptions::default();
    let momentum = Sgd(SgdOptions { momentum: 0.9, dampening: 0.25, weight_decay: 0.1, ..plain });
    let nesterov = Sgd(SgdOptions { momentum: 0.8, nesterov: true, weight_decay: 0.1, ..plain });
    let factored = AdafactorOptions::default();
    let other = AdafactorOptions { beta2_decay: -0.6, eps1: Some(1e-4), eps2: 0.5, d: 2.0, weight_decay: 0.1 };
    let muon = MuonOptions { adamw: adamw(0.1), ..Default::default() };
    let rms = MuonOptions { adjust_lr: AdjustLr::MatchRmsAdamw, momentum: 0.9, nesterov: false, ..muon };
    let spectral = MuonOptions { adjust_lr: AdjustLr::SpectralUnclamped, ns_steps: 3, weight_decay: 0.0, ..muon };
    let emb = ParamGroup {
        lr: Some(0.1),
        weight_decay: Some(0.5),
        beta1: Some(0.8),
        beta2: Some(0.95),
        ..ParamGroup::new("emb.*")
    };
    let no_muon = || vec![ParamGroup::embeddings_without_muon()];
    vec![
        ("adamw", 0.02, None, AdamW(adamw(0.1)), vec![]),
        ("adamw_clip", 0.02, Some(0.7), AdamW(adamw(0.1)), vec![]),
        ("adamw_groups", 0.02, None, AdamW(adamw(0.1)), vec![emb, ParamGroup::vectors_without_decay()]),
        ("sgd", 0.05, None, Sgd(plain), vec![]),
        ("sgd_momentum", 0.05, None, momentum, vec![]),
        ("sgd_momentum_clip", 0.05, Some(0.7), momentum, vec![]),
        ("sgd_nesterov", 0.05, None, nesterov, vec![]),
        ("lion", 0.01, None, Lion(LionOptions { weight_decay: 0.5, ..Default::default() }), vec![]),
        ("adafactor", 0.05, None, Adafactor(factored), vec![]),
        ("adafactor_options", 0.2, None, Adafactor(other), vec![]),
        ("muon", 0.02, None, Muon(muon), no_muon()),
        ("muon_clip", 0.02, Some(0.7), Muon(muon), no_muon()),
        ("muon_rms", 0.02, None, Muon(rms), no_muon()),
        ("muon_spectral", 0.02, None, Muon(spectral), no_muon()),
        ("muon_bf16", 0.02, None, Muon(muon), no_muon()),
    ]
}

fn reference() -> Result<BTreeMap<String, Tensor>> {
    read_safetensors(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/train/optimizers/steps.safetensors"))
}

#[test]
fn optimizers_follow_pytorch() -> Result<()> {
    let reference = reference()?;
    let starts = reference.iter().filter_map(|(name, value)| Some((name.strip_prefix("start.")?, value)));
    let starts: Vec<_> = starts.collect();
    assert_eq!(starts.len(), 6);
    for (case, lr, clip, options, groups) in cases() {
        for dtype in [DType::F64, DType::F32, DType::BF16] {
            let store = ParamStore::new(0, dtype, device());
            for (name, value) in &starts {
                store
                    .param(name, *value.shape(), Init::Constant(0.0))?
                    .set(value.to_device(device())?.to_dtype(dtype)?)?;
            }
            let params = store.params();
            let mut optimizer = options.build(&groups, &params)?;
            for step in 0..STEPS {
                let grads = gradients(&params, |name, _| {
                    reference[&format!("grads.{name}")].narrow(0, step, 1)?.squeeze(0)?.contiguous()
                })?;
                let info = optimizer.step(&params, &grads, lr * (1.0 - 0.05 * step as f64), clip)?;
                assert_eq!(info.updated, 6);
                let state = optimizer.state_dict()?;
                for (name, param) in params.unique() {
                    let value = param.tensor();
                    // A half type follows the steps in f32, exactly in its master weight.
                    let exact = state.get(&format!("master.{name}")).unwrap_or(&value);
                    assert_eq!(exact.to_dtype(dtype)?.to_f64_vec()?, value.to_f64_vec()?, "{case} {dtype} {name}");
                    let kind = if dtype == DType::F64 { "f64" } else { "f32" };
                    let expected = reference[&format!("{case}.{kind}.{name}")].narrow(0, step, 1)?.to_f64_vec()?;
                    let error = largest_error(&exact.to_f64_vec()?, &expected);
                    // Newton-Schulz steps magnify the rounding of small singular values, and PyTorch takes them in bf16.
                    let allowed = match (case, dtype) {
                        ("muon_bf16", _) => 2e-2,
                        (_, DType::F64) => 1e-12,
                        _ if case.starts_with("muon") => 1e-4,
                        _ => 2e-6,
                    };
                    assert!(error <= allowed, "{case} {dtype} {name} step {step}: {error:e}");
                }
            }
            assert_eq!(optimizer.steps(), STEPS as u64);
            assert_eq!(optimizer.to_json()["name"], options.kind().name());
        }
    }
    Ok(())
}

fn largest_error(actual: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let scale = expected.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    actual.iter().zip(expected).map(|(a, e)| (a - e).abs() / scale).fold(0.0, f64::max)
}

/// Parameters of several shapes, some longer than a chunk of the CPU's loop.
fn store(dtype: DType) -> Result<ParamStore> {
    let store = ParamStore::new(3, dtype, device());
    let shapes: [(&str, &[usize]); 7] = [
        ("a.weight", &[150, 120]),
        ("b.weight", &[120, 150]),
        ("c.weight", &[150, 120]),
        ("c.bias", &[150]),
        ("emb.weight", &[40, 8]),
        ("empty", &[0, 3]),
        ("scale", &[]),
    ];
    for (name, shape) in shapes {
        store.param(name, shape, Init::Normal(1.0))?;
    }
    Ok(store)
}

fn drawn(step: u64) -> impl Fn(&str, &Param) -> Result<Tensor> {
    move |name, param| {
        let random = Philox::new(9, step * 100 + name.len() as u64);
        let shape = *param.tensor().shape();
        Tensor::generate(shape, DType::F32, device(), |i| 0.1 * random.normal(i as u64))
    }
}

/// One optimizer of each kind and of each form of state, with groups.
fn kinds(params: &ParamMap) -> Result<Vec<Box<dyn Optimizer>>> {
    let momentum = OptimizerOptions::Sgd(SgdOptions { momentum: 0.9, ..Default::default() });
    let of_kinds = OptimizerKind::ALL.map(OptimizerOptions::of);
    let groups = [ParamGroup { lr: Some(0.5), ..ParamGroup::new("a.*|emb.*") }, ParamGroup::vectors_without_decay()];
    [momentum].into_iter().chain(of_kinds).map(|options| options.build(&groups, params)).collect()
}

fn bits(store: &ParamStore, optimizer: &dyn Optimizer) -> Result<BTreeMap<String, Vec<u64>>> {
    let tensors = store.params().state_dict().into_iter().chain(optimizer.state_dict()?);
    tensors.map(|(name, value)| Ok((name, value.to_f64_vec()?.into_iter().map(f64::to_bits).collect()))).collect()
}

#[test]
fn resumed_optimizers_give_the_same_bits() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        for kind in 0..kinds(&store(dtype)?.params())?.len() {
            let whole = store(dtype)?;
            let params = whole.params();
            let mut optimizer = kinds(&params)?.swap_remove(kind);
            let mut saved = None;
            for step in 0..5 {
                if step == 2 {
                    saved = Some((params.state_dict(), optimizer.state_dict()?));
                }
                optimizer.step_scaled(&params, &gradients(&params, drawn(step))?, 0.5, 0.01, Some(1.0))?;
            }
            let (weights, state) = saved.expect("saved at step 2");
            let resumed = store(dtype)?;
            let params = resumed.params();
            params.load(&weights)?;
            let mut second = kinds(&params)?.swap_remove(kind);
            second.load_state_dict(&params, &state)?;
            assert_eq!(second.steps(), 2);
            for step in 2..5 {
                second.step_scaled(&params, &gradients(&params, drawn(step))?, 0.5, 0.01, Some(1.0))?;
            }
            assert!(bits(&whole, &*optimizer)? == bits(&resumed, &*second)?, "{dtype} {second:?}");
            // A part of a parameter's state is refused by name, and what belongs to nothing.
            let parts: Vec<_> = state.keys().filter(|name| name.ends_with(".a.weight")).collect();
            for name in parts.iter().filter(|_| parts.len() > 1) {
                let mut less = state.clone();
                let removed = less.remove(*name).expect("a tensor");
                let message = second.load_state_dict(&params, &less).unwrap_err().to_string();
                assert!(message.contains("missing") && message.contains(name.as_str()), "{message}");
                less.insert("velocity.a.weight".into(), removed);
                let message = second.load_state_dict(&params, &less).unwrap_err().to_string();
                assert!(message.contains("unused") && message.contains("velocity.a.weight"), "{message}");
            }
            assert_eq!(second.steps(), 5, "nothing is changed");
        }
    }
    Ok(())
}

#[test]
fn optimizers_give_the_same_bits_for_any_number_of_threads() -> Result<()> {
    let run = |kind: usize| -> Result<BTreeMap<String, Vec<u64>>> {
        let store = store(DType::F32)?;
        let params = store.params();
        let mut optimizer = kinds(&params)?.swap_remove(kind);
        for step in 0..3 {
            optimizer.step(&params, &gradients(&params, drawn(step))?, 0.01, Some(1.0))?;
        }
        bits(&store, &*optimizer)
    };
    for kind in 0..kinds(&store(DType::F32)?.params())?.len() {
        let with = |threads: usize| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(|| run(kind))
        };
        let one = with(1)?;
        for threads in [2, 5] {
            assert!(with(threads)? == one, "kind {kind}: {threads} threads give other bits than one");
        }
    }
    Ok(())
}

/// Of each value the first group counts that sets it, and a tied parameter is found by any of its names.
#[test]
fn groups_set_values_one_by_one() -> Result<()> {
    let weights = |groups: &[ParamGroup]| -> Result<Vec<f64>> {
        let store = ParamStore::new(0, DType::F64, device());
        let matrix = store.param("net.emb.weight", [1, 1], Init::Constant(1.0))?;
        store.tie("net.to_logits.weight", &matrix)?;
        store.param("net.norm.gain", [1], Init::Constant(1.0))?;
        let params = store.params();
        let options = OptimizerOptions::Sgd(SgdOptions { weight_decay: 0.5, ..Default::default() });
        let mut optimizer = options.build(groups, &params)?;
        optimizer.step(
            &params,
            &gradients(&params, |_, param| param.tensor().detach().affine(0.0, 1.0))?,
            0.1,
            None,
        )?;
        params.unique().map(|(_, param)| param.tensor().reshape(())?.item()).collect()
    };
    let near = |actual: Vec<f64>, expected: [f64; 2]| {
        assert!(largest_error(&actual, &expected) < 1e-15, "{actual:?} {expected:?}");
    };
    near(weights(&[])?, [0.85, 0.85]);
    near(weights(&[ParamGroup::vectors_without_decay()])?, [0.85, 0.9]);
    let logits = ParamGroup { lr: Some(0.1), ..ParamGroup::new("*.to_logits.*") };
    near(weights(&[logits.clone(), ParamGroup::vectors_without_decay()])?, [0.985, 0.9]);
    // The first group sets the rate, the second the decay, which the third is too late for.
    let all = ParamGroup { lr: Some(0.5), weight_decay: Some(1.0), ..ParamGroup::new("*") };
    near(weights(&[logits, all, ParamGroup::vectors_without_decay()])?, [0.98, 0.9]);
    Ok(())
}

#[test]
fn optimizers_refuse_illegal_values() -> Result<()> {
    use OptimizerOptions::{Adafactor, AdamW, Lion, Muon, Sgd};
    let params = store(DType::F32)?.params();
    let (sgd, lion, muon) = (SgdOptions::default(), LionOptions::default(), MuonOptions::default());
    let factored = AdafactorOptions::default();
    let values = [
        ("weight_decay", AdamW(adamw(-1.0))),
        ("momentum", Sgd(SgdOptions { momentum: -0.1, ..sgd })),
        ("dampening", Sgd(SgdOptions { dampening: f64::NAN, ..sgd })),
        ("nesterov", Sgd(SgdOptions { nesterov: true, ..sgd })),
        ("nesterov", Sgd(SgdOptions { nesterov: true, momentum: 0.9, dampening: 0.1, ..sgd })),
        ("beta1", Lion(LionOptions { beta1: 1.0, ..lion })),
        ("beta2", Lion(LionOptions { beta2: f64::NAN, ..lion })),
        ("beta2_decay", Adafactor(AdafactorOptions { beta2_decay: 0.1, ..factored })),
        ("eps1", Adafactor(AdafactorOptions { eps1: Some(-1.0), ..factored })),
        ("eps2", Adafactor(AdafactorOptions { eps2: f64::INFINITY, ..factored })),
        ("d", Adafactor(AdafactorOptions { d: 0.5, ..factored })),
        ("momentum", Muon(MuonOptions { momentum: 1.0, ..muon })),
        ("ns_coefficients", Muon(MuonOptions { ns_coefficients: [1.0, f64::NAN, 0.0], ..muon })),
        ("ns_steps", Muon(MuonOptions { ns_steps: 100, ..muon })),
        ("eps", Muon(MuonOptions { eps: -1.0, ..muon })),
        ("weight_decay", Muon(MuonOptions { adamw: adamw(-1.0), ..muon })),
    ];
    for (expected, options) in values {
        match options.build(&[], &params).map(drop).map_err(Error::into_kind) {
            Err(ErrorKind::Option { key, why }) => assert_eq!(key, expected, "{options:?}: {why}"),
            other => panic!("{options:?}: {other:?}"),
        }
    }
    let all = || ParamGroup::new("*");
    let groups = [
        (AdamW(adamw(0.1)), ParamGroup::new("layers.*"), vec!["layers.*", "matches no parameter"]),
        (AdamW(adamw(0.1)), ParamGroup { lr: Some(f64::NAN), ..all() }, vec!["group `*`", "lr", "NaN"]),
        (AdamW(adamw(0.1)), ParamGroup { beta1: Some(1.5), ..all() }, vec!["group `*`", "beta1", "1.5"]),
        (AdamW(adamw(0.1)), ParamGroup { momentum: Some(0.9), ..all() }, vec!["momentum", "adamw"]),
        (AdamW(adamw(0.1)), ParamGroup { muon: Some(false), ..all() }, vec!["muon", "adamw"]),
        (Sgd(sgd), ParamGroup { beta2: Some(0.9), ..all() }, vec!["beta2", "sgd"]),
        (Muon(muon), ParamGroup { weight_decay: Some(-1.0), ..all() }, vec!["weight_decay", "-1"]),
    ];
    for (options, group, parts) in groups {
        let message = options.build(&[group], &params).map(drop).unwrap_err().to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    let many = vec![all(); 65];
    assert!(AdamW(adamw(0.1)).build(&many, &params).map(drop).unwrap_err().to_string().contains("65"));
    assert!("adam".parse::<OptimizerKind>().unwrap_err().to_string().contains("adafactor"));
    Ok(())
}

/// Nothing changes after a gradient that is not finite, in any optimizer.
#[test]
fn optimizers_refuse_non_finite_gradients() -> Result<()> {
    let store = store(DType::F32)?;
    let params = store.params();
    for mut optimizer in kinds(&params)? {
        let before = bits(&store, &*optimizer)?;
        let bad = |name: &str, param: &Param| {
            let value = if name == "c.bias" { f64::INFINITY } else { 1.0 };
            Tensor::full(*param.tensor().shape(), value, DType::F32, device())
        };
        match optimizer.step(&params, &gradients(&params, bad)?, 0.1, None).map_err(Error::into_kind) {
            Err(ErrorKind::NonFinite { step: 0, what }) => assert_eq!(what, "gradient of c.bias"),
            other => panic!("{other:?}"),
        }
        assert!(bits(&store, &*optimizer)? == before);
    }
    Ok(())
}

/// The options of a run choose the optimizer; vectors decay only if asked, and in runs from before that option.
#[test]
fn train_options_choose_the_optimizer() -> Result<()> {
    let bias_after_step = |options: &TrainOptions| -> Result<f64> {
        let store = store(DType::F32)?;
        let params = store.params();
        let bias = params.get("c.bias").expect("a bias").clone();
        bias.set(Tensor::ones([150], DType::F32, device())?)?;
        let mut optimizer = options.build_optimizer(&params)?;
        let zeros = |_: &str, param: &Param| param.tensor().detach().affine(0.0, 0.0);
        optimizer.step(&params, &gradients(&params, zeros)?, 1.0, None)?;
        Ok(bias.tensor().to_f64_vec()?[0])
    };
    let new = TrainOptions { weight_decay: 0.25, ..Default::default() };
    assert_eq!(bias_after_step(&new)?, 1.0);
    assert_eq!(bias_after_step(&TrainOptions { decay_all: true, ..new.clone() })?, 0.75);
    // A checkpoint that was written before there were groups.
    let mut json = serde_json::to_value(&new).expect("JSON");
    for key in ["optimizer", "decay_all", "momentum", "groups"] {
        assert!(json.as_object_mut().expect("an object").remove(key).is_some(), "{key}");
    }
    let before: TrainOptions = serde_json::from_value(json).expect("options");
    assert_eq!(before, TrainOptions { decay_all: true, ..new.clone() });
    assert_eq!(bias_after_step(&before)?, 0.75);
    for kind in OptimizerKind::ALL {
        let groups = vec![ParamGroup { weight_decay: Some(0.5), ..ParamGroup::new("c.*") }];
        let options = TrainOptions { optimizer: kind, groups, ..new.clone() };
        let text = serde_json::to_string(&options).expect("JSON");
        assert_eq!(serde_json::from_str::<TrainOptions>(&text).expect("options"), options);
        assert_eq!(options.optimizer_options().kind(), kind);
        // The user's groups come first.
        assert_eq!(bias_after_step(&options)?, 0.5, "{kind}");
        let optimizer = options.build_optimizer(&store(DType::F32)?.params())?;
        assert_eq!(optimizer.to_json()["weight_decay"], 0.25, "{kind}");
        assert_eq!(optimizer.to_json()["groups"][0]["pattern"], "c.*");
    }
    let unmatched = TrainOptions { groups: vec![ParamGroup::new("no.*")], ..new };
    assert!(bias_after_step(&unmatched).unwrap_err().to_string().contains("no.*"));
    Ok(())
}

/// With the defaults of a run from before groups, the bits are those of AdamW on all parameters.
#[test]
fn one_group_gives_the_bits_of_plain_adamw() -> Result<()> {
    let run = |grouped: bool| -> Result<BTreeMap<String, Vec<u64>>> {
        let store = store(DType::F32)?;
        let params = store.params();
        let options = TrainOptions { decay_all: true, ..Default::default() };
        let mut optimizer: Box<dyn Optimizer> =
            if grouped { options.build_optimizer(&params)? } else { Box::new(AdamW::new(options.adamw())?) };
        for step in 0..3 {
            optimizer.step(&params, &gradients(&params, drawn(step))?, 0.01, Some(1.0))?;
        }
        bits(&store, &*optimizer)
    };
    assert!(run(true)? == run(false)?);
    Ok(())
}
