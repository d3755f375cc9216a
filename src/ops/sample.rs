//! The next token of each row of logits: a filter, a temperature and a draw, where the logits are.
//!
//! A row's weights are integers, `round(unit · exp((x − max x) / temperature))` with `unit` a power of two, which are
//! exact in f32 and whose sums are exact in f64: the chosen token does not depend on the order of summation, nor on the
//! device. Nothing is sorted: where a filter ends is found by halving a range of integer keys.

use std::ops::Range;

use crate::{
    DType, Device, Error, Philox, Result, Tensor,
    autograd::{computed, discrete},
    device::{Arg, Gpu, Grid, args, cpu, rows::Floats, simd::vectorized, size32},
    dtype::{Real, dispatch_real},
    error::ensure,
    shape::Shape,
};

/// Which tokens [`Tensor::sample`] may choose. Of tokens with equal logits the earlier one is the better.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum SampleFilter {
    /// All of them.
    All,
    /// This many of the best ones.
    Best(usize),
    /// The best one, and each whose betters have this probability together at most. Probabilities are those of
    /// temperature 1.
    MassUpTo(f64),
    /// The best one, and each whose betters have less than this probability together.
    MassBelow(f64),
    /// With the same chance each that has at least `ratio · p^power`, where `p` is the largest probability in the whole
    /// batch; the best one of a row in which there is none.
    TopA {
        /// Of the largest probability.
        power: f64,
        /// The factor on it.
        ratio: f64,
    },
    /// Each that has at least this share of the row's largest probability.
    MinP(f64),
    /// Those that 1.3-entmax gives a probability to, which is also that of being chosen. The temperature divides logits
    /// before it.
    Entmax,
}

/// How [`Tensor::sample`] chooses.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SampleSpec {
    /// Which tokens stay.
    pub filter: SampleFilter,
    /// Divides the logits of those that stay; 0 takes the best token.
    pub temperature: f64,
    /// Of the draws: row `i` has stream `i` of [`Philox`] under this seed.
    pub seed: u64,
}

impl Tensor {
    /// One token for each row of logits: `[rows, tokens] → [rows]` I64, drawn by draw `step` of the row's stream.
    ///
    /// `step`: one I64 on the same device, so that a recorded graph can be given another one. The tokens are the same on
    /// every device and for any number of threads. Half types and f32 are computed in f32; shares below about 1e-11 of
    /// the largest are none.
    ///
    /// Errors: another shape, a dtype that is not float, settings out of their domain, a tensor that requires a gradient
    /// (use `detach`); [`Error::Argument`] for logits that are NaN, +∞ or all −∞, on a GPU at the next read-back.
    pub fn sample(&self, spec: &SampleSpec, step: &Tensor) -> Result<Tensor> {
        const OP: &str = "sample";
        discrete(OP, &[self])?;
        ensure!(
            self.rank() == 2 && self.shape()[1] > 0,
            Error::shape(OP, format!("expected logits [rows, tokens] with a token, got {:?}", self.shape()))
        );
        self.dtype().expect_float(OP)?;
        ensure!(
            step.numel() == 1 && step.dtype() == DType::I64 && step.device() == self.device(),
            Error::argument(
                OP,
                format!(
                    "expected a step of one i64 on {}, got {:?} {} on {}",
                    self.device(),
                    step.shape(),
                    step.dtype(),
                    step.device()
                )
            )
        );
        let choice = Choice::new(spec, self.shape()[1])?;
        let (x, step) = (self.contiguous()?, step.contiguous()?);
        let mut tokens = Tensor::uninit(Shape::new(&[x.shape()[0]])?, DType::I64, x.device())?;
        match x.device() {
            Device::Cpu => {
                let step = step.values::<i64>()?[0] as u64;
                dispatch_real!(x.dtype(), R, choice.rows::<R>(x.floats(OP)?, step, tokens.values_mut::<i64>()?)?);
                ensure!(!tokens.values::<i64>()?.contains(&BROKEN), Error::broken_logits());
            }
            Device::Gpu(gpu) => choice.launch(*gpu, &x, &step, &mut tokens)?,
        }
        computed(OP, tokens, &[&x])
    }
}

