//! Queries, keys and values by one product, and gradients that are joined or added up at the end: the same numbers as
//! without, on every fallback.

use x_transformers::{
    DType, Device, Init, ParamStore, Result, Tape, Tensor, checkpoint,
    config::AutoregressiveConfig,
    models::{AutoregressiveWrapper, ForwardOptions},
    train::{AdamW, AdamWOptions, Optimizer},
};

use super::{D, GPT2, config, difference, drawn};
use crate::common::{emulated, traced};

/// A model of one layer with its parameters.
struct Model {
    store: ParamStore,
    model: AutoregressiveWrapper,
    tokens: Tensor,
}

impl Model {
    fn new(config: &AutoregressiveConfig, dtype: DType, device: &Device) -> Result<Self> {
        let store = ParamStore::new(3, dtype, device);
        let model = AutoregressiveWrapper::new(config, &store)?;
        let tokens = Tensor::generate([2, 17], DType::I64, device, |i| (i * 7919 % 56) as f64)?;
        Ok(Self { store, model, tokens })
    }

    /// Returns loss and gradients, in the order of the names.
    fn run(&self) -> Result<Vec<Tensor>> {
        self.run_with(|| Ok(()))
    }

    /// The same, with a call between the passes.
    fn run_with(&self, between: impl FnOnce() -> Result<()>) -> Result<Vec<Tensor>> {
        let mut tape = Tape::grad();
        let loss = self.model.loss(&self.tokens, &ForwardOptions::default())?;
        between()?;
        let grads = tape.backward(&loss)?;
        let params = self.store.params();
        let of_params = params.unique().map(|(_, param)| grads.param(param).expect("a gradient").clone());
        Ok([loss.detach()].into_iter().chain(of_params).collect())
    }

    /// Gives the weights of queries, keys and values memory of their own.
    fn take_apart(&self) -> Result<()> {
        for (name, param) in self.store.params().iter() {
            if [".to_q.", ".to_k.", ".to_v."].iter().any(|part| name.contains(part)) {
                param.set(param.tensor().detach().affine(1.0, 0.0)?)?;
            }
        }
        Ok(())
    }
}

/// Returns the number of products from 32 rows to as many columns as all heads of queries, keys and values have.
fn joint_products(names: &[String], columns: usize) -> usize {
    names.iter().filter(|name| name.starts_with(&format!("product {columns} 32 128 "))).count()
}

fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-11,
        DType::F32 => 2e-5,
        DType::F16 => 1e-2,
        _ => 6e-2,
    }
}

/// Compares tensors relative to their largest values; those that are zero but for rounding, like the gradient of a bias of
/// keys, relative to a hundredth of the largest of all.
fn assert_close(a: &[Tensor], b: &[Tensor], bound: f64, what: &str) -> Result<()> {
    let values = |all: &[Tensor]| all.iter().map(Tensor::to_f64_vec).collect::<Result<Vec<_>>>();
    let largest = |of: &[f64]| of.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    let (a, b) = (values(a)?, values(b)?);
    // The first is a loss.
    let floor = b[1..].iter().map(|b| largest(b)).fold(0.0, f64::max) / 100.0;
    assert_eq!(a.len(), b.len());
    for (at, (a, b)) in a.iter().zip(&b).enumerate() {
        assert_eq!(a.len(), b.len());
        let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
        let difference = largest(&differences) / largest(b).max(floor);
        assert!(difference < bound, "{what}: {difference:e} at {at}");
    }
    Ok(())
}

/// The configs of D and GPT-2, also with fewer heads of keys and values.
fn configs() -> Result<Vec<(AutoregressiveConfig, usize)>> {
    let mut all = vec![(config(D, 1)?, 384), (config(GPT2, 1)?, 384)];
    let mut grouped = config(GPT2, 1)?;
    grouped.net.attn_layers.attn.kv_heads = Some(1);
    all.push((grouped, 128 + 2 * 64));
    Ok(all)
}

