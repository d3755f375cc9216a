//! Matrix products: `matmul` with PyTorch's broadcasting over batches, and `linear`.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod amx_emulator;
pub(crate) mod cpu;
mod cuda;
mod few;
mod int8;
mod lanes;
mod microkernel;
mod pack;
pub(crate) mod packing;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod shared;
mod skinny;

use crate::{
    Device, Error, Result, Tensor,
    autograd::{Backward, InputGrads, needs, record},
    dtype::{Float, dispatch_float},
    error::ensure,
    profile::{self, BackwardCost, Cost},
    shape::{MAX_RANK, Shape, collapse},
    tensor::{Saved, same_kind},
};
use cpu::{Matrix, Product, gemm, gemm_sums};
pub use int8::Int8Matrix;
use packing::Multiply;

/// Tells the profile of the product of `x` and another matrix that gave `y`.
fn cost(x: &Tensor, y: &Tensor) {
    profile::cost(|| {
        let steps = x.shape().last().copied().unwrap_or(1);
        Cost { operations: 2.0 * y.numel() as f64 * steps as f64, backward: BackwardCost::Products }
    });
}

impl Tensor {
    /// Matrix product: `y[.., i, j] = Σ_k a[.., i, k] · b[.., k, j]`.
    ///
    /// Shapes: `[.., m, k], [.., k, n] → [.., m, n]`, the dimensions in front broadcast as in PyTorch; any strides,
    /// nothing is copied. A vector on the left is a row and one on the right a column, whose dimension the result has
    /// not: `[k], [k] → []`. Sums in f32 (f64 for f64); `k = 0` gives zeros. Saves each operand if the other one needs
    /// a gradient. Errors: a scalar, sizes that do not match, dtypes or devices that differ, or integers, which PyTorch
    /// does not multiply on a GPU either.
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

    /// The affine map of a dense layer: `y = x·Wᵀ + b`.
    ///
    /// Shapes: `x [.., in]`, `weight [out, in]`, `bias [out]` → `[.., out]`, or `weight [in]`, `bias []` → `[..]`, the
    /// layer of one output without its dimension. Sums in f32 (f64 for f64), the bias is
    /// added before the result is rounded. Saves `x`, or how to compute it again if that is cheap, if the weight needs
    /// a gradient, and the weight if `x` needs one. Errors: sizes that do not match, other dtypes or devices.
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

    /// The same values as a constant with at least two dimensions.
    fn as_rows(&self) -> Result<Tensor> {
        if self.rank() == 1 { self.detach().unsqueeze(0) } else { Ok(self.detach()) }
    }
}

/// Checks that `x [.., in]`, `weight [out, in]` and `bias [out]` fit.
pub(super) fn check_linear(op: &'static str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let fits = x.rank() > 0 && weight.rank() == 2 && x.shape()[x.rank() - 1] == weight.shape()[1];
    ensure!(
        fits,
        Error::shape(
            op,
            format!("expected x [.., in] and weight [out, in], got {:?} and {:?}", x.shape(), weight.shape())
        )
    );
    same_kind(op, x, weight)?;
    if let Some(bias) = bias {
        ensure!(
            **bias.shape() == [weight.shape()[0]],
            Error::shape(op, format!("expected a bias [{}], got {:?}", weight.shape()[0], bias.shape()))
        );
        same_kind(op, x, bias)?;
    }
    Ok(())
}

/// The sizes of a product of two tensors.
struct Sizes {
    /// The broadcast dimensions in front.
    batch: Shape,
    m: usize,
    n: usize,
    k: usize,
    /// Rows that one matrix of B multiplies, by the shapes alone: with those of the last dimensions of the batch that B has
    /// not. Products that depend on the number of rows must not depend on how they lie in memory.
    rows: usize,
}

impl Sizes {
    fn of(a: &Shape, b: &Shape) -> Result<Self> {
        ensure!(
            a.rank() >= 2 && b.rank() >= 2,
            Error::shape("matmul", format!("expected at least one dimension each, got {a:?} and {b:?}"))
        );
        let (batch_a, [m, k]) = split_last_two(a);
        let (batch_b, [rows, n]) = split_last_two(b);
        ensure!(
            k == rows,
            Error::shape("matmul", format!("{a:?} and {b:?} do not match: {k} columns times {rows} rows"))
        );
        let batch = batch_a.broadcast(&batch_b, "matmul")?;
        let own = |back: usize| batch_b.rank().checked_sub(back).map_or(1, |dim| batch_b[dim]);
        let shared = (1..=batch.rank()).take_while(|&back| own(back) == 1).map(|back| batch[batch.rank() - back]);
        let rows = shared.fold(m, usize::saturating_mul);
        Ok(Self { batch, m, n, k, rows })
    }

    /// The batch followed by two more dimensions.
    fn with(&self, last: [usize; 2]) -> Result<Shape> {
        let mut dims = self.batch.to_vec();
        dims.extend(last);
        Shape::new(&dims)
    }
}

