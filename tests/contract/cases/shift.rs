use crate::case::{Array, Case, Input};

/// Element by element from the definition.
fn reference(x: &[Array], amounts: &[isize]) -> Array {
    let (shape, mask) = (&x[0].shape, x.get(1));
    let chunk = shape[2] / amounts.len();
    Array::from_fn(shape, |i| {
        let Some(&amount) = amounts.get(i[2] / chunk).filter(|&&amount| amount != 0) else { return x[0].at(i) };
        let from = i[1] as isize - amount;
        let inside = (0..shape[1] as isize).contains(&from);
        if inside && mask.is_none_or(|mask| mask.at(&[i[0], from as usize]) != 0.0) {
            x[0].at(&[i[0], from as usize, i[2]])
        } else {
            0.0
        }
    })
}

fn case(name: &str, shape: &[usize], amounts: &'static [isize], masked: bool) -> Case {
    let mut inputs = vec![Input::float(shape)];
    if masked {
        inputs.push(Input::mask(&shape[..2]));
    }
    let run = move |x: &[x_transformers::Tensor]| x[0].shift_tokens(amounts, x.get(1));
    Case::new("shift_tokens", name, inputs, run, move |x| reference(x, amounts))
}

pub fn cases() -> Vec<Case> {
    vec![
        case("causal", &[2, 5, 8], &[0, 1], false),
        case("causal two", &[2, 5, 7], &[0, 1, 2], true),
        case("both ways", &[3, 6, 10], &[-1, 0, 1], true),
        case("further than the sequence", &[2, 3, 6], &[-4, 0, 4], true),
        case("one feature each", &[1, 4, 3], &[-1, 0, 1], false),
        case("long", &[2, 600, 65], &[-2, -1, 0, 1, 2], true),
        case("wide", &[1, 3, 1040], &[-1, 0, 1, 2], true),
        case("empty batch", &[0, 4, 6], &[0, 1], false),
        case("empty sequence", &[2, 0, 6], &[0, 1], false),
    ]
}
