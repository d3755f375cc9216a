use crate::{
    case::{Array, Case, Input},
    refused::{argument, dtype, floats, refused, shape, tokens},
};

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

#[test]
fn errors() {
    let _alone = crate::alone();
    let x = floats(&[2, 3, 4]);
    refused(floats(&[3, 4]).shift_tokens(&[1], None), shape, &["shift_tokens", "[batch, n, dim]", "[3, 4]"]);
    refused(tokens(&[1]).reshape([1, 1, 1]).expect("one").shift_tokens(&[1], None), dtype, &["shift_tokens", "i64"]);
    refused(x.shift_tokens(&[], None), argument, &["shift_tokens", "1 to 4 amounts"]);
    refused(x.shift_tokens(&[1; 5], None), argument, &["shift_tokens", "1 to 4 amounts", "[1, 1, 1, 1, 1]"]);
    for mask in [floats(&[2, 3]), floats(&[2, 4]).gt(&floats(&[2, 4])).expect("a mask")] {
        refused(x.shift_tokens(&[1], Some(&mask)), shape, &["shift_tokens", "bool mask [2, 3]"]);
    }
}
