//! Random shapes, views and values against models made of plain index arithmetic. The seed is fixed.

use crate::common::device;
use proptest::{prelude::*, test_runner::RngSeed};
use x_transformers::{DType, Result, Tape, Tensor};

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(0x5eed), failure_persistence: None, ..ProptestConfig::default() }
}

/// Distinct values that are exact in every float dtype up to 256 of them.
fn numbers(shape: &[usize]) -> Vec<f64> {
    (0..shape.iter().product::<usize>()).map(|i| ((i * 37) % 251) as f64 - 125.0).collect()
}

/// Calls `f` with every index of a shape, in row-major order.
fn for_each_index(shape: &[usize], mut f: impl FnMut(&[usize])) {
    let mut index = vec![0; shape.len()];
    for _ in 0..shape.iter().product() {
        f(&index);
        for dim in (0..shape.len()).rev() {
            index[dim] += 1;
            if index[dim] < shape[dim] {
                break;
            }
            index[dim] = 0;
        }
    }
}

/// Row-major position of an index, with size-1 dimensions repeating, aligned at the last dimension.
fn position(index: &[usize], shape: &[usize]) -> usize {
    let skip = index.len() - shape.len();
    shape.iter().enumerate().fold(0, |at, (dim, &size)| at * size + if size == 1 { 0 } else { index[skip + dim] })
}

/// The values in a memory layout drawn from `code`: dimensions in any order, with gaps.
fn laid_out(values: &[f64], shape: &[usize], dtype: DType, code: u64) -> Result<Tensor> {
    let rank = shape.len();
    let mut order: Vec<usize> = (0..rank).collect();
    let mut code = code;
    for dim in (1..rank).rev() {
        order.swap(dim, (code % (dim as u64 + 1)) as usize);
        code /= dim as u64 + 1;
    }
    let gaps: Vec<usize> = (0..rank).map(|dim| (code >> (2 * dim)) as usize & 3).collect();
    // The memory holds dimension `order[i]` as its i-th, with `gaps` elements before and one after, if any.
    let stored: Vec<usize> =
        order.iter().map(|&dim| shape[dim] + if gaps[dim] > 0 { gaps[dim] + 1 } else { 0 }).collect();
    let mut memory = vec![1e4; stored.iter().product()];
    for_each_index(shape, |index| {
        let at = order.iter().zip(&stored).fold(0, |at, (&dim, &size)| at * size + index[dim] + gaps[dim]);
        memory[at] = values[position(index, shape)];
    });
    let mut result = Tensor::from_slice(&memory, &stored, device())?.to_dtype(dtype)?;
    for (i, &dim) in order.iter().enumerate() {
        result = result.narrow(i as isize, gaps[dim], shape[dim])?;
    }
    let mut inverse = vec![0; rank];
    order.iter().enumerate().for_each(|(i, &dim)| inverse[dim] = i);
    result.permute(&inverse)
}

/// Up to five dimensions, some of size 0 and 1, with few elements.
fn shapes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![1 => Just(0usize), 3 => Just(1usize), 8 => 2usize..6], 0..=5)
}

/// A shape, and two that broadcast to it.
fn broadcasts() -> impl Strategy<Value = (Vec<usize>, Vec<usize>, Vec<usize>)> {
    (shapes(), any::<[u16; 2]>(), any::<[u8; 2]>(), any::<bool>()).prop_map(|(shape, ones, cut, first)| {
        let side = |n: usize| -> Vec<usize> {
            // One of the two is whole in each dimension; the other may be 1 there, or lack it.
            let whole = |dim: usize| (n == 0) == first || ones[1] >> dim & 1 == 0;
            let dims: Vec<usize> =
                (0..shape.len()).map(|d| if whole(d) || ones[0] >> d & 1 == 0 { shape[d] } else { 1 }).collect();
            let cut = cut[n] as usize % (shape.len() + 1);
            let cut = (0..cut).take_while(|&dim| dims[dim] == 1).count();
            dims[cut..].to_vec()
        };
        let (a, b) = (side(0), side(1));
        // Their broadcast shape may be smaller, where both are 1.
        let rank = a.len().max(b.len());
        let size = |s: &[usize], back: usize| if back <= s.len() { s[s.len() - back] } else { 1 };
        let result =
            (1..=rank).rev().map(|back| if size(&a, back) == 1 { size(&b, back) } else { size(&a, back) }).collect();
        (result, a, b)
    })
}

