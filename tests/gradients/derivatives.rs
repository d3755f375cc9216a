//! Elementwise ops and their gradients at the ends of the ranges: small, large, infinite and NaN, in every float type.
//!
//! Finite values are exact (mpmath, 60 digits), those at ±∞ and NaN are PyTorch 2.15's.

use crate::common::device;
use crate::levels::at_every_level;
use x_transformers::{DType, Device, Result, Tape, Tensor, ops::Activation};

const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];
const NAN: f64 = f64::NAN;
const INF: f64 = f64::INFINITY;

/// Enough copies of each number for whole vectors and a remainder.
const COPIES: usize = 37;

fn spread(values: &[f64], dtype: DType) -> Result<Tensor> {
    Tensor::generate([values.len(), COPIES], dtype, device(), |i| values[i / COPIES])
}

/// Returns, for each number, the value of `op` and the gradient of its input under the gradient `g`; all copies must
/// agree.
fn value_and_gradient(
    op: impl Fn(&Tensor) -> Result<Tensor>,
    x: &[f64],
    g: f64,
    dtype: DType,
) -> Result<Vec<[f64; 2]>> {
    let leaf = spread(x, dtype)?.requires_grad()?;
    let mut tape = Tape::grad();
    let y = op(&leaf)?;
    let grads = tape.backward_with(&y, &Tensor::full(*y.shape(), g, dtype, device())?)?;
    let both = [y.to_f64_vec()?, grads.get(&leaf).expect("a gradient").to_f64_vec()?];
    let of = |i: usize, values: &[f64]| {
        let copies = &values[i * COPIES..][..COPIES];
        let same = copies.iter().all(|copy| copy == &copies[0] || copy.is_nan() && copies[0].is_nan());
        assert!(same, "{dtype}: {} differs along a row: {copies:?}", x[i]);
        copies[0]
    };
    Ok((0..x.len()).map(|i| [of(i, &both[0]), of(i, &both[1])]).collect())
}

/// The smallest normal number of a type, and the relative error of its roundings.
fn limits(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F64 => (f64::MIN_POSITIVE, 1e-9),
        DType::F32 => (f32::MIN_POSITIVE as f64, 2e-6),
        DType::F16 => (6.2e-5, 3e-3),
        _ => (f32::MIN_POSITIVE as f64, 2e-2),
    }
}

/// Returns `true` if a result equals the expected one up to rounding, `absolute` and the smallest normal number.
fn agrees(actual: f64, expected: f64, absolute: f64, dtype: DType) -> bool {
    let (smallest, relative) = limits(dtype);
    let expected = Tensor::scalar(expected, &Device::Cpu).and_then(|x| x.to_dtype(dtype)?.item()).expect("a number");
    actual == expected
        || (actual.is_nan() && expected.is_nan())
        || (actual - expected).abs() <= relative * expected.abs() + absolute + smallest
}

type Op = fn(&Tensor) -> Result<Tensor>;

/// Name, op, its absolute error in units of the roundings, and `[x, y, dy/dx]`.
type Row = (&'static str, Op, f64, &'static [[f64; 3]]);

