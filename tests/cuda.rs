//! Tests specific to a GPU: transfers, memory, asynchronous errors, graphs, and results bit-identical to the CPU's.
//!
//! Runs on the device that `XT_TEST_DEVICE` names, `cuda:0` for instance, which is either a card or the emulated driver
//! (`scripts/emulated`); without it every test is skipped by name.

#![cfg(feature = "cuda")]

#[path = "common/gpu.rs"]
mod common;
#[path = "cuda/faults.rs"]
mod faults;
#[path = "cuda/raw_kernel.rs"]
mod raw_kernel;

use common::gpu;
use x_transformers::{
    DType, Device, Error, ErrorKind, Graph, Init, Param, ParamMap, ParamStore, Result, Tape, Tensor,
    config::{AttentionLayersConfig, AutoregressiveConfig, SamplingConfig, TransformerWrapperConfig},
    device::{Precision, set_float32_matmul_precision},
    models::{AutoregressiveWrapper, ForwardOptions, GenerateOptions, RecordedDecode, sample_tokens},
    ops::{AttentionSpec, DecodeSpec, attention, attention_decode},
    train::{AdamW, AdamWOptions, Optimizer, ParamGroup, RecordedInfo, RecordedStep},
};

/// A decoder whose parts have constants of their own: rotary positions, a T5 bias, mem-kv, GLU.
fn config(dropout: f64) -> AutoregressiveConfig {
    let mut layers = AttentionLayersConfig { heads: 2, rotary_pos_emb: true, ..AttentionLayersConfig::decoder(32, 2) };
    layers.rel_pos_bias = true;
    layers.attn.dim_head = 32;
    layers.attn.num_mem_kv = 2;
    layers.attn.dropout = dropout;
    layers.ff.glu = true;
    layers.ff.dropout = dropout;
    let net = TransformerWrapperConfig { num_tokens: 32, max_seq_len: 16, attn_layers: layers, ..Default::default() };
    AutoregressiveConfig { net, ..Default::default() }
}

fn model(device: &Device, dtype: DType, dropout: f64) -> Result<(AutoregressiveWrapper, ParamMap)> {
    let store = ParamStore::new(7, dtype, device);
    Ok((AutoregressiveWrapper::new(&config(dropout), &store)?, store.params()))
}

fn tokens(device: &Device) -> Result<Tensor> {
    let tokens: Vec<i64> = (0..2 * 13).map(|i| (i * 7 + i * i * 3) % 32).collect();
    Tensor::from_slice(&tokens, [2, 13], device)
}

/// Losses and final weights of a few steps.
fn train(device: &Device, dtype: DType, dropout: f64, steps: u64) -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
    let (model, params) = model(device, dtype, dropout)?;
    let (tokens, mut optimizer) = (tokens(device)?, AdamW::new(AdamWOptions::default())?);
    let mut losses = Vec::new();
    for step in 0..steps {
        let mut tape = Tape::train(step);
        let loss = model.loss(&tokens, &ForwardOptions::default())?;
        let grads = tape.backward(&loss)?;
        optimizer.step(&params, &grads, 1e-3, Some(1.0))?;
        losses.push(loss.item()?);
    }
    let weights = params.state_dict().values().map(Tensor::to_f64_vec).collect::<Result<_>>()?;
    Ok((losses, weights))
}

fn close(a: &[f64], b: &[f64], bound: f64) -> bool {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    a.len() == b.len() && norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) <= bound * norm(&mut b.iter().copied())
}

#[test]
fn values_go_and_come_back() -> Result<()> {
    let Some(gpu) = gpu("values_go_and_come_back") else { return Ok(()) };
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16, DType::I64, DType::Bool] {
        for shape in [vec![], vec![0, 3], vec![5], vec![2, 3, 7]] {
            let x = Tensor::generate(&shape[..], dtype, &Device::Cpu, |i| (i as f64) - 3.5)?;
            let there = x.to_device(&gpu)?;
            assert_eq!((there.device(), there.shape(), there.dtype()), (&*gpu, x.shape(), dtype));
            assert_eq!(there.to_f64_vec()?, x.to_f64_vec()?, "{dtype} {shape:?}");
            assert_eq!(there.to_device(&Device::Cpu)?.to_f64_vec()?, x.to_f64_vec()?, "{dtype} {shape:?}");
            for value in [0.0, 1.0, -2.3] {
                let (here, there) = (
                    Tensor::full(&shape[..], value, dtype, &Device::Cpu)?,
                    Tensor::full(&shape[..], value, dtype, &gpu)?,
                );
                assert_eq!(here.to_f64_vec()?, there.to_f64_vec()?, "{dtype} {shape:?} full of {value}");
            }
        }
    }
    assert_eq!(Tensor::arange(1000, &gpu)?.to_vec::<i64>()?, (0..1000).collect::<Vec<_>>());
    let strided = Tensor::generate([3, 4], DType::F32, &gpu, |i| i as f64)?.transpose(0, 1)?;
    assert_eq!(strided.to_device(&Device::Cpu)?.to_vec::<f32>()?, strided.to_vec::<f32>()?);
    Ok(())
}

