//! Sampling of the next token from each row of logits, with a filter, a temperature and a draw, on the device of the
//! logits.
//!
//! A row's weights are integers, `round(unit · exp((x − max x) / temperature))` with `unit` a power of two, which are
//! exact in f32 and whose sums are exact in f64: the chosen token depends neither on the order of summation nor on the
//! device. Nothing is sorted: a filter's cut-off is found by bisecting a range of integer keys.

mod cpu;
mod cuda;

use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::{computed, discrete},
    dtype::dispatch_real,
    error::ensure,
    shape::Shape,
};

/// Filter of the tokens that [`Tensor::sample`] may choose. Among tokens with equal logits the earlier one ranks
/// higher.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum SampleFilter {
    /// All tokens.
    All,
    /// Top-k: the given number of tokens with the largest logits.
    Best(usize),
    /// Top-p: the best token, and each token for which the better ones have at most this total probability.
    /// Probabilities are those of temperature 1.
    MassUpTo(f64),
    /// Top-p with a strict bound: the best token, and each token for which the better ones have less than this total
    /// probability.
    MassBelow(f64),
    /// Top-a: with equal probability each token of probability at least `ratio · p^power`, where `p` is the largest
    /// probability in the whole batch; the best token of a row in which there is none.
    TopA {
        /// Exponent of the largest probability.
        power: f64,
        /// Factor of that power.
        ratio: f64,
    },
    /// Min-p: each token with at least this fraction of the row's largest probability.
    MinP(f64),
    /// Tokens to which 1.3-entmax gives a probability, drawn with that probability. The temperature divides the logits
    /// first.
    Entmax,
}

/// Options of [`Tensor::sample`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SampleSpec {
    /// Filter of the candidate tokens.
    pub filter: SampleFilter,
    /// Divides the logits of the remaining tokens; 0 takes the best token.
    pub temperature: f64,
    /// Seed of the draws: row `i` uses stream `i` of [`Philox`](crate::Philox) under this seed.
    pub seed: u64,
}

impl Tensor {
    /// Samples one token per row of logits: `[rows, tokens] → [rows]` I64, with draw `step` of the row's stream.
    ///
    /// `step`: one I64 on the same device, so that it can change between replays of a recorded graph. The tokens are
    /// the same on every device and for any number of threads. Half types and f32 are computed in f32; probabilities
    /// below about 1e-11 of the largest count as 0.
    ///
    /// Errors: another shape, a dtype that is not float, settings out of their domain, a tensor that requires a
    /// gradient (use `detach`); [`ErrorKind::Argument`](crate::ErrorKind::Argument) for logits that are NaN, +∞ or all
    /// −∞, on a GPU at the next read-back.
    #[doc(alias = "multinomial")]
    pub fn sample(&self, spec: &SampleSpec, step: &Tensor) -> Result<Tensor> {
        const OP: &str = "sample";
        discrete(OP, &[self])?;
        ensure!(
            self.rank() == 2 && self.shape()[1] > 0,
            Error::shape(
                OP,
                format_args!("expected logits [rows, tokens] with at least one token, got {:?}", self.shape())
            )
        );
        self.dtype().expect_float(OP)?;
        ensure!(
            step.numel() == 1 && step.dtype() == DType::I64 && step.device() == self.device(),
            Error::argument(
                OP,
                format_args!(
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

/// Result for a row whose logits are invalid.
const BROKEN: i64 = -1;

/// A spec as the numbers that rows are computed with, on the CPU and in the kernel.
struct Choice {
    filter: SampleFilter,
    /// `1 / temperature`, within the range of f32, or 0 for the best token.
    scale: f64,
    seed: u64,
    columns: usize,
    /// Weight of the best token.
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
                format_args!(
                    "{filter:?} is out of range: expected counts of at least 1, probabilities from 0 to 1 and powers \
                     of at least 0"
                )
            )
        );
        ensure!(
            temperature >= 0.0 && temperature.is_finite(),
            Error::argument("sample", format_args!("expected a finite temperature of at least 0, got {temperature}"))
        );
        let scale = (1.0 / temperature).clamp(f64::from(f32::MIN_POSITIVE), f64::from(f32::MAX));
        let scale = if temperature == 0.0 { 0.0 } else { scale };
        // The sum of all weights stays below 2⁵³, so that f64 holds it.
        let bits = columns.next_power_of_two().ilog2().min(52);
        let unit = (1u64 << (52 - bits).min(36)) as f32;
        Ok(Self { filter, scale, seed, columns, unit })
    }
}
