//! Arithmetic of two tensors, elementwise and with broadcasting: a table row each.

use crate::{
    DType, Device, Error, Result, Shape, Tensor,
    autograd::{Backward, InputGrads, computed, needs, record},
    device::{Gpu, Grid, args, cpu, simd::vectorized},
    dtype::{Float, Real, dispatch_float},
    error::ensure,
    shape::collapse_layouts,
    tensor::{Storage, same_device, same_kind},
};

/// A function of two numbers, with broadcasting; its backward is made of tensors.
trait Binary: 'static {
    const NAME: &'static str;
    fn value<R: Real>(a: R, b: R) -> R;
    /// Whether the gradients need the inputs (first, second).
    const SAVES: (bool, bool);
    /// The function of tensors of one dtype that is not float.
    fn of_integers(a: &Tensor, b: &Tensor) -> Result<Tensor>;
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
    ($($(#[$doc:meta])* $method:ident $Type:ident $integers:expr, |$a:ident, $b:ident| $value:expr, saves $saves:expr,
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
                fn of_integers(a: &Tensor, b: &Tensor) -> Result<Tensor> {
                    ($integers)(a, b)
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
                /// Shapes broadcast as in PyTorch; dtypes are never converted, but by [`Tensor::to_dtype`]. Errors:
                /// shapes that do not broadcast, or dtypes or devices that differ.
                pub fn $method(&self, other: &Tensor) -> Result<Tensor> {
                    binary::<$Type>(self, other)
                }
            )*
        }

        #[cfg(all(test, feature = "cuda"))]
        pub(super) const BINARY: &[&str] = &[$(stringify!($method)),*];
    };
}

binary! {
    /// `a + b`; of i64 too, where it wraps around, and of bool, where it is [`Tensor::logical_or`]. Saves nothing.
    add Add |a: &Tensor, b: &Tensor| match a.dtype() {
        DType::Bool => a.logical_or(b),
        _ => integers(Self::NAME, a, b, i64::wrapping_add),
    }, |a, b| a + b, saves (false, false), |g, _s| (g.clone(), g.clone());
    /// `a − b`; of i64 too, where it wraps around. Saves nothing. Errors also: bool, as in PyTorch.
    sub Sub |a, b| integers(Self::NAME, a, b, i64::wrapping_sub),
        |a, b| a - b, saves (false, false), |g, _s| (g.clone(), g.neg()?);
    /// `a · b`, elementwise; of i64 too, where it wraps around, and of bool, where it is [`Tensor::logical_and`]. Saves
    /// each input that the other's gradient needs.
    mul Mul |a: &Tensor, b: &Tensor| match a.dtype() {
        DType::Bool => a.logical_and(b),
        _ => integers(Self::NAME, a, b, i64::wrapping_mul),
    }, |a, b| a * b, saves (true, true), |g, s| (g.mul(kept("mul", &s.b)?)?, g.mul(kept("mul", &s.a)?)?);
    /// `a / b`, elementwise; i64 and bool become f32 first, as in PyTorch. Saves the inputs.
    div Div |a: &Tensor, b: &Tensor| {
        same_device(Self::NAME, a, b)?;
        a.to_dtype(DType::F32)?.div(&b.to_dtype(DType::F32)?)
    }, |a, b| a / b, saves (true, true), |g, s| (
        g.div(kept("div", &s.b)?)?,
        by_divisor(g, kept("div", &s.a)?, kept("div", &s.b)?)?
    );
}

