//! The forward pass on the CPU: one task per block of queries, which walks over the blocks of keys.

use std::{ops::Range, sync::Mutex};

use half::bf16;

use super::{
    Kept, OP, Problem, Sizes,
    operand::{operand, product},
    rows::{RowOrder, RowWriter, deal, widen},
    tile::{At, Empty, KEYS, QUERIES, Tiles, finite, mean_of, softmax_step, weights, with_scratch},
};
use crate::{
    DType, Result, Tensor,
    collect::CollectVec,
    device::cpu,
    dtype::{Float, Real, dispatch_real},
    gemm::Multiply,
};

/// Writes the output `[batch, query, heads, e]` and the values kept for the backward pass; neither is empty.
pub(super) fn forward(problem: &Problem, out: &mut Tensor, kept: &mut Kept) -> Result<()> {
    dispatch_real!(problem.q.dtype(), R, forward_as::<R>(problem, out, kept))
}

/// Returns `true` if products take operands in bf16, because the processor multiplies them faster than f32. Weights and
/// gradients of scores are then rounded to bf16 too.
pub(super) fn multiplies_bf16(problem: &Problem) -> bool {
    problem.q.dtype() == DType::BF16 && <bf16 as Multiply>::is_fast()
}

fn forward_as<A: Real + Multiply>(problem: &Problem, out: &mut Tensor, kept: &mut Kept) -> Result<()> {
    let Sizes { batch, heads, queries, .. } = problem.sizes;
    let bf16 = multiplies_bf16(problem);
    let operands = [widen::<A>(&problem.q, bf16)?, widen::<A>(&problem.k, bf16)?, widen::<A>(&problem.v, bf16)?];
    let tiles = Tiles::<A>::new(problem, &operands)?;
    let block = queries_per_task(&problem.sizes);
    let residual = kept.residual.as_mut().map(|residual| residual.floats_mut(OP)).transpose()?;
    let rows = deal(out.floats_mut(OP)?, residual, RowOrder::SequenceFirst, [batch, heads, queries], block);
    forward_tasks(&tiles, block, rows, kept.statistics.values_mut::<A>()?.as_chunks_mut().0);
    Ok(())
}

/// Returns the number of queries per task: large blocks read the keys less often; small ones are for calls that would
/// otherwise have few tasks.
fn queries_per_task(sizes: &Sizes) -> usize {
    let tasks = |block: &usize| sizes.batch * sizes.heads * sizes.queries.div_ceil(*block);
    [QUERIES, QUERIES / 2].into_iter().find(|block| tasks(block) >= 16).unwrap_or(QUERIES / 4)
}

fn forward_tasks<A: Real + Multiply>(
    tiles: &Tiles<A>,
    block: usize,
    rows: Vec<RowWriter<'_>>,
    statistics: &mut [[A; 2]],
) {
    let Sizes { heads, queries, keys, d, e, .. } = tiles.sizes;
    let blocks = queries.div_ceil(block);
    let statistics = statistics.chunks_mut(queries).flat_map(|statistics| statistics.chunks_mut(block));
    let tasks: Vec<_> = rows.into_iter().zip(statistics).collect_vec();
    run(tasks, block.min(queries) * keys * (d + e), |task, (mut out, statistics)| {
        let (head, query) = (task / blocks, task % blocks * block);
        let at = At { batch: head / heads, head: head % heads, query, queries: statistics.len(), key: 0, keys: 0 };
        forward_block(tiles, at, &mut out, statistics);
    });
}

/// Calls `body` for each task with its number, in parallel if there is enough work.
pub(super) fn run<S: Send>(tasks: Vec<S>, cost: usize, body: impl Fn(usize, S) + Sync) {
    if tasks.len().saturating_mul(cost) <= cpu::GRAIN {
        return tasks.into_iter().enumerate().for_each(|(index, task)| body(index, task));
    }
    // The thread that runs a task takes it out of its slot.
    let slots: Vec<Mutex<Option<S>>> = tasks.into_iter().map(|task| Mutex::new(Some(task))).collect_vec();
    cpu::for_tasks(slots.len(), |index| {
        let task = slots[index].lock().ok().and_then(|mut slot| slot.take());
        task.into_iter().for_each(|task| body(index, task));
    });
}

/// Returns the blocks of keys.
pub(super) fn key_blocks(at: At, keys: Range<usize>) -> impl Iterator<Item = At> {
    let end = keys.end;
    keys.step_by(KEYS).map(move |key| At { key, keys: KEYS.min(end - key), ..at })
}

