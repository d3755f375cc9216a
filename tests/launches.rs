//! Launches of a training step, counted on the emulated driver: a step of a small model spends its time on them. Also
//! the sizes that products are given, of which a real card computes some faster than others.

#![cfg(feature = "cuda")]

#[path = "common/gpu.rs"]
mod common;
#[path = "launches/joint.rs"]
mod joint;

use std::{collections::BTreeMap, process::Command};

use common::{Gpu, emulated, traced};
use x_transformers::{
    DType, Device, ParamStore, Result, Tape, Tensor,
    config::{AutoregressiveConfig, Config},
    models::{AutoregressiveWrapper, ForwardOptions},
    train::{AdamW, AdamWOptions, Optimizer},
};

const D: &str = include_str!("../benches/configs/decoder.json");
const GPT2: &str = include_str!("../benches/configs/gpt2.json");

/// Returns a model of `benches/configs` with this number of layers, narrower and with fewer tokens, as odd as before.
fn config(json: &str, depth: usize) -> Result<AutoregressiveConfig> {
    let Config::AutoregressiveWrapper(mut config) = Config::from_json(json)? else { panic!("not a language model") };
    let net = &mut config.net;
    net.num_tokens = if net.num_tokens % 8 == 0 { 56 } else { 57 };
    net.max_seq_len = 16;
    (net.attn_layers.dim, net.attn_layers.depth, net.attn_layers.heads) = (128, depth, 2);
    Ok(config)
}

/// Returns the work of the second step of training: loss, gradients, clipping and AdamW, without copies to the host.
fn step(json: &str, depth: usize, gpu: &Gpu) -> Result<Vec<String>> {
    let store = ParamStore::new(0, DType::BF16, gpu);
    let model = AutoregressiveWrapper::new(&config(json, depth)?, &store)?;
    let params = store.params();
    let tokens = Tensor::generate([2, 17], DType::I64, gpu, |i| (i * 7919 % 56) as f64)?;
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    let mut step = || {
        let mut tape = Tape::train(optimizer.steps());
        let loss = model.loss(&tokens, &ForwardOptions::default())?;
        let grads = tape.backward(&loss)?;
        optimizer.step(&params, &grads, 1e-4, Some(1.0)).map(drop)
    };
    step()?;
    let (names, result) = traced(step);
    result?;
    Ok(names.into_iter().filter(|name| name != "copy out").collect())
}

/// Returns how often each kernel or kind of product occurs.
fn counts(names: &[String]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for name in names {
        let epilogue = name.split_once(" + ").map_or("", |(_, epilogue)| epilogue);
        let kind = format!("{} {epilogue}", name.split(' ').next().unwrap_or_default());
        *counts.entry(kind.trim_end().to_string()).or_default() += 1;
    }
    counts
}

/// Returns the number of launches of a layer, and of everything else; prints them by name.
fn count(name: &str, json: &str, gpu: &Gpu) -> Result<[usize; 2]> {
    let [one, two] = [step(json, 1, gpu)?, step(json, 2, gpu)?];
    let (first, both) = (counts(&one), counts(&two));
    for (kernel, &count) in &both {
        let before = first.get(kernel).copied().unwrap_or(0);
        println!("{name}: {kernel}: {} a layer, {} outside", count - before, 2 * before - count);
    }
    println!("{name}: {}", one.join(", "));
    let layer = two.len() - one.len();
    Ok([layer, one.len() - layer])
}

/// Outputs and gradients do not tell whether a bias was added by a product or by a copy before it; this does.
#[test]
fn launches_of_a_step() -> Result<()> {
    let Some(gpu) = emulated("launches_of_a_step") else { return Ok(()) };
    let counts = [count("D", D, &gpu)?, count("GPT-2", GPT2, &gpu)?];
    // Per layer and outside: six layers of D make 149 launches. Without cuBLASLt, biases cost more.
    let expected = match std::env::var_os("XT_EMULATOR_CUBLASLT") {
        None => [[21, 23], [21, 26]],
        Some(_) => [[26, 26], [28, 26]],
    };
    assert_eq!(counts, expected);
    Ok(())
}

/// Runs the test above in a process without cuBLASLt.
#[test]
fn launches_of_a_step_without_epilogues() {
    if emulated("launches_of_a_step_without_epilogues").is_none() || std::env::var_os("XT_EMULATOR_CUBLASLT").is_some()
    {
        return;
    }
    let mut again = Command::new(std::env::current_exe().expect("the test's own program"));
    let again = again.args(["--exact", "launches_of_a_step", "linear_gives_the_same_either_way"]);
    let output = again.env("XT_EMULATOR_CUBLASLT", "off").output().expect("a process");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("2 passed"), "{text}");
}

