//! Names of other families' tensors and of this crate's.
//!
//! A family has a list of [`Weight`]s: for each parameter of the model, the source of its values in the file. Tensors
//! that are missing or have another shape are an error with a table; additional tensors of a file are listed.

use std::collections::{HashMap, HashSet};

use half::f16;

use super::TensorFile;
use crate::{
    DType, Error, ErrorKind, LeafId, ParamMap, QuantType, Result, Tensor,
    collect::CollectVec,
    dtype::{Float, Real, dispatch_float},
    error::{ErrorContext, ensure},
    io::Stored,
    ops::PackedMatrix,
    sort::sort,
};

/// Source of the values of one parameter.
#[derive(Clone, Debug)]
pub(super) struct Weight {
    /// Name of the parameter in this crate.
    pub ours: String,
    /// Names in the file.
    pub theirs: Source,
}

/// Source of a parameter in a file.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// One tensor, unchanged.
    One(String),
    /// Two tensors, concatenated along the rows.
    Stacked([String; 2]),
    /// Rows of this number of heads, permuted from adjacent feature pairs to pairs across the two halves.
    Halves(String, usize),
}

impl Source {
    fn names(&self) -> &[String] {
        match self {
            Self::One(name) | Self::Halves(name, _) => std::slice::from_ref(name),
            Self::Stacked(names) => names,
        }
    }

    /// Returns the type of matrices that are multiplied as they are stored; `None` if one is not, or has another type.
    pub fn quantized(&self, file: &TensorFile) -> Option<QuantType> {
        let mut kinds = self.names().iter().map(|name| {
            let info = file.info(name).filter(|info| info.shape.len() == 2)?;
            if let Stored::Quantized(kind) = info.stored { Some(kind).filter(|kind| kind.is_packed()) } else { None }
        });
        let first = kinds.next()??;
        kinds.all(|kind| kind == Some(first)).then_some(first)
    }
}

/// Mapping from a file's tensors to parameters.
#[derive(Clone, Debug, Default)]
pub(super) struct Names {
    pub weights: Vec<Weight>,
    /// Copies of tied tensors: they must be equal to these.
    pub copies: Vec<(String, String)>,
    /// Prefixes of the names of tensors that the model does not use.
    pub left_out: Vec<String>,
}

impl Names {
    /// Adds a parameter that is a tensor of the file.
    pub fn one(&mut self, ours: impl Into<String>, theirs: impl Into<String>) {
        self.weights.push(Weight { ours: ours.into(), theirs: Source::One(theirs.into()) });
    }

    /// Adds the weight and the bias of a module.
    pub fn affine(&mut self, ours: &str, theirs: &str) {
        for part in ["weight", "bias"] {
            self.one(format!("{ours}.{part}"), format!("{theirs}.{part}"));
        }
    }

    /// Loads the parameters from a file one at a time, which keeps only one of the file's weights in memory beside the
    /// model; their names begin with `place`. Returns the packed weights of those parameters that may be packed, and whose
    /// tensors in the file are: these parameters keep their values. `defer`: the others take theirs when they are
    /// materialised.
    ///
    /// Errors: tied tensors with different values; NaN or infinity, or values out of range of a parameter's dtype; a
    /// parameter without a source.
    pub fn load(
        &self,
        file: &TensorFile,
        params: &ParamMap,
        place: &str,
        may_be_packed: &HashSet<LeafId>,
        defer: bool,
    ) -> Result<HashMap<LeafId, PackedMatrix>> {
        for (copy, original) in &self.copies {
            ensure!(
                file.info(copy).is_none() || equal(file, copy, original)?,
                Error::file(file.path(), format_args!("`{copy}` and `{original}` are tied in this family, but differ"))
            );
        }
        let (mut loaded, mut packed) = (Vec::new(), HashMap::new());
        for weight in &self.weights {
            let name = format!("{place}{}", weight.ours);
            let Some(param) = params.get(&name) else { continue };
            let old = param.tensor();
            loaded.push(param.leaf());
            if may_be_packed.contains(&param.leaf()) && weight.theirs.quantized(file).is_some() {
                packed.insert(param.leaf(), weight.packed(file)?.to_device(old.device())?);
                continue;
            }
            let tensor = weight.read(file)?;
            check_values(file, weight, &tensor, old.dtype())?;
            if defer {
                param.defer(tensor);
                continue;
            }
            let tensor = tensor.to_device(old.device())?.to_dtype(old.dtype())?.contiguous()?;
            param.set(tensor).context(&name)?;
        }
        sort(&mut loaded);
        let missing: Vec<String> = params
            .iter()
            .filter(|(_, param)| loaded.binary_search(&param.leaf()).is_err())
            .map(|(name, _)| name.to_string())
            .collect_vec();
        ensure!(
            missing.is_empty(),
            Error::new(ErrorKind::Weights { missing, unused: Vec::new(), mismatched: Vec::new() })
        );
        Ok(packed)
    }

