//! Matrix products beyond the contract suite: sizes that reach every block and edge, thread counts, instruction levels,
//! special values and bad input.

use crate::levels::at_every_level;
use x_transformers::{DType, Device, Error, ErrorKind, Philox, Result, Tape, Tensor, device::Level};

/// Rows, products and columns: each path of the product, one block and several, with and without edges.
#[cfg(miri)]
const SIZES: [[usize; 3]; 6] = [[1, 70, 40], [3, 60, 37], [5, 33, 17], [70, 9, 65], [2, 530, 9], [13, 40, 20]];
#[cfg(not(miri))]
const SIZES: [[usize; 3]; 12] = [
    [1, 700, 1100],
    [1, 1030, 37],
    [3, 1100, 300],
    [4, 515, 2100],
    [5, 600, 530],
    [60, 1100, 700],
    [300, 1040, 9],
    [1000, 70, 65],
    [130, 513, 129],
    [400, 1100, 600],
    [800, 300, 1300],
    [2100, 40, 70],
];

/// Values of a normal distribution, rounded to the dtype.
fn random(shape: &[usize], dtype: DType, stream: u64) -> Result<Tensor> {
    let random = Philox::new(7, stream);
    Tensor::generate(shape.to_vec(), dtype, &Device::Cpu, |i| random.normal(i as u64))
}

/// The same values with the last two dimensions exchanged in memory.
fn turned(x: &Tensor) -> Result<Tensor> {
    x.transpose(-1, -2)?.contiguous()?.transpose(-1, -2)
}

/// The same values in every second row and column of a larger matrix that is NaN elsewhere.
fn scattered(x: &Tensor) -> Result<Tensor> {
    let [rows, columns] = x.shape()[..] else { panic!("{x:?} is not a matrix") };
    let values = x.to_f64_vec()?;
    let wide = Tensor::generate([rows, 2, columns, 2], x.dtype(), &Device::Cpu, |i| {
        let (row, column) = (i / (4 * columns), i % (2 * columns));
        if i / (2 * columns) % 2 == 0 && column % 2 == 0 { values[row * columns + column / 2] } else { f64::NAN }
    })?;
    wide.select(3, 0)?.select(1, 0)
}

/// `Σ_k a[i, k] · b[k, j]` and `Σ_k |a[i, k] · b[k, j]|` in f64.
struct Expected {
    sums: Vec<f64>,
    magnitudes: Vec<f64>,
    products: usize,
}

impl Expected {
    fn of(a: &Tensor, b: &Tensor) -> Result<Self> {
        let ([m, k], n) = ([a.dim(-2)?, a.dim(-1)?], b.dim(-1)?);
        let (a, b) = (a.to_f64_vec()?, b.to_f64_vec()?);
        let mut expected = Self { sums: vec![0.0; m * n], magnitudes: vec![0.0; m * n], products: k };
        let rows = expected.sums.chunks_exact_mut(n).zip(expected.magnitudes.chunks_exact_mut(n));
        for ((sums, magnitudes), a) in rows.zip(a.chunks_exact(k)) {
            for (a, b) in a.iter().zip(b.chunks_exact(n)) {
                for ((sum, magnitude), b) in sums.iter_mut().zip(magnitudes.iter_mut()).zip(b) {
                    *sum += a * b;
                    *magnitude += (a * b).abs();
                }
            }
        }
        Ok(expected)
    }

    /// Checks every element against the bound that holds for sums in any order.
    fn check(&self, what: &str, y: &Tensor) -> Result<()> {
        let (sum_unit, unit) = match y.dtype() {
            DType::F64 => (f64::EPSILON, f64::EPSILON),
            DType::F32 => (f64::from(f32::EPSILON), f64::from(f32::EPSILON)),
            DType::F16 => (f64::from(f32::EPSILON), 2f64.powi(-10)),
            _ => (f64::from(f32::EPSILON), 2f64.powi(-7)),
        };
        for (index, (y, (sum, magnitude))) in
            y.to_f64_vec()?.into_iter().zip(self.sums.iter().zip(&self.magnitudes)).enumerate()
        {
            let bound = self.products as f64 * sum_unit * magnitude + unit * sum.abs();
            assert!((y - sum).abs() <= bound, "{what}: element {index} is {y}, expected {sum} ± {bound:e}");
        }
        Ok(())
    }
}

