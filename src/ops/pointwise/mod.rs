//! Elementwise unary functions: each is a table row, with its gradient.

mod cpu;

use crate::{
    DType, Device, Result, Tensor,
    autograd::{Backward, InputGrads, record, record_cheap},
    device::{
        Grid, args,
        cpu::for_rows,
        rows::{In, Out, Sums, for_rows_of},
    },
    dtype::{Real, dispatch_float, dispatch_real},
    ops::norm::reuse,
};

pub(super) use cpu::{sum_gradient, sum_value, sum_value_and_slope};

/// Value that a unary op keeps for its derivative.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    Input,
    Output,
}

/// Differentiable unary function.
pub(crate) trait Unary {
    const KEEP: Keep;
    /// Returns the value; `FUSED` as for [`Real::fma`].
    fn value<R: Real, const FUSED: bool>(x: R) -> R;
    /// Returns the gradient of the input from that of the output, `g`. `kept` is the input or the output, as given by
    /// [`Unary::KEEP`]. No factor overflows or underflows where the product does not.
    fn gradient<R: Real, const FUSED: bool>(g: R, kept: R) -> R;
    /// Returns the derivative at `kept`.
    #[inline(always)]
    fn derivative<R: Real, const FUSED: bool>(kept: R) -> R {
        Self::gradient::<R, FUSED>(R::ONE, kept)
    }
}

/// Loops that are compiled for each function.
trait Loops {
    fn of<F: Unary>(self);
}

/// The table: method, type, value that the gradient is a function of, handling of integers, value, gradient. Brackets
/// make a row an [`Activation`]: its name in descriptions, the feedforward option that selects it, and `closes` if it
/// is exactly 0 over a range. Everything else, here and in `config`, is generated from the row; its kernel is a row of
/// `kernels/functions.cuh`.
macro_rules! unary {
    ($($(#[$doc:meta])* $method:ident $Type:ident $keep:ident $integers:ident
        $([$title:literal $(, ff $option:ident)? $(; $closes:ident)?])?
        |$x:ident| $value:expr, |$g:ident, $k:ident| $gradient:expr;)*) => {
        $(
            struct $Type;

            impl Unary for $Type {
                const KEEP: Keep = Keep::$keep;
                #[inline(always)]
                fn value<R: Real, const FUSED: bool>($x: R) -> R {
                    $value
                }
                #[inline(always)]
                fn gradient<R: Real, const FUSED: bool>($g: R, $k: R) -> R {
                    $gradient
                }
            }
        )*

        /// A row of the table.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        enum Function {
            $($Type,)*
        }

        impl Function {
            /// Returns the name of the method and of the kernel.
            fn name(self) -> &'static str {
                match self {
                    $(Self::$Type => stringify!($method),)*
                }
            }

            fn keep(self) -> Keep {
                match self {
                    $(Self::$Type => $Type::KEEP,)*
                }
            }

            /// Runs loops of the functions that neither [`Function::with_light`] nor, for a gradient,
            /// [`Function::with_light_gradient`] takes.
            #[inline(always)]
            fn with<const GRADIENT: bool>(self, loops: impl Loops) {
                match self {
                    $(Self::$Type => {
                        if const { !Self::$Type.is_light() && !(GRADIENT && Self::$Type.has_light_gradient()) } {
                            loops.of::<$Type>();
                        }
                    })*
                }
            }

            /// Applies the function to a tensor that is not float.
            fn of_integers(self, x: &Tensor) -> Result<Tensor> {
                match self {
                    $(Self::$Type => $integers(self, x),)*
                }
            }
        }

        /// Activation function for [`Tensor::add_activation`] and the gate of [`Tensor::glu`].
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Activation {
            $($(
                #[doc = concat!("`", stringify!($method), "`: ", $title,
                    $(", option `ff_", stringify!($option), "`",)? ".")]
                $Type,
            )?)*
        }

        impl Activation {
            /// All activations.
            pub const ALL: &'static [Self] = &[$($({ let _ = $title; Self::$Type },)?)*];

            /// Returns the name in descriptions of a model.
            pub fn title(self) -> &'static str {
                match self {
                    $($(Self::$Type => $title,)?)*
                }
            }

            /// Returns the name of its [`Tensor`] method and of its kernels.
            pub fn name(self) -> &'static str {
                match self {
                    $($(Self::$Type => { let _ = $title; stringify!($method) })?)*
                }
            }

            /// Applies the function to each element.
            ///
            /// Errors: a dtype that is not float.
            pub fn of(self, x: &Tensor) -> Result<Tensor> {
                match self {
                    $($(Self::$Type => { let _ = $title; x.$method() })?)*
                }
            }

            /// Returns the feedforward option that selects it, without `ff_`; `None` for GELU, the default, and for
            /// activations of other layers.
            pub fn option(self) -> Option<&'static str> {
                const OPTIONS: &[&[&str]] = &[$($({ let _ = $title; &[$(stringify!($option))?] },)?)*];
                OPTIONS[self as usize].first().copied()
            }

            /// Returns `true` if it is exactly 0 over a range: as a gate it passes no gradient there, even to an
            /// infinite value.
            pub(super) fn closes(self) -> bool {
                const CLOSES: &[&[&str]] = &[$($({ let _ = $title; &[$(stringify!($closes))?] },)?)*];
                !CLOSES[self as usize].is_empty()
            }

            #[inline(always)]
            fn with(self, loops: impl Loops) {
                match self {
                    $($(Self::$Type => { let _ = $title; loops.of::<$Type>() })?)*
                }
            }
        }

        impl Tensor {
            $(
                $(#[$doc])*
                ///
                /// Errors: a dtype that is not float, unless stated otherwise.
                pub fn $method(&self) -> Result<Tensor> {
                    unary(Function::$Type, self)
                }
            )*
        }

        /// All unary functions: name and method.
        pub const UNARY: &[(&str, fn(&Tensor) -> Result<Tensor>)] = &[$((stringify!($method), Tensor::$method)),*];
    };
}

