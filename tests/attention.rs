//! Properties of attention that its contract cases do not cover: memory, threads, dropout, special values, bad input.

mod common;
#[path = "attention/dropout.rs"]
mod dropout;

use std::sync::{Mutex, MutexGuard};

use common::device;
use x_transformers::{
    DType, Device, ErrorKind, Philox, Result, Tape, Tensor,
    ops::{AttentionSpec, PositionBias, Window, attention, attention_rung},
};

/// Peak memory is measured for the whole process: tests of this file run one after the other.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn random(shape: &[usize], dtype: DType, stream: u64) -> Tensor {
    let random = Philox::new(5, stream);
    generate(shape, dtype, |i| half::bf16::from_f64(random.normal(i as u64)).to_f64())
}

/// Random values on the device under test.
fn generate(shape: &[usize], dtype: DType, f: impl FnMut(usize) -> f64) -> Tensor {
    Tensor::generate(shape, dtype, &Device::Cpu, f).unwrap().to_device(device()).unwrap()
}

fn bools(shape: &[usize], f: impl FnMut(usize) -> bool) -> Tensor {
    let values: Vec<bool> = (0..shape.iter().product()).map(f).collect();
    Tensor::from_slice(&values, shape, device()).unwrap()
}

/// `[batch, heads, n, width]` as a view of leaves `[batch, n, heads, width]`.
fn operands(batch: usize, heads: usize, [queries, keys]: [usize; 2], width: usize, dtype: DType) -> [Tensor; 3] {
    [(0, queries), (1, keys), (2, keys)]
        .map(|(stream, n)| random(&[batch, n, heads, width], dtype, stream).requires_grad().unwrap())
}

/// Output, and the gradients of queries, keys and values.
fn forward_backward(leaves: &[Tensor; 3], spec: &AttentionSpec, mut tape: Tape) -> Result<[Tensor; 4]> {
    let [q, k, v] = leaves.each_ref().map(|x| x.transpose(1, 2).unwrap());
    let out = attention(&q, &k, &v, spec)?;
    let cotangent = random(out.shape(), out.dtype(), 9);
    let grads = tape.backward_with(&out, &cotangent)?;
    let [dq, dk, dv] = leaves.each_ref().map(|leaf| grads.get(leaf).unwrap().clone());
    Ok([out.detach(), dq, dk, dv])
}

