//! Sampling on the CPU: rows as integer keys and weights.

use std::ops::Range;

use super::{BROKEN, Choice, SampleFilter};
use crate::{
    DType, Device, Philox, Result, Tensor,
    device::{cpu, floats::Floats, simd::vectorized},
    dtype::Real,
    shape::Shape,
};

impl Choice {
    /// Samples the tokens of all rows on the CPU.
    pub(super) fn rows<T: Logit>(&self, x: Floats, step: u64, tokens: &mut [i64]) -> Result<()> {
        let columns = self.columns;
        let least = match self.filter {
            SampleFilter::TopA { power, ratio } => self.least_share::<T>(x, power, ratio)?,
            _ => 0.0,
        };
        // Keys and weights of each row, from the pool: rows are larger than an allocator caches.
        let half = columns.div_ceil(2);
        let width = half * size_of::<T::Key>() / 4 + half;
        let mut scratch = Tensor::uninit(Shape::new(&[tokens.len(), width])?, DType::F64, &Device::Cpu)?;
        let scratch = scratch.values_mut::<f64>()?;
        cpu::for_rows2(tokens, scratch, (1, width), 100 * columns, &|first, tokens, scratch| {
            let mut memory = Vec::new();
            for (index, (token, scratch)) in tokens.iter_mut().zip(scratch.chunks_exact_mut(width)).enumerate() {
                let at = first + index;
                let (keys, weights) = scratch.split_at_mut(width - half);
                let keys = &mut bytemuck::cast_slice_mut(keys)[..columns];
                let weights = &mut bytemuck::cast_slice_mut(weights)[..columns];
                let x = x.range(at * columns..(at + 1) * columns).to_slice::<T>(&mut memory);
                let row = Row::<T::Key>::new(x, keys);
                let draw = Philox::new(self.seed, at as u64).uniform(step);
                *token = row.map_or(BROKEN, |row| self.token(row, weights, least, draw) as i64);
            }
        });
        Ok(())
    }

    /// Samples the token of one row.
    fn token<K: Key>(&self, row: Row<K>, weights: &mut [f32], least: f64, draw: f64) -> usize {
        let Self { scale, unit, .. } = *self;
        let Row { keys, best, .. } = row;
        if scale == 0.0 {
            return row.best_position();
        }
        let cut = match self.filter {
            SampleFilter::All => None,
            SampleFilter::Best(count) => row.cut(None, count as f64),
            SampleFilter::MassUpTo(mass) => {
                weigh(keys, best, 1.0, unit, weights);
                row.cut(Some(weights), ((mass * sum(weights)).floor() + 1.0).max(1.0))
            }
            SampleFilter::MassBelow(mass) => {
                weigh(keys, best, 1.0, unit, weights);
                row.cut(Some(weights), (mass * sum(weights)).ceil().max(1.0))
            }
            SampleFilter::MinP(ratio) => {
                weigh(keys, best, 1.0, unit, weights);
                reweigh_above(keys, best, scale, unit, ratio * f64::from(unit), weights);
                return pick(weights, draw);
            }
            SampleFilter::TopA { .. } => {
                weigh(keys, best, 1.0, unit, weights);
                let least = least * sum(weights);
                weights.iter_mut().for_each(|weight| *weight = f32::from(u8::from(f64::from(*weight) >= least)));
                // Another row of the batch may have set a limit that no token of this row reaches.
                return if sum(weights) == 0.0 { row.best_position() } else { pick(weights, draw) };
            }
            SampleFilter::Entmax => {
                scaled(keys, best, scale, weights);
                // The largest threshold in steps of 2⁻²⁴ from −1 at which the weights add up to `unit`.
                let threshold = |steps: i32| (steps - (1 << 24)) as f32 * (1.0 / (1 << 24) as f32);
                let mut steps = 0;
                for bit in (0..24).rev().map(|shift| 1 << shift) {
                    if entmax_sum(weights, threshold(steps | bit), unit) >= f64::from(unit) {
                        steps |= bit;
                    }
                }
                entmax_weights(weights, threshold(steps), unit);
                return pick(weights, draw);
            }
        };
        let weighed = matches!(self.filter, SampleFilter::MassUpTo(_) | SampleFilter::MassBelow(_)) && scale == 1.0;
        if !weighed {
            weigh(keys, best, scale, unit, weights);
        }
        if let Some(cut) = cut {
            keep(keys, cut.key, cut.position, weights);
        }
        pick(weights, draw)
    }

