//! Inputs that PyTorch's ops accept, and these accept too: its values (2.15), its shapes and its gradients.

use crate::common::device;
use x_transformers::{DType, Result, Tape, Tensor};

fn f(values: &[f32], shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(values, shape, device())
}

fn integers(values: &[i64], shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(values, shape, device())
}

fn truths(values: &[bool], shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(values, shape, device())
}

/// The message of an error that must come.
fn refused<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.expect_err("PyTorch refuses this too").to_string()
}

/// The gradients of the sum of an op.
fn gradients<const N: usize>(inputs: [Tensor; N], op: impl Fn(&[Tensor; N]) -> Result<Tensor>) -> Result<[Tensor; N]> {
    let mut leaves = inputs;
    for x in &mut leaves {
        *x = x.requires_grad()?;
    }
    let mut tape = Tape::grad();
    let grads = tape.backward(&op(&leaves)?.sum(&[])?)?;
    Ok(leaves.map(|leaf| grads.get(&leaf).expect("a gradient").clone()))
}

#[test]
fn chunks_with_a_shorter_last_piece() -> Result<()> {
    let sizes = |size: usize, n: usize| -> Result<Vec<usize>> {
        Tensor::arange(size, device())?.chunk(n, 0)?.iter().map(|piece| piece.dim(0)).collect()
    };
    assert_eq!(sizes(13, 5)?, [3, 3, 3, 3, 1]);
    assert_eq!(sizes(13, 6)?, [3, 3, 3, 3, 1], "fewer pieces than were asked for");
    assert_eq!(sizes(3, 7)?, [1, 1, 1]);
    assert_eq!(sizes(12, 4)?, [3, 3, 3, 3]);
    assert_eq!(sizes(0, 3)?, [0, 0, 0]);
    let x = Tensor::arange(7, device())?;
    assert_eq!(x.chunk(3, -1)?[2].to_vec::<i64>()?, [6]);
    assert!(refused(x.chunk(0, 0)).contains("at least 1"));
    let [dx] = gradients([f(&[1.0; 5], &[5])?], |x| x[0].chunk(2, 0)?.swap_remove(1).affine(3.0, 0.0))?;
    assert_eq!(dx.to_vec::<f32>()?, [0.0, 0.0, 0.0, 3.0, 3.0]);
    Ok(())
}

#[test]
fn products_with_vectors() -> Result<()> {
    let (matrix, vector) = (f(&[1.0, 2.0, 3.0, 4.0], &[2, 2])?, f(&[1.0, 10.0], &[2])?);
    let y = matrix.matmul(&vector)?;
    assert_eq!((y.shape().to_vec(), y.to_vec::<f32>()?), (vec![2], vec![21.0, 43.0]));
    assert_eq!(vector.matmul(&matrix)?.to_vec::<f32>()?, [31.0, 42.0]);
    let dot = vector.matmul(&vector)?;
    assert_eq!((dot.rank(), dot.item()?), (0, 101.0));
    let batch = matrix.expand([3, 4, 2, 2])?;
    assert_eq!(batch.matmul(&vector)?.shape(), [3, 4, 2]);
    assert_eq!(vector.matmul(&batch)?.shape(), [3, 4, 2]);
    let [da, db] = gradients([matrix.clone(), vector.clone()], |x| x[0].matmul(&x[1]))?;
    assert_eq!((da.to_vec::<f32>()?, db.to_vec::<f32>()?), (vec![1.0, 10.0, 1.0, 10.0], vec![4.0, 6.0]));
    assert!(refused(matrix.matmul(&f(&[1.0; 3], &[3])?)).contains("[3, 1]"));
    assert!(refused(matrix.matmul(&f(&[1.0], &[])?)).contains("at least one dimension"));
    // F.linear with a weight that is a vector.
    let x = f(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3])?;
    let weight = f(&[1.0, 0.0, 1.0], &[3])?;
    assert_eq!(x.linear(&weight, None)?.to_vec::<f32>()?, [4.0, 10.0]);
    assert_eq!(x.linear(&weight, Some(&f(&[0.5], &[])?))?.to_vec::<f32>()?, [4.5, 10.5]);
    assert_eq!(weight.linear(&weight, None)?.item()?, 2.0);
    assert!(refused(x.linear(&weight, Some(&f(&[0.5, 1.0], &[2])?))).contains("weight [out, in]"));
    Ok(())
}

