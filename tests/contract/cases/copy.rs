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
        Case::new(
            "contiguous",
            "transposed in tiles",
            vec![Input::float(&[37, 3, 70])],
            |x| x[0].transpose(0, 2)?.contiguous(),
            |x| Array::from_fn(&[70, 3, 37], |i| x[0].at(&[i[2], i[1], i[0]])),
        ),
        Case::new(
            "contiguous",
            "transposed in packets",
            vec![Input::float(&[72, 2, 136])],
            |x| x[0].transpose(0, 2)?.contiguous(),
            |x| Array::from_fn(&[136, 2, 72], |i| x[0].at(&[i[2], i[1], i[0]])),
        ),
        Case::new(
            "contiguous",
            "matrices transposed in tiles",
            vec![Input::float(&[2, 20, 4, 33])],
            |x| x[0].transpose(1, 3)?.contiguous(),
            |x| Array::from_fn(&[2, 33, 4, 20], |i| x[0].at(&[i[0], i[3], i[2], i[1]])),
        ),
        Case::new(
            "contiguous",
            "a transposed part",
            vec![Input::float(&[40, 50])],
            |x| x[0].narrow(0, 3, 33)?.narrow(1, 5, 41)?.transpose(0, 1)?.contiguous(),
            |x| Array::from_fn(&[41, 33], |i| x[0].at(&[i[1] + 3, i[0] + 5])),
        ),
        // The gradients of both uses add up, one of them transposed.
        Case::new(
            "contiguous",
            "transposed gradients in tiles",
            vec![Input::float(&[40, 40])],
            |x| x[0].contiguous()?.square()?.add(&x[0].transpose(0, 1)?),
            |x| Array::from_fn(&[40, 40], |i| x[0].at(i).powi(2) + x[0].at(&[i[1], i[0]])),
        ),
        Case::new(
            "cat",
            "transposed in tiles",
            vec![Input::float(&[37, 18]), Input::float(&[37, 20])],
            |x| Tensor::cat(&[&x[0].transpose(0, 1)?, &x[1].transpose(0, 1)?], 0),
            |x| {
                Array::from_fn(
                    &[38, 37],
                    |i| if i[0] < 18 { x[0].at(&[i[1], i[0]]) } else { x[1].at(&[i[1], i[0] - 18]) },
                )
            },
        ),
        Case::new("to_dtype", "identity", vec![Input::float(&[7])], |x| x[0].to_dtype(x[0].dtype()), |x| x[0].clone()),
        Case::new(
            "cat",
            "a vector of nothing",
            vec![Input::float(&[0]), Input::float(&[2, 3]), Input::float(&[0]), Input::float(&[2, 1])],
            |x| Tensor::cat(&[&x[0], &x[1], &x[2], &x[3]], 1),
            |x| Array::from_fn(&[2, 4], |i| if i[1] < 3 { x[1].at(i) } else { x[3].at(&[i[0], 0]) }),
        ),
        Case::new(
            "cat",
            "middle",
            vec![Input::float(&[2, 3, 4]), Input::float(&[2, 0, 4]), Input::float(&[2, 1, 4])],
            |x| Tensor::cat(&[&x[0], &x[1], &x[2]], 1),
            |x| Array::from_fn(&[2, 4, 4], |i| if i[1] < 3 { x[0].at(i) } else { x[2].at(&[i[0], i[1] - 3, i[2]]) }),
        ),
    ]
}
