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

/// Value and position of the first largest element along a dimension.
fn largest(x: &Array, dim: usize) -> (Array, Array) {
    let mut shape = x.shape.clone();
    let size = shape.remove(dim);
    let at = |i: &[usize], k: usize| {
        let mut i = i.to_vec();
        i.insert(dim, k);
        x.at(&i)
    };
    let position = |i: &[usize]| (0..size).fold(0, |best, k| if at(i, k) > at(i, best) { k } else { best });
    (Array::from_fn(&shape, |i| at(i, position(i))), Array::from_fn(&shape, |i| position(i) as f64))
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
    let mut cases = Vec::new();
    for (dim, shape) in
        [(0, vec![5, 3, 4]), (1, vec![5, 3, 4]), (2, vec![5, 3, 4]), (0, vec![9]), (1, vec![2, 3, 2, 5])]
    {
        let name = format!("{shape:?} along {dim}");
        cases.push(Case::new(
            "max",
            &name,
            vec![Input::float(&shape)],
            move |x| x[0].max(dim as isize),
            move |x| largest(&x[0], dim).0,
        ));
        cases.push(Case::new(
            "argmax",
            &name,
            vec![Input::Float { shape, low: -1.0, high: 1.0, grad: false }],
            move |x| x[0].argmax(dim as isize),
            move |x| largest(&x[0], dim).1,
        ));
    }
    // Along rows, columns, all, and what is cut into pieces.
    for (shape, dims) in [
        (vec![3, 5, 7], &[1isize, 2] as &'static [isize]),
        (vec![5, 33], &[0]),
        (vec![2, 9001], &[1]),
        (vec![300, 12], &[]),
    ] {
        let gone: Vec<usize> = match dims {
            [] => (0..shape.len()).collect(),
            _ => dims.iter().map(|&dim| dim as usize).collect(),
        };
        for (name, input) in [("integers", Input::int(&shape, 1000)), ("booleans", Input::mask(&shape))] {
            let gone = gone.clone();
            let name = format!("{name} {shape:?} along {dims:?}");
            cases.push(Case::new("sum", name, vec![input], move |x| x[0].sum(dims), move |x| sum(&x[0], &gone)));
        }
    }
    for dim in 0..3 {
        let input = || vec![Input::int(&[5, 3, 4], 40)];
        cases.push(Case::new(
            "max",
            format!("integers along {dim}"),
            input(),
            move |x| x[0].max(dim as isize),
            move |x| largest(&x[0], dim).0,
        ));
        cases.push(Case::new(
            "argmax",
            format!("integers along {dim}"),
            input(),
            move |x| x[0].argmax(dim as isize),
            move |x| largest(&x[0], dim).1,
        ));
    }
    // A scalar counts as a vector of one.
    let scalar = || vec![Input::float(&[])];
    cases.extend([
        Case::new("sum", "scalar", scalar(), |x| x[0].sum(&[-1]), |x| x[0].clone()),
        Case::new("mean", "scalar", scalar(), |x| x[0].mean(&[0]), |x| x[0].clone()),
        Case::new("max", "scalar", scalar(), |x| x[0].max(-1), |x| x[0].clone()),
    ]);
    cases.extend([
        case("all", &[3, 5, 7], &[]),
        case("last", &[3, 5, 37], &[-1]),
        case("first", &[5, 33], &[0]),
        case("outer", &[2, 3, 4], &[0, 2]),
        case("empty", &[2, 0, 4], &[1]),
        // Long enough to be cut into pieces: rows, columns, and columns in the middle.
        case("long", &[2, 9001], &[1]),
        case("tall", &[300, 12], &[0]),
        case("middle", &[2, 130, 9], &[1]),
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
    ]);
    cases
}
