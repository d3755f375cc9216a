//! Slices of float tensors of any dtype, and conversions between what is stored and what is computed with.

use std::ops::Range;

use half::{bf16, f16};

use super::simd::vectorized;
use crate::dtype::{DType, Float, Pod, Real};

/// The values of a packed float tensor.
#[derive(Clone, Copy)]
pub(crate) enum Floats<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
    BF16(&'a [bf16]),
    F16(&'a [f16]),
}

/// Like [`Floats`], but mutable.
pub(crate) enum FloatsMut<'a> {
    F32(&'a mut [f32]),
    F64(&'a mut [f64]),
    BF16(&'a mut [bf16]),
    F16(&'a mut [f16]),
}

/// Runs an expression with `$x` bound to the slice of a [`Floats`] or [`FloatsMut`].
macro_rules! each {
    ($Kind:ident, $floats:expr, $x:ident, $body:expr) => {
        match $floats {
            $Kind::F32($x) => $body,
            $Kind::F64($x) => $body,
            $Kind::BF16($x) => $body,
            $Kind::F16($x) => $body,
        }
    };
}

pub(super) use each;

macro_rules! mapped {
    ($Kind:ident, $floats:expr, $x:ident, $body:expr) => {
        match $floats {
            $Kind::F32($x) => $Kind::F32($body),
            $Kind::F64($x) => $Kind::F64($body),
            $Kind::BF16($x) => $Kind::BF16($body),
            $Kind::F16($x) => $Kind::F16($body),
        }
    };
}

impl<'a> Floats<'a> {
    /// Numbers that are computed with.
    pub fn of<R: Real>(values: &'a [R]) -> Self {
        match R::DTYPE {
            DType::F64 => Self::F64(bytemuck::cast_slice(values)),
            _ => Self::F32(bytemuck::cast_slice(values)),
        }
    }

    pub fn len(&self) -> usize {
        each!(Self, self, x, x.len())
    }

    pub fn range(self, range: Range<usize>) -> Self {
        mapped!(Self, self, x, &x[range])
    }

    /// The values themselves, if they are of this type.
    pub fn direct<R: Pod>(self) -> Option<&'a [R]> {
        each!(Self, self, x, cast(x))
    }

    /// The values in the type that they are computed in.
    pub fn to_vec<R: Real>(self) -> Vec<R> {
        let mut values = vec![R::ZERO; self.len()];
        self.read(&mut values);
        values
    }

    /// The values themselves, or a copy in the type that they are computed in.
    pub fn to_slice<'b, R: Real>(self, memory: &'b mut Vec<R>) -> &'b [R]
    where
        'a: 'b,
    {
        if let Some(values) = self.direct() {
            return values;
        }
        memory.resize(self.len(), R::ZERO);
        self.read(memory);
        memory
    }

    /// Writes the values to a slice of their length.
    pub fn read<R: Real>(self, to: &mut [R]) {
        each!(Self, self, x, convert(x, to));
    }
}

impl<'a> FloatsMut<'a> {
    /// Like [`Floats::of`].
    pub fn of<R: Real>(values: &'a mut [R]) -> Self {
        match R::DTYPE {
            DType::F64 => Self::F64(bytemuck::cast_slice_mut(values)),
            _ => Self::F32(bytemuck::cast_slice_mut(values)),
        }
    }

    pub fn len(&self) -> usize {
        each!(Self, self, x, x.len())
    }

    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F64(_) => DType::F64,
            Self::BF16(_) => DType::BF16,
            Self::F16(_) => DType::F16,
        }
    }

    /// The values, to be read.
    pub fn values(&self) -> Floats<'_> {
        match self {
            Self::F32(x) => Floats::F32(x),
            Self::F64(x) => Floats::F64(x),
            Self::BF16(x) => Floats::BF16(x),
            Self::F16(x) => Floats::F16(x),
        }
    }

    /// The values themselves, if they are of this type.
    pub fn direct_mut<R: Real>(&mut self) -> Option<&mut [R]> {
        match self {
            Self::F32(x) if R::DTYPE == DType::F32 => Some(bytemuck::cast_slice_mut(x)),
            Self::F64(x) if R::DTYPE == DType::F64 => Some(bytemuck::cast_slice_mut(x)),
            _ => None,
        }
    }

    /// Takes over, as unrounded numbers, the values that are not their roundings.
    pub fn replace_unless_rounded<R: Real>(&self, unrounded: &mut [R]) {
        match (self, R::DTYPE) {
            (Self::BF16(x), DType::F32) => take_over(x, bytemuck::cast_slice_mut(unrounded)),
            (Self::F16(x), DType::F32) => take_over(x, bytemuck::cast_slice_mut(unrounded)),
            _ => self.values().read(unrounded),
        }
    }

    /// Rounds a slice of the same length to these values.
    pub fn write<R: Real>(&mut self, from: &[R]) {
        each!(Self, self, x, convert(from, x));
    }

    pub fn range(self, range: Range<usize>) -> Self {
        mapped!(Self, self, x, &mut x[range])
    }

    /// Like [`FloatsMut::range`], but for borrowed values.
    pub fn part(&mut self, range: Range<usize>) -> FloatsMut<'_> {
        match self {
            Self::F32(x) => FloatsMut::F32(&mut x[range]),
            Self::F64(x) => FloatsMut::F64(&mut x[range]),
            Self::BF16(x) => FloatsMut::BF16(&mut x[range]),
            Self::F16(x) => FloatsMut::F16(&mut x[range]),
        }
    }

    /// Parts of a length; the last may be shorter.
    pub fn chunks(self, len: usize) -> Vec<Self> {
        match self {
            Self::F32(x) => x.chunks_mut(len).map(Self::F32).collect(),
            Self::F64(x) => x.chunks_mut(len).map(Self::F64).collect(),
            Self::BF16(x) => x.chunks_mut(len).map(Self::BF16).collect(),
            Self::F16(x) => x.chunks_mut(len).map(Self::F16).collect(),
        }
    }
}

