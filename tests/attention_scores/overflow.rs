//! Scores and values near the end of the range: neither a mask, nor infinite means, nor a hidden NaN.

use super::*;

/// Scores that overflow are not masked scores.
#[test]
fn overflow_is_not_a_mask() {
    let plain = AttentionSpec::default();
    for (dtype, large) in [(DType::F64, 1e200), (DType::F32, 1e20), (DType::BF16, 1e20)] {
        // All −∞, one of them, all ∞, one ∞, one NaN.
        let (out, grads) = single(dtype, large, &[-large, -2.0 * large], &[1.0, 5.0], &plain);
        assert!(out.is_nan() && grads.iter().all(|x| x.is_nan()), "{dtype}: {out} {grads:?}");
        let (out, grads) = single(dtype, large, &[-large, 0.0], &[1.0, 5.0], &plain);
        assert!(out == 5.0 && grads == [0.0; 3], "{dtype}: {out} {grads:?}");
        for keys in [[large, large], [large, 0.0], [NAN, 0.0]] {
            let (out, grads) = single(dtype, large, &keys, &[1.0, 5.0], &plain);
            assert!(out.is_nan() && grads.iter().all(|x| x.is_nan()), "{dtype}, {keys:?}: {out} {grads:?}");
        }
        let (out, grads) = single(dtype, NAN, &[1.0, 2.0], &[1.0, 5.0], &plain);
        assert!(out.is_nan() && grads.iter().all(|x| x.is_nan()), "{dtype}: {out} {grads:?}");
        let small = AttentionSpec { scale: 1.0 / large / large, ..plain.clone() };
        let (out, _) = single(dtype, large, &[-large, -2.0 * large], &[1.0, 5.0], &small);
        assert!(out.is_nan() || (out - 2.075_766).abs() < 0.01, "{dtype}: {out}");
    }
    for dtype in FLOATS {
        // In a bias, −∞ is a weight of 0, not a mask: without another key there is nothing to attend to.
        let bias = |x: [f64; 2]| tensor(&[2], dtype, move |i| x[i]);
        let with = |bias: &Tensor| {
            single(dtype, 1.0, &[1.0, 2.0], &[1.0, 5.0], &AttentionSpec { bias: Some(bias), ..plain.clone() })
        };
        assert_eq!(with(&bias([-INFINITY, 0.0])), (5.0, [0.0; 3]));
        assert_eq!(with(&bias([-INFINITY, -INFINITY])), (0.0, [0.0; 3]));
        let nan = with(&bias([NAN, 0.0]));
        assert!(nan.0.is_nan() && nan.1.iter().all(|x| x.is_nan()), "{dtype}: {nan:?}");
        // A query without keys attends to all keys equally, next to one of the same block that overflows.
        let none = Tensor::from_slice(&[false], [1, 1], device()).unwrap();
        let (out, grads) =
            single(dtype, 1.0, &[1.0, 2.0], &[1.0, 5.0], &AttentionSpec { mask: Some(&none), ..plain.clone() });
        assert_eq!((out, grads), (3.0, [0.0, 0.0, 0.5]));
    }
    let [q, k] =
        [[1e20, 1.0, NAN, 1.0], [-1e20, -2e20, -1e20, -1e20]].map(|x| tensor(&[1, 1, 4, 1], DType::BF16, |i| x[i]));
    let v = tensor(&[1, 1, 4, 1], DType::BF16, |i| i as f64);
    let mask = Tensor::from_slice(&[true, false, true, true], [4, 1], device()).unwrap();
    let out = values(&attention(&q, &k, &v, &AttentionSpec { mask: Some(&mask), ..plain }).unwrap());
    assert!(out[0].is_nan() && out[1] == 1.5 && out[2].is_nan() && (out[3] - 5.0 / 3.0).abs() < 0.01, "{out:?}");
}

