//! Where and how precisely to compute.

use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser},
};
use x_transformers::{DType, Device};

use crate::failure;

/// For commands that compare with other implementations: the CPU unless another device is asked for.
#[derive(Args)]
pub struct ComputeArgs {
    /// Where to compute: auto, cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,

    /// Type of the weights and activations
    #[arg(long, default_value = "f32", value_parser = dtypes([DType::F32, DType::F64, DType::BF16, DType::F16]))]
    pub dtype: DType,
}

impl ComputeArgs {
    pub fn device(&self) -> failure::Result<Device> {
        Ok(Device::parse(&self.device)?)
    }
}

/// Takes the names of these dtypes.
pub fn dtypes<const N: usize>(allowed: [DType; N]) -> impl TypedValueParser<Value = DType> {
    PossibleValuesParser::new(allowed.map(DType::name)).try_map(move |name| {
        let named = |dtype: &DType| dtype.name() == name;
        allowed.into_iter().find(named).ok_or_else(|| format!("unknown dtype {name}"))
    })
}

/// A number that is neither infinite nor NaN.
pub fn finite(text: &str) -> Result<f64, String> {
    number(text, "a finite number", f64::is_finite)
}

/// A finite number above 0.
pub fn positive(text: &str) -> Result<f64, String> {
    number(text, "a finite number above 0", |x| x.is_finite() && x > 0.0)
}

/// A finite number from 0 on.
pub fn positive_or_zero(text: &str) -> Result<f64, String> {
    number(text, "a finite number of at least 0", |x| x.is_finite() && x >= 0.0)
}

/// A number from 0 to 1.
pub fn fraction(text: &str) -> Result<f64, String> {
    number(text, "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))
}

fn number(text: &str, expected: &str, fits: impl Fn(f64) -> bool) -> Result<f64, String> {
    text.parse().ok().filter(|&x| fits(x)).ok_or_else(|| format!("expected {expected}"))
}