/// Returns a constant in the compute type.
#[inline(always)]
fn c<R: Real>(x: f64) -> R {
    R::from_f64(x)
}

unary! {
    /// Computes `−x`, also for i64. Saves only the input's handle.
    neg Neg Input negated |x| -x, |g, _x| -g;
    /// Computes `e^x`; i64 and bool become f32 first. Saves the output, whose rounded value is the derivative: 0 or
    /// infinite where `e^x` is out of the dtype's range, as in PyTorch.
    exp Exp Output promoted |x| x.fused_exp::<FUSED>(), |g, y| g * y;
    /// Computes the natural logarithm; i64 and bool become f32 first. Saves the input.
    ln Ln Input promoted |x| x.ln(), |g, x| g / x;
    /// Computes `√x`; i64 and bool become f32 first. Saves the output.
    sqrt Sqrt Output promoted |x| x.sqrt(), |g, y| g * (c::<R>(0.5) / y);
    /// Computes `x²`, also for i64. Saves the input.
    square Square Input squared |x| x * x, |g, x| twice(g * x);
    /// Computes `1 / (1 + e^−x)`; i64 and bool become f32 first. Saves the input: `y (1 − y)` of a rounded output loses
    /// all digits near 1. On a GPU exponentials of half types, here and in other activations, have errors of up to
    /// 2⁻¹⁷.
    sigmoid Sigmoid Input promoted ["sigmoid"] |x| x.sigmoid::<FUSED>(), |g, x| g * sigmoid_slope::<R, FUSED>(x);
    /// Computes the hyperbolic tangent; i64 and bool become f32 first. Saves the input, for the same reason as
    /// [`Tensor::sigmoid`].
    tanh Tanh Input promoted |x| x.fused_tanh::<FUSED>(), |g, x| g * (c::<R>(4.0) * sigmoid_slope::<R, FUSED>(x + x));
    /// Computes the error function `2/√π ∫₀ˣ e^−t² dt`; i64 and bool become f32 first. Saves the input.
    erf Erf Input promoted |x| c(libm::erf(x.to_f64())),
        |g, x| g * (c::<R>(std::f64::consts::FRAC_2_SQRT_PI) * (-(x * x)).fused_exp::<FUSED>());
    /// Computes the cosine; i64 and bool become f32 first. Saves the input.
    cos Cos Input promoted |x| c(libm::cos(x.to_f64())), |g, x| -g * c(libm::sin(x.to_f64()));
    /// Computes `max(x, 0)`, also for i64; the derivative is 0 at 0 and 1 at NaN, as in PyTorch. Saves the output.
    relu Relu Output rectified ["ReLU", ff relu; closes] |x| relu(x), |g, y| if y <= R::ZERO { R::ZERO } else { g };
    /// Computes `max(x, 0)²` (So et al., Primer, <https://arxiv.org/abs/2109.08668>). Saves the input.
    relu_squared ReluSquared Input refused ["squared ReLU", ff relu_squared; closes] |x| { let y = relu(x); y * y },
        |g, x| if x <= R::ZERO { R::ZERO } else { twice(g * x) };
    /// Computes `x Φ(x)` with the exact normal distribution, by erf (Hendrycks and Gimpel,
    /// <https://arxiv.org/abs/1606.08415>). Infinite at ∞, where PyTorch's vectorised code for f32 and bf16 gives NaN
    /// and its other code does not. Saves the input. On a GPU half types use a polynomial instead of erf, with errors
    /// of up to 2 · 10⁻⁵ in `Φ(−|x|)`, which their rounding hides.
    gelu Gelu Input refused ["GELU"]
        |x| x.gelu::<FUSED>(),
        |g, x| { let (below, density) = x.normal::<FUSED>(); g * x.fma::<FUSED>(density, below) };
    /// Computes `x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2`, the approximation of [`Tensor::gelu`] used by BERT and
    /// GPT-2 (Hendrycks and Gimpel, <https://arxiv.org/abs/1606.08415>). Its derivative is correct at every finite
    /// number, even where its `x²` overflows and PyTorch's becomes NaN. Saves the input.
    gelu_tanh GeluTanh Input refused ["GELU by tanh", ff gelu_tanh] |x| x * gelu_gate::<R, FUSED>(x),
        |g, x| g * (gelu_gate::<R, FUSED>(x) + x * gelu_gate_slope::<R, FUSED>(x));
    /// Computes `x / (1 + e^−x)`, also called swish (Elfwing et al., <https://arxiv.org/abs/1702.03118>). Saves the
    /// input.
    silu Silu Input refused ["SiLU", ff swish] |x| x * x.sigmoid::<FUSED>(),
        |g, x| { let gate = x.sigmoid::<FUSED>(); g * (gate * (R::ONE + x * (R::ONE - gate))) };
    /// Computes `x / (1 + e^(−1.702 x))`, an approximation of [`Tensor::gelu`] (Hendrycks and Gimpel,
    /// <https://arxiv.org/abs/1606.08415>). Saves the input.
    quick_gelu QuickGelu Input refused ["GELU by sigmoid", ff quick_gelu]
        |x| x * (x * c::<R>(1.702)).sigmoid::<FUSED>(),
        |g, x| {
            let angle = x * c::<R>(1.702);
            g * (angle.sigmoid::<FUSED>() + x * (sigmoid_slope::<R, FUSED>(angle) * c::<R>(1.702)))
        };
}