/// In the place of a token whose logits are broken.
const BROKEN: i64 = -1;

/// A spec in the numbers that rows are computed with, in which the kernel takes it too.
struct Choice {
    filter: SampleFilter,
    /// `1 / temperature`, as far as f32 goes, or 0 for the best token.
    scale: f64,
    seed: u64,
    columns: usize,
    /// The weight of the best token.
    unit: f32,
}

impl Choice {
    fn new(spec: &SampleSpec, columns: usize) -> Result<Self> {
        let SampleSpec { filter, temperature, seed } = *spec;
        let unit_interval = |x: f64| (0.0..=1.0).contains(&x);
        let legal = match filter {
            SampleFilter::All | SampleFilter::Entmax => true,
            SampleFilter::Best(count) => count > 0,
            SampleFilter::MassUpTo(mass) | SampleFilter::MassBelow(mass) => unit_interval(mass),
            SampleFilter::TopA { power, ratio } => power >= 0.0 && power.is_finite() && unit_interval(ratio),
            SampleFilter::MinP(ratio) => unit_interval(ratio),
        };
        ensure!(
            legal,
            Error::argument(
                "sample",
                format!("{filter:?} is out of its domain: counts from 1, shares from 0 to 1, powers from 0")
            )
        );
        ensure!(
            temperature >= 0.0 && temperature.is_finite(),
            Error::argument("sample", format!("expected a finite temperature of at least 0, got {temperature}"))
        );
        let scale = (1.0 / temperature).clamp(f64::from(f32::MIN_POSITIVE), f64::from(f32::MAX));
        let scale = if temperature == 0.0 { 0.0 } else { scale };
        // The sum of all weights stays below 2⁵³, so that f64 holds it.
        let bits = columns.next_power_of_two().ilog2().min(52);
        let unit = (1u64 << (52 - bits).min(36)) as f32;
        Ok(Self { filter, scale, seed, columns, unit })
    }

    fn launch(&self, gpu: &dyn Gpu, x: &Tensor, step: &Tensor, tokens: &mut Tensor) -> Result<()> {
        let Self { filter, scale, seed, columns, unit } = *self;
        let (rows, columns) = (x.shape()[0], size32(columns)?);
        // One block for each row, as far as a grid goes.
        let grid = Grid::new([rows.min(1 << 14) as u32, 1, 1], [512, 1, 1]);
        let dtype = [("DTYPE", x.dtype().name())];
        let mut totals = None;
        let mut numbers = (0, 0, 0u64, 0.0, 0.0);
        match filter {
            SampleFilter::All => {}
            SampleFilter::Best(count) => numbers = (1, 0, count as u64, 0.0, 0.0),
            SampleFilter::MassUpTo(mass) => numbers = (2, 1, 0, mass, 0.0),
            SampleFilter::MassBelow(mass) => numbers = (2, 0, 0, mass, 0.0),
            SampleFilter::TopA { power, ratio } => {
                let totals = totals.insert(Tensor::uninit(Shape::new(&[rows])?, DType::I64, x.device())?);
                let args = args![totals, x, rows as i64, columns, unit];
                gpu.kernel("sample_totals", &dtype)?.launch(grid, args)?;
                numbers = (3, 0, 0, ratio, power);
            }
            SampleFilter::MinP(ratio) => numbers = (4, 0, 0, ratio, 0.0),
            SampleFilter::Entmax => numbers = (5, 0, 0, 0.0, 0.0),
        }
        let (filter, closed, count, limit, power) = numbers;
        gpu.kernel("sample_token", &dtype)?.launch(
            grid,
            args![
                tokens,
                Arg::Output(gpu.faults()),
                x,
                totals.as_ref(),
                step,
                rows as i64,
                columns,
                filter,
                closed,
                count,
                seed,
                scale,
                limit,
                power,
                unit
            ],
        )
    }

