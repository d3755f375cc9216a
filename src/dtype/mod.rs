//! Element types: their storage and their float arithmetic.

use half::{bf16, f16};

mod float_element;
mod real;

use crate::{Error, Result, error::ensure};

pub(crate) use bytemuck::Pod;
pub use float_element::FloatElement;
pub(crate) use real::Real;

/// Type of a tensor's elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DType {
    /// 32-bit float, the default of models.
    F32,
    /// 64-bit float, for gradient tests and reference runs.
    F64,
    /// 16-bit float with the range of [`DType::F32`]; sums accumulate in f32.
    BF16,
    /// IEEE 16-bit float; sums accumulate in f32.
    F16,
    /// 64-bit integer: tokens and indices.
    I64,
    /// Boolean: masks.
    Bool,
}

impl DType {
    /// Returns the size of one element in bytes.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
            Self::Bool => 1,
        }
    }

    /// Returns `true` for the four float types.
    pub fn is_float(self) -> bool {
        !matches!(self, Self::I64 | Self::Bool)
    }

    /// Returns an error, for an op that takes floats, unless this is a float type.
    pub(crate) fn expect_float(self, op: &'static str) -> Result<()> {
        ensure!(
            self.is_float(),
            Error::dtype(op, format_args!("expected a float tensor, got {self}; convert with `to_dtype`"))
        );
        Ok(())
    }

    /// Returns the type for values that must not be rounded to this one, such as sums, losses and optimizer state: f32
    /// for half precision, otherwise the type itself.
    pub fn accumulator(self) -> Self {
        match self {
            Self::BF16 | Self::F16 => Self::F32,
            other => other,
        }
    }

    /// Returns the most negative finite number, which masks write into scores; that of f64 for types that are not
    /// float.
    pub fn lowest(self) -> f64 {
        match self {
            Self::F32 => f32::MIN as f64,
            Self::BF16 => bf16::MIN.to_f64(),
            Self::F16 => f16::MIN.to_f64(),
            Self::F64 | Self::I64 | Self::Bool => f64::MIN,
        }
    }

    /// Returns the name used in configs and on the command line: `f32`, `f64`, `bf16`, `f16`, `i64`, `bool`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::BF16 => "bf16",
            Self::F16 => "f16",
            Self::I64 => "i64",
            Self::Bool => "bool",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Host type from which tensors can be created. `u8` and `u32` are widened to [`DType::I64`].
pub trait Element: Copy + Send + Sync + 'static {
    /// Dtype of a tensor created from a slice of this type.
    const DTYPE: DType;
    /// Type of an element as it is stored in the buffer.
    type Stored: Pod + Send + Sync;
    /// Converts one element for storage.
    fn to_stored(self) -> Self::Stored;
}

/// Host type as which tensors can be read back, without conversion.
pub trait Readable: Element {
    /// Converts one stored element.
    fn from_stored(stored: Self::Stored) -> Self;
}

macro_rules! element {
    ($($host:ty => $dtype:ident, $stored:ty, $to:expr $(, $from:expr)?;)*) => {$(
        impl Element for $host {
            const DTYPE: DType = DType::$dtype;
            type Stored = $stored;
            #[inline(always)]
            fn to_stored(self) -> $stored {
                ($to)(self)
            }
        }
        $(impl Readable for $host {
            #[inline(always)]
            fn from_stored(stored: $stored) -> Self {
                ($from)(stored)
            }
        })?
    )*};
}

element! {
    f32 => F32, f32, |x| x, |x| x;
    f64 => F64, f64, |x| x, |x| x;
    bf16 => BF16, bf16, |x| x, |x| x;
    f16 => F16, f16, |x| x, |x| x;
    i64 => I64, i64, |x| x, |x| x;
    bool => Bool, u8, |x: bool| x as u8, |x: u8| x != 0;
    u8 => I64, i64, |x: u8| x as i64;
    u32 => I64, i64, |x: u32| x as i64;
}

/// Stored float and its compute type: f32 for the half types, itself otherwise.
pub(crate) trait Float: Element<Stored = Self> + Readable + Pod + PartialOrd {
    type Acc: Real;
    fn to_acc(self) -> Self::Acc;
    fn from_acc(acc: Self::Acc) -> Self;
    /// Rounds to nearest even, once. The half types have an inherent method of this name that does not: write `<T as
    /// Float>::from_f64` where `T` is not a type parameter.
    fn from_f64(x: f64) -> Self;
}

macro_rules! float {
    ($($t:ty => $acc:ty, $to:expr, $from:expr, $round:expr;)*) => {$(
        impl Float for $t {
            type Acc = $acc;
            #[inline(always)]
            fn to_acc(self) -> $acc {
                ($to)(self)
            }
            #[inline(always)]
            fn from_acc(acc: $acc) -> Self {
                ($from)(acc)
            }
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                ($round)(x)
            }
        }
    )*};
}

