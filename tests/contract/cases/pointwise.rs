use x_transformers::{DType, Gradcheck, Result, Tensor, ops};

use crate::case::{Array, Case, Input};

/// A function of one number.
#[derive(Clone, Copy)]
pub struct Unary {
    pub name: &'static str,
    range: (f64, f64),
    pub reference: fn(f64) -> f64,
    /// If `true`, the slope jumps or has a kink at 0.
    kink: bool,
    /// If `true`, integers are an error.
    floats_only: bool,
}

/// A function, the range that its inputs are drawn from, and its definition.
const fn unary(name: &'static str, range: (f64, f64), reference: fn(f64) -> f64) -> Unary {
    Unary { name, range, reference, kink: false, floats_only: false }
}

impl Unary {
    const fn kink(self) -> Self {
        Self { kink: true, ..self }
    }

    const fn floats_only(self) -> Self {
        Self { floats_only: true, ..self }
    }

    fn run(self) -> fn(&Tensor) -> Result<Tensor> {
        ops::UNARY.iter().find(|row| row.0 == self.name).expect("a row of ops::UNARY").1
    }

    /// The step of differences: small where one that crosses the kink would be off.
    pub fn step(self) -> f64 {
        if self.kink { 1e-6 } else { Gradcheck::default().step }
    }

    /// A bias for sums with the inputs: small at a kink, so that no sum is exactly there.
    pub fn bias(self, features: usize, low: f64, high: f64) -> Input {
        if self.kink { Input::between(&[features], 3e-4, 6e-4) } else { Input::between(&[features], low, high) }
    }

    fn cases(self) -> Vec<Case> {
        let (run, reference) = (self.run(), self.reference);
        let case = |name: String, input: Input| {
            Case::new(
                self.name,
                name,
                vec![input],
                move |x| run(&x[0]),
                move |x| Array::from_fn(&x[0].shape, |i| reference(x[0].at(i))),
            )
        };
        // Short, odd, empty, scalar, and longer than one task.
        let shapes: [&[usize]; 5] = [&[3, 5], &[0, 4], &[], &[1], &[5, 7001]];
        let floats = |shape: &[usize]| Input::between(shape, self.range.0, self.range.1);
        let mut cases: Vec<Case> =
            shapes.iter().map(|shape| case(format!("{shape:?}"), floats(shape)).step(self.step())).collect();
        if !self.floats_only {
            // Computed in f32 whatever the type of the other inputs would be.
            cases.push(case("integers".to_string(), Input::int(&[3, 7], 5)).tolerance(1e6));
        }
        cases
    }
}

/// Every function of one number.
pub const UNARY: &[Unary] = &[
    unary("neg", (-2.0, 2.0), |x| -x),
    unary("exp", (-3.0, 3.0), f64::exp),
    unary("ln", (0.5, 4.0), f64::ln),
    unary("sqrt", (0.5, 4.0), f64::sqrt),
    unary("square", (-2.0, 2.0), |x| x * x),
    unary("sigmoid", (-6.0, 6.0), |x| 1.0 / (1.0 + (-x).exp())),
    unary("tanh", (-6.0, 6.0), f64::tanh),
    unary("erf", (-2.5, 2.5), |x| 2.0 * normal_cdf(x * std::f64::consts::SQRT_2) - 1.0),
    unary("cos", (-6.0, 6.0), f64::cos),
    unary("relu", (-2.0, 2.0), |x| x.max(0.0)).kink(),
    unary("relu_squared", (-2.0, 2.0), |x| x.max(0.0).powi(2)).kink().floats_only(),
    // Below, Φ cancels and a single element cannot hold a relative bound.
    unary("gelu", (-1.5, 4.0), |x| x * normal_cdf(x)).floats_only(),
    unary("gelu_tanh", (-4.0, 4.0), |x| {
        0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
    })
    .floats_only(),
    unary("silu", (-4.0, 4.0), |x| x / (1.0 + (-x).exp())).floats_only(),
    unary("quick_gelu", (-4.0, 4.0), |x| x / (1.0 + (-1.702 * x).exp())).floats_only(),
];

