//! Elementwise arithmetic of two tensors with broadcasting; each function is a row of a table.

use bytemuck::{Pod, Zeroable};

use crate::{
    DType, Device, Error, Result, Shape, Tensor,
    autograd::{Backward, InputGrads, computed, needs, record},
    device::{
        Gpu, Grid, args, cpu,
        f16_rows::{in_f32, is_f16},
        simd::vectorized,
    },
    dtype::{Float, Real, dispatch_float},
    error::ensure,
    shape::{Layout, collapse_layouts},
    tensor::{Storage, same_device, same_kind},
};

/// Binary function of numbers.
trait Binary {
    fn value<R: Real>(a: R, b: R) -> R;
}

/// Inputs that a binary op kept.
struct Saved {
    a: Option<Tensor>,
    b: Option<Tensor>,
}

/// Returns a tensor that the forward pass kept because a gradient needs it.
fn kept<'a>(op: &'static str, saved: &'a Option<Tensor>) -> Result<&'a Tensor> {
    saved.as_ref().ok_or_else(|| Error::argument(op, "an input that the gradient needs was not saved"))
}

/// `true` for each input (first, second) that the gradients need.
type Saves = (bool, bool);

macro_rules! binary {
    ($($(#[$doc:meta])* $method:ident $Type:ident $integers:expr, |$a:ident, $b:ident| $value:expr, saves $saves:expr,
        |$g:ident, $saved:ident| ($da:expr, $db:expr);)*) => {
        $(
            struct $Type;

            impl Binary for $Type {
                #[inline(always)]
                fn value<R: Real>($a: R, $b: R) -> R {
                    $value
                }
            }
        )*

        /// A row of the table; the backward passes are made of tensors.
        #[derive(Clone, Copy, PartialEq, Eq)]
        enum Function {
            $($Type,)*
        }

        impl Function {
            fn name(self) -> &'static str {
                match self {
                    $(Self::$Type => stringify!($method),)*
                }
            }

            fn saves(self) -> Saves {
                match self {
                    $(Self::$Type => $saves,)*
                }
            }

            #[inline(always)]
            fn zip<T: Float>(self, y: &mut [T], a: &[T], b: &[T]) {
                match self {
                    $(Self::$Type => zip_with::<T, $Type>(y, a, b),)*
                }
            }

            /// Applies the function to tensors of one dtype that is not float.
            fn of_integers(self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
                match self {
                    $(Self::$Type => {
                        let integers: fn(&Tensor, &Tensor) -> Result<Tensor> = $integers;
                        integers(a, b)
                    })*
                }
            }

            fn gradients(self, g: &Tensor, saved: &Saved, need: &[bool]) -> Result<[Option<Tensor>; 2]> {
                match self {
                    $(Self::$Type => {
                        let ($g, $saved) = (g, saved);
                        Ok([if need[0] { Some($da) } else { None }, if need[1] { Some($db) } else { None }])
                    })*
                }
            }
        }

        impl Tensor {
            $(
                $(#[$doc])*
                ///
                /// Shapes broadcast as in PyTorch; only [`Tensor::to_dtype`] converts dtypes. Errors: shapes that do
                /// not broadcast, or dtypes or devices that differ.
                pub fn $method(&self, other: &Tensor) -> Result<Tensor> {
                    binary(Function::$Type, self, other)
                }
            )*
        }

        #[cfg(all(test, feature = "cuda"))]
        pub(super) const BINARY: &[&str] = &[$(stringify!($method)),*];
    };
}

binary! {
    /// Computes `a + b`; i64 wraps around, and bool is [`Tensor::logical_or`]. Saves nothing.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let a = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0], [2, 2], &Device::Cpu)?;
    /// let b = Tensor::from_slice(&[10.0f32, 20.0], [2], &Device::Cpu)?; // broadcast over the rows
    /// assert_eq!(a.add(&b)?.to_vec::<f32>()?, [11.0, 22.0, 13.0, 24.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    add Add |a: &Tensor, b: &Tensor| match a.dtype() {
        DType::Bool => a.logical_or(b),
        _ => integers("add", a, b, i64::wrapping_add),
    }, |a, b| a + b, saves (false, false), |g, _s| (g.clone(), g.clone());
    /// Computes `a − b`; i64 wraps around. Saves nothing. Also returns an error for bool, as in PyTorch.
    sub Sub |a, b| integers("sub", a, b, i64::wrapping_sub),
        |a, b| a - b, saves (false, false), |g, _s| (g.clone(), g.neg()?);
    /// Computes `a · b` elementwise; i64 wraps around, and bool is [`Tensor::logical_and`]. Saves each input that the
    /// other's gradient needs.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let a = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0], [2, 2], &Device::Cpu)?;
    /// let b = Tensor::from_slice(&[10.0f32, 20.0], [2], &Device::Cpu)?; // broadcast over the rows
    /// assert_eq!(a.mul(&b)?.to_vec::<f32>()?, [10.0, 40.0, 30.0, 80.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    mul Mul |a: &Tensor, b: &Tensor| match a.dtype() {
        DType::Bool => a.logical_and(b),
        _ => integers("mul", a, b, i64::wrapping_mul),
    }, |a, b| a * b, saves (true, true), |g, s| (g.mul(kept("mul", &s.b)?)?, g.mul(kept("mul", &s.a)?)?);
    /// Computes `a / b` elementwise; i64 and bool become f32 first, as in PyTorch. Saves the inputs.
    div Div |a: &Tensor, b: &Tensor| {
        same_device("div", a, b)?;
        a.to_dtype(DType::F32)?.div(&b.to_dtype(DType::F32)?)
    }, |a, b| a / b, saves (true, true), |g, s| (
        g.div(kept("div", &s.b)?)?,
        by_divisor(g, kept("div", &s.a)?, kept("div", &s.b)?)?
    );
}