impl Function {
    /// Runs loops over values where they lie if the function costs less than going through rows in f32, and otherwise
    /// nothing.
    #[inline(always)]
    fn with_light(self, loops: impl Loops) {
        match self {
            Self::Neg => loops.of::<Neg>(),
            Self::Square => loops.of::<Square>(),
            Self::Relu => loops.of::<Relu>(),
            _ => {}
        }
    }

    const fn is_light(self) -> bool {
        matches!(self, Self::Neg | Self::Square | Self::Relu)
    }

    /// Like [`Function::with_light`], but for the gradient.
    #[inline(always)]
    fn with_light_gradient(self, loops: impl Loops) {
        match self {
            Self::Exp => loops.of::<Exp>(),
            _ => self.with_light(loops),
        }
    }

    const fn has_light_gradient(self) -> bool {
        self.is_light() || matches!(self, Self::Exp)
    }
}

/// Returns the error of an op that only takes floats.
fn refused(f: Function, x: &Tensor) -> Result<Tensor> {
    x.dtype().expect_float(f.name())?;
    unary(f, x)
}

/// Computes an op whose results are not integers in f32, as in PyTorch.
fn promoted(f: Function, x: &Tensor) -> Result<Tensor> {
    unary(f, &x.to_dtype(DType::F32)?)
}

fn negated(f: Function, x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::I64 => Tensor::zeros((), DType::I64, x.device())?.sub(x),
        _ => refused(f, x),
    }
}

fn squared(_: Function, x: &Tensor) -> Result<Tensor> {
    let x = x.to_dtype(DType::I64)?;
    x.mul(&x)
}

