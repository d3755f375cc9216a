//! The forward pass on the processor: one task per block of queries, which walks over the blocks of keys.

use std::sync::Mutex;

use super::{
    OP, Problem, Sizes,
    tile::{At, KEYS, QUERIES, Tiles, multiply, softmax_step, with_scratch},
};
use crate::{
    DType, Result, Tensor,
    core::{Element, Float, Real, Shape, dispatch_float},
    device::{cpu, simd::vectorized},
    ops::matmul::cpu::{Matrix, gemm_block},
};

/// The output as a view `[batch, heads, query, e]` of memory `[batch, query, heads, e]`, and the logarithm of the sum of
/// exponentials of each query, `[batch, heads, query]`; infinite where everything is masked.
pub(super) fn forward(problem: &Problem) -> Result<(Tensor, Tensor)> {
    dispatch_float!(OP, problem.q.dtype(), T, forward_as::<T>(problem))
}

fn forward_as<T: Float>(problem: &Problem) -> Result<(Tensor, Tensor)> {
    let Sizes { batch, heads, queries, keys, d, e, .. } = problem.sizes;
    let device = problem.q.device();
    let merged = Shape::new(&[batch, queries, heads, e])?;
    let per_query = Shape::new(&[batch, heads, queries])?;
    if merged.elements() == 0 || keys == 0 {
        let out = Tensor::zeros(merged, T::DTYPE, device)?.permute(&[0, 2, 1, 3])?;
        return Ok((out, Tensor::zeros(per_query, <T::Acc as Element>::DTYPE, device)?));
    }
    let mut out = Tensor::uninit(merged, T::DTYPE, device)?;
    let mut log_sums = Tensor::uninit(per_query, <T::Acc as Element>::DTYPE, device)?;
    let operands = [widen::<T>(&problem.q)?, widen::<T>(&problem.k)?, widen::<T>(&problem.v)?];
    let tiles = Tiles::<T>::new(problem, &operands)?;
    let blocks = queries.div_ceil(QUERIES);
    let mut tasks: Vec<(Vec<&mut [T]>, &mut [T::Acc])> = log_sums
        .values_mut::<T::Acc>()?
        .chunks_mut(queries)
        .flat_map(|log_sums| log_sums.chunks_mut(QUERIES))
        .map(|log_sums| (Vec::with_capacity(log_sums.len()), log_sums))
        .collect();
    for (row, out) in out.values_mut::<T>()?.chunks_exact_mut(e).enumerate() {
        let (batch, query, head) = (row / heads / queries, row / heads % queries, row % heads);
        tasks[(batch * heads + head) * blocks + query / QUERIES].0.push(out);
    }
    run(tasks, queries * keys * (d + e), |task, (mut out, log_sums)| {
        let (head, query) = (task / blocks, task % blocks * QUERIES);
        let at = At { batch: head / heads, head: head % heads, query, queries: log_sums.len(), key: 0, keys: 0 };
        forward_block(&tiles, at, &mut out, log_sums);
    });
    Ok((out.permute(&[0, 2, 1, 3])?, log_sums))
}

/// Calls `body` for each task with its number, in parallel if the work per task pays for it.
pub(super) fn run<S: Send>(tasks: Vec<S>, cost: usize, body: impl Fn(usize, S) + Sync) {
    if tasks.len().saturating_mul(cost) <= cpu::GRAIN {
        return tasks.into_iter().enumerate().for_each(|(index, task)| body(index, task));
    }
    // Each task is taken out of its slot by the one thread that runs it.
    let slots: Vec<Mutex<Option<S>>> = tasks.into_iter().map(|task| Mutex::new(Some(task))).collect();
    cpu::for_tasks(slots.len(), |index| {
        let task = slots[index].lock().ok().and_then(|mut slot| slot.take());
        task.into_iter().for_each(|task| body(index, task));
    });
}

/// The blocks of keys.
pub(super) fn key_blocks(at: At, keys: std::ops::Range<usize>) -> impl Iterator<Item = At> {
    let end = keys.end;
    keys.step_by(KEYS).map(move |key| At { key, keys: KEYS.min(end - key), ..at })
}

