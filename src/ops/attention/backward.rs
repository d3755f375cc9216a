//! The backward pass on the processor: weights are computed again from the scores and the saved sums.

use std::ops::Range;

use super::{
    OP, Problem, Sizes, packed_rows,
    cpu::{key_blocks, run, widen, write_row},
    tile::{
        At, KEYS, QUERIES, Rows, Tiles, add, dot, score_gradients, score_gradients_dropped, sum, sum_rows, transposed,
        weights, with_scratch,
    },
};
use crate::{
    Result, Tensor,
    core::{Element, Float, Real, Shape, dispatch_float},
    device::cpu,
    ops::matmul::cpu::{Matrix, gemm_block},
};

/// The gradients of queries, keys, values, and of the bias and the weights of the position bias if there are any.
pub(super) fn backward(
    problem: &Problem,
    out: &Tensor,
    log_sums: &Tensor,
    grad: &Tensor,
    need: &[bool],
) -> Result<Vec<Option<Tensor>>> {
    dispatch_float!(OP, problem.q.dtype(), T, backward_as::<T>(problem, out, log_sums, grad, need))
}

fn backward_as<T: Float>(
    problem: &Problem,
    out: &Tensor,
    log_sums: &Tensor,
    grad: &Tensor,
    need: &[bool],
) -> Result<Vec<Option<Tensor>>> {
    let Sizes { batch, heads, kv_heads, queries, keys, d, e, .. } = problem.sizes;
    let need_bias = problem.bias.is_some() && need[3];
    let need_position = problem.position.is_some() && need[need.len() - 1];
    if batch * heads * kv_heads * queries * keys == 0 {
        return zeros(problem, need);
    }
    let operands = [widen::<T>(&problem.q)?, widen::<T>(&problem.k)?, widen::<T>(&problem.v)?];
    let grad = widen::<T>(&packed_rows(grad)?)?;
    let delta = delta::<T>(out, &grad)?;
    let pass = Pass {
        tiles: Tiles::<T>::new(problem, &operands)?,
        grad: Rows::new(&grad)?,
        log_sums: log_sums.values::<T::Acc>()?,
        delta: delta.values::<T::Acc>()?,
    };
    let mut gradients = vec![None, None, None];
    let mut position = None;
    if need[..3].contains(&true) || need_position {
        let cut = Cut::new(&problem.sizes);
        let acc = <T::Acc as Element>::DTYPE;
        let partial = if need[0] { [batch * heads, cut.chunks, queries, d] } else { [0; 4] };
        let mut partial = Tensor::uninit(Shape::new(&partial)?, acc, grad.device())?;
        let mut dk = RowOrder::of(&problem.k).uninit(&problem.k)?;
        let mut dv = RowOrder::of(&problem.v).uninit(&problem.v)?;
        let parameters = problem.position.as_ref().filter(|_| need_position).map_or(0, |position| position.parameters());
        let mut weights = vec![0.0; batch * heads * cut.chunks * parameters];
        {
            let wanted = Wanted { q: need[0] && d > 0, k: need[1] && d > 0, v: need[2] && e > 0, position: need_position };
            let mut tasks = cut.tasks(batch * kv_heads);
            cut.deal(&mut tasks, RowOrder::of(&problem.k), dk.values_mut::<T>()?, kv_heads, d, |task| &mut task.dk);
            cut.deal(&mut tasks, RowOrder::of(&problem.v), dv.values_mut::<T>()?, kv_heads, e, |task| &mut task.dv);
            let group = problem.sizes.group();
            deal_parts(&mut tasks, partial.values_mut::<T::Acc>()?, cut.chunks, group, queries * d, |task| &mut task.dq);
            deal_parts(&mut tasks, &mut weights, cut.chunks, group, parameters, |task| &mut task.position);
            let cost = group * queries * cut.keys.min(keys) * (d + e);
            run(tasks, cost, |index, task| {
                let (head, chunk) = (index / cut.chunks, index % cut.chunks);
                let range = chunk * cut.keys..((chunk + 1) * cut.keys).min(keys);
                pass.keys(problem, head / kv_heads, head % kv_heads, range, wanted, task);
            });
        }
        if need[0] {
            gradients[0] = Some(sum_chunks::<T>(problem, &partial, cut.chunks)?);
        }
        gradients[1] = need[1].then(|| RowOrder::of(&problem.k).view(dk)).transpose()?;
        gradients[2] = need[2].then(|| RowOrder::of(&problem.v).view(dv)).transpose()?;
        if let Some(bias) = problem.position.as_ref().filter(|_| need_position) {
            let mut per_head = vec![0.0; heads * parameters];
            for (index, part) in weights.chunks_exact(parameters).enumerate() {
                let head = index / cut.chunks % heads;
                add(&mut per_head[head * parameters..(head + 1) * parameters], part);
            }
            position = Some(bias.gradient(&per_head)?);
        }
    }
    if let Some(bias) = &problem.bias {
        gradients.push(if need_bias { Some(pass.bias(bias)?) } else { None });
    }
    if problem.position.is_some() {
        gradients.push(position);
    }
    Ok(gradients)
}

