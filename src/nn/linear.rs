//! Linear layers and embedding tables.

use super::lora::Lora;
use crate::{
    DType, Device, Error, Init, LeafId, Param, ParamStore, Result, Tensor,
    ops::{Activation, PackedMatrix},
};

/// Matrix of a layer: a parameter, or a packed matrix that has taken its place.
#[derive(Clone, Debug)]
enum Weight {
    Param(Param),
    Packed {
        matrix: PackedMatrix,
        /// Type of the parameter before.
        dtype: DType,
        /// Its identity.
        leaf: LeafId,
    },
}

/// Returns the packed form of a parameter, or `None` to keep it.
pub(crate) type Packer<'p> = &'p mut dyn FnMut(&Param) -> Result<Option<PackedMatrix>>;

impl Weight {
    /// Replaces the parameter, unless it has been replaced or is to be kept.
    fn pack(&mut self, packer: Packer) -> Result<()> {
        let Self::Param(param) = self else { return Ok(()) };
        if let Some(matrix) = packer(param)? {
            let (dtype, leaf) = (param.tensor().dtype(), param.leaf());
            *self = Self::Packed { matrix, dtype, leaf };
        }
        Ok(())
    }

    fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Param(weight) => x.linear(&weight.tensor(), bias),
            Self::Packed { matrix, .. } => matrix.linear(x, bias),
        }
    }

    fn floats(&self) -> Result<Tensor> {
        match self {
            Self::Param(weight) => Ok(weight.tensor()),
            Self::Packed { matrix, dtype, .. } => matrix.dequantize(*dtype),
        }
    }

    fn leaf(&self) -> LeafId {
        match self {
            Self::Param(param) => param.leaf(),
            Self::Packed { leaf, .. } => *leaf,
        }
    }

    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Param(param) => {
                let tensor = param.tensor();
                [tensor.shape()[0], tensor.shape()[1]]
            }
            Self::Packed { matrix, .. } => matrix.shape(),
        }
    }
}

/// Linear layer `x Wᵀ + b`, PyTorch's `nn.Linear`: `weight [out, in]`, `bias [out]`.
///
/// ```
/// use x_transformers::{DType, Device, ParamStore, Tensor, nn::Linear};
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let linear = Linear::new(&store.at("fc"), 3, 4)?;
/// let x = Tensor::ones([2, 3], DType::F32, &Device::Cpu)?;
/// assert_eq!(linear.forward(&x)?.shape()[..], [2, 4]);
/// assert_eq!(store.params().get("fc.weight").unwrap().tensor().shape()[..], [4, 3]);
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "Dense")]
pub struct Linear {
    weight: Weight,
    bias: Option<Param>,
    lora: Option<Box<Lora>>,
}

impl Linear {
    /// Creates a layer with weight and bias, uniform in `±1/√in`.
    pub fn new(store: &ParamStore, fan_in: usize, fan_out: usize) -> Result<Self> {
        let init = Init::linear(fan_in);
        Self::with_init(store, fan_in, fan_out, init, Some(init))
    }

    /// Creates a layer without bias, with a weight uniform in `±1/√in`.
    pub fn without_bias(store: &ParamStore, fan_in: usize, fan_out: usize) -> Result<Self> {
        Self::with_init(store, fan_in, fan_out, Init::linear(fan_in), None)
    }

    /// Creates a layer with a weight and, if `bias` is `true`, a bias, uniform in `±1/√in`.
    pub fn maybe_biased(store: &ParamStore, fan_in: usize, fan_out: usize, bias: bool) -> Result<Self> {
        let init = Init::linear(fan_in);
        Self::with_init(store, fan_in, fan_out, init, bias.then_some(init))
    }

    /// Like [`Linear::maybe_biased`], but all zeros if `zero` is `true`: the last layer of a branch that starts as the
    /// identity.
    pub fn output(store: &ParamStore, fan_in: usize, fan_out: usize, bias: bool, zero: bool) -> Result<Self> {
        let init = if zero { Init::Constant(0.0) } else { Init::linear(fan_in) };
        Self::with_init(store, fan_in, fan_out, init, bias.then_some(init))
    }