const TABLE: &[Row] = &[
    (
        "relu",
        Tensor::relu,
        0.0,
        &[
            [0., 0., 0.],
            [1e-7, 1e-7, 1.],
            [-1e-7, 0., 0.],
            [6e4, 6e4, 1.],
            [-6e4, 0., 0.],
            [INF, INF, 1.],
            [-INF, 0., 0.],
            [NAN, NAN, 1.],
        ],
    ),
    (
        "relu_squared",
        Tensor::relu_squared,
        0.0,
        &[[0., 0., 0.], [3., 9., 6.], [-3., 0., 0.], [-6e4, 0., 0.], [INF, INF, INF], [-INF, 0., 0.], [NAN, NAN, NAN]],
    ),
    (
        "sigmoid",
        Tensor::sigmoid,
        0.0,
        &[
            [0., 0.5, 0.25],
            [1., 0.7310585786, 0.1966119332],
            [-1., 0.2689414214, 0.1966119332],
            [9., 0.9998766054, 1.233793498e-4],
            [20., 0.9999999979, 2.061153614e-9],
            [-4., 1.798620996e-2, 1.766270621e-2],
            [-20., 2.061153618e-9, 2.061153614e-9],
            [100., 1., 3.720075976e-44],
            [6e4, 1., 0.],
            [-6e4, 0., 0.],
            [INF, 1., 0.],
            [-INF, 0., 0.],
            [NAN, NAN, NAN],
        ],
    ),
    (
        "tanh",
        Tensor::tanh,
        0.0,
        &[
            [0., 0., 1.],
            [1., 0.7615941560, 0.4199743416],
            [-1., -0.7615941560, 0.4199743416],
            [-4., -0.9993292997, 1.340950683e-3],
            [9., 0.9999999695, 6.091991712e-8],
            [20., 1., 1.699341702e-17],
            [-20., -1., 1.699341702e-17],
            [6e4, 1., 0.],
            [-6e4, -1., 0.],
            [INF, 1., 0.],
            [-INF, -1., 0.],
            [NAN, NAN, NAN],
        ],
    ),
    (
        "gelu",
        Tensor::gelu,
        0.5,
        &[
            [0., 0., 0.5],
            [1., 0.8413447461, 1.083315471],
            [-1., -0.1586552539, -8.331547059e-2],
            [9., 9., 1.],
            [20., 20., 1.],
            [-4., -1.266849673e-4, -5.036496612e-4],
            [-20., 0., 0.],
            [6e4, 6e4, 1.],
            [-6e4, 0., 0.],
            [INF, INF, NAN],
            [-INF, NAN, NAN],
            [NAN, NAN, NAN],
        ],
    ),
    (
        "gelu_tanh",
        Tensor::gelu_tanh,
        0.5,
        &[
            [0., 0., 0.5],
            [1., 0.8411919906, 1.082964084],
            [-1., -0.1588080094, -8.296408385e-2],
            [9., 9., 1.],
            [20., 20., 1.],
            [-4., -7.024594819e-5, -3.351231971e-4],
            [-20., 0., 0.],
            [6e4, 6e4, 1.],
            [-6e4, 0., 0.],
            [INF, INF, NAN],
            [-INF, NAN, NAN],
            [NAN, NAN, NAN],
        ],
    ),
    (
        "silu",
        Tensor::silu,
        0.5,
        &[
            [0., 0., 0.5],
            [1., 0.7310585786, 0.9276705119],
            [-1., -0.2689414214, 7.232948813e-2],
            [9., 8.998889449, 1.000987020],
            [20., 19.99999996, 1.000000039],
            [-4., -7.194483985e-2, -5.266461489e-2],
            [-20., -4.122307236e-8, -3.916191866e-8],
            [6e4, 6e4, 1.],
            [-6e4, 0., 0.],
            [INF, INF, NAN],
            [-INF, NAN, NAN],
            [NAN, NAN, NAN],
        ],
    ),
    ("exp", Tensor::exp, 0.0, &[[0., 1., 1.], [-6e4, 0., 0.], [INF, INF, INF], [-INF, 0., 0.], [NAN, NAN, NAN]]),
    (
        "ln",
        Tensor::ln,
        0.0,
        &[[0., -INF, INF], [1., 0., 1.], [-1., NAN, -1.], [INF, INF, 0.], [-INF, NAN, -0.], [NAN, NAN, NAN]],
    ),
    (
        "sqrt",
        Tensor::sqrt,
        0.0,
        &[
            [0., 0., INF],
            [-0., -0., -INF],
            [4., 2., 0.25],
            [-1., NAN, NAN],
            [INF, INF, 0.],
            [-INF, NAN, NAN],
            [NAN, NAN, NAN],
        ],
    ),
    (
        "square",
        Tensor::square,
        0.0,
        &[[0., 0., 0.], [-3., 9., -6.], [INF, INF, INF], [-INF, INF, -INF], [NAN, NAN, NAN]],
    ),
];