fn bits(tensors: &[Tensor]) -> Vec<u64> {
    tensors.iter().flat_map(|x| x.to_f64_vec().unwrap()).map(f64::to_bits).collect()
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_f64_vec().unwrap(), b.to_f64_vec().unwrap());
    let error: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
    (error / b.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

#[test]
fn attention_memory_is_linear() {
    let _alone = alone();
    let peak = |n: usize, dtype: DType, extended: bool| {
        let leaves = operands(1, 4, [n, n], 32, dtype);
        let sink = extended.then(|| generate(&[4], dtype, |_| 0.5));
        let slopes = extended.then(|| generate(&[4], dtype, |head| 0.1 * head as f64));
        let spec = AttentionSpec {
            scale: 0.2,
            causal: true,
            position_bias: slopes.clone().map(|slopes| PositionBias::SymmetricAlibi { slopes }),
            softclamp: extended.then_some(20.0),
            sink: sink.as_ref(),
            ..AttentionSpec::default()
        };
        let before = device().memory().live;
        device().reset_peak_memory();
        let results = forward_backward(&leaves, &spec, Tape::grad()).unwrap();
        let peak = device().memory().peak - before;
        drop(results);
        assert_eq!(device().memory().live, before, "memory is left over");
        peak
    };
    // Long enough that constant sizes do not matter, and short enough for an emulated GPU.
    let n = if *device() == Device::Cpu { 4096 } else { 1024 };
    for (dtype, extended) in [(DType::F32, false), (DType::BF16, false), (DType::BF16, true)] {
        let (short, long) = (peak(n / 2, dtype, extended), peak(n, dtype, extended));
        assert!((long as f64) < 2.3 * short as f64, "{dtype}: {short} bytes for {} positions, {long} for {n}", n / 2);
        // Storing the scores of all heads would take more.
        assert!(long < 4 * 4 * n * n, "{long} bytes");
    }
}

#[test]
fn attention_saves_no_scores_and_nothing_without_a_tape() {
    let _alone = alone();
    let leaves = operands(1, 2, [512, 512], 16, DType::F32);
    let [q, k, v] = leaves.each_ref().map(|x| x.transpose(1, 2).unwrap());
    let spec = AttentionSpec { dropout: 0.5, ..AttentionSpec::default() };
    let before = device().memory().live;
    let out = attention(&q, &k, &v, &spec).unwrap();
    let without = device().memory().live - before;
    assert_eq!(without, out.numel() * 4);
    drop(out);
    let tape = Tape::train(1);
    let [q, k, v] = leaves.each_ref().map(|x| x.transpose(1, 2).unwrap());
    let out = attention(&q, &k, &v, &spec).unwrap();
    // The output and two numbers per query.
    assert_eq!(device().memory().live - before, out.numel() * 4 + 2 * 512 * 2 * 4);
    drop(tape);
}

#[test]
fn attention_same_bits_on_any_number_of_threads() {
    let _alone = alone();
    let key_mask = bools(&[2, 300], |i| i % 7 != 0);
    let table = random(&[8, 4], DType::F32, 20).requires_grad().unwrap();
    let bias = random(&[300], DType::F32, 21).requires_grad().unwrap();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let leaves = operands(2, 4, [280, 300], 24, DType::F32);
            let spec = AttentionSpec {
                scale: 0.3,
                causal: true,
                key_mask: Some(&key_mask),
                bias: Some(&bias),
                position_bias: Some(PositionBias::T5 {
                    table: table.clone(),
                    scale: 2.0,
                    causal: true,
                    max_distance: 128,
                }),
                dropout: 0.2,
                ..AttentionSpec::default()
            };
            let mut tape = Tape::train(3);
            let [q, k, v] = leaves.each_ref().map(|x| x.transpose(1, 2).unwrap());
            let out = attention(&q, &k, &v, &spec).unwrap();
            let grads = tape.backward_with(&out, &random(out.shape(), DType::F32, 9)).unwrap();
            let leaves = leaves.iter().chain([&table, &bias]);
            let grads: Vec<Tensor> = leaves.map(|leaf| grads.get(leaf).unwrap().clone()).collect();
            [bits(&[out.detach()]), bits(&grads)].concat()
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(3));
}

#[test]
fn attention_dtypes_agree() {
    let _alone = alone();
    let spec = AttentionSpec { scale: 0.125, causal: true, ..AttentionSpec::default() };
    let run = |dtype: DType| {
        let leaves = operands(1, 2, [200, 260], 64, dtype);
        forward_backward(&leaves, &spec, Tape::grad()).unwrap()
    };
    let exact = run(DType::F64);
    for (dtype, allowed) in [(DType::F32, 2e-6), (DType::F16, 2e-3), (DType::BF16, 1.5e-2)] {
        for (actual, exact) in run(dtype).iter().zip(&exact) {
            let error = relative(actual, exact);
            assert!(error < allowed, "{dtype}: relative error {error:.1e}");
        }
    }
}