/// The gradients where there are no scores.
fn zeros(problem: &Problem, need: &[bool]) -> Result<Vec<Option<Tensor>>> {
    let operands = [&problem.q, &problem.k, &problem.v].into_iter().chain(&problem.bias);
    let weights = problem.position.as_ref().map(|position| position.weights());
    let zeros = operands.chain(weights).map(|x| Tensor::zeros(*x.shape(), x.dtype(), x.device()));
    zeros.zip(need).map(|(zeros, need)| need.then_some(zeros).transpose()).collect()
}

/// `delta[b, h, i] = Σ_e grad ⊙ out`.
fn delta<T: Float>(out: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let [batch, heads, queries, e] = [0, 1, 2, 3].map(|dim| out.shape()[dim]);
    let wide = widen::<T>(out)?;
    let (out, grad) = (Rows::<T::Acc>::new(&wide)?, Rows::<T::Acc>::new(grad)?);
    let mut delta = Tensor::uninit(Shape::new(&[batch, heads, queries])?, wide.dtype(), wide.device())?;
    cpu::for_rows(delta.values_mut::<T::Acc>()?, 1, e, |first, delta| {
        for (row, delta) in delta.iter_mut().enumerate() {
            let (head, query) = ((first + row) / queries, (first + row) % queries);
            let (batch, head) = (head / heads, head % heads);
            *delta = dot(out.row(batch, head, query, e), grad.row(batch, head, query, e));
        }
    });
    Ok(delta)
}

/// How the rows of a gradient lie in memory: as those of the operand, so that the views in front of it stay views.
#[derive(Clone, Copy, PartialEq)]
enum RowOrder {
    /// `[batch, heads, sequence, features]`
    HeadsFirst,
    /// `[batch, sequence, heads, features]`
    SequenceFirst,
}

impl RowOrder {
    fn of(x: &Tensor) -> Self {
        if x.strides()[1] < x.strides()[2] { Self::SequenceFirst } else { Self::HeadsFirst }
    }

    /// Memory for a gradient.
    fn uninit(self, x: &Tensor) -> Result<Tensor> {
        let &[batch, heads, rows, width] = &x.shape()[..] else { return x.uninit_like() };
        let shape = match self {
            Self::HeadsFirst => [batch, heads, rows, width],
            Self::SequenceFirst => [batch, rows, heads, width],
        };
        Tensor::uninit(Shape::new(&shape)?, x.dtype(), x.device())
    }

    /// The memory as `[batch, heads, sequence, features]`.
    fn view(self, x: Tensor) -> Result<Tensor> {
        match self {
            Self::HeadsFirst => Ok(x),
            Self::SequenceFirst => x.permute(&[0, 2, 1, 3]),
        }
    }

    /// Batch and head together, and position of a row.
    fn place(self, row: usize, heads: usize, rows: usize) -> (usize, usize) {
        match self {
            Self::HeadsFirst => (row / rows, row % rows),
            Self::SequenceFirst => (row / heads / rows * heads + row % heads, row / heads % rows),
        }
    }
}

/// Tasks that the keys of one head are cut into. Each has its own sum of the gradient of the queries.
const CHUNKS_IN_ALL: usize = 32;

/// How the keys are cut into tasks: by the sizes alone, so that no sum depends on the number of threads.
struct Cut {
    /// Tasks per head.
    chunks: usize,
    /// Keys of a task: whole tiles.
    keys: usize,
    keys_in_all: usize,
}

