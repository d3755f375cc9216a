//! Parity cases: a model, its weights and inputs, and the outputs of another implementation.
//!
//! A case is a folder with `config.json`, `weights.safetensors`, `inputs.safetensors` and `expected.safetensors`. Those
//! in `tests/parity` have the outputs of PyTorch x-transformers 0.22.0, computed in f64 and rounded to f32: their
//! config may have a `call` beside the options, and the names are those of [`Model::run`]. A case of a custom model has
//! the config that the model reads; see [`Case::run_with`]. A large gradient may be given by its [`signed_sums`].

#![forbid(unsafe_code)]
#![warn(missing_docs, missing_debug_implementations)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use x_transformers::{
    DType, Device, Error, ErrorKind, ParamStore, Result, Tape, Tensor,
    config::Config,
    io::{read_safetensors, read_text},
    models::{Model, RunOptions},
};

/// The README's program, compiled with the other examples of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Tensors by name.
type Tensors = BTreeMap<String, Tensor>;

/// Upper bounds of relative errors, `‖a − e‖ / max(‖e‖, 1e-6)`, for tensors to agree.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Bounds {
    /// Bound for everything that is not a gradient.
    pub outputs: f64,
    /// Bound for each gradient.
    pub gradients: f64,
    /// Bound for all gradients of a case as one vector.
    pub whole_gradient: f64,
}

impl Bounds {
    /// Returns the bounds for a model of this dtype.
    pub fn of(dtype: DType) -> Self {
        let [outputs, gradients, whole_gradient] = match dtype {
            // The expected values are rounded to f32: half of 2⁻²³ on each element.
            DType::F64 => [2e-7; 3],
            // PyTorch's own f32 stays within 1e-5.
            DType::F32 => [2e-5, 1e-4, 1e-4],
            // bf16 has eight bits: each value is rounded by up to 0.4 %. A learned temperature multiplies what is
            // rounded by up to 100, and gradients of scores are small sums of large terms: the bounds are those of the
            // worst case.
            DType::BF16 => [2e-2, 4e-1, 2e-1],
            // Three bits more than bf16, so that an eighth of its errors is expected; top-k may keep another key.
            // Values beyond the range of f16, and below it, are not what these bounds are about.
            DType::F16 => [1e-2, 5e-2, 5e-2],
            // I64 and Bool: exact.
            _ => [0.0; 3],
        };
        Self { outputs, gradients, whole_gradient }
    }
}

/// Case, read from its folder.
#[derive(Clone, Debug)]
pub struct Case {
    /// Content of `config.json`: the options of the model and of the call.
    pub config: Value,
    /// State dict of the model.
    pub weights: BTreeMap<String, Tensor>,
    /// Inputs by name.
    pub inputs: BTreeMap<String, Tensor>,
    /// Expected outputs by name; `sums.NAME` has the [`signed_sums`] of the output `NAME`, if that is not there itself.
    pub expected: BTreeMap<String, Tensor>,
}

/// Result of comparing outputs with the expected ones.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
#[must_use = "tensors that disagree are in the comparison, not an error"]
pub struct Comparison {
    /// Largest relative error of a tensor; NaN if one has a NaN.
    pub error: f64,
    /// Name of that tensor; empty if no tensors could be compared.
    pub tensor: String,
    /// Descriptions of the mismatches; empty if all outputs agree.
    pub wrong: Vec<String>,
}

impl Case {
    /// Returns the case folders at and below a folder, in order. Folders below a case belong to it.
    ///
    /// Errors: a folder that cannot be read, or no `config.json` in any.
    pub fn folders(root: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
        let root = root.as_ref();
        let mut found = Vec::new();
        let mut open = vec![root.to_path_buf()];
        while let Some(folder) = open.pop() {
            let entries = fs::read_dir(&folder).map_err(|error| unreadable(&folder, error))?;
            if is_case(&folder) {
                found.push(folder);
                continue;
            }
            for entry in entries {
                let entry = entry.map_err(|error| unreadable(&folder, error))?;
                let path = entry.path();
                let kind = entry.file_type().map_err(|error| unreadable(&path, error))?;
                // A link may be a case, but is not searched: it could lead back up.
                if kind.is_dir() || (kind.is_symlink() && is_case(&path)) {
                    open.push(path);
                }
            }
        }
        if found.is_empty() {
            let why = "has no cases: expected a `config.json` in it or in a folder below it".to_string();
            return Err(Error::new(ErrorKind::File { path: root.to_path_buf(), why }));
        }
        found.sort();
        Ok(found)
    }