/// Half types in whole packets run on tensor cores where the card has them; anything else gives a reason.
#[test]
fn attention_rungs() {
    let rung = |dtype, d, e| attention_rung(device(), dtype, d, e);
    if *device() == Device::Cpu {
        return assert_eq!(rung(DType::BF16, 64, 64), None);
    }
    let plain = |dtype, d, e, why: &str| {
        let rung = rung(dtype, d, e).expect("a rung on a GPU");
        assert!(rung.starts_with("plain: ") && rung.contains(why), "{rung}");
    };
    plain(DType::F32, 64, 64, "f32");
    // An older card.
    if rung(DType::BF16, 64, 64).is_some_and(|rung| rung.contains("sm_80")) {
        return plain(DType::F16, 128, 128, "sm_80");
    }
    for (d, e, head) in [(64, 64, "64"), (8, 32, "32"), (72, 128, "128")] {
        let rung = rung(DType::BF16, d, e).expect("a rung on a GPU");
        let warpgroups = rung.starts_with("warpgroup tensor cores") && head != "32";
        assert!((rung.starts_with("tensor cores") || warpgroups) && rung.contains(head), "{rung}");
    }
    plain(DType::BF16, 63, 64, "16 bytes");
    plain(DType::F16, 64, 136, "128 features");
}

/// All fields that a spec may hold, for one call.
struct Extras {
    mask: Tensor,
    query_mask: Tensor,
    key_mask: Tensor,
    bias: Tensor,
    slopes: Tensor,
    table: Tensor,
    /// A curve by distance, and the sinks.
    curve: Tensor,
    sink: Tensor,
}

