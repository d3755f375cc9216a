//! Errors of the faults that kernels report. `build.rs` makes the codes from `kernels/common.cuh`.

use crate::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/faults.rs"));

/// Number of i64 that a kernel writes about a fault: its code, the index, and the limit.
pub(crate) const FAULT_WORDS: usize = 3;

/// Checks the words that kernels report in; all zero means that no kernel met a fault.
///
/// Errors: the fault's.
pub(crate) fn check([code, index, limit]: [i64; FAULT_WORDS]) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let limit = limit.max(0) as usize;
    Err(match Fault::from_code(code) {
        Some(Fault::Embedding) => Error::index("embedding", "token", index, limit),
        Some(Fault::CrossEntropy) => Error::index("cross_entropy", "class", index, limit),
        Some(Fault::NoTargets) => Error::no_targets(limit, index),
        Some(Fault::Logits) => Error::broken_logits(),
        None => Error::device("launch", format_args!("a kernel reported an unknown fault, code {code}")),
    })
}

#[cfg(test)]
mod tests {
    use super::{Fault, check};

    /// The codes are the header's, and each has an error of its own.
    #[test]
    fn every_fault_of_the_header_has_an_error() {
        let header = include_str!("../../kernels/common.cuh");
        let line = header.lines().find(|line| line.starts_with("constexpr i64 FAULT_")).expect("the codes");
        let codes = line.matches('=').count() as i64;
        assert!(codes >= 4, "{line}");
        let messages: std::collections::BTreeSet<_> =
            (1..=codes).map(|code| check([code, -7, 5]).expect_err("a fault").to_string()).collect();
        assert_eq!(messages.len(), codes as usize, "{messages:?}");
        assert!(messages.iter().all(|message| !message.contains("unknown")), "{messages:?}");
        assert!(check([codes + 1, 0, 0]).expect_err("a fault").to_string().contains("unknown fault"));
        assert!(check([0, 3, 4]).is_ok() && Fault::from_code(0).is_none());
    }
}
