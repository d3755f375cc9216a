//! Gradients from the scores of the tiles, in the compute type.

use std::ops::Range;

use super::{
    Sizes,
    cpu::{key_blocks, run},
    operand::{Rows, operand, product, transposed},
    position::Position,
    rows::RowWriter,
    tile::{
        At, KEYS, QUERIES, Tiles, add, clamp_slopes, multiply, score_gradients, score_gradients_dropped, sum, weights,
        with_scratch,
    },
};
use crate::{Result, Tensor, collect::CollectVec, dtype::Real, gemm::Multiply};

/// Outputs of a task, which owns some keys of one key head.
pub(super) struct Task<'a, A> {
    pub dk: RowWriter<'a>,
    pub dv: RowWriter<'a>,
    /// `[queries, d]` per query head; empty if not wanted.
    pub dq: Vec<&'a mut [A]>,
    /// The weights of the position bias, per query head; empty if not wanted.
    pub position: Vec<&'a mut [f64]>,
}

/// Inputs of the backward pass.
pub(super) struct Pass<'a, A> {
    pub tiles: Tiles<'a, A>,
    /// The keys as the gradients of the queries see them.
    pub directions: Rows<'a>,
    pub grad: Rows<'a>,
    pub statistics: &'a [[A; 2]],
    pub delta: &'a [A],
}

/// Working memory of a tile.
struct Work<'a, A> {
    /// Weights.
    p: &'a mut [A],
    /// Gradient of the scores.
    ds: &'a mut [A],
    factors: &'a mut [A],
    /// Derivatives of the soft clamp, empty without one.
    slopes: &'a mut [A],
}

/// Results computed for a tile.
#[derive(Clone, Copy, PartialEq)]
enum Reach {
    /// Only the weights of fully masked queries: their scores have no gradient.
    Weights,
    /// Weights and the gradient of the scores.
    Scores,
}