/// Three products where the weights cannot lie side by side, since the second would not be aligned; in f64 it is.
#[test]
fn projections_of_odd_sizes_are_three_products() -> Result<()> {
    let Some(gpu) = emulated("projections_of_odd_sizes_are_three_products") else { return Ok(()) };
    for (mut config, _) in configs()?.into_iter().take(2) {
        config.net.attn_layers.dim = 35;
        config.net.attn_layers.attn.dim_head = 33;
        let reference = Model::new(&config, DType::F64, &Device::Cpu)?;
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let model = Model::new(&config, dtype, &gpu)?;
            reference.store.params().load(&model.store.params().state_dict())?;
            let expected = reference.run()?;
            model.run()?;
            let (names, apart) = traced(|| model.run());
            let joint = names.iter().filter(|name| name.starts_with("product 198 32 35 ")).count();
            assert_eq!(joint, 0, "{dtype}: {names:?}");
            assert_close(&apart?, &expected, bound(dtype), "three products")?;
        }
    }
    Ok(())
}

/// One product where the weights lie side by side, as in f64 on the CPU.
#[test]
fn projections_give_the_same_either_way() -> Result<()> {
    let Some(gpu) = emulated("projections_give_the_same_either_way") else { return Ok(()) };
    for (config, columns) in configs()? {
        let reference = Model::new(&config, DType::F64, &Device::Cpu)?;
        for dtype in [DType::BF16, DType::F16, DType::F32, DType::F64] {
            let model = Model::new(&config, dtype, &gpu)?;
            // In this type's numbers.
            reference.store.params().load(&model.store.params().state_dict())?;
            let expected = reference.run()?;
            model.run()?;
            let (names, joint) = traced(|| model.run());
            assert_eq!(joint_products(&names, columns), 1, "{dtype}: {names:?}");
            assert_close(&joint?, &expected, bound(dtype), "one product")?;
            // A state dict replaces the weights, which move together again.
            model.store.params().load(&model.store.params().state_dict())?;
            model.take_apart()?;
            model.run()?;
            let (names, joint) = traced(|| model.run());
            assert_eq!(joint_products(&names, columns), 1, "{dtype}, loaded: {names:?}");
            assert_close(&joint?, &expected, bound(dtype), "one product after loading")?;
            // However often they are replaced.
            for _ in 0..18 {
                model.take_apart()?;
                let _ = model.model.loss(&model.tokens, &ForwardOptions::default())?;
            }
            let (names, _) = traced(|| model.run());
            assert_eq!(joint_products(&names, columns), 1, "{dtype}, replaced: {names:?}");
        }
    }
    Ok(())
}

/// A step between the passes must not change the weights that the backward pass reads.
#[test]
fn projections_keep_their_weights() -> Result<()> {
    let Some(gpu) = emulated("projections_keep_their_weights") else { return Ok(()) };
    let model = Model::new(&config(D, 1)?, DType::F32, &gpu)?;
    let (params, mut optimizer) = (model.store.params(), AdamW::new(AdamWOptions::default())?);
    let step = |optimizer: &mut AdamW| -> Result<()> {
        let mut tape = Tape::grad();
        let loss = model.model.loss(&model.tokens, &ForwardOptions::default())?;
        let grads = tape.backward(&loss)?;
        drop(loss);
        optimizer.step(&params, &grads, 1e-2, None).map(drop)
    };
    step(&mut optimizer)?;
    let undisturbed = model.run()?;
    let disturbed = model.run_with(|| step(&mut optimizer))?;
    for (a, b) in undisturbed.iter().zip(&disturbed) {
        assert_eq!(a.to_f64_vec()?, b.to_f64_vec()?);
    }
    // The weights were copied before the update; they have to move together again, and are trained like any others.
    let (names, after) = traced(|| model.run());
    assert!(joint_products(&names, 384) == 1 && after?[0].item()? < undisturbed[0].item()?);
    Ok(())
}

/// A frozen weight gets no gradient, the others get theirs.
#[test]
fn projections_may_be_partly_frozen() -> Result<()> {
    let Some(gpu) = emulated("projections_may_be_partly_frozen") else { return Ok(()) };
    let model = Model::new(&config(GPT2, 1)?, DType::F32, &gpu)?;
    let params = model.store.params();
    let whole = model.run()?;
    let is_frozen = |name: &str| name.ends_with("to_k.weight") || name.ends_with("to_q.bias");
    for (_, param) in params.iter().filter(|(name, _)| is_frozen(name)) {
        param.set_requires_grad(false);
    }
    let mut tape = Tape::grad();
    let loss = model.model.loss(&model.tokens, &ForwardOptions::default())?;
    let grads = tape.backward(&loss)?;
    for ((name, param), whole) in params.unique().zip(&whole[1..]) {
        match grads.param(param) {
            None => assert!(is_frozen(name), "{name}"),
            Some(grad) => assert!(!is_frozen(name) && difference(grad, whole)? < 1e-5, "{name}"),
        }
    }
    Ok(())
}

