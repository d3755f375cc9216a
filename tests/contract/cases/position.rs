use crate::case::{Array, Case, Input};

/// The bucket of a distance `query − key`, in the words of the paper: exact buckets first, then logarithmic ones.
fn bucket(distance: i64, causal: bool, buckets: usize, max_distance: usize) -> usize {
    let side = if causal { buckets } else { buckets / 2 };
    let offset = if !causal && distance < 0 { side } else { 0 };
    let distance = if causal { distance.max(0) } else { distance.abs() } as usize;
    let exact = side / 2;
    if distance < exact {
        return offset + distance;
    }
    let part = (distance as f64 / exact as f64).ln() / (max_distance as f64 / exact as f64).ln();
    offset + (exact + (part * (side - exact) as f64) as usize).min(side - 1)
}

fn bias(name: &str, sizes: (usize, usize), heads: usize, causal: bool, buckets: usize, max_distance: usize) -> Case {
    let (queries, keys) = sizes;
    Case::new(
        "relative_position_bias",
        name,
        vec![Input::float(&[buckets, heads])],
        move |x| x[0].relative_position_bias(queries, keys, causal, max_distance, 1.5),
        move |x| {
            Array::from_fn(&[heads, queries, keys], |i| {
                let row = bucket(i[1] as i64 - i[2] as i64, causal, buckets, max_distance);
                1.5 * x[0].at(&[row, i[0]])
            })
        },
    )
}

fn sinusoid(name: &str, frequencies: &[usize], first: usize, n: usize) -> Case {
    let input = Input::Float { shape: frequencies.to_vec(), low: 0.0, high: 1.0, grad: false };
    Case::new(
        "sinusoid",
        name,
        vec![input],
        move |x| x[0].sinusoid(first, n, x[0].dtype()),
        move |x| {
            let half = x[0].data.len();
            Array::from_fn(&[n, 2 * half], |i| {
                let angle = (first + i[0]) as f64 * x[0].data[i[1] % half];
                if i[1] < half { angle.sin() } else { angle.cos() }
            })
        },
    )
}

pub fn cases() -> Vec<Case> {
    vec![
        bias("causal", (7, 7), 3, true, 8, 16),
        bias("both ways", (6, 9), 2, false, 8, 16),
        bias("default sizes", (150, 170), 2, false, 32, 128),
        bias("one query", (1, 12), 4, true, 6, 7),
        bias("many keys", (130, 1100), 1, false, 8, 16),
        bias("no keys", (3, 0), 2, true, 4, 8),
        bias("no queries", (0, 3), 2, false, 4, 8),
        sinusoid("ordinary", &[4], 0, 9),
        sinusoid("offset", &[5], 100, 3),
        sinusoid("long", &[130], 3, 400),
        sinusoid("none", &[0], 0, 3),
        sinusoid("no positions", &[3], 0, 0),
    ]
}