/// Numbers only in the range of f64, f32 and bf16: zeros in the tail, and no NaN from an overflow inside a derivative.
const FAR: [f64; 4] = [1e20, -1e20, 1e30, -1e30];

#[test]
fn values_and_gradients_at_the_ends() -> Result<()> {
    for dtype in FLOATS {
        for &(name, op, units, rows) in TABLE {
            let x: Vec<f64> = rows.iter().map(|row| row[0]).collect();
            for ([y, dx], &[x, expected_y, expected_dx]) in
                value_and_gradient(op, &x, 1.0, dtype)?.into_iter().zip(rows)
            {
                let absolute = units * limits(dtype).1;
                assert!(agrees(y, expected_y, absolute, dtype), "{name} {dtype} at {x:e}: {y:e}, not {expected_y:e}");
                assert!(
                    agrees(dx, expected_dx, absolute, dtype),
                    "{name}' {dtype} at {x:e}: {dx:e}, not {expected_dx:e}"
                );
            }
        }
        if dtype == DType::F16 {
            continue;
        }
        let gates: [(&str, Op); 4] =
            [("gelu", Tensor::gelu), ("gelu_tanh", Tensor::gelu_tanh), ("silu", Tensor::silu), ("relu", Tensor::relu)];
        for (name, op) in gates {
            let results = value_and_gradient(op, &FAR, 1.0, dtype)?;
            for ([y, dx], x) in results.into_iter().zip(FAR) {
                let expected = if x > 0.0 { [x, 1.0] } else { [0.0, 0.0] };
                assert!(agrees(y, expected[0], 0.0, dtype), "{name} {dtype} at {x:e}: {y:e}");
                assert_eq!(dx, expected[1], "{name}' {dtype} at {x:e}");
            }
        }
    }
    Ok(())
}

/// A gate of 0 is exactly 0 for every value. Both orders of the halves, with and without a bias.
#[test]
fn gates_are_closed_in_the_tail() -> Result<()> {
    use Activation::{Gelu, GeluTanh, QuickGelu, Relu, ReluSquared, Sigmoid, Silu};
    let gates = [Gelu, GeluTanh, QuickGelu, Relu, ReluSquared, Sigmoid, Silu];
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        for activation in gates {
            // Half of the features are the value, the others the gate.
            let large = Tensor::full([3, COPIES], 1e30, dtype, device())?;
            let x = Tensor::cat(&[&large, &Tensor::full([3, COPIES], -1e6, dtype, device())?], 1)?;
            let bias = Tensor::zeros([2 * COPIES], dtype, device())?;
            for biased in [false, true] {
                let leaf = x.requires_grad()?;
                let mut tape = Tape::grad();
                let y = if biased { leaf.add_glu(&bias, activation)? } else { leaf.glu(activation)? };
                let grads = tape.backward_with(&y, &Tensor::ones(*y.shape(), dtype, device())?)?;
                assert!(y.to_f64_vec()?.iter().all(|&y| y == 0.0), "{activation:?} {dtype}: {y}");
                let dx = grads.get(&leaf).expect("a gradient");
                assert!(dx.to_f64_vec()?.iter().all(|&dx| dx == 0.0), "{activation:?} {dtype}: {dx}");
            }
            let (value, zero) = (x.narrow(1, COPIES, COPIES)?, Tensor::zeros([COPIES], dtype, device())?);
            let y = value.add_activation(&zero, activation)?;
            assert!(y.to_f64_vec()?.iter().all(|&y| y == 0.0), "{activation:?} {dtype}: {y}");
        }
    }
    // A closed gate passes no gradient, however large the gated value; torch: relu(u)² v.
    for activation in [Relu, ReluSquared] {
        let x = Tensor::from_slice(&[INF, 3.0, -1.0, -2.0], [4], device())?.requires_grad()?;
        let mut tape = Tape::grad();
        let y = x.glu(activation)?;
        let grads = tape.backward_with(&y, &Tensor::ones([2], DType::F64, device())?)?;
        assert_eq!(grads.get(&x).expect("a gradient").to_f64_vec()?, [0.0; 4], "{activation:?}");
    }
    Ok(())
}