fn forward_block<T: Float>(tiles: &Tiles<T>, at: At, out: &mut [&mut [T]], log_sums: &mut [T::Acc]) {
    let Sizes { keys, e, .. } = tiles.sizes;
    let lengths = [at.queries * KEYS, at.queries * e, at.queries, at.queries, KEYS];
    with_scratch(lengths, |[s, acc, max, sum, factors]: [&mut [T::Acc]; 5]| {
        acc.fill(T::Acc::ZERO);
        max.fill(T::Acc::NEG_INFINITY);
        sum.fill(T::Acc::ZERO);
        for seen in key_blocks(at, 0..keys).filter_map(|at| tiles.reach(at)) {
            let (first, last) = (seen.query - at.query, seen.query - at.query + seen.queries);
            let acc = &mut acc[first * e..last * e];
            tiles.scores(seen, s);
            softmax_step(s, seen.width(), &mut max[first..last], &mut sum[first..last], acc);
            if tiles.drops() {
                for (row, s) in s.chunks_exact_mut(KEYS).take(seen.queries).enumerate() {
                    tiles.dropout(seen, row, factors);
                    multiply(&mut s[..seen.keys], factors);
                }
            }
            add_values(tiles, seen, s, acc);
        }
        let masked: &dyn Fn(usize) -> bool = &|row| sum[row] == T::Acc::ZERO;
        if (0..at.queries).any(masked) {
            // Their rows of `acc` are still zero; the other rows must not change.
            for at in key_blocks(at, 0..keys) {
                s.fill(T::Acc::ZERO);
                tiles.spread(at, masked, s, factors);
                add_values(tiles, at, s, acc);
            }
        }
        for (row, (out, log_sum)) in out.iter_mut().zip(log_sums).enumerate() {
            let (divisor, value) = match masked(row) {
                true => (T::Acc::ONE, -T::Acc::NEG_INFINITY),
                false => (sum[row], max[row] + sum[row].ln()),
            };
            *log_sum = value;
            write_row::<T>(&acc[row * e..(row + 1) * e], T::Acc::ONE / divisor, out);
        }
    });
}

/// `acc += s v`.
fn add_values<T: Float>(tiles: &Tiles<T>, at: At, s: &[T::Acc], acc: &mut [T::Acc]) {
    let e = tiles.sizes.e;
    let v = tiles.v.block(at.batch, at.head / tiles.sizes.group(), at.key);
    let s = Matrix { data: s, row: KEYS, col: 1 };
    gemm_block::<T::Acc>(at.queries, e, at.keys, s, v, true, acc, e);
}

vectorized! {
    /// `to = from · factor`, rounded once.
    pub(super) fn write_row<T: Float>(from: &[T::Acc], factor: T::Acc, to: &mut [T]) {
        for (from, to) in from.iter().zip(to) {
            *to = T::from_acc(*from * factor);
        }
    }
}

/// A tensor of rank 4 with packed rows in the type of the computation: itself, or a packed copy.
pub(super) fn widen<T: Float>(x: &Tensor) -> Result<Tensor> {
    let (dtype, acc): (DType, DType) = (T::DTYPE, <T::Acc as Element>::DTYPE);
    if dtype == acc {
        return Ok(x.clone());
    }
    let mut wide = Tensor::uninit(*x.shape(), acc, x.device())?;
    let (layout, from, width) = (*x.layout(), x.storage::<T>()?, x.shape()[3]);
    cpu::for_rows(wide.values_mut::<T::Acc>()?, width, width, |first, wide| {
        for (row, wide) in wide.chunks_exact_mut(width).enumerate() {
            let start = layout.row_offset(first + row);
            widen_row::<T>(&from[start..start + width], wide);
        }
    });
    Ok(wide)
}

vectorized! {
    fn widen_row<T: Float>(from: &[T], to: &mut [T::Acc]) {
        for (from, to) in from.iter().zip(to) {
            *to = from.to_acc();
        }
    }
}
