//! Linear layers and embedding tables.

use std::sync::Arc;

use crate::{
    Init, Param, ParamStore, Result, Tensor,
    ops::{Activation, Int8Matrix},
};

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
    weight: Param,
    bias: Option<Param>,
    /// 8-bit weight, used instead of the weight once quantized.
    int8: Option<Arc<Int8Matrix>>,
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

    /// Creates a layer with these initial values, and a bias if it has one.
    pub fn with_init(
        store: &ParamStore,
        fan_in: usize,
        fan_out: usize,
        weight: Init,
        bias: Option<Init>,
    ) -> Result<Self> {
        Ok(Self {
            weight: store.param("weight", [fan_out, fan_in], weight)?,
            bias: bias.map(|bias| store.param("bias", [fan_out], bias)).transpose()?,
            int8: None,
        })
    }

    /// Computes the layer: `[.., in] → [.., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.product(x, self.bias.as_ref())
    }

    /// Returns the weight, `[out, in]`.
    pub(super) fn weight(&self) -> Tensor {
        self.weight.tensor()
    }

    /// Computes the product with the weight or its 8-bit form, plus the bias if one is given.
    fn product(&self, x: &Tensor, bias: Option<&Param>) -> Result<Tensor> {
        let bias = bias.map(Param::tensor);
        match &self.int8 {
            Some(weight) => weight.linear(x, bias.as_ref()),
            None => x.linear(&self.weight.tensor(), bias.as_ref()),
        }
    }

    /// Quantizes the weight to 8 bits for later calls.
    ///
    /// Errors: a weight that is not finite.
    pub fn quantize_int8(&mut self) -> Result<()> {
        self.int8 = Some(Arc::new(Int8Matrix::quantize(&self.weight.tensor().detach())?));
        Ok(())
    }

    /// Computes `activation(x Wᵀ + b)`, with the bias fused into the activation.
    pub fn activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let Some(bias) = &self.bias else { return activation.of(&self.forward(x)?) };
        self.product(x, None)?.add_activation(&bias.tensor(), activation)
    }

    /// Computes the mean cross-entropy of the outputs, see [`Tensor::linear_cross_entropy`].
    pub fn cross_entropy(&self, x: &Tensor, targets: &Tensor, ignore_index: i64) -> Result<Tensor> {
        if self.int8.is_some() {
            return self.forward(x)?.cross_entropy(targets, ignore_index);
        }
        let bias = self.bias.as_ref().map(Param::tensor);
        x.linear_cross_entropy(&self.weight.tensor(), bias.as_ref(), targets, ignore_index)
    }

    /// Like [`Linear::activated`], but with a gated unit: `[.., in] → [.., out / 2]`, see [`Tensor::glu`].
    pub fn gated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let Some(bias) = &self.bias else { return self.forward(x)?.glu(activation) };
        self.product(x, None)?.add_glu(&bias.tensor(), activation)
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
    weight: Param,
}

impl Embedding {
    /// Creates a table of `count` vectors.
    pub fn new(store: &ParamStore, count: usize, dim: usize, init: Init) -> Result<Self> {
        Ok(Self { weight: store.param("weight", [count, dim], init)? })
    }

    /// Shares the table of another module and registers it under this place's name too.
    pub fn tied(store: &ParamStore, other: &Embedding) -> Result<Self> {
        Ok(Self { weight: store.tie("weight", &other.weight)? })
    }

    /// Looks up rows by index: `[..] → [.., dim]`.
    ///
    /// Errors: an index is out of range.
    pub fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        self.weight.tensor().embedding(indices)
    }

    /// Returns the table, `[count, dim]`.
    pub fn table(&self) -> Tensor {
        self.weight.tensor()
    }
}