    /// The tokens of all rows on the CPU.
    fn rows<T: Logit>(&self, x: Floats, step: u64, tokens: &mut [i64]) -> Result<()> {
        let columns = self.columns;
        let least = match self.filter {
            SampleFilter::TopA { power, ratio } => self.least_share::<T>(x, power, ratio)?,
            _ => 0.0,
        };
        // Keys and weights of each row, from the pool: rows are larger than what an allocator keeps at hand.
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

    /// The token of one row.
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
                // Another row of the batch may have set the limit out of reach.
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

    /// What a probability must reach in [`SampleFilter::TopA`].
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

/// A float type as logits are: its numbers as integers of the same order.
trait Logit: Real {
    type Key: Key;
    fn key(self) -> Self::Key;
}

/// An integer for each number, in their order, −0 before 0.
trait Key: Copy + Ord + Send + Sync + bytemuck::Pod + Into<i64> {
    const LOWEST: Self;
    /// Of the infinities.
    const INFINITE: [Self; 2];
    fn from_i64(key: i64) -> Self;
    /// The number of this key less that of the best, times the scale.
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

/// Of negative numbers the bits grow with the magnitude: all but the sign are turned. Its own inverse.
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

/// Tokens that stay: those whose key is larger, and those that have this one, up to a position.
#[derive(Clone, Copy)]
struct Cut<K> {
    key: K,
    position: u32,
}

/// Keys that are few enough to sort.
const FEW: usize = 256;

impl<'a, K: Key> Row<'a, K> {
    /// The row of these logits; none if one is NaN, or the largest is not finite.
    fn new<T: Logit<Key = K>>(x: &[T], keys: &'a mut [K]) -> Option<Self> {
        let (worst, best) = order::<T>(x, keys);
        // Keys of NaN lie beyond those of the infinities.
        let [lowest, highest] = K::INFINITE;
        (worst >= lowest && best > lowest && best < highest).then_some(Self { keys, worst, best })
    }

    fn best_position(&self) -> usize {
        self.keys.iter().position(|key| *key == self.best).unwrap_or(0)
    }

    /// The best entries until their weights (1 each, if there are none) add up to `bound`; none if they never do.
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
        // Keys from `low` on reach the bound, those from `high` on do not.
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
        if high.abs_diff(low) > 1 {
            between.sort_unstable_by_key(|&(key, position)| (std::cmp::Reverse(key), position));
        }
        let mut reached = from_high.1;
        let last = between.into_iter().find(|&(_, position)| {
            reached += weights.map_or(1.0, |weights| f64::from(weights[position as usize]));
            reached >= bound
        });
        last.map(|(key, position)| Cut { key, position })
    }
}

vectorized! {
    /// Writes the keys; the smallest and the largest.
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

/// To the nearest integer, for numbers from 0 to 2⁵¹.
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
    /// The weights at another scale of those that have at least `least`, 0 for the others.
    fn reweigh_above<K: Key>(keys: &[K], best: K, scale: f64, unit: f32, least: f64, weights: &mut [f32]) {
        for (key, weight) in keys.iter().zip(weights) {
            let other = round(Real::exp(key.scaled(best, scale)) * unit);
            *weight = if f64::from(*weight) >= least { other } else { 0.0 };
        }
    }
}

vectorized! {
    /// Nothing for those that a cut leaves out.
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

/// Sums that are computed side by side.
const LANES: usize = 32;

vectorized! {
    /// How many keys are not below one, and the sum of their weights.
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
    /// Exact, whatever the order.
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
    /// The keys from `low` to `high` with their positions, in their order.
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

/// The cube root of a normal number, by Newton's method.
#[inline(always)]
fn cbrt(x: f32) -> f32 {
    let mut y = f32::from_bits(x.to_bits() / 3 + 0x2A51_19F2);
    for _ in 0..3 {
        y = (y + y + x / (y * y)) * (1.0 / 3.0);
    }
    y
}

/// `unit · max(0, x · (α − 1) − threshold)^(1 / (α − 1))` with α = 1.3 (Peters et al.,
/// <https://arxiv.org/abs/1905.05702>), rounded.
#[inline(always)]
fn entmax_weight(x: f32, threshold: f32, unit: f32) -> f32 {
    let above = x * 0.3 - threshold;
    // A number whose root is one, and which is not used, in place of those that have none.
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

/// The token in whose share of all weights the draw falls.
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
