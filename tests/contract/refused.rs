//! Bad arguments: each is an error that names what was expected and what it got.

use x_transformers::{DType, Error, ErrorKind, Result, Tensor};

use crate::common::device;

pub fn floats(shape: &[usize]) -> Tensor {
    Tensor::generate(shape, DType::F32, device(), |i| i as f64).expect("a legal shape")
}

pub fn tokens(values: &[i64]) -> Tensor {
    Tensor::from_slice(values, [values.len()], device()).expect("a legal shape")
}

/// Returns the message of an error of the given kind. A GPU reports bad indices when values are read back.
#[track_caller]
pub fn refused(result: Result<Tensor>, kind: fn(&Error) -> bool, parts: &[&str]) {
    let error = result.and_then(|y| y.to_f64_vec()).expect_err("bad arguments must be refused");
    assert!(kind(&error), "another kind of error: {error:?}");
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    }
}

pub fn shape(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Shape { .. })
}

pub fn dtype(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::DType { .. })
}

pub fn argument(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Argument { .. })
}