fn binary(f: Function, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let op = f.name();
    same_kind(op, a, b)?;
    if !a.dtype().is_float() {
        return f.of_integers(a, b);
    }
    let shape = a.shape().broadcast(b.shape(), op)?;
    let mut y = Tensor::uninit(shape, a.dtype(), a.device())?;
    match a.device() {
        Device::Cpu => dispatch_float!(op, a.dtype(), T, {
            let layouts = [&a.layout().expand(shape), &b.layout().expand(shape)];
            let operands = [a.storage::<T>()?, b.storage::<T>()?];
            for_pairs::<T, T>(y.values_mut::<T>()?, &shape, layouts, operands, &|y, a, b| zip(f, y, a, b));
            Ok(())
        })?,
        Device::Gpu(gpu) => launch_binary(*gpu, op, &mut y, a, b)?,
    }
    let need = needs(op, [a, b])?;
    let saves = f.saves();
    record(op, y, &[a, b], |_| BinaryBackward {
        shapes: [*a.shape(), *b.shape()],
        saved: Saved {
            // The second gradient reads the first input and the other way round; a quotient reads its divisor twice.
            a: (saves.0 && need[1]).then(|| a.detach()),
            b: (saves.1 && (need[0] || f == Function::Div)).then(|| b.detach()),
        },
        function: f,
    })
}

/// Computes `y = f(a, b)` by the kernel's function of this name; `a` and `b` broadcast to the shape of `y`.
pub(super) fn launch_binary(gpu: &dyn Gpu, function: &str, y: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    let shape = *y.shape();
    let layouts = collapse_layouts(&shape, [&a.layout().expand(shape), &b.layout().expand(shape)]);
    let n = shape.numel();
    gpu.kernel("binary_fwd", &[("DTYPE", a.dtype().name()), ("FUNCTION", function)])?
        .launch(Grid::packets(n, a.dtype()), args![y, Storage(a), Storage(b), &layouts[0], &layouts[1], n as i64])
}

/// Number of results computed at a time where operands are gathered first.
const PIECE: usize = 256;

/// Calls `body` with runs of the output and of both operands, which broadcast to its shape: one number per result, or
/// one for all of them. bf16 is read in place: going through rows in f32, a sum would take twice the time.
#[allow(clippy::type_complexity)]
pub(super) fn for_pairs<T: Pod + Sync, Y: Send>(
    y: &mut [Y],
    shape: &Shape,
    layouts: [&Layout; 2],
    operands: [&[T]; 2],
    body: &(impl Fn(&mut [Y], &[T], &[T]) + Sync),
) {
    let body: &dyn OfPairs<T, Y> = body;
    cpu::for_strided(y, shape, layouts, |y, at, steps| {
        if steps.iter().any(|&step| step > 1) {
            return in_pieces(y, operands, at, steps, body);
        }
        let operand = |of: usize| &operands[of][at[of]..at[of] + if steps[of] == 0 { 1 } else { y.len() }];
        body.call(y, operand(0), operand(1));
    });
}

/// Body of [`for_pairs`] behind a pointer: a table of one method, while that of `dyn Fn` compiles each closure twice.
trait OfPairs<T, Y>: Sync {
    fn call(&self, y: &mut [Y], a: &[T], b: &[T]);
}

impl<T, Y, F: Fn(&mut [Y], &[T], &[T]) + Sync> OfPairs<T, Y> for F {
    fn call(&self, y: &mut [Y], a: &[T], b: &[T]) {
        self(y, a, b);
    }
}

/// Like [`for_pairs`], but for a run whose operands are gathered first.
#[allow(clippy::type_complexity)]
#[inline(never)]
fn in_pieces<T: Pod, Y>(y: &mut [Y], operands: [&[T]; 2], at: [usize; 2], steps: [usize; 2], body: &dyn OfPairs<T, Y>) {
    let [mut of_a, mut of_b] = [[T::zeroed(); PIECE]; 2];
    for (index, y) in y.chunks_mut(PIECE).enumerate() {
        let at = |operand: usize| at[operand] + index * PIECE * steps[operand];
        let a = run(operands[0], at(0), steps[0], y.len(), &mut of_a);
        let b = run(operands[1], at(1), steps[1], y.len(), &mut of_b);
        body.call(y, a, b);
    }
}