/// The source of an upload may change at once: here the next tensor takes its place. The emulated driver reads the
/// source as late as it may. Large uploads are split into parts, enough to reuse the staging buffers.
#[test]
fn uploads_do_not_read_their_source_later() -> Result<()> {
    let Some(gpu) = gpu("uploads_do_not_read_their_source_later") else { return Ok(()) };
    let upload = |n: usize, first: i64| Tensor::from_vec((first..first + n as i64).collect(), [n], &gpu);
    let check = |uploaded: &[Tensor], n: usize| {
        for (i, tensor) in uploaded.iter().enumerate() {
            let expected = (1000 * i as i64..).take(n);
            assert!(tensor.to_vec::<i64>()?.into_iter().eq(expected), "upload {i} of {n} numbers");
        }
        Ok::<_, Error>(())
    };
    for (n, times) in [(5, 40), (4096, 300), (100_003, 12), (1 << 20, 2)] {
        let uploaded = (0..times).map(|i| upload(n, 1000 * i)).collect::<Result<Vec<_>>>()?;
        check(&uploaded, n)?;
    }
    Ok(())
}

/// Constants whose names depend on the caller's input are evicted, and recreated when needed. A graph keeps the ones
/// that it uses.
#[test]
fn constants_do_not_fill_the_memory() -> Result<()> {
    let Some(gpu) = gpu("constants_do_not_fill_the_memory") else { return Ok(()) };
    let n = 600;
    let x = Tensor::generate([1, n, 1], DType::F32, &gpu, |i| i as f64)?;
    let shift = |amount: usize| {
        let y = x.shift_tokens(&[amount as isize], None)?.to_vec::<f32>()?;
        assert!(y[..amount].iter().all(|y| *y == 0.0) && (amount == n || y[amount..][..1] == [0.0]), "{amount}");
        assert_eq!(y[n - 1], (n - 1 - amount) as f32);
        Ok::<_, Error>(())
    };
    shift(0)?;
    let third = |x: &[Tensor]| x[0].shift_tokens(&[3], None);
    let mut graph = Graph::capture(std::slice::from_ref(&x), &ParamMap::default(), third)?;
    let expected = graph.replay(std::slice::from_ref(&x))?.to_vec::<f32>()?;
    let live = gpu.memory().live;
    (0..n).try_for_each(shift)?;
    // Larger ones of tests before may make room for these.
    let constants = gpu.memory().live.saturating_sub(live);
    assert!(constants <= 256 * 64, "{constants} bytes of constants");
    gpu.trim();
    assert_eq!(graph.replay(std::slice::from_ref(&x))?.to_vec::<f32>()?, expected);
    shift(0)
}

/// Sizes that kernels count in 32 bits are checked before anything of that size is allocated: these tensors are views.
#[test]
fn sizes_beyond_what_kernels_count_are_refused() -> Result<()> {
    let Some(gpu) = gpu("sizes_beyond_what_kernels_count_are_refused") else { return Ok(()) };
    let huge = (1 << 31) + 1;
    let view = |shape: &[usize]| Tensor::ones(&vec![1; shape.len()][..], DType::F32, &gpu)?.expand(shape);
    let (curves, lengths) = (view(&[1, huge])?, Tensor::from_slice(&[3i64], [1], &gpu)?);
    let (q, k) = (view(&[1, 1, 1, 32])?, view(&[1, 1, 4, 32])?);
    let decode = |q: &Tensor, k: &Tensor, v: &Tensor, curves| {
        attention_decode(
            q,
            k,
            v,
            &lengths,
            &DecodeSpec { scale: 1.0, bias_by_distance: curves, ..DecodeSpec::default() },
        )
    };
    let (heads, features) = (view(&[1, huge, 1, 1])?, view(&[1, 1, 1, huge])?);
    let results = [
        decode(&q, &k, &k, Some(&curves)),
        decode(&heads, &heads, &heads, None),
        decode(&features, &features, &features, None),
        attention(&heads, &heads, &heads, &AttentionSpec::default()),
        attention(&features, &features, &features, &AttentionSpec::default()),
    ];
    for (i, result) in results.into_iter().enumerate() {
        let error = result.unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Shape { .. }) && error.to_string().contains("2147483649"),
            "{i}: {error}"
        );
    }
    assert!(decode(&q, &k, &k, None).is_ok());
    Ok(())
}

