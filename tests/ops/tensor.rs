//! Tensors: constructors, conversions, views, formatting and errors.

use crate::common::device;
use half::{bf16, f16};
use x_transformers::{DType, Error, ErrorKind, IntoShape, MAX_RANK, Result, Shape, Tape, Tensor};

const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];
const ALL: [DType; 6] = [DType::F32, DType::F64, DType::BF16, DType::F16, DType::I64, DType::Bool];

fn counting(shape: impl IntoShape) -> Tensor {
    Tensor::generate(shape, DType::F64, device(), |i| i as f64).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f64_vec().unwrap()
}

/// The message of an error that must come.
fn refused<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn constructors() -> Result<()> {
    let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], device())?;
    assert_eq!((x.rank(), x.numel(), x.dtype(), x.device()), (2, 6, DType::F32, device()));
    assert_eq!(x.shape(), [2, 3]);
    assert_eq!(x.strides(), [3, 1]);
    assert_eq!((x.dim(0)?, x.dim(-1)?), (2, 3));
    assert!(x.is_contiguous());
    assert_eq!(x.to_vec::<f32>()?, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(Tensor::from_vec(vec![true, false], [2], device())?.to_vec::<bool>()?, [true, false]);
    let scalar = Tensor::scalar(2.5f64, device())?;
    assert_eq!((scalar.rank(), scalar.numel(), scalar.item()?), (0, 1, 2.5));
    assert!(scalar.is_contiguous() && scalar.strides().is_empty());
    assert_eq!(Tensor::arange(4, device())?.to_vec::<i64>()?, [0, 1, 2, 3]);
    assert!(Tensor::arange(0, device())?.to_vec::<i64>()?.is_empty());
    for dtype in ALL {
        assert_eq!(values(&Tensor::zeros([2, 2], dtype, device())?), [0.0; 4]);
        assert_eq!(values(&Tensor::ones([2], dtype, device())?), [1.0; 2]);
        let three = if dtype == DType::Bool { 1.0 } else { 3.0 };
        assert_eq!(values(&Tensor::full((), 3.0, dtype, device())?), [three]);
        assert_eq!(Tensor::zeros([1, 0, 5], dtype, device())?.numel(), 0);
    }
    Ok(())
}

#[test]
fn the_shape_may_be_given_in_many_ways() -> Result<()> {
    let dims = vec![2usize, 3];
    let expected = Shape::new(&dims)?;
    assert_eq!(*counting([2, 3]).shape(), expected);
    assert_eq!(*counting(&dims[..]).shape(), expected);
    assert_eq!(*counting(&dims).shape(), expected);
    assert_eq!(*counting(dims).shape(), expected);
    assert_eq!(*counting(expected).shape(), expected);
    assert_eq!(counting(()).rank(), 0);
    assert_eq!(format!("{expected} {expected:?}"), "[2, 3] [2, 3]");
    Ok(())
}

#[test]
fn small_integers_become_i64() -> Result<()> {
    let bytes = Tensor::from_slice(&[0u8, 127, 255], [3], device())?;
    let words = Tensor::from_slice(&[0u32, u32::MAX], [2], device())?;
    assert_eq!((bytes.dtype(), words.dtype()), (DType::I64, DType::I64));
    assert_eq!(bytes.to_vec::<i64>()?, [0, 127, 255]);
    assert_eq!(words.to_vec::<i64>()?, [0, u32::MAX as i64]);
    Ok(())
}

#[test]
fn half_types_in_and_out() -> Result<()> {
    let (b, f) = ([1.5, -0.0, f32::INFINITY, 1e-40].map(bf16::from_f32), [1.5, 65504.0, 6e-8].map(f16::from_f32));
    assert_eq!(Tensor::from_slice(&b, [4], device())?.to_vec::<bf16>()?, b);
    assert_eq!(Tensor::from_slice(&f, [3], device())?.to_vec::<f16>()?, f);
    assert!(Tensor::from_slice(&[bf16::NAN], [1], device())?.to_vec::<bf16>()?[0].is_nan());
    Ok(())
}

