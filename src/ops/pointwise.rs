//! Elementwise ops: one table row per unary or binary function, with its derivative.

use crate::{
    Result, Tensor,
    core::{Backward, Contributions, Float, dispatch_float, record},
    device::{cpu, simd::vectorized},
};

impl Tensor {
    /// `x · multiplier + summand` with constants; computed in f32 for half types.
    ///
    /// Errors: a dtype that is not float.
    pub fn affine(&self, multiplier: f64, summand: f64) -> Result<Tensor> {
        let x = self.contiguous()?;
        let mut y = x.uninit_like()?;
        dispatch_float!("affine", x.dtype(), T, {
            let from = x.values::<T>()?;
            let (a, b) = (<T as Float>::Acc::from_f64(multiplier), <T as Float>::Acc::from_f64(summand));
            cpu::for_rows(y.values_mut::<T>()?, 1, 1, |at, y| affine::<T>(&from[at..at + y.len()], y, a, b));
            Ok(())
        })?;
        record("affine", y, &[&x], |_| AffineBackward { multiplier })
    }
}

vectorized! {
    fn affine<T: Float>(x: &[T], y: &mut [T], a: T::Acc, b: T::Acc) {
        for (x, y) in x.iter().zip(y) {
            *y = T::from_acc(x.to_acc() * a + b);
        }
    }
}

struct AffineBackward {
    multiplier: f64,
}

impl Backward for AffineBackward {
    fn name(&self) -> &'static str {
        "affine"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<Contributions> {
        grad.affine(self.multiplier, 0.0).map(Contributions::one)
    }
}
