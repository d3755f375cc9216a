//! Dropout masks: their statistics, their reuse in the backward pass, and their independence of layout and threads.

use crate::common::device;
use x_transformers::{DType, Philox, Result, Tape, Tensor, checkpoint};

/// Returns the output of dropout on ones under a training tape, and the gradient of its sum.
fn masks(shape: &[usize], p: f64, dtype: DType, seed: u64) -> Result<(Vec<f64>, Vec<f64>)> {
    let x = Tensor::ones(shape, dtype, device())?.requires_grad()?;
    let mut tape = Tape::train(seed);
    let y = x.dropout(p)?;
    let grads = tape.backward_with(&y, &Tensor::ones(shape, dtype, device())?)?;
    Ok((y.to_f64_vec()?, grads.get(&x).expect("a gradient").to_f64_vec()?))
}

#[test]
fn backward_draws_the_mask_of_forward() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        for shape in [&[1][..], &[63], &[65], &[3, 37], &[2, 123, 517]] {
            let (forward, backward) = masks(shape, 0.3, dtype, 5)?;
            assert_eq!(forward, backward, "{dtype} {shape:?}");
        }
    }
    Ok(())
}

#[test]
fn statistics() -> Result<()> {
    let n = 200_000;
    for p in [0.1, 0.5, 0.9] {
        let (y, _) = masks(&[n], p, DType::F64, 1)?;
        let kept = y.iter().filter(|&&y| y != 0.0).count() as f64;
        // Five standard deviations of the binomial distribution.
        let bound = 5.0 * (n as f64 * p * (1.0 - p)).sqrt();
        assert!((kept - n as f64 * (1.0 - p)).abs() < bound, "p = {p}: {kept} of {n} kept");
        assert!(y.iter().all(|&y| y == 0.0 || y == 1.0 / (1.0 - p)), "kept elements are divided by 1 - p");
        // Neighbours at any small distance are independent.
        for distance in [1, 2, 3, 4, 7, 64] {
            let both = y.iter().zip(&y[distance..]).filter(|&(&a, &b)| a != 0.0 && b != 0.0).count() as f64;
            let q = (1.0 - p) * (1.0 - p);
            let bound = 5.0 * (2.0 * n as f64 * q).sqrt();
            assert!((both - n as f64 * q).abs() < bound, "p = {p}: {both} pairs at distance {distance}");
        }
    }
    Ok(())
}

#[test]
fn masks_follow_the_random_stream() -> Result<()> {
    let (y, _) = masks(&[1000], 0.25, DType::F32, 9)?;
    let (random, threshold) = (Philox::new(9, 1), Philox::drop_threshold(0.25));
    for (i, y) in y.iter().enumerate() {
        assert_eq!(*y != 0.0, random.keeps(i as u64, threshold), "element {i}");
    }
    Ok(())
}

/// A product with 0 would leave NaN.
#[test]
fn dropped_elements_are_zero_whatever_they_were() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        for broken in [f64::NAN, f64::INFINITY] {
            let x = Tensor::full([99], broken, dtype, device())?.requires_grad()?;
            let mut tape = Tape::train(9);
            let y = x.dropout(0.25)?;
            let gradient = tape.backward_with(&y, &Tensor::full([99], broken, dtype, device())?)?;
            let gradient = gradient.get(&x).expect("a gradient").to_f64_vec()?;
            let (random, threshold) = (Philox::new(9, 1), Philox::drop_threshold(0.25));
            for (i, (y, g)) in y.to_f64_vec()?.into_iter().zip(gradient).enumerate() {
                let kept = random.keeps(i as u64, threshold);
                assert!([y, g].iter().all(|v| if kept { !v.is_finite() } else { *v == 0.0 }), "{dtype} {i}: {y} {g}");
            }
        }
    }
    Ok(())
}

#[test]
fn masks_depend_only_on_seed_and_call() -> Result<()> {
    let shape = [129, 513];
    let kept = |y: &[f64]| y.iter().map(|&y| y != 0.0).collect::<Vec<_>>();
    let (y, _) = masks(&shape, 0.4, DType::F32, 3)?;
    for dtype in [DType::F64, DType::BF16, DType::F16] {
        assert_eq!(kept(&masks(&shape, 0.4, dtype, 3)?.0), kept(&y), "{dtype}");
    }
    assert_ne!(masks(&shape, 0.4, DType::F32, 4)?.0, y, "another seed");
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        assert_eq!(pool.install(|| masks(&shape, 0.4, DType::F32, 3))?.0, y, "{threads} threads");
    }
    // The layout decides where an element lies, not whether it is kept.
    let x = Tensor::ones([513, 129], DType::F32, device())?.transpose(0, 1)?;
    let _tape = Tape::train(3);
    assert_eq!(x.dropout(0.4)?.to_f64_vec()?, y, "transposed");
    assert_ne!(x.dropout(0.4)?.to_f64_vec()?, y, "the second call");
    Ok(())
}

