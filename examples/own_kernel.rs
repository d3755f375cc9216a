//! A CUDA kernel of your own: compiled at run time with the cache and the checks of the library's kernels, launched on
//! tensors, and put on the tape as an op with a gradient.
//!
//!     cargo run --release --example own_kernel
//!
//! The op is the snake activation, `y = x + sin²(a x) / a`, whose gradient is `dy (1 + sin(2 a x))`. Without a GPU the
//! program says so and ends.

use x_transformers::{
    Backward, DType, Device, Error, ErrorKind, InputGrads, KernelArg, Philox, RawKernel, Result, Tape, Tensor,
    device::Grid, record,
};

/// Both kernels, for elements of the type that the option `ELEMENT` names.
const TEXT: &str = include_str!("own_kernel.cu");

/// Launches one of the kernels on packed tensors of `x`'s shape and type.
fn launch(kernel: &str, x: &Tensor, more: &[&Tensor], a: f64) -> Result<Tensor> {
    let (element, number) = match x.dtype() {
        DType::F32 => ("float", KernelArg::F32(a as f32)),
        DType::F64 => ("double", KernelArg::F64(a)),
        other => {
            return Err(Error::new(ErrorKind::DType {
                op: "snake",
                message: format!("expected f32 or f64, got {other}"),
            }));
        }
    };
    // Compiled on first use, then found.
    let kernel = RawKernel::new(x.device(), TEXT, kernel, &[("ELEMENT", element)])?;
    let mut y = Tensor::empty(*x.shape(), x.dtype(), x.device())?;
    let n = x.numel();
    let mut args = vec![KernelArg::Output(&mut y), x.into()];
    args.extend(more.iter().map(|&tensor| KernelArg::Input(tensor)));
    args.extend([(n as i64).into(), number]);
    // SAFETY: every tensor has `n` elements of type `T`, as `snake` and the tape make sure, and no thread goes beyond them
    // or writes an element of another one.
    unsafe { kernel.launch(Grid::elements(n), args) }?;
    Ok(y)
}

/// Computes `x + sin²(a x) / a` for `x` on a GPU.
fn snake(x: &Tensor, a: f64) -> Result<Tensor> {
    let x = x.contiguous()?;
    let y = launch("snake_fwd", &x, &[], a)?;
    record("snake", y, &[&x], |_| SnakeBackward { x: x.detach(), a })
}

struct SnakeBackward {
    x: Tensor,
    a: f64,
}

impl Backward for SnakeBackward {
    fn name(&self) -> &'static str {
        "snake"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        launch("snake_bwd", &self.x, &[&grad.contiguous()?], self.a).map(InputGrads::one)
    }
}

fn main() -> Result<()> {
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(why) => {
            println!("no GPU, nothing to show: {why}");
            return Ok(());
        }
    };
    let (a, random) = (1.5, Philox::new(7, 0));
    for (dtype, bound) in [(DType::F32, 1e-5), (DType::F64, 1e-12)] {
        let x = Tensor::generate([37, 41], dtype, &device, |i| random.normal(i as u64))?.requires_grad()?;
        let mut tape = Tape::grad();
        let y = snake(&x, a)?;
        let grads = tape.backward(&y.sum(&[])?)?;
        let Some(dx) = grads.get(&x) else {
            return Err(Error::new(ErrorKind::Argument { op: "snake", message: "there is no gradient".into() }));
        };
        let (x, y, dx) = (x.to_f64_vec()?, y.to_f64_vec()?, dx.to_f64_vec()?);
        let off = |values: &[f64], f: &dyn Fn(f64) -> f64| {
            values.iter().zip(&x).map(|(value, &x)| (value - f(x)).abs()).fold(0.0, f64::max)
        };
        let off = [off(&y, &|x| x + (a * x).sin().powi(2) / a), off(&dx, &|x| 1.0 + (2.0 * a * x).sin())];
        println!("{device}, {dtype}: largest error {:.1e} forward, {:.1e} backward", off[0], off[1]);
        if off.iter().any(|off| off.is_nan() || *off > bound) {
            return Err(Error::new(ErrorKind::Argument {
                op: "snake",
                message: format!("the errors exceed {bound:.0e}"),
            }));
        }
    }

    // Calls that do not fit are errors, each before anything is launched.
    let refused = |what: &str, outcome: Result<()>| match outcome {
        Err(why) => {
            println!("{what}: {}", why.to_string().lines().next().unwrap_or_default());
            Ok(())
        }
        Ok(()) => Err(Error::new(ErrorKind::Argument { op: "snake", message: format!("{what} was accepted") })),
    };
    let options = [("ELEMENT", "float")];
    let kernel = RawKernel::new(&device, TEXT, "snake_fwd", &options)?;
    let x = Tensor::ones([8, 8], DType::F64, &device)?;
    let mut y = Tensor::empty([8, 8], DType::F32, &device)?;
    // SAFETY: nothing is launched.
    let wrong = unsafe { kernel.launch(Grid::elements(64), [(&mut y).into(), (&x).into(), 64i64.into(), 1f32.into()]) };
    refused("a tensor of another type", wrong)?;
    refused("a kernel that is not there", RawKernel::new(&device, TEXT, "snake", &options).map(drop))?;
    refused(
        "a text that is no C",
        RawKernel::new(&device, &TEXT.replace("sin(", "sin)("), "snake_fwd", &options).map(drop),
    )
}