#[test]
fn a_gradient_returns_to_the_device_of_its_tensor() -> Result<()> {
    let Some(gpu) = gpu("a_gradient_returns_to_the_device_of_its_tensor") else { return Ok(()) };
    let x = Tensor::from_slice(&[1.0f32, -2.0, 3.0], [3], &Device::Cpu)?.requires_grad()?;
    let mut tape = Tape::grad();
    let y = x.to_device(&gpu)?.square()?.sum(&[])?;
    let grads = tape.backward(&y)?;
    let grad = grads.get(&x).expect("a gradient");
    assert_eq!((grad.device(), grad.to_vec::<f32>()?), (&Device::Cpu, vec![2.0, -4.0, 6.0]));
    Ok(())
}

#[test]
fn tensors_of_two_devices_do_not_mix() -> Result<()> {
    let Some(gpu) = gpu("tensors_of_two_devices_do_not_mix") else { return Ok(()) };
    let (here, there) = (Tensor::ones([2, 2], DType::F32, &Device::Cpu)?, Tensor::ones([2, 2], DType::F32, &gpu)?);
    for result in [here.add(&there), there.matmul(&here), there.linear(&here, None), here.softmax()?.mul(&there)] {
        let error = result.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Device { .. }), "{error}");
    }
    Ok(())
}

/// Once kernels are compiled and constants exist, a pass over the model consists only of launches.
#[test]
fn passes_only_launch_and_a_step_reads_back_one_number() -> Result<()> {
    let Some(gpu) = gpu("passes_only_launch_and_a_step_reads_back_one_number") else { return Ok(()) };
    let (model, params) = model(&gpu, DType::F32, 0.1)?;
    let (tokens, mut optimizer) = (tokens(&gpu)?, AdamW::new(AdamWOptions::default())?);
    let mut counts = Vec::new();
    for step in 0..3 {
        let start = gpu.transfers();
        let mut tape = Tape::train(step);
        let loss = model.loss(&tokens, &ForwardOptions::default())?;
        let grads = tape.backward(&loss)?;
        let passes = gpu.transfers();
        optimizer.step(&params, &grads, 1e-3, Some(1.0))?;
        let end = gpu.transfers();
        assert!(passes.launches > start.launches);
        assert_eq!(end.launches - passes.launches, 3, "two for the norm of all gradients, one for all parameters");
        counts.push([
            (passes.uploads - start.uploads, passes.read_backs - start.read_backs),
            (end.uploads - passes.uploads, end.read_backs - passes.read_backs),
        ]);
    }
    assert_eq!(counts[2][0], (0, 0), "forward and backward pass: uploads, read-backs");
    // The tables of addresses stay as they are; the norm of the gradients comes back.
    assert_eq!(counts[2][1], (0, 1), "optimizer: uploads, read-backs");
    Ok(())
}