fn split_last_two(shape: &Shape) -> (Shape, [usize; 2]) {
    let (batch, last) = shape.split_at(shape.rank() - 2);
    (Shape::unchecked(batch), [last[0], last[1]])
}

/// `a·b (+ bias)` as a constant.
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

/// `sums (+)= a·b` for two matrices of any strides, `[m, k]` and `[k, n]`, in the type of the sums: `sums [m, n]` is packed,
/// and f32 for half types. Without `accumulate` it is overwritten.
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
            format!(
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

/// A product with as few items in its batch as the strides allow.
struct Merged {
    batch: Shape,
    /// Steps of both operands along the batch.
    strides: [[usize; MAX_RANK]; 2],
    /// Where both operands start in their storage.
    start: [usize; 2],
    m: usize,
    n: usize,
    k: usize,
    rows: usize,
    /// Steps of A from row to row and from column to column.
    a: [usize; 2],
    b: [usize; 2],
}

impl Merged {
    fn new(sizes: &Sizes, a: &Tensor, b: &Tensor) -> Result<Self> {
        let &Sizes { batch, mut m, n, k, rows } = sizes;
        let (a_layout, b_layout) = (a.layout().expand(sizes.with([m, k])?), b.layout().expand(sizes.with([k, n])?));
        let mut rank = batch.rank();
        let [mut a_row, a_col] = [a_layout.strides[rank], a_layout.strides[rank + 1]];
        let b_steps = [b_layout.strides[rank], b_layout.strides[rank + 1]];
        // A dimension along which B repeats continues the rows of A, if their strides agree: one tall product.
        while rank > 0 && (batch[rank - 1] == 1 || b_layout.strides[rank - 1] == 0) {
            let (size, stride) = (batch[rank - 1], a_layout.strides[rank - 1]);
            if size != 1 && m != 1 && stride != m * a_row {
                break;
            }
            if m == 1 && size != 1 {
                a_row = stride;
            }
            m *= size;
            rank -= 1;
        }
        let batch = Shape::unchecked(&batch[..rank]);
        let (batch, strides) = collapse(&batch, [&a_layout.strides()[..rank], &b_layout.strides()[..rank]]);
        let start = [a_layout.offset, b_layout.offset];
        Ok(Self { batch, strides, start, m, n, k, rows, a: [a_row, a_col], b: b_steps })
    }
}

impl Merged {
    /// What is multiplied on the processor.
    fn product<'a, T: Multiply>(
        &self,
        a: &'a Tensor,
        b: &'a Tensor,
        bias: Option<&'a Tensor>,
        offsets: &'a (dyn Fn(usize) -> (usize, usize) + Sync),
    ) -> Result<Product<'a, T>> {
        let matrix = |data, [row, col]: [usize; 2]| Matrix { data, row, col };
        Ok(Product {
            batch: self.batch.numel(),
            m: self.m,
            n: self.n,
            k: self.k,
            rows: self.rows,
            a: matrix(a.storage::<T>()?, self.a),
            b: matrix(b.storage::<T>()?, self.b),
            offsets,
            bias: bias.map(Tensor::values::<T>).transpose()?,
        })
    }
}

fn run<T: Multiply>(merged: &Merged, a: &Tensor, b: &Tensor, bias: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
    let offsets = |item| positions(item, &merged.batch, &merged.strides, merged.start);
    gemm(&merged.product(a, b, bias, &offsets)?, out.values_mut::<T>()?)
}

/// Where both operands of an item of the batch start.
fn positions(mut item: usize, batch: &Shape, strides: &[[usize; MAX_RANK]; 2], start: [usize; 2]) -> (usize, usize) {
    let [mut a, mut b] = start;
    for dim in (0..batch.rank()).rev() {
        a += item % batch[dim] * strides[0][dim];
        b += item % batch[dim] * strides[1][dim];
        item /= batch[dim];
    }
    (a, b)
}

struct MatmulBackward {
    a: Option<Tensor>,
    b: Option<Tensor>,
    shapes: [Shape; 2],
}

impl Backward for MatmulBackward {
    fn name(&self) -> &'static str {
        "matmul"
    }

    /// `dA = G·Bᵀ`, `dB = Aᵀ·G`, summed over the dimensions that were broadcast.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let [a_shape, b_shape] = self.shapes;
        let da = match self.b.filter(|_| need[0]) {
            Some(b) => Some(product(&grad, &b.transpose(-1, -2)?, None)?.sum_to(a_shape)?),
            None => None,
        };
        let db = match self.a.filter(|_| need[1]) {
            Some(a) => Some(right_gradient(&a, &grad, b_shape)?),
            None => None,
        };
        Ok(InputGrads::whole([da, db]))
    }
}

