//! Every op at extreme inputs (0, −0, subnormal, largest, infinite, NaN, one of them among ordinary numbers) against
//! PyTorch's classes and exact values, which `table.txt` has.

mod ops;
mod table;

use std::collections::{BTreeMap, BTreeSet};

use table::{Case, Close, Expected, Kind, Symbol};
use x_transformers::{DType, Device, Result, Tape, Tensor, ops::NAMES};

use crate::common::device;

/// Ops that the table leaves out, and why.
const LEFT_OUT: &[(&str, &str)] = &[
    ("logical_and", "takes no floats"),
    ("logical_or", "takes no floats"),
    ("logical_not", "takes no floats"),
    ("packed_linear", "rounds its inputs on the CPU, and has NaN for infinities (src/quantised/products.rs)"),
    ("packed_embedding", "takes no floats"),
    ("sample", "returns an error for NaN and +∞ (tests/sampling.rs)"),
];

/// Documented difference from PyTorch.
struct Deviation {
    /// Prefix of the names of the cases.
    cases: &'static str,
    /// Sentence of the op's documentation in `file`.
    said: &'static str,
    file: &'static str,
}

const fn deviation(cases: &'static str, file: &'static str, said: &'static str) -> Deviation {
    Deviation { cases, said, file }
}

const IN_CROSS_ENTROPY: &str = "src/ops/cross_entropy.rs";
const IN_ATTENTION: &str = "src/ops/attention/mod.rs";
const INFINITE_VALUE: &str = "in half types its gradients are NaN";
const IN_NORM: &str = "src/ops/norm/mod.rs";
const OVERFLOWING_GRADIENT: &str =
    "A gradient that overflows when multiplied by the weight makes its row infinite or NaN";

const DEVIATIONS: &[Deviation] = &[
    deviation("cross_entropy ignored inf", IN_CROSS_ENTROPY, "gradient of ignored rows is 0, even where"),
    deviation("cross_entropy ignored nan", IN_CROSS_ENTROPY, "gradient of ignored rows is 0, even where"),
    deviation("cross_entropy g inf", IN_CROSS_ENTROPY, "An infinite gradient of the loss gives −∞ at the target"),
    deviation("attention v inf", IN_ATTENTION, INFINITE_VALUE),
    deviation("attention v -inf", IN_ATTENTION, INFINITE_VALUE),
    deviation("layer_norm weight 0 max", IN_NORM, OVERFLOWING_GRADIENT),
    deviation("layer_norm weight 0 inf", IN_NORM, OVERFLOWING_GRADIENT),
    deviation("layer_norm g max", IN_NORM, OVERFLOWING_GRADIENT),
    deviation("layer_norm g inf", IN_NORM, OVERFLOWING_GRADIENT),
];

/// Results of the sweep.
#[derive(Default)]
struct Report {
    elements: usize,
    /// Elements where PyTorch overflows on the way, by op: those with the exact value, and those with PyTorch's class.
    exact: BTreeMap<String, usize>,
    torch: BTreeMap<String, usize>,
    failures: Vec<(String, String)>,
}