#[test]
fn random_numbers_match_the_cpu() -> Result<()> {
    let Some(gpu) = gpu("random_numbers_match_the_cpu") else { return Ok(()) };
    let weights = |device: &Device| -> Result<Vec<Vec<f64>>> {
        model(device, DType::BF16, 0.0)?.1.state_dict().values().map(Tensor::to_f64_vec).collect()
    };
    assert_eq!(weights(&gpu)?, weights(&Device::Cpu)?, "initial weights");
    for dtype in [DType::F32, DType::F64, DType::F16] {
        for init in [Init::Normal(0.7), Init::Uniform(0.3)] {
            let draw = |device: &Device| -> Result<Vec<f64>> {
                ParamStore::new(3, dtype, device).param("weight", [9_001], init)?.tensor().to_f64_vec()
            };
            assert_eq!(draw(&gpu)?, draw(&Device::Cpu)?, "{init:?} {dtype}");
        }
    }
    let uploads = gpu.transfers().uploads;
    ParamStore::new(3, DType::F32, &gpu).param("weight", [1000], Init::Normal(0.7))?;
    assert_eq!(gpu.transfers().uploads, uploads, "weights are drawn where they are");
    let mask = |device: &Device| -> Result<Vec<f64>> {
        let _tape = Tape::train(11);
        Tensor::ones([7, 91], DType::F32, device)?.dropout(0.3)?.to_f64_vec()
    };
    assert_eq!(mask(&gpu)?, mask(&Device::Cpu)?, "dropout");
    let sum = |device: &Device| -> Result<Vec<f64>> {
        let x = Tensor::generate([7, 91], DType::F32, device, |i| (i as f64).sin())?;
        let residual = Tensor::generate([7, 91], DType::F32, device, |i| (i as f64).cos())?;
        let _tape = Tape::train(3);
        x.dropout_add(&residual, 0.3)?.to_f64_vec()
    };
    assert_eq!(sum(&gpu)?, sum(&Device::Cpu)?, "dropout and a sum");
    let text = |device: &Device| -> Result<Vec<i64>> {
        let prompt = Tensor::from_slice(&[3i64, 1, 4], [3], device)?;
        let options = GenerateOptions { seed: 5, ..GenerateOptions::default() };
        model(device, DType::F64, 0.0)?.0.generate(&prompt, 12, &options, &mut |_| true)?.to_vec()
    };
    assert_eq!(text(&gpu)?, text(&Device::Cpu)?, "sampling");
    Ok(())
}

#[test]
fn training_follows_the_cpu_and_repeats_its_bits() -> Result<()> {
    let Some(gpu) = gpu("training_follows_the_cpu_and_repeats_its_bits") else { return Ok(()) };
    for (dtype, bound) in [(DType::F64, 1e-11), (DType::F32, 1e-5), (DType::BF16, 2e-2), (DType::F16, 4e-3)] {
        let (losses, weights) = train(&gpu, dtype, 0.1, 3)?;
        let (again, same) = train(&gpu, dtype, 0.1, 3)?;
        assert!(losses == again && weights == same, "{dtype}: another run has other bits");
        let (expected, _) = train(&Device::Cpu, dtype, 0.1, 3)?;
        assert!(close(&losses, &expected, bound), "{dtype}: {losses:?}, on the CPU {expected:?}");
    }
    Ok(())
}

#[test]
fn memory_that_runs_out_is_an_error_with_numbers() -> Result<()> {
    let Some(gpu) = gpu("memory_that_runs_out_is_an_error_with_numbers") else { return Ok(()) };
    let kept = Tensor::ones([1000], DType::F32, &gpu)?;
    drop(Tensor::ones([5000], DType::F32, &gpu)?);
    let error = Tensor::zeros([1 << 20, 1 << 25], DType::F32, &gpu).unwrap_err();
    let ErrorKind::OutOfMemory { requested, live, .. } = *error.kind() else { panic!("{error}") };
    assert!(requested == 1 << 47 && live >= 4000, "{error}");
    assert_eq!(gpu.memory().cached, 0, "what was kept for reuse was given back before the second try");
    assert_eq!(kept.sum(&[])?.item()?, 1000.0);
    Ok(())
}

#[test]
fn a_step_leaves_no_memory_behind() -> Result<()> {
    let Some(gpu) = gpu("a_step_leaves_no_memory_behind") else { return Ok(()) };
    train(&gpu, DType::F32, 0.1, 1)?;
    let before = gpu.memory().live;
    train(&gpu, DType::F32, 0.1, 2)?;
    assert_eq!(gpu.memory().live, before);
    Ok(())
}