#[test]
fn scalars_count_as_vectors_of_one() -> Result<()> {
    let x = f(&[5.0], &[])?;
    for y in [x.softmax()?, x.top_k_mask(1)?] {
        assert_eq!((y.rank(), y.item()?), (0, 1.0));
    }
    assert!(f(&[f32::INFINITY], &[])?.softmax()?.item()?.is_nan());
    for dim in [0, -1] {
        for y in [x.sum(&[dim])?, x.mean(&[dim])?, x.max(dim)?, x.squeeze(dim)?, x.transpose(dim, 0)?] {
            assert_eq!((y.rank(), y.item()?), (0, 5.0));
        }
        assert_eq!(x.argmax(dim)?.item()?, 0.0);
        assert_eq!(x.flatten(dim, -1)?.shape(), [1]);
    }
    assert!(refused(x.sum(&[1])).contains("dimension 1") && refused(x.sum(&[0, -1])).contains("twice"));
    assert!(refused(x.max(-2)).contains("dimension -2") && refused(x.flatten(0, 1)).contains("dimension 1"));
    // PyTorch does not slice a scalar.
    assert!(
        x.narrow(0, 0, 1).is_err() && x.select(0, 0).is_err() && x.split(&[1], 0).is_err() && x.chunk(1, 0).is_err()
    );
    let [dx] = gradients([x], |x| x[0].flatten(0, 0)?.mul(&x[0].max(0)?.transpose(0, -1)?))?;
    assert_eq!((dx.rank(), dx.item()?), (0, 10.0));
    Ok(())
}

#[test]
fn arithmetic_on_integers() -> Result<()> {
    let p = Tensor::arange(3, device())?;
    let ten = Tensor::scalar(10i64, device())?;
    assert_eq!(p.add(&ten)?.to_vec::<i64>()?, [10, 11, 12]);
    assert_eq!(ten.sub(&p)?.to_vec::<i64>()?, [10, 9, 8]);
    assert_eq!(p.unsqueeze(1)?.mul(&p)?.to_vec::<i64>()?, [0, 0, 0, 0, 1, 2, 0, 2, 4]);
    let columns = integers(&[1, 2, 3, 4, 5, 6], &[2, 3])?.transpose(0, 1)?;
    assert_eq!(columns.add(&columns)?.to_vec::<i64>()?, [2, 8, 4, 10, 6, 12]);
    // Values that are too large wrap around.
    let ends = integers(&[i64::MAX, i64::MIN, 1 << 62], &[3])?;
    assert_eq!(ends.add(&integers(&[1, -1, 1 << 62], &[3])?)?.to_vec::<i64>()?, [i64::MIN, i64::MAX, i64::MIN]);
    assert_eq!(ends.mul(&integers(&[2, -1, 4], &[3])?)?.to_vec::<i64>()?, [-2, i64::MIN, 0]);
    assert_eq!(ends.neg()?.to_vec::<i64>()?, [-i64::MAX, i64::MIN, -(1 << 62)]);
    assert_eq!(integers(&[-3, 0, 4], &[3])?.relu()?.to_vec::<i64>()?, [0, 0, 4]);
    assert_eq!(integers(&[-3, 0, 4], &[3])?.square()?.to_vec::<i64>()?, [9, 0, 16]);
    // Quotients and functions with non-integer results are f32.
    let quotient = integers(&[7, 0, -3], &[3])?.div(&integers(&[0, 0, 2], &[3])?)?.to_vec::<f32>()?;
    assert!(quotient[0] == f32::INFINITY && quotient[1].is_nan() && quotient[2] == -1.5);
    assert_eq!(integers(&[0, 9], &[2])?.sqrt()?.to_vec::<f32>()?, [0.0, 3.0]);
    assert_eq!(truths(&[true, false], &[2])?.exp()?.to_vec::<f32>()?[1], 1.0);
    for y in [p.exp()?, p.ln()?, p.sigmoid()?, p.tanh()?, p.div(&ten)?] {
        assert_eq!(y.dtype(), DType::F32);
    }
    assert!(p.eq(&p)?.to_vec::<bool>()?.iter().all(|&same| same));
    Ok(())
}

