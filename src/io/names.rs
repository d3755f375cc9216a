//! Names of other families' tensors, and ours.
//!
//! A family gives a list of [`Weight`]s: for each parameter of the model where its values come from in the file. What a
//! file has beyond them must be on the family's list of what is left out; everything else is an error with a table.

use std::collections::{BTreeMap, BTreeSet};

use super::TensorFile;
use crate::{
    Error, ParamMap, Result, Tensor,
    core::{Float, Real, dispatch_float},
    error::ensure,
};

/// Where the values of one parameter come from.
#[derive(Clone, Debug)]
pub(super) struct Weight {
    /// The name of the parameter here.
    pub ours: String,
    /// The names in the file.
    pub theirs: Source,
}

/// What is made of tensors of a file.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// One tensor as it is.
    One(String),
    /// Two, one below the other.
    Stacked([String; 2]),
    /// Rows of so many heads whose features pair with their neighbours, ordered so that they pair with the other half.
    Halves(String, usize),
}

impl Source {
    fn names(&self) -> &[String] {
        match self {
            Self::One(name) | Self::Halves(name, _) => std::slice::from_ref(name),
            Self::Stacked(names) => names,
        }
    }
}

/// How a file's tensors become parameters.
#[derive(Clone, Debug, Default)]
pub(super) struct Names {
    pub weights: Vec<Weight>,
    /// Copies of tensors that are tied: they must be equal to these.
    pub copies: Vec<(String, String)>,
    /// Beginnings of the names of tensors that the model has no use for.
    pub left_out: Vec<String>,
}

impl Names {
    /// A parameter that is a tensor of the file.
    pub fn one(&mut self, ours: impl Into<String>, theirs: impl Into<String>) {
        self.weights.push(Weight { ours: ours.into(), theirs: Source::One(theirs.into()) });
    }

    /// The weight and the bias of a module.
    pub fn affine(&mut self, ours: &str, theirs: &str) {
        for part in ["weight", "bias"] {
            self.one(format!("{ours}.{part}"), format!("{theirs}.{part}"));
        }
    }

    /// Reads the parameters from a file; their names begin with `place`.
    ///
    /// Errors: tied tensors with several values; NaN or infinity.
    pub fn read(&self, file: &TensorFile, place: &str) -> Result<BTreeMap<String, Tensor>> {
        for (copy, original) in &self.copies {
            ensure!(
                file.info(copy).is_none() || equal(&file.tensor(copy)?, &file.tensor(original)?)?,
                Error::file(file.path(), format!("`{copy}` and `{original}` are tied in this family, but differ"))
            );
        }
        let read = |weight: &Weight| {
            let tensor = match &weight.theirs {
                Source::One(name) => file.tensor(name)?,
                Source::Stacked([first, second]) => Tensor::cat(&[&file.tensor(first)?, &file.tensor(second)?], 0)?,
                Source::Halves(name, heads) => {
                    let tensor = file.tensor(name)?;
                    // A bias has a row of one column.
                    let rows = tensor.dim(0)?;
                    let columns = if tensor.rank() == 1 { 1 } else { tensor.dim(1)? };
                    let pairs = tensor.reshape([*heads, rows / heads / 2, 2, columns])?;
                    pairs.transpose(1, 2)?.reshape(&tensor.shape()[..])?
                }
            };
            check_finite(file, weight, &tensor)?;
            Ok((format!("{place}{}", weight.ours), tensor))
        };
        self.weights.iter().map(read).collect()
    }

    /// Whether a file has what a model of these parameters needs, and nothing else.
    ///
    /// Errors: [`Error::Weights`] with a table of all that is missing, unused or of another shape, by the file's names.
    pub fn check(&self, file: &TensorFile, model: &ParamMap) -> Result<()> {
        let used: BTreeSet<&str> =
            self.weights.iter().flat_map(|weight| weight.theirs.names()).map(String::as_str).collect();
        let copies: BTreeSet<&str> = self.copies.iter().map(|(copy, _)| copy.as_str()).collect();
        let known = |name: &str| {
            used.contains(name)
                || copies.contains(name)
                || self.left_out.iter().any(|start| name.starts_with(start.as_str()))
        };
        let missing: Vec<String> =
            used.iter().filter(|name| file.info(name).is_none()).map(|name| name.to_string()).collect();
        let unused: Vec<String> = file.names().filter(|name| !known(name)).map(str::to_string).collect();
        let mut misshapen = Vec::new();
        for Weight { ours, theirs } in &self.weights {
            let Some(param) = model.get(ours) else { continue };
            let mut expected = param.tensor().shape().to_vec();
            if let Source::Stacked(_) = theirs {
                expected[0] /= 2;
            }
            for name in theirs.names() {
                match file.info(name) {
                    Some(info) if info.shape != expected => {
                        misshapen.push((name.clone(), expected.clone(), info.shape))
                    }
                    _ => {}
                }
            }
        }
        ensure!(
            missing.is_empty() && unused.is_empty() && misshapen.is_empty(),
            Error::Weights { missing, unused, misshapen }
        );
        Ok(())
    }
}

/// Refuses weights that would make every output NaN.
fn check_finite(file: &TensorFile, weight: &Weight, tensor: &Tensor) -> Result<()> {
    let name = || weight.theirs.names().join("` and `");
    ensure!(
        tensor.dtype().is_float(),
        Error::file(file.path(), format!("`{}` is {}, expected floats", name(), tensor.dtype()))
    );
    // Looked at where they are: a copy in another type would be several times as large as the weights.
    let tensor = tensor.contiguous()?;
    let finite = dispatch_float!("load", tensor.dtype(), T, {
        Ok(tensor.values::<T>()?.iter().all(|value| value.to_acc().to_f64().is_finite()))
    })?;
    ensure!(finite, Error::file(file.path(), format!("`{}` holds NaN or infinity", name())));
    Ok(())
}

/// If `true`, two tensors have the same values.
fn equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    if a.dtype() == b.dtype() && a.shape() == b.shape() {
        return Ok(a.bytes()? == b.bytes()?);
    }
    Ok(a.to_f64_vec()? == b.to_f64_vec()?)
}
