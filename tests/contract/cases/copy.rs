use x_transformers::Tensor;

use crate::case::{Array, Case, Input};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "contiguous",
            "transposed",
            vec![Input::float(&[5, 3, 4])],
            |x| x[0].transpose(0, 2)?.contiguous(),
            |x| Array::from_fn(&[4, 3, 5], |i| x[0].at(&[i[2], i[1], i[0]])),
        ),
        Case::new("to_dtype", "identity", vec![Input::float(&[7])], |x| x[0].to_dtype(x[0].dtype()), |x| x[0].clone()),
        Case::new(
            "cat",
            "middle",
            vec![Input::float(&[2, 3, 4]), Input::float(&[2, 0, 4]), Input::float(&[2, 1, 4])],
            |x| Tensor::cat(&[&x[0], &x[1], &x[2]], 1),
            |x| Array::from_fn(&[2, 4, 4], |i| if i[1] < 3 { x[0].at(i) } else { x[2].at(&[i[0], i[1] - 3, i[2]]) }),
        ),
    ]
}
