//! The backward pass: chooses the device, and on the CPU divides the gradients among tasks and joins their parts.

use std::marker::PhantomData;

use super::{
    Kept, Needed, OP, Problem, Sizes,
    cpu::{multiplies_bf16, run},
    cuda,
    gradients::{Pass, Task},
    operand::Rows,
    packed_rows,
    position::Position,
    residual_scale,
    rows::{Output, RowOrder, widen, without_common},
    tile::{KEYS, Tiles, add, dot, sum_rows},
};
use crate::{
    DType, Device, Result, Tensor,
    collect::CollectVec,
    device::{
        cpu,
        floats::Floats,
        rows::{Out, Sums as RowSums, for_rows_of},
    },
    dtype::{Float, Real, dispatch_real},
    gemm::Multiply,
    shape::{Layout, Shape},
};

/// Computes the gradients of queries, keys and values, and of the bias, the position bias's weights and the sink if there
/// are any.
pub(super) fn backward(
    problem: &Problem,
    out: &Tensor,
    kept: &Kept,
    grad: &Tensor,
    need: Needed,
) -> Result<Vec<Option<Tensor>>> {
    let Sizes { batch, heads, queries, keys, e, .. } = problem.sizes;
    if batch * heads * queries * keys * e == 0 {
        return zeros(problem, need);
    }
    match problem.q.device() {
        Device::Cpu => dispatch_real!(problem.q.dtype(), R, backward_as::<R>(problem, out, kept, grad, need)),
        Device::Gpu(gpu) => cuda::backward(*gpu, problem, out, kept, grad, need),
    }
}

/// Returns the gradients of a call without scores or without values: zeros.
fn zeros(problem: &Problem, need: Needed) -> Result<Vec<Option<Tensor>>> {
    let [q, k, v] = need.operands;
    let operands = [(&problem.q, q), (&problem.k, k), (&problem.v, v)];
    let others = [
        (problem.bias.as_ref(), need.bias),
        (problem.position.as_ref().map(Position::weights), need.position),
        (problem.sink.as_ref(), need.sink),
    ];
    let others = others.into_iter().filter_map(|(x, need)| Some((x?, need)));
    let zeros = |(x, need): (&Tensor, bool)| need.then(|| Tensor::zeros(*x.shape(), x.dtype(), x.device())).transpose();
    operands.into_iter().chain(others).map(zeros).try_collect_vec()
}

/// Computes the gradient of the sink: its weights times `−delta`, as they go to no value.
pub(super) fn sink_gradient(sink: &Tensor, statistics: &Tensor, delta: &Tensor) -> Result<Tensor> {
    let part = |at: usize| statistics.narrow(-1, at, 1)?.squeeze(-1);
    let sinks = sink.to_dtype(delta.dtype())?.reshape([1, sink.numel(), 1])?;
    let weights = sinks.sub(&part(0)?)?.exp()?.mul(&part(1)?)?;
    weights.mul(delta)?.sum(&[0, 2])?.affine(-1.0, 0.0)?.to_dtype(sink.dtype())
}