/// `Aᵀ·G`, summed to the shape of B.
fn right_gradient(a: &Tensor, grad: &Tensor, b_shape: Shape) -> Result<Tensor> {
    if a.numel() == 0 || grad.numel() == 0 {
        return Tensor::zeros(b_shape, grad.dtype(), grad.device());
    }
    let (batch, [m, n]) = split_last_two(grad.shape());
    let k = a.shape()[a.rank() - 1];
    let (b_batch, _) = split_last_two(&b_shape);
    // The last dimensions along which B repeats join the rows that are summed over: one product instead of many.
    let repeats = (1..=batch.rank())
        .take_while(|&back| b_batch.rank().checked_sub(back).is_none_or(|dim| b_batch[dim] == 1))
        .count();
    let (kept, joined) = batch.split_at(batch.rank() - repeats);
    let rows = joined.iter().product::<usize>() * m;
    let shape = |last: [usize; 2]| Shape::new(&[kept, &last].concat());
    let a = a.expand(Shape::new(&[&*batch, &[m, k]].concat())?)?.reshape(shape([rows, k])?)?;
    let grad = grad.reshape(shape([rows, n])?)?;
    let sum = product(&a.transpose(-1, -2)?, &grad, None)?;
    // What is left in front of B's shape has size 1 now.
    let b_kept = b_batch.rank().saturating_sub(repeats);
    sum.sum_to(Shape::new(&[&b_batch[..b_kept], &[k, n]].concat())?)?.reshape(b_shape)
}

struct LinearBackward {
    x: Option<Saved>,
    weight: Option<Tensor>,
    shapes: [Shape; 2],
    /// What later ops have given to `x`.
    sum: Option<Tensor>,
}

impl LinearBackward {
    /// `sum + g·W`, written over the sum.
    fn add_product(sum: Tensor, grad: &Tensor, weight: &Tensor, shape: Shape) -> Result<Tensor> {
        let [outputs, inputs] = [weight.dim(0)?, weight.dim(1)?];
        let rows = shape.without(shape.rank() - 1).numel();
        let mut flat = sum.reshape([rows, inputs])?;
        // Otherwise this handle would be another one.
        drop(sum);
        product_sums(&grad.reshape([rows, outputs])?, weight, true, &mut flat)?;
        flat.reshape(shape)
    }
}

impl Backward for LinearBackward {
    fn name(&self) -> &'static str {
        "linear"
    }

    /// Where sums have the type of the gradient: half types would round once more.
    fn accumulate_into(&mut self, mut sum: Tensor) -> Option<Tensor> {
        let adds = self.weight.is_some() && sum.dtype() == sum.dtype().accumulator() && sum.is_unique();
        self.sum = adds.then(|| sum.detach());
        (!adds).then_some(sum)
    }

    /// `dx = g·W`, `dW = gᵀ·x`, `db = Σ_rows g`.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let [x_shape, weight_shape] = self.shapes;
        let grad = grad.as_rows()?;
        // First what needs the input, which is gone when the gradient of its size is made.
        let dw = match self.x.filter(|_| need[1]) {
            Some(x) => Some(right_gradient(&grad, &x.value()?.as_rows()?, weight_shape)?),
            None => None,
        };
        let dx = match (self.weight.filter(|_| need[0]), self.sum) {
            (Some(weight), Some(sum)) => Some(Self::add_product(sum, &grad, &weight, x_shape)?),
            (Some(weight), None) => Some(product(&grad, &weight, None)?.reshape(x_shape)?),
            (None, _) => None,
        };
        let mut grads = vec![dx, dw];
        if let Some(&need_bias) = need.get(2) {
            let rows: Vec<isize> = (0..grad.rank() as isize - 1).collect();
            grads.push(if need_bias { Some(grad.sum(&rows)?) } else { None });
        }
        Ok(InputGrads::whole(grads))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    /// Sums of another size or type would be written beyond their end.
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

    /// The instructions follow from the shapes: rows of a batch count where it has one matrix B.
    #[test]
    fn matmul_rows_by_shape() -> Result<()> {
        let rows = |a: &[usize], b: &[usize]| Ok(Sizes::of(&Shape::new(a)?, &Shape::new(b)?)?.rows);
        assert_eq!(rows(&[5, 7], &[7, 4])?, 5);
        assert_eq!(rows(&[3, 2, 5, 7], &[7, 4])?, 30);
        assert_eq!(rows(&[3, 2, 5, 7], &[3, 1, 7, 4])?, 10);
        assert_eq!(rows(&[3, 2, 5, 7], &[3, 2, 7, 4])?, 5);
        assert_eq!(rows(&[3, 2, 5, 7], &[1, 2, 7, 4])?, 5);
        assert_eq!(rows(&[5, 7], &[3, 1, 7, 4])?, 5);
        rows(&[5, 7], &[6, 4]).map_or(Ok(()), |rows| panic!("{rows} rows of what does not fit"))
    }
}
