use x_transformers::{Error, ErrorKind};

use crate::{
    case::{Array, Case, Input},
    refused::{dtype, floats, refused, shape, tokens},
};

fn reference(x: &[Array]) -> Array {
    let shape = [&x[1].shape[..], &x[0].shape[1..]].concat();
    Array::from_fn(&shape, |i| {
        let (j, at) = i.split_last().expect("rank 1 or more");
        x[0].at(&[x[1].at(at) as usize, *j])
    })
}

fn case(name: &str, table: [usize; 2], indices: &[usize]) -> Case {
    let inputs = vec![Input::float(&table), Input::int(indices, table[0] as u64)];
    Case::new("embedding", name, inputs, |x| x[0].embedding(&x[1]), reference)
}

pub fn cases() -> Vec<Case> {
    vec![
        case("ordinary", [11, 8], &[2, 5]),
        case("odd", [37, 13], &[3, 2, 7]),
        case("many uses", [3, 5], &[200]),
        case("several tasks", [123, 37], &[9, 41]),
        case("more than a tile of the sort", [300, 3], &[2, 2500]),
        case("wide", [3, 1030], &[4]),
        case("one token", [1, 4], &[6]),
        case("one index", [5, 3], &[]),
        case("no indices", [5, 3], &[2, 0]),
        case("no features", [5, 0], &[4]),
    ]
}

#[test]
fn errors() {
    let _alone = crate::alone();
    let table = floats(&[5, 3]);
    for (bad, message) in [(5, "token 5"), (-1, "token -1")] {
        let token = |error: &Error| matches!(error.kind(), ErrorKind::Index { what: "token", limit: 5, .. });
        refused(table.embedding(&tokens(&[0, bad])), token, &["embedding", message, "0 to 4"]);
    }
    refused(
        floats(&[0, 3]).embedding(&tokens(&[0])),
        |error| matches!(error.kind(), ErrorKind::Index { .. }),
        &["token 0"],
    );
    refused(table.embedding(&floats(&[2])), dtype, &["embedding", "i64", "f32"]);
    refused(floats(&[5]).embedding(&tokens(&[0])), shape, &["embedding", "[tokens, dim]", "[5]"]);
    refused(tokens(&[1]).unsqueeze(0).and_then(|x| x.embedding(&tokens(&[0]))), dtype, &["embedding", "i64"]);
    let deep = tokens(&[1]).reshape([1; 6]).expect("six dimensions");
    refused(table.embedding(&deep), shape, &["7 dimensions"]);
}
