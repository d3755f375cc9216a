//! Normalisation of rows, or of the sum of two tensors: layer norm, RMS norm, and clamped RMS and scale norm.

mod backward;
mod cuda;
mod forward;

use backward::NormBackward;
use forward::Forward;

use crate::{
    Error, Result, Tensor,
    autograd::{Backward, InputGrads, record_beside, record_cheap},
    dtype::Real,
    error::ensure,
    tensor::same_kind,
};

impl Tensor {
    /// Applies layer norm over the last dimension: `y = (x − mean) / √(variance + eps) ⊙ weight + bias`, with the
    /// biased variance (the mean of the squared deviations). <https://arxiv.org/abs/1607.06450>
    ///
    /// Shapes: `[.., dim]`, weight and bias `[dim]` → `[.., dim]`; they default to 1 and 0. PyTorch's default `eps` is
    /// 1e-5. Statistics in f32 (f64 for f64). Saves: `x`, and the mean and inverse deviation of each row.
    ///
    /// Rows whose sum or squares overflow are normalised like any other, where PyTorch gives 0, infinities or NaN; the
    /// same holds for the other norms. A gradient that overflows when multiplied by the weight makes its row infinite
    /// or NaN, not always in the same way as PyTorch.
    ///
    /// Errors: rank 0, a dtype that is not float, dtypes that differ, a weight or bias of another shape, a negative
    /// `eps`.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// let y = x.layer_norm(None, None, 1e-5)?; // weight and bias are optional
    /// assert!(y.mean(&[-1])?.to_vec::<f32>()?.iter().all(|mean| mean.abs() < 1e-6));
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "LayerNorm")]
    pub fn layer_norm(&self, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        normalize("layer_norm", self, &self.layer_spec(weight, bias, eps))
    }

    /// Computes the sum of two tensors and its layer norm in one pass: `(x + residual, (x + residual).layer_norm(..))`.
    ///
    /// Shapes: `x` and `residual` `[.., dim]`, otherwise those of [`Tensor::layer_norm`]. Saves: the sum, and the
    /// norm's statistics of each row.
    /// Errors: those of [`Tensor::layer_norm`], or a residual of another shape.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// # fn main() -> x_transformers::Result<()> {
    /// let x = Tensor::from_slice(&[1.0f32, 5.0], [2], &Device::Cpu)?;
    /// let residual = Tensor::from_slice(&[2.0f32, 4.0], [2], &Device::Cpu)?;
    /// let (sum, normed) = x.add_layer_norm(&residual, None, None, 0.0)?;
    /// assert_eq!(sum.to_vec::<f32>()?, [3.0, 9.0]);
    /// assert_eq!(normed.to_vec::<f32>()?, [-1.0, 1.0]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn add_layer_norm(
        &self,
        residual: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Result<(Tensor, Tensor)> {
        normalize_sum("add_layer_norm", self, residual, &self.layer_spec(weight, bias, eps))
    }

    /// Applies x-transformers' RMS norm over the last dimension: `y = x / max(|x| dim^-½, eps) ⊙ g`.
    /// <https://arxiv.org/abs/1910.07467>
    ///
    /// `eps` is a floor of the divisor (1e-8 in x-transformers), not added to it; where it acts, the divisor is a
    /// constant for the gradient.
    ///
    /// Shapes: `[.., dim]`, `g` `[dim]` → `[.., dim]`. Saves: `x`, and the inverse divisor of each row.
    /// Errors: those of [`Tensor::layer_norm`].
    pub fn clamped_rms_norm(&self, g: &Tensor, eps: f64) -> Result<Tensor> {
        normalize("clamped_rms_norm", self, &self.clamped_rms_spec(g, eps))
    }

    /// Computes the sum of two tensors and its [`clamped_rms_norm`](Tensor::clamped_rms_norm), like
    /// [`Tensor::add_layer_norm`].
    pub fn add_clamped_rms_norm(&self, residual: &Tensor, g: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
        normalize_sum("add_clamped_rms_norm", self, residual, &self.clamped_rms_spec(g, eps))
    }

    /// Applies RMS norm over the last dimension, as in PyTorch's `nn.RMSNorm` and Llama: `y = x / √(mean x² + eps) ⊙
    /// g`. Unlike in [`Tensor::clamped_rms_norm`], `eps` is added. <https://arxiv.org/abs/1910.07467>
    ///
    /// Shapes: `[.., dim]`, `g` `[dim]` → `[.., dim]`. Saves: `x`, and the inverse divisor of each row.
    /// Errors: those of [`Tensor::layer_norm`].
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tensor};
    /// let x = Tensor::from_slice(&[3.0f32, -3.0], [1, 2], &Device::Cpu)?;
    /// let weight = Tensor::ones([2], DType::F32, &Device::Cpu)?;
    /// assert_eq!(x.rms_norm(&weight, 0.0)?.to_vec::<f32>()?, [1.0, -1.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "RMSNorm")]
    pub fn rms_norm(&self, g: &Tensor, eps: f64) -> Result<Tensor> {
        normalize("rms_norm", self, &self.rms_spec(g, eps))
    }

    /// Computes the sum of two tensors and its [`rms_norm`](Tensor::rms_norm), like [`Tensor::add_layer_norm`].
    pub fn add_rms_norm(&self, residual: &Tensor, g: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
        normalize_sum("add_rms_norm", self, residual, &self.rms_spec(g, eps))
    }

    /// Applies scale norm over the last dimension: [`Tensor::clamped_rms_norm`] with one weight for all features (`eps`
    /// is 1e-5 in x-transformers). <https://arxiv.org/abs/1910.05895>
    ///
    /// Shapes: `[.., dim]`, `g` `[1]` → `[.., dim]`. Saves: `x`, and the inverse divisor of each row.
    /// Errors: those of [`Tensor::layer_norm`].
    pub fn scale_norm(&self, g: &Tensor, eps: f64) -> Result<Tensor> {
        normalize("scale_norm", self, &Spec::floored(g, 1, eps))
    }

    /// Computes the sum of two tensors and its [`scale_norm`](Tensor::scale_norm), like [`Tensor::add_layer_norm`].
    pub fn add_scale_norm(&self, residual: &Tensor, g: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
        normalize_sum("add_scale_norm", self, residual, &Spec::floored(g, 1, eps))
    }

    fn features(&self) -> usize {
        self.shape().last().copied().unwrap_or(0)
    }

    fn layer_spec<'a>(&self, weight: Option<&'a Tensor>, bias: Option<&'a Tensor>, eps: f64) -> Spec<'a> {
        Spec { weight, weights: self.features(), bias, form: Form::Centred, eps }
    }

    fn clamped_rms_spec<'a>(&self, g: &'a Tensor, eps: f64) -> Spec<'a> {
        Spec::floored(g, self.features(), eps)
    }

    fn rms_spec<'a>(&self, g: &'a Tensor, eps: f64) -> Spec<'a> {
        Spec { form: Form::Rms, ..self.clamped_rms_spec(g, eps) }
    }
}