/// The nearest of all finite values of a half type, ties to the even one: the definition, by search.
fn nearest(x: f64, to_f64: impl Fn(u16) -> f64, bits_of_max: u16) -> f64 {
    let magnitude = x.abs();
    let above = (0..=bits_of_max).collect::<Vec<_>>().partition_point(|&bits| to_f64(bits) < magnitude) as u16;
    if above > bits_of_max {
        // Halfway to the value that the next exponent would have, it becomes infinite.
        let (last, step) = (to_f64(bits_of_max), to_f64(bits_of_max) - to_f64(bits_of_max - 1));
        return if magnitude < last + step / 2.0 { last } else { f64::INFINITY }.copysign(x);
    }
    let below = above.saturating_sub(1);
    let (low, high) = (magnitude - to_f64(below), to_f64(above) - magnitude);
    let bits = if low < high || (low == high && below.is_multiple_of(2)) { below } else { above };
    to_f64(bits).copysign(x)
}

#[test]
fn conversions_to_half_types_round_once() -> Result<()> {
    // Ties, and values next to ties that differ in the last bits of f32 or f64.
    let mut inputs: Vec<f64> =
        vec![0.0, 1.0, -2.5, 65504.0, 65519.99, 65520.0, 1e39, 3.4e38, 1e-8, 2f64.powi(-25), 1e-46];
    for half_step in [2f64.powi(-8), 2f64.powi(-9), 2f64.powi(-11), 2f64.powi(-12)] {
        for base in [1.0, 1.5, 3.0, 2f64.powi(-20), 2f64.powi(-14), 2f64.powi(-126), 100.0] {
            for odd in [1.0, 3.0, 5.0] {
                let tie = base * (1.0 + odd * half_step);
                let next = |x: f64, by: i64| f64::from_bits((x.to_bits() as i64 + by) as u64);
                inputs.extend([tie, next(tie, 1), next(tie, -1)]);
                inputs
                    .extend([1u32, u32::MAX].map(|by| f32::from_bits((tie as f32).to_bits().wrapping_add(by)) as f64));
            }
        }
    }
    inputs.extend(inputs.clone().iter().map(|x| -x));
    let exact = Tensor::from_slice(&inputs, [inputs.len()], device())?;
    let single: Vec<f32> = inputs.iter().map(|&x| x as f32).collect();
    let singles = Tensor::from_slice(&single, [single.len()], device())?;
    for (from, inputs) in [(&exact, inputs.clone()), (&singles, single.iter().map(|&x| x as f64).collect())] {
        let b = values(&from.to_dtype(DType::BF16)?);
        let f = values(&from.to_dtype(DType::F16)?);
        for (index, &x) in inputs.iter().enumerate() {
            let expected = nearest(x, |bits| bf16::from_bits(bits).to_f64(), 0x7F7F);
            assert_eq!(b[index], expected, "{x:e} from {} to bf16", from.dtype());
            let expected = nearest(x, |bits| f16::from_bits(bits).to_f64(), 0x7BFF);
            assert_eq!(f[index], expected, "{x:e} from {} to f16", from.dtype());
        }
    }
    assert!(Tensor::scalar(f64::NAN, device())?.to_dtype(DType::BF16)?.item()?.is_nan());
    assert_eq!(Tensor::scalar(f64::NEG_INFINITY, device())?.to_dtype(DType::F16)?.item()?, f64::NEG_INFINITY);
    Ok(())
}