    /// Reads the four files of a folder; a `SamplingFilter` has no weights.
    ///
    /// Errors: a file that is missing or broken.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let text = read_text(folder.join(CONFIG), MAX_CONFIG)?;
        let config: Value = serde_json::from_str(&text).map_err(|error| {
            Error::new(ErrorKind::Argument { op: "config", message: format!("expected JSON: {error}") })
        })?;
        let weights = match config.get("model").and_then(Value::as_str) {
            Some("SamplingFilter") => Tensors::new(),
            _ => read_safetensors(folder.join("weights.safetensors"))?,
        };
        let inputs = read_safetensors(folder.join("inputs.safetensors"))?;
        let expected = read_safetensors(folder.join("expected.safetensors"))?;
        Ok(Self { config, weights, inputs, expected })
    }

    /// Builds the model that the config describes, loads the weights, and returns outputs and gradients.
    ///
    /// Errors: a config that is illegal; weights or inputs that do not fit.
    pub fn run(&self, dtype: DType, device: &Device, options: &RunOptions) -> Result<BTreeMap<String, Tensor>> {
        let (config, call) = Config::with_call(&self.config.to_string())?;
        let model = Model::new(&config, &ParamStore::zeros(dtype, device))?;
        model.params().load(&self.weights)?;
        model.run(&self.inputs, &call, &RunOptions { gradients: true, ..*options })
    }

    /// Builds a custom model from the config, loads the weights, and returns the result of `forward` on the inputs
    /// (floats in the model's dtype): `loss`, `[1]`, if the case expects one, else `out`; and `grad.NAME` for each
    /// parameter with a gradient that is not zero everywhere. Gradients of an `out` start with the input `cotangent`;
    /// without it there are none.
    ///
    /// Errors: those of `build` and `forward`; weights or inputs that do not fit.
    pub fn run_with<M>(
        &self,
        dtype: DType,
        device: &Device,
        build: impl FnOnce(&Value, &ParamStore) -> Result<M>,
        forward: impl FnOnce(&M, &BTreeMap<String, Tensor>) -> Result<Tensor>,
    ) -> Result<BTreeMap<String, Tensor>> {
        let store = ParamStore::zeros(dtype, device);
        let model = build(&self.config, &store)?;
        let params = store.params();
        params.load(&self.weights)?;
        let adopt = |(name, tensor): (&String, &Tensor)| {
            let tensor = tensor.to_device(device)?;
            Ok((name.clone(), if tensor.dtype().is_float() { tensor.to_dtype(dtype)? } else { tensor }))
        };
        let inputs = self.inputs.iter().map(adopt).collect::<Result<Tensors>>()?;
        let mut tape = Tape::grad();
        let value = forward(&model, &inputs)?;
        let is_loss = self.expected.contains_key("loss");
        let grads = match inputs.get("cotangent") {
            _ if is_loss => Some(tape.backward(&value)?),
            Some(cotangent) => Some(tape.backward_with(&value, cotangent)?),
            None => None,
        };
        let mut outputs = Tensors::new();
        for (name, param) in params.unique() {
            if let Some(grad) = grads.as_ref().and_then(|grads| grads.param(param)).filter(|grad| !is_zero(grad)) {
                outputs.insert(format!("grad.{name}"), grad.clone());
            }
        }
        let (name, value) = if is_loss { ("loss", value.reshape([1])?) } else { ("out", value) };
        outputs.insert(name.to_string(), value.detach());
        Ok(outputs)
    }

    /// Compares outputs with the expected ones: the same names, shapes and kinds of numbers, integers equal, floats
    /// within the bounds.
    ///
    /// Errors: tensors that cannot be read back.
    pub fn compare(&self, actual: &BTreeMap<String, Tensor>, bounds: &Bounds) -> Result<Comparison> {
        let mut comparison = Comparison { error: 0.0, tensor: String::new(), wrong: Vec::new() };
        let is_expected = |name: &str| self.expected.contains_key(name) || self.expected.contains_key(&sums_of(name));
        let unexpected = actual.keys().filter(|name| !is_expected(name));
        comparison.wrong.extend(unexpected.map(|name| format!("{name} is unexpected")));
        let (mut gradients, mut expected_gradients) = (Vec::new(), Vec::new());
        for (key, expected) in &self.expected {
            let name = key.strip_prefix(SUMS).unwrap_or(key);
            let Some(actual) = actual.get(name) else {
                comparison.wrong.push(format!("{name} is missing"));
                continue;
            };
            let (shape, is_float) = (expected.shape(), expected.dtype().is_float());
            let is_summed = name != key;
            if is_summed && expected.numel() == 0 {
                comparison.wrong.push(format!("{key} is empty, expected at least one sum"));
                continue;
            }
            if (!is_summed && actual.shape() != shape) || actual.dtype().is_float() != is_float {
                let (found, dtype) = (actual.shape(), actual.dtype());
                let wrong = format!("{name} is {found:?} {dtype}, expected {shape:?} {}", expected.dtype());
                comparison.wrong.push(wrong);
                continue;
            }
            let (mut actual, mut expected) = (actual.to_f64_vec()?, expected.to_f64_vec()?);
            if is_summed {
                // A sum is as large as the whole tensor, so that the gradients of a case have the weights of their elements.
                let scale = (expected.len().max(1) as f64).sqrt().recip();
                actual = signed_sums(&actual, expected.len());
                actual.iter_mut().chain(&mut expected).for_each(|sum| *sum *= scale);
            }
            let is_gradient = name.starts_with("grad.");
            let bound = match (is_float, is_gradient) {
                (false, _) => 0.0,
                (true, false) => bounds.outputs,
                (true, true) => bounds.gradients,
            };
            comparison.add(name, relative_error(&actual, &expected), bound);
            if is_gradient {
                gradients.extend(actual);
                expected_gradients.extend(expected);
            }
        }
        let (whole, bound) = (relative_error(&gradients, &expected_gradients), bounds.whole_gradient);
        if !(whole <= bound) {
            comparison.wrong.push(format!("all gradients together are off by {whole:.1e}, allowed {bound:.0e}"));
        }
        Ok(comparison)
    }
}