pub fn sweep() {
    let cases = table::cases();
    let named: BTreeSet<&str> = cases.iter().map(|case| op(&case.name)).collect();
    let left_out: BTreeSet<&str> = LEFT_OUT.iter().map(|(op, _)| *op).collect();
    for name in NAMES {
        assert!(named.contains(name) != left_out.contains(name), "`{name}` must have cases or be left out");
    }
    let filter = std::env::var("XT_CASE").unwrap_or_default();
    let contract = super::cases::all();
    let mut report = Report::default();
    for (index, case) in cases.iter().enumerate().filter(|(_, case)| case.name.contains(&filter)) {
        for (at, (dtype, expected)) in case.results.iter().enumerate() {
            // All of them would take too long on an emulated card.
            if *device() != Device::Cpu && (index + at) % 4 == 0 {
                continue;
            }
            if let Err(error) = check(case, *dtype, expected, &contract, &mut report) {
                report.failures.push((case.name.clone(), format!("{} {dtype}: {error}", case.name)));
            }
        }
    }
    let Report { elements, exact, torch, failures } = report;
    println!(
        "{elements} elements compared; where PyTorch overflows on the way, exact: {exact:?}, as PyTorch: {torch:?}"
    );
    LEFT_OUT.iter().for_each(|(op, why)| println!("left out: {op} {why}"));
    let meant = |name: &str| DEVIATIONS.iter().any(|deviation| name.starts_with(deviation.cases));
    let wrong = failures.iter().filter(|(name, _)| !meant(name));
    let wrong: Vec<&str> = wrong.map(|(_, message)| message.as_str()).collect();
    assert!(wrong.is_empty(), "{} failures:\n{}", wrong.len(), wrong.join("\n"));
    if !filter.is_empty() || *device() != Device::Cpu {
        return;
    }
    for Deviation { cases, said, file } in DEVIATIONS {
        let deviates = failures.iter().any(|(name, _)| name.starts_with(cases));
        assert!(deviates, "`{cases}` agrees with PyTorch and is no longer a deviation");
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let source =
            std::fs::read_to_string(path).expect("a source file").replace("\n    /// ", " ").replace("\n/// ", " ");
        assert!(source.contains(said), "{file} does not say `{said}`, which `{cases}` needs");
    }
}

fn op(name: &str) -> &str {
    name.split(' ').next().unwrap_or_default()
}

fn check(
    case: &Case,
    dtype: DType,
    expected: &[table::List<Expected>],
    contract: &[crate::case::Case],
    report: &mut Report,
) -> Result<()> {
    let inputs = case.inputs.iter().map(|input| tensor(input, dtype)).collect::<Result<Vec<_>>>()?;
    let results = run(case, dtype, &inputs, contract)?;
    assert_eq!(results.len(), expected.len(), "{}: results", case.name);
    for (at, (result, list)) in results.iter().zip(expected).enumerate() {
        let values = result.to_f64_vec()?;
        let expected = list.take(values.len());
        report.elements += values.len();
        let width = result.shape().last().copied().unwrap_or(1).max(1);
        let mut wrong = Vec::new();
        for (row, (values, expected)) in values.chunks(width).zip(expected.chunks(width)).enumerate() {
            let mut room = Room::new(case, at, result.dtype(), dtype, expected);
            for (column, (&value, &expected)) in values.iter().zip(expected).enumerate() {
                room.steepen(case, at, row * width + column, dtype);
                let fits = |symbol: Symbol| room.fits(value, symbol.value(room.symbols));
                let fine = match expected {
                    Expected::Finite => value.is_finite(),
                    Expected::Value(symbol) => fits(symbol),
                    Expected::Either(symbol, torch) => {
                        let as_torch = torch.map_or(value.is_finite(), |torch| same(value, torch));
                        let tally = if as_torch { &mut report.torch } else { &mut report.exact };
                        *tally.entry(op(&case.name).to_string()).or_default() += 1;
                        as_torch || symbol.map_or(value.is_finite(), fits)
                    }
                };
                if !fine {
                    wrong.push(format!("element {} is {value:e}, expected {expected:?}", row * width + column));
                }
            }
        }
        if let Some(first) = wrong.first() {
            let what = if at == 0 { "output".to_string() } else { format!("gradient {}", at - 1) };
            let message = format!("{} {dtype} {what}: {first} ({} of {})", case.name, wrong.len(), values.len());
            report.failures.push((case.name.clone(), message));
        }
    }
    if *device() == Device::Cpu {
        let strided = inputs.iter().map(strided).collect::<Result<Vec<_>>>()?;
        for (at, (packed, strided)) in results.iter().zip(run(case, dtype, &strided, contract)?).enumerate() {
            if !crate::check::same_bits(&packed.to_f64_vec()?, &strided.to_f64_vec()?) {
                let message = format!("{} {dtype} result {at}: other bits for strided inputs", case.name);
                report.failures.push((case.name.clone(), message));
            }
        }
    }
    Ok(())
}

fn same(a: f64, b: f64) -> bool {
    a == b || a.is_nan() && b.is_nan()
}