    /// Like [`Linear::output`], with a weight normal around 0 and smaller with the depth, `1 / √(2 in depth)`, if one
    /// is given.
    pub(super) fn output_at(
        store: &ParamStore,
        [fan_in, fan_out]: [usize; 2],
        bias: bool,
        zero: bool,
        depth: Option<usize>,
    ) -> Result<Self> {
        let Some(depth) = depth.filter(|_| !zero) else { return Self::output(store, fan_in, fan_out, bias, zero) };
        let weight = Init::Normal(((2 * fan_in * depth) as f64).powf(-0.5));
        Self::with_init(store, fan_in, fan_out, weight, bias.then_some(Init::linear(fan_in)))
    }

    /// Creates a layer with these initial values, and a bias if it has one.
    pub fn with_init(
        store: &ParamStore,
        fan_in: usize,
        fan_out: usize,
        weight: Init,
        bias: Option<Init>,
    ) -> Result<Self> {
        Ok(Self {
            weight: Weight::Param(store.param("weight", [fan_out, fan_in], weight)?),
            bias: bias.map(|bias| store.param("bias", [fan_out], bias)).transpose()?,
            lora: None,
        })
    }

    /// Computes the layer: `[.., in] → [.., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(Param::tensor);
        match (&self.lora, bias) {
            (None, bias) => self.weight.linear(x, bias.as_ref()),
            (Some(_), None) => self.product(x),
            (Some(_), Some(bias)) => self.product(x)?.add(&bias),
        }
    }

    /// Computes the layer without bias.
    fn product(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.weight.linear(x, None)?;
        match &self.lora {
            None => Ok(y),
            Some(lora) => lora.apply(self, x, &y),
        }
    }

    /// Returns weight and bias; `None` if the weight is packed or has a low-rank update.
    pub(super) fn params(&self) -> Option<(&Param, Option<&Param>)> {
        match (&self.weight, &self.lora) {
            (Weight::Param(weight), None) => Some((weight, self.bias.as_ref())),
            _ => None,
        }
    }

    /// Returns the identity of the weight, which a packed one keeps.
    pub(crate) fn leaf(&self) -> LeafId {
        self.weight.leaf()
    }

    /// Returns the sizes of the weight, `[out, in]`.
    pub(crate) fn sizes(&self) -> [usize; 2] {
        self.weight.shape()
    }

    /// Returns `true` if there is a low-rank update.
    pub(crate) fn has_lora(&self) -> bool {
        self.lora.is_some()
    }

    /// Sets the low-rank update.
    pub(crate) fn set_lora(&mut self, lora: Option<Lora>) {
        self.lora = lora.map(Box::new);
    }

    /// Adds the low-rank update to the weight and removes it; a packed weight is replaced by what it is dequantised to.
    pub(crate) fn merge_lora(&mut self) -> Result<()> {
        let Some(lora) = &self.lora else { return Ok(()) };
        match &self.weight {
            Weight::Param(param) => param.set(lora.merged(&param.tensor())?)?,
            Weight::Packed { .. } => {
                return Err(Error::argument("merge_lora", "weights are quantised; merge into the dequantised model"));
            }
        }
        self.lora = None;
        Ok(())
    }

    /// Returns the weight, `[out, in]`; a packed one is dequantised.
    pub(crate) fn weight(&self) -> Result<Tensor> {
        self.weight.floats()
    }

    /// Returns the weight, `[out, in]`, also that of a deferred parameter.
    pub(crate) fn weight_or_deferred(&self) -> Result<Tensor> {
        match &self.weight {
            Weight::Param(param) => param.value(),
            Weight::Packed { .. } => self.weight(),
        }
    }

    /// Replaces the weight by a packed one, which has no gradient and is in no map of parameters; the bias stays.
    pub(crate) fn pack(&mut self, packer: Packer) -> Result<()> {
        self.weight.pack(packer)
    }

    /// Returns the bias, if it should be added by the activation and not by the product.
    fn late_bias(&self, x: &Tensor) -> Option<&Param> {
        let by_product = matches!(x.device(), Device::Gpu(gpu) if gpu.limits().adds_biases)
            && matches!(x.dtype(), DType::BF16 | DType::F16)
            && self.lora.is_none();
        self.bias.as_ref().filter(|_| !by_product)
    }

    /// Computes `activation(x Wᵀ + b)`, with the bias fused into the activation or the product.
    pub fn activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let Some(bias) = self.late_bias(x) else { return activation.of(&self.forward(x)?) };
        self.product(x)?.add_activation(&bias.tensor(), activation)
    }

    /// Computes the mean cross-entropy of the outputs, see [`Tensor::linear_cross_entropy`].
    pub fn cross_entropy(&self, x: &Tensor, targets: &Tensor, ignore_index: i64) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(Param::tensor);
        x.linear_cross_entropy(&self.weight.floats()?, bias.as_ref(), targets, ignore_index)
    }

    /// Like [`Linear::activated`], but with a gated unit: `[.., in] → [.., out / 2]`, see [`Tensor::glu`].
    pub fn gated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let Some(bias) = self.late_bias(x) else { return self.forward(x)?.glu(activation) };
        self.product(x)?.add_glu(&bias.tensor(), activation)
    }
}

