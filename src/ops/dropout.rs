//! Dropout whose mask is drawn again instead of stored, on its own or followed by a residual sum.

use super::norm::reuse;
use crate::{
    Device, Error, Philox, Result, Tensor,
    autograd::{Backward, InputGrads, MaskStream, mask_stream, record, record_cheap_after},
    device::{
        Grid, args,
        floats::Floats,
        rows::{In, Out, Sums, for_rows_of},
        simd::vectorized,
    },
    dtype::{Float, Real, dispatch_real},
    error::ensure,
    tensor::same_kind,
};

/// Number of elements that are masked together.
const GROUP: usize = Philox::GROUP;

impl Tensor {
    /// Zeros each element with probability `p` and divides the others by `1 − p` (Srivastava et al.,
    /// <https://jmlr.org/papers/v15/srivastava14a.html>). Acts only under [`Tape::train`](crate::Tape::train),
    /// otherwise returns the tensor itself; `p = 1` gives zeros.
    ///
    /// Element `i` is kept if word `i` of the call's [`Philox`] stream is at least `p · 2³²`, so the mask is the same
    /// on every device, for every dtype and number of threads. Saves: the number of the stream; the backward pass draws
    /// the mask again. A dropped element is always 0, and so is its gradient; PyTorch multiplies by 0, which turns
    /// infinities into NaN and keeps NaN.
    ///
    /// Errors: `p` outside of `[0, 1]`, or a dtype that is not float.
    ///
    /// ```
    /// use x_transformers::{DType, Device, Tape, Tensor};
    /// let x = Tensor::ones([1000], DType::F32, &Device::Cpu)?;
    /// assert_eq!(x.dropout(0.5)?.sum(&[])?.item()?, 1000.0); // no tape: nothing is dropped
    /// let _tape = Tape::train(0);
    /// assert!(x.dropout(0.5)?.to_vec::<f32>()?.iter().all(|&x| x == 0.0 || x == 2.0));
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    #[doc(alias = "Dropout")]
    pub fn dropout(&self, p: f64) -> Result<Tensor> {
        check("dropout", self, p)?;
        let Some(mask) = Mask::drawn(p, self.device())? else { return Ok(self.clone()) };
        let x = self.contiguous()?;
        let mut y = x.uninit_like()?;
        mask.apply(Some(&x), None, &mut y)?;
        let again = mask.clone();
        record_cheap_after("dropout", y, &x, |_| DropoutBackward { mask }, move |x| again.applied(x))
    }

    /// Computes `dropout(x) + residual` in one pass, for a branch that ends with dropout and joins its residual stream;
    /// without [`Tape::train`](crate::Tape::train) only the sum. The mask is that of [`Tensor::dropout`]. Saves: the
    /// number of its stream.
    ///
    /// Shapes: `x` and `residual` have the same shape.
    /// Errors: those of [`Tensor::dropout`], or a residual of another shape, dtype or device.
    pub fn dropout_add(&self, residual: &Tensor, p: f64) -> Result<Tensor> {
        const OP: &str = "dropout_add";
        check(OP, self, p)?;
        same_kind(OP, self, residual)?;
        let (shape, given) = (self.shape(), residual.shape());
        ensure!(shape == given, Error::shape(OP, format_args!("expected a residual {shape:?}, got {given:?}")));
        let Some(mask) = Mask::drawn(p, self.device())? else { return self.add(residual) };
        let (x, residual) = (self.contiguous()?, residual.contiguous()?);
        let mut y = x.uninit_like()?;
        mask.apply(Some(&x), Some(&residual), &mut y)?;
        record(OP, y, &[&x, &residual], |_| DropoutAddBackward { mask })
    }
}

fn check(op: &'static str, x: &Tensor, p: f64) -> Result<()> {
    ensure!((0.0..=1.0).contains(&p), Error::argument(op, format_args!("expected a probability from 0 to 1, got {p}")));
    x.dtype().expect_float(op)
}

/// State from which a mask is drawn.
#[derive(Clone)]
struct Mask {
    stream: MaskStream,
    threshold: u64,
    scale: f64,
}