/// Half types have their own tensor-core kernels on a GPU: compares every part of a spec, forward and backward, with
/// f64 on the CPU. The dropout masks must be the same.
#[test]
fn attention_half_types_follow_f64() {
    let _alone = alone();
    type Spec = for<'a> fn(&'a Extras) -> AttentionSpec<'a>;
    // Batch, heads, key heads, queries, keys, d and e.
    let cases: [(&str, [usize; 7], Spec); 16] = [
        ("causal", [1, 2, 1, 70, 140, 64, 64], |_| AttentionSpec { causal: true, ..AttentionSpec::default() }),
        ("blind queries", [1, 2, 2, 140, 70, 64, 40], |_| AttentionSpec {
            causal: true,
            dropout: 0.3,
            ..AttentionSpec::default()
        }),
        ("padding", [2, 4, 2, 70, 140, 32, 16], |x| AttentionSpec {
            query_mask: Some(&x.query_mask),
            key_mask: Some(&x.key_mask),
            mem_keys: 3,
            ..AttentionSpec::default()
        }),
        ("mask and bias", [1, 2, 2, 70, 140, 16, 24], |x| AttentionSpec {
            mask: Some(&x.mask),
            bias: Some(&x.bias),
            dropout: 0.2,
            ..AttentionSpec::default()
        }),
        ("slopes", [1, 2, 1, 140, 140, 64, 64], |x| AttentionSpec {
            causal: true,
            position_bias: Some(PositionBias::Alibi { slopes: x.slopes.clone() }),
            ..AttentionSpec::default()
        }),
        ("wide heads", [1, 2, 1, 70, 140, 72, 128], |x| AttentionSpec {
            causal: true,
            window: Window::past(90),
            bias: Some(&x.bias),
            dropout: 0.2,
            ..AttentionSpec::default()
        }),
        ("clamp", [1, 2, 1, 140, 140, 64, 64], |_| AttentionSpec {
            softclamp: Some(1.2),
            dropout: 0.2,
            ..AttentionSpec::default()
        }),
        ("clamped wide heads", [1, 2, 1, 70, 140, 128, 72], |x| AttentionSpec {
            causal: true,
            softclamp: Some(1.2),
            bias: Some(&x.bias),
            ..AttentionSpec::default()
        }),
        ("clamped slopes", [2, 2, 2, 70, 140, 24, 32], |x| AttentionSpec {
            softclamp: Some(2.0),
            position_bias: Some(PositionBias::SymmetricAlibi { slopes: x.slopes.clone() }),
            sink: Some(&x.sink),
            ..AttentionSpec::default()
        }),
        // Of these, keys are alike in their first feature.
        ("common clamp", [1, 2, 1, 70, 70, 64, 64], |_| AttentionSpec {
            softclamp: Some(1.5),
            ..AttentionSpec::default()
        }),
        ("common sink", [1, 2, 1, 70, 70, 64, 64], |x| AttentionSpec {
            sink: Some(&x.sink),
            ..AttentionSpec::default()
        }),
        ("sink", [1, 2, 1, 140, 70, 64, 64], |x| AttentionSpec {
            causal: true,
            sink: Some(&x.sink),
            dropout: 0.3,
            ..AttentionSpec::default()
        }),
        ("slopes on both sides", [1, 2, 1, 140, 140, 64, 64], |x| AttentionSpec {
            position_bias: Some(PositionBias::SymmetricAlibi { slopes: x.slopes.clone() }),
            unbiased_keys: 5,
            ..AttentionSpec::default()
        }),
        ("curve", [1, 4, 2, 70, 140, 64, 64], |x| AttentionSpec {
            causal: true,
            key_mask: Some(&x.key_mask),
            position_bias: Some(PositionBias::ByDistance { table: x.curve.clone() }),
            unbiased_keys: 7,
            softclamp: Some(2.0),
            sink: Some(&x.sink),
            dropout: 0.1,
            ..AttentionSpec::default()
        }),
        ("odd keys", [1, 1, 1, 33, 131, 32, 32], |_| AttentionSpec { dropout: 0.5, ..AttentionSpec::default() }),
        ("everything", [2, 4, 2, 70, 140, 64, 64], |x| AttentionSpec {
            causal: true,
            mask: Some(&x.mask),
            query_mask: Some(&x.query_mask),
            key_mask: Some(&x.key_mask),
            mem_keys: 2,
            window: Window::past(90),
            bias: Some(&x.bias),
            position_bias: Some(PositionBias::T5 {
                table: x.table.clone(),
                scale: 1.7,
                causal: false,
                max_distance: 20,
            }),
            dropout: 0.2,
            ..AttentionSpec::default()
        }),
    ];
    for (name, [batch, heads, kv_heads, queries, keys, d, e], spec) in cases {
        let run = |dtype: DType, device: &Device| -> Vec<Tensor> {
            let leaf = |shape: &[usize], stream: u64| {
                let x = random(shape, DType::F64, stream).to_device(device).unwrap().to_dtype(dtype).unwrap();
                x.detach().requires_grad().unwrap()
            };
            let keys_alike = || {
                let x = random(&[batch, keys, kv_heads, d], DType::F64, 1);
                let common = Tensor::generate([d], DType::F64, x.device(), |f| if f == 0 { 6.0 } else { 0.0 }).unwrap();
                x.add(&common).unwrap().to_device(device).unwrap().to_dtype(dtype).unwrap()
            };
            let bools = |shape: &[usize], every: usize| bools(shape, |i| i % every != 0).to_device(device).unwrap();
            let leaves = [
                leaf(&[batch, queries, heads, d], 0),
                if name.starts_with("common") {
                    keys_alike().detach().requires_grad().unwrap()
                } else {
                    leaf(&[batch, keys, kv_heads, d], 1)
                },
                leaf(&[batch, keys, kv_heads, e], 2),
            ];
            let extras = Extras {
                mask: bools(&[queries, keys], 5),
                query_mask: bools(&[batch, queries], 7),
                key_mask: bools(&[batch, keys], 3),
                bias: leaf(&[heads, queries, keys], 3),
                slopes: leaf(&[heads], 4),
                table: leaf(&[9, heads], 5),
                curve: leaf(&[queries + keys - 8, heads], 6),
                sink: leaf(&[heads], 7),
            };
            let spec = AttentionSpec { scale: (d as f64).powf(-0.5), ..spec(&extras) };
            let mut tape = Tape::train(3);
            let [q, k, v] = leaves.each_ref().map(|x| x.transpose(1, 2).unwrap());
            let out = attention(&q, &k, &v, &spec).unwrap();
            let cotangent = random(out.shape(), DType::F64, 9).to_device(device).unwrap().to_dtype(dtype).unwrap();
            let grads = tape.backward_with(&out, &cotangent).unwrap();
            let more = [&extras.bias, &extras.slopes, &extras.table, &extras.curve, &extras.sink];
            let grads = leaves.iter().chain(more).filter_map(|leaf| grads.get(leaf).cloned());
            [out.detach()].into_iter().chain(grads).collect()
        };
        let exact = run(DType::F64, &Device::Cpu);
        for (dtype, allowed) in [(DType::F16, 3e-3), (DType::BF16, 2e-2)] {
            let actual = run(dtype, device());
            assert_eq!(actual.len(), exact.len());
            for (index, (actual, exact)) in actual.iter().zip(&exact).enumerate() {
                let error = relative(actual, exact);
                assert!(error < allowed, "{name}: {dtype}: result {index}: relative error {error:.1e}");
            }
        }
    }
}