fn cast<A: Float, R: Pod>(x: &[A]) -> Option<&[R]> {
    if same::<A, R>() { Some(bytemuck::cast_slice(x)) } else { None }
}

/// Rounds numbers to what a dtype holds of them.
pub(crate) fn round_to<R: Real>(dtype: DType, values: &mut [R]) {
    match (dtype, R::DTYPE) {
        (DType::BF16, DType::F32) => round::<bf16>(bytemuck::cast_slice_mut(values)),
        (DType::F16, DType::F32) => round::<f16>(bytemuck::cast_slice_mut(values)),
        _ => {}
    }
}

vectorized! {
    fn round<T: Float>(values: &mut [T::Acc]) {
        for x in values {
            *x = T::from_acc(*x).to_acc();
        }
    }
}

vectorized! {
    fn take_over<T: Float>(x: &[T], unrounded: &mut [T::Acc]) {
        for (x, unrounded) in x.iter().zip(unrounded) {
            *unrounded = if T::from_acc(*unrounded) == *x { *unrounded } else { x.to_acc() };
        }
    }
}

/// Returns `true` if both types of numbers are the same.
pub(super) fn same<A: 'static, B: 'static>() -> bool {
    std::any::TypeId::of::<A>() == std::any::TypeId::of::<B>()
}

/// Converts by way of the wider type of computation: f64 to a half type does not occur.
pub(super) fn convert<A: Float, B: Float>(from: &[A], to: &mut [B]) {
    if same::<A, B>() {
        to.copy_from_slice(bytemuck::cast_slice(from));
    } else if same::<A, f32>() {
        if same::<B, f16>() {
            super::f16_rows::narrow(bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
        } else {
            narrow::<B>(bytemuck::cast_slice(from), to);
        }
    } else if same::<B, f32>() {
        if same::<A, f16>() {
            super::f16_rows::widen(bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
        } else {
            widen::<A>(from, bytemuck::cast_slice_mut(to));
        }
    } else {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = B::from_f64(from.to_acc().to_f64()));
    }
}

vectorized! {
    fn narrow<T: Float>(from: &[f32], to: &mut [T]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = T::from_acc(T::Acc::from_f32(from));
        }
    }
}

vectorized! {
    fn widen<T: Float>(from: &[T], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.to_acc().to_f32();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_convert_both_ways() {
        let numbers = [0.0, -1.5, 2.0, 1024.0];
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            let (mut a, mut b, mut c, mut d) = ([0f32; 4], [0f64; 4], [bf16::ZERO; 4], [f16::ZERO; 4]);
            let mut floats = match dtype {
                DType::F64 => FloatsMut::F64(&mut b),
                DType::BF16 => FloatsMut::BF16(&mut c),
                DType::F16 => FloatsMut::F16(&mut d),
                _ => FloatsMut::F32(&mut a),
            };
            floats.write(&numbers);
            assert_eq!(floats.values().to_vec::<f64>(), numbers);
            assert_eq!(floats.values().to_vec::<f32>(), numbers.map(|x| x as f32));
            assert_eq!(floats.values().to_slice::<f64>(&mut Vec::new()), numbers);
            assert_eq!((floats.dtype(), floats.len()), (dtype, 4));
        }
        let mut rounded = [1.0f32 + f32::EPSILON, 3.0];
        round_to(DType::BF16, &mut rounded);
        assert_eq!(rounded, [1.0, 3.0]);
        let mut unrounded = [1.001f32, 3.0];
        FloatsMut::BF16(&mut [bf16::ONE, bf16::ONE]).replace_unless_rounded(&mut unrounded);
        assert_eq!(unrounded, [1.001, 1.0]);
    }
}