    /// Returns the minimum probability for [`SampleFilter::TopA`].
    fn least_share<T: Logit>(&self, x: Floats, power: f64, ratio: f64) -> Result<f64> {
        let Self { columns, unit, .. } = *self;
        let mut sums = vec![f64::INFINITY; x.len() / columns];
        cpu::for_rows(&mut sums, 1, 50 * columns, |first, sums| {
            let (mut keys, mut weights, mut memory) = (vec![T::Key::LOWEST; columns], vec![0.0; columns], Vec::new());
            for (index, total) in sums.iter_mut().enumerate() {
                let x = x.range((first + index) * columns..(first + index + 1) * columns);
                if let Some(row) = Row::new(x.to_slice::<T>(&mut memory), &mut keys) {
                    weigh(row.keys, row.best, 1.0, unit, &mut weights);
                    *total = sum(&weights);
                }
            }
        });
        let highest = f64::from(unit) / sums.into_iter().fold(f64::INFINITY, f64::min);
        Ok(f64::from(Real::exp((power * libm::log(highest)) as f32)) * ratio)
    }
}

/// Float type of logits, with a mapping to integers that preserves the order.
pub(super) trait Logit: Real {
    type Key: Key;
    fn key(self) -> Self::Key;
}

/// Integer key of a number; keys have the order of the numbers, with −0 before 0.
pub(super) trait Key: Copy + Ord + Send + Sync + bytemuck::Pod + Into<i64> {
    const LOWEST: Self;
    /// Keys of the infinities.
    const INFINITE: [Self; 2];
    fn from_i64(key: i64) -> Self;
    /// Returns this key's number minus the best key's number, times the scale.
    fn scaled(self, best: Self, scale: f64) -> f32;
}

macro_rules! key {
    ($key:ty, $unsigned:ty, $float:ty) => {
        impl Key for $key {
            const LOWEST: Self = <$key>::MIN;
            const INFINITE: [Self; 2] = [
                (<$float>::NEG_INFINITY.to_bits() as $key) ^ (<$unsigned>::MAX >> 1) as $key,
                <$float>::INFINITY.to_bits() as $key,
            ];
            #[inline(always)]
            fn from_i64(key: i64) -> Self {
                key as $key
            }
            #[inline(always)]
            fn scaled(self, best: Self, scale: f64) -> f32 {
                let number = |key: $key| <$float>::from_bits(turn_negative!(key, $key, $unsigned) as $unsigned);
                ((number(self) - number(best)) * scale as $float) as f32
            }
        }
    };
}

/// The bits of negative numbers grow with the magnitude: all but the sign are inverted. Its own inverse.
macro_rules! turn_negative {
    ($bits:expr, $key:ty, $unsigned:ty) => {
        $bits ^ (($bits >> (<$key>::BITS - 1)) as $unsigned >> 1) as $key
    };
}

key!(i32, u32, f32);
key!(i64, u64, f64);

macro_rules! logit {
    ($($float:ty: $key:ty, $unsigned:ty;)+) => {$(
        impl Logit for $float {
            type Key = $key;
            #[inline(always)]
            fn key(self) -> $key {
                let bits = self.to_bits() as $key;
                turn_negative!(bits, $key, $unsigned)
            }
        }
    )+};
}

logit! { f32: i32, u32; f64: i64, u64; }

/// One row as keys.
#[derive(Clone, Copy)]
struct Row<'a, K> {
    keys: &'a [K],
    worst: K,
    best: K,
}

/// Cut-off of the kept tokens: all with a larger key, and those with this key up to a position.
#[derive(Clone, Copy)]
struct Cut<K> {
    key: K,
    position: u32,
}

/// Maximum number of keys to sort.
const FEW: usize = 256;

impl<'a, K: Key> Row<'a, K> {
    /// Creates the row of these logits; `None` if one is NaN or the largest is not finite.
    fn new<T: Logit<Key = K>>(x: &[T], keys: &'a mut [K]) -> Option<Self> {
        let (worst, best) = order::<T>(x, keys);
        // The keys of NaN are beyond those of the infinities.
        let [lowest, highest] = K::INFINITE;
        (worst >= lowest && best > lowest && best < highest).then_some(Self { keys, worst, best })
    }

    fn best_position(&self) -> usize {
        self.keys.iter().position(|key| *key == self.best).unwrap_or(0)
    }

