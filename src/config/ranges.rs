//! Range checks shared by options and plans.

use crate::{Error, Result, error::ensure};

/// Largest width of any layer: beyond it weights could not be addressed.
pub(super) const WIDEST: usize = 1 << 30;

/// Rejects 0 and widths whose weights could not be addressed.
pub(super) fn at_least_one(key: &str, value: usize) -> Result<()> {
    ensure!((1..=WIDEST).contains(&value), Error::option(key, format_args!("expected 1 to {WIDEST}, got {value}")));
    Ok(())
}

/// Rejects numbers outside `0..=1`, including NaN.
pub(super) fn probability(key: &str, value: f64) -> Result<()> {
    ensure!((0.0..=1.0).contains(&value), Error::option(key, format_args!("expected 0 to 1, got {value}")));
    Ok(())
}

/// Rejects an option that would have no effect because another one is off.
pub(super) fn without(key: &str, given: bool, needed: &str) -> Result<()> {
    ensure!(!given, Error::option(key, format_args!("requires `{needed} = true`")));
    Ok(())
}
