//! Element types: how values are stored, and which float arithmetic serves them.

use half::{bf16, f16};

use super::Real;

pub(crate) use bytemuck::Pod;

/// The type of a tensor's elements.
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
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
            Self::Bool => 1,
        }
    }

    /// Whether it is one of the four float types.
    pub fn is_float(self) -> bool {
        !matches!(self, Self::I64 | Self::Bool)
    }

    /// The most negative finite number: what masks write into scores. That of f64 for types that are not float.
    pub fn lowest(self) -> f64 {
        match self {
            Self::F32 => f32::MIN as f64,
            Self::BF16 => bf16::MIN.to_f64(),
            Self::F16 => f16::MIN.to_f64(),
            Self::F64 | Self::I64 | Self::Bool => f64::MIN,
        }
    }

    /// The name as in configs and on the command line: `f32`, `f64`, `bf16`, `f16`, `i64`, `bool`.
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

/// A host type that tensors can be made from. `u8` and `u32` are widened to [`DType::I64`].
pub trait Element: Copy + Send + Sync + 'static {
    /// The dtype of a tensor made from a slice of this type.
    const DTYPE: DType;
    /// How one element lies in the buffer.
    type Stored: Pod + Send + Sync;
    /// Converts one element for storage.
    fn to_stored(self) -> Self::Stored;
}

/// A host type that tensors can be read back as, without any conversion.
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

/// A stored float and the type it is computed in: f32 for the half types, itself otherwise.
pub(crate) trait Float: Element<Stored = Self> + Readable + Pod + PartialOrd {
    type Acc: Real;
    fn to_acc(self) -> Self::Acc;
    fn from_acc(acc: Self::Acc) -> Self;
    /// Rounds to nearest even, once. The half types have a method of this name that does not: write
    /// `<T as Float>::from_f64` where `T` is not a type parameter.
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

/// To f32, with the last bit set if anything was cut off: rounding the result to fewer bits is then as good as rounding
/// `x` itself, which two roundings to nearest are not.
#[inline(always)]
fn round_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let (cut, away) = (nearest as f64 != x, (nearest as f64).abs() > x.abs());
    f32::from_bits((nearest.to_bits() - away as u32) | cut as u32)
}

float! {
    f32 => f32, |x| x, |x| x, |x| x as f32;
    f64 => f64, |x| x, |x| x, |x| x;
    bf16 => f32, bf16::to_f32, bf16::from_f32, |x| bf16::from_f32(round_to_odd(x));
    f16 => f32, f16::to_f32, f16::from_f32, |x| f16::from_f32(round_to_odd(x));
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
            other => Err($crate::Error::DType { op: $op, message: format!("expected a float tensor, got {other}") }),
        }
    };
}
pub(crate) use dispatch_float;