/// Allowed difference of the values of a row.
struct Room {
    relative: f64,
    absolute: f64,
    eps: f64,
    bits: bool,
    /// The dtype that symbols are numbers of.
    symbols: DType,
}

impl Room {
    fn new(case: &Case, at: usize, dtype: DType, symbols: DType, row: &[Expected]) -> Self {
        // The table has four digits.
        let (relative, eps, normal) = match dtype {
            DType::F16 => (8e-3, 1e-3, 6.2e-5),
            DType::BF16 => (5e-2, 8e-3, 1.2e-38),
            DType::F32 => (1e-3, 2.4e-7, 1.2e-38),
            _ => (1e-3, 4e-16, 2.3e-308),
        };
        let size = |expected: &Expected| match expected {
            Expected::Value(symbol) | Expected::Either(Some(symbol), _) => symbol.value(symbols).abs(),
            _ => 0.0,
        };
        let largest = row.iter().map(size).filter(|size| size.is_finite()).fold(0.0, f64::max);
        let absolute = match case.close {
            Close::Bits => 0.0,
            Close::OfOutput if at > 0 => relative * largest + 8.0 * eps,
            Close::Row | Close::OfOutput => relative * largest + 4.0 * normal,
            Close::Element => normal,
        };
        Self { relative, absolute, eps, bits: case.close == Close::Bits, symbols }
    }

    /// Derivatives are computed from the rounded output: the relative error of a gradient is that of the output.
    fn steepen(&mut self, case: &Case, at: usize, element: usize, dtype: DType) {
        if case.close == Close::Element && at > 0 {
            let steepness = case.cotangent[element % case.cotangent.len()].value(dtype).abs();
            self.absolute = 8.0 * self.eps * if steepness.is_finite() { steepness } else { 1.0 };
        }
    }

    fn fits(&self, value: f64, expected: f64) -> bool {
        same(value, expected)
            || !self.bits && (value - expected).abs() <= self.relative * expected.abs() + self.absolute
    }
}

/// The output, and the gradient of each input that has one.
fn run(case: &Case, dtype: DType, inputs: &[Tensor], contract: &[crate::case::Case]) -> Result<Vec<Tensor>> {
    let differentiated = |(_, input): &(&Tensor, &table::Input)| input.kind == Kind::Differentiated;
    let leaf = |pair: (&Tensor, &table::Input)| {
        if differentiated(&pair) { pair.0.requires_grad() } else { Ok(pair.0.clone()) }
    };
    let leaves = inputs.iter().zip(&case.inputs).map(leaf).collect::<Result<Vec<_>>>()?;
    let mut tape = Tape::grad();
    let output = ops::run(&case.name, &leaves, contract)?;
    let mut results = vec![output.detach()];
    if !case.cotangent.is_empty() {
        let g = |i: usize| case.cotangent[i % case.cotangent.len()].value(dtype);
        // A number of the dtype of the inputs, also where the output has another one.
        let g = Tensor::generate(*output.shape(), dtype, output.device(), g)?.to_dtype(output.dtype())?;
        let grads = tape.backward_with(&output, &g)?;
        for (leaf, _) in leaves.iter().zip(&case.inputs).filter(differentiated) {
            results.push(grads.get(leaf).map_or_else(|| leaf.detach().affine(0.0, 0.0), |grad| Ok(grad.clone()))?);
        }
    }
    Ok(results)
}

fn tensor(input: &table::Input, dtype: DType) -> Result<Tensor> {
    let values: Vec<f64> = input.values.iter().map(|symbol| symbol.value(dtype)).collect();
    let dtype = match input.kind {
        Kind::Differentiated | Kind::Constant => dtype,
        Kind::Int => DType::I64,
        Kind::Bool => DType::Bool,
    };
    Tensor::from_vec(values, &input.shape, device())?.to_dtype(dtype)
}

/// The same values with others between them.
fn strided(x: &Tensor) -> Result<Tensor> {
    let between = Tensor::full(*x.shape(), 1.0, x.dtype(), x.device())?.unsqueeze(-1)?;
    Tensor::cat(&[&x.unsqueeze(-1)?, &between], -1)?.select(-1, 0)
}