fn rectified(f: Function, x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::I64 => {
            let zero = Tensor::zeros((), DType::I64, x.device())?;
            x.lt(&zero)?.where_cond(&zero, x)
        }
        _ => refused(f, x),
    }
}

/// Doubles a product that is itself in range.
#[inline(always)]
fn twice<R: Real>(x: R) -> R {
    x + x
}

/// Returns the derivative of the sigmoid, to full precision even where the sigmoid is near 0 or 1.
#[inline(always)]
fn sigmoid_slope<R: Real, const FUSED: bool>(x: R) -> R {
    let power = (if x < R::ZERO { x } else { -x }).fused_exp::<FUSED>();
    let sum = R::ONE + power;
    power / (sum * sum)
}

/// Returns the factor of `x` in the tanh approximation of GELU: the sigmoid of twice the argument of its tanh.
#[inline(always)]
fn gelu_gate<R: Real, const FUSED: bool>(x: R) -> R {
    (c::<R>(GELU_ANGLE) * x * (R::ONE + c::<R>(0.044_715) * x * x)).sigmoid::<FUSED>()
}

/// Returns the derivative of [`gelu_gate`].
#[inline(always)]
fn gelu_gate_slope<R: Real, const FUSED: bool>(x: R) -> R {
    let gate = gelu_gate::<R, FUSED>(x);
    // Beyond ±24 the gate is 0 or 1 even in f64, so the first factor is 0 whatever the last one, which must not
    // overflow.
    let x = if x > c(24.0) { c(24.0) } else { x };
    let x = if x < c(-24.0) { c(-24.0) } else { x };
    gate * (R::ONE - gate) * c::<R>(GELU_ANGLE) * (R::ONE + c::<R>(3.0 * 0.044_715) * x * x)
}

/// `2 √(2/π)`
const GELU_ANGLE: f64 = 1.595_769_121_605_730_7;

/// Computes `max(x, 0)`, keeping NaN.
#[inline(always)]
fn relu<R: Real>(x: R) -> R {
    if x < R::ZERO { R::ZERO } else { x }
}

/// Cost of a transcendental function, in element operations.
const COST: usize = 8;

fn unary(f: Function, x: &Tensor) -> Result<Tensor> {
    let op = f.name();
    if !x.dtype().is_float() {
        return f.of_integers(x);
    }
    let x = x.contiguous()?;
    let mut y = x.uninit_like()?;
    match x.device() {
        Device::Cpu if f.is_light() => dispatch_float!(op, x.dtype(), T, {
            let x = x.values::<T>()?;
            for_rows(y.values_mut::<T>()?, 1, 1, |at, y| cpu::map_light(f, &x[at..at + y.len()], y));
            Ok(())
        })?,
        Device::Cpu => {
            let from = In::new(x.floats(op)?, 1);
            let to = Out::new(y.floats_mut(op)?, 1);
            dispatch_real!(x.dtype(), R, {
                for_rows_of::<R, 1, 1>([to], [from], Sums::none(), COST, &|_, [y], [x], _| cpu::map(f, x, y));
            });
        }
        Device::Gpu(gpu) => {
            let n = x.numel();
            gpu.kernel("unary_fwd", &[("DTYPE", x.dtype().name()), ("FUNCTION", op)])?
                .launch(Grid::batches(n, x.dtype()), args![&mut y, &x, n as i64])?;
        }
    }
    let rule = |kept: &Tensor| UnaryBackward { kept: kept.detach(), function: f };
    match f.keep() {
        Keep::Output => record(op, y, &[&x], rule),
        Keep::Input => {
            let kept = x.detach();
            record_cheap(op, y, &[&x], |_| rule(&x), move || unary(f, &kept))
        }
    }
}

struct UnaryBackward {
    kept: Tensor,
    function: Function,
}