#[test]
fn large_sizes_in_every_dtype_and_layout() -> Result<()> {
    for [m, k, n] in SIZES {
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            let (a, b) = (random(&[m, k], dtype, 1)?, random(&[k, n], dtype, 2)?);
            let y = a.matmul(&b)?;
            let what = format!("{m}x{k}x{n} {dtype}");
            Expected::of(&a, &b)?.check(&what, &y)?;
            let bits = y.to_f64_vec()?;
            for (left, right) in [
                (turned(&a)?, b.clone()),
                (a.clone(), turned(&b)?),
                (turned(&a)?, turned(&b)?),
                (scattered(&a)?, scattered(&b)?),
            ] {
                assert!(left.matmul(&right)?.to_f64_vec()? == bits, "{what}: another layout gives other bits");
            }
        }
    }
    Ok(())
}

/// Each kernel for few rows adds in the same order as the kernel for many rows. Only AMX tiles, for bf16, have a different
/// order, and they do not pay off for a few rows.
#[test]
fn rows_do_not_depend_on_how_many_there_are() -> Result<()> {
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
        let fewest = if dtype == DType::BF16 && Level::detected() == Level::Amx { 9 } else { 1 };
        for k in [600, 333, 5] {
            let a = random(&[300, k], dtype, 1)?;
            // Steps or columns next to each other, and columns that fill no vector.
            for b in [random(&[k, 100], dtype, 2)?, random(&[107, k], dtype, 2)?.transpose(0, 1)?] {
                let whole = a.matmul(&b)?;
                for rows in [1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33, 50, 64, 65, 299]
                    .into_iter()
                    .filter(|&rows| rows >= fewest)
                {
                    let part = a.narrow(0, 1, rows)?.matmul(&b)?.to_f64_vec()?;
                    assert!(part == whole.narrow(0, 1, rows)?.to_f64_vec()?, "{rows} rows, {k} steps, {dtype}");
                    let scattered = scattered(&a.narrow(0, 1, rows)?)?.matmul(&b)?.to_f64_vec()?;
                    assert!(part == scattered, "{rows} rows that lie apart, {k} steps, {dtype}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn thread_counts_do_not_change_a_bit() -> Result<()> {
    let on = |threads: usize, a: &Tensor, b: &Tensor| -> Result<Vec<f64>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool of threads");
        pool.install(|| a.matmul(b)?.to_f64_vec())
    };
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        for [m, k, n] in SIZES {
            let (a, b) = (random(&[m, k], dtype, 3)?, random(&[k, n], dtype, 4)?);
            let one = on(1, &a, &b)?;
            assert!(one == on(2, &a, &b)? && one == on(3, &a, &b)?, "{m}x{k}x{n} {dtype}");
            assert!(one == a.matmul(&b)?.to_f64_vec()?, "{m}x{k}x{n} {dtype} from outside of the pool");
        }
        for (left, right) in [([6, 300, 64], [6, 64, 300]), ([40, 16, 24], [40, 24, 16]), ([3, 1, 600], [3, 600, 700])]
        {
            let (a, b) = (random(&left, dtype, 3)?, random(&right, dtype, 4)?);
            let one = on(1, &a, &b)?;
            assert!(one == on(2, &a, &b)? && one == on(3, &a, &b)?, "batch {left:?} {right:?} {dtype}");
        }
    }
    Ok(())
}

#[test]
fn batches_equal_their_items() -> Result<()> {
    let sizes = [[5, 70, 33, 50], [40, 16, 24, 16], [3, 1, 600, 700], [2, 400, 530, 300]];
    let small = |&[batch, m, k, n]: &[usize; 4]| !cfg!(miri) || batch * m * k * n < 600_000;
    for [batch, m, k, n] in sizes.into_iter().filter(small) {
        let (a, b) = (random(&[batch, m, k], DType::F32, 5)?, random(&[batch, k, n], DType::F32, 6)?);
        let y = a.matmul(&b)?;
        let weight = b.select(0, 0)?;
        let shared = a.matmul(&weight)?;
        for item in 0..batch {
            let (a, b) = (a.select(0, item)?, b.select(0, item)?);
            assert_eq!(y.select(0, item)?.to_vec::<f32>()?, a.matmul(&b)?.to_vec::<f32>()?);
            assert_eq!(shared.select(0, item)?.to_vec::<f32>()?, a.matmul(&weight)?.to_vec::<f32>()?);
        }
    }
    Ok(())
}

/// Run by [`every_instruction_level`] with `XT_CPU` set; alone it covers the level of this processor.
#[test]
fn level_of_this_process() -> Result<()> {
    for [m, k, n] in SIZES {
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            let (a, b) = (random(&[m, k], dtype, 8)?, random(&[k, n], dtype, 9)?);
            let expected = Expected::of(&a, &b)?;
            expected.check(&format!("{m}x{k}x{n} {dtype}"), &a.matmul(&b)?)?;
            expected.check(&format!("{m}x{k}x{n} {dtype} turned"), &turned(&a)?.matmul(&turned(&b)?)?)?;
        }
    }
    Ok(())
}

#[test]
fn every_instruction_level() {
    at_every_level(module_path!(), "level_of_this_process");
}

/// A product of depth 0 is zero, or the term that it is added to; one without rows or columns is empty. Run by
/// [`products_of_depth_zero_at_every_level`] with `XT_CPU` set.
#[test]
fn products_of_depth_zero() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        for &m in if cfg!(miri) { &[0, 1, 13][..] } else { &[0, 1, 3, 12, 13, 40, 130, 300] } {
            for &n in if cfg!(miri) { &[0, 1, 33][..] } else { &[0, 1, 16, 33, 70, 300] } {
                for k in [0, 5] {
                    if k > 0 && m > 0 && n > 0 {
                        continue;
                    }
                    let zeros = vec![0.0; m * n];
                    let what = format!("{m}x{k}x{n} {dtype}");
                    let (a, b) = (random(&[m, k], dtype, 1)?, random(&[k, n], dtype, 2)?);
                    let (at, bt) = (random(&[k, m], dtype, 1)?, random(&[n, k], dtype, 2)?);
                    let (at, bt) = (at.transpose(0, 1)?, bt.transpose(0, 1)?);
                    for (a, b) in [(&a, &b), (&at, &b), (&a, &bt), (&at, &bt)] {
                        let y = a.matmul(b)?;
                        assert_eq!((y.shape().to_vec(), y.to_f64_vec()?), (vec![m, n], zeros.clone()), "{what}");
                    }
                    for batch in [1, 3, 9] {
                        let (a, b) = (random(&[batch, m, k], dtype, 1)?, random(&[batch, k, n], dtype, 2)?);
                        assert_eq!(a.matmul(&b)?.to_f64_vec()?, zeros.repeat(batch), "{what}, batch {batch}");
                        assert_eq!(a.matmul(&bt)?.to_f64_vec()?, zeros.repeat(batch), "{what}, batch {batch}");
                    }
                    let (weight, bias) = (random(&[n, k], dtype, 2)?, random(&[n], dtype, 3)?);
                    let y = a.linear(&weight, Some(&bias))?;
                    assert_eq!(y.to_f64_vec()?, bias.to_f64_vec()?.repeat(m), "{what} with a bias");
                    assert_eq!(a.linear(&weight, None)?.to_f64_vec()?, zeros, "{what} linear");
                }
            }
        }
        // Gradients of a layer without inputs, and of one without outputs, which is added to what is there.
        let (x, weight) = (random(&[40, 0], dtype, 1)?.requires_grad()?, random(&[33, 0], dtype, 2)?.requires_grad()?);
        let mut tape = Tape::grad();
        let loss = x.linear(&weight, None)?.sum(&[])?;
        let grads = tape.backward(&loss)?;
        assert_eq!(grads.get(&x).map(|grad| grad.shape().to_vec()), Some(vec![40, 0]));
        assert_eq!(grads.get(&weight).map(|grad| grad.shape().to_vec()), Some(vec![33, 0]));
        drop(tape);
        let (x, weight) = (random(&[40, 33], dtype, 1)?.requires_grad()?, random(&[0, 33], dtype, 2)?.requires_grad()?);
        let mut tape = Tape::grad();
        let nothing = x.linear(&weight, None)?.sum(&[])?;
        let loss = x.sum(&[])?.add(&nothing)?;
        let grads = tape.backward(&loss)?;
        assert_eq!(grads.get(&x).expect("a gradient").to_f64_vec()?, [1.0; 40 * 33], "{dtype}");
    }
    Ok(())
}