    /// Returns the tensors of a file that are not the source of a parameter, except buffers and those that the family
    /// ignores.
    pub fn unused(&self, file: &TensorFile) -> Vec<String> {
        let used = self.used();
        let known = |name: &str| {
            used.binary_search(&name).is_ok()
                || self.copies.iter().any(|(copy, _)| copy == name)
                || self.left_out.iter().any(|start| name.starts_with(start.as_str()))
                || is_buffer(file, name)
        };
        let names = file.names().chain(file.unreadable().map(|(name, _)| name));
        let mut unused: Vec<String> = names.filter(|name| !known(name)).map(str::to_string).collect_vec();
        sort(&mut unused);
        unused
    }

    /// Returns the names of the tensors that weights are made from, each once, in alphabetical order.
    fn used(&self) -> Vec<&str> {
        let mut used = Vec::new();
        for weight in &self.weights {
            used.extend(weight.theirs.names().iter().map(String::as_str));
        }
        sort(&mut used);
        used.dedup();
        used
    }

    /// Checks that a file has all tensors that a model with these parameters needs and, if `strict`, no other weights.
    ///
    /// Errors: [`ErrorKind::Weights`] with a table of all tensors that are missing, have another shape or, unless these
    /// are the only problem, are unused; [`ErrorKind::File`] for a weight that cannot be read or is more than a tensor.
    pub fn check(&self, file: &TensorFile, model: &ParamMap, strict: bool) -> Result<()> {
        let used = self.used();
        let missing: Vec<String> =
            used.iter().filter(|name| file.info(name).is_none()).map(|name| name.to_string()).collect_vec();
        if let Some((name, why)) = missing.iter().find_map(|name| Some((name, file.inert(name)?))) {
            return Err(Error::file(file.path(), format_args!("weight `{name}` {why}")));
        }
        let unused = self.unused(file);
        if let Some((name, what)) = unused.iter().find_map(|name| Some((name, changes_weights(name)?))) {
            return Err(Error::file(file.path(), format_args!("has `{name}`: {what}")));
        }
        let mut mismatched = Vec::new();
        for Weight { ours, theirs } in &self.weights {
            let Some(param) = model.get(ours) else { continue };
            let mut expected = param.tensor().shape().to_vec();
            if let Source::Stacked(_) = theirs {
                expected[0] /= 2;
            }
            for name in theirs.names() {
                match file.info(name) {
                    Some(info) if info.shape != expected => {
                        mismatched.push((name.clone(), expected.clone(), info.shape))
                    }
                    _ => {}
                }
            }
        }
        let fits = missing.is_empty() && mismatched.is_empty();
        ensure!(fits && (!strict || unused.is_empty()), Error::new(ErrorKind::Weights { missing, unused, mismatched }));
        Ok(())
    }
}

impl Weight {
    fn read(&self, file: &TensorFile) -> Result<Tensor> {
        match &self.theirs {
            Source::One(name) => file.tensor(name),
            Source::Stacked([first, second]) => Tensor::cat(&[&file.tensor(first)?, &file.tensor(second)?], 0),
            Source::Halves(name, heads) => halves(&file.tensor(name)?, *heads),
        }
    }

    /// Reads the weight or, of one that is concatenated from two tensors, either half.
    pub(super) fn part(&self, file: &TensorFile, half: Option<usize>) -> Result<Tensor> {
        match (&self.theirs, half) {
            (Source::Stacked(names), Some(half)) => file.tensor(&names[half]),
            _ => self.read(file),
        }
    }

    fn packed(&self, file: &TensorFile) -> Result<PackedMatrix> {
        match &self.theirs {
            Source::One(name) => file.packed(name),
            Source::Stacked([first, second]) => {
                let second = file.packed(second)?.blocks()?;
                file.packed_from(first, &|first| Tensor::cat(&[&first, &second], 0))
            }
            Source::Halves(name, heads) => file.packed_from(name, &|rows| halves(&rows, *heads)),
        }
    }
}