impl<A: Real + Multiply> Pass<'_, A> {
    fn per_query<'a, V>(&self, at: At, values: &'a [V]) -> &'a [V] {
        let Sizes { heads, queries, .. } = self.tiles.sizes;
        &values[(at.batch * heads + at.head) * queries + at.query..][..at.queries]
    }

    /// Computes in `work` the weights (after dropout, as they multiply the values) and the gradient of the scores of
    /// one tile, for the returned queries of the tile.
    fn tile(&self, at: At, work: &mut Work<A>) -> Option<(At, Reach)> {
        let (tiles, kv_head) = (&self.tiles, at.head / self.tiles.sizes.group());
        let masked = |[largest, _]: &[A; 2]| *largest == -A::NEG_INFINITY;
        let any_masked = self.per_query(at, self.statistics).iter().any(masked);
        let (at, reach) = match (tiles.reach(at), any_masked) {
            (None, false) => return None,
            (None, true) => (at, Reach::Weights),
            (Some(seen), false) => (seen, Reach::Scores),
            (Some(_), true) => (at, Reach::Scores),
        };
        let statistics = self.per_query(at, self.statistics);
        if reach == Reach::Scores {
            let factor = tiles.scores(at, work.p);
            if let Some(bound) = tiles.softclamp() {
                clamp_slopes(&work.p[..at.queries * KEYS], work.slopes, bound);
            }
            // Fully masked queries come out with weight and gradient 0.
            weights(work.p, at.width(), factor, A::ONE, statistics);
            let grad = self.grad.block(at.batch, at.head, at.query);
            let v = transposed(tiles.v.block(at.batch, kv_head, at.key));
            product([at.queries, at.keys, tiles.sizes.e], grad, v, false, work.ds, KEYS);
            self.score_gradients(at, work);
            if tiles.softclamp().is_some() {
                multiply(&mut work.ds[..at.queries * KEYS], work.slopes);
            }
        } else {
            work.p.fill(A::ZERO);
        }
        if any_masked {
            let spread = [A::ONE, tiles.dropout_factor()];
            tiles.spread(at, &|row| masked(&statistics[row]), spread, work.p, work.factors);
        }
        Some((at, reach))
    }

    fn score_gradients(&self, at: At, work: &mut Work<A>) {
        let delta = self.per_query(at, self.delta);
        if !self.tiles.drops() {
            return score_gradients(work.p, work.ds, at.keys, delta);
        }
        let rows = work.p.chunks_exact_mut(KEYS).zip(work.ds.chunks_exact_mut(KEYS));
        for (row, ((p, ds), delta)) in rows.zip(delta).enumerate() {
            self.tiles.dropout(at, row, self.tiles.dropout_factor(), work.factors);
            score_gradients_dropped(p, &mut ds[..at.keys], work.factors, *delta);
        }
    }

    /// Returns the number of derivatives of the soft clamp that a tile has.
    fn slopes(&self) -> usize {
        if self.tiles.softclamp().is_some() { QUERIES * KEYS } else { 0 }
    }

    /// Computes the gradients from the keys of one task: `dk` and `dv` if wanted, and parts of the gradients of the
    /// queries and of the position bias.
    pub fn keys(
        &self,
        position: Option<&Position>,
        [batch, kv_head]: [usize; 2],
        keys: Range<usize>,
        [want_k, want_v]: [bool; 2],
        mut task: Task<A>,
    ) {
        let Sizes { queries, d, e, .. } = self.tiles.sizes;
        let group = self.tiles.sizes.group();
        let distances = if task.position.is_empty() { 0 } else { keys.len() + queries - 1 };
        let rounded = if self.tiles.rounds() { QUERIES * KEYS } else { 0 };
        let lengths =
            [QUERIES * KEYS, QUERIES * KEYS, KEYS, self.slopes(), KEYS * d, KEYS * e, group * distances, rounded];
        with_scratch(lengths, |[p, ds, factors, slopes, dk, dv, curves, rounded]: [&mut [A]; 8]| {
            let mut work = Work { p, ds, factors, slopes };
            task.dq.iter_mut().for_each(|dq| dq.fill(A::ZERO));
            curves.fill(A::ZERO);
            let start = At { batch, head: kv_head * group, query: 0, queries: 0, key: 0, keys: 0 };
            for block in key_blocks(start, keys.clone()) {
                dk.fill(A::ZERO);
                dv.fill(A::ZERO);
                for member in 0..group {
                    let blocks = query_blocks(At { head: start.head + member, ..block }, 0..queries);
                    for at in blocks.flat_map(|at| self.tiles.halves(at)) {
                        let Some((at, reach)) = self.tile(at, &mut work) else { continue };
                        if want_v {
                            let grad = self.grad.block(batch, at.head, at.query);
                            let p = operand(&work.p[..at.queries * KEYS], at.keys, rounded);
                            product(
                                [at.keys, e, at.queries],
                                transposed(p),
                                grad,
                                true,
                                &mut dv[(at.key - block.key) * e..],
                                e,
                            );
                        }
                        if reach == Reach::Weights {
                            continue;
                        }
                        let ds = operand(&work.ds[..at.queries * KEYS], at.keys, rounded);
                        if want_k {
                            let q = self.tiles.q.block(batch, at.head, at.query);
                            product(
                                [at.keys, d, at.queries],
                                transposed(ds),
                                q,
                                true,
                                &mut dk[(at.key - block.key) * d..],
                                d,
                            );
                        }
                        if let Some(dq) = task.dq.get_mut(member) {
                            let k = self.directions.block(batch, kv_head, at.key);
                            product([at.queries, d, at.keys], ds, k, true, &mut dq[at.query * d..], d);
                        }
                        if distances > 0 {
                            let curve = &mut curves[member * distances..(member + 1) * distances];
                            self.add_distances(at, keys.start, work.ds, curve);
                        }
                    }
                }
                for key in 0..block.keys {
                    let row = block.key - keys.start + key;
                    task.dk.write(row, &dk[key * d..(key + 1) * d], self.tiles.scale);
                    task.dv.write(row, &dv[key * e..(key + 1) * e], A::ONE);
                }
            }
            for (curve, weights) in curves.chunks_exact(distances.max(1)).zip(task.position) {
                position.into_iter().for_each(|position| position.reduce(curve, keys.start, weights));
            }
        });
    }

    /// Adds the gradient of the scores to that of each distance, starting at the distance of the last query and key
    /// `first_key`.
    fn add_distances(&self, at: At, first_key: usize, ds: &[A], curve: &mut [A]) {
        let unbiased = self.tiles.unbiased(at);
        let last = at.key - first_key + self.tiles.sizes.queries - 1 - at.query;
        for (row, ds) in ds.chunks_exact(KEYS).take(at.queries).enumerate() {
            add(&mut curve[last - row..][unbiased..at.keys], &ds[unbiased..at.keys]);
        }
    }

    /// Computes the gradient of the bias in a separate pass, whose tasks each own a part of it and walk over all tiles
    /// that broadcast to that part.
    pub fn bias(&self, bias: &Tensor) -> Result<Tensor> {
        let Sizes { batch, heads, queries, keys, .. } = self.tiles.sizes;
        let mut shape = [1; 4];
        shape[4 - bias.rank()..].copy_from_slice(bias.shape());
        let [_, bias_heads, rows, columns] = shape;
        let mut gradient = Tensor::zeros(*bias.shape(), A::DTYPE, bias.device())?;
        let part = if rows == 1 { KEYS.min(columns) } else { QUERIES * columns };
        let parts = (rows * columns).div_ceil(part);
        let tasks = gradient.values_mut::<A>()?.chunks_mut(rows * columns).flat_map(|slab| slab.chunks_mut(part));
        run(tasks.collect_vec(), part * batch * heads, |index, gradient: &mut [A]| {
            let (slab, first) = (index / parts, index % parts * part);
            let along = |size: usize, index: usize, all: usize| if size == 1 { 0..all } else { index..index + 1 };
            let (query, key) = (first / columns, first % columns);
            let query_range = if rows == 1 { 0..queries } else { query..query + gradient.len() / columns };
            let key_range = if columns == 1 { 0..keys } else { key..key + gradient.len().min(columns) };
            let lengths = [QUERIES * KEYS, QUERIES * KEYS, KEYS, self.slopes()];
            with_scratch(lengths, |[p, ds, factors, slopes]: [&mut [A]; 4]| {
                let mut work = Work { p, ds, factors, slopes };
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

/// Returns the blocks of queries.
fn query_blocks(at: At, queries: Range<usize>) -> impl Iterator<Item = At> {
    let end = queries.end;
    queries.step_by(QUERIES).map(move |query| At { query, queries: QUERIES.min(end - query), ..at })
}