fn binary(
    op: &'static str,
    second: (f64, f64),
    run: fn(&Tensor, &Tensor) -> Result<Tensor>,
    reference: fn(f64, f64) -> f64,
) -> Vec<Case> {
    let shapes: [(&[usize], &[usize], &[usize]); 8] = [
        (&[3, 5], &[3, 5], &[3, 5]),
        (&[3, 5], &[5], &[3, 5]),
        (&[2, 1, 4], &[3, 1], &[2, 3, 4]),
        (&[], &[2, 3], &[2, 3]),
        (&[2, 0, 3], &[1, 3], &[2, 0, 3]),
        (&[1, 1, 2, 1, 3, 1], &[2, 1, 1, 2, 1, 2], &[2, 1, 2, 2, 3, 2]),
        (&[7, 6001], &[7, 1], &[7, 6001]),
        (&[1], &[1, 1], &[1, 1]),
    ];
    let case = |&(a, b, out): &(&'static [usize], &'static [usize], &'static [usize])| {
        Case::new(
            op,
            format!("{a:?} {b:?}"),
            vec![Input::float(a), Input::between(b, second.0, second.1)],
            move |x| run(&x[0], &x[1]),
            move |x| Array::from_fn(out, |i| reference(x[0].at(i), x[1].at(i))),
        )
    };
    shapes.iter().map(case).collect()
}