/// The mean of finite values is finite, whatever the sum is.
#[test]
fn means_of_large_values_are_finite() {
    for dtype in FLOATS {
        let most = -dtype.lowest();
        for (keys, size) in [(2, most), (3, most), (70, most), (300, 0.9 * most)] {
            let size = rounded(size, dtype);
            for (sign, causal, blind) in [(1.0, false, false), (-1.0, true, false), (1.0, false, true)] {
                let [q, k] = [keys, keys].map(|n| leaf(&[1, 1, n, 8], dtype, |i| (i % 3) as f64 * 0.25));
                let v = leaf(&[1, 1, keys, 16], dtype, |i| if i % 16 == 5 { 1.0 } else { sign * size });
                let mask = Tensor::from_slice(&[!blind], [1, 1], device()).unwrap();
                let spec = AttentionSpec { causal, mask: Some(&mask), ..AttentionSpec::default() };
                let mut tape = Tape::grad();
                let out = attention(&q, &k, &v, &spec).unwrap();
                for (i, &x) in values(&out).iter().enumerate() {
                    let exact = if i % 16 == 5 { 1.0 } else { sign * size };
                    assert!(
                        (x - exact).abs() <= precision(dtype) * exact.abs(),
                        "{dtype}, {keys} keys: {x:e}, {exact:e}"
                    );
                }
                let cotangent = tensor(out.shape(), dtype, |i| (i % 16 == 0) as u8 as f64);
                let grads = tape.backward_with(&out, &cotangent).unwrap();
                assert!(values(grads.get(&v).unwrap()).iter().all(|x| x.is_finite()));
                // Decoding, too.
                let ends = Tensor::from_slice(&[keys as i64 - 1], [1], device()).unwrap();
                let last = |x: &Tensor, n| x.detach().narrow(2, keys - n, n).unwrap();
                let padding = Tensor::from_vec(vec![!blind; keys], [1, keys], device()).unwrap();
                let spec = DecodeSpec { scale: 1.0, key_mask: Some(&padding), ..DecodeSpec::default() };
                let got = attention_decode(&last(&q, 1), &last(&k, keys), &last(&v, keys), &ends, &spec).unwrap();
                for (x, exact) in values(&got).iter().zip(&values(&out)[(keys - 1) * 16..]) {
                    assert!(
                        (x - exact).abs() <= precision(dtype) * exact.abs(),
                        "{dtype}, {keys} keys: {x:e}, {exact:e}"
                    );
                }
            }
        }
        // That of infinite values is not.
        let (out, _) = single(dtype, 0.0, &[1.0, 2.0], &[INFINITY, 5.0], &AttentionSpec::default());
        assert_eq!(out, INFINITY);
    }
}

/// Decoding and attention agree where scores are NaN, overflow or are masked.
#[test]
fn decoding_hides_no_nan() -> Result<()> {
    for dtype in FLOATS {
        let large = if dtype == DType::F64 {
            1e200
        } else if dtype == DType::F16 {
            6e4
        } else {
            1e20
        };
        // More keys than a part has; those that `large` leaves in range are the last ten.
        for keys in [2, 300, 700] {
            for (q, key) in [(NAN, 1.0), (1.0, NAN), (large, -large), (large, large), (1.0, -large), (2.0, 1.0)] {
                let query = tensor(&[1, 1, 1, 1], dtype, |_| q);
                let k = tensor(&[1, 1, keys, 1], dtype, |_| key);
                let v = tensor(&[1, 1, keys, 2], dtype, |i| (i % 7) as f64);
                let ends = Tensor::from_slice(&[keys as i64 - 1], [1], device())?;
                for kept in [0, 1, keys / 2, keys] {
                    let keep: Vec<bool> = (0..keys).map(|j| j < kept).collect();
                    let padding = Tensor::from_vec(keep, [1, keys], device())?;
                    let full = AttentionSpec { key_mask: Some(&padding), ..AttentionSpec::default() };
                    let full = values(&attention(&query, &k, &v, &full)?);
                    let spec = DecodeSpec { scale: 1.0, key_mask: Some(&padding), ..DecodeSpec::default() };
                    let got = values(&attention_decode(&query, &k, &v, &ends, &spec)?);
                    for (got, full) in got.iter().zip(&full) {
                        let same = got.is_nan() && full.is_nan() || (got - full).abs() <= precision(dtype) * full.abs();
                        assert!(same, "{dtype}, q {q}, {kept} of {keys} keys {key}: {got}, {full}");
                    }
                }
            }
        }
        // A key out of range or NaN in one part, others in another.
        for (bad, nan) in [(-large, false), (NAN, true)] {
            let k = tensor(&[1, 1, 600, 1], dtype, |j| if j < 300 { bad } else { 1.0 });
            let v = tensor(&[1, 1, 600, 1], dtype, |j| (j >= 300) as u8 as f64);
            let ends = Tensor::from_slice(&[599i64], [1], device())?;
            let spec = DecodeSpec { scale: 1.0, ..DecodeSpec::default() };
            let q = tensor(&[1, 1, 1, 1], dtype, |_| if dtype == DType::F16 { 1.0 } else { large });
            let got = values(&attention_decode(&q, &k, &v, &ends, &spec)?)[0];
            assert!(got.is_nan() == nan && (nan || (got - 1.0).abs() < precision(dtype)), "{dtype}: {got}");
        }
    }
    Ok(())
}
