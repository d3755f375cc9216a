//! Where and how precisely to compute.

use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser},
};
use x_transformers::{DType, Device};

use crate::failure::Result;

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
    pub fn device(&self) -> Result<Device> {
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