#[test]
fn arithmetic_on_truth_values() -> Result<()> {
    let (a, b) = (truths(&[true, true, false], &[3])?, truths(&[true, false, false], &[3])?);
    assert_eq!(a.add(&b)?.to_vec::<bool>()?, [true, true, false]);
    assert_eq!(a.mul(&b)?.to_vec::<bool>()?, [true, false, false]);
    assert_eq!(a.div(&a)?.dtype(), DType::F32);
    assert_eq!(a.square()?.to_vec::<i64>()?, [1, 1, 0]);
    assert_eq!(a.max(0)?.to_vec::<bool>()?, [true]);
    let numbers = f(&[0.0, -0.0, 2.0, f32::NAN], &[4])?;
    assert_eq!(numbers.logical_not()?.to_vec::<bool>()?, [true, true, false, false]);
    assert_eq!(integers(&[0, 3], &[2])?.logical_or(&f(&[0.0], &[1])?)?.to_vec::<bool>()?, [false, true]);
    for message in [refused(a.sub(&b)), refused(a.neg()), refused(a.relu()), refused(a.argmax(0)), refused(a.mean(&[]))]
    {
        assert!(message.contains("bool") && message.contains("to_dtype"), "{message}");
    }
    let p = Tensor::arange(3, device())?;
    let refusals = [p.mean(&[]), p.softmax(), p.gelu(), p.gelu_tanh(), p.silu(), p.affine(1.0, 0.0), p.matmul(&p)];
    for message in refusals.map(refused) {
        assert!(message.contains("i64"), "{message}");
    }
    Ok(())
}

#[test]
fn sums_of_integers_and_masks() -> Result<()> {
    let mask = truths(&[true, true, false, false, true, false], &[2, 3])?;
    let count = mask.sum(&[-1])?;
    assert_eq!((count.dtype(), count.to_vec::<i64>()?), (DType::I64, vec![2, 1]));
    assert_eq!(mask.sum(&[])?.item()?, 3.0);
    assert_eq!(mask.to_dtype(DType::I64)?.sum(&[0])?.to_vec::<i64>()?, [1, 2, 0]);
    let x = integers(&[1 << 62, 1 << 62, 5, -7, 2, 3], &[3, 2])?;
    assert_eq!(x.sum(&[])?.to_vec::<i64>()?, [i64::MIN + 3]);
    assert_eq!(x.sum(&[0])?.to_vec::<i64>()?, [(1 << 62) + 7, (1 << 62) - 4]);
    assert_eq!(x.transpose(0, 1)?.sum(&[0])?.to_vec::<i64>()?, [i64::MIN, -2, 5]);
    assert_eq!(integers(&[], &[2, 0])?.sum(&[1])?.to_vec::<i64>()?, [0, 0]);
    // Beyond the integers that f64 holds.
    let large = integers(&[(1 << 53) + 1, 1 << 53, i64::MIN], &[3])?;
    assert_eq!((large.max(0)?.to_vec::<i64>()?, large.argmax(0)?.to_vec::<i64>()?), (vec![(1 << 53) + 1], vec![0]));
    assert_eq!(integers(&[i64::MIN, i64::MIN], &[2])?.argmax(0)?.to_vec::<i64>()?, [0]);
    Ok(())
}

#[test]
fn masks_that_are_larger() -> Result<()> {
    let x = f(&[1.0, 2.0], &[2])?;
    let mask = truths(&[true, false], &[2, 1])?;
    let y = x.masked_fill(&mask, 0.0)?;
    assert_eq!((y.shape().to_vec(), y.to_vec::<f32>()?), (vec![2, 2], vec![0.0, 0.0, 1.0, 2.0]));
    let [dx] = gradients([x], |x| x[0].masked_fill(&mask, 0.0))?;
    assert_eq!(dx.to_vec::<f32>()?, [1.0, 1.0]);
    let scalar = f(&[7.0], &[])?;
    assert_eq!(mask.where_cond(&scalar, &f(&[1.0, 2.0], &[2])?)?.to_vec::<f32>()?, [7.0, 7.0, 1.0, 2.0]);
    Ok(())
}

