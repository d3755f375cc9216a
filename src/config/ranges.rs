//! Ranges that options and plans share.

use crate::{Error, Result, error::ensure};

/// The largest width of any layer: beyond it weights could not be addressed.
pub(super) const WIDEST: usize = 1 << 30;

/// Refuses 0, and what no weight could be as large as.
pub(super) fn at_least_one(key: &str, value: usize) -> Result<()> {
    ensure!((1..=WIDEST).contains(&value), Error::option(key, format_args!("expected 1 to {WIDEST}, got {value}")));
    Ok(())
}

/// Refuses what is not in `0..=1`, NaN included.
pub(super) fn probability(key: &str, value: f64) -> Result<()> {
    ensure!((0.0..=1.0).contains(&value), Error::option(key, format_args!("expected 0 to 1, got {value}")));
    Ok(())
}

/// Refuses an option that would do nothing because another one is off.
pub(super) fn without(key: &str, given: bool, needed: &str) -> Result<()> {
    ensure!(!given, Error::option(key, format_args!("needs `{needed}` = true, which is off")));
    Ok(())
}