/// ReLU keeps NaN, and lets the gradient pass there, alone and in the fused ops.
#[test]
fn nan_shows_through_activations() -> Result<()> {
    for dtype in FLOATS {
        for &activation in Activation::ALL {
            for at in [0, 15, 36] {
                let x = Tensor::generate([2 * COPIES], dtype, device(), |i| if i % COPIES == at { NAN } else { 1.0 })?;
                let zero = Tensor::zeros([2 * COPIES], dtype, device())?;
                let nan = |y: Tensor| y.to_f64_vec().map(|y| y.iter().filter(|y| y.is_nan()).count());
                assert_eq!(nan(x.add_activation(&zero, activation)?)?, 2, "{activation:?} {dtype}");
                assert_eq!(nan(x.glu(activation)?)?, 1, "{activation:?} {dtype}");
                assert_eq!(nan(activation.of(&x)?)?, 2, "{activation:?} {dtype}");
            }
        }
        for g in [INF, 2.0] {
            let both = value_and_gradient(Tensor::relu, &[NAN, -1.0, 0.0, 1.0], g, dtype)?;
            let dx: Vec<f64> = both.iter().map(|both| both[1]).collect();
            assert_eq!(dx, [g, 0.0, 0.0, g], "{dtype}: zero only where x ≤ 0");
        }
    }
    Ok(())
}