/// Offset and divisor of a row.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// The mean, and `√(variance + eps)`.
    Centred,
    /// Nothing, and `max(√mean(x²), eps)`.
    Floored,
    /// Nothing, and `√(mean(x²) + eps)`.
    Rms,
}

impl Form {
    /// Returns the number of values saved per row: mean and inverse divisor, or only the latter.
    fn statistics(self) -> usize {
        match self {
            Self::Centred => 2,
            Self::Floored | Self::Rms => 1,
        }
    }

    /// Returns the divisor of a row, given the mean square after centring.
    #[inline(always)]
    fn divisor<A: Real>(self, square: A, eps: A) -> A {
        match self {
            Self::Centred | Self::Rms => (square + eps).sqrt(),
            Self::Floored => square.sqrt().max(eps),
        }
    }

    /// Returns the number that identifies it in kernels.
    fn code(self) -> u32 {
        match self {
            Self::Floored => 0,
            Self::Centred => 1,
            Self::Rms => 2,
        }
    }

    /// Returns the floor of the divisor, at which it is a constant for the gradient; an `eps` that is added is not a
    /// floor.
    fn floor(self, eps: f64) -> f64 {
        if self == Self::Rms { 0.0 } else { eps }
    }
}

/// Parameters of a norm.
#[derive(Clone, Copy)]
struct Spec<'a> {
    weight: Option<&'a Tensor>,
    /// Number of elements of the weight.
    weights: usize,
    bias: Option<&'a Tensor>,
    form: Form,
    eps: f64,
}

impl<'a> Spec<'a> {
    fn floored(g: &'a Tensor, weights: usize, eps: f64) -> Self {
        Self { weight: Some(g), weights, bias: None, form: Form::Floored, eps }
    }