#[test]
fn conversions() -> Result<()> {
    let x = Tensor::from_slice(&[-2.7f32, -0.0, 0.4, 3.9, f32::NAN, f32::INFINITY], [6], device())?;
    assert_eq!(x.to_dtype(DType::I64)?.to_vec::<i64>()?, [-2, 0, 0, 3, 0, i64::MAX]);
    assert_eq!(x.to_dtype(DType::Bool)?.to_vec::<bool>()?, [true, false, true, true, true, true]);
    let flags = Tensor::from_slice(&[true, false], [2], device())?;
    for dtype in ALL {
        assert_eq!(values(&flags.to_dtype(dtype)?), [1.0, 0.0]);
        assert_eq!(flags.to_dtype(dtype)?.dtype(), dtype);
        let twice = counting([2, 3]).transpose(0, 1)?.to_dtype(dtype)?.to_dtype(DType::F64)?;
        let expected = [0.0, 3.0, 1.0, 4.0, 2.0, 5.0].map(|x: f64| if dtype == DType::Bool { x.min(1.0) } else { x });
        assert_eq!(values(&twice), expected);
    }
    let same = x.to_dtype(DType::F32)?;
    assert!(same.shares_storage(&x), "no conversion, no copy");
    let large = Tensor::from_slice(&[i64::MAX, i64::MIN, 1 << 53], [3], device())?;
    assert_eq!(values(&large.to_dtype(DType::F64)?), [i64::MAX as f64, i64::MIN as f64, 9007199254740992.0]);
    Ok(())
}

#[test]
fn wrong_lengths_and_shapes_are_refused() {
    let message = refused(Tensor::from_slice(&[1.0f32; 5], [2, 3], device()));
    assert!(message.contains("5 values") && message.contains("[2, 3]"), "{message}");
    assert!(refused(Tensor::from_slice(&[1.0f32], [0], device())).contains("[0]"));
    let empty: [f32; 0] = [];
    assert!(refused(Tensor::from_slice(&empty, (), device())).contains("0 values"));
    let message = refused(Tensor::zeros([1; 7], DType::F32, device()));
    assert!(message.contains("7 dimensions") && message.contains("at most 6"), "{message}");
    assert_eq!(MAX_RANK, 6);
    for shape in [vec![usize::MAX], vec![usize::MAX, 2], vec![1 << 40, 1 << 40], vec![0, usize::MAX, 2], vec![1 << 61]]
    {
        let message = refused(Tensor::zeros(&shape, DType::Bool, device()));
        assert!(message.contains("too many elements to address"), "{shape:?}: {message}");
        assert!(Shape::new(&shape).is_err());
        assert!(Tensor::generate(&shape, DType::F32, device(), |_| 0.0).is_err());
    }
    assert!(Tensor::arange(usize::MAX, device()).is_err());
    assert!(counting([1]).expand([usize::MAX, 2, 1]).is_err());
}

#[test]
fn a_shape_that_was_written_to_is_checked_again() {
    let mut shape = Shape::new(&[1, 1]).unwrap();
    shape[0] = usize::MAX;
    shape[1] = 2;
    assert_eq!(shape.numel(), usize::MAX, "saturates");
    assert!(refused(Tensor::zeros(shape, DType::F32, device())).contains("too many elements"));
    assert!(counting([1, 1]).expand(shape).is_err());
    assert!(counting([1, 1]).reshape(shape).is_err());
    assert!(counting([1, 1]).sum_to(shape).is_err());
}

#[test]
fn huge_allocations_are_errors() {
    let peak = device().memory().peak;
    for bytes in [1usize << 45, 1 << 55, (isize::MAX as usize / 8 - 64) * 8] {
        let result = Tensor::zeros([bytes / 8], DType::F64, device());
        assert!(
            matches!(result.as_ref().map_err(Error::kind), Err(ErrorKind::OutOfMemory { requested, .. }) if *requested == bytes / 8 * 8),
            "{result:?}"
        );
        let message = refused(result);
        assert!(message.contains("out of memory") && message.contains(&(bytes / 8 * 8).to_string()), "{message}");
    }
    // A copy that a view asks for fails in the same way.
    let view = counting([1]).expand([1 << 45]).unwrap();
    assert!(matches!(view.contiguous().map_err(Error::into_kind), Err(ErrorKind::OutOfMemory { .. })));
    assert!(matches!(view.to_f64_vec().map_err(Error::into_kind), Err(ErrorKind::OutOfMemory { .. })));
    assert!(device().memory().peak < peak.max(1 << 40), "what was refused was never in use");
}