/// No factor of a gradient leaves the range of the type where the gradient does not: op, x, g, gradient.
#[test]
fn factors_of_gradients_stay_in_range() -> Result<()> {
    type Case = (&'static str, Op, DType, [f64; 3]);
    let cases: [Case; 12] = [
        ("ln", Tensor::ln, DType::F32, [1e-40, 1e-10, 1e30]),
        ("ln", Tensor::ln, DType::F64, [1e-310, 1e-10, 1e300]),
        ("ln", Tensor::ln, DType::F16, [6e-8, 1e-3, 1.678e4]),
        ("square", Tensor::square, DType::F32, [3e38, 1e-10, 6e28]),
        ("square", Tensor::square, DType::BF16, [3e38, 1e-10, 6e28]),
        ("square", Tensor::square, DType::F64, [1.5e308, 1e-10, 3e298]),
        ("relu_squared", Tensor::relu_squared, DType::F32, [3e38, 1e-10, 6e28]),
        ("relu_squared", Tensor::relu_squared, DType::F64, [1.5e308, 1e-10, 3e298]),
        ("sqrt", Tensor::sqrt, DType::F32, [1e-38, 1e19, 5e37]),
        ("tanh", Tensor::tanh, DType::F32, [0.0, 3e38, 3e38]),
        ("sigmoid", Tensor::sigmoid, DType::F32, [40.0, 1e30, 4.248354255e12]),
        ("tanh", Tensor::tanh, DType::F16, [8.0, 6e4, 2.700841192e-2]),
    ];
    for (name, op, dtype, [x, g, expected]) in cases {
        let dx = value_and_gradient(op, &[x], g, dtype)?[0][1];
        // Numbers below the normal range have few digits.
        let relative = if dtype == DType::F16 { 2e-2 } else { limits(dtype).1.max(1e-5) };
        assert!(
            (dx / expected - 1.0).abs() < relative,
            "{name} {dtype} at {x:e} times {g:e}: {dx:e}, not {expected:e}"
        );
    }
    Ok(())
}

/// −g a / b² of these numbers.
fn by_divisor(g: f64, a: f64, b: f64, dtype: DType) -> Result<f64> {
    let (a, leaf) = (spread(&[a], dtype)?, spread(&[b], dtype)?.requires_grad()?);
    let mut tape = Tape::grad();
    let y = a.div(&leaf)?;
    let grads = tape.backward_with(&y, &Tensor::full(*y.shape(), g, dtype, device())?)?;
    let all = grads.get(&leaf).expect("a gradient").to_f64_vec()?;
    assert!(all.iter().all(|x| *x == all[0] || x.is_nan() && all[0].is_nan()), "{all:?}");
    Ok(all[0])
}

#[test]
fn gradients_by_a_divisor() -> Result<()> {
    let finite = [
        (DType::F16, 1.0, 2e4, 300.0, -0.2222222),
        (DType::F16, 1.0, 6e4, 6e4, -1.6666667e-5),
        (DType::F16, 6e4, 1e-3, 1e-3, -6e7),
        (DType::F16, 1e-3, 1e-4, 1e-4, -10.0),
        (DType::BF16, 1.0, 1e-25, 1e-25, -1e25),
        (DType::BF16, 1e-30, 1e20, 1e-15, -1e20),
        (DType::F32, 1.0, 1e-25, 1e-25, -1e25),
        (DType::F32, 1.0, 1e20, 1e20, -1e-20),
        (DType::F32, 1e30, 1e-25, 1e-10, -1e25),
        (DType::F32, 1e-30, 1e20, 1e-15, -1e20),
        (DType::F32, 1e30, 1e30, 1e20, -1e20),
        (DType::F32, 2.0, 3.0, -4.0, -0.375),
        (DType::F64, 1.0, 1e-250, 1e-200, -1e150),
        (DType::F64, 1e300, 1e300, 1e200, -1e200),
        (DType::F64, 1e-20, 1e-250, 1e-200, -1e130),
        (DType::F64, 1e-300, 1e300, 1e-150, -1e300),
        (DType::F64, 1.0, 1e-310, 1e-310, -INF),
        (DType::F64, -2.0, 3.0, 4.0, 0.375),
    ];
    for (dtype, g, a, b, expected) in finite {
        let actual = by_divisor(g, a, b, dtype)?;
        // Values beyond the range of the type become infinite; operands are rounded to it.
        let limit = if dtype == DType::F16 { 65504.0 } else { f64::MAX };
        let expected: f64 = if f64::abs(expected) > limit { f64::NEG_INFINITY } else { expected };
        let good = actual == expected || (actual / expected - 1.0).abs() < 4.0 * limits(dtype).1;
        assert!(good, "{dtype} {g:e} · {a:e} / {b:e}²: {actual:e}, not {expected:e}");
    }
    // Classes as PyTorch's −g ((a / b) / b), in every type.
    let special = [
        [1., 1., 0., -INF],
        [1., -1., 0., INF],
        [1., 1., -0., -INF],
        [1., 0., 0., NAN],
        [0., 1., 0., NAN],
        [0., 0., 1., 0.],
        [1., INF, 1., -INF],
        [1., INF, INF, NAN],
        [1., 1., INF, 0.],
        [0., INF, 1., NAN],
        [INF, 1., 1., -INF],
        [INF, 0., 1., NAN],
        [INF, 1., INF, NAN],
        [NAN, 1., 1., NAN],
        [1., NAN, 1., NAN],
        [1., 1., NAN, NAN],
    ];
    for dtype in FLOATS {
        for [g, a, b, expected] in special {
            let actual = by_divisor(g, a, b, dtype)?;
            assert!(
                actual == expected || actual.is_nan() && expected.is_nan(),
                "{dtype} {g} {a} {b}: {actual}, not {expected}"
            );
        }
    }
    Ok(())
}

#[test]
fn derivatives_at_every_level() {
    if *device() != Device::Cpu {
        return;
    }
    for test in [
        "values_and_gradients_at_the_ends",
        "gates_are_closed_in_the_tail",
        "nan_shows_through_activations",
        "factors_of_gradients_stay_in_range",
        "gradients_by_a_divisor",
    ] {
        at_every_level(module_path!(), test);
    }
}
