use crate::case::{Array, Case, Input};

/// Sums over the dims that are listed.
fn sum(x: &Array, dims: &[usize]) -> Array {
    let shape: Vec<usize> = (0..x.shape.len()).filter(|d| !dims.contains(d)).map(|d| x.shape[d]).collect();
    let mut out = Array::from_fn(&shape, |_| 0.0);
    Array::from_fn(&x.shape, |i| {
        let position = (0..i.len()).filter(|d| !dims.contains(d)).fold(0, |p, d| p * x.shape[d] + i[d]);
        out.data[position] += x.at(i);
        0.0
    });
    out
}

pub fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize], dims: &'static [isize]| {
        let rank = shape.len() as isize;
        Case::new(
            "sum",
            name,
            vec![Input::float(shape)],
            move |x| x[0].sum(dims),
            move |x| {
                let dims: Vec<usize> = match dims {
                    [] => (0..rank as usize).collect(),
                    _ => dims.iter().map(|&d| (if d < 0 { d + rank } else { d }) as usize).collect(),
                };
                sum(&x[0], &dims)
            },
        )
    };
    vec![
        case("all", &[3, 5, 7], &[]),
        case("last", &[3, 5, 37], &[-1]),
        case("first", &[5, 33], &[0]),
        case("outer", &[2, 3, 4], &[0, 2]),
        case("empty", &[2, 0, 4], &[1]),
        Case::new(
            "mean",
            "last",
            vec![Input::float(&[4, 9])],
            |x| x[0].mean(&[-1]),
            |x| {
                let mut total = sum(&x[0], &[1]);
                total.data.iter_mut().for_each(|v| *v /= 9.0);
                total
            },
        ),
        Case::new(
            "sum_to",
            "broadcast",
            vec![Input::float(&[2, 3, 4])],
            |x| x[0].sum_to(x_transformers::IntoShape::into_shape([3, 1])?),
            |x| {
                let mut out = sum(&x[0], &[0, 2]);
                out.shape = vec![3, 1];
                out
            },
        ),
    ]
}