/// The output is laid out for merging the heads, and the gradients for splitting them: neither copies.
#[test]
fn attention_layouts_need_no_copies() {
    let _alone = alone();
    let leaves = operands(2, 3, [5, 5], 4, DType::F32);
    let [q, k, v] = leaves.each_ref().map(|x| x.transpose(1, 2).unwrap());
    let out = attention(&q, &k, &v, &AttentionSpec::default()).unwrap();
    let merged = out.transpose(1, 2).unwrap().reshape([2, 5, 12]).unwrap();
    assert!(merged.shares_storage(&out) && merged.is_contiguous());
    let [_, dq, dk, dv] = forward_backward(&leaves, &AttentionSpec::default(), Tape::grad()).unwrap();
    assert!([dq, dk, dv].iter().all(Tensor::is_contiguous));
}

#[test]
fn attention_is_never_nan() {
    let _alone = alone();
    for dtype in [DType::F32, DType::BF16] {
        never_nan(dtype);
    }
}

fn never_nan(dtype: DType) {
    let leaves = operands(1, 2, [70, 140], 8, dtype);
    let blind = bools(&[70, 1], |i| i % 3 != 0);
    let lowest = Tensor::full([140], dtype.lowest(), dtype, device()).unwrap();
    let infinite = generate(&[70, 140], dtype, |i| if i / 140 < 10 { f64::NEG_INFINITY } else { 0.0 });
    let specs = [
        AttentionSpec { scale: 1e4, causal: true, mask: Some(&blind), ..AttentionSpec::default() },
        AttentionSpec { scale: 1e-30, window: Window::past(0), ..AttentionSpec::default() },
        AttentionSpec { bias: Some(&lowest), ..AttentionSpec::default() },
        AttentionSpec { bias: Some(&infinite), ..AttentionSpec::default() },
    ];
    for spec in &specs {
        for result in forward_backward(&leaves, spec, Tape::grad()).unwrap() {
            assert!(result.to_f64_vec().unwrap().iter().all(|x| x.is_finite()));
        }
    }
}

/// A constant added to all scores of a query changes nothing, so it has no gradient.
#[test]
fn attention_bias_of_a_whole_row_has_no_gradient() {
    let _alone = alone();
    for shape in [&[70, 1][..], &[][..], &[2, 1, 1]] {
        let bias = random(shape, DType::F32, 3).requires_grad().unwrap();
        let [q, k, v] = operands(1, 2, [70, 140], 8, DType::F32).map(|x| x.transpose(1, 2).unwrap());
        let mut tape = Tape::grad();
        let spec = AttentionSpec { causal: true, bias: Some(&bias), ..AttentionSpec::default() };
        let out = attention(&q, &k, &v, &spec).unwrap();
        let grads = tape.backward_with(&out, &random(out.shape(), DType::F32, 9)).unwrap();
        let grad = grads.get(&bias).unwrap();
        assert_eq!(grad.shape(), bias.shape());
        assert!(grad.to_f64_vec().unwrap().iter().all(|g| g.abs() < 1e-4));
    }
}

