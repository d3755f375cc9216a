use crate::case::{Array, Case, Input};

fn reference(x: &[Array]) -> Array {
    let mut out = x[0].clone();
    let width = x[0].shape.last().copied().unwrap_or(1);
    for row in out.data.chunks_mut(width.max(1)) {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|v| (v - max).exp()).sum();
        row.iter_mut().for_each(|v| *v = (*v - max).exp() / sum);
    }
    out
}

pub fn cases() -> Vec<Case> {
    let case = |name: &str, input: Input| Case::new("softmax", name, vec![input], |x| x[0].softmax(), reference);
    vec![
        case("odd", Input::float(&[2, 3, 17])),
        case("wide", Input::between(&[3, 1030], -30.0, 30.0)),
        case("packets of several warps a row", Input::between(&[3, 1040], -30.0, 30.0)),
        case("more than registers hold", Input::between(&[2, 8208], -9.0, 9.0)),
        case("one", Input::float(&[4, 1])),
        case("scalar", Input::float(&[])),
        case("empty rows", Input::float(&[0, 5])),
        case("empty columns", Input::float(&[3, 0])),
    ]
}