fn backward_as<A: Real + Multiply>(
    problem: &Problem,
    out: &Tensor,
    kept: &Kept,
    grad: &Tensor,
    need: Needed,
) -> Result<Vec<Option<Tensor>>> {
    let bf16 = multiplies_bf16(problem);
    let operands = [widen::<A>(&problem.q, bf16)?, widen::<A>(&problem.k, bf16)?, widen::<A>(&problem.v, bf16)?];
    let grad = packed_rows(grad)?;
    let delta = delta::<A>(out, kept.residual.as_ref(), &grad)?;
    let grad = widen::<A>(&grad, bf16)?;
    let [need_q, need_k, need_v] = need.operands;
    // Also where products are in f32: `delta` is known to 16 bits.
    let cancels = problem.k.dtype() == DType::BF16 && problem.sink.is_none() && problem.softclamp.is_none();
    let directions = if cancels && need_q { without_common(&problem.k, operands[1].dtype())? } else { None };
    let directions = directions.unwrap_or_else(|| operands[1].clone());
    let pass = Pass::<A> {
        tiles: Tiles::new(problem, &operands)?,
        directions: Rows::new(&directions)?,
        grad: Rows::new(&grad)?,
        statistics: kept.statistics.values::<A>()?.as_chunks().0,
        delta: delta.values::<A>()?,
    };
    let cut = Cut::new(&problem.sizes);
    let mut sums = Sums::<A>::new(problem, &cut, need_q, need.position)?;
    let (mut dk, mut dv) = (Output::new(&problem.k, need_k)?, Output::new(&problem.v, need_v)?);
    if need.operands.contains(&true) || need.position {
        let rows = dk.deal(cut.keys)?.into_iter().zip(dv.deal(cut.keys)?);
        let tasks = rows.zip(sums.parts(&cut)?).map(|((dk, dv), (dq, position))| Task { dk, dv, dq, position });
        run_tasks(&pass, problem, &cut, tasks.collect_vec(), [need_k, need_v]);
    }
    let dq = need_q.then(|| sums.dq(problem, &cut)).transpose()?;
    let mut gradients = vec![dq, dk.finish()?, dv.finish()?];
    if let Some(bias) = &problem.bias {
        gradients.push(need.bias.then(|| pass.bias(bias)).transpose()?);
    }
    if let Some(position) = &problem.position {
        gradients.push(need.position.then(|| sums.position(position, &cut)).transpose()?);
    }
    if let Some(sink) = &problem.sink {
        gradients.push(need.sink.then(|| sink_gradient(sink, &kept.statistics, &delta)).transpose()?);
    }
    Ok(gradients)
}

fn run_tasks<A: Real + Multiply>(pass: &Pass<A>, problem: &Problem, cut: &Cut, tasks: Vec<Task<A>>, wanted: [bool; 2]) {
    let Sizes { kv_heads, queries, keys, d, e, .. } = problem.sizes;
    let cost = cut.group * queries * cut.keys.min(keys) * (d + e);
    run(tasks, cost, |index, task| {
        let (head, first) = (index / cut.chunks, index % cut.chunks * cut.keys);
        let range = first..(first + cut.keys).min(keys);
        pass.keys(problem.position.as_ref(), [head / kv_heads, head % kv_heads], range, wanted, task);
    });
}

/// Computes `delta[b, h, i] = Σ_e grad ⊙ out`, with `out` before rounding.
fn delta<A: Real>(out: &Tensor, residual: Option<&Tensor>, grad: &Tensor) -> Result<Tensor> {
    let [batch, heads, queries, e] = [0, 1, 2, 3].map(|dim| out.shape()[dim]);
    let mut delta = Tensor::uninit(Shape::new(&[batch, heads, queries])?, A::DTYPE, out.device())?;
    let part = <A as Float>::from_f64(1.0 / residual_scale(out.dtype()));
    let of_residual = residual.map(|residual| Ok((residual.stored_floats(OP)?, residual.layout()))).transpose()?;
    let (of_out, of_grad, out, grad) = (out.stored_floats(OP)?, grad.stored_floats(OP)?, out.layout(), grad.layout());
    cpu::for_rows(delta.values_mut::<A>()?, 1, e, |first, delta| {
        let at = |layout: &Layout, row: usize| layout.row_offset(row)..layout.row_offset(row) + e;
        for (row, delta) in (first..).zip(delta) {
            let grad = of_grad.range(at(grad, row));
            *delta = dot_of(of_out.range(at(out, row)), grad);
            if let Some((residual, layout)) = of_residual {
                *delta += dot_of::<A>(residual.range(at(layout, row)), grad) * part;
            }
        }
    });
    Ok(delta)
}

/// Returns the product of two rows of one type.
fn dot_of<A: Real>(x: Floats, y: Floats) -> A {
    <A as Float>::from_f64(match (x, y) {
        (Floats::F64(x), Floats::F64(y)) => dot(x, y),
        (Floats::F32(x), Floats::F32(y)) => dot(x, y).into(),
        (Floats::BF16(x), Floats::BF16(y)) => dot(x, y).into(),
        (Floats::F16(x), Floats::F16(y)) => dot(x, y).into(),
        _ => unreachable!("rows of two types"),
    })
}

/// Approximate number of tasks for the keys of all heads: enough for many threads. Each sums up a gradient of its
/// queries of its own, so more tasks take more memory.
const TASKS: usize = 32;