/// Slices that cover a tensor, overlap, leave a gap, or come in another order or along two dimensions.
#[test]
fn gradients_of_slices_are_joined() -> Result<()> {
    let Some(gpu) = emulated("gradients_of_slices_are_joined") else { return Ok(()) };
    for slices in [
        &[(1isize, 0, 3), (1, 3, 2), (1, 5, 4)][..],
        &[(1, 5, 4), (1, 0, 3), (1, 3, 2)],
        &[(1, 0, 5), (1, 3, 6)],
        &[(1, 0, 3), (1, 5, 4)],
        &[(1, 0, 3), (1, 0, 3)],
        &[(1, 2, 3)],
        &[(0, 0, 2), (1, 0, 9), (0, 2, 3), (1, 3, 2)],
    ] {
        let run = |device: &Device| -> Result<Vec<f64>> {
            let x = drawn(&[5, 9], 1, device)?.requires_grad()?;
            let mut tape = Tape::grad();
            // Not a leaf, whose gradients are added at once.
            let y = x.affine(2.0, 0.0)?;
            let mut loss = y.square()?.sum(&[])?;
            for (at, &(dim, start, len)) in slices.iter().enumerate() {
                let part = y.narrow(dim, start, len)?;
                let weights = drawn(part.shape(), at + 2, device)?;
                loss = loss.add(&part.mul(&weights)?.sum(&[])?)?;
            }
            let with_square = tape.backward(&loss)?.get(&x).expect("a gradient").to_f64_vec()?;
            let mut tape = Tape::grad();
            let y = x.affine(2.0, 0.0)?;
            let mut loss = Tensor::zeros((), DType::BF16, device)?;
            for (at, &(dim, start, len)) in slices.iter().enumerate() {
                let part = y.narrow(dim, start, len)?;
                loss = loss.add(&part.mul(&drawn(part.shape(), at + 2, device)?)?.sum(&[])?)?;
            }
            let grads = tape.backward(&loss)?;
            Ok([with_square, grads.get(&x).expect("a gradient").to_f64_vec()?].concat())
        };
        let (here, there) = (run(&gpu)?, run(&Device::Cpu)?);
        assert!(here.iter().zip(&there).all(|(a, b)| (a - b).abs() <= 0.02 * b.abs().max(1.0)), "{slices:?}");
    }
    Ok(())
}

/// Gradients of norms are summed up at the end, for all norms: also those of a shared weight, of one that is not a leaf,
/// of one without bias, and of norms within a segment.
#[test]
fn gradients_of_norms_wait_for_each_other() -> Result<()> {
    let Some(gpu) = emulated("gradients_of_norms_wait_for_each_other") else { return Ok(()) };
    assert_close(&norms(&gpu)?, &norms(&Device::Cpu)?, 1e-5, "norms")
}

fn norms(device: &Device) -> Result<Vec<Tensor>> {
    let store = ParamStore::new(5, DType::F32, device);
    let param = |name: &str| store.param(name, [64], Init::Normal(1.0));
    let (weight, bias, other) = (param("weight")?, param("bias")?, param("other")?);
    let x = Tensor::generate([70, 64], DType::F32, device, |i| (i * 31 % 101) as f64 / 50.0 - 1.0)?.requires_grad()?;
    let mut tape = Tape::grad();
    let y = x.layer_norm(Some(&weight.tensor()), Some(&bias.tensor()), 1e-5)?;
    let y = y.add(&y.layer_norm(Some(&weight.tensor()), None, 1e-5)?)?;
    let shifted = other.tensor().affine(1.0, 1.0)?;
    let y = y.layer_norm(Some(&shifted), Some(&bias.tensor()), 1e-5)?;
    let (inside, inner_bias) = (other.clone(), bias.clone());
    let y = checkpoint(move |x| x[0].layer_norm(Some(&inside.tensor()), Some(&inner_bias.tensor()), 1e-5), &[&y])?;
    let grads = tape.backward(&y.mul(&y)?.mul(&x)?.sum(&[])?)?;
    let mut all = vec![grads.get(&x).expect("a gradient").clone()];
    all.extend([&weight, &bias, &other].map(|param| grads.param(param).expect("a gradient").clone()));
    Ok(all)
}
