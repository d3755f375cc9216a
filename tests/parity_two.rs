//! Cases of x-transformers 2.31, packed by `tests/parity_two/make.py`: outputs and gradients of PyTorch in f64.
//!
//! Weights and float inputs are eight-bit floats times powers of two, one after the other in the order of their names;
//! of each gradient there are eight sums with drawn signs. `XT_CASE=part of a name` runs a part, `XT_TEST_DEVICE` says
//! where, and `XT_SHARE=3/16` runs every sixteenth case from the third on.

use std::{collections::BTreeMap, path::Path};

use serde_json::Value;
use x_transformers::{
    DType, Device, ParamStore, Result, Tensor, config::Config, io::read_safetensors, models::Model, models::RunOptions,
};
use x_transformers_parity::{Bounds, Case, signed_sums};

type Tensors = BTreeMap<String, Tensor>;

/// Numbers that a gradient is summed up in.
const SUMS: usize = 8;

fn device() -> Device {
    Device::parse(&std::env::var("XT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_string())).unwrap()
}

fn fnv1a(text: &str) -> String {
    let hash = text
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3));
    format!("{hash:016x}")
}

fn shape(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|size| size.as_u64().unwrap() as usize).collect()
}

fn tensor(values: Vec<f64>, shape: Vec<usize>) -> Tensor {
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Flattens nested arrays of whole numbers or truth values, and returns their shape.
fn nested(value: &Value, shape: &mut Vec<usize>, level: usize, into: &mut Vec<i64>) {
    match value {
        Value::Array(values) => {
            if shape.len() == level {
                shape.push(values.len());
            }
            values.iter().for_each(|value| nested(value, shape, level + 1, into));
        }
        Value::Bool(value) => into.push(i64::from(*value)),
        value => into.push(value.as_i64().unwrap()),
    }
}

fn is_bool(value: &Value) -> bool {
    match value {
        Value::Array(values) => values.first().is_some_and(is_bool),
        value => value.is_boolean(),
    }
}

/// A case, whose expected gradients are sums.
struct Packed {
    name: String,
    case: Case,
    gradients: (String, Vec<f64>),
}

/// Puts the values of a case into tensors of the model's shapes.
fn unpack(row: &Value, tensors: &Tensors) -> Result<Packed> {
    let name = row["name"].as_str().unwrap().to_string();
    let values = |part: &str| match tensors.get(&format!("{name}.{part}")) {
        Some(tensor) => tensor.to_f64_vec(),
        None => Ok(Vec::new()),
    };
    let (config, _) = Config::with_call(&row["config"].to_string())?;
    let params = Model::new(&config, &ParamStore::shapes(DType::F32, &Device::Cpu))?.params().clone();
    let shapes: BTreeMap<&str, Vec<usize>> =
        params.iter().map(|(name, param)| (name, param.tensor().shape().to_vec())).collect();
    let names: Vec<&str> = shapes.keys().copied().collect();
    assert_eq!(row["weights"], fnv1a(&names.join("\n")), "{name}: other names of weights: {names:?}");
    let (flat, powers) = (values("weights")?, values("powers")?);
    let mut weights = Tensors::new();
    let mut rest = &flat[..];
    for ((name, shape), power) in shapes.into_iter().zip(powers) {
        let (own, others) = rest.split_at(shape.iter().product());
        rest = others;
        weights.insert(name.to_string(), tensor(own.iter().map(|x| x * power.exp2()).collect(), shape));
    }
    assert!(rest.is_empty(), "{name}: {} weights are left", rest.len());
    let flat = values("inputs")?;
    let mut rest = &flat[..];
    let mut inputs = Tensors::new();
    for (name, value) in row["inputs"].as_object().unwrap() {
        let is_float = value.get(0).is_some_and(Value::is_array)
            && value.get(1).is_some_and(Value::is_i64)
            && value.as_array().is_some_and(|parts| parts.len() == 2);
        let input = if is_float {
            let (shape, power) = (shape(&value[0]), value[1].as_i64().unwrap() as f64);
            let (own, others) = rest.split_at(shape.iter().product());
            rest = others;
            tensor(own.iter().map(|x| x * power.exp2()).collect(), shape)
        } else {
            let (mut shape, mut values) = (Vec::new(), Vec::new());
            nested(value, &mut shape, 0, &mut values);
            let numbers = Tensor::from_vec(values, shape, &Device::Cpu)?;
            if is_bool(value) { numbers.to_dtype(DType::Bool)? } else { numbers }
        };
        inputs.insert(name.clone(), input);
    }
    let flat = values("outputs")?;
    let mut rest = &flat[..];
    let mut expected = Tensors::new();
    for (name, described) in row["outputs"].as_object().unwrap() {
        let shape = shape(&described[0]);
        let (own, others) = rest.split_at(shape.iter().product());
        rest = others;
        let output = tensor(own.to_vec(), shape);
        let output = if described[1] == "int" { output.to_dtype(DType::I64)? } else { output };
        expected.insert(name.clone(), output);
    }
    let gradients = (row["gradients"].as_str().unwrap().to_string(), values("gradients")?);
    Ok(Packed { name, case: Case { config: row["config"].clone(), weights, inputs, expected }, gradients })
}

fn rows() -> Vec<Value> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity_two");
    let text = std::fs::read_to_string(folder.join("cases.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::BF16 | DType::F16)
}

/// Runs a case and compares its outputs, and the sums of its gradients.
fn compare(row: &Value, tensors: &Tensors, dtype: DType, options: &RunOptions) -> Result<Vec<String>> {
    let Packed { name, mut case, gradients: (hash, sums) } = unpack(row, tensors)?;
    let mut actual = case.run(dtype, &device(), options)?;
    let names: Vec<String> = actual.keys().filter(|name| name.starts_with("grad.")).cloned().collect();
    let mut wrong = Vec::new();
    if fnv1a(&names.join("\n")) != hash {
        wrong.push(format!("other gradients than expected: {names:?}"));
    }
    for (name, sums) in names.iter().zip(sums.chunks(SUMS)) {
        let own = signed_sums(&actual[name].to_f64_vec()?, SUMS);
        actual.insert(name.clone(), tensor(own, vec![SUMS]));
        case.expected.insert(name.clone(), tensor(sums.to_vec(), vec![SUMS]));
    }
    let mut bounds = Bounds::of(dtype);
    if is_half(dtype) {
        for bound in [&mut bounds.outputs, &mut bounds.gradients, &mut bounds.whole_gradient] {
            *bound *= 2.0;
        }
    }
    let comparison = case.compare(&actual, &bounds)?;
    println!("{name:40} {:.1e} {}", comparison.error, comparison.tensor);
    wrong.extend(comparison.wrong);
    Ok(wrong)
}

fn expect_all(dtype: DType, options: &RunOptions) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity_two");
    let tensors = read_safetensors(folder.join("cases.safetensors")).unwrap();
    let filter = std::env::var("XT_CASE").unwrap_or_default();
    let share = std::env::var("XT_SHARE").unwrap_or_else(|_| "0/1".to_string());
    let (first, step) = share.split_once('/').expect("XT_SHARE is FIRST/STEP");
    let (first, step): (usize, usize) = (first.parse().unwrap(), step.parse().unwrap());
    let mut failures = Vec::new();
    for row in rows().iter().skip(first).step_by(step) {
        let name = row["name"].as_str().unwrap();
        if !name.contains(&filter) {
            continue;
        }
        if let Some((_, _, why)) = ROUNDED.iter().find(|(of, dtypes, _)| *of == name && dtypes.contains(&dtype)) {
            println!("{name}: left out of {dtype}: {why}");
            continue;
        }
        match compare(row, &tensors, dtype, options) {
            Ok(wrong) if wrong.is_empty() => {}
            Ok(wrong) => failures.push(format!("{name}:\n    {}", wrong.join("\n    "))),
            Err(error) => failures.push(format!("{name}: {error}")),
        }
    }
    assert!(failures.is_empty(), "{} cases failed:\n{}", failures.len(), failures.join("\n"));
}

/// No case is silently lost.
#[test]
fn parity_two_cases_are_all_there() {
    assert_eq!(rows().len(), 301);
}

#[test]
fn parity_two_f64() {
    expect_all(DType::F64, &RunOptions::default());
}

#[test]
fn parity_two_f32() {
    expect_all(DType::F32, &RunOptions::default());
}

/// Cases that half types round to something else, and why; their bounds are doubled, as each gradient is known by eight
/// sums only.
const ROUNDED: [(&str, &[DType], &str); 4] = [
    ("attn_gumbel_softmax", &[DType::BF16], "scores are divided by a small temperature"),
    ("ff_custom_activation_relu", &[DType::F16], "values near the kink of ReLU fall to the other side"),
    ("generate_prompts_list", &[DType::BF16], "tokens are chosen from logits that are rounded"),
    ("rmsnorm_tiny_inputs", &[DType::F16], "inputs below the range of f16"),
];

/// Within the wider bounds of half types.
#[test]
fn parity_two_bf16() {
    expect_all(DType::BF16, &RunOptions::default());
}

#[test]
fn parity_two_f16() {
    expect_all(DType::F16, &RunOptions::default());
}

/// The same with attention computed from the matrix of scores wherever the fused op would apply.
#[test]
fn parity_two_f64_explicit() {
    expect_all(DType::F64, &RunOptions { explicit_attention: true, ..RunOptions::default() });
}