/// Division of the keys into tasks: it depends only on the sizes, so no sum depends on the number of threads.
struct Cut {
    /// Number of tasks per key head.
    chunks: usize,
    /// Number of keys per task: whole tiles.
    keys: usize,
    /// Number of query heads per key head.
    group: usize,
}

impl Cut {
    fn new(sizes: &Sizes) -> Self {
        let blocks = sizes.keys.div_ceil(KEYS);
        let wanted = TASKS.div_ceil(sizes.batch * sizes.kv_heads).min(blocks);
        let keys = blocks.div_ceil(wanted) * KEYS;
        Self { chunks: sizes.keys.div_ceil(keys), keys, group: sizes.group() }
    }

    /// Returns each task's parts, one per query head, of `[batch · kv_heads, group, chunks, width]`.
    fn deal<'a, S>(&self, values: &'a mut [S], tasks: usize) -> Vec<Vec<&'a mut [S]>> {
        let mut parts: Vec<Vec<&mut [S]>> = (0..tasks).map(|_| Vec::new()).collect_vec();
        let width = values.len() / (tasks * self.group);
        if width > 0 {
            for (index, values) in values.chunks_exact_mut(width).enumerate() {
                parts[index / self.chunks / self.group * self.chunks + index % self.chunks].push(values);
            }
        }
        parts
    }
}

/// Sums that several tasks contribute to, with a separate part for each.
struct Sums<A> {
    /// `[batch · heads, chunks, queries, d]`, empty if not wanted.
    dq: Tensor,
    /// The weights of the position bias, `[batch · heads, chunks, parameters]`, empty if not wanted.
    position: Vec<f64>,
    tasks: usize,
    heads: usize,
    phantom: PhantomData<A>,
}

/// The rows of `dq` and of the position bias's gradient that one task sums up.
type TaskSums<'a, A> = (Vec<&'a mut [A]>, Vec<&'a mut [f64]>);

impl<A: Real> Sums<A> {
    fn new(problem: &Problem, cut: &Cut, need_q: bool, need_position: bool) -> Result<Self> {
        let Sizes { batch, heads, kv_heads, queries, d, .. } = problem.sizes;
        let shape = if need_q { [batch * heads, cut.chunks, queries, d] } else { [0; 4] };
        let parameters = problem.position.as_ref().filter(|_| need_position).map_or(0, Position::parameters);
        Ok(Self {
            dq: Tensor::uninit(Shape::new(&shape)?, A::DTYPE, problem.q.device())?,
            position: vec![0.0; batch * heads * cut.chunks * parameters],
            tasks: batch * kv_heads * cut.chunks,
            heads,
            phantom: PhantomData,
        })
    }

    /// Returns the sums that each task adds to.
    fn parts(&mut self, cut: &Cut) -> Result<impl Iterator<Item = TaskSums<'_, A>>> {
        let dq = cut.deal(self.dq.values_mut::<A>()?, self.tasks);
        Ok(dq.into_iter().zip(cut.deal(&mut self.position, self.tasks)))
    }

    /// Computes `dq = scale · Σ parts`, adding the parts in order.
    fn dq(&self, problem: &Problem, cut: &Cut) -> Result<Tensor> {
        let Sizes { heads, queries, d, .. } = problem.sizes;
        let order = RowOrder::of(&problem.q);
        let mut dq = order.uninit(&problem.q)?;
        let (scale, parts) = (A::from_f64(problem.scale), self.dq.values::<A>()?);
        let outs = [Out::new(dq.floats_mut(OP)?, d)];
        for_rows_of::<A, 1, 0>(outs, [], RowSums::none(), cut.chunks * d, &|first, [dq], [], _| {
            for (row, dq) in (first..).zip(dq.chunks_exact_mut(d)) {
                let (head, query) = order.place(row, heads, queries);
                let start = (head * cut.chunks * queries + query) * d;
                sum_rows(&parts[start..], queries * d, cut.chunks, scale, dq);
            }
        });
        order.view(dq)
    }

    fn position(&self, position: &Position, cut: &Cut) -> Result<Tensor> {
        let parameters = position.parameters();
        let mut per_head = vec![0.0; self.heads * parameters];
        for (index, part) in self.position.chunks_exact(parameters).enumerate() {
            let head = index / cut.chunks % self.heads;
            add(&mut per_head[head * parameters..(head + 1) * parameters], part);
        }
        position.gradient(&per_head)
    }
}