/// Embedding table, PyTorch's `nn.Embedding`: `weight [count, dim]`.
///
/// ```
/// use x_transformers::{DType, Device, Init, ParamStore, Tensor, nn::Embedding};
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let table = Embedding::new(&store.at("emb"), 256, 8, Init::Normal(0.02))?;
/// let tokens = Tensor::arange(5, &Device::Cpu)?;
/// assert_eq!(table.forward(&tokens)?.shape()[..], [5, 8]);
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Weight,
}

impl Embedding {
    /// Creates a table of `count` vectors.
    pub fn new(store: &ParamStore, count: usize, dim: usize, init: Init) -> Result<Self> {
        Ok(Self { weight: Weight::Param(store.param("weight", [count, dim], init)?) })
    }

    /// Shares the table of another module and registers it under this place's name too, unless it is packed.
    pub fn tied(store: &ParamStore, other: &Embedding) -> Result<Self> {
        if let Weight::Param(param) = &other.weight {
            store.tie("weight", param)?;
        }
        Ok(other.clone())
    }

    /// Replaces the table by a packed one, which has no gradient and is in no map of parameters.
    pub(crate) fn pack(&mut self, packer: Packer) -> Result<()> {
        self.weight.pack(packer)
    }

    /// Looks up rows by index: `[..] → [.., dim]`.
    ///
    /// Errors: an index is out of range.
    pub fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Weight::Param(table) => table.tensor().embedding(indices),
            Weight::Packed { matrix, dtype, .. } => matrix.embedding(indices, *dtype),
        }
    }

    /// Computes the products with all rows, plus a bias `[count]`: tied logits, `[.., dim] → [.., count]`.
    pub fn logits(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        self.weight.linear(x, bias)
    }

    /// Returns the table, `[count, dim]`; a packed one is dequantised by each call.
    ///
    /// Errors: out of memory.
    pub fn table(&self) -> Result<Tensor> {
        self.weight.floats()
    }

    /// Returns the dtype of the vectors.
    pub fn dtype(&self) -> DType {
        match &self.weight {
            Weight::Param(table) => table.tensor().dtype(),
            Weight::Packed { dtype, .. } => *dtype,
        }
    }

    /// Returns the device of the table.
    pub fn device(&self) -> Device {
        match &self.weight {
            Weight::Param(table) => table.tensor().device().clone(),
            Weight::Packed { matrix, .. } => matrix.device().clone(),
        }
    }

    /// Returns the number of vectors.
    pub fn count(&self) -> usize {
        match &self.weight {
            Weight::Param(table) => table.tensor().shape()[0],
            Weight::Packed { matrix, .. } => matrix.shape()[0],
        }
    }
}