impl Comparison {
    /// Returns `true` if everything agrees.
    pub fn passed(&self) -> bool {
        self.wrong.is_empty()
    }

    // Both conditions are written so that a NaN is the worst of all, and fails.
    fn add(&mut self, name: &str, error: f64, bound: f64) {
        if !(error <= bound) {
            self.wrong.push(format!("{name} is off by {error:.1e}, allowed {bound:.0e}"));
        }
        if self.tensor.is_empty() || !(error <= self.error) && !self.error.is_nan() {
            (self.error, self.tensor) = (error, name.to_string());
        }
    }
}

/// Returns sums of the elements with drawn signs: `Σ s(i, j) · values[i]` for each `j` below `count`, with
///
/// ```text
/// x = (i + 1) · 9E3779B97F4A7C15 + (j + 1) · D1B54A32D192ED03     in hexadecimal, modulo 2⁶⁴
/// x = (x ⊕ x / 2³²) · D6E8FEB86659FD93                           ⊕ is the exclusive or
/// s = −1 if the first bit of x ⊕ x / 2³² is 1, else 1
/// ```
///
/// They stand for many elements: their relative error is about that of the elements.
pub fn signed_sums(values: &[f64], count: usize) -> Vec<f64> {
    let is_negative = |i: usize, j: usize| {
        let mut x = (i as u64 + 1)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .wrapping_add((j as u64 + 1).wrapping_mul(0xD1B5_4A32_D192_ED03));
        x ^= x >> 32;
        x = x.wrapping_mul(0xD6E8_FEB8_6659_FD93);
        (x ^ (x >> 32)) >> 63 == 1
    };
    let sum = |j| values.iter().enumerate().map(|(i, &x)| if is_negative(i, j) { -x } else { x }).sum();
    (0..count).map(sum).collect()
}

/// Prefix of the names of sums.
const SUMS: &str = "sums.";

fn sums_of(name: &str) -> String {
    format!("{SUMS}{name}")
}

const CONFIG: &str = "config.json";

/// Maximum size of a config, in bytes; real ones have a few thousand.
const MAX_CONFIG: u64 = 16 << 20;

fn unreadable(path: &Path, source: std::io::Error) -> Error {
    Error::new(ErrorKind::Io { path: path.to_path_buf(), source })
}

fn is_zero(tensor: &Tensor) -> bool {
    tensor.to_f64_vec().is_ok_and(|values| values.iter().all(|&value| value == 0.0))
}

fn is_case(folder: &Path) -> bool {
    folder.join(CONFIG).is_file()
}

/// `‖a − e‖ / max(‖e‖, 1e-6)`
fn relative_error(actual: &[f64], expected: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut actual.iter().zip(expected).map(|(a, e)| a - e));
    difference / norm(&mut expected.iter().copied()).max(1e-6)
}