/// Permutes the rows of heads from adjacent feature pairs to pairs across the two halves.
fn halves(tensor: &Tensor, heads: usize) -> Result<Tensor> {
    // A bias has a row of one column.
    let rows = tensor.dim(0)?;
    let columns = if tensor.rank() == 1 { 1 } else { tensor.dim(1)? };
    let pairs = tensor.reshape([heads, rows / heads / 2, 2, columns])?;
    pairs.transpose(1, 2)?.reshape(&tensor.shape()[..])
}

/// Returns `true` if a tensor is not a weight but a buffer of a module, by its integer dtype or its name.
fn is_buffer(file: &TensorFile, name: &str) -> bool {
    /// Suffixes of names: rotations and their tables, positions, and attention masks.
    const BUFFERS: [&str; 10] = [
        "inv_freq",
        "position_ids",
        "token_type_ids",
        "cos_cached",
        "sin_cached",
        "freqs_cis",
        "attn.bias",
        "attention.bias",
        "masked_bias",
        "causal_mask",
    ];
    let whole = file.info(name).is_some_and(|info| !info.stored.dtype().is_float());
    whole || BUFFERS.iter().any(|end| name.strip_suffix(end).is_some_and(|rest| !rest.ends_with(char::is_alphanumeric)))
}

/// Returns the effect of a tensor on others, if the model would compute something else without it.
fn changes_weights(name: &str) -> Option<&'static str> {
    const SCALES: &str = "the weights are quantised with scales in an unsupported format; dequantise them first";
    const ADAPTER: &str = "a LoRA adapter, which changes other weights; merge it into the model first";
    match name.rsplit('.').find(|part| *part != "weight" && *part != "default")? {
        "weight_scale" | "weight_scale_inv" | "weight_scale_2" | "scale_weight" | "scales" | "weight_packed"
        | "qweight" | "qzeros" | "SCB" | "absmax" | "quant_map" => Some(SCALES),
        part if part.starts_with("lora_") => Some(ADAPTER),
        _ => None,
    }
}

/// Rejects weights that would make every output NaN.
fn check_values(file: &TensorFile, weight: &Weight, tensor: &Tensor, kept_as: DType) -> Result<()> {
    let name = || weight.theirs.names().join("` and `");
    ensure!(
        tensor.dtype().is_float(),
        Error::file(file.path(), format_args!("`{}` is {}, expected a float dtype", name(), tensor.dtype()))
    );
    // Checked in place: a copy in another type would be several times as large as the weights.
    let tensor = tensor.contiguous()?;
    let finite = dispatch_float!("load", tensor.dtype(), T, {
        Ok(tensor.values::<T>()?.iter().all(|value| value.to_acc().to_f64().is_finite()))
    })?;
    ensure!(finite, Error::file(file.path(), format_args!("`{}` contains NaN or infinity", name())));
    // Is the largest value of the one within the range of the other?
    if matches!(
        (tensor.dtype(), kept_as),
        (DType::F64, DType::F32) | (DType::F64 | DType::F32 | DType::BF16, DType::F16)
    ) {
        let largest = dispatch_float!("load", tensor.dtype(), T, {
            Ok(tensor.values::<T>()?.iter().fold(0.0, |most: f64, value| most.max(value.to_acc().to_f64().abs())))
        })?;
        let fits =
            if kept_as == DType::F16 { f16::from_f64(largest).is_finite() } else { (largest as f32).is_finite() };
        let why = format!("contains {largest}, which overflows {kept_as}; load the model as bf16 or f32");
        ensure!(fits, Error::file(file.path(), format_args!("`{}` {why}", name())));
    }
    Ok(())
}

/// Returns `true` if two tensors of a file have the same values.
pub(super) fn equal(file: &TensorFile, a: &str, b: &str) -> Result<bool> {
    if file.same_place(a, b) {
        return Ok(true);
    }
    let (a, b) = (file.tensor(a)?, file.tensor(b)?);
    if a.dtype() == b.dtype() && a.shape() == b.shape() {
        return Ok(a.bytes()? == b.bytes()?);
    }
    Ok(a.shape() == b.shape() && a.to_f64_vec()? == b.to_f64_vec()?)
}