/// Loss and gradients of a step, recorded once and replayed between updates of the weights.
#[test]
fn a_recorded_training_step_gives_the_same_bits() -> Result<()> {
    let Some(gpu) = gpu("a_recorded_training_step_gives_the_same_bits") else { return Ok(()) };
    let batch = |step: i64| -> Result<Tensor> {
        let tokens: Vec<i64> = (0..2 * 13).map(|i| (i * 5 + i * i + step) % 32).collect();
        Tensor::from_slice(&tokens, [2, 13], &gpu)
    };
    let step = |model: &AutoregressiveWrapper, tokens: &Tensor| {
        let mut tape = Tape::grad();
        let loss = model.loss(tokens, &ForwardOptions::default())?;
        let grads = tape.backward(&loss)?;
        Ok((loss, grads))
    };
    let run = |recorded: bool| -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
        let (model, params) = model(&gpu, DType::F32, 0.0)?;
        let mut optimizer = AdamW::new(AdamWOptions::default())?;
        let mut graph = match recorded {
            true => Some(Graph::capture(&[batch(100)?], &params, |inputs| step(&model, &inputs[0]))?),
            false => None,
        };
        let mut losses = Vec::new();
        for number in 0..4 {
            let eager;
            let (loss, grads) = match &mut graph {
                Some(graph) => graph.replay(&[batch(number)?])?,
                None => {
                    eager = step(&model, &batch(number)?)?;
                    &eager
                }
            };
            losses.push(loss.item()?);
            optimizer.step(&params, grads, 1e-2, Some(1.0))?;
        }
        let weights = params.state_dict().values().map(Tensor::to_f64_vec).collect::<Result<_>>()?;
        Ok((losses, weights))
    };
    assert!(run(true)? == run(false)?, "replays differ from eager steps");
    Ok(())
}

/// Loss, gradients, clipping and AdamW with groups in one graph, with another rate and another scale of the loss in each step.
#[test]
fn a_recorded_optimizer_step_gives_the_same_bits() -> Result<()> {
    let Some(gpu) = gpu("a_recorded_optimizer_step_gives_the_same_bits") else { return Ok(()) };
    let batch = |step: i64| -> Result<Tensor> {
        let tokens: Vec<i64> = (0..2 * 13).map(|i| (i * 5 + i * i + step) % 32).collect();
        Tensor::from_slice(&tokens, [2, 13], &gpu)
    };
    let lr = |step: i64| 1e-2 / (1 + step) as f64;
    type Run = (Vec<f64>, Vec<f64>, Vec<Vec<f64>>);
    let run = |dtype: DType, recorded: bool| -> Result<Run> {
        let (model, params) = model(&gpu, dtype, 0.0)?;
        let loss = |inputs: &[Tensor]| model.loss(&inputs[0], &ForwardOptions::default());
        let logits = ParamGroup { lr: Some(0.3), beta2: Some(0.9), ..ParamGroup::new("*to_logits*") };
        let groups = [logits, ParamGroup::vectors_without_decay()];
        let mut optimizer = AdamW::with_groups(AdamWOptions::default(), &groups, &params)?;
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        // The graph goes on from where the optimizer is.
        let eager = |optimizer: &mut AdamW, losses: &mut Vec<f64>, norms: &mut Vec<f64>, step: i64| -> Result<()> {
            let mut tape = Tape::train(0);
            let output = loss(&[batch(step)?])?;
            let grads = tape.backward(&output)?;
            norms.push(optimizer.step(&params, &grads, lr(step), Some(0.8))?.grad_norm);
            losses.push(output.item()?);
            Ok(())
        };
        eager(&mut optimizer, &mut losses, &mut norms, 0)?;
        if recorded {
            let mut step = RecordedStep::new(optimizer, &params, &[batch(100)?], Some(0.8), loss)?;
            for number in 1..4 {
                let RecordedInfo { loss, info, .. } = step.step(&[batch(number)?], lr(number), 1.0)?;
                norms.push(info.grad_norm);
                losses.push(loss.item()?);
            }
            optimizer = step.into_optimizer();
        } else {
            for number in 1..4 {
                eager(&mut optimizer, &mut losses, &mut norms, number)?;
            }
        }
        // And the optimizer goes on from where the graph was.
        eager(&mut optimizer, &mut losses, &mut norms, 4)?;
        assert_eq!(optimizer.steps(), 5);
        let weights = params.state_dict().values().map(Tensor::to_f64_vec).collect::<Result<_>>()?;
        Ok((losses, norms, weights))
    };
    for dtype in [DType::F32, DType::BF16] {
        let (recorded, eager) = (run(dtype, true)?, run(dtype, false)?);
        assert_eq!(recorded.0, eager.0, "{dtype}: losses");
        assert_eq!(recorded.1, eager.1, "{dtype}: norms");
        assert!(recorded.2 == eager.2, "{dtype}: weights");
    }
    Ok(())
}

