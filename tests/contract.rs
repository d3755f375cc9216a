//! The contract of every op: its values and gradients against a naive f64 definition.

#[path = "contract/case.rs"]
mod case;
#[path = "contract/cases/mod.rs"]
mod cases;

use case::{Case, check};
use x_transformers::ops::NAMES;

/// Every op has a case, and every case names an op: an op cannot be half-added.
#[test]
fn every_op_has_a_case() {
    let cases = cases::all();
    for name in NAMES {
        assert!(cases.iter().any(|case| case.op == *name), "no case for op `{name}`");
    }
    for case in &cases {
        assert!(NAMES.contains(&case.op), "case {} names `{}`, which is not in ops::NAMES", case.name, case.op);
    }
}

/// All cases of `XT_CASE` (a part of a name), or of every op.
#[test]
fn contract() {
    let filter = std::env::var("XT_CASE").unwrap_or_default();
    let cases: Vec<Case> = cases::all().into_iter().filter(|case| case.name.contains(&filter)).collect();
    assert!(!cases.is_empty(), "no case matches `{filter}`");
    let failures: Vec<String> = cases.iter().flat_map(check).collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
