//! Dropout of attention weights.

use super::*;

/// One column of ones as values makes each output the sum of a query's weights after dropout.
#[test]
fn attention_dropout_statistics() {
    let _alone = alone();
    let (queries, keys, p) = (400, 500, 0.3);
    let (q, k) = (random(&[1, 1, queries, 8], DType::F32, 0), random(&[1, 1, keys, 8], DType::F32, 1));
    // Equal weights: a sum counts the kept ones.
    let q = q.affine(0.0, 0.0).unwrap();
    let v = Tensor::ones([1, 1, keys, 1], DType::F32, device()).unwrap();
    let spec = AttentionSpec { dropout: p, ..AttentionSpec::default() };
    let _tape = Tape::train(8);
    let first = attention(&q, &k, &v, &spec).unwrap().to_f64_vec().unwrap();
    let mean = first.iter().sum::<f64>() / queries as f64;
    // Standard error of the mean of 200 000 draws of 1 / (1 − p) or 0.
    assert!((mean - 1.0).abs() < 5.0 * (p / (1.0 - p) / (queries * keys) as f64).sqrt(), "mean {mean}");
    let variance = first.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / queries as f64;
    let expected = p / (1.0 - p) / keys as f64;
    assert!((variance / expected - 1.0).abs() < 0.3, "variance {variance}, expected {expected}");
    // Another call draws another mask; without a training tape there is none.
    assert_ne!(first, attention(&q, &k, &v, &spec).unwrap().to_f64_vec().unwrap());
    drop(_tape);
    let _tape = Tape::grad();
    let plain = attention(&q, &k, &v, &spec).unwrap().to_f64_vec().unwrap();
    assert!(plain.iter().all(|x| (x - 1.0).abs() < 1e-5));
}

/// With an identity matrix as values, the output is the weights after dropout; the gradient of `Σ out ⊙ c` with respect
/// to the values is then `weightsᵀ c`, which shows whether the backward mask differs from the forward one.
#[test]
fn attention_dropout_masks_are_equal_forward_and_backward() {
    let _alone = alone();
    let (queries, keys) = (150, 140);
    let identity = generate(&[1, 1, keys, keys], DType::F64, |i| (i / keys == i % keys) as u8 as f64);
    let v = identity.requires_grad().unwrap();
    let q = random(&[1, 1, queries, 4], DType::F64, 0).requires_grad().unwrap();
    let k = random(&[1, 1, keys, 4], DType::F64, 1).requires_grad().unwrap();
    for causal in [false, true] {
        // With more queries than keys, a causal call has fully masked queries, whose weights are dropped too.
        let spec = AttentionSpec { scale: 0.5, causal, dropout: 0.4, ..AttentionSpec::default() };
        let c = random(&[1, 1, queries, keys], DType::F64, 7).to_f64_vec().unwrap();
        let mut tape = Tape::train(12);
        let out = attention(&q, &k, &v, &spec).unwrap();
        let weights = out.to_f64_vec().unwrap();
        let dropped = weights.iter().filter(|&&w| w == 0.0).count() as f64 / weights.len() as f64;
        assert!(causal || (dropped - 0.4).abs() < 0.02, "{dropped} dropped");
        let cotangent = Tensor::from_slice(&c, [1, 1, queries, keys], device()).unwrap();
        let grads = tape.backward_with(&out, &cotangent).unwrap();
        let dv = grads.get(&v).unwrap().to_f64_vec().unwrap();
        for (key, feature) in (0..keys).flat_map(|key| [0, 17, 139].map(|feature| (key, feature))) {
            let expected: f64 = (0..queries).map(|i| weights[i * keys + key] * c[i * keys + feature]).sum();
            assert!((dv[key * keys + feature] - expected).abs() < 1e-12);
        }
        // The gradient of the queries by differences, under the same seed.
        let value = |q: &Tensor| -> f64 {
            let _tape = Tape::train(12);
            let out = attention(q, &k, &v, &spec).unwrap().to_f64_vec().unwrap();
            out.iter().zip(&c).map(|(out, c)| out * c).sum()
        };
        let (base, dq) = (q.to_f64_vec().unwrap(), grads.get(&q).unwrap().to_f64_vec().unwrap());
        for at in [0, 5, 77, 599] {
            let moved = |step: f64| {
                let mut values = base.clone();
                values[at] += step;
                value(&Tensor::from_slice(&values, [1, 1, queries, 4], device()).unwrap())
            };
            let numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((numeric - dq[at]).abs() < 1e-7 * dq[at].abs().max(1.0), "{numeric} {}", dq[at]);
        }
    }
}

#[test]
fn attention_drops_everything_at_probability_one() {
    let _alone = alone();
    let leaves = operands(1, 1, [3, 3], 2, DType::F32);
    let spec = AttentionSpec { dropout: 1.0, ..AttentionSpec::default() };
    for result in forward_backward(&leaves, &spec, Tape::train(1)).unwrap() {
        assert!(result.to_f64_vec().unwrap().iter().all(|&x| x == 0.0));
    }
}
