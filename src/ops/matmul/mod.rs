//! Matrix products: `matmul` with PyTorch's broadcasting over batches, and `linear`.

mod cuda;
mod grad;
mod joint;
mod strides;

use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::{needs, record},
    dtype::{Float, dispatch_float},
    error::ensure,
    gemm::{Multiply, gemm, gemm_sums},
    profile::{self, BackwardCost, Cost},
    tensor::{Saved, same_kind},
};
use grad::{LinearBackward, MatmulBackward};
use strides::{Merged, Sizes, positions};

/// Reports to the profile the cost of a product of `x` and another matrix with the result `y`.
fn cost(x: &Tensor, y: &Tensor) {
    profile::cost(|| {
        let steps = x.shape().last().copied().unwrap_or(1);
        Cost { operations: 2.0 * y.numel() as f64 * steps as f64, backward: BackwardCost::Products }
    });
}

impl Tensor {
    /// Computes the matrix product: `y[.., i, j] = Σ_k a[.., i, k] · b[.., k, j]`.
    ///
    /// Shapes: `[.., m, k], [.., k, n] → [.., m, n]`, leading dimensions broadcast as in PyTorch; any strides, nothing
    /// is copied. A vector on the left is treated as a row and one on the right as a column, and the added dimension is
    /// removed from the result: `[k], [k] → []`. Sums in f32 (f64 for f64); `k = 0` gives zeros. Saves each operand if
    /// the other one needs a gradient. Errors: a scalar, sizes that do not match, dtypes or devices that differ, or
    /// integers, which PyTorch cannot multiply on a GPU either.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// # fn main() -> x_transformers::Result<()> {
    /// let a = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 1, 3], &Device::Cpu)?;
    /// let b = Tensor::from_slice(&[1.0f32, 0.0, 0.0, 1.0, 1.0, 1.0], [3, 2], &Device::Cpu)?;
    /// let y = a.matmul(&b)?;
    /// assert_eq!(y.shape(), [2, 1, 2]);
    /// assert_eq!(y.to_vec::<f32>()?, [4.0, 5.0, 10.0, 11.0]);
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "bmm")]
    #[doc(alias = "mm")]
    #[doc(alias = "dot")]
    pub fn matmul(&self, b: &Tensor) -> Result<Tensor> {
        if self.rank() == 1 {
            return self.unsqueeze(0)?.matmul(b)?.squeeze(if b.rank() == 1 { 0 } else { -2 });
        }
        if b.rank() == 1 {
            return self.matmul(&b.unsqueeze(1)?)?.squeeze(-1);
        }
        let y = product(self, b, None)?;
        let [need_a, need_b] = needs("matmul", [self, b])?;
        cost(self, &y);
        record("matmul", y, &[self, b], |_| MatmulBackward {
            a: need_b.then(|| self.detach()),
            b: need_a.then(|| b.detach()),
            shapes: [*self.shape(), *b.shape()],
        })
    }

    /// Computes the affine map of a dense layer: `y = x·Wᵀ + b`.
    ///
    /// Shapes: `x [.., in]`, `weight [out, in]`, `bias [out]` → `[.., out]`, or `weight [in]`, `bias []` → `[..]`, a
    /// layer of one output without its dimension. Accumulates in f32 (f64 for f64) and adds the bias before rounding
    /// the result. Saves `x`, or how to recompute it if that is cheap, if the weight needs a gradient, and the weight
    /// if `x` needs one. Errors: sizes, dtypes or devices that do not match.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// # fn main() -> x_transformers::Result<()> {
    /// let x = Tensor::from_slice(&[1.0f32, 2.0], [1, 2], &Device::Cpu)?;
    /// let weight = Tensor::from_slice(&[1.0f32, 1.0, 0.0, 3.0, 2.0, 0.0], [3, 2], &Device::Cpu)?;
    /// let bias = Tensor::from_slice(&[0.5f32, 0.0, 0.0], [3], &Device::Cpu)?;
    /// assert_eq!(x.linear(&weight, Some(&bias))?.to_vec::<f32>()?, [3.5, 6.0, 2.0]);
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "F.linear")]
    #[doc(alias = "addmm")]
    pub fn linear(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if weight.rank() == 1 && bias.is_none_or(|bias| bias.rank() == 0) {
            let bias = bias.map(|bias| bias.unsqueeze(0)).transpose()?;
            return self.linear(&weight.unsqueeze(0)?, bias.as_ref())?.squeeze(-1);
        }
        check_linear("linear", self, weight, bias)?;
        let packed = bias.map(|bias| bias.detach().contiguous()).transpose()?;
        let y = product(&self.as_rows()?, &weight.detach().transpose(0, 1)?, packed.as_ref())?;
        let y = y.reshape(self.shape().with_dim(self.rank() - 1, weight.shape()[0]))?;
        let [need_x, need_weight] = needs("linear", [self, weight])?;
        cost(self, &y);
        let backward = |_: &Tensor| LinearBackward {
            x: need_weight.then(|| Saved::of(self)),
            weight: need_x.then(|| weight.detach()),
            shapes: [*self.shape(), *weight.shape()],
            sum: None,
        };
        match bias {
            Some(bias) => record("linear", y, &[self, weight, bias], backward),
            None => record("linear", y, &[self, weight], backward),
        }
    }

    /// Returns the same values as a constant with at least two dimensions.
    fn as_rows(&self) -> Result<Tensor> {
        if self.rank() == 1 { self.detach().unsqueeze(0) } else { Ok(self.detach()) }
    }
}