#[test]
fn reading_back_asks_for_the_right_type() -> Result<()> {
    let x = counting([2]);
    let message = refused(x.to_vec::<f32>());
    assert!(message.contains("f64") && message.contains("f32") && message.contains("to_dtype"), "{message}");
    assert!(Tensor::arange(1, device())?.to_vec::<bool>().is_err());
    assert!(refused(counting([2]).item()).contains("[2]"));
    assert!(counting([0]).item().is_err());
    assert_eq!(counting([1, 1, 1]).item()?, 0.0);
    let message = refused(x.to_dtype(DType::I64)?.requires_grad());
    assert!(message.contains("i64"), "{message}");
    Ok(())
}

#[test]
fn views_share_storage() -> Result<()> {
    let x = counting([4, 6]);
    for view in [
        x.clone(),
        x.detach(),
        x.requires_grad()?,
        x.reshape([2, 12])?,
        x.flatten(0, 1)?,
        x.transpose(0, 1)?,
        x.permute(&[1, 0])?,
        x.narrow(1, 2, 3)?,
        x.select(0, 1)?,
        x.expand([3, 4, 6])?,
        x.unsqueeze(1)?,
        x.unsqueeze(0)?.squeeze(0)?,
        x.chunk(2, 1)?.swap_remove(1),
        x.contiguous()?,
        x.transpose(0, 1)?.reshape([2, 3, 4])?,
        x.transpose(0, 1)?.reshape([6, 2, 2])?,
        x.narrow(1, 0, 3)?.reshape([2, 2, 3])?,
        x.narrow(0, 1, 2)?.reshape([12])?,
        x.select(1, 0)?.expand([5, 4])?.reshape([5, 2, 2])?,
        x.reshape([4, 1, 6])?.transpose(0, 2)?.reshape([6, 4])?,
        x.select(0, 0)?.select(0, 0)?.expand([2, 3])?.reshape([3, 2])?,
    ] {
        assert!(view.shares_storage(&x), "{view:?}");
    }
    for copy in [
        x.transpose(0, 1)?.reshape([24])?,
        x.narrow(1, 0, 3)?.reshape([12])?,
        x.transpose(0, 1)?.contiguous()?,
        x.select(0, 0)?.expand([2, 6])?.reshape([12])?,
        x.sum(&[0])?,
    ] {
        assert!(!copy.shares_storage(&x) && copy.is_contiguous(), "{copy:?}");
    }
    Ok(())
}

#[test]
fn views_of_rank_0_to_6() -> Result<()> {
    let scalar = counting(());
    assert!(scalar.narrow(0, 0, 1).is_err() && scalar.select(0, 0).is_err() && scalar.dim(0).is_err());
    assert_eq!(scalar.permute(&[])?.rank(), 0);
    assert_eq!(scalar.reshape([1, 1, 1])?.shape(), [1, 1, 1]);
    assert_eq!(values(&scalar.expand([2, 2])?.contiguous()?), [0.0; 4]);
    let mut x = counting([2]);
    for rank in 2..=6 {
        x = x.unsqueeze(if rank % 2 == 0 { 0 } else { -1 })?;
        assert_eq!(x.rank(), rank);
        assert_eq!(values(&x), [0.0, 1.0]);
    }
    assert_eq!(x.shape(), [1, 1, 1, 2, 1, 1]);
    assert!(refused(x.unsqueeze(0)).contains("[1, 1, 1, 2, 1, 1]"));
    let x = counting([2, 3, 1, 2, 2, 3]);
    let y = x.permute(&[5, 3, 0, 2, 4, 1])?;
    assert_eq!(y.shape(), [3, 2, 2, 1, 2, 3]);
    // Element [1, 1, 0, 0, 1, 2] of y is [0, 2, 0, 1, 1, 1] of x.
    let at = |tensor: &Tensor, index: [usize; 6]| {
        index.iter().try_fold(tensor.clone(), |t, &i| t.select(0, i)).and_then(|t| t.item())
    };
    assert_eq!(at(&y, [1, 1, 0, 0, 1, 2])?, at(&x, [0, 2, 0, 1, 1, 1])?);
    assert_eq!(values(&y.permute(&[2, 5, 3, 1, 4, 0])?), values(&x));
    let mut back = y.transpose(0, 5)?.flatten(1, 4)?;
    for _ in 0..3 {
        back = back.select(-1, 0)?.unsqueeze(-1)?;
    }
    assert_eq!(back.shape(), [3, 8, 1]);
    Ok(())
}