#[test]
fn acts_only_in_training() -> Result<()> {
    let x = Tensor::generate([7, 9], DType::F32, device(), |i| i as f64)?;
    assert!(x.dropout(0.5)?.shares_storage(&x), "no tape");
    {
        let _tape = Tape::grad();
        assert!(x.dropout(0.5)?.shares_storage(&x), "a tape without dropout");
    }
    let _tape = Tape::train(0);
    assert!(x.dropout(0.0)?.shares_storage(&x), "p = 0");
    assert!(x.dropout(1.0)?.to_f64_vec()?.iter().all(|&y| y == 0.0), "p = 1");
    Ok(())
}

#[test]
fn probability_one_has_a_zero_gradient() -> Result<()> {
    let (forward, backward) = masks(&[130], 1.0, DType::F32, 2)?;
    assert!(forward.iter().chain(&backward).all(|&value| value == 0.0));
    Ok(())
}

#[test]
fn checkpoint_draws_the_same_masks() -> Result<()> {
    let x = Tensor::generate([40, 50], DType::F64, device(), |i| (i as f64).sin())?.requires_grad()?;
    let body = |x: &Tensor| x.dropout(0.3)?.square()?.dropout(0.2);
    let gradient = |recompute: bool| -> Result<(Vec<f64>, Vec<f64>)> {
        let mut tape = Tape::train(8);
        let y = if recompute { checkpoint(move |x| body(&x[0]), &[&x])? } else { body(&x)? };
        let grads = tape.backward_with(&y, &y.detach())?;
        Ok((y.to_f64_vec()?, grads.get(&x).expect("a gradient").to_f64_vec()?))
    };
    assert_eq!(gradient(true)?, gradient(false)?);
    Ok(())
}

/// Output and gradients of a function of two tensors, in training.
fn trained(x: &Tensor, residual: &Tensor, f: impl Fn(&Tensor, &Tensor) -> Result<Tensor>) -> Result<[Vec<f64>; 3]> {
    let (x, residual) = (x.requires_grad()?, residual.requires_grad()?);
    let mut tape = Tape::train(6);
    let y = f(&x, &residual)?;
    let grads = tape.backward_with(&y, &random(x.shape(), x.dtype(), 2)?)?;
    let [dx, dresidual] = [&x, &residual].map(|leaf| grads.get(leaf).expect("a gradient").to_f64_vec());
    Ok([y.to_f64_vec()?, dx?, dresidual?])
}

fn random(shape: &[usize], dtype: DType, stream: u64) -> Result<Tensor> {
    let random = Philox::new(4, stream);
    Tensor::generate(shape, dtype, device(), |i| random.normal(i as u64))
}

#[test]
fn dropout_add_is_dropout_and_a_sum() -> Result<()> {
    for p in [0.0, 0.3, 1.0] {
        for shape in [&[1][..], &[63], &[65], &[3, 37], &[2, 123, 517], &[0, 4]] {
            for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
                let (x, residual) = (random(shape, dtype, 0)?, random(shape, dtype, 1)?);
                let [y, dx, dresidual] = trained(&x, &residual, |x, residual| x.dropout_add(residual, p))?;
                let [expected, edx, edresidual] = trained(&x, &residual, |x, residual| x.dropout(p)?.add(residual))?;
                assert_eq!((&dx, &dresidual), (&edx, &edresidual), "gradients, p = {p}, {dtype} {shape:?}");
                // Half types are rounded once instead of twice.
                let bound = if matches!(dtype, DType::F32 | DType::F64) { 0.0 } else { 2e-2 };
                for (y, expected) in y.iter().zip(&expected) {
                    assert!((y - expected).abs() <= bound * expected.abs().max(1.0), "p = {p}, {dtype} {shape:?}");
                }
            }
        }
    }
    Ok(())
}

/// Inputs of any layout, the same tensor twice, and one that is not differentiated.
#[test]
fn dropout_add_of_other_inputs() -> Result<()> {
    let (x, residual) = (random(&[37, 20], DType::F32, 0)?, random(&[20, 37], DType::F32, 1)?);
    let packed = trained(&x.transpose(0, 1)?.contiguous()?, &residual, |x, residual| x.dropout_add(residual, 0.4))?;
    assert_eq!(trained(&x.transpose(0, 1)?, &residual, |x, residual| x.dropout_add(residual, 0.4))?, packed);
    let twice = |x: &Tensor, other: &Tensor| x.dropout_add(x, 0.5)?.add(&other.affine(0.0, 0.0)?);
    let [y, dx, dresidual] = trained(&residual, &residual, twice)?;
    // Kept elements count three times, the others once.
    let factor = |x: f64, y: f64| ((y / x) * 2.0).round() / 2.0;
    for (x, y) in residual.to_f64_vec()?.into_iter().zip(y) {
        assert!([1.0, 3.0].contains(&factor(x, y)), "{y} of {x}");
    }
    let cotangent = random(&[20, 37], DType::F32, 2)?.to_f64_vec()?;
    for (g, dx) in cotangent.into_iter().zip(dx) {
        assert!([1.0, 3.0].contains(&factor(g, dx)), "{dx} of {g}");
    }
    assert!(dresidual.iter().all(|&g| g == 0.0));
    let leaf = residual.requires_grad()?;
    let mut tape = Tape::train(6);
    let sum = residual.dropout_add(&leaf, 0.5)?.sum(&[])?;
    assert!(tape.backward(&sum)?.get(&leaf).expect("a gradient").to_f64_vec()?.iter().all(|&g| g == 1.0));
    Ok(())
}