#[test]
fn products_of_depth_zero_at_every_level() {
    at_every_level(module_path!(), "products_of_depth_zero");
}

#[test]
fn linear_equals_its_formula_forward_and_backward() -> Result<()> {
    for dtype in [DType::F64, DType::F32] {
        // The rows of `x` are strided but uniform, so that they make one matrix without a copy.
        let x = random(&[4, 90, 2, 330], dtype, 10)?.select(2, 1)?.requires_grad()?;
        let weight = random(&[150, 330], dtype, 11)?.requires_grad()?;
        let bias = random(&[150], dtype, 12)?.requires_grad()?;
        let cotangent = random(&[4, 90, 150], dtype, 13)?;
        let mut tape = Tape::grad();
        let y = x.linear(&weight, Some(&bias))?;
        let grads = tape.backward_with(&y, &cotangent)?;
        let flat = |x: &Tensor| x.detach().reshape([360, x.dim(-1)?]);

        let repeated = bias.detach().expand([360, 150])?.to_f64_vec()?;
        let mut expected = Expected::of(&flat(&x)?, &weight.detach().transpose(0, 1)?)?;
        expected.sums.iter_mut().zip(&repeated).for_each(|(sum, bias)| *sum += bias);
        expected.magnitudes.iter_mut().zip(&repeated).for_each(|(sum, bias)| *sum += bias.abs());
        expected.check("y", &y)?;
        let grad = |leaf: &Tensor| grads.get(leaf).cloned().expect("a gradient");
        Expected::of(&flat(&cotangent)?, &weight.detach())?.check("dx", &grad(&x))?;
        Expected::of(&flat(&cotangent)?.transpose(0, 1)?, &flat(&x)?)?.check("dW", &grad(&weight))?;
        let ones = Tensor::ones([1, 360], dtype, &Device::Cpu)?;
        Expected::of(&ones, &flat(&cotangent)?)?.check("db", &grad(&bias))?;
    }
    Ok(())
}