#[test]
fn views_of_empty_tensors() -> Result<()> {
    let x = counting([3, 0, 2]);
    assert!(x.is_contiguous());
    for (view, shape) in [
        (x.transpose(0, 2)?, vec![2, 0, 3]),
        (x.narrow(0, 2, 1)?, vec![1, 0, 2]),
        (x.narrow(0, 3, 0)?, vec![0, 0, 2]),
        (x.narrow(1, 0, 0)?, vec![3, 0, 2]),
        (x.select(2, 1)?, vec![3, 0]),
        (x.reshape([0, 7])?, vec![0, 7]),
        (x.flatten(0, 1)?, vec![0, 2]),
        (x.expand([4, 3, 0, 2])?, vec![4, 3, 0, 2]),
        (x.chunk(2, 2)?.swap_remove(1), vec![3, 0, 1]),
        (x.chunk(3, 1)?.swap_remove(2), vec![3, 0, 2]),
        (x.narrow(0, 1, 2)?.narrow(2, 1, 1)?, vec![2, 0, 1]),
        (counting([3, 1]).expand([3, 0])?, vec![3, 0]),
        (counting([4, 5]).narrow(1, 5, 0)?.transpose(0, 1)?, vec![0, 4]),
    ] {
        assert_eq!(**view.shape(), shape[..]);
        assert!(view.to_f64_vec()?.is_empty());
        assert!(view.contiguous()?.is_contiguous());
        assert_eq!(view.sum(&[])?.item()?, 0.0);
        assert_eq!(view.to_dtype(DType::Bool)?.numel(), 0);
        let _ = view.softmax()?;
        let _ = format!("{view} {view:?}");
    }
    assert!(x.narrow(1, 0, 1).is_err() && x.select(1, 0).is_err() && x.reshape([1]).is_err());
    Ok(())
}

#[test]
fn gradients_of_empty_views() -> Result<()> {
    // Empty parts whose offset lies past the end of an empty buffer, added up in place.
    let x = counting([4, 0]).requires_grad()?;
    let mut tape = Tape::grad();
    let late = x.narrow(0, 2, 2)?;
    let parts = [late.clone(), late.narrow(0, 1, 1)?, x.narrow(0, 3, 1)?, late];
    let joined = Tensor::cat(&parts.iter().collect::<Vec<_>>(), 0)?;
    let grads = tape.backward_with(&joined, &Tensor::ones(*joined.shape(), DType::F64, device())?)?;
    assert_eq!(grads.get(&x).unwrap().shape(), [4, 0]);
    let x = counting([4, 0]).requires_grad()?;
    let mut tape = Tape::grad();
    // The last op returns a new gradient, whose parts belong to nobody else.
    let y = Tensor::cat(&[&counting([3, 0]), &x, &x.affine(1.0, 0.0)?], 0)?.affine(1.0, 0.0)?;
    let grads = tape.backward_with(&y, &Tensor::ones(*y.shape(), DType::F64, device())?)?;
    assert_eq!(grads.get(&x).unwrap().numel(), 0);
    Ok(())
}