/// Φ by the series of Marsaglia (2004): no erf that the op could share.
fn normal_cdf(x: f64) -> f64 {
    let (mut sum, mut term, mut n) = (x, x, 1.0);
    while term.abs() > 1e-18 * sum.abs() {
        n += 2.0;
        term *= x * x / n;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

fn comparisons() -> Vec<Case> {
    type Op = (&'static str, fn(&Tensor, &Tensor) -> Result<Tensor>, fn(f64, f64) -> bool);
    let float: [Op; 6] = [
        ("eq", Tensor::eq, |a, b| a == b),
        ("ne", Tensor::ne, |a, b| a != b),
        ("lt", Tensor::lt, |a, b| a < b),
        ("le", Tensor::le, |a, b| a <= b),
        ("gt", Tensor::gt, |a, b| a > b),
        ("ge", Tensor::ge, |a, b| a >= b),
    ];
    let logic: [Op; 2] = [
        ("logical_and", Tensor::logical_and, |a, b| a != 0.0 && b != 0.0),
        ("logical_or", Tensor::logical_or, |a, b| a != 0.0 || b != 0.0),
    ];
    let case = |(op, run, reference): Op, name: &str, input: fn(&[usize]) -> Input| {
        Case::new(
            op,
            name,
            vec![input(&[4, 1, 5]), input(&[3, 5])],
            move |x| run(&x[0].detach(), &x[1].detach()),
            move |x| Array::from_fn(&[4, 3, 5], |i| reference(x[0].at(i), x[1].at(i)) as u8 as f64),
        )
    };
    let floats = |shape: &[usize]| Input::Float { shape: shape.to_vec(), low: -1.0, high: 1.0, grad: false };
    let mut cases = Vec::new();
    for op in float {
        cases.push(case(op, "floats", floats));
        cases.push(case(op, "integers", |shape| Input::int(shape, 3)));
        cases.push(case(op, "booleans", Input::mask));
    }
    cases.extend(logic.map(|op| case(op, "broadcast", Input::mask)));
    cases.push(Case::new(
        "logical_not",
        "odd",
        vec![Input::mask(&[3, 7])],
        |x| x[0].logical_not(),
        |x| Array::from_fn(&[3, 7], |i| 1.0 - x[0].at(i)),
    ));
    cases
}

/// Arithmetic of i64 and bool, with broadcasting.
fn integers() -> Vec<Case> {
    type Op = (&'static str, fn(&Tensor, &Tensor) -> Result<Tensor>, fn(f64, f64) -> f64);
    let ops: [Op; 4] = [
        ("add", Tensor::add, |a, b| a + b),
        ("sub", Tensor::sub, |a, b| a - b),
        ("mul", Tensor::mul, |a, b| a * b),
        ("div", Tensor::div, |a, b| (a as f32 / b as f32) as f64),
    ];
    let binary = ops.map(|(op, run, reference)| {
        Case::new(
            op,
            "integers",
            vec![Input::int(&[4, 1, 5], 9), Input::int(&[3, 5], 9)],
            // No divisor is 0.
            move |x| run(&x[0], &x[1].add(&Tensor::ones((), DType::I64, x[1].device())?)?),
            move |x| Array::from_fn(&[4, 3, 5], |i| reference(x[0].at(i), x[1].at(i) + 1.0)),
        )
    });
    let masks: [Op; 2] = [("add", Tensor::add, f64::max), ("mul", Tensor::mul, f64::min)];
    let masks = masks.map(|(op, run, reference)| {
        Case::new(
            op,
            "booleans",
            vec![Input::mask(&[4, 1, 5]), Input::mask(&[3, 5])],
            move |x| run(&x[0], &x[1]),
            move |x| Array::from_fn(&[4, 3, 5], |i| reference(x[0].at(i), x[1].at(i))),
        )
    });
    binary.into_iter().chain(masks).collect()
}

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new(
            "masked_fill",
            "a larger mask",
            vec![Input::float(&[3, 1]), Input::mask(&[2, 1, 4])],
            |x| x[0].masked_fill(&x[1], -3.0),
            |x| Array::from_fn(&[2, 3, 4], |i| if x[1].at(i) != 0.0 { -3.0 } else { x[0].at(i) }),
        ),
        Case::new(
            "logical_and",
            "numbers",
            vec![Input::int(&[3, 5], 2), Input::Float { shape: vec![5], low: -1.0, high: 1.0, grad: false }],
            |x| x[0].logical_and(&x[1]),
            |x| Array::from_fn(&[3, 5], |i| f64::from(x[0].at(i) != 0.0 && x[1].at(i) != 0.0)),
        ),
        // A divisor that repeats along rows.
        Case::new(
            "div",
            "by one divisor per row",
            vec![Input::float(&[2, 3, 40]), Input::between(&[3, 1], 0.5, 2.0)],
            |x| x[0].div(&x[1]),
            |x| Array::from_fn(&[2, 3, 40], |i| x[0].at(i) / x[1].at(i)),
        ),
        Case::new(
            "affine",
            "odd",
            vec![Input::float(&[3, 5])],
            |x| x[0].affine(1.5, -0.25),
            |x| Array::from_fn(&x[0].shape, |i| x[0].at(i) * 1.5 - 0.25),
        ),
        Case::new(
            "where_cond",
            "broadcast",
            vec![Input::mask(&[3, 1]), Input::float(&[2, 1, 4]), Input::float(&[4])],
            |x| x[0].where_cond(&x[1], &x[2]),
            |x| Array::from_fn(&[2, 3, 4], |i| if x[0].at(i) != 0.0 { x[1].at(i) } else { x[2].at(i) }),
        ),
        Case::new(
            "masked_fill",
            "broadcast",
            vec![Input::float(&[2, 3, 5]), Input::mask(&[3, 1])],
            |x| x[0].masked_fill(&x[1], -3.0),
            |x| Array::from_fn(&[2, 3, 5], |i| if x[1].at(i) != 0.0 { -3.0 } else { x[0].at(i) }),
        ),
    ];
    cases.extend(UNARY.iter().flat_map(|function| function.cases()));
    cases.extend(binary("add", (-2.0, 2.0), Tensor::add, |a, b| a + b));
    cases.extend(binary("sub", (-2.0, 2.0), Tensor::sub, |a, b| a - b));
    cases.extend(binary("mul", (-2.0, 2.0), Tensor::mul, |a, b| a * b));
    cases.extend(binary("div", (0.5, 2.0), Tensor::div, |a, b| a / b));
    cases.extend(comparisons());
    cases.extend(integers());
    cases
}