/// A sink takes weight from the values: with a score that all keys exceed by far it changes nothing, and with one far
/// above them it takes everything. A query without keys gives 0 with a sink, and so do its gradients.
#[test]
fn attention_sinks_take_weight() {
    let _alone = alone();
    let leaves = operands(1, 2, [150, 70], 8, DType::F64);
    let run = |sink: Option<f64>, causal: bool| {
        let sink = sink.map(|sink| generate(&[2], DType::F64, |_| sink));
        forward_backward(
            &leaves,
            &AttentionSpec { causal, sink: sink.as_ref(), ..AttentionSpec::default() },
            Tape::grad(),
        )
        .unwrap()
    };
    let (without, low, high) = (run(None, false), run(Some(-1e4), false), run(Some(1e4), false));
    for (without, low) in without.iter().zip(&low) {
        assert!(relative(low, without) < 1e-12);
    }
    assert!(high.iter().all(|x| x.to_f64_vec().unwrap().iter().all(|&x| x == 0.0)));
    // The first 80 queries see no key.
    let blind = run(Some(0.5), true)[0].narrow(2, 0, 80).unwrap().to_f64_vec().unwrap();
    assert!(blind.iter().all(|&x| x == 0.0));
    assert!(run(None, true)[0].narrow(2, 0, 80).unwrap().to_f64_vec().unwrap().iter().any(|&x| x != 0.0));
}

/// Scores are clamped whatever their size, masked ones excepted, and a bias of −∞ is no mask then.
#[test]
fn attention_clamps_every_score() {
    let _alone = alone();
    let (queries, keys) = (3, 70);
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        let [q, k, v] = [(queries, 0, 1e3), (keys, 1, 1e2), (keys, 2, 1.0)].map(|(n, stream, factor)| {
            let x = random(&[1, 1, n, 16], DType::F64, stream).affine(factor, 0.0).unwrap();
            x.to_dtype(dtype).unwrap().detach().requires_grad().unwrap()
        });
        let bias = generate(&[1, keys], dtype, |key| if key < 40 { f64::NEG_INFINITY } else { 0.0 });
        let mask = bools(&[queries, keys], |at| at % keys < 60);
        let spec =
            AttentionSpec { softclamp: Some(3.0), mask: Some(&mask), bias: Some(&bias), ..AttentionSpec::default() };
        let mut tape = Tape::grad();
        let out = attention(&q, &k, &v, &spec).unwrap();
        let grads = tape.backward_with(&out, &random(out.shape(), dtype, 5)).unwrap();
        for x in [&out, grads.get(&q).unwrap(), grads.get(&k).unwrap(), grads.get(&v).unwrap()] {
            assert!(x.to_f64_vec().unwrap().iter().all(|x| x.is_finite()), "{dtype}");
        }
        // The keys with a bias of −∞ have scores of −3: a share, if a small one. Masked keys have none.
        let dv = |first: usize, n: usize| grads.get(&v).unwrap().narrow(2, first, n).unwrap().to_f64_vec().unwrap();
        assert!(dv(0, 40).iter().all(|&x| x != 0.0) && dv(60, 10).iter().all(|&x| x == 0.0), "{dtype}");
    }
}

/// Distant positions cost no digits: the bias is counted from the query.
#[test]
fn attention_alibi_is_exact_far_away() {
    let _alone = alone();
    let (n, slopes) = (3000, Tensor::from_slice(&[0.5f64, 0.03], [2], device()).unwrap());
    let run = |dtype: DType| {
        let slopes = slopes.to_dtype(dtype).unwrap();
        let position_bias = Some(PositionBias::Alibi { slopes: slopes.clone() });
        let spec = AttentionSpec { scale: 0.25, causal: true, position_bias, ..AttentionSpec::default() };
        let [q, k, v] = operands(1, 2, [4, n], 16, dtype).map(|x| x.transpose(1, 2).unwrap());
        attention(&q, &k, &v, &spec).unwrap()
    };
    let error = relative(&run(DType::F32), &run(DType::F64));
    assert!(error < 1e-6, "relative error {error:.1e}");
}