#[test]
fn every_view_error_names_what_was_wrong() {
    let x = counting([2, 3]);
    let cases: [(Result<Tensor>, &[&str]); 22] = [
        (x.reshape([4]), &["reshape", "[2, 3]", "[4]"]),
        (x.reshape([7, 0]), &["reshape", "[7, 0]"]),
        (x.reshape([1; 7]), &["7 dimensions"]),
        (x.transpose(0, 2), &["transpose", "dimension 2", "[2, 3]"]),
        (x.transpose(-3, 0), &["transpose", "dimension -3"]),
        (x.transpose(isize::MIN, 0), &["transpose"]),
        (x.permute(&[0]), &["permute", "[0]", "[2, 3]"]),
        (x.permute(&[0, 0]), &["permute", "[0, 0]"]),
        (x.permute(&[0, 2]), &["permute", "[0, 2]"]),
        (x.permute(&[0, 1, 2]), &["permute"]),
        (x.narrow(0, 1, 2), &["narrow", "2 elements from 1", "[2, 3]"]),
        (x.narrow(1, 4, 0), &["narrow", "from 4"]),
        (x.narrow(1, usize::MAX, 2), &["narrow"]),
        (x.narrow(2, 0, 0), &["narrow", "dimension 2"]),
        (x.select(1, 3), &["select", "index 3", "[2, 3]"]),
        (x.select(-3, 0), &["select", "dimension -3"]),
        (x.expand([3, 3]), &["expand", "[2, 3]", "[3, 3]"]),
        (x.expand([3]), &["expand", "[3]"]),
        (x.unsqueeze(3), &["unsqueeze", "3", "[2, 3]"]),
        (x.unsqueeze(-4), &["unsqueeze", "-4"]),
        (x.flatten(1, 0), &["flatten", "1", "0"]),
        (x.flatten(0, 5), &["flatten", "dimension 5"]),
    ];
    for (result, words) in cases {
        let message = refused(result);
        for word in words {
            assert!(message.contains(word), "`{message}` does not say `{word}`");
        }
    }
    assert!(refused(x.split(&[1, 1], 1)).contains("[1, 1]"));
    assert!(refused(x.split(&[usize::MAX, 4], 1)).contains("split"));
    assert!(refused(x.chunk(0, 1)).contains("chunk"));
    assert!(refused(x.chunk(2, 3)).contains("dimension 3"));
    assert!(refused(x.dim(2)).contains("dimension 2"));
    assert!(refused(Tensor::cat(&[], 0)).contains("at least one"));
    assert!(refused(Tensor::cat(&[&x, &counting([3, 2])], 0)).contains("[3, 2]"));
    assert!(refused(Tensor::cat(&[&x, &counting([2])], 0)).contains("[2]"));
    assert!(refused(Tensor::cat(&[&x, &x.to_dtype(DType::F32).unwrap()], 0)).contains("f32"));
    assert!(refused(Tensor::cat(&[&counting(()), &counting(())], 0)).contains("[]"));
    assert!(refused(x.sum(&[0, 0])).contains("twice"));
    assert!(refused(x.sum(&[0, -2])).contains("twice"));
    assert!(refused(x.mean(&[2])).contains("mean"));
    assert!(refused(Tensor::arange(3, device()).unwrap().mean(&[])).contains("i64"));
    assert!(refused(Tensor::arange(3, device()).unwrap().softmax()).contains("i64"));
}

#[test]
fn narrow_at_the_edges() -> Result<()> {
    let x = counting([2, 3]);
    assert!(values(&x.narrow(1, 3, 0)?).is_empty());
    assert_eq!(values(&x.narrow(-1, 2, 1)?), [2.0, 5.0]);
    assert_eq!(values(&x.narrow(0, 0, 2)?), values(&x));
    assert_eq!(values(&x.narrow(0, 1, 1)?.narrow(1, 1, 2)?), [4.0, 5.0]);
    assert_eq!(x.split(&[0, 3, 0], 1)?.iter().map(Tensor::numel).collect::<Vec<_>>(), [0, 6, 0]);
    assert_eq!(x.split(&[], 1).map(|_| ()).map_err(|_| ()), Err(()), "no sizes are not three columns");
    assert!(counting([2, 0]).split(&[], 1)?.is_empty());
    Ok(())
}

#[test]
fn float_ops_work_in_every_float_dtype() -> Result<()> {
    for dtype in FLOATS {
        let x = counting([2, 3]).to_dtype(dtype)?;
        for y in [x.sum(&[0])?, x.mean(&[])?, x.softmax()?, x.affine(2.0, 1.0)?, Tensor::cat(&[&x, &x], 0)?] {
            assert_eq!(y.dtype(), dtype);
        }
        assert_eq!(values(&x.sum(&[1])?), [3.0, 12.0]);
    }
    Ok(())
}

