//! Elementwise ops: one table row per unary or binary function, with its derivative.

use crate::{
    DType, Device, Element, Error, Result, Shape, Tensor,
    core::{
        Backward, Contributions, Float, Layout, Real, collapse_layouts, computed, discrete, dispatch_float, needs,
        record, record_cheap,
    },
    device::{CudaDevice, Grid, Storage, args, cpu, simd::vectorized},
    error::ensure,
    ops::{
        copy::{same_device, same_kind},
        norm::reuse,
    },
};

/// What a unary op keeps for its derivative.
pub(crate) enum Keep {
    Input,
    Output,
}

/// A differentiable function of one number.
pub(crate) trait Unary: 'static {
    const NAME: &'static str;
    const KEEP: Keep;
    /// The value; `FUSED` as for [`Real::fma`].
    fn value<R: Real, const FUSED: bool>(x: R) -> R;
    /// The derivative at `kept`, which is the input or the output as [`Unary::KEEP`] says.
    fn derivative<R: Real, const FUSED: bool>(kept: R) -> R;
}

/// The table: method, type, what the derivative is written in, value, derivative.
macro_rules! unary {
    ($($(#[$doc:meta])* $method:ident $Type:ident $keep:ident |$x:ident| $value:expr, |$k:ident| $derivative:expr;)*) => {
        $(
            pub(crate) struct $Type;

            impl Unary for $Type {
                const NAME: &'static str = stringify!($method);
                const KEEP: Keep = Keep::$keep;
                #[inline(always)]
                fn value<R: Real, const FUSED: bool>($x: R) -> R {
                    $value
                }
                #[inline(always)]
                fn derivative<R: Real, const FUSED: bool>($k: R) -> R {
                    $derivative
                }
            }
        )*

        impl Tensor {
            $(
                $(#[$doc])*
                ///
                /// Errors: a dtype that is not float.
                pub fn $method(&self) -> Result<Tensor> {
                    unary::<$Type>(self)
                }
            )*
        }

        #[cfg(all(test, feature = "cuda"))]
        const UNARY: &[&str] = &[$(stringify!($method)),*];
    };
}

/// A constant in the type of the computation.
#[inline(always)]
fn c<R: Real>(x: f64) -> R {
    R::from_f64(x)
}

unary! {
    /// `−x`. Saves nothing but the input's handle.
    neg Neg Input |x| -x, |_x| -R::ONE;
    /// `e^x`. Saves the output.
    exp Exp Output |x| x.fused_exp::<FUSED>(), |y| y;
    /// The natural logarithm. Saves the input.
    ln Ln Input |x| x.ln(), |x| R::ONE / x;
    /// `√x`. Saves the output.
    sqrt Sqrt Output |x| x.sqrt(), |y| c::<R>(0.5) / y;
    /// `x²`. Saves the input.
    square Square Input |x| x * x, |x| x + x;
    /// `1 / (1 + e^−x)`. Saves the output.
    sigmoid Sigmoid Output |x| x.sigmoid::<FUSED>(), |y| y * (R::ONE - y);
    /// The hyperbolic tangent. Saves the output.
    tanh Tanh Output |x| x.fused_tanh::<FUSED>(), |y| R::ONE - y * y;
    /// `max(x, 0)`; the derivative at 0 is 0. Saves the output.
    relu Relu Output |x| relu(x), |y| if y > R::ZERO { R::ONE } else { R::ZERO };
    /// `max(x, 0)²` (So et al., Primer, <https://arxiv.org/abs/2109.08668>). Saves the input.
    relu_squared ReluSquared Input |x| { let y = relu(x); y * y }, |x| { let y = relu(x); y + y };
    /// `x Φ(x)` with the exact normal distribution, by erf (Hendrycks and Gimpel,
    /// <https://arxiv.org/abs/1606.08415>). Saves the input.
    gelu Gelu Input
        |x| x.gelu::<FUSED>(),
        |x| { let (below, density) = x.normal::<FUSED>(); x.fma::<FUSED>(density, below) };
    /// `x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2`, the approximation of [`Tensor::gelu`] that BERT's authors and GPT-2
    /// computed with (Hendrycks and Gimpel, <https://arxiv.org/abs/1606.08415>). Saves the input.
    gelu_tanh GeluTanh Input |x| x * gelu_gate::<R, FUSED>(x),
        |x| gelu_gate::<R, FUSED>(x) + x * gelu_gate_slope::<R, FUSED>(x);
    /// `x / (1 + e^−x)`, also called swish (Elfwing et al., <https://arxiv.org/abs/1702.03118>). Saves the input.
    silu Silu Input |x| x * x.sigmoid::<FUSED>(),
        |x| { let gate = x.sigmoid::<FUSED>(); gate * (R::ONE + x * (R::ONE - gate)) };
}

/// What multiplies `x` in the approximation of GELU: a sigmoid of twice the angle of its tanh.
#[inline(always)]
fn gelu_gate<R: Real, const FUSED: bool>(x: R) -> R {
    (c::<R>(GELU_ANGLE) * x * (R::ONE + c::<R>(0.044_715) * x * x)).sigmoid::<FUSED>()
}

/// The derivative of [`gelu_gate`].
#[inline(always)]
fn gelu_gate_slope<R: Real, const FUSED: bool>(x: R) -> R {
    let gate = gelu_gate::<R, FUSED>(x);
    gate * (R::ONE - gate) * c::<R>(GELU_ANGLE) * (R::ONE + c::<R>(3.0 * 0.044_715) * x * x)
}

/// `2 √(2/π)`
const GELU_ANGLE: f64 = 1.595_769_121_605_730_7;

/// `max(x, 0)`, keeping NaN.
#[inline(always)]
fn relu<R: Real>(x: R) -> R {
    if x < R::ZERO { R::ZERO } else { x }
}

/// Element operations that a transcendental function counts for.
const COST: usize = 8;

fn unary<F: Unary>(x: &Tensor) -> Result<Tensor> {
    x.dtype().expect_float(F::NAME)?;
    let x = x.contiguous()?;
    let mut y = x.uninit_like()?;
    match x.device() {
        Device::Cpu => dispatch_float!(F::NAME, x.dtype(), T, {
            let from = x.values::<T>()?;
            cpu::for_rows(y.values_mut::<T>()?, 1, COST, |at, y| map::<T, F>(&from[at..at + y.len()], y));
            Ok(())
        })?,
        Device::Cuda(gpu) => {
            let n = x.elements();
            gpu.kernel("unary_fwd", &[("DTYPE", x.dtype().name()), ("FUNCTION", F::NAME)])?
                .launch(Grid::packets(n, x.dtype()), args![&mut y, &x, n as i64])?;
        }
    }
    let rule = |kept: &Tensor| UnaryBackward::<F> { kept: kept.detach(), function: std::marker::PhantomData };
    match F::KEEP {
        Keep::Output => record(F::NAME, y, &[&x], rule),
        Keep::Input => {
            let kept = x.detach();
            record_cheap(F::NAME, y, &[&x], |_| rule(&x), move || unary::<F>(&kept))
        }
    }
}

vectorized! {
    fn map<T: Float, F: Unary>(x: &[T], y: &mut [T]) {
        for (x, y) in x.iter().zip(y) {
            *y = T::from_acc(F::value::<T::Acc, FUSED>(x.to_acc()));
        }
    }
}

struct UnaryBackward<F> {
    kept: Tensor,
    function: std::marker::PhantomData<F>,
}

impl<F: Unary> Backward for UnaryBackward<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    /// `dx = g ⊙ f'`
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<Contributions> {
        let (mut dx, source) = reuse(grad)?;
        match *dx.device() {
            Device::Cpu => dispatch_float!(F::NAME, dx.dtype(), T, {
                let kept = self.kept.values::<T>()?;
                let source = source.as_ref().map(|source| source.values::<T>()).transpose()?;
                cpu::for_rows(dx.values_mut::<T>()?, 1, COST, |at, dx| {
                    let range = at..at + dx.len();
                    map_backward::<T, F>(&kept[range.clone()], source.map(|source| &source[range]), dx);
                });
                Ok(())
            })?,
            Device::Cuda(gpu) => {
                let (n, dtype) = (dx.elements(), dx.dtype());
                gpu.kernel("unary_bwd", &[("DTYPE", dtype.name()), ("FUNCTION", F::NAME)])?.launch(
                    Grid::packets(n, dtype),
                    args![&mut dx, &self.kept, source.as_ref().unwrap_or(&dx), n as i64],
                )?;
            }
        }
        Ok(Contributions::one(dx))
    }
}

vectorized! {
    /// `dx` holds the gradient of the output before, unless `source` does.
    fn map_backward<T: Float, F: Unary>(kept: &[T], source: Option<&[T]>, dx: &mut [T]) {
        let gradient = |g: T, kept: &T| T::from_acc(g.to_acc() * F::derivative::<T::Acc, FUSED>(kept.to_acc()));
        match source {
            Some(source) => {
                for ((dx, g), kept) in dx.iter_mut().zip(source).zip(kept) {
                    *dx = gradient(*g, kept);
                }
            }
            None => {
                for (dx, kept) in dx.iter_mut().zip(kept) {
                    *dx = gradient(*dx, kept);
                }
            }
        }
    }
}

impl Tensor {
    /// `x · multiplier + summand` with constants; computed in f32 for half types. Saves nothing.
    ///
    /// Errors: a dtype that is not float.
    pub fn affine(&self, multiplier: f64, summand: f64) -> Result<Tensor> {
        self.dtype().expect_float("affine")?;
        let x = self.contiguous()?;
        let mut y = x.uninit_like()?;
        match x.device() {
            Device::Cpu => dispatch_float!("affine", x.dtype(), T, {
                let from = x.values::<T>()?;
                let (a, b) = (c::<<T as Float>::Acc>(multiplier), c::<<T as Float>::Acc>(summand));
                cpu::for_rows(y.values_mut::<T>()?, 1, 1, |at, y| affine::<T>(&from[at..at + y.len()], y, a, b));
                Ok(())
            })?,
            Device::Cuda(gpu) => {
                let n = x.elements();
                gpu.kernel("affine_fwd", &[("DTYPE", x.dtype().name())])?
                    .launch(Grid::packets(n, x.dtype()), args![&mut y, &x, n as i64, multiplier, summand])?;
            }
        }
        record("affine", y, &[&x], |_| AffineBackward { multiplier })
    }
}

vectorized! {
    fn affine<T: Float>(x: &[T], y: &mut [T], a: T::Acc, b: T::Acc) {
        for (x, y) in x.iter().zip(y) {
            *y = T::from_acc(x.to_acc() * a + b);
        }
    }
}

struct AffineBackward {
    multiplier: f64,
}

impl Backward for AffineBackward {
    fn name(&self) -> &'static str {
        "affine"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<Contributions> {
        grad.affine(self.multiplier, 0.0).map(Contributions::one)
    }
}

/// A function of two numbers, with broadcasting; its backward is made of tensors.
trait Binary: 'static {
    const NAME: &'static str;
    fn value<R: Real>(a: R, b: R) -> R;
    /// Whether the gradients need the inputs (first, second).
    const SAVES: (bool, bool);
    fn gradients(g: &Tensor, saved: &Saved, need: &[bool]) -> Result<[Option<Tensor>; 2]>;
}

/// The inputs that a binary op kept.
struct Saved {
    a: Option<Tensor>,
    b: Option<Tensor>,
}

/// The tensor that a forward pass kept because a gradient needs it.
fn kept<'a>(op: &'static str, saved: &'a Option<Tensor>) -> Result<&'a Tensor> {
    saved.as_ref().ok_or_else(|| Error::argument(op, "an input that its gradient needs was not kept"))
}

macro_rules! binary {
    ($($(#[$doc:meta])* $method:ident $Type:ident |$a:ident, $b:ident| $value:expr, saves $saves:expr,
        |$g:ident, $saved:ident| ($da:expr, $db:expr);)*) => {
        $(
            struct $Type;

            impl Binary for $Type {
                const NAME: &'static str = stringify!($method);
                const SAVES: (bool, bool) = $saves;
                #[inline(always)]
                fn value<R: Real>($a: R, $b: R) -> R {
                    $value
                }
                fn gradients($g: &Tensor, $saved: &Saved, need: &[bool]) -> Result<[Option<Tensor>; 2]> {
                    Ok([if need[0] { Some($da) } else { None }, if need[1] { Some($db) } else { None }])
                }
            }
        )*

        impl Tensor {
            $(
                $(#[$doc])*
                ///
                /// Shapes broadcast as in PyTorch. Errors: shapes that do not, dtypes or devices that differ, or a
                /// dtype that is not float.
                pub fn $method(&self, other: &Tensor) -> Result<Tensor> {
                    binary::<$Type>(self, other)
                }
            )*
        }

        #[cfg(all(test, feature = "cuda"))]
        const BINARY: &[&str] = &[$(stringify!($method)),*];
    };
}

binary! {
    /// `a + b`. Saves nothing.
    add Add |a, b| a + b, saves (false, false), |g, _s| (g.clone(), g.clone());
    /// `a − b`. Saves nothing.
    sub Sub |a, b| a - b, saves (false, false), |g, _s| (g.clone(), g.neg()?);
    /// `a · b`, elementwise. Saves each input that the other's gradient needs.
    mul Mul |a, b| a * b, saves (true, true), |g, s| (g.mul(kept("mul", &s.b)?)?, g.mul(kept("mul", &s.a)?)?);
    /// `a / b`, elementwise. Saves the inputs.
    div Div |a, b| a / b, saves (true, true), |g, s| (
        g.div(kept("div", &s.b)?)?,
        g.mul(kept("div", &s.a)?)?.div(&kept("div", &s.b)?.square()?)?.neg()?
    );
}

fn binary<F: Binary>(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.dtype().expect_float(F::NAME)?;
    same_kind(F::NAME, a, b)?;
    let shape = a.shape().broadcast(b.shape(), F::NAME)?;
    let mut y = Tensor::uninit(shape, a.dtype(), a.device())?;
    match a.device() {
        Device::Cpu => dispatch_float!(F::NAME, a.dtype(), T, {
            let layouts = [&a.layout().expand(shape), &b.layout().expand(shape)];
            let (a, b) = (a.storage::<T>()?, b.storage::<T>()?);
            cpu::for_strided(y.values_mut::<T>()?, &shape, layouts, |y, at, steps| zip::<T, F>(y, a, b, at, steps));
            Ok(())
        })?,
        Device::Cuda(gpu) => launch_binary(gpu, F::NAME, &mut y, a, b)?,
    }
    let need = needs(F::NAME, [a, b])?;
    record(F::NAME, y, &[a, b], |_| BinaryBackward::<F> {
        shapes: [*a.shape(), *b.shape()],
        saved: Saved {
            // The second gradient reads the first input and the other way round; a quotient reads its divisor twice.
            a: (F::SAVES.0 && need[1]).then(|| a.detach()),
            b: (F::SAVES.1 && (need[0] || F::NAME == Div::NAME)).then(|| b.detach()),
        },
        function: std::marker::PhantomData,
    })
}

/// `y = f(a, b)` by the kernel's function of this name; `a` and `b` broadcast to the shape of `y`.
fn launch_binary(gpu: &CudaDevice, function: &str, y: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    let shape = *y.shape();
    let layouts = collapse_layouts(&shape, [&a.layout().expand(shape), &b.layout().expand(shape)]);
    let n = shape.elements();
    gpu.kernel("binary_fwd", &[("DTYPE", a.dtype().name()), ("FUNCTION", function)])?
        .launch(Grid::packets(n, a.dtype()), args![y, Storage(a), Storage(b), &layouts[0], &layouts[1], n as i64])
}

vectorized! {
    fn zip<T: Float, F: Binary>(y: &mut [T], a: &[T], b: &[T], at: [usize; 2], steps: [usize; 2]) {
        let n = y.len();
        let value = |a: T, b: T| T::from_acc(F::value(a.to_acc(), b.to_acc()));
        match steps {
            [1, 1] => {
                for ((y, a), b) in y.iter_mut().zip(&a[at[0]..at[0] + n]).zip(&b[at[1]..at[1] + n]) {
                    *y = value(*a, *b);
                }
            }
            [1, 0] => {
                let b = b[at[1]];
                for (y, a) in y.iter_mut().zip(&a[at[0]..at[0] + n]) {
                    *y = value(*a, b);
                }
            }
            [0, 1] => {
                let a = a[at[0]];
                for (y, b) in y.iter_mut().zip(&b[at[1]..at[1] + n]) {
                    *y = value(a, *b);
                }
            }
            _ => {
                for (i, y) in y.iter_mut().enumerate() {
                    *y = value(a[at[0] + i * steps[0]], b[at[1] + i * steps[1]]);
                }
            }
        }
    }
}

struct BinaryBackward<F> {
    shapes: [Shape; 2],
    saved: Saved,
    function: std::marker::PhantomData<F>,
}

impl<F: Binary> Backward for BinaryBackward<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<Contributions> {
        let [a, b] = F::gradients(&grad, &self.saved, need)?;
        let reduce = |grad: Option<Tensor>, shape| grad.map(|grad| grad.sum_to(shape)).transpose();
        Ok(Contributions::whole([reduce(a, self.shapes[0])?, reduce(b, self.shapes[1])?]))
    }
}

/// Comparisons and logic give masks: they have no gradient, and refuse tensors that require one.
macro_rules! comparison {
    ($($(#[$doc:meta])* $method:ident $operator:tt;)*) => {
        impl Tensor {$(
            $(#[$doc])*
            ///
            /// Shapes broadcast as in PyTorch; the result is [`DType::Bool`]. Errors: shapes that do not broadcast,
            /// dtypes or devices that differ, or a tensor that requires a gradient.
            pub fn $method(&self, other: &Tensor) -> Result<Tensor> {
                const OP: &str = stringify!($method);
                match self.dtype() {
                    DType::I64 => compare::<i64>(OP, self, other, |a, b| a $operator b),
                    DType::Bool => compare::<bool>(OP, self, other, |a, b| a $operator b),
                    float => dispatch_float!(OP, float, T, compare::<T>(OP, self, other, |a, b| a $operator b)),
                }
            }
        )*}

        #[cfg(all(test, feature = "cuda"))]
        const COMPARISONS: &[&str] = &[$(stringify!($method)),*];
    };
}

comparison! {
    /// Whether `a = b`.
    eq ==;
    /// Whether `a ≠ b`.
    ne !=;
    /// Whether `a < b`.
    lt <;
    /// Whether `a ≤ b`.
    le <=;
    /// Whether `a > b`.
    gt >;
    /// Whether `a ≥ b`.
    ge >=;
}

fn compare<E: Element>(
    op: &'static str,
    a: &Tensor,
    b: &Tensor,
    f: impl Fn(E::Stored, E::Stored) -> bool + Sync,
) -> Result<Tensor> {
    discrete(op, &[a, b])?;
    same_kind(op, a, b)?;
    let shape = a.shape().broadcast(b.shape(), op)?;
    let mut y = Tensor::uninit(shape, DType::Bool, a.device())?;
    match a.device() {
        Device::Cpu => {
            let layouts = [&a.layout().expand(shape), &b.layout().expand(shape)];
            let (a, b) = (a.storage::<E>()?, b.storage::<E>()?);
            cpu::for_strided(y.values_mut::<bool>()?, &shape, layouts, |y, at, steps| {
                for (i, y) in y.iter_mut().enumerate() {
                    *y = f(a[at[0] + i * steps[0]], b[at[1] + i * steps[1]]) as u8;
                }
            });
        }
        Device::Cuda(gpu) => launch_binary(gpu, op, &mut y, a, b)?,
    }
    computed(op, y, &[a, b])
}

impl Tensor {
    /// Whether both are true, with broadcasting.
    ///
    /// Errors: a tensor that is not [`DType::Bool`], or shapes that do not broadcast.
    pub fn logical_and(&self, other: &Tensor) -> Result<Tensor> {
        expect_bool("logical_and", self)?;
        compare::<bool>("logical_and", self, other, |a, b| a & b != 0)
    }

    /// Whether at least one is true, with broadcasting.
    ///
    /// Errors: a tensor that is not [`DType::Bool`], or shapes that do not broadcast.
    pub fn logical_or(&self, other: &Tensor) -> Result<Tensor> {
        expect_bool("logical_or", self)?;
        compare::<bool>("logical_or", self, other, |a, b| a | b != 0)
    }

    /// True where this is false.
    ///
    /// Errors: the tensor is not [`DType::Bool`].
    pub fn logical_not(&self) -> Result<Tensor> {
        expect_bool("logical_not", self)?;
        compare::<bool>("logical_not", self, self, |a, _| a == 0)
    }

    /// `a` where this mask is true, `b` elsewhere; all three broadcast. Saves the mask.
    ///
    /// Errors: the mask is not [`DType::Bool`], shapes that do not broadcast, or dtypes or devices that differ.
    pub fn where_cond(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        const OP: &str = "where_cond";
        expect_bool(OP, self)?;
        same_kind(OP, a, b)?;
        same_device(OP, self, a)?;
        let shape = a.shape().broadcast(b.shape(), OP)?.broadcast(self.shape(), OP)?;
        let mask = self.expand(shape)?;
        let mut y = Tensor::uninit(shape, a.dtype(), a.device())?;
        let layouts = [mask.layout(), &a.layout().expand(shape), &b.layout().expand(shape)];
        match (a.device(), a.dtype()) {
            (Device::Cpu, DType::I64) => choose::<i64>(&mut y, &mask, a, b, layouts)?,
            (Device::Cpu, DType::Bool) => choose::<bool>(&mut y, &mask, a, b, layouts)?,
            (Device::Cpu, float) => dispatch_float!(OP, float, T, choose::<T>(&mut y, &mask, a, b, layouts))?,
            (Device::Cuda(gpu), dtype) => {
                let [choice, yes, no] = collapse_layouts(&shape, layouts);
                let n = shape.elements();
                gpu.kernel("where_cond", &[("DTYPE", dtype.name())])?.launch(
                    Grid::packets(n, dtype),
                    args![&mut y, Storage(&mask), Storage(a), Storage(b), &choice, &yes, &no, n as i64],
                )?;
            }
        }
        let shapes = [*a.shape(), *b.shape()];
        record(OP, y, &[a, b], |_| WhereBackward { mask: mask.clone(), shapes })
    }

    /// `value` where the mask is true, this tensor elsewhere; the mask broadcasts to this shape. Saves the mask.
    ///
    /// Errors: as [`Tensor::where_cond`], or a mask that is larger than the tensor.
    pub fn masked_fill(&self, mask: &Tensor, value: f64) -> Result<Tensor> {
        let fits = mask.shape().broadcast(self.shape(), "masked_fill").is_ok_and(|shape| shape == *self.shape());
        ensure!(
            fits,
            Error::shape(
                "masked_fill",
                format!("the mask {:?} does not broadcast to the tensor {:?}", mask.shape(), self.shape())
            )
        );
        mask.where_cond(&Tensor::full((), value, self.dtype(), self.device())?, self)
    }
}

fn expect_bool(op: &'static str, mask: &Tensor) -> Result<()> {
    ensure!(mask.dtype() == DType::Bool, Error::dtype(op, format!("expected a bool tensor, got {}", mask.dtype())));
    Ok(())
}

fn choose<E: Element>(y: &mut Tensor, mask: &Tensor, a: &Tensor, b: &Tensor, layouts: [&Layout; 3]) -> Result<()> {
    let shape = *y.shape();
    let (mask, a, b) = (mask.storage::<bool>()?, a.storage::<E>()?, b.storage::<E>()?);
    cpu::for_strided(y.values_mut::<E>()?, &shape, layouts, |y, at, steps| {
        for (i, y) in y.iter_mut().enumerate() {
            let keep = mask[at[0] + i * steps[0]] != 0;
            *y = if keep { a[at[1] + i * steps[1]] } else { b[at[2] + i * steps[2]] };
        }
    });
    Ok(())
}

struct WhereBackward {
    mask: Tensor,
    shapes: [Shape; 2],
}

impl Backward for WhereBackward {
    fn name(&self) -> &'static str {
        "where_cond"
    }

    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<Contributions> {
        let zero = Tensor::zeros((), grad.dtype(), grad.device())?;
        let a = need[0].then(|| self.mask.where_cond(&grad, &zero)?.sum_to(self.shapes[0])).transpose()?;
        let b = need[1].then(|| self.mask.where_cond(&zero, &grad)?.sum_to(self.shapes[1])).transpose()?;
        Ok(Contributions::whole([a, b]))
    }
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;
    use crate::device::kernels::KernelSource;

    /// A row of a table above without its row in the kernel, or the other way round, would show on a GPU only.
    #[test]
    fn kernels_have_the_rows_of_the_tables() -> std::result::Result<(), String> {
        let logic = ["logical_and", "logical_or", "logical_not"];
        let tables = [("unary", UNARY.to_vec()), ("binary", [BINARY, COMPARISONS, &logic].concat())];
        for (name, mut rows) in tables {
            let source = KernelSource::named(name).ok_or("no such source")?;
            let value = |(option, value): &(&str, &'static str)| (*option == "FUNCTION").then_some(*value);
            let options = source.options();
            let mut functions: Vec<_> = options.iter().flat_map(|options| options.iter().find_map(value)).collect();
            functions.sort();
            functions.dedup();
            rows.sort();
            assert_eq!(functions, rows, "{name}.cu");
            for row in rows {
                assert!(source.source.contains(&format!("\nROW({row}, ")), "{name}.cu has no row `{row}`");
            }
        }
        Ok(())
    }
}