/// Weights of a position bias may have another float type than the queries: slopes keep their digits in half precision.
#[test]
fn attention_position_weights_keep_their_dtype() {
    let _alone = alone();
    let slopes = Tensor::from_slice(&[0.7f32, 0.1], [2], device()).unwrap().requires_grad().unwrap();
    let [q, k, v] = operands(1, 2, [5, 9], 4, DType::BF16).map(|x| x.transpose(1, 2).unwrap());
    let position_bias = Some(PositionBias::Alibi { slopes: slopes.clone() });
    let mut tape = Tape::grad();
    let out = attention(&q, &k, &v, &AttentionSpec { position_bias, ..AttentionSpec::default() }).unwrap();
    let grads = tape.backward_with(&out, &random(out.shape(), DType::BF16, 9)).unwrap();
    let grad = grads.get(&slopes).unwrap();
    assert_eq!((grad.dtype(), &grad.shape()[..]), (DType::F32, &[2][..]));
    assert!(grad.to_f64_vec().unwrap().iter().all(|g| g.abs() > 1e-6));
}

/// Computes only the requested gradients, which do not depend on what else is requested.
#[test]
fn attention_single_gradients() {
    let _alone = alone();
    let leaves = operands(1, 2, [70, 140], 8, DType::F32);
    let spec = AttentionSpec { causal: true, ..AttentionSpec::default() };
    let all = forward_backward(&leaves, &spec, Tape::grad()).unwrap();
    for wanted in 0..3 {
        let mut tape = Tape::grad();
        let views: Vec<Tensor> = leaves
            .iter()
            .enumerate()
            .map(|(i, x)| if i == wanted { x.clone() } else { x.detach() })
            .map(|x| x.transpose(1, 2).unwrap())
            .collect();
        let out = attention(&views[0], &views[1], &views[2], &spec).unwrap();
        let grads = tape.backward_with(&out, &random(out.shape(), DType::F32, 9)).unwrap();
        assert_eq!(grads.len(), 1);
        assert_eq!(bits(&[grads.get(&leaves[wanted]).unwrap().clone()]), bits(&all[wanted + 1..wanted + 2]));
    }
}

