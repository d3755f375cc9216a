use crate::case::{Array, Case, Input};

pub fn cases() -> Vec<Case> {
    vec![Case::new(
        "affine",
        "odd",
        vec![Input::float(&[3, 5])],
        |x| x[0].affine(1.5, -0.25),
        |x| Array::from_fn(&x[0].shape, |i| x[0].at(i) * 1.5 - 0.25),
    )]
}
