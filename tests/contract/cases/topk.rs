use crate::case::{Array, Case, Input};

/// Marks each entry that has fewer than `k` larger ones in its row.
fn reference(x: &Array, k: usize) -> Array {
    let mut out = x.clone();
    let width = x.shape.last().copied().unwrap_or(1);
    for (row, out) in x.data.chunks(width.max(1)).zip(out.data.chunks_mut(width.max(1))) {
        for (x, out) in row.iter().zip(out) {
            *out = f64::from(u8::from(row.iter().filter(|other| *other > x).count() < k));
        }
    }
    out
}

pub fn cases() -> Vec<Case> {
    let case = |name: &str, input: Input, k: usize| {
        Case::new("top_k_mask", name, vec![input], move |x| x[0].top_k_mask(k), move |x| reference(&x[0], k))
    };
    let floats = |shape: &[usize]| Input::Float { shape: shape.to_vec(), low: -4.0, high: 4.0, grad: false };
    vec![
        case("ordinary", floats(&[2, 3, 11]), 4),
        case("best", floats(&[5, 7]), 1),
        case("all but one", floats(&[5, 7]), 6),
        case("more than there are", floats(&[3, 4]), 9),
        case("wide", floats(&[70, 1030]), 100),
        case(
            "ties",
            Input::Values { shape: vec![2, 5], values: vec![1.0, 2.0, 2.0, 2.0, 0.0, 3.0, 3.0, 3.0, 3.0, 3.0] },
            2,
        ),
        case("empty rows", floats(&[0, 5]), 2),
        case("empty columns", floats(&[3, 0]), 2),
    ]
}