#[test]
fn products_with_nan_and_infinity_are_those_of_ieee_arithmetic() -> Result<()> {
    let sizes = [[1, 40, 70], [3, 530, 20], [20, 40, 70], [200, 530, 200]];
    for [m, k, n] in sizes.into_iter().filter(|[m, ..]| !cfg!(miri) || *m < 100) {
        // Column 0 of A is zero but row 0 of B is not finite: the products are NaN, not skipped.
        let a = Tensor::generate([m, k], DType::F32, &Device::Cpu, |i| if i % k == 0 { 0.0 } else { 1.0 })?;
        let b = Tensor::generate([k, n], DType::F32, &Device::Cpu, |i| match i {
            0 => f64::NAN,
            1 => f64::INFINITY,
            _ if i == n + 2 => f64::INFINITY,
            _ => 1.0,
        })?;
        for (a, b) in [(a.clone(), b.clone()), (turned(&a)?, turned(&b)?)] {
            for row in a.matmul(&b)?.to_vec::<f32>()?.chunks_exact(n) {
                assert!(row[0].is_nan() && row[1].is_nan() && row[2] == f32::INFINITY, "{m}x{k}x{n}: {:?}", &row[..4]);
                assert!(row[3..].iter().all(|&y| y == (k - 1) as f32), "{m}x{k}x{n}");
            }
        }
    }
    Ok(())
}

#[test]
fn bad_input_is_a_typed_error() -> Result<()> {
    let zeros = |shape: &[usize]| Tensor::zeros(shape.to_vec(), DType::F32, &Device::Cpu);
    let (a, half) = (zeros(&[2, 3])?, zeros(&[3, 4])?.to_dtype(DType::BF16)?);
    let message = |result: Result<Tensor>| result.map(|y| format!("{y:?}")).map_err(|error| error.to_string());

    assert!(matches!(a.matmul(&zeros(&[4, 3])?).map_err(Error::into_kind), Err(ErrorKind::Shape { op: "matmul", .. })));
    assert_eq!(
        message(a.matmul(&zeros(&[4, 5])?)),
        Err("matmul: cannot multiply [2, 3] by [4, 5]: inner dimensions 3 and 4 differ".into())
    );
    assert!(matches!(a.matmul(&zeros(&[4])?).map_err(Error::into_kind), Err(ErrorKind::Shape { .. })));
    assert!(matches!(
        zeros(&[2, 2, 3])?.matmul(&zeros(&[3, 3, 4])?).map_err(Error::into_kind),
        Err(ErrorKind::Shape { .. })
    ));
    assert!(matches!(a.matmul(&half).map_err(Error::into_kind), Err(ErrorKind::DType { .. })));
    let tokens = Tensor::arange(6, &Device::Cpu)?.reshape([2, 3])?;
    assert!(matches!(tokens.matmul(&tokens.transpose(0, 1)?).map_err(Error::into_kind), Err(ErrorKind::DType { .. })));

    assert!(matches!(
        a.linear(&zeros(&[5, 4])?, None).map_err(Error::into_kind),
        Err(ErrorKind::Shape { op: "linear", .. })
    ));
    assert!(matches!(
        a.linear(&zeros(&[4])?, None).map_err(Error::into_kind),
        Err(ErrorKind::Shape { op: "linear", .. })
    ));
    assert!(matches!(
        zeros(&[])?.linear(&zeros(&[3, 3])?, None).map_err(Error::into_kind),
        Err(ErrorKind::Shape { op: "linear", .. })
    ));
    assert!(matches!(
        a.linear(&zeros(&[5, 3])?, Some(&zeros(&[4])?)).map_err(Error::into_kind),
        Err(ErrorKind::Shape { op: "linear", .. })
    ));
    assert!(matches!(
        a.linear(&half.transpose(0, 1)?, None).map_err(Error::into_kind),
        Err(ErrorKind::DType { op: "linear", .. })
    ));
    Ok(())
}