#[test]
fn empty_vectors_are_concatenated() -> Result<()> {
    let (nothing, x) = (f(&[], &[0])?, f(&[1.0, 2.0], &[1, 2])?);
    for dim in [0, 1, -1, -2] {
        assert_eq!(Tensor::cat(&[&nothing, &x, &nothing], dim)?.to_vec::<f32>()?, [1.0, 2.0]);
    }
    assert_eq!(Tensor::cat(&[&nothing, &nothing], 0)?.shape(), [0]);
    let empty = integers(&[], &[0])?;
    assert_eq!(Tensor::cat(&[&empty, &integers(&[3], &[1])?], 0)?.to_vec::<i64>()?, [3]);
    let [none, dx] = gradients([nothing, x], |x| Tensor::cat(&[&x[0], &x[1], &x[1]], 0))?;
    assert_eq!((none.shape().to_vec(), dx.to_vec::<f32>()?), (vec![0], vec![2.0, 2.0]));
    Ok(())
}

#[test]
fn squeezing_a_larger_dimension_changes_nothing() -> Result<()> {
    let x = f(&[1.0, 2.0], &[2, 1])?;
    assert_eq!(x.squeeze(0)?.shape(), [2, 1]);
    assert_eq!(x.squeeze(-1)?.shape(), [2]);
    assert!(refused(x.squeeze(2)).contains("dimension 2"));
    Ok(())
}

/// A bias common to all classes does not change the loss of half types, as in PyTorch's chunked
/// `F.linear_cross_entropy`.
#[test]
fn a_shift_of_all_logits_does_not_move_the_loss() -> Result<()> {
    let draw = |stream: u64, rows: usize, columns: usize| {
        let random = x_transformers::Philox::new(1, stream);
        let value = |i: usize| random.uniform(i as u64) * 2.0 - 1.0;
        // The same numbers in every type.
        Tensor::generate([rows, columns], DType::BF16, device(), value)
    };
    let targets = integers(&(0..16).map(|i| i * 3).collect::<Vec<_>>(), &[16])?;
    let all = |dtype: DType, shift: Option<f64>| -> Result<Vec<Vec<f64>>> {
        let [x, weight] = [draw(0, 16, 8)?, draw(1, 64, 8)?];
        let (x, weight) = (x.to_dtype(dtype)?.requires_grad()?, weight.to_dtype(dtype)?.requires_grad()?);
        let bias = shift.map(|shift| Tensor::full([64], shift, dtype, device())?.requires_grad()).transpose()?;
        let without_a_tape = x.detach().linear_cross_entropy(&weight.detach(), bias.as_ref(), &targets, -100)?;
        let mut tape = Tape::grad();
        let loss = x.linear_cross_entropy(&weight, bias.as_ref(), &targets, -100)?;
        assert_eq!(loss.item()?, without_a_tape.item()?);
        let grads = tape.backward(&loss)?;
        let leaves = [Some(&x), Some(&weight), bias.as_ref()];
        let of = |leaf: &Tensor| grads.get(leaf).expect("a gradient").to_f64_vec();
        std::iter::once(loss.to_f64_vec()).chain(leaves.into_iter().flatten().map(of)).collect()
    };
    let exact = all(DType::F64, Some(0.0))?;
    for dtype in [DType::BF16, DType::F16] {
        // Beyond 256 bf16 holds only every second integer, beyond 2048 f16.
        for shift in [None, Some(256.0), Some(-2048.0)] {
            for (actual, exact) in all(dtype, shift)?.iter().zip(&exact) {
                let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
                let error = norm(&mut actual.iter().zip(exact).map(|(a, e)| a - e)) / norm(&mut exact.iter().copied());
                let allowed = if exact.len() == 1 { 3e-4 } else { 6e-3 };
                assert!(error < allowed, "{dtype} with a shift of {shift:?}: {error:e} of {} numbers", exact.len());
            }
        }
    }
    Ok(())
}