#[test]
fn a_recorded_optimizer_step_refuses_unsafe_calls() -> Result<()> {
    let Some(gpu) = gpu("a_recorded_optimizer_step_refuses_unsafe_calls") else { return Ok(()) };
    let store = ParamStore::new(0, DType::F32, &gpu);
    let weight = store.param("weight", [4], Init::Constant(2.0))?;
    let params = store.params();
    let input = |value: f64| Tensor::full([4], value, DType::F32, &gpu);
    let loss = |x: &[Tensor]| weight.tensor().mul(&x[0])?.sum(&[]);
    let values = || weight.tensor().to_vec::<f32>();
    let new = |clip: Option<f64>| {
        RecordedStep::new(AdamW::new(AdamWOptions::default())?, &params, &[input(1.0)?], clip, loss)
    };
    let mut step = new(Some(1.0))?;
    assert_eq!(values()?, [2.0; 4], "recording changes nothing");
    assert_eq!(step.step(&[input(3.0)?], 0.1, 1.0)?.info.grad_norm, 6.0);
    let after = values()?;
    assert!(after[0] < 2.0 && step.steps() == 1);
    // A scale is taken back, up to the rounding of the gradients.
    assert_eq!(step.step(&[input(3.0)?], 0.0, 1024.0)?.info.grad_norm, 6.0);
    assert_eq!(values()?, after, "a rate of 0 moves nothing");
    // Not finite: an error, nothing changed, and the next step is fine.
    let state = step.state_dict()?["exp_avg.weight"].to_f64_vec()?;
    assert!(matches!(
        step.step(&[input(f64::INFINITY)?], 0.1, 1.0).map_err(Error::into_kind),
        Err(ErrorKind::NonFinite { step: 2, .. })
    ));
    assert_eq!((values()?, step.state_dict()?["exp_avg.weight"].to_f64_vec()?), (after.clone(), state));
    assert!(step.step(&[input(1.0)?], f64::NAN, 1.0).is_err() && step.step(&[input(1.0)?], 0.1, 0.0).is_err());
    // Tensors that others hold must not change.
    let held = params.state_dict();
    let error = step.step(&[input(1.0)?], 0.1, 1.0).unwrap_err();
    assert!(error.to_string().contains("another tensor shares the storage of `weight`"), "{error}");
    drop(held);
    step.step(&[input(1.0)?], 0.1, 1.0)?;
    assert!(values()? != after && step.steps() == 3);
    assert!(new(Some(0.0)).is_err());

    let dropout = |x: &[Tensor]| weight.tensor().mul(&x[0])?.dropout(0.5)?.sum(&[]);
    let error = RecordedStep::new(AdamW::new(AdamWOptions::default())?, &params, &[input(1.0)?], None, dropout);
    assert!(error.unwrap_err().to_string().contains("dropout"));
    let vector = |x: &[Tensor]| weight.tensor().mul(&x[0]);
    let error = RecordedStep::new(AdamW::new(AdamWOptions::default())?, &params, &[input(1.0)?], None, vector);
    assert!(matches!(error.unwrap_err().kind(), ErrorKind::NotScalar { .. }));
    Ok(())
}

/// A window of tokens and the number of the step go in, the next token comes out.
#[test]
fn a_recorded_decode_step_draws_the_same_tokens() -> Result<()> {
    let Some(gpu) = gpu("a_recorded_decode_step_draws_the_same_tokens") else { return Ok(()) };
    let (model, params) = model(&gpu, DType::BF16, 0.0)?;
    let window =
        |first: i64| Tensor::from_slice(&(0..16).map(|i| (first + 3 * i) % 32).collect::<Vec<_>>(), [2, 8], &gpu);
    let config = SamplingConfig { temperature: 2.0, ..SamplingConfig::default() };
    let decode = |inputs: &[Tensor]| {
        let logits = model.net.forward(&inputs[0], &ForwardOptions::default())?.out.select(1, 7)?;
        sample_tokens(&logits, &config, 9, &inputs[1])
    };
    let step = |number: i64| Tensor::scalar(number, &gpu);
    let mut graph = Graph::capture(&[window(0)?, step(0)?], &params, decode)?;
    for number in 0..5 {
        let inputs = [window(number)?, step(number)?];
        let replayed = graph.replay(&inputs)?.to_vec::<i64>()?;
        assert_eq!(replayed, decode(&inputs)?.to_vec::<i64>()?, "step {number}");
    }
    Ok(())
}

