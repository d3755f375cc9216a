//! Every case below `tests/parity` (and `XT_PARITY_DIR`): outputs and gradients of PyTorch x-transformers 0.22.0. Cases
//! below `tests/parity_today` are from today's x-transformers and Hugging Face transformers, for options not in 0.22.
//!
//! The README there describes the files. `XT_CASE=part of a name` runs a part, `XT_TEST_DEVICE` says where.

use std::path::{Path, PathBuf};

use x_transformers::{DType, Device, Result, models::RunOptions};
use x_transformers_parity::{Bounds, Case, Comparison};

fn folders() -> Vec<PathBuf> {
    let mut roots =
        ["tests/parity", "tests/parity_today"].map(|root| Path::new(env!("CARGO_MANIFEST_DIR")).join(root)).to_vec();
    // The binary may run on a machine that did not build it.
    roots.retain(|root| root.is_dir());
    roots.extend(std::env::var_os("XT_PARITY_DIR").map(PathBuf::from));
    let filter = std::env::var("XT_CASE").unwrap_or_default();
    let mut folders: Vec<PathBuf> = roots.iter().flat_map(|root| Case::folders(root).unwrap()).collect();
    folders.retain(|folder| name(folder).contains(&filter));
    assert!(!folders.is_empty(), "no case matches `{filter}`");
    folders
}

fn name(folder: &Path) -> String {
    folder.file_name().unwrap().to_string_lossy().into_owned()
}

fn device() -> Device {
    Device::parse(&std::env::var("XT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_string())).unwrap()
}

/// Vectors of length 1e-8, below the range of f16, and gradients of 1e8, above it.
const BEYOND_F16: [&str; 1] = ["rmsnorm_clamp"];

fn compare(folder: &Path, dtype: DType, options: &RunOptions) -> Result<Comparison> {
    let mut case = Case::read(folder)?;
    // A bias of keys adds the same to the scores of all keys: its gradient is zero up to rounding.
    let noise = |name: &String| name.starts_with("grad.") && name.ends_with("to_k.bias");
    case.expected.retain(|name, _| !noise(name));
    let mut actual = case.run(dtype, &device(), options)?;
    actual.retain(|name, _| !noise(name));
    case.compare(&actual, &Bounds::of(dtype))
}

/// Every config is accepted, and nothing is missing or off.
fn expect_all(dtype: DType, options: RunOptions) {
    let mut failures = Vec::new();
    // Two tokens may be equally likely up to rounding, which differs in the products of a card.
    let is_card = device() != Device::Cpu && std::env::var_os("XT_EMULATOR").is_none();
    let chooses_by_rounding = is_card && matches!(dtype, DType::BF16 | DType::F16);
    for folder in folders() {
        let name = name(&folder);
        if dtype == DType::F16 && BEYOND_F16.contains(&name.as_str()) {
            continue;
        }
        if chooses_by_rounding && name.starts_with("generate_") {
            println!("{name}: left out, as its tokens are chosen from logits that {dtype} rounds");
            continue;
        }
        match compare(&folder, dtype, &options) {
            Ok(Comparison { error, tensor, wrong, .. }) if wrong.is_empty() => {
                println!("{name:40} {error:.1e} {tensor}")
            }
            Ok(Comparison { wrong, .. }) => failures.push(format!("{name}:\n    {}", wrong.join("\n    "))),
            Err(error) => failures.push(format!("{name}: {error}")),
        }
    }
    assert!(failures.is_empty(), "{} cases failed:\n{}", failures.len(), failures.join("\n"));
}

/// No case is silently lost.
#[test]
fn parity_cases_are_complete() {
    if std::env::var_os("XT_CASE").is_none() && std::env::var_os("XT_PARITY_DIR").is_none() {
        assert_eq!(folders().len(), 149);
    }
}

#[test]
fn parity_f64() {
    expect_all(DType::F64, RunOptions::default());
}

#[test]
fn parity_f32() {
    expect_all(DType::F32, RunOptions::default());
}

#[test]
fn parity_bf16() {
    expect_all(DType::BF16, RunOptions::default());
}

#[test]
fn parity_f16() {
    expect_all(DType::F16, RunOptions::default());
}

/// The same with attention computed from the matrix of scores wherever the fused op would apply.
#[test]
fn parity_f64_explicit() {
    expect_all(DType::F64, RunOptions { explicit_attention: true, ..RunOptions::default() });
}
