use crate::case::{Array, Case, Input};

fn reference(x: &[Array]) -> Array {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let (h, input, hidden) = (&x[0], &x[1], &x[2]);
    let (rank, dim) = (h.shape.len(), *h.shape.last().unwrap());
    Array::from_fn(&h.shape, |i| {
        let gate = |from: &Array, part: usize| {
            let mut i = i.to_vec();
            i[rank - 1] += part * dim;
            from.at(&i)
        };
        let r = sigmoid(gate(input, 0) + gate(hidden, 0));
        let z = sigmoid(gate(input, 1) + gate(hidden, 1));
        let n = (gate(input, 2) + r * gate(hidden, 2)).tanh();
        (1.0 - z) * n + z * h.at(i)
    })
}

pub fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize]| {
        let mut gates = shape.to_vec();
        *gates.last_mut().unwrap() *= 3;
        let inputs = vec![Input::float(shape), Input::float(&gates), Input::float(&gates)];
        Case::new("gru_gate", name, inputs, |x| x[0].gru_gate(&x[1], &x[2]), reference)
    };
    vec![
        case("ordinary", &[2, 3, 5]),
        case("vector", &[7]),
        case("one feature", &[4, 1]),
        case("long", &[300, 33]),
        case("wide", &[2, 1032]),
        case("empty rows", &[0, 5]),
        case("empty columns", &[3, 0]),
    ]
}