/// A cache grows by one graph as it does by calls, with positions of every kind.
#[test]
fn a_recorded_step_of_a_cache_draws_the_same_tokens() -> Result<()> {
    let Some(gpu) = gpu("a_recorded_step_of_a_cache_draws_the_same_tokens") else { return Ok(()) };
    let sampling = SamplingConfig { temperature: 2.0, ..SamplingConfig::default() };
    for (dtype, memory_tokens) in [(DType::F32, 0), (DType::BF16, 3)] {
        let mut config = config(0.0);
        config.net.num_memory_tokens = memory_tokens;
        let store = ParamStore::new(7, dtype, &gpu);
        let (model, params) = (AutoregressiveWrapper::new(&config, &store)?.net, store.params());
        let prompt = tokens(&gpu)?.narrow(1, 0, 6)?.contiguous()?;
        // Rows of two lengths.
        let filled = || {
            let mut cache = model.cache(2, 12, &ForwardOptions::default())?;
            let _ = model.extend(&prompt, &[6, 4], None, &mut cache)?;
            Ok(cache)
        };
        let first = Tensor::from_slice(&[5i64, 9], [2], &gpu)?;

        let (mut cache, mut next, mut expected) = (filled()?, first.clone(), Vec::new());
        for step in 0..6i64 {
            let hidden = model.extend(&next.reshape([2, 1])?, &[1, 1], None, &mut cache)?;
            let logits = model.logits(&hidden.select(1, 0)?)?.detach();
            next = sample_tokens(&logits, &sampling, 3, &Tensor::scalar(step, &gpu)?)?;
            expected.push(next.to_vec::<i64>()?);
        }
        let mut decode = RecordedDecode::new(&model, &params, filled()?, &sampling, 3)?;
        let (mut next, mut drawn) = (first.clone(), Vec::new());
        for step in 0..6 {
            let read_backs = gpu.transfers().read_backs;
            next = decode.step(&next, step)?;
            assert_eq!(gpu.transfers().read_backs, read_backs);
            drawn.push(next.to_vec::<i64>()?);
        }
        assert_eq!(drawn, expected, "{dtype}");
        assert_eq!(decode.cache().lengths(), [12, 10]);
        let full = decode.step(&next, 6).unwrap_err();
        assert!(full.to_string().contains("full"), "{full}");
        // Without the graph it goes on from there.
        let mut cache = decode.into_cache();
        cache.truncate(&[11, 10])?;
        let _ = model.extend(&next.reshape([2, 1])?, &[1, 1], None, &mut cache)?;
        assert_eq!(cache.lengths(), [12, 11]);
        let empty = model.cache(2, 12, &ForwardOptions::default())?;
        assert!(RecordedDecode::new(&model, &params, empty, &sampling, 3).is_err());
    }
    Ok(())
}

#[test]
fn a_recorded_decode_step_gives_the_same_bits() -> Result<()> {
    let Some(gpu) = gpu("a_recorded_decode_step_gives_the_same_bits") else { return Ok(()) };
    let (model, params) = model(&gpu, DType::BF16, 0.0)?;
    let window =
        |first: i64| Tensor::from_slice(&(0..8).map(|i| (first + 3 * i) % 32).collect::<Vec<_>>(), [1, 8], &gpu);
    let decode = |tokens: &Tensor| model.net.forward(tokens, &ForwardOptions::default())?.out.select(1, 7)?.argmax(-1);
    let mut graph = Graph::capture(&[window(0)?], &params, |inputs| decode(&inputs[0]))?;
    for first in 0..5 {
        let replayed = graph.replay(&[window(first)?])?.to_vec::<i64>()?;
        assert_eq!(replayed, decode(&window(first)?)?.to_vec::<i64>()?, "window {first}");
    }
    Ok(())
}

