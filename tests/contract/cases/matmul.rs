use crate::case::{Array, Case, Input};

/// `y[.., i, j] = Σ_k a[.., i, k] · b[.., k, j]`, with broadcast dimensions in front.
fn matmul(x: &[Array]) -> Array {
    let (a, b) = (&x[0], &x[1]);
    let rank = a.shape.len().max(b.shape.len());
    let size = |x: &Array, dim: usize| (dim + x.shape.len()).checked_sub(rank).map_or(1, |dim| x.shape[dim]);
    let mut shape: Vec<usize> =
        (0..rank).map(|dim| if size(a, dim) == 1 { size(b, dim) } else { size(a, dim) }).collect();
    let depth = a.shape[a.shape.len() - 1];
    (shape[rank - 2], shape[rank - 1]) = (size(a, rank - 2), size(b, rank - 1));
    Array::from_fn(&shape, |index| {
        let (mut left, mut right) = (index.to_vec(), index.to_vec());
        (0..depth)
            .map(|k| {
                (left[rank - 1], right[rank - 2]) = (k, k);
                a.at(&left) * b.at(&right)
            })
            .sum()
    })
}

/// A vector on the left is a row and one on the right a column; the result drops that dimension.
fn with_vectors(x: &[Array]) -> Array {
    let [mut a, mut b] = [x[0].clone(), x[1].clone()];
    let (row, column) = (a.shape.len() == 1, b.shape.len() == 1);
    if row {
        a.shape.insert(0, 1);
    }
    if column {
        b.shape.push(1);
    }
    let mut y = matmul(&[a, b]);
    if column {
        y.shape.pop();
    }
    if row {
        y.shape.remove(y.shape.len() - if column { 1 } else { 2 });
    }
    y
}

/// `y[.., o] = b[o] + Σ_i x[.., i] · w[o, i]`
fn linear(x: &[Array]) -> Array {
    let [outputs, inputs] = x[1].shape[..] else { panic!("a weight has two dimensions") };
    let mut shape = x[0].shape.clone();
    *shape.last_mut().expect("x has rows") = outputs;
    let rows = x[0].data.len().checked_div(inputs).unwrap_or_else(|| shape[..shape.len() - 1].iter().product());
    let mut data = Vec::new();
    for row in 0..rows {
        for output in 0..outputs {
            let sum: f64 = (0..inputs).map(|i| x[0].data[row * inputs + i] * x[1].data[output * inputs + i]).sum();
            data.push(sum + x.get(2).map_or(0.0, |bias| bias.data[output]));
        }
    }
    Array { shape, data }
}

pub fn cases() -> Vec<Case> {
    let product = |name: &str, a: &[usize], b: &[usize]| {
        Case::new("matmul", name, vec![Input::float(a), Input::float(b)], |x| x[0].matmul(&x[1]), matmul)
    };
    let vectors = |name: &str, a: &[usize], b: &[usize]| {
        Case::new("matmul", name, vec![Input::float(a), Input::float(b)], |x| x[0].matmul(&x[1]), with_vectors)
    };
    // A weight that is a vector is a layer of one output; the result drops that dimension.
    let one_output = |name: &str, x: &[usize], bias: bool| {
        let mut inputs = vec![Input::float(x), Input::float(&x[x.len() - 1..])];
        if bias {
            inputs.push(Input::float(&[]));
        }
        let reference = |x: &[Array]| {
            let weight = Array { shape: vec![1, x[1].data.len()], data: x[1].data.clone() };
            let mut y = linear(&[&[x[0].clone(), weight], &x[2..]].concat());
            y.shape.pop();
            y
        };
        Case::new("linear", name, inputs, |x| x[0].linear(&x[1], x.get(2)), reference)
    };
    let dense = |name: &str, x: &[usize], outputs: usize, bias: bool| {
        let mut inputs = vec![Input::float(x), Input::float(&[outputs, x[x.len() - 1]])];
        if bias {
            inputs.push(Input::float(&[outputs]));
        }
        Case::new("linear", name, inputs, |x| x[0].linear(&x[1], x.get(2)), linear)
    };
    vec![
        product("one", &[1, 1], &[1, 1]),
        product("odd", &[5, 7], &[7, 3]),
        product("edges of every tile", &[13, 130], &[130, 65]),
        product("several blocks", &[70, 530], &[530, 90]),
        product("row times matrix", &[1, 37], &[37, 50]),
        product("matrix times column", &[50, 37], &[37, 1]),
        product("outer", &[9, 1], &[1, 11]),
        product("batch", &[3, 2, 5, 7], &[3, 2, 7, 4]),
        product("weight for all of a batch", &[3, 2, 5, 7], &[7, 4]),
        product("keys shared by heads", &[2, 3, 5, 7], &[2, 1, 7, 4]),
        product("batch broadcast on both sides", &[3, 1, 5, 7], &[2, 7, 4]),
        product("left repeated", &[5, 7], &[3, 7, 4]),
        product("outer and inner batch", &[2, 3, 1, 5], &[2, 1, 5, 4]),
        product("six dimensions", &[2, 1, 2, 1, 3, 2], &[1, 2, 1, 2, 2, 3]),
        vectors("vector times vector", &[37], &[37]),
        vectors("vector times matrix", &[7], &[7, 5]),
        vectors("matrix times vector", &[5, 7], &[7]),
        vectors("vector times batch", &[7], &[3, 2, 7, 4]),
        vectors("batch times vector", &[3, 2, 5, 7], &[7]),
        vectors("one times one", &[1], &[1]),
        vectors("one times row", &[1], &[1, 1]),
        vectors("vectors of nothing", &[0], &[0]),
        vectors("batch of nothing times vector", &[2, 3, 0], &[0]),
        product("no rows", &[0, 4], &[4, 3]),
        product("no columns", &[3, 4], &[4, 0]),
        product("no products", &[3, 0], &[0, 5]),
        product("empty batch", &[0, 3, 4], &[4, 5]),
        product("empty batch of both", &[0, 3, 4], &[0, 4, 5]),
        one_output("vector weight", &[2, 3], false),
        one_output("vector weight and a bias", &[2, 5, 7], true),
        one_output("vector times vector weight", &[9], true),
        dense("vector", &[6], 5, true),
        dense("odd", &[2, 3, 7], 5, true),
        dense("no bias", &[4, 9], 17, false),
        dense("one row", &[1, 1, 65], 33, true),
        // Where a weight's columns are one value, 530 signed products with it cancel down to a small sum.
        dense("blocks", &[70, 530], 40, true).tolerance(2.0),
        dense("no rows", &[2, 0, 4], 3, true),
        dense("no inputs", &[3, 0], 4, true),
        dense("no outputs", &[3, 4], 0, true),
    ]
}