impl Mask {
    /// Draws the mask of the next call; returns `None` where dropout does not act.
    fn drawn(p: f64, device: &Device) -> Result<Option<Self>> {
        if p == 0.0 {
            return Ok(None);
        }
        let (threshold, scale) = (Philox::drop_threshold(p), 1.0 / (1.0 - p));
        Ok(mask_stream(device)?.map(|stream| Self { stream, threshold, scale }))
    }

    /// Masks and scales a tensor, in place if no other handle shares it.
    fn applied(&self, x: Tensor) -> Result<Tensor> {
        let (mut y, source) = reuse(x)?;
        self.apply(source.as_ref(), None, &mut y)?;
        Ok(y)
    }

    /// Masks and scales `source`, or `out` in place, and adds the residual if there is one.
    fn apply(&self, source: Option<&Tensor>, residual: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
        match *out.device() {
            Device::Cpu => {
                const OP: &str = "dropout";
                let source = source.map(|source| source.floats(OP)).transpose()?;
                let wide = if residual.is_some() { GROUP } else { 0 };
                let residual = residual.map_or(Ok(Floats::of::<f32>(&[])), |residual| residual.floats(OP))?;
                let dtype = out.dtype();
                let out = Out::over(out.floats_mut(OP)?, GROUP, source);
                dispatch_real!(dtype, R, {
                    let scale = R::from_f64(self.scale);
                    // A task starts at a whole group of words; the last group may be cut short.
                    let ins = [In::new(residual, wide)];
                    for_rows_of::<R, 1, 1>([out], ins, Sums::none(), 8 * GROUP, &|group, [out], [residual], _| {
                        let residual = (!residual.is_empty()).then_some(residual);
                        apply::<R>(self.stream.random, group as u64, self.threshold, scale, residual, out);
                    });
                });
                Ok(())
            }
            Device::Gpu(gpu) => {
                let (n, dtype, random) = (out.numel(), out.dtype(), self.stream.random);
                let values = args![n as i64, random.seed(), random.stream(), self.threshold, self.scale];
                let tensors = args![&mut *out, source.unwrap_or(&*out), residual];
                let args = [&tensors[..], &[self.stream.seed_at(gpu)?], values].concat();
                gpu.kernel("dropout_mask", &[("DTYPE", dtype.name())])?.launch(Grid::packets(n, dtype), &args)
            }
        }
    }
}

vectorized! {
    fn apply<T: Float>(
        random: Philox,
        first: u64,
        threshold: u64,
        scale: T::Acc,
        residual: Option<&[T]>,
        out: &mut [T],
    ) {
        let mut words = [0; GROUP];
        for (index, out) in out.chunks_mut(GROUP).enumerate() {
            random.group(first + index as u64, &mut words);
            let masked = |x: T, word: u32| if word as u64 >= threshold { x.to_acc() * scale } else { T::Acc::ZERO };
            match residual {
                Some(residual) => {
                    for ((out, &word), residual) in out.iter_mut().zip(&words).zip(&residual[index * GROUP..]) {
                        *out = T::from_acc(masked(*out, word) + residual.to_acc());
                    }
                }
                None => {
                    for (out, &word) in out.iter_mut().zip(&words) {
                        *out = T::from_acc(masked(*out, word));
                    }
                }
            }
        }
    }
}

struct DropoutBackward {
    mask: Mask,
}

impl Backward for DropoutBackward {
    fn name(&self) -> &'static str {
        "dropout"
    }

    /// Computes the gradient under the same mask.
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        self.mask.applied(grad).map(InputGrads::one)
    }
}

struct DropoutAddBackward {
    mask: Mask,
}

impl Backward for DropoutAddBackward {
    fn name(&self) -> &'static str {
        "dropout_add"
    }

    /// Computes the gradient under the same mask; the residual's is the gradient itself.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let residual = need[1].then(|| grad.clone());
        let dx = if need[0] { Some(self.mask.applied(grad)?) } else { None };
        Ok(InputGrads::whole([dx, residual]))
    }
}
