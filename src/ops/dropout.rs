//! Dropout with a mask that is drawn again instead of being stored.

use super::norm::reuse;
use crate::{
    Device, Error, Philox, Result, Tensor,
    core::{Backward, Contributions, Float, Real, dispatch_float, dropout_stream, record_cheap_after},
    device::{Grid, args, cpu, simd::vectorized},
    error::ensure,
};

impl Tensor {
    /// Zeros each element with probability `p` and divides the others by `1 − p` (Srivastava et al.,
    /// <https://jmlr.org/papers/v15/srivastava14a.html>). Acts only under [`Tape::train`](crate::Tape::train), else
    /// the result is the tensor itself; `p = 1` gives zeros.
    ///
    /// Element `i` is kept if word `i` of the call's [`Philox`] stream is at least `p · 2³²`, so that the mask is the
    /// same on every device, for every dtype and number of threads. Saves: the number of the stream; the backward pass
    /// draws the mask again.
    ///
    /// Errors: `p` outside of `[0, 1]`, or a dtype that is not float.
    pub fn dropout(&self, p: f64) -> Result<Tensor> {
        ensure!(
            (0.0..=1.0).contains(&p),
            Error::argument("dropout", format!("the probability must be between 0 and 1, got {p}"))
        );
        self.dtype().expect_float("dropout")?;
        if p == 0.0 {
            return Ok(self.clone());
        }
        let Some(random) = dropout_stream() else { return Ok(self.clone()) };
        let mask = Mask { random, threshold: Philox::drop_threshold(p), scale: 1.0 / (1.0 - p) };
        let x = self.contiguous()?;
        let mut y = x.uninit_like()?;
        mask.apply(Some(&x), &mut y)?;
        record_cheap_after("dropout", y, &x, |_| DropoutBackward { mask }, move |x| mask.applied(x))
    }
}

/// All that it takes to draw a mask.
#[derive(Clone, Copy)]
struct Mask {
    random: Philox,
    threshold: u64,
    scale: f64,
}

impl Mask {
    /// A masked and scaled tensor, in place if no other handle shares it.
    fn applied(&self, x: Tensor) -> Result<Tensor> {
        let (mut y, source) = reuse(x)?;
        self.apply(source.as_ref(), &mut y)?;
        Ok(y)
    }

    /// Masks and scales `source`, or `out` in place.
    fn apply(&self, source: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
        match *out.device() {
            Device::Cpu => dispatch_float!("dropout", out.dtype(), T, {
                let source = source.map(|source| source.values::<T>()).transpose()?;
                let scale = <T as Float>::Acc::from_f64(self.scale);
                // A task starts at a whole group of words; the last group may be cut short.
                cpu::for_rows(out.values_mut::<T>()?, GROUP, 8 * GROUP, |group, out| {
                    if let Some(source) = source {
                        out.copy_from_slice(&source[group * GROUP..][..out.len()]);
                    }
                    apply::<T>(self.random, group as u64, self.threshold, scale, out);
                });
                Ok(())
            }),
            Device::Cuda(gpu) => {
                // A replay would draw the same mask again and again.
                gpu.refuse_while_capturing("dropout")?;
                let (n, dtype, seed, stream) = (out.elements(), out.dtype(), self.random.seed(), self.random.stream());
                gpu.kernel("dropout_mask", &[("DTYPE", dtype.name())])?.launch(
                    Grid::packets(n, dtype),
                    args![&mut *out, source.unwrap_or(&*out), n as i64, seed, stream, self.threshold, self.scale],
                )
            }
        }
    }
}

/// Elements that are masked together: sixteen blocks of four words, enough to fill vector registers.
const GROUP: usize = 64;

vectorized! {
    fn apply<T: Float>(random: Philox, first: u64, threshold: u64, scale: T::Acc, out: &mut [T]) {
        let mut words = [0; GROUP];
        for (group, out) in (first..).zip(out.chunks_mut(GROUP)) {
            draw(random, group, &mut words);
            for (out, &word) in out.iter_mut().zip(&words) {
                let kept = T::from_acc(out.to_acc() * scale);
                *out = if word as u64 >= threshold { kept } else { T::from_acc(T::Acc::ZERO) };
            }
        }
    }
}

/// Words `64 group..64 group + 64` of the stream.
#[inline(always)]
fn draw(random: Philox, group: u64, words: &mut [u32; GROUP]) {
    let first = group * (GROUP as u64 / 4);
    for (block, words) in (first..).zip(words.as_chunks_mut::<4>().0) {
        *words = random.block(block);
    }
}

struct DropoutBackward {
    mask: Mask,
}

impl Backward for DropoutBackward {
    fn name(&self) -> &'static str {
        "dropout"
    }

    /// The gradient under the same mask.
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<Contributions> {
        self.mask.applied(grad).map(Contributions::one)
    }
}