#[test]
fn work_that_a_graph_cannot_record_is_refused() -> Result<()> {
    let Some(gpu) = gpu("work_that_a_graph_cannot_record_is_refused") else { return Ok(()) };
    let x = Tensor::ones([4], DType::F32, &gpu)?;
    let none = ParamMap::default();
    let read = Graph::capture(std::slice::from_ref(&x), &none, |x| x[0].exp()?.item()).unwrap_err();
    assert!(read.to_string().contains("one element"), "{read}");
    let read = Graph::capture(std::slice::from_ref(&x), &none, |x| x[0].sum(&[])?.item()).unwrap_err();
    assert!(read.to_string().contains("read-back"), "{read}");
    let upload = |x: &[Tensor]| x[0].add(&Tensor::from_slice(&[1.0f32], [1], &gpu)?);
    let upload = Graph::capture(std::slice::from_ref(&x), &none, upload).unwrap_err();
    assert!(upload.to_string().contains("upload"), "{upload}");
    let random = |x: &[Tensor]| {
        let _tape = Tape::train(0);
        x[0].dropout(0.5)
    };
    let random = Graph::capture(std::slice::from_ref(&x), &none, random).unwrap_err();
    assert!(random.to_string().contains("dropout"), "{random}");
    let weights = |x: &[Tensor]| {
        let _tape = Tape::train(0);
        let x = x[0].reshape([1, 1, 4, 1])?;
        attention(&x, &x, &x, &AttentionSpec { dropout: 0.5, ..AttentionSpec::default() })
    };
    let random = Graph::capture(std::slice::from_ref(&x), &none, weights).unwrap_err();
    assert!(random.to_string().contains("dropout"), "{random}");
    let here = Graph::capture(&[Tensor::ones([4], DType::F32, &Device::Cpu)?], &none, |x| x[0].exp()).unwrap_err();
    assert!(here.to_string().contains("GPU"), "{here}");
    // A replay adds nothing to a tape, so that gradients would be lost.
    let tape = Tape::grad();
    let taped = Graph::capture(std::slice::from_ref(&x), &none, |x| x[0].exp()).unwrap_err();
    assert!(taped.to_string().contains("tape"), "{taped}");
    drop(tape);

    let store = ParamStore::new(0, DType::F32, &gpu);
    let weight: Param = store.param("weight", [4], Init::Constant(2.0))?;
    let params = store.params();
    let mut graph = Graph::capture(std::slice::from_ref(&x), &params, |x| x[0].mul(&weight.tensor()))?;
    assert_eq!(graph.replay(std::slice::from_ref(&x))?.to_vec::<f32>()?, [2.0; 4]);
    assert!(graph.replay(&[]).is_err() && graph.replay(&[x.narrow(0, 0, 2)?]).is_err());
    weight.set(Tensor::full([4], 3.0, DType::F32, &gpu)?)?;
    let replaced = graph.replay(std::slice::from_ref(&x)).unwrap_err();
    assert!(replaced.to_string().contains("`weight` was replaced"), "{replaced}");
    let replacing = |x: &[Tensor]| weight.set(x[0].mul(&weight.tensor())?);
    let replacing = Graph::capture(std::slice::from_ref(&x), &params, replacing).unwrap_err();
    assert!(replacing.to_string().contains("`weight` was replaced during the recording"), "{replacing}");
    // The device is as usable as before.
    assert_eq!(x.exp()?.ln()?.to_vec::<f32>()?.len(), 4);
    Ok(())
}

#[test]
fn products_of_f32_are_exact_unless_asked_otherwise() -> Result<()> {
    let Some(gpu) = gpu("products_of_f32_are_exact_unless_asked_otherwise") else { return Ok(()) };
    let a = Tensor::generate([64, 128], DType::F64, &gpu, |i| ((i * 37 % 101) as f64 - 50.0) / 64.0)?;
    let b = Tensor::generate([128, 32], DType::F64, &gpu, |i| ((i * 53 % 97) as f64 - 48.0) / 64.0)?;
    let exact = a.matmul(&b)?.to_f64_vec()?;
    let product = || a.to_dtype(DType::F32)?.matmul(&b.to_dtype(DType::F32)?)?.to_f64_vec();
    assert!(close(&product()?, &exact, 1e-6));
    set_float32_matmul_precision(Precision::High);
    let rounded = product();
    set_float32_matmul_precision(Precision::Highest);
    // TF32 has ten bits of mantissa.
    assert!(close(&rounded?, &exact, 1e-3));
    Ok(())
}