impl Cut {
    fn new(sizes: &Sizes) -> Self {
        let blocks = sizes.keys.div_ceil(KEYS);
        let wanted = CHUNKS_IN_ALL.div_ceil(sizes.batch * sizes.kv_heads).min(blocks);
        let keys = blocks.div_ceil(wanted) * KEYS;
        Self { chunks: sizes.keys.div_ceil(keys), keys, keys_in_all: sizes.keys }
    }

    fn tasks<'a, T: Float>(&self, heads: usize) -> Vec<Task<'a, T>> {
        (0..heads * self.chunks).map(|_| Task::default()).collect()
    }

    /// Gives each task its rows.
    fn deal<'a, T: Float>(
        &self,
        tasks: &mut [Task<'a, T>],
        order: RowOrder,
        rows: &'a mut [T],
        heads: usize,
        width: usize,
        of: impl for<'t> Fn(&'t mut Task<'a, T>) -> &'t mut Vec<&'a mut [T]>,
    ) {
        if width == 0 {
            return;
        }
        for (index, row) in rows.chunks_exact_mut(width).enumerate() {
            let (head, key) = order.place(index, heads, self.keys_in_all);
            of(&mut tasks[head * self.chunks + key / self.keys]).push(row);
        }
    }
}

/// Gives each task its part for each query head: `[batch · kv_heads, group, chunks, width]`.
fn deal_parts<'a, T: Float, S>(
    tasks: &mut [Task<'a, T>],
    parts: &'a mut [S],
    chunks: usize,
    group: usize,
    width: usize,
    of: impl for<'t> Fn(&'t mut Task<'a, T>) -> &'t mut Vec<&'a mut [S]>,
) {
    if width == 0 {
        return;
    }
    for (index, part) in parts.chunks_exact_mut(width).enumerate() {
        of(&mut tasks[index / chunks / group * chunks + index % chunks]).push(part);
    }
}

/// What a task writes; an empty list is not wanted.
struct Task<'a, T: Float> {
    dk: Vec<&'a mut [T]>,
    dv: Vec<&'a mut [T]>,
    /// One `[queries, d]` per query head.
    dq: Vec<&'a mut [T::Acc]>,
    /// The weights of the position bias, per query head.
    position: Vec<&'a mut [f64]>,
}

impl<T: Float> Default for Task<'_, T> {
    fn default() -> Self {
        Self { dk: Vec::new(), dv: Vec::new(), dq: Vec::new(), position: Vec::new() }
    }
}

#[derive(Clone, Copy)]
struct Wanted {
    q: bool,
    k: bool,
    v: bool,
    position: bool,
}

/// What the backward pass reads.
struct Pass<'a, T: Float> {
    tiles: Tiles<'a, T>,
    grad: Rows<'a, T::Acc>,
    log_sums: &'a [T::Acc],
    delta: &'a [T::Acc],
}

/// Working memory of a tile.
struct Work<'a, A> {
    /// Weights.
    p: &'a mut [A],
    /// Gradient of the scores.
    ds: &'a mut [A],
    factors: &'a mut [A],
}

/// What a tile gives.
#[derive(Clone, Copy, PartialEq)]
enum Reach {
    /// The weights of fully masked queries alone: their scores have no gradient.
    Weights,
    /// Weights and the gradient of the scores.
    Scores,
}

