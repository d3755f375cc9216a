//! Choice of vector instructions: detected once, or forced by `XT_CPU` for tests and comparisons.

use std::sync::OnceLock;

#[cfg(all(target_arch = "x86_64", not(miri)))]
use super::amx;
use crate::{Error, Result};

/// Level of vector instructions; each includes those before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[non_exhaustive]
pub enum Level {
    /// Instructions that every processor of the architecture has.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 BF16: products of pairs of bf16 numbers.
    Avx512Bf16,
    /// AMX: products of tiles of bf16 numbers.
    Amx,
}

impl Level {
    /// All levels, from the lowest.
    pub const ALL: [Self; 5] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// Returns the name of the level in `XT_CPU`: `portable`, `avx2`, `avx512`, `avx512_bf16` or `amx`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512_bf16",
            Self::Amx => "amx",
        }
    }

    /// Returns the level of this processor.
    pub fn detected() -> Self {
        // Miri runs portable code alone.
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            match (avx2, avx512, is_x86_feature_detected!("avx512bf16")) {
                (true, true, true) if amx::detected() => Self::Amx,
                (true, true, true) => Self::Avx512Bf16,
                (true, true, false) => Self::Avx512,
                (true, false, _) => Self::Avx2,
                (false, ..) => Self::Portable,
            }
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        Self::Portable
    }

    /// Returns the level named by the environment variable `XT_CPU`, if set. The library ignores an unknown name.
    ///
    /// Errors: an unknown name.
    pub fn wanted() -> Result<Option<Self>> {
        let Some(name) = std::env::var_os("XT_CPU").filter(|name| !name.is_empty()) else { return Ok(None) };
        let named = Self::ALL.into_iter().find(|level| name == level.name());
        named.map(Some).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::option("XT_CPU", format_args!("expected one of {names}, got {name:?}"))
        })
    }
}

/// Returns the level in use: the detected one, or a lower one named by `XT_CPU`.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let wanted = Level::wanted().ok().flatten();
        // Never above what the processor has: a wrong value must not lead to an illegal instruction.
        wanted.map_or(Level::detected(), |wanted| wanted.min(Level::detected()))
    })
}

/// Returns `true` if loops over types of these sizes are compiled for each level; loops over f64, which serves
/// references and gradient tests, are compiled once.
pub(crate) const fn has_levels(mut sizes: &[usize]) -> bool {
    while let [first, rest @ ..] = sizes {
        if *first == size_of::<f64>() {
            return false;
        }
        sizes = rest;
    }
    true
}

/// Defines a function whose loops are compiled once per [`Level`] and chosen at run time.
///
/// The body is ordinary Rust; it is inlined into a wrapper per level, so that the compiler vectorises it for that
/// level's registers. Bodies call only functions that are inlined themselves. In the body `FUSED` says whether the
/// level multiplies and adds in one instruction; [`Real::fma`](crate::dtype::Real::fma) and others take it.
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($T:ident : $bound:path),+>)? ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$($T: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<const FUSED: bool $(, $($T: $bound),+)?> ($($arg: $ty),*) $(-> $ret)? $body

            // Once, and not in each function that calls this one.
            #[inline(never)]
            #[allow(clippy::too_many_arguments)]
            fn portable $(<$($T: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                body::<false $(, $($T),+)?>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            if const { $crate::device::simd::has_levels(&[$($(size_of::<$T>()),+)?]) } {
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx2 $(<$($T: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                    body::<true $(, $($T),+)?>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                #[allow(clippy::too_many_arguments)]
                fn avx512 $(<$($T: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                    body::<true $(, $($T),+)?>($($arg),*)
                }
                let level = $crate::device::simd::level();
                if level >= $crate::device::Level::Avx512 {
                    // SAFETY: `level` is at most what was detected on this processor.
                    return unsafe { avx512 $(::<$($T),+>)? ($($arg),*) };
                }
                if level >= $crate::device::Level::Avx2 {
                    // SAFETY: as above.
                    return unsafe { avx2 $(::<$($T),+>)? ($($arg),*) };
                }
            }
            portable $(::<$($T),+>)? ($($arg),*)
        }
    };
}
pub(crate) use vectorized;
