//! Comparisons, logic and choice: ops that give or take masks.

use crate::{
    DType, Device, Element, Error, Result, Shape, Tensor,
    autograd::{Backward, InputGrads, computed, discrete, record},
    device::{Grid, args, cpu},
    dtype::dispatch_float,
    error::ensure,
    ops::binary::launch_binary,
    shape::{Layout, collapse_layouts},
    tensor::{Storage, same_device, same_kind},
};

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
        pub(super) const COMPARISONS: &[&str] = &[$(stringify!($method)),*];
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
        Device::Gpu(gpu) => launch_binary(*gpu, op, &mut y, a, b)?,
    }
    computed(op, y, &[a, b])
}

impl Tensor {
    /// Whether both are true, with broadcasting. Numbers are true where they are not 0, NaN included.
    ///
    /// Errors: shapes that do not broadcast, devices that differ, or a tensor that requires a gradient.
    pub fn logical_and(&self, other: &Tensor) -> Result<Tensor> {
        let [a, b] = truths("logical_and", [self, other])?;
        compare::<bool>("logical_and", &a, &b, |a, b| a & b != 0)
    }

    /// Whether at least one is true, with broadcasting. Numbers are true where they are not 0, NaN included.
    ///
    /// Errors: shapes that do not broadcast, devices that differ, or a tensor that requires a gradient.
    pub fn logical_or(&self, other: &Tensor) -> Result<Tensor> {
        let [a, b] = truths("logical_or", [self, other])?;
        compare::<bool>("logical_or", &a, &b, |a, b| a | b != 0)
    }

    /// True where this is false. Numbers are true where they are not 0, NaN included.
    ///
    /// Errors: a tensor that requires a gradient.
    pub fn logical_not(&self) -> Result<Tensor> {
        let [x] = truths("logical_not", [self])?;
        compare::<bool>("logical_not", &x, &x, |a, _| a == 0)
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

    /// `value` where the mask is true, this tensor elsewhere; both broadcast. Saves the mask.
    ///
    /// Errors: as [`Tensor::where_cond`].
    pub fn masked_fill(&self, mask: &Tensor, value: f64) -> Result<Tensor> {
        mask.where_cond(&Tensor::full((), value, self.dtype(), self.device())?, self)
    }
}

/// The truth values of constants.
fn truths<const N: usize>(op: &'static str, tensors: [&Tensor; N]) -> Result<[Tensor; N]> {
    discrete(op, &tensors)?;
    let mut truths = tensors.map(Tensor::detach);
    for x in &mut truths {
        *x = x.to_dtype(DType::Bool)?;
    }
    Ok(truths)
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

    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let zero = Tensor::zeros((), grad.dtype(), grad.device())?;
        let a = need[0].then(|| self.mask.where_cond(&grad, &zero)?.sum_to(self.shapes[0])).transpose()?;
        let b = need[1].then(|| self.mask.where_cond(&zero, &grad)?.sum_to(self.shapes[1])).transpose()?;
        Ok(InputGrads::whole([a, b]))
    }
}