    /// Returns the cut-off after the best entries whose weights (1 each without weights) add up to `bound`; `None` if
    /// they never do.
    fn cut(&self, weights: Option<&[f32]>, bound: f64) -> Option<Cut<K>> {
        let Self { keys, worst, best } = *self;
        let all = (keys.len() as u32, weights.map_or(keys.len() as f64, sum));
        if all.1 < bound {
            return None;
        }
        let reach = |key: K| match weights {
            Some(weights) => sum_above(keys, weights, key),
            None => Some(count_above(keys, key)).map_or((0, 0.0), |count| (count, f64::from(count))),
        };
        // Keys from `low` up reach the bound, keys from `high` up do not.
        let (mut low, mut high): (i64, i64) = (worst.into(), best.into() + 1);
        let (mut from_low, mut from_high) = (all, (0, 0.0));
        while high.abs_diff(low) > 1 && (from_low.0 - from_high.0) as usize > FEW {
            let middle = low.midpoint(high);
            let reached = reach(K::from_i64(middle));
            if reached.1 >= bound {
                (low, from_low) = (middle, reached);
            } else {
                (high, from_high) = (middle, reached);
            }
        }
        let mut between = Vec::with_capacity((from_low.0 - from_high.0) as usize);
        collect(keys, K::from_i64(low), K::from_i64(high - 1), &mut between);
        // One sort serves both types of keys.
        let mut between: Vec<(i64, u32)> = between.into_iter().map(|(key, position)| (key.into(), position)).collect();
        if high.abs_diff(low) > 1 {
            sort_descending(&mut between);
        }
        let mut reached = from_high.1;
        let last = between.into_iter().find(|&(_, position)| {
            reached += weights.map_or(1.0, |weights| f64::from(weights[position as usize]));
            reached >= bound
        });
        last.map(|(key, position)| Cut { key: K::from_i64(key), position })
    }
}

/// Sorts keys and their positions, the largest key first and the first of equal ones.
fn sort_descending(keys: &mut [(i64, u32)]) {
    keys.sort_unstable_by_key(|&(key, position)| (std::cmp::Reverse(key), position));
}

vectorized! {
    /// Writes the keys; returns the smallest and the largest.
    fn order<T: Logit>(x: &[T], keys: &mut [T::Key]) -> (T::Key, T::Key) {
        let mut range = (x[0].key(), x[0].key());
        for (x, key) in x.iter().zip(keys) {
            *key = x.key();
            range = (range.0.min(*key), range.1.max(*key));
        }
        range
    }
}

vectorized! {
    fn scaled<K: Key>(keys: &[K], best: K, scale: f64, out: &mut [f32]) {
        for (key, out) in keys.iter().zip(out) {
            *out = key.scaled(best, scale);
        }
    }
}

/// Rounds to the nearest integer, for numbers from 0 to 2⁵¹.
#[inline(always)]
fn round(x: f32) -> f32 {
    const SHIFT: f64 = (1u64 << 52) as f64;
    ((f64::from(x) + SHIFT) - SHIFT) as f32
}

vectorized! {
    fn weigh<K: Key>(keys: &[K], best: K, scale: f64, unit: f32, weights: &mut [f32]) {
        for (key, weight) in keys.iter().zip(weights) {
            *weight = round(Real::exp(key.scaled(best, scale)) * unit);
        }
    }
}

vectorized! {
    /// Recomputes at another scale the weights that are at least `least`; sets the others to 0.
    fn reweigh_above<K: Key>(keys: &[K], best: K, scale: f64, unit: f32, least: f64, weights: &mut [f32]) {
        for (key, weight) in keys.iter().zip(weights) {
            let other = round(Real::exp(key.scaled(best, scale)) * unit);
            *weight = if f64::from(*weight) >= least { other } else { 0.0 };
        }
    }
}

vectorized! {
    /// Sets the weights beyond a cut-off to 0.
    fn keep<K: Key>(keys: &[K], last: K, position: u32, weights: &mut [f32]) {
        let (at_most, after) = weights.split_at_mut((position as usize + 1).min(keys.len()));
        for (key, weight) in keys.iter().zip(at_most.iter_mut()) {
            *weight = if *key >= last { *weight } else { 0.0 };
        }
        for (key, weight) in keys[at_most.len()..].iter().zip(after) {
            *weight = if *key > last { *weight } else { 0.0 };
        }
    }
}

vectorized! {
    fn count_above<K: Key>(keys: &[K], from: K) -> u32 {
        keys.iter().map(|key| u32::from(*key >= from)).sum()
    }
}

/// Number of independent sums.
const LANES: usize = 32;

