//! Every case below `tests/parity` (and `XT_PARITY_DIR`): outputs and gradients of PyTorch x-transformers 0.22.0.
//!
//! The README there describes the files. `XT_CASE=part of a name` runs a part.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use x_transformers::{
    DType, Device, Error, Result, Store, Tensor,
    config::{Call, Config},
    io::read_safetensors,
    models::{Model, RunOptions},
};

/// Tensors by name.
type Tensors = BTreeMap<String, Tensor>;

/// Allowed relative errors.
#[derive(Clone, Copy)]
struct Bounds {
    dtype: DType,
    outputs: f64,
    gradients: f64,
    /// Of all gradients of a case as one vector.
    whole_gradient: f64,
}

/// The expected values are rounded to f32: half of 2⁻²³ on each element.
const F64: Bounds = Bounds { dtype: DType::F64, outputs: 2e-7, gradients: 2e-7, whole_gradient: 2e-7 };
/// PyTorch's own f32 stays within 1e-5.
const F32: Bounds = Bounds { dtype: DType::F32, outputs: 2e-5, gradients: 1e-4, whole_gradient: 1e-4 };

/// bf16 has eight bits: each value is rounded by up to 0.4 %. A learned temperature multiplies what is rounded by up to
/// 100, and gradients of scores are small sums of large terms: the bounds are those of the worst case.
const BF16: Bounds = Bounds { dtype: DType::BF16, outputs: 2e-2, gradients: 4e-1, whole_gradient: 2e-1 };

/// One case folder.
struct Case {
    name: String,
    config: Config,
    call: Call,
    weights: Tensors,
    inputs: Tensors,
    expected: Tensors,
}

/// Folders with a `config.json`, in order.
fn folders() -> Vec<PathBuf> {
    let mut roots = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity")];
    roots.extend(std::env::var_os("XT_PARITY_DIR").map(PathBuf::from));
    let filter = std::env::var("XT_CASE").unwrap_or_default();
    let mut folders: Vec<PathBuf> = Vec::new();
    for root in roots {
        let entries = fs::read_dir(&root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
        folders.extend(entries.map(|entry| entry.unwrap().path()).filter(|path| path.join("config.json").exists()));
    }
    folders.retain(|folder| folder.file_name().unwrap().to_string_lossy().contains(&filter));
    folders.sort();
    assert!(!folders.is_empty(), "no case matches `{filter}`");
    folders
}

impl Case {
    fn read(folder: &Path) -> Result<Self> {
        let text = fs::read_to_string(folder.join("config.json")).unwrap();
        let (config, call) = Config::with_call(&text)?;
        let tensors = |name: &str| {
            let path = folder.join(name);
            if path.exists() { read_safetensors(&path) } else { Ok(Tensors::new()) }
        };
        Ok(Self {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            config,
            call,
            weights: tensors("weights.safetensors")?,
            inputs: tensors("inputs.safetensors")?,
            expected: tensors("expected.safetensors")?,
        })
    }

    fn run(&self, dtype: DType, options: RunOptions) -> Result<Tensors> {
        let store = Store::zeros(dtype, &Device::Cpu);
        let model = Model::new(&self.config, &store)?;
        self.check_buffers(&model)?;
        model.params().load(&self.weights)?;
        let outputs = model.run(&self.inputs, &self.call, &RunOptions { gradients: true, ..options })?;
        Ok(outputs)
    }

    /// What the config fixes has to be what PyTorch saved, to the bit.
    fn check_buffers(&self, model: &Model) -> Result<()> {
        for (name, buffer) in model.params().buffers() {
            if let Some(saved) = self.weights.get(name) {
                assert_eq!(buffer.to_f64_vec()?, saved.to_f64_vec()?, "{}: {name}", self.name);
            }
        }
        Ok(())
    }

    /// The worst tensor and its error, or what is wrong.
    fn compare(&self, actual: &Tensors, bounds: Bounds) -> std::result::Result<(f64, String), String> {
        let mut worst = (0.0, "-".to_string());
        let mut wrong = Vec::new();
        for name in actual.keys().filter(|name| !self.expected.contains_key(*name)) {
            wrong.push(format!("unexpected {name}"));
        }
        for (name, expected) in &self.expected {
            let Some(actual) = actual.get(name) else {
                wrong.push(format!("missing {name}"));
                continue;
            };
            if actual.shape() != expected.shape() {
                wrong.push(format!("{name} is {:?}, expected {:?}", actual.shape(), expected.shape()));
                continue;
            }
            let bound = if name.starts_with("grad.") { bounds.gradients } else { bounds.outputs };
            let bound = if expected.dtype().is_float() { bound } else { 0.0 };
            let error = relative_error(actual, expected);
            // Not `error > bound`: a NaN must fail.
            if !(error <= bound) {
                wrong.push(format!("{name} is off by {error:.2e}, allowed {bound:.0e}"));
            }
            if !(error / bound.max(1e-300) <= worst.0) {
                worst = (error, name.clone());
            }
        }
        let whole = self.whole_gradient_error(actual);
        if !(whole <= bounds.whole_gradient) {
            wrong.push(format!("all gradients are off by {whole:.2e}, allowed {:.0e}", bounds.whole_gradient));
        }
        if wrong.is_empty() { Ok(worst) } else { Err(wrong.join("\n    ")) }
    }
}

impl Case {
    fn whole_gradient_error(&self, actual: &Tensors) -> f64 {
        let gradients = |tensors: &Tensors| -> Vec<f64> {
            let names = self.expected.keys().filter(|name| name.starts_with("grad."));
            names.filter_map(|name| tensors.get(name)).flat_map(|tensor| tensor.to_f64_vec().unwrap()).collect()
        };
        distance(&gradients(actual), &gradients(&self.expected))
    }
}

/// `‖a − e‖ / max(‖e‖, 1e-6)`
fn relative_error(actual: &Tensor, expected: &Tensor) -> f64 {
    distance(&actual.to_f64_vec().unwrap(), &expected.to_f64_vec().unwrap())
}

fn distance(actual: &[f64], expected: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut actual.iter().zip(expected).map(|(a, e)| a - e));
    difference / norm(&mut expected.iter().copied()).max(1e-6)
}