/// Checks that the shapes of `x [.., in]`, `weight [out, in]` and `bias [out]` match.
pub(super) fn check_linear(op: &'static str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let fits = x.rank() > 0 && weight.rank() == 2 && x.shape()[x.rank() - 1] == weight.shape()[1];
    ensure!(
        fits,
        Error::shape(
            op,
            format_args!("expected x [.., in] and weight [out, in], got {:?} and {:?}", x.shape(), weight.shape())
        )
    );
    same_kind(op, x, weight)?;
    if let Some(bias) = bias {
        ensure!(
            **bias.shape() == [weight.shape()[0]],
            Error::shape(op, format_args!("expected a bias [{}], got {:?}", weight.shape()[0], bias.shape()))
        );
        same_kind(op, x, bias)?;
    }
    Ok(())
}

/// Computes `a·b (+ bias)` as a constant.
pub(super) fn product(a: &Tensor, b: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let sizes = Sizes::of(a.shape(), b.shape())?;
    same_kind("matmul", a, b)?;
    let shape = sizes.with([sizes.m, sizes.n])?;
    if let Device::Gpu(gpu) = a.device()
        && shape.numel() > 0
    {
        return cuda::product(*gpu, &sizes, shape, [a, b], bias);
    }
    let mut out = Tensor::uninit(shape, a.dtype(), a.device())?;
    if out.numel() > 0 {
        let merged = Merged::new(&sizes, a, b)?;
        dispatch_float!("matmul", a.dtype(), T, run::<T>(&merged, a, b, bias, &mut out))?;
    }
    Ok(out)
}

/// Computes `sums (+)= a·b` for two matrices of any strides, `[m, k]` and `[k, n]`, in the accumulation type: `sums [m,
/// n]` is packed, and f32 for half types. Without `accumulate` it is overwritten.
pub(super) fn product_sums(a: &Tensor, b: &Tensor, accumulate: bool, sums: &mut Tensor) -> Result<()> {
    let sizes = Sizes::of(a.shape(), b.shape())?;
    // The last check before cuBLAS gets addresses.
    ensure!(
        **sums.shape() == [sizes.m, sizes.n]
            && sums.dtype() == a.dtype().accumulator()
            && sums.device() == a.device()
            && b.device() == a.device()
            && b.dtype() == a.dtype(),
        Error::shape(
            "matmul",
            format_args!(
                "expected sums [{}, {}] {} on {}, got {:?} {} on {}",
                sizes.m,
                sizes.n,
                a.dtype().accumulator(),
                a.device(),
                sums.shape(),
                sums.dtype(),
                sums.device()
            )
        )
    );
    if sums.numel() == 0 {
        return Ok(());
    }
    if let Device::Gpu(gpu) = a.device() {
        return cuda::product_sums(*gpu, &sizes, [a, b], accumulate, sums);
    }
    let merged = Merged::new(&sizes, a, b)?;
    dispatch_float!("matmul", a.dtype(), T, {
        gemm_sums::<T>(
            &merged.product(a, b, None, &|_| merged.start.into())?,
            accumulate,
            sums.values_mut::<<T as Float>::Acc>()?,
        )
    })
}

/// Computes `sums = a·b (+ bias)` like [`product_sums`] for two matrices on a GPU; the bias `[n]` has the type of `sums`.
pub(super) fn product_and_bias(a: &Tensor, b: &Tensor, bias: Option<&Tensor>, sums: &mut Tensor) -> Result<()> {
    let Some(bias) = bias else { return product_sums(a, b, false, sums) };
    let sizes = Sizes::of(a.shape(), b.shape())?;
    if let Device::Gpu(gpu) = a.device()
        && **bias.shape() == [sizes.n]
        && bias.dtype() == sums.dtype()
        && **sums.shape() == [sizes.m, sizes.n]
        && cuda::product_and_bias(*gpu, &sizes, [a, b], bias, sums)?
    {
        return Ok(());
    }
    // The product is added to it.
    *sums = bias.expand(*sums.shape())?.contiguous()?.into_owned()?;
    product_sums(a, b, true, sums)
}

/// Computes the product of two matrices and the sums of the rows of `a`, `[m, n]` and `[m]`, in `dtype`, that of the
/// operands or of their sums; `None` if no GPU computes both in one pass.
pub(super) fn product_and_row_sums(a: &Tensor, b: &Tensor, dtype: DType) -> Result<Option<[Tensor; 2]>> {
    let Device::Gpu(gpu) = *a.device() else { return Ok(None) };
    let sizes = Sizes::of(a.shape(), b.shape())?;
    same_kind("matmul", a, b)?;
    if a.rank() != 2 || b.rank() != 2 || a.numel() == 0 || b.numel() == 0 {
        return Ok(None);
    }
    cuda::product_and_row_sums(gpu, &sizes, [a, b], dtype)
}

fn run<T: Multiply>(merged: &Merged, a: &Tensor, b: &Tensor, bias: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
    let offsets = |item| positions(item, &merged.batch, &merged.strides, merged.start);
    gemm(&merged.product(a, b, bias, &offsets)?, out.values_mut::<T>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums of another size or type would be written out of bounds.
    #[test]
    fn matmul_refuses_sums_of_another_size() -> Result<()> {
        let of = |shape: [usize; 2], dtype| Tensor::zeros(shape, dtype, &Device::Cpu);
        let (a, b) = (of([5, 7], DType::BF16)?, of([7, 4], DType::BF16)?);
        for mut sums in [of([5, 3], DType::F32)?, of([4, 5], DType::F32)?, of([5, 4], DType::BF16)?] {
            let error = product_sums(&a, &b, false, &mut sums).unwrap_err().to_string();
            assert!(error.contains("expected sums [5, 4] f32 on cpu"), "{error}");
        }
        product_sums(&a, &b, false, &mut of([5, 4], DType::F32)?)
    }
}
