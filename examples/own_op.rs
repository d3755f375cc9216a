//! An op of your own: slices of every float type, rows in parallel, and a gradient that `gradcheck` compares with
//! finite differences of the forward pass.
//!
//!     cargo run --release --example own_op
//!
//! The op normalises rows: `y = x / ‖x‖`. Its gradient is `dx = (dy − y ⟨y, dy⟩) / ‖x‖`.

use x_transformers::{
    Backward, DType, Device, Error, ErrorKind, FloatElement, Gradcheck, InputGrads, Philox, Result, Tape, Tensor, bf16,
    device::for_rows, discrete, f16, gradcheck, record,
};

/// `x / ‖x‖` along the last dimension of `x`, of any float type.
fn unit_rows(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let y = match x.dtype() {
        DType::F32 => forward::<f32>(&x)?,
        DType::F64 => forward::<f64>(&x)?,
        DType::BF16 => forward::<bf16>(&x)?,
        DType::F16 => forward::<f16>(&x)?,
        other => {
            return Err(Error::new(ErrorKind::DType {
                op: "unit_rows",
                message: format!("expected a float tensor, got {other}"),
            }));
        }
    };
    // Without a tape the closure does not run, and nothing is saved.
    record("unit_rows", y, &[&x], |y| UnitRowsBackward { x: x.detach(), y: y.detach() })
}

/// Number of elements of a row; 1 for a scalar.
fn width(x: &Tensor) -> usize {
    x.shape().last().copied().unwrap_or(1)
}

/// Norms in f64, and one rounding at the end: half types lose nothing on the way.
fn norm<T: FloatElement>(row: &[T]) -> f64 {
    row.iter().map(|x| x.to_f64().powi(2)).sum::<f64>().sqrt()
}

fn forward<T: FloatElement>(x: &Tensor) -> Result<Tensor> {
    let (width, from) = (width(x), x.as_slice::<T>()?);
    let mut y = Tensor::empty(*x.shape(), x.dtype(), x.device())?;
    // Each task has some whole rows; three operations per element tell how many pay for a thread.
    for_rows(y.as_mut_slice::<T>()?, width, 3 * width, |first, rows| {
        for (index, y) in rows.chunks_exact_mut(width).enumerate() {
            let x = &from[(first + index) * width..][..width];
            let norm = norm(x);
            y.iter_mut().zip(x).for_each(|(y, x)| *y = T::from_f64(x.to_f64() / norm));
        }
    });
    Ok(y)
}

/// Values that the backward pass reads.
struct UnitRowsBackward {
    x: Tensor,
    y: Tensor,
}

impl UnitRowsBackward {
    fn gradient<T: FloatElement>(&self, grad: &Tensor) -> Result<Tensor> {
        let (width, x, y, grad) =
            (width(&self.x), self.x.as_slice::<T>()?, self.y.as_slice::<T>()?, grad.as_slice::<T>()?);
        let mut dx = Tensor::empty(*self.x.shape(), self.x.dtype(), self.x.device())?;
        for_rows(dx.as_mut_slice::<T>()?, width, 6 * width, |first, rows| {
            for (index, dx) in rows.chunks_exact_mut(width).enumerate() {
                let row = |of: &'_ [T]| -> Vec<f64> {
                    of[(first + index) * width..][..width].iter().map(|x| x.to_f64()).collect()
                };
                let (x, y, grad) = (row(x), row(y), row(grad));
                let (norm, along) = (norm(&x), y.iter().zip(&grad).map(|(y, g)| y * g).sum::<f64>());
                dx.iter_mut()
                    .zip(y.iter().zip(&grad))
                    .for_each(|(dx, (y, g))| *dx = T::from_f64((g - y * along) / norm));
            }
        });
        Ok(dx)
    }
}

impl Backward for UnitRowsBackward {
    fn name(&self) -> &'static str {
        "unit_rows"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let grad = grad.contiguous()?;
        let dx = match grad.dtype() {
            DType::F32 => self.gradient::<f32>(&grad),
            DType::F64 => self.gradient::<f64>(&grad),
            DType::BF16 => self.gradient::<bf16>(&grad),
            _ => self.gradient::<f16>(&grad),
        };
        dx.map(InputGrads::one)
    }
}

/// Returns the number of rows whose norm is not 1. An op without a gradient says so if a tape records its input.
fn rows_off(y: &Tensor, bound: f64) -> Result<usize> {
    discrete("rows_off", &[y])?;
    let squares = y.to_dtype(DType::F64)?.square()?.sum(&[-1])?.to_f64_vec()?;
    Ok(squares.iter().filter(|square| (*square - 1.0).abs() > bound).count())
}

fn main() -> Result<()> {
    let device = Device::Cpu;
    let random = Philox::new(7, 0);
    let x = Tensor::generate([300, 64], DType::F64, &device, |i| random.normal(i as u64))?;
    let wrong = |message: String| Error::new(ErrorKind::Argument { op: "unit_rows", message });

    for (dtype, bound) in [(DType::F32, 1e-6), (DType::F64, 1e-14), (DType::BF16, 1e-2), (DType::F16, 1e-3)] {
        let y = unit_rows(&x.to_dtype(dtype)?)?;
        match rows_off(&y, bound)? {
            0 => println!("{dtype}: every row of {:?} has norm 1", y.shape()),
            off => return Err(wrong(format!("{off} rows of {dtype} have another norm"))),
        }
    }

    // The backward rule against differences of the forward pass.
    let small = x.narrow(0, 0, 3)?.narrow(1, 0, 5)?;
    let report = gradcheck(|inputs| unit_rows(&inputs[0]), &[small], Gradcheck::default())?;
    print!("{report}");
    if !report.passed() {
        return Err(wrong("the gradient is wrong".into()));
    }

    // In use: the angle between two rows falls as the first one turns towards the second.
    let target = unit_rows(&x.narrow(0, 1, 1)?)?;
    let mut guess = x.narrow(0, 0, 1)?.contiguous()?;
    for step in 0..=60 {
        let leaf = guess.requires_grad()?;
        let mut tape = Tape::grad();
        let loss = unit_rows(&leaf)?.sub(&target)?.square()?.sum(&[])?;
        let grads = tape.backward(&loss)?;
        drop(tape);
        if step % 20 == 0 {
            println!("step {step:2}: squared distance {:.4}", loss.item()?);
        }
        if let Some(grad) = grads.get(&leaf) {
            guess = guess.sub(&grad.affine(2.0, 0.0)?)?;
        }
    }
    Ok(())
}
