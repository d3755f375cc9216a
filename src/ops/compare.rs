//! Comparisons, logic and selection: ops that return or take masks.

use bytemuck::Pod;
use half::{bf16, f16};

use crate::{
    DType, Device, Element, Error, Result, Shape, Tensor,
    autograd::{Backward, InputGrads, computed, discrete, record},
    device::{Grid, args, cpu, simd::vectorized},
    dtype::dispatch_float,
    error::ensure,
    ops::binary::{for_pairs, launch_binary},
    shape::{Layout, collapse_layouts},
    tensor::{Storage, same_device, same_kind},
};

/// Comparisons and logic return masks: they have no gradient, and reject tensors that require one.
macro_rules! comparison {
    ($($(#[$doc:meta])* $method:ident $kind:ident $turned:literal $not:literal;)*) => {
        impl Tensor {$(
            $(#[$doc])*
            ///
            /// Shapes broadcast as in PyTorch; the result is [`DType::Bool`]. Errors: shapes that do not broadcast,
            /// dtypes or devices that differ, or a tensor that requires a gradient.
            pub fn $method(&self, other: &Tensor) -> Result<Tensor> {
                let (a, b) = if $turned { (other, self) } else { (self, other) };
                compare(stringify!($method), [self, other], [a, b], Kind::$kind, $not)
            }
        )*}

        #[cfg(all(test, feature = "cuda"))]
        pub(super) const COMPARISONS: &[&str] = &[$(stringify!($method)),*];
    };
}

comparison! {
    /// Compares elementwise: `a = b`.
    eq Equal false false;
    /// Compares elementwise: `a ≠ b`.
    ne Equal false true;
    /// Compares elementwise: `a < b`.
    lt Less false false;
    /// Compares elementwise: `a ≤ b`.
    le LessOrEqual false false;
    /// Compares elementwise: `a > b`.
    gt Less true false;
    /// Compares elementwise: `a ≥ b`.
    ge LessOrEqual true false;
}

/// Basic comparisons. The others swap the operands or negate the result.
#[derive(Clone, Copy)]
enum Kind {
    Equal,
    Less,
    LessOrEqual,
}

/// Compares `a` and `b`. On a GPU the comparison has a kernel of its own, which takes the unswapped operands.
fn compare(op: &'static str, operands: [&Tensor; 2], [a, b]: [&Tensor; 2], kind: Kind, not: bool) -> Result<Tensor> {
    discrete(op, &operands)?;
    same_kind(op, a, b)?;
    let shape = a.shape().broadcast(b.shape(), op)?;
    let mut y = Tensor::uninit(shape, DType::Bool, a.device())?;
    match a.device() {
        Device::Cpu => {
            let layouts = [&a.layout().expand(shape), &b.layout().expand(shape)];
            let to = y.values_mut::<bool>()?;
            match a.dtype() {
                DType::I64 => compare_as([a.storage::<i64>()?, b.storage::<i64>()?], layouts, &shape, kind, not, to),
                DType::Bool => compare_as([a.storage::<bool>()?, b.storage::<bool>()?], layouts, &shape, kind, not, to),
                DType::F32 => compare_as([a.storage::<f32>()?, b.storage::<f32>()?], layouts, &shape, kind, not, to),
                DType::F64 => compare_as([a.storage::<f64>()?, b.storage::<f64>()?], layouts, &shape, kind, not, to),
                half => {
                    let (operands, infinity) = match half {
                        DType::BF16 => {
                            ([a, b].map(|x| x.storage::<bf16>().map(bytemuck::cast_slice)), bf16::INFINITY.to_bits())
                        }
                        _ => ([a, b].map(|x| x.storage::<f16>().map(bytemuck::cast_slice)), f16::INFINITY.to_bits()),
                    };
                    let [a, b] = operands;
                    for_pairs::<u16, u8>(to, &shape, layouts, [a?, b?], &|y, a, b| {
                        zip_halves(kind, not, infinity, y, a, b);
                    });
                }
            }
        }
        Device::Gpu(gpu) => launch_binary(*gpu, op, &mut y, operands[0], operands[1])?,
    }
    computed(op, y, &operands)
}

/// Like [`compare`], on the stored values of the operands.
fn compare_as<E: Stored>(
    operands: [&[E]; 2],
    layouts: [&Layout; 2],
    shape: &Shape,
    kind: Kind,
    not: bool,
    y: &mut [u8],
) {
    for_pairs::<E, u8>(y, shape, layouts, operands, &|y, a, b| zip(kind, not, y, a, b));
}

/// Stored value that is compared as it is.
trait Stored: Pod + PartialOrd + Sync {}

impl Stored for f32 {}
impl Stored for f64 {}
impl Stored for i64 {}
impl Stored for u8 {}

vectorized! {
    /// Compares operands with one element per result, or one for all.
    fn zip<E: Stored>(kind: Kind, not: bool, y: &mut [u8], a: &[E], b: &[E]) {
        match kind {
            Kind::Equal => zip_with(not, y, a, b, |a, b| a == b),
            Kind::Less => zip_with(not, y, a, b, |a, b| a < b),
            Kind::LessOrEqual => zip_with(not, y, a, b, |a, b| a <= b),
        }
    }
}

vectorized! {
    /// Like [`zip`], for the bits of either half type, which differ in those of infinity.
    fn zip_halves(kind: Kind, not: bool, infinity: u16, y: &mut [u8], a: &[u16], b: &[u16]) {
        let are_numbers = |a: u16, b: u16| (a & 0x7FFF <= infinity) & (b & 0x7FFF <= infinity);
        match kind {
            Kind::Equal => zip_with(not, y, a, b, |a, b| are_numbers(a, b) & (ascending(a) == ascending(b))),
            Kind::Less => zip_with(not, y, a, b, |a, b| are_numbers(a, b) & (ascending(a) < ascending(b))),
            Kind::LessOrEqual => zip_with(not, y, a, b, |a, b| are_numbers(a, b) & (ascending(a) <= ascending(b))),
        }
    }
}

/// Returns an integer in the order of numbers of a half type; both zeros are 0.
#[inline(always)]
fn ascending(bits: u16) -> i16 {
    let (magnitude, sign) = ((bits & 0x7FFF) as i16, bits as i16 >> 15);
    (magnitude ^ sign) - sign
}

#[inline(always)]
fn zip_with<E: Copy>(not: bool, y: &mut [u8], a: &[E], b: &[E], f: impl Fn(E, E) -> bool) {
    match (a, b) {
        (a, &[b]) if a.len() >= y.len() => y.iter_mut().zip(a).for_each(|(y, a)| *y = u8::from(f(*a, b) != not)),
        (&[a], &[b]) => y.fill(u8::from(f(a, b) != not)),
        (&[a], b) => y.iter_mut().zip(b).for_each(|(y, b)| *y = u8::from(f(a, *b) != not)),
        (a, b) => y.iter_mut().zip(a).zip(b).for_each(|((y, a), b)| *y = u8::from(f(*a, *b) != not)),
    }
}

/// Computes a function of truth values.
fn logic(op: &'static str, [a, b]: [&Tensor; 2], f: impl Fn(u8, u8) -> bool + Sync) -> Result<Tensor> {
    same_device(op, a, b)?;
    let shape = a.shape().broadcast(b.shape(), op)?;
    let mut y = Tensor::uninit(shape, DType::Bool, a.device())?;
    match a.device() {
        Device::Cpu => {
            let layouts = [&a.layout().expand(shape), &b.layout().expand(shape)];
            let (a, b) = (a.storage::<bool>()?, b.storage::<bool>()?);
            cpu::for_strided(y.values_mut::<bool>()?, &shape, layouts, |y, at, steps| {
                for (i, y) in y.iter_mut().enumerate() {
                    *y = f(a[at[0] + i * steps[0]], b[at[1] + i * steps[1]]) as u8;
                }
            });
        }
        Device::Gpu(gpu) => launch_binary(*gpu, op, &mut y, a, b)?,
    }
    computed(op, y, &[a, b])
}

impl Tensor {
    /// Returns a mask that is `true` where both operands are, with broadcasting. Numbers other than 0 count as true,
    /// NaN included.
    ///
    /// Errors: shapes that do not broadcast, devices that differ, or a tensor that requires a gradient.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let a = Tensor::from_slice(&[true, true], [2], &Device::Cpu)?;
    /// let b = Tensor::from_slice(&[false, true], [2], &Device::Cpu)?;
    /// assert_eq!(a.logical_and(&b)?.to_vec::<bool>()?, [false, true]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn logical_and(&self, other: &Tensor) -> Result<Tensor> {
        let [a, b] = truths("logical_and", [self, other])?;
        logic("logical_and", [&a, &b], |a, b| a & b != 0)
    }

    /// Returns a mask that is `true` where at least one operand is, with broadcasting. Numbers other than 0 count as
    /// true, NaN included.
    ///
    /// Errors: shapes that do not broadcast, devices that differ, or a tensor that requires a gradient.
    pub fn logical_or(&self, other: &Tensor) -> Result<Tensor> {
        let [a, b] = truths("logical_or", [self, other])?;
        logic("logical_or", [&a, &b], |a, b| a | b != 0)
    }

    /// Returns a mask that is `true` where this tensor is false. Numbers other than 0 count as true, NaN included.
    ///
    /// Errors: a tensor that requires a gradient.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let mask = Tensor::from_slice(&[false, true], [2], &Device::Cpu)?;
    /// assert_eq!(mask.logical_not()?.to_vec::<bool>()?, [true, false]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn logical_not(&self) -> Result<Tensor> {
        let [x] = truths("logical_not", [self])?;
        logic("logical_not", [&x, &x], |a, _| a == 0)
    }

    /// Selects `a` where this mask is `true` and `b` elsewhere; all three broadcast. Saves the mask.
    ///
    /// Errors: the mask is not [`DType::Bool`], shapes that do not broadcast, or dtypes or devices that differ.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let a = Tensor::from_slice(&[1.0f32, 2.0], [2], &Device::Cpu)?;
    /// let b = Tensor::from_slice(&[5.0f32, 0.0], [2], &Device::Cpu)?;
    /// assert_eq!(a.gt(&b)?.where_cond(&a, &b)?.to_vec::<f32>()?, [5.0, 2.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "where")]
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
            (Device::Gpu(gpu), dtype) => {
                let [choice, yes, no] = collapse_layouts(&shape, layouts);
                let n = shape.numel();
                gpu.kernel("where_cond", &[("DTYPE", dtype.name())])?.launch(
                    Grid::packets(n, dtype),
                    args![&mut y, Storage(&mask), Storage(a), Storage(b), &choice, &yes, &no, n as i64],
                )?;
            }
        }
        let shapes = [*a.shape(), *b.shape()];
        record(OP, y, &[a, b], |_| WhereBackward { mask: mask.clone(), shapes })
    }

    /// Replaces the elements where `mask` is `true` with `value`; tensor and mask broadcast. Saves the mask.
    ///
    /// Errors: those of [`Tensor::where_cond`].
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0], [2], &Device::Cpu)?;
    /// let mask = Tensor::from_slice(&[false, true], [2], &Device::Cpu)?;
    /// assert_eq!(x.masked_fill(&mask, 0.0)?.to_vec::<f32>()?, [1.0, 0.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn masked_fill(&self, mask: &Tensor, value: f64) -> Result<Tensor> {
        mask.where_cond(&Tensor::full((), value, self.dtype(), self.device())?, self)
    }
}

/// Returns the truth values of constants.
fn truths<const N: usize>(op: &'static str, tensors: [&Tensor; N]) -> Result<[Tensor; N]> {
    discrete(op, &tensors)?;
    let mut truths = tensors.map(Tensor::detach);
    for x in &mut truths {
        *x = x.to_dtype(DType::Bool)?;
    }
    Ok(truths)
}

fn expect_bool(op: &'static str, mask: &Tensor) -> Result<()> {
    ensure!(
        mask.dtype() == DType::Bool,
        Error::dtype(op, format_args!("expected a bool tensor, got {}", mask.dtype()))
    );
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

    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let zero = Tensor::zeros((), grad.dtype(), grad.device())?;
        let a = need[0].then(|| self.mask.where_cond(&grad, &zero)?.sum_to(self.shapes[0])).transpose()?;
        let b = need[1].then(|| self.mask.where_cond(&zero, &grad)?.sum_to(self.shapes[1])).transpose()?;
        Ok(InputGrads::whole([a, b]))
    }
}