impl Backward for UnaryBackward {
    fn name(&self) -> &'static str {
        self.function.name()
    }

    /// Computes `dx = g ⊙ f'`, in the order given by the table.
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let (op, f) = (self.name(), self.function);
        let (mut dx, source) = reuse(grad)?;
        match *dx.device() {
            Device::Cpu if f.has_light_gradient() => dispatch_float!(op, dx.dtype(), T, {
                let kept = self.kept.values::<T>()?;
                let g = source.as_ref().map_or(Ok(&[][..]), |source| source.values::<T>())?;
                for_rows(dx.values_mut::<T>()?, 1, 1, |at, dx| {
                    let (range, of_g) = (at..at + dx.len(), if g.is_empty() { 0..0 } else { at..at + dx.len() });
                    cpu::map_light_backward(f, &kept[range], &g[of_g], dx);
                });
                Ok(())
            })?,
            Device::Cpu => {
                let kept = In::new(self.kept.floats(op)?, 1);
                let source = source.as_ref().map(|source| source.floats(op)).transpose()?;
                dispatch_real!(dx.dtype(), R, {
                    let (dx, g) = Out::from_or_over(dx.floats_mut(op)?, 1, source);
                    for_rows_of::<R, 1, 2>([dx], [kept, g], Sums::none(), COST, &|_, [dx], [kept, g], _| {
                        cpu::map_backward(f, kept, g, dx);
                    });
                });
            }
            Device::Gpu(gpu) => {
                let (n, dtype) = (dx.numel(), dx.dtype());
                gpu.kernel("unary_bwd", &[("DTYPE", dtype.name()), ("FUNCTION", op)])?.launch(
                    Grid::batches(n, dtype),
                    args![&mut dx, &self.kept, source.as_ref().unwrap_or(&dx), n as i64],
                )?;
            }
        }
        Ok(InputGrads::one(dx))
    }
}

impl Tensor {
    /// Computes `x · multiplier + summand` with constants, in f32 for half types. Saves nothing.
    ///
    /// Errors: a dtype that is not float; [`Tensor::mul`] and [`Tensor::add`] take integers.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0], [2], &Device::Cpu)?;
    /// assert_eq!(x.affine(2.0, 1.0)?.to_vec::<f32>()?, [3.0, 5.0]); // 2 x + 1
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "add_scalar")]
    #[doc(alias = "mul_scalar")]
    pub fn affine(&self, multiplier: f64, summand: f64) -> Result<Tensor> {
        const OP: &str = "affine";
        self.dtype().expect_float(OP)?;
        let x = self.contiguous()?;
        let mut y = x.uninit_like()?;
        match x.device() {
            Device::Cpu => dispatch_float!(OP, x.dtype(), T, {
                let (x, a, b) = (x.values::<T>()?, c(multiplier), c(summand));
                for_rows(y.values_mut::<T>()?, 1, 1, |at, y| cpu::affine(&x[at..at + y.len()], y, a, b));
                Ok(())
            })?,
            Device::Gpu(gpu) => {
                let n = x.numel();
                gpu.kernel("affine_fwd", &[("DTYPE", x.dtype().name())])?
                    .launch(Grid::packets(n, x.dtype()), args![&mut y, &x, n as i64, multiplier, summand])?;
            }
        }
        record(OP, y, &[&x], |_| AffineBackward { multiplier })
    }
}

struct AffineBackward {
    multiplier: f64,
}

impl Backward for AffineBackward {
    fn name(&self) -> &'static str {
        "affine"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        grad.affine(self.multiplier, 0.0).map(InputGrads::one)
    }
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;
    use crate::{
        device::kernels::KernelSource,
        ops::{binary::BINARY, compare::COMPARISONS},
    };

    /// A row of a table above without its row in the kernel, or the other way round, would show on a GPU only.
    #[test]
    fn kernels_have_the_rows_of_the_tables() -> std::result::Result<(), String> {
        let logic: &[&str] = &["logical_and", "logical_or", "logical_not"];
        let activations: Vec<_> = Activation::ALL.iter().map(|activation| activation.name()).collect();
        let tables = [
            ("unary", UNARY.iter().map(|row| row.0).collect()),
            ("activation", activations.clone()),
            ("glu", activations),
            ("binary", [BINARY, COMPARISONS, logic].concat()),
        ];
        for (name, mut rows) in tables {
            let source = KernelSource::named(name).ok_or("no such source")?;
            let value =
                |(option, value): &(&str, &'static str)| ["FUNCTION", "ACTIVATION"].contains(option).then_some(*value);
            let options = source.options();
            let mut functions: Vec<_> = options.iter().flat_map(|options| options.iter().find_map(value)).collect();
            functions.sort();
            functions.dedup();
            rows.sort();
            assert_eq!(functions, rows, "{name}.cu");
            for row in rows {
                assert!(source.source.contains(&format!("ROW({row}, ")), "{name}.cu has no row `{row}`");
            }
        }
        Ok(())
    }
}