#[test]
fn half_sums_accumulate_in_f32() -> Result<()> {
    for (dtype, n) in [(DType::F16, 70_000), (DType::BF16, 3000)] {
        let ones = Tensor::ones([n, 2], dtype, device())?;
        for dims in [&[0isize] as &[isize], &[]] {
            let mean = ones.mean(dims)?;
            assert!(values(&mean).iter().all(|&m| m == 1.0), "{dtype}: the mean of ones is {mean}");
        }
        assert_eq!(ones.transpose(0, 1)?.mean(&[1])?.to_f64_vec()?, [1.0, 1.0]);
    }
    let threes = Tensor::full([1000], 3.0, DType::BF16, device())?;
    assert_eq!(threes.sum(&[])?.item()?, 3008.0, "3000 is not a bf16, 3008 the nearest one");
    // Gradients of a mean in f16 do not vanish in a sum that overflows.
    let x = Tensor::ones([70_000], DType::F16, device())?.requires_grad()?;
    let mut tape = Tape::grad();
    let grads = tape.backward(&x.mean(&[])?)?;
    let expected = f16::from_f64(1.0 / 70_000.0).to_f64();
    assert_eq!(grads.get(&x).unwrap().to_f64_vec()?[69_999], expected);
    Ok(())
}

#[test]
fn long_sums_keep_their_precision() -> Result<()> {
    // One accumulator stops at 2²⁴.
    let n = (1 << 24) + (1 << 22);
    let ones = Tensor::ones([n], DType::F32, device())?;
    assert_eq!(ones.sum(&[])?.item()?, n as f64);
    assert_eq!(ones.reshape([n, 1])?.sum(&[0])?.item()?, n as f64);
    let two = ones.reshape([n / 2, 2])?;
    assert_eq!(values(&two.sum(&[0])?), [n as f64 / 2.0; 2]);
    assert_eq!(values(&two.transpose(0, 1)?.sum(&[1])?), [n as f64 / 2.0; 2]);
    drop((ones, two));
    let n = 300_007;
    let uneven = Tensor::generate([n, 3], DType::F32, device(), |i| 0.1 + (i % 7) as f64)?;
    let exact = uneven.to_dtype(DType::F64)?;
    for dims in [&[0isize] as &[isize], &[], &[-1]] {
        let (sum, exact) = (values(&uneven.sum(dims)?), values(&exact.sum(dims)?));
        for (sum, exact) in sum.iter().zip(&exact) {
            assert!((sum / exact - 1.0).abs() < 4e-7, "{dims:?}: {sum} {exact}");
        }
    }
    Ok(())
}

#[test]
fn means_of_empty_tensors() -> Result<()> {
    assert!(counting([0]).mean(&[])?.item()?.is_nan());
    assert!(values(&counting([2, 0]).mean(&[1])?).iter().all(|x| x.is_nan()));
    assert!(values(&counting([2, 0]).mean(&[0])?).is_empty());
    assert_eq!(values(&counting([2, 0]).sum(&[1])?), [0.0, 0.0]);
    assert_eq!(counting(()).mean(&[])?.item()?, 0.0);
    Ok(())
}

#[test]
fn softmax_of_extremes() -> Result<()> {
    let row = |x: &[f64]| values(&Tensor::from_slice(x, [x.len()], device()).unwrap().softmax().unwrap());
    assert_eq!(row(&[1e300, 1e300]), [0.5, 0.5]);
    assert_eq!(row(&[-1e300, 0.0]), [0.0, 1.0]);
    assert_eq!(row(&[f64::NEG_INFINITY, 3.0]), [0.0, 1.0]);
    assert_eq!(row(&[f64::MIN, f64::MIN, f64::MIN, f64::MIN]), [0.25; 4]);
    assert!(row(&[f64::NEG_INFINITY; 2]).iter().all(|x| x.is_nan()), "as in PyTorch");
    for position in [0, 5, 16, 33, 40] {
        let mut x = vec![0.5; 41];
        x[position] = f64::NAN;
        assert!(row(&x).iter().all(|x| x.is_nan()), "a NaN at {position} shows");
    }
    // In half precision the quotient is rounded once.
    let x = Tensor::from_slice(&[0.0f32, -0.3, -7.3, -11.1], [4], device())?.to_dtype(DType::BF16)?;
    let exact: Vec<f64> = values(&x.to_dtype(DType::F64)?.softmax()?);
    for (got, exact) in values(&x.softmax()?).iter().zip(&exact) {
        assert_eq!(*got, bf16::from_f64(*exact).to_f64());
    }
    Ok(())
}

