//! The forward pass on the processor: one task per block of queries, which walks over the blocks of keys.

use std::{ops::Range, sync::Mutex};

use half::bf16;

use super::{
    OP, Problem, Sizes,
    rows::{RowOrder, RowWriter, deal, widen},
    tile::{At, KEYS, QUERIES, Tiles, multiply, operand, softmax_step, with_scratch},
};
use crate::{
    DType, Result, Tensor,
    core::{Element, Float, Real, dispatch_float},
    device::cpu,
    ops::matmul::{cpu::gemm_block, packing::Multiply},
};

/// Writes the output `[batch, query, heads, e]` and the logarithms of sums `[batch, heads, query]`, which have elements.
pub(super) fn forward(problem: &Problem, out: &mut Tensor, log_sums: &mut Tensor) -> Result<()> {
    if multiplies_bf16(problem) {
        return forward_as::<bf16, bf16>(problem, out, log_sums);
    }
    dispatch_float!(OP, problem.q.dtype(), T, forward_as::<T, <T as Float>::Acc>(problem, out, log_sums))
}

/// Whether products take operands in bf16: where the processor multiplies them faster than f32. Weights and gradients of
/// scores are then rounded to bf16 too.
pub(super) fn multiplies_bf16(problem: &Problem) -> bool {
    problem.q.dtype() == DType::BF16 && <bf16 as Multiply>::fast()
}

fn forward_as<T: Float, O: Multiply<Acc = T::Acc>>(
    problem: &Problem,
    out: &mut Tensor,
    log_sums: &mut Tensor,
) -> Result<()> {
    let Sizes { batch, heads, queries, .. } = problem.sizes;
    let operands = [widen::<T, O>(&problem.q)?, widen::<T, O>(&problem.k)?, widen::<T, O>(&problem.v)?];
    let tiles = Tiles::<O>::new::<T>(problem, &operands)?;
    let block = queries_per_task(&problem.sizes);
    let rows = deal(out.values_mut::<T>()?, RowOrder::SequenceFirst, [batch, heads, queries], block);
    forward_tasks(&tiles, block, rows, log_sums.values_mut::<T::Acc>()?);
    Ok(())
}

/// Large blocks read the keys less often; smaller ones are for calls that would have few tasks.
fn queries_per_task(sizes: &Sizes) -> usize {
    let tasks = |block: &usize| sizes.batch * sizes.heads * sizes.queries.div_ceil(*block);
    [QUERIES, QUERIES / 2].into_iter().find(|block| tasks(block) >= 16).unwrap_or(QUERIES / 4)
}

fn forward_tasks<O: Multiply>(
    tiles: &Tiles<O>,
    block: usize,
    rows: Vec<Box<dyn RowWriter<O::Acc> + '_>>,
    log_sums: &mut [O::Acc],
) {
    let Sizes { heads, queries, keys, d, e, .. } = tiles.sizes;
    let blocks = queries.div_ceil(block);
    let log_sums = log_sums.chunks_mut(queries).flat_map(|log_sums| log_sums.chunks_mut(block));
    run(rows.into_iter().zip(log_sums).collect(), block.min(queries) * keys * (d + e), |task, (mut out, log_sums)| {
        let (head, query) = (task / blocks, task % blocks * block);
        let at = At { batch: head / heads, head: head % heads, query, queries: log_sums.len(), key: 0, keys: 0 };
        forward_block(tiles, at, &mut *out, log_sums);
    });
}

/// Calls `body` for each task with its number, in parallel if there is enough work.
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
pub(super) fn key_blocks(at: At, keys: Range<usize>) -> impl Iterator<Item = At> {
    let end = keys.end;
    keys.step_by(KEYS).map(move |key| At { key, keys: KEYS.min(end - key), ..at })
}

fn forward_block<O: Multiply>(tiles: &Tiles<O>, at: At, out: &mut dyn RowWriter<O::Acc>, log_sums: &mut [O::Acc]) {
    let Sizes { keys, e, .. } = tiles.sizes;
    let rounded = if O::DTYPE == <O::Acc as Element>::DTYPE { 0 } else { at.queries * KEYS };
    let lengths = [at.queries * KEYS, at.queries * e, at.queries, at.queries, KEYS, rounded];
    with_scratch(lengths, |[s, acc, max, sum, factors, rounded]: [&mut [O::Acc]; 6]| {
        acc.fill(O::Acc::ZERO);
        max.fill(O::Acc::NEG_INFINITY);
        sum.fill(O::Acc::ZERO);
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
            add_values(tiles, seen, s, rounded, acc);
        }
        let masked: &dyn Fn(usize) -> bool = &|row| sum[row] == O::Acc::ZERO;
        if (0..at.queries).any(masked) {
            // Their rows of `acc` are still zero; the other rows must not change.
            for at in key_blocks(at, 0..keys) {
                s.fill(O::Acc::ZERO);
                tiles.spread(at, masked, s, factors);
                add_values(tiles, at, s, rounded, acc);
            }
        }
        for (row, (acc, log_sum)) in acc.chunks_exact(e).zip(log_sums).enumerate() {
            let (divisor, value) =
                if masked(row) { (O::Acc::ONE, -O::Acc::NEG_INFINITY) } else { (sum[row], max[row] + sum[row].ln()) };
            *log_sum = value;
            out.write(row, acc, O::Acc::ONE / divisor);
        }
    });
}

/// `acc += s v`.
fn add_values<O: Multiply>(tiles: &Tiles<O>, at: At, s: &[O::Acc], rounded: &mut [O::Acc], acc: &mut [O::Acc]) {
    let e = tiles.sizes.e;
    let v = tiles.v.block(at.batch, at.head / tiles.sizes.group(), at.key);
    let s = operand::<O>(&s[..at.queries * KEYS], at.keys, rounded);
    gemm_block::<O>(at.queries, e, at.keys, s, v, true, acc, e);
}
