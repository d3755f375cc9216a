//! Weights in eight bits for decoding: a scale per row of the matrix, sums in f32.

use crate::{
    DType, Device, Error, Result, Tensor,
    core::{Float, Shape, discrete, dispatch_float},
    device::{CudaDevice, Grid, args, cpu, simd::vectorized, size32},
    error::ensure,
    ops::copy::same_device,
};

const OP: &str = "int8";

/// Rows of inputs up to which weights are read as they are; for more they are widened once.
const FEW: usize = 8;
/// Sums that run side by side in a product, four times.
const LANES: usize = 16;
/// Weights that are widened at a time.
const PART: usize = 512;

/// A matrix `[out, in]` of integers from −127 to 127, each row times its own scale: a quarter of the bytes of f32.
///
/// ```
/// use x_transformers::{Device, Tensor, ops::Int8Matrix};
/// # fn main() -> x_transformers::Result<()> {
/// let weight = Tensor::from_slice(&[127.0f32, -64.0, 0.5, 0.25], [2, 2], &Device::Cpu)?;
/// let matrix = Int8Matrix::quantize(&weight)?;
/// let x = Tensor::from_slice(&[1.0f32, 2.0], [1, 2], &Device::Cpu)?;
/// let y = matrix.linear(&x, None)?.to_vec::<f32>()?;
/// assert!((y[0] + 1.0).abs() < 1e-5 && (y[1] - 1.0).abs() < 0.01);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Int8Matrix {
    /// `[out, in]`, as bytes.
    bytes: Tensor,
    /// `[out]` f32.
    scales: Tensor,
}

impl Int8Matrix {
    /// The nearest integers to a float matrix `[out, in]`, the largest of each row being 127.
    ///
    /// Errors: another rank or dtype, or numbers that are not finite.
    pub fn quantize(weight: &Tensor) -> Result<Self> {
        let &[rows, columns] = &weight.shape()[..] else {
            return Err(Error::shape(OP, format!("expected a matrix [out, in], got {:?}", weight.shape())));
        };
        weight.dtype().expect_float(OP)?;
        let values = weight.to_f64_vec()?;
        ensure!(
            values.iter().all(|x| x.is_finite()),
            Error::argument(OP, "expected finite weights, got NaN or infinity")
        );
        let mut bytes = Tensor::uninit(Shape::new(&[rows, columns])?, DType::Bool, &Device::Cpu)?;
        let mut scales = Vec::with_capacity(rows);
        let to = bytes.values_mut::<bool>()?;
        for (row, to) in values.chunks(columns.max(1)).zip(to.chunks_mut(columns.max(1))) {
            let largest = row.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            let scale = if largest > 0.0 { (largest / 127.0) as f32 } else { 1.0 };
            for (to, x) in to.iter_mut().zip(row) {
                *to = (x / f64::from(scale)).round().clamp(-127.0, 127.0) as i8 as u8;
            }
            scales.push(scale);
        }
        scales.resize(rows, 1.0);
        let device = weight.device();
        Ok(Self { bytes: bytes.to_device(device)?, scales: Tensor::from_vec(scales, [rows], device)? })
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.bytes.elements() + 4 * self.scales.elements()
    }