impl<T: Float> Pass<'_, T> {
    fn per_query<'a>(&self, at: At, values: &'a [T::Acc]) -> &'a [T::Acc] {
        let Sizes { heads, queries, .. } = self.tiles.sizes;
        &values[(at.batch * heads + at.head) * queries + at.query..][..at.queries]
    }

    /// Weights (as they met the values, after dropout) and gradient of the scores of one tile, in `work`, for those
    /// queries of the tile that are returned.
    fn tile(&self, at: At, work: &mut Work<T::Acc>) -> Option<(At, Reach)> {
        let (tiles, kv_head) = (&self.tiles, at.head / self.tiles.sizes.group());
        let masked = |log_sum: &T::Acc| *log_sum == -T::Acc::NEG_INFINITY;
        let any_masked = self.per_query(at, self.log_sums).iter().any(masked);
        let (at, reach) = match (tiles.reach(at), any_masked) {
            (None, false) => return None,
            (None, true) => (at, Reach::Weights),
            (Some(seen), false) => (seen, Reach::Scores),
            (Some(_), true) => (at, Reach::Scores),
        };
        let log_sums = self.per_query(at, self.log_sums);
        if reach == Reach::Scores {
            tiles.scores(at, work.p);
            // Fully masked queries come out with weight and gradient 0.
            weights(work.p, at.width(), log_sums);
            let grad = self.grad.block(at.batch, at.head, at.query);
            let v = transposed(tiles.v.block(at.batch, kv_head, at.key));
            gemm_block::<T::Acc>(at.queries, at.keys, tiles.sizes.e, grad, v, false, work.ds, KEYS);
            self.score_gradients(at, work);
        } else {
            work.p.fill(T::Acc::ZERO);
        }
        if any_masked {
            tiles.spread(at, |row| masked(&log_sums[row]), work.p, work.factors);
        }
        Some((at, reach))
    }

    fn score_gradients(&self, at: At, work: &mut Work<T::Acc>) {
        let delta = self.per_query(at, self.delta);
        if !self.tiles.drops() {
            return score_gradients(work.p, work.ds, at.keys, delta);
        }
        let rows = work.p.chunks_exact_mut(KEYS).zip(work.ds.chunks_exact_mut(KEYS));
        for (row, ((p, ds), delta)) in rows.zip(delta).enumerate() {
            self.tiles.dropout(at, row, work.factors);
            score_gradients_dropped(p, &mut ds[..at.keys], work.factors, *delta);
        }
    }

    /// All that the keys of one task give.
    fn keys(&self, problem: &Problem, batch: usize, kv_head: usize, keys: Range<usize>, wanted: Wanted, task: Task<T>) {
        let Sizes { queries, d, e, .. } = self.tiles.sizes;
        let Task { mut dk, mut dv, mut dq, position } = task;
        let group = self.tiles.sizes.group();
        dq.iter_mut().for_each(|dq| dq.fill(T::Acc::ZERO));
        let distances = if wanted.position { keys.len() + queries - 1 } else { 0 };
        let lengths = [QUERIES * KEYS, QUERIES * KEYS, KEYS, KEYS * d, KEYS * e, group * distances];
        with_scratch(lengths, |[p, ds, factors, dk_sum, dv_sum, curves]: [&mut [T::Acc]; 6]| {
            let mut work = Work { p, ds, factors };
            curves.fill(T::Acc::ZERO);
            let start = At { batch, head: kv_head * group, query: 0, queries: 0, key: 0, keys: 0 };
            for block in key_blocks(start, keys.clone()) {
                dk_sum.fill(T::Acc::ZERO);
                dv_sum.fill(T::Acc::ZERO);
                for member in 0..group {
                    for at in query_blocks(At { head: start.head + member, ..block }, 0..queries) {
                        let Some((at, reach)) = self.tile(at, &mut work) else { continue };
                        if wanted.v {
                            let (p, grad) = (rows_of(work.p), self.grad.block(batch, at.head, at.query));
                            gemm_block::<T::Acc>(at.keys, e, at.queries, transposed(p), grad, true, dv_sum, e);
                        }
                        if reach == Reach::Weights {
                            continue;
                        }
                        let ds = rows_of(work.ds);
                        if wanted.k {
                            let q = self.tiles.q.block(batch, at.head, at.query);
                            gemm_block::<T::Acc>(at.keys, d, at.queries, transposed(ds), q, true, dk_sum, d);
                        }
                        if wanted.q {
                            let k = self.tiles.k.block(batch, kv_head, at.key);
                            let dq = &mut dq[member][at.query * d..];
                            gemm_block::<T::Acc>(at.queries, d, at.keys, ds, k, true, dq, d);
                        }
                        if wanted.position {
                            // The distance of the last query and the first key comes first.
                            let curve = &mut curves[member * distances..(member + 1) * distances];
                            let first = at.key - keys.start + queries - at.query - at.queries;
                            for (row, ds) in work.ds.chunks_exact(KEYS).take(at.queries).enumerate() {
                                add(&mut curve[first + at.queries - 1 - row..][..at.keys], &ds[..at.keys]);
                            }
                        }
                    }
                }
                let scale = T::Acc::from_f64(problem.scale);
                let first = block.key - keys.start;
                for (to, from) in dk.iter_mut().skip(first).zip(dk_sum.chunks_exact(d.max(1))).take(block.keys) {
                    write_row::<T>(from, scale, to);
                }
                for (to, from) in dv.iter_mut().skip(first).zip(dv_sum.chunks_exact(e.max(1))).take(block.keys) {
                    write_row::<T>(from, T::Acc::ONE, to);
                }
            }
            if let Some(bias) = &problem.position {
                for (curve, into) in curves.chunks_exact(distances.max(1)).zip(position) {
                    bias.reduce(curve, keys.start, into);
                }
            }
        });
    }

    /// The gradient of the bias: a pass of its own, whose tasks each own a part of it and walk over all tiles that
    /// broadcast to that part.
    fn bias(&self, bias: &Tensor) -> Result<Tensor> {
        let Sizes { batch, heads, queries, keys, .. } = self.tiles.sizes;
        let mut shape = [1; 4];
        shape[4 - bias.rank()..].copy_from_slice(bias.shape());
        let [_, bias_heads, rows, columns] = shape;
        let mut gradient = Tensor::zeros(*bias.shape(), <T::Acc as Element>::DTYPE, bias.device())?;
        let part = if rows == 1 { KEYS.min(columns) } else { QUERIES * columns };
        let parts = (rows * columns).div_ceil(part);
        let tasks = gradient.values_mut::<T::Acc>()?.chunks_mut(rows * columns).flat_map(|slab| slab.chunks_mut(part));
        run(tasks.collect(), part * batch * heads, |index, gradient: &mut [T::Acc]| {
            let (slab, first) = (index / parts, index % parts * part);
            let along = |size: usize, index: usize, all: usize| if size == 1 { 0..all } else { index..index + 1 };
            let (query, key) = (first / columns, first % columns);
            let query_range = if rows == 1 { 0..queries } else { query..query + gradient.len() / columns };
            let key_range = if columns == 1 { 0..keys } else { key..key + gradient.len().min(columns) };
            with_scratch([QUERIES * KEYS, QUERIES * KEYS, KEYS], |[p, ds, factors]: [&mut [T::Acc]; 3]| {
                let mut work = Work { p, ds, factors };
                for batch in along(shape[0], slab / bias_heads, batch) {
                    for head in along(bias_heads, slab % bias_heads, heads) {
                        let start = At { batch, head, query: 0, queries: 0, key: 0, keys: 0 };
                        let blocks = query_blocks(start, query_range.clone());
                        for at in blocks.flat_map(|at| key_blocks(at, key_range.clone())) {
                            let Some((at, Reach::Scores)) = self.tile(at, &mut work) else { continue };
                            for (row, ds) in work.ds.chunks_exact(KEYS).take(at.queries).enumerate() {
                                let row = if rows == 1 { 0 } else { at.query + row - query_range.start };
                                if columns == 1 {
                                    gradient[row] += sum(&ds[..at.keys]);
                                } else {
                                    let start = row * columns + at.key - key_range.start;
                                    add(&mut gradient[start..start + at.keys], &ds[..at.keys]);
                                }
                            }
                        }
                    }
                }
            });
        });
        gradient.to_dtype(bias.dtype())
    }
}