#[test]
fn attention_errors_name_what_is_wrong() {
    let _alone = alone();
    let [q, k, v] = [[2, 4, 5, 8], [2, 2, 7, 8], [2, 2, 7, 3]].map(|shape| random(&shape, DType::F32, 0));
    let with = |spec: &AttentionSpec| attention(&q, &k, &v, spec);
    let plain = AttentionSpec::default();
    let text = |result: Result<Tensor>, parts: &[&str]| {
        let error = result.expect_err("an error");
        let message = error.to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{message} lacks one of {parts:?}");
        error
    };
    let float = |shape: &[usize]| random(shape, DType::F32, 0);

    let error = text(attention(&q.select(0, 0).unwrap(), &k, &v, &plain), &["four dimensions", "[4, 5, 8]"]);
    assert!(matches!(error.kind(), ErrorKind::Shape { .. }));
    text(attention(&q, &float(&[2, 2, 7, 9]), &v, &plain), &["[2, 2, 7, 9]", "[2, 4, 5, 8]"]);
    text(attention(&q, &k, &float(&[2, 2, 6, 3]), &plain), &["[2, 2, 7, 8]", "[2, 2, 6, 3]"]);
    text(attention(&q, &float(&[1, 2, 7, 8]), &float(&[1, 2, 7, 3]), &plain), &["[1, 2, 7, 8]"]);
    text(attention(&q, &float(&[2, 3, 7, 8]), &float(&[2, 3, 7, 3]), &plain), &["q (4)", "k and v (3)"]);
    text(attention(&q, &float(&[2, 0, 7, 8]), &float(&[2, 0, 7, 3]), &plain), &["q (4)", "k and v (0)"]);
    let error = text(attention(&q, &k.to_dtype(DType::BF16).unwrap(), &v, &plain), &["f32", "bf16"]);
    assert!(matches!(error.kind(), ErrorKind::DType { .. }));
    let int = Tensor::zeros([1, 1, 1, 1], DType::I64, device()).unwrap();
    text(attention(&int, &int, &int, &plain), &["i64", "float"]);

    let mask = bools(&[5, 6], |_| true);
    text(with(&AttentionSpec { mask: Some(&mask), ..plain.clone() }), &["mask [5, 6]", "[2, 4, 5, 7]"]);
    let large = bools(&[3, 2, 4, 5, 7], |_| true);
    text(with(&AttentionSpec { mask: Some(&large), ..plain.clone() }), &["[3, 2, 4, 5, 7]", "[2, 4, 5, 7]"]);
    text(with(&AttentionSpec { mask: Some(&float(&[5, 7])), ..plain.clone() }), &["mask of bool", "got f32"]);
    text(with(&AttentionSpec { query_mask: Some(&mask), ..plain.clone() }), &["query_mask", "[5, 6]", "[2, 5]"]);
    text(with(&AttentionSpec { key_mask: Some(&mask), ..plain.clone() }), &["key_mask", "[5, 6]", "[2, 7]"]);
    text(with(&AttentionSpec { mem_keys: 8, ..plain.clone() }), &["mem_keys is 8", "7 keys"]);
    text(with(&AttentionSpec { bias: Some(&float(&[5, 6])), ..plain.clone() }), &["bias [5, 6]", "[2, 4, 5, 7]"]);
    let half = random(&[5, 7], DType::F16, 0);
    text(with(&AttentionSpec { bias: Some(&half), ..plain.clone() }), &["f32", "f16"]);
    text(with(&AttentionSpec { dropout: 1.5, ..plain.clone() }), &["dropout", "got 1.5"]);
    text(with(&AttentionSpec { dropout: f64::NAN, ..plain.clone() }), &["dropout", "got NaN"]);
    text(with(&AttentionSpec { scale: f64::INFINITY, ..plain.clone() }), &["scale", "got inf"]);

    let alibi = |slopes: &Tensor| {
        let position_bias = Some(PositionBias::Alibi { slopes: slopes.clone() });
        with(&AttentionSpec { position_bias, ..AttentionSpec::default() })
    };
    text(alibi(&float(&[3])), &["slopes", "[3]", "[4]"]);
    text(alibi(&mask), &["slopes", "bool"]);
    let t5 = |table: &Tensor, causal, max_distance| {
        let position_bias = Some(PositionBias::T5 { table: table.clone(), scale: 1.0, causal, max_distance });
        with(&AttentionSpec { position_bias, ..AttentionSpec::default() })
    };
    text(t5(&float(&[32, 3]), true, 128), &["table", "[32, 3]", "[32, 4]"]);
    text(t5(&float(&[]), true, 128), &["table", "[]"]);
    text(t5(&float(&[3, 4]), false, 128), &["3 buckets", "at least 4"]);
    text(t5(&float(&[32, 4]), true, 16), &["max_distance 16", "above 16"]);
    let curve = |table: &Tensor, unbiased_keys| {
        let position_bias = Some(PositionBias::ByDistance { table: table.clone() });
        with(&AttentionSpec { position_bias, unbiased_keys, ..AttentionSpec::default() })
    };
    text(curve(&float(&[12, 4]), 0), &["table", "[12, 4]", "[11, 4]"]);
    text(curve(&float(&[11, 4]), 2), &["table", "[11, 4]", "[9, 4]"]);
    text(curve(&float(&[11, 4]), 8), &["unbiased_keys is 8", "7 keys"]);
    text(with(&AttentionSpec { softclamp: Some(0.0), ..plain.clone() }), &["softclamp", "got 0"]);
    text(with(&AttentionSpec { softclamp: Some(f64::NAN), ..plain.clone() }), &["softclamp", "got NaN"]);
    text(with(&AttentionSpec { sink: Some(&float(&[3])), ..plain.clone() }), &["sink", "[3]", "[4]"]);
    text(with(&AttentionSpec { sink: Some(&mask), ..plain.clone() }), &["sink", "bool"]);
}