vectorized! {
    /// Returns the number of keys that are at least `from`, and the sum of their weights.
    fn sum_above<K: Key>(keys: &[K], weights: &[f32], from: K) -> (u32, f64) {
        let (mut counts, mut sums) = ([0u32; LANES], [0.0f64; LANES]);
        let (blocks, rest) = keys.as_chunks::<LANES>();
        let (of_blocks, of_rest) = weights.as_chunks::<LANES>();
        for (keys, weights) in blocks.iter().zip(of_blocks) {
            for lane in 0..LANES {
                let reaches = keys[lane] >= from;
                counts[lane] += u32::from(reaches);
                sums[lane] += f64::from(if reaches { weights[lane] } else { 0.0 });
            }
        }
        for (key, weight) in rest.iter().zip(of_rest) {
            counts[0] += u32::from(*key >= from);
            sums[0] += f64::from(if *key >= from { *weight } else { 0.0 });
        }
        (counts.iter().sum(), sums.iter().sum())
    }
}

vectorized! {
    /// Sums the weights: exact in any order.
    fn sum(weights: &[f32]) -> f64 {
        let mut sums = [0.0f64; LANES];
        let (blocks, rest) = weights.as_chunks::<LANES>();
        for block in blocks {
            for (sum, weight) in sums.iter_mut().zip(block) {
                *sum += f64::from(*weight);
            }
        }
        sums.iter().sum::<f64>() + rest.iter().map(|weight| f64::from(*weight)).sum::<f64>()
    }
}

vectorized! {
    /// Collects the keys from `low` to `high` with their positions, in order.
    fn collect<K: Key>(keys: &[K], low: K, high: K, between: &mut Vec<(K, u32)>) {
        for (index, block) in keys.chunks(64).enumerate() {
            if block.iter().fold(false, |any, key| any | ((*key >= low) & (*key <= high))) {
                let positions = index as u32 * 64..;
                let found = block.iter().copied().zip(positions).filter(|(key, _)| (low..=high).contains(key));
                between.extend(found);
            }
        }
    }
}

/// Computes the cube root of a normal number by Newton's method.
#[inline(always)]
fn cbrt(x: f32) -> f32 {
    let mut y = f32::from_bits(x.to_bits() / 3 + 0x2A51_19F2);
    for _ in 0..3 {
        y = (y + y + x / (y * y)) * (1.0 / 3.0);
    }
    y
}

/// Computes `unit · max(0, x · (α − 1) − threshold)^(1 / (α − 1))` with α = 1.3 (Peters et al.,
/// <https://arxiv.org/abs/1905.05702>), rounded.
#[inline(always)]
fn entmax_weight(x: f32, threshold: f32, unit: f32) -> f32 {
    let above = x * 0.3 - threshold;
    // 1, whose result is not used, in place of numbers without a root.
    let base = if above > 0.0 { above } else { 1.0 };
    let weight = round(base * base * base * cbrt(base) * unit);
    if above > 0.0 { weight } else { 0.0 }
}

vectorized! {
    fn entmax_sum(x: &[f32], threshold: f32, unit: f32) -> f64 {
        let mut sums = [0.0f64; LANES];
        let (blocks, rest) = x.as_chunks::<LANES>();
        for block in blocks {
            for (sum, x) in sums.iter_mut().zip(block) {
                *sum += f64::from(entmax_weight(*x, threshold, unit));
            }
        }
        let rest: f64 = rest.iter().map(|x| f64::from(entmax_weight(*x, threshold, unit))).sum();
        sums.iter().sum::<f64>() + rest
    }
}

vectorized! {
    fn entmax_weights(x: &mut [f32], threshold: f32, unit: f32) {
        for x in x {
            *x = entmax_weight(*x, threshold, unit);
        }
    }
}

/// Returns the token into whose share of all weights the draw falls.
fn pick(weights: &[f32], draw: f64) -> usize {
    const BLOCK: usize = 512;
    let total = sum(weights) as u64;
    let bits = (draw * (1u64 << 53) as f64) as u64;
    let mut target = ((u128::from(bits) * u128::from(total)) >> 53) as u64;
    let mut take = |weight: u64| match target.checked_sub(weight) {
        Some(rest) => {
            target = rest;
            false
        }
        None => true,
    };
    let block = weights.chunks(BLOCK).position(|block| take(sum(block) as u64)).unwrap_or(0) * BLOCK;
    let rest: Range<usize> = block..weights.len();
    rest.clone().find(|&token| take(weights[token] as u64)).unwrap_or(block)
}