fn binary<F: Binary>(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_kind(F::NAME, a, b)?;
    if !a.dtype().is_float() {
        return F::of_integers(a, b);
    }
    let shape = a.shape().broadcast(b.shape(), F::NAME)?;
    let mut y = Tensor::uninit(shape, a.dtype(), a.device())?;
    match a.device() {
        Device::Cpu => dispatch_float!(F::NAME, a.dtype(), T, {
            let layouts = [&a.layout().expand(shape), &b.layout().expand(shape)];
            let (a, b) = (a.storage::<T>()?, b.storage::<T>()?);
            cpu::for_strided(y.values_mut::<T>()?, &shape, layouts, |y, at, steps| zip::<T, F>(y, a, b, at, steps));
            Ok(())
        })?,
        Device::Gpu(gpu) => launch_binary(*gpu, F::NAME, &mut y, a, b)?,
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
pub(super) fn launch_binary(gpu: &dyn Gpu, function: &str, y: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    let shape = *y.shape();
    let layouts = collapse_layouts(&shape, [&a.layout().expand(shape), &b.layout().expand(shape)]);
    let n = shape.numel();
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

    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let [a, b] = F::gradients(&grad, &self.saved, need)?;
        let reduce = |grad: Option<Tensor>, shape| grad.map(|grad| grad.sum_to(shape)).transpose();
        Ok(InputGrads::whole([reduce(a, self.shapes[0])?, reduce(b, self.shapes[1])?]))
    }
}

/// Arithmetic of i64.
fn integers(op: &'static str, a: &Tensor, b: &Tensor, f: fn(i64, i64) -> i64) -> Result<Tensor> {
    ensure!(
        a.dtype() == DType::I64,
        Error::dtype(op, format!("expected floats or i64, got {}; convert with `to_dtype`", a.dtype()))
    );
    let shape = a.shape().broadcast(b.shape(), op)?;
    let mut y = Tensor::uninit(shape, DType::I64, a.device())?;
    match a.device() {
        Device::Cpu => {
            let layouts = [&a.layout().expand(shape), &b.layout().expand(shape)];
            let (a, b) = (a.storage::<i64>()?, b.storage::<i64>()?);
            cpu::for_strided(y.values_mut::<i64>()?, &shape, layouts, |y, at, steps| {
                for (i, y) in y.iter_mut().enumerate() {
                    *y = f(a[at[0] + i * steps[0]], b[at[1] + i * steps[1]]);
                }
            });
        }
        Device::Gpu(gpu) => launch_binary(*gpu, op, &mut y, a, b)?,
    }
    computed(op, y, &[a, b])
}

/// `−g · a / b²`, the gradient of a quotient by its divisor, of the shape of `g`: in one pass whose numbers have the
/// exponents to hold the square of any divisor and each partial product.
fn by_divisor(g: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    const OP: &str = "div";
    let shape = *g.shape();
    let mut y = g.uninit_like()?;
    let layouts = [g.layout(), &a.layout().expand(shape), &b.layout().expand(shape)];
    match g.device() {
        Device::Cpu => dispatch_float!(OP, g.dtype(), T, {
            let (g, a, b) = (g.storage::<T>()?, a.storage::<T>()?, b.storage::<T>()?);
            cpu::for_strided(y.values_mut::<T>()?, &shape, layouts, |y, at, steps| {
                zip_by_divisor::<T>(y, &g[at[0]..], &a[at[1]..], &b[at[2]..], steps);
            });
            Ok(())
        })?,
        Device::Gpu(gpu) => {
            let [g_layout, a_layout, b_layout] = collapse_layouts(&shape, layouts);
            let n = shape.numel();
            gpu.kernel("quotient_bwd", &[("DTYPE", g.dtype().name())])?.launch(
                Grid::packets(n, g.dtype()),
                args![&mut y, Storage(g), Storage(a), Storage(b), &g_layout, &a_layout, &b_layout, n as i64],
            )?;
        }
    }
    Ok(y)
}

vectorized! {
    fn zip_by_divisor<T: Float>(y: &mut [T], g: &[T], a: &[T], b: &[T], steps: [usize; 3]) {
        let value = |g: T, a: T, b: T| T::from_acc(g.to_acc().by_divisor(a.to_acc(), b.to_acc()));
        match steps {
            [1, 1, 1] => {
                for (((y, g), a), b) in y.iter_mut().zip(g).zip(a).zip(b) {
                    *y = value(*g, *a, *b);
                }
            }
            [1, 1, 0] => {
                for ((y, g), a) in y.iter_mut().zip(g).zip(a) {
                    *y = value(*g, *a, b[0]);
                }
            }
            _ => {
                for (i, y) in y.iter_mut().enumerate() {
                    *y = value(g[i * steps[0]], a[i * steps[1]], b[i * steps[2]]);
                }
            }
        }
    }
}