/// The blocks of queries.
fn query_blocks(at: At, queries: Range<usize>) -> impl Iterator<Item = At> {
    let end = queries.end;
    queries.step_by(QUERIES).map(move |query| At { query, queries: QUERIES.min(end - query), ..at })
}

/// A tile as an operand.
fn rows_of<A>(tile: &[A]) -> Matrix<'_, A> {
    Matrix { data: tile, row: KEYS, col: 1 }
}

/// `dq = scale · Σ partial`, over the tasks in their order.
fn sum_chunks<T: Float>(problem: &Problem, partial: &Tensor, chunks: usize) -> Result<Tensor> {
    let Sizes { heads, queries, d, .. } = problem.sizes;
    let order = RowOrder::of(&problem.q);
    let mut dq = order.uninit(&problem.q)?;
    let scale = T::Acc::from_f64(problem.scale);
    let partial = partial.values::<T::Acc>()?;
    cpu::for_rows(dq.values_mut::<T>()?, d, chunks * d, |first, dq| {
        for (index, to) in dq.chunks_exact_mut(d).enumerate() {
            let (head, query) = order.place(first + index, heads, queries);
            let parts = &partial[head * chunks * queries * d..];
            sum_rows::<T>(&parts[query * d..], queries * d, chunks, scale, to);
        }
    });
    order.view(dq)
}