fn forward_block<A: Real + Multiply>(tiles: &Tiles<A>, at: At, out: &mut RowWriter<'_>, statistics: &mut [[A; 2]]) {
    let Sizes { keys, e, .. } = tiles.sizes;
    let rounded = if tiles.rounds() { at.queries * KEYS } else { 0 };
    // Rounded weights are multiplied where the sums are complete: rounding would take more from their product.
    let factor = tiles.dropout_factor();
    let [kept, later] = if rounded > 0 { [A::ONE, factor] } else { [factor, A::ONE] };
    let lengths = [at.queries * KEYS, at.queries * e, at.queries, at.queries, KEYS, rounded];
    with_scratch(lengths, |[s, acc, max, sum, factors, rounded]: [&mut [A]; 6]| {
        acc.fill(A::ZERO);
        let [largest, weight] = tiles.start(at.head);
        max.fill(largest);
        sum.fill(weight);
        for seen in key_blocks(at, 0..keys).flat_map(|at| tiles.halves(at)).filter_map(|at| tiles.reach(at)) {
            let (first, last) = (seen.query - at.query, seen.query - at.query + seen.queries);
            let acc = &mut acc[first * e..last * e];
            let factor = tiles.scores(seen, s);
            softmax_step(s, seen.width(), factor, &mut max[first..last], &mut sum[first..last], acc);
            tiles.drop_weights(seen, kept, s, factors);
            add_values(tiles, seen, s, rounded, acc);
        }
        for (row, statistics) in statistics.iter_mut().enumerate() {
            *statistics = if sum[row] == A::ZERO {
                match tiles.empty(at, row) {
                    Empty::Masked => [-A::NEG_INFINITY, A::ZERO],
                    Empty::Biased => [A::ZERO; 2],
                    Empty::Overflown => [A::from_f64(f64::NAN); 2],
                }
            } else {
                // Where a score is infinite, the sum is NaN.
                [if sum[row].to_f64().is_nan() { sum[row] } else { max[row] }, A::ONE / sum[row]]
            };
        }
        let masked: &dyn Fn(usize) -> bool = &|row| statistics[row][0] == -A::NEG_INFINITY;
        let any_masked = (0..at.queries).any(masked);
        // Fully masked queries have their weights, the others' rows of `acc` must not change.
        let spread = |weight: A, s: &mut [A], factors: &mut [A], acc: &mut [A], rounded: &mut [_]| {
            for at in key_blocks(at, 0..keys) {
                s.fill(A::ZERO);
                tiles.spread(at, masked, [weight, kept], s, factors);
                add_values(tiles, at, s, rounded, acc);
            }
        };
        if any_masked {
            spread(A::ONE, s, factors, acc, rounded);
        }
        if !finite(acc) {
            // Values near the largest number overflow in a sum with weights of up to 1 each. With a part of the final
            // weights they do not, unless one is infinite itself.
            let part = <A as Float>::from_f64(0.25);
            acc.fill(A::ZERO);
            for seen in key_blocks(at, 0..keys).flat_map(|at| tiles.halves(at)).filter_map(|at| tiles.reach(at)) {
                let (first, last) = (seen.query - at.query, seen.query - at.query + seen.queries);
                let factor = tiles.scores(seen, s);
                weights(s, seen.width(), factor, part, &statistics[first..last]);
                tiles.drop_weights(seen, kept, s, factors);
                add_values(tiles, seen, s, rounded, &mut acc[first * e..last * e]);
            }
            if any_masked {
                spread(part, s, factors, acc, rounded);
            }
            let whole = A::ONE / part;
            let dropped = tiles.drops();
            acc.iter_mut().for_each(|x| *x = if dropped { *x * whole } else { mean_of(*x, whole, tiles.largest) });
            sum.fill(A::ONE);
        }
        for (row, acc) in acc.chunks_exact(e).enumerate() {
            let [largest, share] = statistics[row];
            // `acc` is zero where all weights are.
            let divisor = if share == A::ZERO { A::ONE } else { sum[row] };
            let factor = if largest.to_f64().is_nan() { largest } else { A::ONE / divisor };
            out.write(row, acc, if later == A::ONE { factor } else { factor * later });
        }
    });
}

/// Computes `acc += s v`.
fn add_values<A: Real + Multiply>(tiles: &Tiles<A>, at: At, s: &[A], rounded: &mut [A], acc: &mut [A]) {
    let e = tiles.sizes.e;
    let v = tiles.v.block(at.batch, at.head / tiles.sizes.group(), at.key);
    let s = operand(&s[..at.queries * KEYS], at.keys, rounded);
    product([at.queries, e, at.keys], s, v, true, acc, e);
}