#[test]
fn display_shows_values() -> Result<()> {
    let text = |x: &dyn std::fmt::Display| x.to_string().replace(&device().to_string(), "cpu");
    let x = Tensor::from_slice(&[1.0f32, -2.5, 0.0, 1e-7, 123456.0, f32::NAN], [2, 3], device())?;
    assert_eq!(text(&x), "[[1.0000, -2.5000, 0.0000],\n [1.0000e-7, 1.2346e5, NaN]]\n[2, 3] f32 cpu");
    let x = counting([2, 2, 2]);
    assert_eq!(
        text(&x),
        "[[[0.0000, 1.0000],\n  [2.0000, 3.0000]],\n [[4.0000, 5.0000],\n  [6.0000, 7.0000]]]\n[2, 2, 2] f64 cpu"
    );
    let long = Tensor::arange(100, device())?;
    assert_eq!(text(&long), "[0, 1, 2, …, 97, 98, 99]\n[100] i64 cpu");
    assert_eq!(text(&Tensor::arange(7, device())?), "[0, 1, 2, 3, 4, 5, 6]\n[7] i64 cpu");
    let rows = counting([100, 1]);
    assert_eq!(
        text(&rows),
        "[[0.0000],\n [1.0000],\n [2.0000], …,\n [97.0000],\n [98.0000],\n [99.0000]]\n[100, 1] f64 cpu"
    );
    assert_eq!(text(&counting(())), "0.0000\n[] f64 cpu");
    assert_eq!(text(&counting([2, 0])), "[[],\n []]\n[2, 0] f64 cpu");
    let flags = Tensor::from_slice(&[true, false], [2], device())?;
    assert_eq!(text(&flags), "[true, false]\n[2] bool cpu");
    let large = Tensor::from_slice(&[(1i64 << 53) + 1, i64::MIN], [2], device())?;
    assert_eq!(text(&large), "[9007199254740993, -9223372036854775808]\n[2] i64 cpu");
    Ok(())
}

#[test]
fn debug_is_one_line_of_facts() -> Result<()> {
    let text = |x: &dyn std::fmt::Debug| format!("{x:?}").replace(&device().to_string(), "cpu");
    let x = counting([2, 3]);
    assert_eq!(text(&x), "Tensor([2, 3] f64 cpu [[0.0000, 1.0000, 2.0000], [3.0000, 4.0000, 5.0000]])");
    assert_eq!(text(&counting([3, 3])), "Tensor([3, 3] f64 cpu)");
    assert_eq!(text(&counting([3, 4]).transpose(0, 1)?), "Tensor([4, 3] f64 cpu strides [1, 4])");
    assert_eq!(text(&Tensor::scalar(true, device())?), "Tensor([] bool cpu true)");
    Ok(())
}

#[test]
fn errors_read_well() {
    let index = |limit| Error::new(ErrorKind::Index { op: "embedding", what: "token", index: 7, limit }).to_string();
    assert_eq!(index(5), "embedding: token 7 is out of range, expected 0 to 4");
    assert!(index(0).contains("token 7") && !index(0).contains("-1"));
    let error = Error::new(ErrorKind::Option { key: "heads".into(), why: "is 0".into() })
        .context("layers.3")
        .context("decoder");
    assert_eq!(error.to_string(), "decoder.layers.3: option `heads`: is 0");
    assert_eq!(error.place(), "decoder.layers.3");
    assert!(matches!(error.kind(), ErrorKind::Option { .. }) && std::error::Error::source(&error).is_none());
    let missing = x_transformers::io::read_safetensors("there-is-no-such-file").expect_err("no file");
    assert_eq!(missing.io_kind(), Some(std::io::ErrorKind::NotFound));
    assert!(std::error::Error::source(&missing).is_some_and(|source| source.is::<std::io::Error>()), "{missing}");
}