/// Values near 1, different for each tensor.
fn drawn(shape: &[usize], seed: usize, device: &Device) -> Result<Tensor> {
    Tensor::generate(shape, DType::BF16, device, |i| ((i * 7 + seed * 31) % 23) as f64 / 16.0 - 0.7)
}

/// Returns the largest difference, relative to the largest value.
fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.to_f64_vec()?, b.to_f64_vec()?);
    let largest = b.iter().fold(1e-30, |largest: f64, b| largest.max(b.abs()));
    Ok(a.iter().zip(&b).fold(0.0, |most: f64, (a, b)| most.max((a - b).abs())) / largest)
}

/// A layer with a bias, whose sizes have epilogues and whose sizes have none, on the GPU as on the CPU.
#[test]
fn linear_gives_the_same_either_way() -> Result<()> {
    let Some(gpu) = emulated("linear_gives_the_same_either_way") else { return Ok(()) };
    let has_epilogues = std::env::var_os("XT_EMULATOR_CUBLASLT").is_none();
    for (rows, inputs, outputs, fuses) in
        [(20, 32, 24, true), (3, 8, 16, true), (20, 32, 25, false), (9, 33, 24, false)]
    {
        let run = |device: &Device| -> Result<[Tensor; 4]> {
            let [x, weight, bias] = [(&[rows, inputs][..], 1), (&[outputs, inputs], 2), (&[outputs], 3)]
                .map(|(shape, seed)| drawn(shape, seed, device)?.requires_grad());
            let (x, weight, bias) = (x?, weight?, bias?);
            let mut tape = Tape::grad();
            let y = x.linear(&weight, Some(&bias))?;
            let grads = tape.backward_with(&y, &drawn(&[rows, outputs], 4, device)?)?;
            let gradient = |of: &Tensor| grads.get(of).expect("a gradient").clone();
            Ok([y.detach(), gradient(&x), gradient(&weight), gradient(&bias)])
        };
        let (names, here) = traced(|| run(&gpu));
        for (here, there) in here?.iter().zip(run(&Device::Cpu)?) {
            assert!(difference(here, &there)? < 8e-3, "[{rows}, {inputs}] to {outputs}: {here:?}");
        }
        let fused = |what: &str| names.iter().any(|name| name.starts_with("product") && name.ends_with(what));
        let expected = fuses && has_epilogues;
        assert_eq!([fused("+ bias"), fused("+ sums")], [expected; 2], "[{rows}, {inputs}] to {outputs}: {names:?}");
    }
    Ok(())
}

/// A vocabulary of 50257 tokens would make rows of logits start at odd elements, for which cuBLAS has only slow kernels.
#[test]
fn logits_of_odd_vocabularies_have_aligned_rows() -> Result<()> {
    let Some(gpu) = emulated("logits_of_odd_vocabularies_have_aligned_rows") else { return Ok(()) };
    for (classes, with_bias, blocks) in
        [(57, false, [20, 20]), (57, true, [20, 20]), (57, true, [8, 3]), (49, true, [20, 7])]
    {
        let run = |device: &Device| -> Result<[Tensor; 4]> {
            let [x, weight, bias] = [(&[20, 32][..], 1), (&[classes, 32], 2), (&[classes], 3)]
                .map(|(shape, seed)| drawn(shape, seed, device)?.requires_grad());
            let (x, weight, bias) = (x?, weight?, bias?);
            let targets = Tensor::generate([20], DType::I64, device, |i| (i * 13 % classes) as f64)?;
            let mut tape = Tape::grad();
            let loss = x.linear_cross_entropy_by(&weight, with_bias.then_some(&bias), &targets, -100, blocks)?;
            let grads = tape.backward(&loss)?;
            let gradient = |of: &Tensor| grads.get(of).expect("a gradient").clone();
            let of_bias = if with_bias { gradient(&bias) } else { bias.detach() };
            Ok([loss.detach(), gradient(&x), gradient(&weight), of_bias])
        };
        let (names, here) = traced(|| run(&gpu));
        let here = here?;
        for (here, there) in here.iter().zip(run(&Device::Cpu)?) {
            assert_eq!(here.shape(), there.shape());
            assert!(difference(here, &there)? < 1.5e-2, "{classes} classes: {here:?}");
        }
        let products: Vec<Vec<usize>> = names
            .iter()
            .filter_map(|name| name.strip_prefix("product "))
            .map(|sizes| sizes.split(' ').map_while(|size| size.parse().ok()).collect())
            .collect();
        assert!(products.len() >= 3, "{names:?}");
        for sizes in &products {
            let [_, n, _, leading @ ..] = &sizes[..] else { panic!("no sizes: {names:?}") };
            // A single row, which sums up the gradient of the bias, has no next one.
            let fits = *n == 1 || leading.iter().all(|leading| leading % 8 == 0);
            assert!(fits, "{classes} classes: {names:?}");
        }
    }
    Ok(())
}