/// Converts to f32, with the last bit set if any bits were cut off: rounding the result to fewer bits is then
/// equivalent to rounding `x` itself, unlike two roundings to nearest.
#[inline(always)]
fn round_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let (cut, away) = (nearest as f64 != x, (nearest as f64).abs() > x.abs());
    f32::from_bits((nearest.to_bits() - away as u32) | cut as u32)
}

// The conversions of the `half` crate branch, and check the processor's features in each call; these use only selects,
// so that loops over them vectorise.

#[inline(always)]
fn widen_bf16(x: bf16) -> f32 {
    f32::from_bits((x.to_bits() as u32) << 16)
}

/// Rounds to nearest even; NaN stays NaN.
#[inline(always)]
fn round_to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    // The mantissa of a NaN must not round to 0 or overflow: its quiet bit is set instead.
    let is_nan = bits & 0x7FFF_FFFF > 0x7F80_0000;
    bf16::from_bits(if is_nan { (bits >> 16) | 0x40 } else { rounded } as u16)
}

#[inline(always)]
fn widen_f16(x: f16) -> f32 {
    let bits = x.to_bits() as u32;
    // A multiplication changes the exponent's bias from 15 to 127 and also normalises subnormal numbers.
    let scaled = f32::from_bits((bits & 0x7FFF) << 13) * f32::from_bits(0x7780_0000);
    let special = if bits & 0x7C00 == 0x7C00 { 0x7F80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | special | (bits & 0x8000) << 16)
}

/// Rounds to nearest even; numbers that are too large become infinite, NaN stays NaN.
#[inline(always)]
fn round_to_f16(x: f32) -> f16 {
    let (sign, bits) = (x.to_bits() >> 16 & 0x8000, x.to_bits() & 0x7FFF_FFFF);
    // Adding 0.5 leaves the multiple of 2^-24, the smallest subnormal, in the low bits.
    let subnormal = (f32::from_bits(bits) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let normal = bits.wrapping_add((15u32.wrapping_sub(127) << 23).wrapping_add(0xFFF + (bits >> 13 & 1))) >> 13;
    let finite = if bits < 113 << 23 { subnormal } else { normal };
    let special = if bits > 0x7F80_0000 { 0x7E00 } else { 0x7C00 };
    f16::from_bits((sign | if bits >= 0x4780_0000 { special } else { finite }) as u16)
}

float! {
    f32 => f32, |x| x, |x| x, |x| x as f32;
    f64 => f64, |x| x, |x| x, |x| x;
    bf16 => f32, widen_bf16, round_to_bf16, |x| round_to_bf16(round_to_odd(x));
    f16 => f32, widen_f16, round_to_f16, |x| round_to_f16(round_to_odd(x));
}

/// Runs an expression with `$T` bound to the stored float type of a dtype; other dtypes are a typed error.
macro_rules! dispatch_float {
    ($op:expr, $dtype:expr, $T:ident, $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            $crate::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $T = half::f16;
                $body
            }
            other => Err($crate::Error::dtype($op, format_args!("expected a float tensor, got {other}"))),
        }
    };
}
pub(crate) use dispatch_float;

/// Runs an expression with `$R` bound to the compute type of a float dtype: f64 for f64, f32 otherwise.
macro_rules! dispatch_real {
    ($dtype:expr, $R:ident, $body:expr) => {
        match $dtype {
            $crate::DType::F64 => {
                type $R = f64;
                $body
            }
            _ => {
                type $R = f32;
                $body
            }
        }
    };
}
pub(crate) use dispatch_real;

#[cfg(test)]
mod half_conversions {
    use super::*;

    #[test]
    fn every_half_widens_as_in_the_half_crate() {
        for bits in 0..=u16::MAX {
            let (a, b) = (bf16::from_bits(bits), f16::from_bits(bits));
            for (own, other) in [(widen_bf16(a), a.to_f32()), (widen_f16(b), b.to_f32())] {
                assert!(own.to_bits() == other.to_bits() || own.is_nan() && other.is_nan(), "{bits:#x}");
            }
        }
    }

    #[test]
    fn floats_round_as_in_the_half_crate() {
        // Every exponent and sign, with mantissas around each place where rounding decides.
        for high in 0..=u16::MAX as u32 {
            for low in [0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
                let x = f32::from_bits(high << 16 | low);
                let (bf, ff) = (round_to_bf16(x), round_to_f16(x));
                assert!(bf.to_bits() == bf16::from_f32(x).to_bits() || bf.is_nan() && x.is_nan(), "{x:e}");
                assert!(ff.to_bits() == f16::from_f32(x).to_bits() || ff.is_nan() && x.is_nan(), "{x:e}");
            }
        }
    }
}
