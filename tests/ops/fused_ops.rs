//! Properties of the fused ops beyond single cases: the same bits for any number of threads, sums over the whole equal
//! to the sums over its parts, tensors in use that stay unchanged, and extreme values.

use crate::common::device;
use x_transformers::{DType, Philox, Result, Tape, Tensor, ops::Activation};

fn random(shape: &[usize], dtype: DType, stream: u64) -> Result<Tensor> {
    let random = Philox::new(17, stream);
    Tensor::generate(shape, dtype, device(), |i| random.normal(i as u64))
}

fn tokens(shape: &[usize], limit: u64) -> Result<Tensor> {
    let random = Philox::new(18, 0);
    Tensor::generate(shape, DType::I64, device(), |i| random.below(i as u64, limit) as f64)
}

type Op = fn(&[Tensor]) -> Result<Tensor>;

/// Output and gradients of an op.
fn run(op: Op, inputs: &[Tensor]) -> Result<Vec<Vec<f64>>> {
    let leaves: Vec<Tensor> = inputs
        .iter()
        .map(|x| if x.dtype().is_float() { x.requires_grad() } else { Ok(x.clone()) })
        .collect::<Result<_>>()?;
    let mut tape = Tape::train(4);
    let y = op(&leaves)?;
    let grads = tape.backward_with(&y, &random(y.shape(), y.dtype(), 9)?)?;
    let mut all = vec![y.to_f64_vec()?];
    for leaf in leaves.iter().filter(|leaf| leaf.dtype().is_float()) {
        all.push(grads.get(leaf).expect("a gradient").to_f64_vec()?);
    }
    Ok(all)
}

#[test]
fn same_bits_for_any_number_of_threads() -> Result<()> {
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        let x = random(&[3, 211, 74], dtype, 0)?;
        let (weight, bias, one) = (random(&[74], dtype, 1)?, random(&[74], dtype, 2)?, random(&[1], dtype, 3)?);
        let ops: [(&str, Op, Vec<Tensor>); 9] = [
            ("layer_norm", |x| x[0].layer_norm(Some(&x[1]), Some(&x[2]), 1e-5), vec![x.clone(), weight.clone(), bias]),
            ("clamped_rms_norm", |x| x[0].clamped_rms_norm(&x[1], 1e-8), vec![x.clone(), weight.clone()]),
            ("rms_norm", |x| x[0].rms_norm(&x[1], 1e-6), vec![x.clone(), weight]),
            ("scale_norm", |x| x[0].scale_norm(&x[1], 1e-5), vec![x.clone(), one]),
            ("cross_entropy", |x| x[0].cross_entropy(&x[1], 5), vec![x.clone(), tokens(&[3, 211], 74)?]),
            ("embedding", |x| x[0].embedding(&x[1]), vec![random(&[97, 74], dtype, 5)?, tokens(&[3, 211], 97)?]),
            ("glu", |x| x[0].glu(Activation::Gelu), vec![x.clone()]),
            ("rotary", |x| x[0].rotary(&Tensor::full([16], 0.1, DType::F64, device())?, 3), vec![x.clone()]),
            ("dropout", |x| x[0].dropout(0.2), vec![x.clone()]),
        ];
        for (name, op, inputs) in ops {
            let on = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
                pool.install(|| run(op, &inputs))
            };
            let one = on(1)?;
            for threads in [2, 5] {
                assert!(on(threads)? == one, "{name} {dtype}: other bits with {threads} threads");
            }
        }
    }
    Ok(())
}