    fn check(&self, op: &'static str, x: &Tensor) -> Result<()> {
        ensure!(x.rank() > 0, Error::shape(op, "expected at least one dimension, got a scalar"));
        ensure!(
            self.eps >= 0.0 && self.eps.is_finite(),
            Error::argument(op, format_args!("expected a finite eps of at least 0, got {}", self.eps))
        );
        x.dtype().expect_float(op)?;
        for (name, operand, expected) in [("weight", self.weight, self.weights), ("bias", self.bias, x.features())] {
            let Some(operand) = operand else { continue };
            same_kind(op, x, operand)?;
            ensure!(
                **operand.shape() == [expected],
                Error::shape(
                    op,
                    format_args!(
                        "expected a {name} of shape [{expected}] for {:?}, got {:?}",
                        x.shape(),
                        operand.shape()
                    )
                )
            );
        }
        Ok(())
    }
}

fn normalize(op: &'static str, x: &Tensor, spec: &Spec) -> Result<Tensor> {
    spec.check(op, x)?;
    let x = x.contiguous()?;
    let Forward { y, statistics, .. } = Forward::of(op, &x, None, spec)?;
    record_norm(op, &x, y, statistics, spec)
}

/// Computes the sum and its norm.
fn normalize_sum(op: &'static str, x: &Tensor, residual: &Tensor, spec: &Spec) -> Result<(Tensor, Tensor)> {
    spec.check(op, x)?;
    same_kind(op, x, residual)?;
    ensure!(
        x.shape() == residual.shape(),
        Error::shape(op, format_args!("expected a residual {:?}, got {:?}", x.shape(), residual.shape()))
    );
    let (x, residual) = (x.contiguous()?, residual.contiguous()?);
    let Forward { y, sum, statistics } = Forward::of(op, &x, Some(&residual), spec)?;
    let sum = sum.ok_or_else(|| Error::argument(op, "no sum was computed"))?;
    // Two nodes with one output each: the gradient of the sum is complete once the norm has added its part.
    let sum = record_beside(op, sum, &[&x, &residual], |_| SumBackward)?;
    let y = record_norm(op, &sum, y, statistics, spec)?;
    Ok((sum, y))
}

/// Records `y` as the norm of `x`.
fn record_norm(op: &'static str, x: &Tensor, y: Tensor, statistics: Tensor, spec: &Spec) -> Result<Tensor> {
    let &Spec { weight, weights, bias, form, eps } = spec;
    let inputs: Vec<&Tensor> = [Some(x), weight, bias].into_iter().flatten().collect();
    let backward = |_: &Tensor| NormBackward {
        op,
        x: x.detach(),
        statistics,
        weight: weight.map(Tensor::detach),
        has_bias: bias.is_some(),
        form,
        eps: form.floor(eps),
        onto: None,
    };
    let (kept, operands) = (x.detach(), [weight, bias].map(|operand| operand.map(Tensor::detach)));
    let again = move || {
        let [weight, bias] = operands.each_ref().map(Option::as_ref);
        Ok(Forward::of(op, &kept, None, &Spec { weight, weights, bias, form, eps })?.y)
    };
    record_cheap(op, y, &inputs, backward, again)
}

struct SumBackward;

impl Backward for SumBackward {
    fn name(&self) -> &'static str {
        "add"
    }

    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let residual = need[1].then(|| grad.clone());
        Ok(InputGrads::whole([need[0].then_some(grad), residual]))
    }
}

/// Returns the number of rows.
fn rows(x: &Tensor) -> Result<usize> {
    Ok(x.numel().checked_div(x.dim(-1)?).unwrap_or(0))
}

/// Number of independent sums: enough that the compiler vectorises whole loops over them and no addition waits for
/// another.
const LANES: usize = 64;

/// Returns a packed constant.
pub(super) fn packed(values: Option<&Tensor>) -> Result<Option<Tensor>> {
    values.map(|values| values.detach().contiguous()).transpose()
}

/// Returns a weight or bias in the compute type, one element per feature, so that the loops have one form.
pub(super) fn widen<R: Real>(op: &'static str, values: Option<&Tensor>, width: usize, default: R) -> Result<Vec<R>> {
    let Some(values) = packed(values)? else { return Ok(vec![default; width]) };
    let values = values.floats(op)?.to_vec::<R>();
    Ok(if let [one] = values[..] { vec![one; width] } else { values })
}

/// Returns the tensor to overwrite, and the tensor to read from if it is a different one.
///
/// A gradient that no other handle shares is overwritten in place, which saves the memory for another.
pub(crate) fn reuse(x: Tensor) -> Result<(Tensor, Option<Tensor>)> {
    let packed = x.contiguous()?;
    // Otherwise this handle would count as a second one.
    drop(x);
    let mut x = packed;
    if x.is_unique() { Ok((x, None)) } else { Ok((x.uninit_like()?, Some(x))) }
}