/// Returns numbers that are `step` apart, or the one that is repeated.
fn run<'a, T: Pod>(x: &'a [T], at: usize, step: usize, len: usize, memory: &'a mut [T]) -> &'a [T] {
    let len = if step == 0 { 1 } else { len };
    if step <= 1 {
        return &x[at..at + len];
    }
    memory[..len].iter_mut().enumerate().for_each(|(i, to)| *to = x[at + i * step]);
    &memory[..len]
}

fn zip<T: Float>(f: Function, y: &mut [T], a: &[T], b: &[T]) {
    if const { is_f16::<T>() } {
        in_f32(y, false, [a, b], |y, [a, b]| zip_where_they_lie(f, y, a, b));
    } else {
        zip_where_they_lie(f, y, a, b);
    }
}

vectorized! {
    fn zip_where_they_lie<T: Float>(f: Function, y: &mut [T], a: &[T], b: &[T]) {
        f.zip(y, a, b);
    }
}

#[inline(always)]
fn zip_with<T: Float, F: Binary>(y: &mut [T], a: &[T], b: &[T]) {
    let value = |a: T, b: T| T::from_acc(F::value(a.to_acc(), b.to_acc()));
    // Both repeated, or one result.
    if let (&[a], &[b]) = (a, b) {
        return y.fill(value(a, b));
    }
    match (a, b) {
        (a, &[b]) => {
            for (y, a) in y.iter_mut().zip(a) {
                *y = value(*a, b);
            }
        }
        (&[a], b) => {
            for (y, b) in y.iter_mut().zip(b) {
                *y = value(a, *b);
            }
        }
        (a, b) => {
            for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
                *y = value(*a, *b);
            }
        }
    }
}

struct BinaryBackward {
    shapes: [Shape; 2],
    saved: Saved,
    function: Function,
}

impl Backward for BinaryBackward {
    fn name(&self) -> &'static str {
        self.function.name()
    }

    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let [a, b] = self.function.gradients(&grad, &self.saved, need)?;
        let reduce = |grad: Option<Tensor>, shape| grad.map(|grad| grad.sum_to(shape)).transpose();
        Ok(InputGrads::whole([reduce(a, self.shapes[0])?, reduce(b, self.shapes[1])?]))
    }
}

/// Computes arithmetic of i64.
fn integers(op: &'static str, a: &Tensor, b: &Tensor, f: fn(i64, i64) -> i64) -> Result<Tensor> {
    ensure!(
        a.dtype() == DType::I64,
        Error::dtype(op, format_args!("expected floats or i64, got {}; convert with `to_dtype`", a.dtype()))
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

/// Computes `−g · a / b²`, the gradient of a quotient with respect to its divisor, in the shape of `g`: one pass in a
/// type whose range holds the square of any divisor and each partial product.
fn by_divisor(g: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    const OP: &str = "div";
    let shape = *g.shape();
    let mut y = g.uninit_like()?;
    let layouts = [g.layout(), &a.layout().expand(shape), &b.layout().expand(shape)];
    match g.device() {
        Device::Cpu => dispatch_float!(OP, g.dtype(), T, {
            let (g, a, b) = (g.storage::<T>()?, a.storage::<T>()?, b.storage::<T>()?);
            cpu::for_strided(y.values_mut::<T>()?, &shape, layouts, |y, at, steps| {
                let mut memory = [[<T as Zeroable>::zeroed(); PIECE]; 3];
                let [of_g, of_a, of_b] = &mut memory;
                for (index, y) in y.chunks_mut(PIECE).enumerate() {
                    let at = |operand: usize| at[operand] + index * PIECE * steps[operand];
                    let g = run(g, at(0), steps[0], y.len(), of_g);
                    let a = run(a, at(1), steps[1], y.len(), of_a);
                    let b = run(b, at(2), steps[2], y.len(), of_b);
                    quotients(y, g, a, b);
                }
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

fn quotients<T: Float>(y: &mut [T], g: &[T], a: &[T], b: &[T]) {
    if const { is_f16::<T>() } {
        in_f32(y, false, [g, a, b], |y, [g, a, b]| zip_by_divisor(y, g, a, b));
    } else {
        zip_by_divisor(y, g, a, b);
    }
}

vectorized! {
    fn zip_by_divisor<T: Float>(y: &mut [T], g: &[T], a: &[T], b: &[T]) {
        let n = y.len();
        let value = |g: T, a: T, b: T| T::from_acc(g.to_acc().by_divisor(a.to_acc(), b.to_acc()));
        match (g.len() == n, a.len() == n, b) {
            (true, true, &[b]) => {
                for ((y, g), a) in y.iter_mut().zip(g).zip(a) {
                    *y = value(*g, *a, b);
                }
            }
            (true, true, b) => {
                for (((y, g), a), b) in y.iter_mut().zip(g).zip(a).zip(b) {
                    *y = value(*g, *a, *b);
                }
            }
            _ => {
                for (i, y) in y.iter_mut().enumerate() {
                    let at = |x: &[T]| x[i.min(x.len() - 1)];
                    *y = value(at(g), at(a), at(b));
                }
            }
        }
    }
}