    /// The numbers as floats.
    ///
    /// Errors: a dtype that is not float.
    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        dtype.expect_float(OP)?;
        let (rows, columns) = (self.bytes.shape()[0], self.bytes.shape()[1]);
        let mut wide = Tensor::uninit(*self.bytes.shape(), dtype, self.bytes.device())?;
        match *self.bytes.device() {
            Device::Cpu => dispatch_float!(OP, dtype, T, {
                let (bytes, scales) = (self.bytes.values::<bool>()?, self.scales.values::<f32>()?);
                cpu::for_rows(wide.values_mut::<T>()?, columns, columns, |first, wide| {
                    for (index, wide) in wide.chunks_exact_mut(columns).enumerate() {
                        widen::<T>(&bytes[(first + index) * columns..][..columns], scales[first + index], wide);
                    }
                });
                Ok(())
            })?,
            Device::Cuda(gpu) => gpu.kernel("int8_dequantize", &[("DTYPE", dtype.name())])?.launch(
                Grid::elements(rows * columns),
                args![&mut wide, &self.bytes, &self.scales, (rows * columns) as i64, size32(columns)?],
            )?,
        }
        Ok(wide)
    }

    /// As [`Tensor::linear`] with these weights: `[.., in] → [.., out]`.
    ///
    /// Errors: sizes, dtypes or devices that do not fit, or a tensor that requires a gradient: integers have none.
    pub fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (rows, columns) = (self.bytes.shape()[0], self.bytes.shape()[1]);
        ensure!(
            x.rank() > 0 && x.shape()[x.rank() - 1] == columns && x.dtype().is_float(),
            Error::shape(OP, format!("expected floats [.., {columns}], got {:?} {}", x.shape(), x.dtype()))
        );
        same_device(OP, x, &self.bytes)?;
        discrete(OP, &[x])?;
        let count = x.elements().checked_div(columns).unwrap_or(0);
        if count > FEW || columns == 0 {
            return x.linear(&self.dequantize(x.dtype())?, bias.map(Tensor::detach).as_ref());
        }
        if let Some(bias) = bias {
            ensure!(
                **bias.shape() == [rows] && bias.dtype() == x.dtype() && bias.device() == x.device(),
                Error::shape(
                    OP,
                    format!("expected a bias [{rows}] {}, got {:?} {}", x.dtype(), bias.shape(), bias.dtype())
                )
            );
        }
        let (x, bias) = (x.detach().contiguous()?, bias.map(|bias| bias.detach().contiguous()).transpose()?);
        let shape = x.shape().with_dim(x.rank() - 1, rows);
        match *x.device() {
            Device::Cuda(gpu) => self.on_cuda(gpu, &x, bias.as_ref(), count, shape),
            Device::Cpu => dispatch_float!(OP, x.dtype(), T, self.on_cpu::<T>(&x, bias.as_ref(), count, shape)),
        }
    }

    fn on_cuda(
        &self,
        gpu: &CudaDevice,
        x: &Tensor,
        bias: Option<&Tensor>,
        count: usize,
        shape: Shape,
    ) -> Result<Tensor> {
        let (rows, columns) = (self.bytes.shape()[0], self.bytes.shape()[1]);
        let mut y = Tensor::uninit(shape, x.dtype(), x.device())?;
        let sizes = (count as i64, rows as i64, size32(columns)?);
        gpu.kernel("int8_linear", &[("DTYPE", x.dtype().name())])?.launch(
            Grid::rows(rows, 32),
            args![&mut y, x, &self.bytes, &self.scales, bias, sizes.0, sizes.1, sizes.2],
        )?;
        Ok(y)
    }

    fn on_cpu<T: Float>(&self, x: &Tensor, bias: Option<&Tensor>, count: usize, shape: Shape) -> Result<Tensor> {
        let (rows, columns) = (self.bytes.shape()[0], self.bytes.shape()[1]);
        let wide = x.to_dtype(DType::F32)?;
        let (x_values, bytes, scales) =
            (wide.values::<f32>()?, self.bytes.values::<bool>()?, self.scales.values::<f32>()?);
        let bias = bias.map(Tensor::values::<T>).transpose()?;
        // By outputs first, so that each task reads its rows of the weights once for all inputs.
        let mut products = Tensor::uninit(Shape::new(&[rows, count])?, DType::F32, x.device())?;
        cpu::for_rows(products.values_mut::<f32>()?, count, 2 * columns, |first, products| {
            for (index, products) in products.chunks_exact_mut(count).enumerate() {
                let row = first + index;
                products_of_row(&bytes[row * columns..][..columns], x_values, scales[row], products);
            }
        });
        let products = products.values::<f32>()?;
        let mut y = Tensor::uninit(shape, x.dtype(), x.device())?;
        for (at, y) in y.values_mut::<T>()?.iter_mut().enumerate() {
            let (input, row) = (at / rows, at % rows);
            let sum = <T::Acc as Float>::from_f64(f64::from(products[row * count + input]));
            let sum: T::Acc = sum;
            *y = T::from_acc(bias.map_or(sum, |bias| sum + bias[row].to_acc()));
        }
        Ok(y)
    }
}

vectorized! {
    /// The products of a row of weights with each of the inputs that lie one after the other.
    fn products_of_row(bytes: &[u8], x: &[f32], scale: f32, products: &mut [f32]) {
        let columns = bytes.len();
        products.fill(0.0);
        // Widened once for all inputs, a part at a time.
        let mut wide = [0.0f32; PART];
        for (part, bytes) in bytes.chunks(PART).enumerate() {
            for (wide, byte) in wide.iter_mut().zip(bytes) {
                *wide = *byte as i8 as f32;
            }
            let wide = &wide[..bytes.len()];
            for (input, product) in products.iter_mut().enumerate() {
                let x = &x[input * columns + part * PART..][..wide.len()];
                let mut lanes = [[0.0f32; LANES]; 4];
                let (mut wide_chunks, mut x_chunks) = (wide.chunks_exact(4 * LANES), x.chunks_exact(4 * LANES));
                for (wide, x) in (&mut wide_chunks).zip(&mut x_chunks) {
                    for ((lane, wide), x) in lanes.as_flattened_mut().iter_mut().zip(wide).zip(x) {
                        *lane += *wide * *x;
                    }
                }
                let mut sum = 0.0;
                for (wide, x) in wide_chunks.remainder().iter().zip(x_chunks.remainder()) {
                    sum += *wide * *x;
                }
                let [a, b, c, d] = lanes;
                for (((a, b), c), d) in a.into_iter().zip(b).zip(c).zip(d) {
                    sum += (a + b) + (c + d);
                }
                *product += sum;
            }
        }
        for product in products {
            *product *= scale;
        }
    }
}

vectorized! {
    fn widen<T: Float>(bytes: &[u8], scale: f32, wide: &mut [T]) {
        for (wide, byte) in wide.iter_mut().zip(bytes) {
            *wide = <T as Float>::from_f64(f64::from(*byte as i8) * f64::from(scale));
        }
    }
}