/// Sums over rows are made of blocks: the gradient of a weight is that of the parts, added up.
#[test]
fn weight_gradients_add_up_over_parts() -> Result<()> {
    const ROWS: usize = 1500;
    const PART: usize = 30;
    let x = random(&[ROWS, 37], DType::F64, 0)?;
    let (weight, bias, one) =
        (random(&[37], DType::F64, 1)?, random(&[37], DType::F64, 2)?, random(&[1], DType::F64, 3)?);
    let ops: [(Op, Vec<&Tensor>); 4] = [
        (|x| x[0].layer_norm(Some(&x[1]), Some(&x[2]), 1e-5), vec![&weight, &bias]),
        (|x| x[0].clamped_rms_norm(&x[1], 1e-8), vec![&weight]),
        (|x| x[0].rms_norm(&x[1], 1e-6), vec![&weight]),
        (|x| x[0].scale_norm(&x[1], 1e-5), vec![&one]),
    ];
    let cotangent = random(&[ROWS, 37], DType::F64, 7)?;
    for (op, weights) in ops {
        let gradients = |start: usize, rows: usize| -> Result<Vec<Vec<f64>>> {
            let mut inputs = vec![x.narrow(0, start, rows)?];
            for weight in &weights {
                inputs.push(weight.requires_grad()?);
            }
            let mut tape = Tape::grad();
            let y = op(&inputs)?;
            let grads = tape.backward_with(&y, &cotangent.narrow(0, start, rows)?)?;
            inputs[1..].iter().map(|weight| grads.get(weight).expect("a gradient").to_f64_vec()).collect()
        };
        let mut sums: Vec<Vec<f64>> = weights.iter().map(|weight| vec![0.0; weight.numel()]).collect();
        for start in (0..ROWS).step_by(PART) {
            for (sum, part) in sums.iter_mut().zip(gradients(start, PART)?) {
                sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
        }
        for (whole, sum) in gradients(0, ROWS)?.iter().zip(&sums) {
            for (a, b) in whole.iter().zip(sum) {
                assert!((a - b).abs() < 1e-10, "{a} is not {b}");
            }
        }
    }
    Ok(())
}

/// A gradient may reuse memory that is no longer used, but never a tensor that somebody still holds.
#[test]
fn backward_does_not_change_held_tensors() -> Result<()> {
    let x = random(&[5, 8], DType::F32, 0)?.requires_grad()?;
    let g = random(&[8], DType::F32, 1)?;
    let targets = tokens(&[5], 4)?;
    let mut tape = Tape::train(1);
    let normed = x.clamped_rms_norm(&g, 1e-8)?;
    let gated = normed.glu(Activation::Gelu)?;
    let turned = gated.rotary(&Tensor::ones([2], DType::F64, device())?, 0)?;
    let dropped = turned.dropout(0.1)?;
    let loss = dropped.cross_entropy(&targets, -100)?;
    let held = [&x, &normed, &gated, &turned, &dropped];
    let before: Vec<_> = held.iter().map(|tensor| tensor.to_f64_vec()).collect::<Result<_>>()?;
    let with_handles = tape.backward(&loss)?.get(&x).expect("a gradient").to_f64_vec()?;
    for (tensor, before) in held.iter().zip(before) {
        assert_eq!(tensor.to_f64_vec()?, before);
    }
    // The same chain with nothing held gives the same gradient.
    let mut tape = Tape::train(1);
    let loss = x
        .clamped_rms_norm(&g, 1e-8)?
        .glu(Activation::Gelu)?
        .rotary(&Tensor::ones([2], DType::F64, device())?, 0)?
        .dropout(0.1)?
        .cross_entropy(&targets, -100)?;
    assert_eq!(tape.backward(&loss)?.get(&x).expect("a gradient").to_f64_vec()?, with_handles);
    // A cotangent that the caller keeps.
    let mut tape = Tape::grad();
    let y = x.clamped_rms_norm(&g, 1e-8)?;
    let cotangent = random(&[5, 8], DType::F32, 3)?;
    let kept = cotangent.to_f64_vec()?;
    let _ = tape.backward_with(&y, &cotangent)?;
    assert_eq!(cotangent.to_f64_vec()?, kept);
    Ok(())
}

/// Output and gradient of an op of one input.
fn edge(x: &[f32], op: impl Fn(&Tensor) -> Result<Tensor>) -> Result<(Vec<f64>, Vec<f64>)> {
    let x = Tensor::from_slice(x, [1, x.len()], device())?.requires_grad()?;
    let mut tape = Tape::grad();
    let y = op(&x)?;
    let grads = tape.backward_with(&y, &Tensor::ones(*y.shape(), y.dtype(), device())?)?;
    Ok((y.to_f64_vec()?, grads.get(&x).expect("a gradient").to_f64_vec()?))
}

#[test]
fn classes_ruled_out_by_infinity() -> Result<()> {
    let target = Tensor::from_slice(&[1i64], [1], device())?;
    let (loss, grad) = edge(&[0.0, 0.0, f32::NEG_INFINITY], |x| x.cross_entropy(&target, -100))?;
    assert!((loss[0] - std::f64::consts::LN_2).abs() < 1e-7);
    assert_eq!(grad, [0.5, -0.5, 0.0]);
    // The loss of a class that is ruled out is infinite, not NaN.
    assert_eq!(edge(&[0.0, f32::NEG_INFINITY], |x| x.cross_entropy(&target, -100))?.0, [f64::INFINITY]);
    for bad in [[f32::NAN, 0.0], [0.0, f32::NAN], [f32::INFINITY, 0.0]] {
        assert!(edge(&bad, |x| x.cross_entropy(&target, -100))?.0[0].is_nan(), "{bad:?} must not pass unseen");
    }
    Ok(())
}

/// The CPU goes through the classes of a row in blocks of 1024.
#[test]
fn classes_ruled_out_in_a_long_row() -> Result<()> {
    const CLASSES: usize = 5000;
    let target = Tensor::from_slice(&[4321i64], [1], device())?;
    let loss = |x: &[f32]| edge(x, |x| x.cross_entropy(&target, -100));
    // A maximum that grows in every block, at first among classes that are ruled out.
    let mut rising: Vec<f32> =
        (0..CLASSES).map(|i| if i < 1500 { f32::NEG_INFINITY } else { i as f32 * 0.02 }).collect();
    let max = 0.02 * (CLASSES - 1) as f64;
    let sum: f64 = rising.iter().map(|&x| (x as f64 - max).exp()).sum();
    let (value, grad) = loss(&rising)?;
    assert!((value[0] - (max + sum.ln() - rising[4321] as f64)).abs() < 1e-4, "{value:?}");
    assert!(grad[..1500].iter().all(|g| *g == 0.0) && (grad[4999] - 1.0 / sum).abs() < 1e-6);
    assert!(loss(&[f32::NEG_INFINITY; CLASSES])?.0[0].is_nan());
    for place in [0, 1023, 1024, 2100, 4096, 4999] {
        for bad in [f32::NAN, f32::INFINITY] {
            let good = std::mem::replace(&mut rising[place], bad);
            assert!(loss(&rising)?.0[0].is_nan(), "{bad} at {place} must not pass unseen");
            rising[place] = good;
        }
    }
    Ok(())
}

#[test]
fn loss_of_large_logits_is_exact() -> Result<()> {
    let target = Tensor::from_slice(&[0i64], [1], device())?;
    // A log-sum-exp rounded to f32 would lose everything after the third digit.
    let (loss, grad) = edge(&[1e4, 1e4 + 0.5], |x| x.cross_entropy(&target, -100))?;
    assert!((loss[0] - (0.5 + (1.0 + (-0.5f64).exp()).ln())).abs() < 1e-7, "{loss:?}");
    assert!((grad[1] - 1.0 / (1.0 + (-0.5f64).exp())).abs() < 1e-7, "{grad:?}");
    Ok(())
}

#[test]
fn zero_rows_have_finite_norms() -> Result<()> {
    let g = Tensor::from_slice(&[2.0f32], [1], device())?;
    let (y, grad) = edge(&[0.0; 4], |x| x.scale_norm(&g, 0.5))?;
    assert_eq!((y, grad), (vec![0.0; 4], vec![4.0; 4]));
    let (y, grad) = edge(&[0.0; 4], |x| x.layer_norm(None, None, 1e-5))?;
    assert_eq!((y, grad), (vec![0.0; 4], vec![0.0; 4]));
    assert!(edge(&[0.0, f32::NAN], |x| x.scale_norm(&g, 0.5))?.0.iter().all(|y| y.is_nan()));
    Ok(())
}

#[test]
fn variance_far_from_zero() -> Result<()> {
    // The mean of squares minus the square of the mean would have no correct digit here.
    let (y, _) = edge(&[1e4, 1e4 + 1.0, 1e4 + 2.0, 1e4 + 3.0], |x| x.layer_norm(None, None, 0.0))?;
    for (y, deviation) in y.iter().zip([-1.5, -0.5, 0.5, 1.5]) {
        assert!((y - deviation / 1.25f64.sqrt()).abs() < 1e-6, "{y}");
    }
    Ok(())
}

/// A key that is rotated on its own, as with a cache, has the same bits as within a sequence.
#[test]
fn rotation_depends_only_on_the_position() -> Result<()> {
    let frequencies = Tensor::generate([8], DType::F32, device(), |k| 10000f64.powf(k as f64 / -8.0))?;
    let x = random(&[1, 300, 20], DType::F32, 0)?;
    let whole = x.rotary(&frequencies, 7)?;
    for position in [0, 1, 56, 57, 299] {
        let alone = x.narrow(1, position, 1)?.rotary(&frequencies, 7 + position)?;
        assert_eq!(alone.to_f64_vec()?, whole.narrow(1, position, 1)?.to_f64_vec()?);
    }
    Ok(())
}

/// The rows of a tensor in every float type.
fn in_every_type(row: &[f64]) -> Result<Vec<Tensor>> {
    let x = Tensor::from_slice(row, [1, row.len()], device())?;
    [DType::F32, DType::F64, DType::BF16, DType::F16].iter().map(|&dtype| x.to_dtype(dtype)).collect()
}

/// Zeros of different sign tie, NaN is the largest number, and an infinity is an ordinary number.
#[test]
fn the_largest_of_special_values() -> Result<()> {
    let (nan, infinity) = (f64::NAN, f64::INFINITY);
    for (row, k, expected) in [
        ([0.0, -0.0, -1.0, 1.0], 2, [true, true, false, true]),
        ([-0.0, 0.0, -1.0, -2.0], 1, [true, true, false, false]),
        ([nan, infinity, 1.0, -infinity], 1, [true, false, false, false]),
        ([nan, infinity, -nan, -infinity], 3, [true, true, true, false]),
        ([nan, nan, -nan, -infinity], 1, [true, true, true, false]),
        ([-infinity, -infinity, 2.0, -infinity], 2, [true; 4]),
    ] {
        for x in in_every_type(&row)? {
            assert_eq!(x.top_k_mask(k)?.to_vec::<bool>()?, expected, "{row:?} {k} {}", x.dtype());
        }
    }
    Ok(())
}

/// A row without a finite maximum has no entmax; entries ruled out by an infinity have a weight of zero.
#[test]
fn entmax_of_special_values() -> Result<()> {
    let (nan, infinity) = (f64::NAN, f64::INFINITY);
    for row in [[nan, 1.0, 2.0], [1.0, nan, 2.0], [1.0, 2.0, nan], [1.0, infinity, 2.0], [-infinity; 3]] {
        for x in in_every_type(&row)? {
            let y = x.entmax15()?.to_f64_vec()?;
            assert!(y.iter().all(|y| y.is_nan()), "{row:?} {}: {y:?}", x.dtype());
        }
    }
    for x in in_every_type(&[3.0, -infinity, 3.0])? {
        let y = x.entmax15()?.to_f64_vec()?;
        // A square root and its square, each rounded.
        let half = |y: f64| (y - 0.5).abs() < 1e-6;
        assert!(half(y[0]) && y[1] == 0.0 && half(y[2]), "{}: {y:?}", x.dtype());
    }
    Ok(())
}

/// Shifts by any number of positions, including the most negative one, whose negation overflows.
#[test]
fn tokens_move_by_any_amount() -> Result<()> {
    let x = random(&[2, 3, 2], DType::F32, 0)?.requires_grad()?;
    let mut tape = Tape::grad();
    let y = x.shift_tokens(&[isize::MIN, isize::MAX], None)?;
    assert_eq!(y.to_f64_vec()?, [0.0; 12]);
    let grads = tape.backward(&y.sum(&[])?)?;
    assert_eq!(grads.get(&x).expect("a gradient").to_f64_vec()?, [0.0; 12]);
    Ok(())
}