fn close(actual: &[f64], expected: &[f64], tolerance: f64) -> std::result::Result<(), TestCaseError> {
    prop_assert_eq!(actual.len(), expected.len());
    for (index, (a, e)) in actual.iter().zip(expected).enumerate() {
        let same = (a.is_nan() && e.is_nan()) || a == e || (a - e).abs() <= tolerance * e.abs().max(1.0);
        prop_assert!(same, "element {}: {} is not {}", index, a, e);
    }
    Ok(())
}

/// A tensor, and for each of its elements the index of that element in the first tensor.
struct Model {
    tensor: Tensor,
    shape: Vec<usize>,
    from: Vec<usize>,
}

impl Model {
    /// Applies the view that a random code stands for, if it is possible.
    fn step(&mut self, kind: u8, a: u16, b: u16) -> Result<()> {
        let (a, b, rank) = (a as usize, b as usize, self.shape.len());
        let dim = if rank > 0 { a % rank } else { 0 };
        // Half of the calls count dimensions from the end.
        let signed = |dim: usize| if b.is_multiple_of(2) { dim as isize } else { dim as isize - rank as isize };
        match kind % 9 {
            0 if rank > 0 => {
                let other = b / 2 % rank;
                let mut order: Vec<usize> = (0..rank).collect();
                order.swap(dim, other);
                self.tensor = self.tensor.transpose(signed(dim), signed(other))?;
                self.reindex(
                    |shape| order.iter().map(|&d| shape[d]).collect(),
                    |index| {
                        order.iter().enumerate().fold(vec![0; rank], |mut old, (new, &d)| {
                            old[d] = index[new];
                            old
                        })
                    },
                );
            }
            1 => {
                let mut order: Vec<usize> = (0..rank).collect();
                order.rotate_left(dim);
                if b % 3 == 0 {
                    order.reverse();
                }
                self.tensor = self.tensor.permute(&order)?;
                self.reindex(
                    |shape| order.iter().map(|&d| shape[d]).collect(),
                    |index| {
                        order.iter().enumerate().fold(vec![0; rank], |mut old, (new, &d)| {
                            old[d] = index[new];
                            old
                        })
                    },
                );
            }
            2 if rank > 0 => {
                let start = (b / 2) % (self.shape[dim] + 1);
                let len = (b / 16) % (self.shape[dim] - start + 1);
                self.tensor = self.tensor.narrow(signed(dim), start, len)?;
                self.reindex(|shape| with(shape, dim, len), |index| with(index, dim, index[dim] + start));
            }
            3 if rank > 0 && self.shape[dim] > 0 => {
                let at = b / 2 % self.shape[dim];
                self.tensor = self.tensor.select(signed(dim), at)?;
                self.reindex(|shape| without(shape, dim), |index| inserted(index, dim, at));
            }
            4 if rank < 6 => {
                let dim = a % (rank + 1);
                let signed = if b.is_multiple_of(2) { dim as isize } else { dim as isize - rank as isize - 1 };
                self.tensor = self.tensor.unsqueeze(signed)?;
                self.reindex(|shape| inserted(shape, dim, 1), |index| without(index, dim));
            }
            5 => {
                if let Some(dim) = (0..rank).cycle().skip(dim).take(rank).find(|&dim| self.shape[dim] == 1) {
                    self.tensor = self.tensor.squeeze(signed(dim))?;
                    self.reindex(|shape| without(shape, dim), |index| inserted(index, dim, 0));
                }
            }
            6 if self.from.len() < 500 => {
                let mut target = self.shape.clone();
                target.iter_mut().filter(|size| **size == 1).take(1 + a % 2).for_each(|size| *size = b % 4);
                if rank < 6 && a.is_multiple_of(3) {
                    target.insert(0, 1 + b % 3);
                }
                let (old, skip) = (self.shape.clone(), target.len() - rank);
                self.tensor = self.tensor.expand(&target)?;
                self.reindex(
                    |_| target.clone(),
                    |index| index[skip..].iter().zip(&old).map(|(&i, &size)| if size == 1 { 0 } else { i }).collect(),
                );
            }
            7 if rank > 0 => {
                let last = dim + b / 2 % (rank - dim);
                self.tensor = self.tensor.flatten(signed(dim), signed(last))?;
                let merged = self.shape[dim..=last].iter().product();
                self.shape.splice(dim..=last, [merged]);
            }
            8 => {
                self.shape = factors(self.from.len(), a, b);
                self.tensor = self.tensor.reshape(&self.shape)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn reindex(&mut self, reshape: impl Fn(&[usize]) -> Vec<usize>, old_index: impl Fn(&[usize]) -> Vec<usize>) {
        let shape = reshape(&self.shape);
        let mut from = Vec::new();
        for_each_index(&shape, |index| {
            let old = old_index(index);
            from.push(self.from[self.shape.iter().zip(&old).fold(0, |at, (&size, &i)| at * size + i)]);
        });
        (self.shape, self.from) = (shape, from);
    }
}

fn with(list: &[usize], at: usize, value: usize) -> Vec<usize> {
    let mut list = list.to_vec();
    list[at] = value;
    list
}

fn without(list: &[usize], at: usize) -> Vec<usize> {
    let mut list = list.to_vec();
    list.remove(at);
    list
}

fn inserted(list: &[usize], at: usize, value: usize) -> Vec<usize> {
    let mut list = list.to_vec();
    list.insert(at, value);
    list
}

/// Some shape with this many elements.
fn factors(elements: usize, a: usize, b: usize) -> Vec<usize> {
    if elements == 0 {
        return vec![b % 3, 0, a % 3];
    }
    let (mut rest, mut shape) = (elements, Vec::new());
    for divisor in [2 + a % 3, 1, 2 + b % 4, 2] {
        if rest.is_multiple_of(divisor) && shape.len() < 5 {
            shape.push(divisor);
            rest /= divisor;
        }
    }
    shape.insert(b % (shape.len() + 1), rest);
    shape
}

proptest! {
    #![proptest_config(config(600))]

    /// Chains of views see the elements that index arithmetic says, and send gradients back to them.
    #[test]
    fn chains_of_views(shape in shapes(), steps in prop::collection::vec(any::<(u8, u16, u16)>(), 0..9), code: u64) {
        let values = numbers(&shape);
        let leaf = laid_out(&values, &shape, DType::F64, code).unwrap().requires_grad().unwrap();
        let mut tape = Tape::grad();
        let mut model = Model { tensor: leaf.clone(), shape: shape.clone(), from: (0..values.len()).collect() };
        for &(kind, a, b) in &steps {
            model.step(kind, a, b).unwrap();
            prop_assert_eq!(&**model.tensor.shape(), &model.shape[..]);
            let expected: Vec<f64> = model.from.iter().map(|&at| values[at]).collect();
            prop_assert_eq!(model.tensor.to_f64_vec().unwrap(), expected);
        }
        let view = model.tensor;
        prop_assert!(view.contiguous().unwrap().is_contiguous());
        let weights = numbers(&model.shape);
        let mut expected = vec![0.0; values.len()];
        model.from.iter().zip(&weights).for_each(|(&at, w)| expected[at] += w);
        let cotangent = Tensor::from_slice(&weights, &model.shape, device()).unwrap();
        let grads = tape.backward_with(&view, &cotangent).unwrap();
        let gradient = grads.get(&leaf).unwrap();
        prop_assert_eq!(gradient.shape(), leaf.shape());
        prop_assert_eq!(gradient.to_f64_vec().unwrap(), expected);
    }

    /// Every order of elements can be reshaped back and forth, and a copy is packed.
    #[test]
    fn reshapes_keep_the_order(shape in shapes(), code: u64, a: u16, b: u16) {
        let values = numbers(&shape);
        let x = laid_out(&values, &shape, DType::F64, code).unwrap();
        let other = factors(values.len(), a as usize, b as usize);
        let y = x.reshape(&other).unwrap();
        prop_assert_eq!(y.to_f64_vec().unwrap(), values.clone());
        prop_assert!(y.shares_storage(&x) || y.is_contiguous());
        prop_assert_eq!(y.reshape(&shape).unwrap().to_f64_vec().unwrap(), values);
        if x.is_contiguous() {
            prop_assert!(y.shares_storage(&x), "a packed tensor never needs a copy");
        }
    }

    /// Binary ops broadcast like nested loops, whatever the strides, and so do their gradients.
    #[test]
    fn broadcasting(shapes in broadcasts(), codes: [u64; 2], op in 0usize..4) {
        let (shape, a_shape, b_shape) = shapes;
        let a_values = numbers(&a_shape);
        // No zeros, for quotients.
        let b_values: Vec<f64> = numbers(&b_shape).iter().map(|x| if *x == 0.0 { 0.5 } else { -*x }).collect();
        let a = laid_out(&a_values, &a_shape, DType::F64, codes[0]).unwrap().requires_grad().unwrap();
        let b = laid_out(&b_values, &b_shape, DType::F64, codes[1]).unwrap().requires_grad().unwrap();
        let mut tape = Tape::grad();
        let y = match op { 0 => a.add(&b), 1 => a.sub(&b), 2 => a.mul(&b), _ => a.div(&b) }.unwrap();
        prop_assert_eq!(&**y.shape(), &shape[..]);
        let weights = numbers(&shape);
        let (mut expected, mut da, mut db) = (vec![], vec![0.0; a_values.len()], vec![0.0; b_values.len()]);
        for_each_index(&shape, |index| {
            let (i, j) = (position(index, &a_shape), position(index, &b_shape));
            let (a, b, w) = (a_values[i], b_values[j], weights[expected.len()]);
            let (value, to_a, to_b) = match op {
                0 => (a + b, 1.0, 1.0),
                1 => (a - b, 1.0, -1.0),
                2 => (a * b, b, a),
                _ => (a / b, 1.0 / b, -a / (b * b)),
            };
            expected.push(value);
            da[i] += w * to_a;
            db[j] += w * to_b;
        });
        close(&y.to_f64_vec().unwrap(), &expected, 0.0)?;
        let cotangent = laid_out(&weights, &shape, DType::F64, codes[0] ^ codes[1]).unwrap();
        let grads = tape.backward_with(&y, &cotangent).unwrap();
        close(&grads.get(&a).unwrap().to_f64_vec().unwrap(), &da, 1e-11)?;
        close(&grads.get(&b).unwrap().to_f64_vec().unwrap(), &db, 1e-11)?;
    }

    /// Comparisons and choices broadcast too.
    #[test]
    fn masks_broadcast(shapes in broadcasts(), codes: [u64; 3], modulus in 2usize..7) {
        let (shape, a_shape, b_shape) = shapes;
        let small = |shape: &[usize]| -> Vec<f64> { (0..shape.iter().product()).map(|i| (i * 5 % modulus) as f64).collect() };
        let (a_values, b_values) = (small(&a_shape), small(&b_shape));
        for dtype in [DType::F32, DType::BF16, DType::I64] {
            let a = laid_out(&a_values, &a_shape, dtype, codes[0]).unwrap();
            let b = laid_out(&b_values, &b_shape, dtype, codes[1]).unwrap();
            let (mut less, mut equal, mut smaller) = (vec![], vec![], vec![]);
            for_each_index(&shape, |index| {
                let (a, b) = (a_values[position(index, &a_shape)], b_values[position(index, &b_shape)]);
                less.push((a < b) as u8 as f64);
                equal.push((a == b) as u8 as f64);
                smaller.push(a.min(b));
            });
            let below = a.lt(&b).unwrap();
            prop_assert_eq!(below.dtype(), DType::Bool);
            prop_assert_eq!(below.to_f64_vec().unwrap(), less);
            prop_assert_eq!(a.eq(&b).unwrap().to_f64_vec().unwrap(), equal);
            prop_assert_eq!(below.where_cond(&a, &b).unwrap().to_f64_vec().unwrap(), smaller);
            let not = below.logical_not().unwrap();
            prop_assert_eq!(not.to_f64_vec().unwrap(), a.ge(&b).unwrap().to_f64_vec().unwrap());
        }
    }

    /// Every op broadcasts two shapes if and only if all sizes are equal or 1.
    #[test]
    fn which_shapes_broadcast(a in shapes(), b in shapes()) {
        let size = |s: &[usize], back: usize| if back <= s.len() { s[s.len() - back] } else { 1 };
        let fits = |back: usize| size(&a, back) == size(&b, back) || size(&a, back) == 1 || size(&b, back) == 1;
        let legal = (1..=a.len().max(b.len())).all(fits);
        let (x, y) = (Tensor::zeros(&a, DType::F32, device()).unwrap(), Tensor::zeros(&b, DType::F32, device()).unwrap());
        prop_assert_eq!(x.add(&y).is_ok(), legal);
        prop_assert_eq!(y.mul(&x).is_ok(), legal);
        prop_assert_eq!(x.shape().broadcast(y.shape(), "test").is_ok(), legal);
        let grows = a.len() <= b.len() && (1..=b.len()).all(|back| size(&a, back) == size(&b, back) || size(&a, back) == 1);
        prop_assert_eq!(x.expand(&b).is_ok(), grows);
        prop_assert_eq!(y.sum_to(*x.shape()).is_ok(), grows);
    }

    /// Sums, means and their gradients over any dimensions in any order.
    #[test]
    fn reductions(shape in shapes(), chosen: u8, turn: u8, code: u64) {
        let values = numbers(&shape);
        let mut dims: Vec<usize> = (0..shape.len()).filter(|&dim| chosen >> dim & 1 == 1).collect();
        if !dims.is_empty() {
            let places = dims.len();
            dims.rotate_left(turn as usize % places);
        }
        let reduced = |dim: usize| dims.is_empty() || dims.contains(&dim);
        let kept: Vec<usize> = (0..shape.len()).filter(|&dim| !reduced(dim)).collect();
        let out_shape: Vec<usize> = kept.iter().map(|&dim| shape[dim]).collect();
        let mut sums = vec![0.0; out_shape.iter().product()];
        let mut to = vec![];
        for_each_index(&shape, |index| {
            let at = kept.iter().fold(0, |at, &dim| at * shape[dim] + index[dim]);
            sums[at] += values[to.len()];
            to.push(at);
        });
        let count = (0..shape.len()).filter(|&dim| reduced(dim)).map(|dim| shape[dim]).product::<usize>() as f64;
        let means: Vec<f64> = sums.iter().map(|sum| sum / count).collect();
        let signed: Vec<isize> = dims
            .iter()
            .enumerate()
            .map(|(i, &dim)| if turn as usize >> (i % 8) & 1 == 1 { dim as isize - shape.len() as isize } else { dim as isize })
            .collect();
        for dtype in [DType::F64, DType::F32] {
            let leaf = laid_out(&values, &shape, dtype, code).unwrap().requires_grad().unwrap();
            let mut tape = Tape::grad();
            let (sum, mean) = (leaf.sum(&signed).unwrap(), leaf.mean(&signed).unwrap());
            prop_assert_eq!(&**sum.shape(), &out_shape[..]);
            // Integers: exact in any order.
            close(&sum.to_f64_vec().unwrap(), &sums, 0.0)?;
            close(&mean.to_f64_vec().unwrap(), &means, 1e-7)?;
            let weights = numbers(&out_shape);
            let cotangent = laid_out(&weights, &out_shape, dtype, code / 3).unwrap();
            let grads = tape.backward_with(&sum, &cotangent).unwrap();
            let expected: Vec<f64> = to.iter().map(|&at| weights[at]).collect();
            prop_assert_eq!(grads.get(&leaf).unwrap().to_f64_vec().unwrap(), expected);
        }
    }

    /// `sum_to` adds up the elements that broadcasting repeats.
    #[test]
    fn sum_to_undoes_expand(shapes in broadcasts(), code: u64) {
        let (shape, small, _) = shapes;
        let values = numbers(&shape);
        let mut expected = vec![0.0; small.iter().product()];
        let mut at = 0;
        for_each_index(&shape, |index| {
            expected[position(index, &small)] += values[at];
            at += 1;
        });
        let x = laid_out(&values, &shape, DType::F64, code).unwrap();
        let target = Tensor::zeros(&small, DType::F64, device()).unwrap();
        prop_assert_eq!(x.sum_to(*target.shape()).unwrap().to_f64_vec().unwrap(), expected);
    }

    /// The largest element of each line, its place, and a gradient that goes there.
    #[test]
    fn maxima(shape in shapes(), dim: u8, code: u64, modulus in 1usize..40) {
        prop_assume!(!shape.is_empty());
        let dim = dim as usize % shape.len();
        // Small moduli make ties: the first one counts.
        let values: Vec<f64> = (0..shape.iter().product::<usize>()).map(|i| (i * 37 % 101 % modulus) as f64).collect();
        let x = laid_out(&values, &shape, DType::F32, code).unwrap();
        if shape[dim] == 0 {
            prop_assert!(x.max(dim as isize).is_err() && x.argmax(dim as isize).is_err());
            return Ok(());
        }
        let out_shape = without(&shape, dim);
        let (mut best, mut places, mut marks) = (vec![], vec![], vec![0.0; values.len()]);
        for_each_index(&out_shape, |index| {
            let at = |k: usize| position(&inserted(index, dim, k), &shape);
            let k = (0..shape[dim]).fold(0, |best, k| if values[at(k)] > values[at(best)] { k } else { best });
            best.push(values[at(k)]);
            places.push(k as i64);
            marks[at(k)] = best.len() as f64;
        });
        prop_assert_eq!(x.argmax(dim as isize).unwrap().to_vec::<i64>().unwrap(), places);
        let leaf = x.requires_grad().unwrap();
        let mut tape = Tape::grad();
        let y = leaf.max(dim as isize - shape.len() as isize).unwrap();
        prop_assert_eq!(y.to_f64_vec().unwrap(), best);
        let cotangent = Tensor::generate(&out_shape, DType::F32, device(), |i| i as f64 + 1.0).unwrap();
        let grads = tape.backward_with(&y, &cotangent).unwrap();
        prop_assert_eq!(grads.get(&leaf).unwrap().to_f64_vec().unwrap(), marks);
    }

    /// Softmax against the formula; rows add up to 1; a shift changes nothing; layouts give the same bits.
    #[test]
    fn softmax_rows(shape in shapes(), width in 1usize..40, code: u64, spread in 0.0f64..60.0, shift in -50.0f64..50.0) {
        prop_assume!(shape.len() < 5);
        let mut shape = shape;
        shape.push(width);
        let values: Vec<f64> = numbers(&shape).iter().map(|x| x / 125.0 * spread).collect();
        let mut expected = values.clone();
        for row in expected.chunks_mut(width) {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|x| (x - max).exp()).sum();
            row.iter_mut().for_each(|x| *x = (*x - max).exp() / sum);
        }
        let x = laid_out(&values, &shape, DType::F64, code).unwrap();
        let y = x.softmax().unwrap().to_f64_vec().unwrap();
        close(&y, &expected, 1e-14)?;
        prop_assert!(y.chunks(width).all(|row| (row.iter().sum::<f64>() - 1.0).abs() < 1e-13));
        close(&x.affine(1.0, shift).unwrap().softmax().unwrap().to_f64_vec().unwrap(), &y, 1e-12)?;
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let [one, other] = [0, code].map(|code| laid_out(&values, &shape, dtype, code).unwrap().softmax().unwrap());
            let (one, other) = (one.to_f64_vec().unwrap(), other.to_f64_vec().unwrap());
            prop_assert_eq!(&one, &other);
            prop_assert!(one.iter().all(|p| (0.0..=1.0).contains(p)));
        }
    }

    /// Splitting and concatenating is the identity, for values and gradients.
    #[test]
    fn cat_undoes_split(shape in shapes(), dim: u8, cuts: [u8; 3], code: u64) {
        prop_assume!(!shape.is_empty());
        let dim = dim as usize % shape.len();
        let mut ends: Vec<usize> = cuts.iter().map(|&cut| cut as usize % (shape[dim] + 1)).collect();
        ends.sort_unstable();
        let sizes = [ends[0], ends[1] - ends[0], ends[2] - ends[1], shape[dim] - ends[2]];
        let values = numbers(&shape);
        let leaf = laid_out(&values, &shape, DType::F64, code).unwrap().requires_grad().unwrap();
        let mut tape = Tape::grad();
        let parts = leaf.split(&sizes, dim as isize).unwrap();
        let whole = Tensor::cat(&parts.iter().collect::<Vec<_>>(), dim as isize - shape.len() as isize).unwrap();
        prop_assert_eq!(whole.to_f64_vec().unwrap(), values.clone());
        let cotangent = laid_out(&values, &shape, DType::F64, code / 7).unwrap();
        let grads = tape.backward_with(&whole, &cotangent).unwrap();
        prop_assert_eq!(grads.get(&leaf).unwrap().to_f64_vec().unwrap(), values);
    }

    /// Conversions from f32 round as the `half` crate does, which is right for f32.
    #[test]
    fn half_types_round_like_the_half_crate(bits in prop::collection::vec(any::<u32>(), 1..200)) {
        let singles: Vec<f32> = bits.into_iter().map(f32::from_bits).filter(|x| !x.is_nan()).collect();
        let x = Tensor::from_slice(&singles, [singles.len()], device()).unwrap();
        let expected: Vec<f64> = singles.iter().map(|&x| half::bf16::from_f32(x).to_f64()).collect();
        prop_assert_eq!(x.to_dtype(DType::BF16).unwrap().to_f64_vec().unwrap(), expected);
        let expected: Vec<f64> = singles.iter().map(|&x| half::f16::from_f32(x).to_f64()).collect();
        prop_assert_eq!(x.to_dtype(DType::F16).unwrap().to_f64_vec().unwrap(), expected);
        let back = x.to_dtype(DType::F64).unwrap().to_dtype(DType::F32).unwrap();
        prop_assert_eq!(back.to_vec::<f32>().unwrap(), singles);
    }
}