/// Runs every case; gives failures and the cases whose config is refused.
fn run_all(bounds: Bounds, options: RunOptions) -> (Vec<String>, Vec<String>) {
    let (mut failures, mut refused) = (Vec::new(), Vec::new());
    for folder in folders() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let outcome = Case::read(&folder).and_then(|case| {
            let actual = case.run(bounds.dtype, options)?;
            Ok(case.compare(&actual, bounds))
        });
        match outcome {
            Ok(Ok((error, tensor))) => println!("ok       {name:40} {error:.2e} {tensor}"),
            Ok(Err(wrong)) => {
                println!("FAILED   {name:40}\n    {wrong}");
                failures.push(format!("{name}:\n    {wrong}"));
            }
            Err(error) if matches!(error.root(), Error::UnknownOption { .. } | Error::Option { .. }) => {
                println!("refused  {name:40} {error}");
                refused.push(name);
            }
            Err(error) => {
                println!("FAILED   {name:40} {error}");
                failures.push(format!("{name}: {error}"));
            }
        }
    }
    (failures, refused)
}

fn expect_all(bounds: Bounds, options: RunOptions) {
    let (failures, refused) = run_all(bounds, options);
    assert!(failures.is_empty(), "{} cases failed:\n{}", failures.len(), failures.join("\n"));
    assert!(refused.is_empty(), "refused configs: {refused:?}");
}

/// None is lost in silence.
#[test]
fn parity_cases_are_all_there() {
    if std::env::var_os("XT_CASE").is_none() && std::env::var_os("XT_PARITY_DIR").is_none() {
        assert_eq!(folders().len(), 112);
    }
}

#[test]
fn parity_f64() {
    expect_all(F64, RunOptions::default());
}

#[test]
fn parity_f32() {
    expect_all(F32, RunOptions::default());
}

#[test]
fn parity_bf16() {
    expect_all(BF16, RunOptions::default());
}

/// Attention from the matrix of scores wherever the fused op would do.
#[test]
fn parity_f64_explicit() {
    expect_all(F64, RunOptions { explicit_attention: true, ..RunOptions::default() });
}
